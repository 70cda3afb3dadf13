"""The actor: what the trainer teaches and what the policy process plays.

Both processes build it with `make_policy`, and `cartpole.toml` names the same function, so that
wsync knows the names, shapes and dtypes of its weights. Four observations in, one logit for each of
the two actions out; plain layers in eval mode, so an attached policy reads its weights right where
they were published, without a copy.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


def make_policy(hidden: int = 64) -> nn.Module:
    """A fresh actor with two hidden layers of `hidden` units each."""
    return nn.Sequential(
        nn.Linear(4, hidden),
        nn.Tanh(),
        nn.Linear(hidden, hidden),
        nn.Tanh(),
        nn.Linear(hidden, 2),
    ).eval()


def act(policy: nn.Module, observation: NDArray[np.float32]) -> int:
    """An action for one observation of shape (4,), drawn with the policy's own probabilities."""
    with torch.inference_mode():
        return int(policy(torch.from_numpy(observation)).softmax(-1).multinomial(1))
