"""A reader: plays CartPole with the newest weights of a segment, and prints a JSON line for each episode.

python episodes.py SEGMENT
"""

import json
import sys

import gymnasium as gym
import torch
from rule import make_policy

import wsync


def play(name: str) -> None:
    policy, env = make_policy(), gym.make("CartPole-v1")
    with wsync.attach(policy, name) as reader:
        for episode in range(1_000_000):
            reader.refresh()  # between episodes: each is of one version
            observation, _ = env.reset(seed=episode % 10)
            total, ended = 0.0, False
            while not ended:
                with torch.inference_mode():
                    action = int(policy(torch.from_numpy(observation)) > 0)
                observation, reward, terminated, truncated, _ = env.step(action)
                total, ended = total + float(reward), terminated or truncated
            print(json.dumps({"version": reader.version, "step": reader.step, "return": total}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        play(sys.argv[1])
    except (BrokenPipeError, KeyboardInterrupt):  # nobody listens any more
        sys.exit(0)
