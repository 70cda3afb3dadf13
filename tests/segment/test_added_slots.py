"""Slots that are added while readers keep older versions: nobody is stopped or torn, and they are given back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import marks
from policies import mlp
from processes import Cli
from trainers import Trainer, leased, taken_over

import wsync
from wsync.errors import SegmentBusy
from wsync.policy.reader import Mode, Reader
from wsync.segment import segment_files, writable
from wsync.segment.segment import Segment
from wsync.system import memory
from wsync.system.access import Access


@pytest.fixture
def trainer(runtime: Path) -> Trainer:
    return Trainer(mlp)


def idle_readers(trainer: Trainer, number: int) -> list[Reader]:
    """Readers in swap that stay on one version each, from 1 on; their number plus one versions are published."""
    readers = []
    for mark in range(1, number + 1):
        trainer.push(mark)
        readers.append(wsync.attach(mlp(), "nets", mode="swap"))
    trainer.push(number + 1)
    return readers


def slot_files(segment: Segment) -> list[str]:
    return sorted(name for name in os.listdir(segment.path) if name.startswith("slot") and not name.endswith(".extras"))


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_idle_readers_stop_nobody(trainer: Trainer, mode: Mode) -> None:
    """Two notebooks on two old versions hold the two spare slots: pushes go on, and others follow each of them."""
    idle = idle_readers(trainer, 2)
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        for mark in range(4, 14):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
            assert len(trainer.segment.slot_numbers()) <= 5
        assert [r.version for r in idle] == [1, 2]
        for r in idle:
            r.close()
        for mark in range(14, 17):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
    assert slot_files(trainer.segment) == ["slot-0.safetensors", "slot-1.safetensors", "slot-2.safetensors"]


def test_a_reader_that_keeps_every_version_stops_nobody(trainer: Trainer) -> None:
    """``pool.append(policy.state_dict())`` for ever: each stays what it was, in memory of the keeper's own."""
    trainer.push(1)
    keeper, other = mlp(), mlp()
    pool: list[dict[str, torch.Tensor]] = []
    with wsync.attach(keeper, "nets", mode="swap") as keeping, wsync.attach(other, "nets", mode="swap") as reader:
        for mark in range(2, 40):
            pool.append(keeper.state_dict())
            trainer.push(mark)
            assert keeping.refresh() and reader.refresh() and marks(other) == {float(mark)}
            taken_over()
            assert len(trainer.segment.slot_numbers()) <= 4
        kept = [{float(x) for tensor in one.values() for x in tensor.flatten()} for one in pool]
        assert kept == [{float(mark)} for mark in range(1, 39)]


def test_a_forked_child_that_never_refreshes_stops_nobody(trainer: Trainer) -> None:
    """A DataLoader's workers have the policy that they were forked with, each the version of its time."""
    trainer.push(1)
    policy, children = mlp(), []
    with wsync.attach(policy, "nets", mode="swap") as reader:
        for mark in range(2, 6):
            if not (child := os.fork()):
                signal.pause()
            children.append(child)
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
        assert len(leased(trainer.segment)) == 5
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for mark in (6, 7):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
    assert len(trainer.segment.slot_numbers()) == 3


def test_the_bound_is_told_with_who_keeps_what(trainer: Trainer, cli: Cli) -> None:
    """At the bound a push is busy, and says how many slots there may be, which option says so, and whose they are."""
    trainer.segment.control.bound = 4
    idle = idle_readers(trainer, 3)
    with pytest.raises(SegmentBusy) as caught:
        trainer.push(5)
    for words in ("no more than 4", "max_slots", *(f"pid {os.getpid()}, version {version}" for version in (1, 2, 3))):
        assert words in str(caught.value)
    shown = cli("status", "nets").stdout
    assert "4 slots, 4 at most" in shown
    idle[0].refresh()
    assert trainer.push(5) == 5
    for r in idle:
        r.close()


def test_a_trainers_loop_can_catch_it(trainer: Trainer) -> None:
    """What ``push_weights`` raises at the bound is among the public names, and leaves what is live."""
    trainer.segment.control.bound = 3
    idle = idle_readers(trainer, 2)
    updater = wsync.SharedMemoryWeightUpdater("nets", policy=mlp(), max_slots=3)
    with pytest.raises(wsync.SegmentBusy):
        updater.push_weights(mlp())
    for r in idle:
        r.close()
    updater.push_weights(mlp())
    assert trainer.segment.version == 4
    updater.close()


