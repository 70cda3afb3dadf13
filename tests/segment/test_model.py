"""Every interleaving of the protocol's steps, right as they are, and what breaks where one is left out or misplaced."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pytest
from builders import write
from model import STEPS, Flaw, Model, Property, find
from policies import mlp
from steps import Trace, code, essay

import wsync
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import SegmentBusy
from wsync.layout.layout import layout_of
from wsync.segment import writable
from wsync.segment.publishing import publish, publish_tensors
from wsync.segment.writable import WritableSegment
from wsync.system import memory

pytestmark = pytest.mark.slow

TORN: Property = "no torn read"
OTHER: Property = "the version's own weights"
WRITTEN: Property = "what is used is not written"
GROW: Property = "versions grow"
LEASED: Property = "the live slot can be leased"
STUCK: Property = "no stuck publisher"


@pytest.mark.parametrize(
    "model", [Model(1, ("swap", "copy")), Model(1, ("swap", "swap")), Model(2, ("swap",)), Model(2, ("copy",))], ids=str
)
def test_every_interleaving_holds(model: Model) -> None:
    """Whoever steps when and dies where: nothing torn, nothing lost, nobody stuck, and no version goes back."""
    found = find(model)
    print(f"{found.states} states")
    assert found.broken is None, "\n".join((found.broken, *found.way))
    assert found.states > 300


@pytest.mark.parametrize(
    ("flaw", "publishers", "broken"),
    [
        ("no P1 lock", 2, TORN),
        ("no P1 lock", 2, OTHER),
        ("no P1 lock", 2, GROW),
        ("no P2 lock", 1, TORN),
        ("no P2 lock", 1, WRITTEN),
        ("no P3 check", 1, TORN),
        ("no look before P2", 1, LEASED),
        ("P3 before P1", 2, TORN),
        ("P7 before P6", 1, LEASED),
        ("P7 before P4 is done", 1, TORN),
        ("no R2 lease", 1, TORN),
        ("no R2 lease", 1, WRITTEN),
        ("no R3 recheck", 1, TORN),
        ("no R3 recheck", 1, OTHER),
        ("R3 of the slot alone", 1, OTHER),
        ("R5 before R4", 1, TORN),
        ("R5 before R4", 1, WRITTEN),
        ("locks outlive their process", 1, STUCK),
    ],
)
def test_each_flaw_is_found(flaw: Flaw, publishers: int, broken: Property) -> None:
    """The model sees what each step is there for: without it, or with it elsewhere, this property breaks."""
    assert find(Model(publishers, ("swap",), flaw), frozenset([broken])).broken == broken


@pytest.mark.parametrize("flaw", ["no P1 lock", "no P2 lock", "no P3 check", "no R2 lease", "no R3 recheck"])
def test_copying_needs_the_same_steps(flaw: Flaw) -> None:
    """A reader that copies the two halves one after the other is torn by the same flaws as one that swaps."""
    assert find(Model(2 if flaw == "no P1 lock" else 1, ("copy",), flaw), frozenset([TORN])).broken == TORN


@pytest.mark.parametrize("flaw", ["no P1 lock", "R3 of the slot alone", "P7 before P6"])
def test_a_flaw_is_told_with_the_shortest_way(flaw: Flaw) -> None:
    """What is found can be read: the steps, each with whose it is, up to the one that breaks the property."""
    found = find(Model(2, ("swap",), flaw))
    assert found.broken and all(": " in step for step in found.way)
    assert found.way[0].startswith("publisher") and len(found.way) < 40


@pytest.mark.parametrize("publishers", [1, 2])
def test_early_look_is_enough_under_the_publishers_lock(publishers: int) -> None:
    """P3 repeats the look before P2: while P1 holds, the WORD is nobody else's to change, and either does."""
    assert find(Model(publishers, ("swap",), "P3 before P2")).broken is None


def test_slot_locked_at_its_store_is_only_out_of_reach() -> None:
    """P7 before P6 tears nothing: it is the reader who follows the WORD at once that is turned away."""
    rest = frozenset([TORN, OTHER, WRITTEN, GROW, STUCK])
    assert find(Model(1, ("swap",), "P7 before P6"), rest).broken is None


def test_model_essay_and_code_name_the_same_steps() -> None:
    """The steps of the model are those of the essay's table, and each of them is marked in the code."""
    assert essay() == list(STEPS)
    assert {line.step for line in code()} == set(STEPS)


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_code_runs_through_the_steps_in_their_order(
    runtime: Path, tmp_path: Path, mode: Literal["swap", "copy"]
) -> None:
    """A publish, of a file and from memory, and a refresh after another pass the marked lines as the essay has them."""
    policy = mlp()
    segment = WritableSegment.create("nets", layout_of(policy))
    path = write(tmp_path / "step_1.safetensors", mlp(), 1.0)
    with Trace() as first, segment.publishing(), Checkpoint(path) as checkpoint:
        publish(segment, checkpoint)
    assert first.steps == list(STEPS[:8])
    with wsync.attach(policy, "nets", mode=mode) as reader:
        with Trace() as second, segment.publishing():
            publish_tensors(segment, mlp().state_dict())
        assert second.steps == list(STEPS[:8])
        with Trace() as third:
            assert reader.refresh()
        assert third.steps == list(STEPS[8:])
    segment.close()


def test_publisher_never_locks_the_live_slot(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look before P2: whoever follows the WORD while a publisher picks a slot is not turned away."""
    segment = WritableSegment.create("nets", layout_of(mlp()))
    path = write(tmp_path / "step_1.safetensors", mlp(), 1.0)
    locked: list[str] = []

    def noted(fd: int, *, shared: bool = False) -> bool:
        locked.append(os.readlink(f"/proc/self/fd/{fd}"))
        return memory.try_lock(fd, shared=shared)

    monkeypatch.setattr(writable, "try_lock", noted)
    for _ in range(4):
        live = segment.word & 0xFF
        locked.clear()
        with segment.publishing(), Checkpoint(path) as checkpoint:
            publish(segment, checkpoint)
        assert len(locked) == 2 and not locked[1].endswith(f"slot-{live}.safetensors")
    segment.close()


def test_publisher_late_by_a_removal_is_turned_away(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opened the lock of a segment that was removed before it got the lock publishes nothing into the void."""
    segment = WritableSegment.create("nets", layout_of(mlp()))
    due = [True]

    def late(fd: int, *, shared: bool = False) -> bool:
        if due and due.pop():
            writable.remove("nets")
        return memory.try_lock(fd, shared=shared)

    monkeypatch.setattr(writable, "try_lock", late)
    with pytest.raises(SegmentBusy, match="was just removed"), segment.publishing():
        pytest.fail("the publisher of a segment that is gone")
    segment.close()
