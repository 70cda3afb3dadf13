"""Learn CartPole with stable-baselines3, and publish the policy as it learns: `python learn.py STEPS`."""

import sys

import torch
from stable_baselines3 import PPO

from wsync.stable_baselines3 import WsyncCallback

if __name__ == "__main__":
    torch.set_num_threads(1)
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=256, learning_rate=1e-3, seed=0, device="cpu")
    model.learn(int(sys.argv[1]), callback=WsyncCallback("cartpole", every=2_000))
    print(f"learned {model.num_timesteps} steps")
