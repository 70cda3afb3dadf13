"""Play an episode with each policy that is published, up to that of the last step: `python player.py STEP`."""

import sys

import gymnasium
import torch
from stable_baselines3 import PPO

import wsync
from wsync.stable_baselines3 import normalize

if __name__ == "__main__":
    torch.set_num_threads(1)
    last = int(sys.argv[1])
    environment = gymnasium.make("CartPole-v1")
    policy = PPO("MlpPolicy", environment, device="cpu").policy
    policy.set_training_mode(False)
    with wsync.attach(policy, "cartpole") as reader:
        while True:
            observation, _ = environment.reset(seed=reader.version)
            total, ended = 0.0, False
            while not ended:
                action, _ = policy.predict(normalize(reader.extras, observation))
                observation, reward, terminated, truncated, _ = environment.step(int(action))
                total, ended = total + float(reward), terminated or truncated
            print(f"version {reader.version:3}   step {reader.step:6}   return {total:3.0f}", flush=True)
            if (reader.step or 0) >= last:
                break
            reader.wait()
            reader.refresh()
