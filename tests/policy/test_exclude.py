"""State of the actor's own, which no version changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from policies import Tied, mlp
from torch import nn
from trainers import Trainer

import wsync
from wsync.errors import AttachTimeout, LayoutDiffers, UsageError
from wsync.policy.reader import Mode


class Noisy(nn.Module):
    """With noise of its own, which it writes at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("eps", torch.zeros(2))
        self.eval()


class Noiseless(nn.Module):
    """The same as a spec has it that leaves the noise out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()


@pytest.mark.parametrize("made", [Noisy, Noiseless])
@pytest.mark.parametrize("mode", ["auto", "swap", "copy"])
def test_what_is_excluded_stays_the_actors_own(
    made: type[nn.Module], mode: Mode, runtime: Path, tmp_path: Path
) -> None:
    """Guards exploration noise and the like in each mode, whether the segment has it or not."""
    trainer, policy = Trainer(made), Noisy()
    trainer.push(1)
    policy.get_buffer("eps").fill_(7)
    with wsync.attach(policy, "nets", mode=mode, exclude=["*eps"]) as reader:
        assert reader.mode == ("copy" if mode == "copy" else "swap")
        for mark in (2, 3, 4, 5):
            policy.get_buffer("eps").add_(1)
            trainer.push(mark)
            assert reader.refresh()
            assert all(tensor.eq(mark).all() for tensor in policy.parameters())
            assert policy.get_buffer("eps").eq(6 + mark).all()
    assert policy.get_buffer("eps").eq(11).all()


@pytest.mark.parametrize(
    ("exclude", "told"), [(["*.epz"], "matches no parameter"), (["head.*"], r"head\.weight, which is tied")]
)
def test_globs_that_cannot_be_meant_are_told(exclude: Sequence[str], told: str, runtime: Path) -> None:
    """Guards against workers that are made alike by a typing error, and a tie of which one half is left out."""
    with pytest.raises(UsageError, match=told):
        wsync.attach(Tied().eval(), "nets", exclude=exclude, timeout=0)
    assert list(runtime.iterdir()) == []


def test_others_are_still_compared(runtime: Path) -> None:
    """Guards the rest of the architecture; and that a publisher makes the segment."""
    with pytest.raises(AttachTimeout):
        wsync.attach(Noisy(), "nets", exclude="*eps", timeout=0)
    Trainer(mlp)
    with pytest.raises(LayoutDiffers):
        wsync.attach(Noisy(), "nets", exclude="*eps", timeout=0)
