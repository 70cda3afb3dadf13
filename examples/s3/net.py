"""The policy that trainer and policy process build alike."""

from torch import nn


def make_policy(hidden: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 2))
