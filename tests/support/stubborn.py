"""Tensors whose class has its own mind about copies, as those of quantised, packed and sharded weights do."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Stubborn(torch.Tensor):
    """Refuses copies where ``refuses`` says so of a tensor's number of elements."""

    refuses: Callable[[int], bool] = operator.truth

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and isinstance(args[0], cls) and cls.refuses(args[0].numel()):
            raise NotImplementedError("packed")
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})


class Overriding(torch.Tensor):
    """Refuses copies by a method of its own, which a call of torch's would not see."""

    def copy_(self, *args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("packed")


class Packed(torch.Tensor):
    """Has no bytes of its own; a copy of plain values asks them for what only its own kind has."""

    within: torch.Tensor

    @staticmethod
    def __new__(cls, within: torch.Tensor) -> Packed:
        made: Packed = torch.Tensor._make_wrapper_subclass(cls, within.shape, dtype=within.dtype)
        made.within = within
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.copy_.default:
            return args[0].within.copy_(args[1].within)
        out = func(*(each.within if isinstance(each, cls) else each for each in args), **(kwargs or {}))
        return cls(out) if isinstance(out, torch.Tensor) else out


KINDS: list[type[torch.Tensor]] = [Stubborn, Overriding, Packed]


def stubborn(kind: type[torch.Tensor] = Stubborn) -> nn.Module:
    """``mlp``, two of whose tensors, of 32 and of 2 elements, are of a class of their own."""
    policy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).requires_grad_(False).eval()
    for module, name in ((policy[0], "weight"), (policy[2], "bias")):
        plain = torch.zeros(getattr(module, name).shape)
        made = kind(plain) if kind is Packed else plain.as_subclass(kind)
        delattr(module, name)
        module.register_buffer(name, made)
    return policy


def stubborn_packed() -> nn.Module:
    """For a spec."""
    return stubborn(Packed)