@pytest.mark.parametrize("cause", ["no memory", "no room"])
def test_memory_that_is_short_is_not_taken(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, cause: str) -> None:
    """Where a slot does not fit beside what others need, nothing is added, and the message says that it is memory."""
    idle = idle_readers(trainer, 2)
    if cause == "no memory":
        monkeypatch.setattr(writable, "spare_memory", lambda: 1000)
    else:

        def full(fd: int, size: int) -> None:
            os.ftruncate(fd, size // 2)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(segment_files, "reserve", full)
    with pytest.raises(SegmentBusy, match=f"there is {cause} for another one"):
        trainer.push(4)
    assert len(slot_files(trainer.segment)) == 3 and trainer.segment.version == 3
    for r in idle:
        r.close()


@pytest.mark.parametrize("at", ["reserve", "write_at", "rename"])
def test_a_publisher_killed_while_it_adds_leaves_a_segment_that_works(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """What is there of the new slot has no name; the next publisher adds another one, and removes it."""
    idle = idle_readers(trainer, 2)
    if not (child := os.fork()):
        place: Any = os if at == "rename" else segment_files
        real = getattr(place, at)

        def die(what: Any, *arguments: Any, **named: Any) -> Any:
            if what == "slot.new" or at != "rename":
                os.kill(os.getpid(), signal.SIGKILL)
            return real(what, *arguments, **named)

        monkeypatch.setattr(place, at, die)
        trainer.push(4)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(trainer.segment.slot_numbers()) == 3 and "slot.new" in os.listdir(trainer.segment.path)
    with wsync.attach(mlp(), "nets", mode="swap") as reader:
        assert trainer.push(4) == 4 and reader.refresh()
    assert len(slot_files(trainer.segment)) == 4
    for r in idle:
        r.close()


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked"])
def test_a_reader_that_is_late_by_a_slot_given_back_starts_over(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """R1 saw an added slot live, which is gone by R2: the reader takes the newest version, and raises nothing."""
    idle = idle_readers(trainer, 2)
    trainer.push(4)
    reader = Segment.open("nets")
    assert reader.word & 0xFF == 3
    for r in idle:
        r.close()
    due = [True]

    def pushes() -> None:
        if due and due.pop():
            trainer.push(5)
            trainer.push(6)
            assert len(trainer.segment.slot_numbers()) == 3

    patched: Callable[..., object] = Segment._open_slot if when == "before it is opened" else memory.try_lock

    def late(*arguments: object, **named: object) -> object:
        if arguments[0] is reader or named.get("shared"):
            pushes()
        return patched(*arguments, **named)

    if when == "before it is opened":
        monkeypatch.setattr(Segment, "_open_slot", late)
    else:
        monkeypatch.setattr("wsync.segment.segment.try_lock", late)
    lease = reader.lease()
    assert lease and lease.version == 6
    lease.release()
    reader.close()


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_slot_added_again_is_another_file(trainer: Trainer, mode: Mode) -> None:
    """A reader that knew a slot of that number does not act on the memory of the file that is gone."""
    policy = mlp()
    trainer.push(1)
    with wsync.attach(policy, "nets", mode=mode) as reader:
        for mark in (10, 20, 30):
            idle = [wsync.attach(mlp(), "nets", mode="swap")]
            seen = set()
            for more in range(1, 5):
                trainer.push(mark + more)
                if more < 3:
                    idle.append(wsync.attach(mlp(), "nets", mode="swap"))
                assert reader.refresh() and marks(policy) == {float(mark + more)}
                seen.add(trainer.segment.word & 0xFF)
            assert max(seen) >= 3
            for r in idle:
                r.close()
            for more in range(5, 8):
                trainer.push(mark + more)
                assert reader.refresh() and marks(policy) == {float(mark + more)}
            assert len(trainer.segment.slot_numbers()) == 3


def test_an_added_slot_is_open_to_those_who_may_read(runtime: Path) -> None:
    """A shared segment's readers can open it, as they can the others."""
    runtime.chmod(0o755)
    trainer = Trainer(mlp)
    trainer.segment.share(Access("0644"))
    idle = idle_readers(trainer, 3)
    modes = {oct((trainer.segment.path / name).stat().st_mode) for name in slot_files(trainer.segment)}
    assert len(slot_files(trainer.segment)) == 4 and modes == {"0o100644"}
    for r in idle:
        r.close()
