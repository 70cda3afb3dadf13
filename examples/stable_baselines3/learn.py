"""Learn CartPole with stable-baselines3, and publish the policy as it learns: `python learn.py STEPS`."""

import sys

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from wsync.stable_baselines3 import WsyncCallback

if __name__ == "__main__":
    torch.set_num_threads(1)
    environment = VecNormalize(make_vec_env("CartPole-v1", seed=0))
    model = PPO("MlpPolicy", environment, n_steps=256, learning_rate=1e-3, seed=0, device="cpu")
    model.learn(int(sys.argv[1]), callback=WsyncCallback("cartpole", every=2_000))
    print(f"learned {model.num_timesteps} steps")
