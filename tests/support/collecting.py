"""A collector of torchrl whose batches say which weights acted in them.

The policy's action is three times the one value that all its weights carry.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl import collectors, data, envs


class Still(envs.EnvBase):  # type: ignore[misc]
    """Shows the same observation for ever, and says which process it is in."""

    def __init__(self) -> None:
        super().__init__()
        whole = data.Unbounded(1, dtype=torch.int64)
        self.observation_spec = data.Composite(observation=data.Unbounded(2), process=whole)
        self.action_spec, self.reward_spec = data.Unbounded(1), data.Unbounded(1)

    def _reset(self, tensordict: TensorDictBase | None = None, **options: Any) -> TensorDictBase:
        return TensorDict({"observation": torch.ones(2), "process": torch.tensor([os.getpid()])})

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._reset().update({"reward": torch.zeros(1), "done": torch.tensor([False])})

    def _set_seed(self, seed: int | None) -> None:
        pass


class Sum(nn.Module):
    """A parameter and a buffer: with a mark in both, the action is three times the mark."""

    offset: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("offset", torch.zeros(1))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return (observation * self.weight).sum(-1, keepdim=True) + self.offset


def make_policy(mark: float = 0.0, module: Callable[[], nn.Module] = Sum) -> Any:
    policy = TensorDictModule(module(), in_keys=["observation"], out_keys=["action"]).eval()
    policy.load_state_dict(marked(mark, policy))
    return policy


def plain() -> nn.Module:
    """The same sum without a buffer, ready for swap."""
    return nn.Linear(2, 1)


def marked(mark: float, policy: Any = None) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(t, mark) for name, t in (policy or make_policy()).state_dict().items()}


def mark_of(batch: Any) -> float:
    """The one mark that acted throughout a batch."""
    (action,) = set(batch["action"].flatten().tolist())
    return float(action) / 3


def versions_of(batch: Any) -> set[int]:
    """The policy versions that the actions of a batch are labelled with; its observations carry the one before."""
    return set(batch["next", "policy_version"].flatten().tolist())


@contextlib.contextmanager
def collecting(policy: Any, **options: Any) -> Iterator[tuple[Any, Iterator[Any]]]:
    """A collector and its batches of four steps; it is shut down whatever happens."""
    options = {"frames_per_batch": 4, "total_frames": -1, "auto_register_policy_transforms": False, **options}
    collector = collectors.Collector(Still, policy, **options)
    try:
        yield collector, iter(collector)
    finally:
        collector.shutdown()
