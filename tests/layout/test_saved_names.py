"""Names are those of ``state_dict()``, under which trainers save, also where modules have others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import wsync
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.layout.layout import layout_of, named_tensors
from wsync.segment.publishing import publish
from wsync.segment.writable import WritableSegment


def wrapped() -> nn.Module:
    block: nn.Module = checkpoint_wrapper(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    return nn.Sequential(nn.Linear(4, 8), block).eval()


def tied() -> nn.Module:
    """Two wrapped layers that are one, and a third that has the weight of the first."""
    layer = nn.Linear(4, 4)
    other = nn.Linear(4, 4)
    other.weight = layer.weight
    once: nn.Module = checkpoint_wrapper(layer)
    return nn.Sequential(once, once, other).eval()


class Renamed(nn.Module):
    """Saves under names of its own, and copies of its tensors that lie in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(1))

    def state_dict(self, *args: Any, **more: Any) -> dict[str, Any]:  # type: ignore[override]
        table = super().state_dict(*args, **more)
        return {name.replace("inner.", "net."): tensor.detach() for name, tensor in table.items()}


class Partial(nn.Module):
    """Does not save one of its tensors, and saves what is none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self._register_state_dict_hook(self._drop)  # type: ignore[no-untyped-call]

    @staticmethod
    def _drop(module: nn.Module, table: dict[str, Any], prefix: str, _: object) -> None:
        del table[f"{prefix}b.bias"]
        table[f"{prefix}extra"] = torch.ones(3)
        table[f"{prefix}words"] = "no tensor"


class Broken(nn.Linear):
    def state_dict(self, *args: Any, **more: Any) -> Any:
        raise RuntimeError("not here")


NAMES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "wrapped": (wrapped, {*wrapped().state_dict()}),
    "tied": (tied, {*tied().state_dict()}),
    "renamed": (Renamed, {"net.weight", "net.bias", "scale"}),
    "partial": (Partial, {"a.weight", "a.bias", "b.weight", "b.bias"}),
    "broken": (lambda: Broken(2, 2), {"weight", "bias"}),
    "plain": (lambda: nn.BatchNorm1d(2), {*nn.BatchNorm1d(2).state_dict()}),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_are_those_that_trainers_save(kind: str) -> None:
    """Guards each way to name tensors otherwise; what is not saved keeps its module's name."""
    make, names = NAMES[kind]
    assert {name for entry in layout_of(make()).tensors for name in entry.names} == names
    with torch.device("meta"):
        assert layout_of(make()) == layout_of(make())


def test_tied_weights_stay_tied() -> None:
    """Guards one place for one tensor, whatever its names are."""
    entries = layout_of(tied()).tensors
    weights = ("0.weight", "1.weight", "2.weight")
    assert [entry.names for entry in entries] == [("0.bias", "1.bias"), weights, ("2.bias",)]


@pytest.mark.parametrize("mode", ["copy", "auto"])
def test_a_wrapped_policy_takes_its_own_state_dict(mode: Any, runtime: Path, tmp_path: Path) -> None:
    """Guards the way from a trainer's save to an attached policy, wrapped on both sides."""
    trainer, policy = wrapped(), wrapped()
    save_file(trainer.state_dict(), tmp_path / "a.safetensors")
    segment = WritableSegment.create("wrapped", layout_of(policy))
    with closing(segment), Checkpoint(tmp_path / "a.safetensors") as new:
        with segment.publishing():
            publish(segment, new)
        with wsync.attach(policy, "wrapped", mode=mode):
            mine, theirs = dict(named_tensors(policy)), trainer.state_dict()
            assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
