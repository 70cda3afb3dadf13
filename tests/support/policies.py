"""Policies that the tests build, push and attach; importable by the wsync processes that the tests start."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from wsync.layout.layout import TORCH_DTYPES


def mlp(hidden: int = 8) -> nn.Sequential:
    """Four tensors, no buffers, ready for swap."""
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 2)).eval()


def normed() -> nn.Sequential:
    """With buffers that training mode writes to, floats all of them."""
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=True)).eval()


def scripted(how: str = "script") -> nn.Module:
    """``mlp`` as TorchScript."""
    make: Any = torch.jit.script if how == "script" else torch.jit.trace
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of all that torch.jit makes, in newer torch
        policy: nn.Module = make(mlp(), *([torch.ones(1, 4)] if how == "trace" else []))
    return policy


class Tied(nn.Module):
    """A tied pair, a buffer that persists and one that does not, and more than one dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight  # the tie
        self.norm = nn.BatchNorm1d(3)
        self.low = nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def every_dtype(low: int) -> nn.ParameterDict:
    """A tensor of each dtype that a segment can hold, with the values from ``low`` on."""
    dtypes = {
        name: getattr(torch, dtype) for name, dtype in TORCH_DTYPES.items() if name != "F4"
    }  # torch casts nothing to it
    tensors = {name: torch.arange(low, low + 3).to(dtype) for name, dtype in dtypes.items()}
    return nn.ParameterDict(
        {name: nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) for name, tensor in tensors.items()}
    ).eval()


class Counting(nn.Module):
    """Writes a buffer of its own in place, in eval mode too."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(1))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out: torch.Tensor = self.linear(x)
        return out


instance = mlp()
not_a_policy = 42
