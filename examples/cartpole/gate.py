"""A gate: weights go live only if the policy still plays well with them.

`gated.toml` names `returns`. wsync calls it with the policy that it staged, in a process of its own,
before any running policy can see those weights. To raise is to refuse, and the text is the reason in
wsync's log; `wsync.RetryLater` would ask for the same weights again later.
"""

import gymnasium as gym
import torch
from policy import act
from torch import nn

EPISODES, ENOUGH = 5, 100.0  # an untrained policy gets about 20, one that never falls 500


def returns(policy: nn.Module) -> None:
    """Play `EPISODES` episodes, the same ones each time; their mean return must be `ENOUGH`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    env = gym.make("CartPole-v1")
    total = 0.0
    for episode in range(EPISODES):
        observation, _ = env.reset(seed=episode)
        ended = False
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(act(policy, observation))
            total += float(reward)
            ended = terminated or truncated
    mean = total / EPISODES
    if mean < ENOUGH:
        raise ValueError(f"mean return {mean:.0f} of {EPISODES} episodes, and {ENOUGH:.0f} is enough")
