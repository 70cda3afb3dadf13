"""Updaters whose weights, or whose policy, have tensors of a class that refuses copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import marks
from policies import mlp
from stubborn import KINDS, Packed, Stubborn, stubborn

import wsync
from wsync.errors import CopyRefused, HalfWritten
from wsync.segment.segment import Segment


def filled(mark: float) -> torch.nn.Module:
    policy = mlp()
    for tensor in policy.parameters():
        tensor.data.fill_(mark)
    return policy


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_refuses_copies_is_left_as_it_was(kind: type[torch.Tensor]) -> None:
    """Guards against some tensors of the new weights and some of the old, in a policy of this process."""
    policy = stubborn(kind)
    for name in ("0.bias", "2.weight"):
        policy.get_parameter(name).data.fill_(5.0)
    with pytest.raises(CopyRefused, match="refused its copy|cannot be copied into"):
        wsync.VanillaWeightUpdater.from_policy(policy).push_weights(filled(7.0))
    assert all(policy.get_parameter(name).eq(5.0).all() for name in ("0.bias", "2.weight"))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_such_a_class_are_published_where_they_can_be_read(kind: type[torch.Tensor], runtime: Path) -> None:
    """A trainer's class may refuse copies into it; what refuses copies out of it as well goes nowhere, and is named."""
    updater = wsync.SharedMemoryWeightUpdater("nets", policy=mlp())
    updater.push_weights(filled(1.0))
    mine = filled(1.0)
    local = wsync.VanillaWeightUpdater.from_policy(mine)
    if kind is Packed:
        for each in (updater, local):
            with pytest.raises(CopyRefused, match=r"^0\.weight: .*Packed"):
                each.push_weights(stubborn(kind))
        assert marks(mine) == {1.0}
    else:
        updater.push_weights(stubborn(kind))
    segment = Segment.open("nets")
    assert segment.version == (1 if kind is Packed else 2)
    segment.close()
    updater.close()


def test_a_policy_that_is_half_written_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what was written cannot be written back, this push and all later ones say so."""
    monkeypatch.setattr(Stubborn, "refuses", lambda size: False)
    updater = wsync.VanillaWeightUpdater.from_policy(stubborn())
    updater.push_weights(filled(1.0))

    def the_second_and_all_after_it(size: int) -> bool:
        if size == 2:
            monkeypatch.setattr(Stubborn, "refuses", lambda size: True)
        return size == 2

    monkeypatch.setattr("wsync.layout.weights.check_copy", lambda *pair: None)  # it changes its mind after the trial
    monkeypatch.setattr(Stubborn, "refuses", the_second_and_all_after_it)
    with pytest.raises(HalfWritten, match="two versions"):
        updater.push_weights(filled(2.0))
    monkeypatch.setattr(Stubborn, "refuses", lambda size: False)
    with pytest.raises(HalfWritten, match="two versions"):
        updater.push_weights(filled(3.0))
