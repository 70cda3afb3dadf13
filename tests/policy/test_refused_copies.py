"""Tensors that refuse a copy: found out before anything is written, and a version is taken whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import stubborn as stubborn_tensors
import torch
from builders import marks
from policies import mlp
from stubborn import KINDS, Stubborn, stubborn
from trainers import Trainer

import wsync
from wsync.errors import CopyRefused, HalfWritten, UsageError
from wsync.policy.reader import Mode
from wsync.settings import layout_process
from wsync.settings.spec import Spec


def never(size: int) -> bool:
    return False


@pytest.mark.parametrize("mode", ["auto", "copy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_refuses_copies_is_named_by_attach(trainer: Trainer, kind: type[torch.Tensor], mode: Mode) -> None:
    """Guards against a policy with some tensors of the new version and some of the old."""
    trainer.push(1)
    policy = stubborn(kind)
    policy.get_parameter("0.bias").fill_(5.0)
    before = policy.get_parameter("0.bias").tolist()
    with pytest.raises(UsageError, match=rf"^0\.weight is of the class {kind.__name__}, which refuses"):
        wsync.attach(policy, "nets", mode=mode)
    assert policy.get_parameter("0.bias").tolist() == before
    assert trainer.segment.readers() == []


def test_a_copy_that_fails_half_way_is_undone(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the version before, where a tensor's class changes its mind: it stays whole, and can be followed again."""
    monkeypatch.setattr(Stubborn, "refuses", never)
    trainer.push(1)
    policy = stubborn()
    with wsync.attach(policy, "nets") as reader:
        trainer.push(2)
        monkeypatch.setattr(
            Stubborn, "refuses", lambda size: size == 2
        )  # the second of them; the first was written by then
        for _ in range(2):
            with pytest.raises(CopyRefused, match="Stubborn refused its copy .NotImplementedError: packed"):
                reader.refresh()
            assert marks(policy) == {1.0} and reader.version == 1
        assert all(record.slots == () for record in trainer.segment.readers())
        monkeypatch.setattr(Stubborn, "refuses", never)
        assert reader.refresh() and marks(policy) == {2.0} and reader.version == 2


def test_a_policy_that_is_half_written_is_of_no_use(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against steps on weights of two versions: where nothing can be written back, every later call raises."""
    monkeypatch.setattr(Stubborn, "refuses", never)
    trainer.push(1)
    policy = stubborn()
    with wsync.attach(policy, "nets") as reader:
        trainer.push(2)

        def the_second_and_all_after_it(size: int) -> bool:
            if size == 2:
                monkeypatch.setattr(Stubborn, "refuses", lambda size: True)
            return size == 2

        monkeypatch.setattr(Stubborn, "refuses", the_second_and_all_after_it)
        with pytest.raises(HalfWritten, match="two versions"):
            reader.refresh()
        monkeypatch.setattr(Stubborn, "refuses", never)
        trainer.push(3)
        for call in (reader.refresh, reader.wait, reader.refresh):
            with pytest.raises(HalfWritten, match="two versions"):
                call()
        assert reader.version == 1


def test_memory_that_cannot_be_written_is_found_half_way(trainer: Trainer) -> None:
    """Guards the same for a plain tensor to which its user gave memory that no copy can fill."""
    trainer.push(1)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="copy") as reader:
        policy.get_parameter("2.bias").data = torch.zeros(1).expand(2)
        trainer.push(2)
        for _ in range(2):
            with pytest.raises(HalfWritten, match="single memory location"):
                reader.refresh()


@pytest.mark.slow
def test_a_spec_whose_readers_could_take_nothing_is_refused_at_push(layouts_here: None) -> None:
    """Guards the readers of a published policy that none of them could attach."""
    spec = Spec("stubborn:stubborn_packed", "packed", Path(stubborn_tensors.__file__).parent)
    with pytest.raises(CopyRefused, match=r"0\.weight is of the class Packed"):
        layout_process.layout_of_spec(spec)
