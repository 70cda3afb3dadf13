"""A watch that has nothing to do lists nothing: where notifications work, and the place's own times have not moved."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from builders import NAME, SPEC, mark_of, write
from policies import mlp
from processes import DEADLINE

from wsync.discovery import listing
from wsync.discovery.changes import Changes
from wsync.discovery.newest import Select
from wsync.errors import WsyncError
from wsync.history.rollback import pin_checkpoint
from wsync.history.state import State
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.settings.hook_settings import Hooks
from wsync.settings.spec import Spec
from wsync.sync.loop import Idle, Schedule, run
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer

Event = Outcome | WsyncError


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each listing of a place from now on."""
    made: list[str] = []
    entries_of = listing.entries_of

    def counting(place: Path) -> Any:
        made.append(str(place))
        return entries_of(place)

    monkeypatch.setattr(listing, "entries_of", counting)
    monkeypatch.setattr("wsync.discovery.changes._is_local", lambda device: True)
    return made


@pytest.fixture
def watch(segment: Segment, runs: Path) -> Iterator[Callable[[], Event]]:
    """A watch of ``runs`` in a thread; gives the outcome of its next pass."""
    stop, told = threading.Event(), queue.SimpleQueue[Event]()
    write(runs / "step_1.safetensors", mlp(), 1.0)
    with Syncer(Spec(SPEC, NAME, Path.cwd(), poll=0.02), runs, state=State(NAME), role="watch") as syncer:
        thread = threading.Thread(target=run, args=(syncer, stop, told.put))
        thread.start()
        yield lambda: told.get(timeout=DEADLINE)
        stop.set()
        thread.join(DEADLINE)


def status(event: Event) -> str:
    assert isinstance(event, Outcome), event
    return event.status


def until(watch: Callable[[], Event], wanted: str) -> None:
    while status(watch()) != wanted:
        pass


def test_an_idle_watch_lists_nothing(
    listings: list[str], watch: Callable[[], Event], runs: Path, segment: Segment
) -> None:
    """Guards an idle watch among 10,000 files against listing them at each poll; what comes is live all the same."""
    until(watch, "current")
    watch()
    before = len(listings)
    assert [status(watch()) for _ in range(20)] == ["current"] * 20
    assert len(listings) - before <= 1
    write(runs / "step_2.safetensors", mlp(), 2.0)
    until(watch, "published")
    assert mark_of(segment) == {2.0}
    (runs / "step_3").mkdir()
    until(watch, "current")
    write(runs / "step_3/model.safetensors", mlp(), 3.0)
    until(watch, "published")
    assert mark_of(segment) == {3.0}


@pytest.mark.usefixtures("layouts_here")
@pytest.mark.parametrize("order", ["mtime", "step", "arrival"])
def test_a_watch_looks_at_the_files_that_are_notified(
    order: Literal["mtime", "step", "arrival"], listings: list[str], segment: Segment, runs: Path
) -> None:
    """Guards how soon a new file is live among 100,000: nothing is listed, and the same is chosen."""
    old, half = write(runs / "step_1.safetensors", mlp(), 1.0), runs / "step_3.safetensors"
    with Syncer(Spec(SPEC, NAME, Path.cwd(), select=Select(order=order)), runs, state=State(NAME)) as syncer:
        passes = Idle(syncer)

        def once(*names: str) -> tuple[str, bool]:
            before = len(listings)
            return passes.once({*names}).status, len(listings) > before

        def settles() -> None:
            assert passes.once(None).status == "current"

        assert once("step_1.safetensors") == ("published", True)
        settles()
        write(runs / "step_2.safetensors", mlp(), 2.0)
        assert once("step_2.safetensors", "gone.safetensors") == ("published", False)
        assert once() == ("current", True) and mark_of(segment) == {2.0}
        old.unlink()
        assert once(old.name) == ("current", False)
        half.write_bytes((runs / "step_2.safetensors").read_bytes()[:-1])
        assert once(half.name) == ("current", False)
        assert once(half.name) == ("current", True)  # what is newer may pass by itself
        write(half, mlp(), 3.0)
        passes.once({half.name})
        assert mark_of(segment) == {3.0}
        settles()
        other = write(runs / "step_4.safetensors", mlp(4), 4.0)
        assert once(other.name) == ("rejected", False)
        assert once("step_2.safetensors") == ("rejected", True)  # which is said at each pass
        other.unlink()
        settles()
        with Syncer(syncer.spec, runs / "step_2.safetensors") as by_hand:
            assert by_hand.once().version == 4
        assert once("step_2.safetensors") == ("published", True)  # the newest, over what was pushed by hand
        settles()
        half.unlink()
        assert once(half.name)[1]  # what is live is gone
        write(runs / "step_6.safetensors", mlp(), 6.0)
        assert passes.once(None).status == "published"
        settles()
        write(runs / "model.safetensors", mlp(), 4.0)  # from now on the place is a checkpoint itself
        write(runs / "step_5.safetensors", mlp(), 5.0)
        once("step_5.safetensors")
        assert mark_of(segment) == {4.0}


def test_files_of_the_place_are_named(listings: list[str], runs: Path) -> None:
    """Guards a watch against looking at too little: whatever is not a file of the place has it list all."""
    (runs / "step_1").mkdir(parents=True)
    changes = Changes(runs, 3600.0, threading.Event())

    def named(change: Callable[[], object]) -> set[str] | None:
        change()
        while changes.wait(0.05):
            pass
        return changes.named()

    assert changes.named() is None
    assert named(lambda: None) == set()
    for name in ("step_2.safetensors", "step_3.safetensors"):
        assert named(partial(write, runs / name, mlp(), 1.0)) == {name}
    assert named((runs / "step_2.safetensors").unlink) == {"step_2.safetensors"}
    assert named(lambda: write(runs / "step_1" / "model.safetensors", mlp(), 1.0)) is None
    assert named((runs / "step_4").mkdir) is None
    assert named(lambda: (runs / "last").symlink_to("step_1")) is None
    assert named(lambda: runs.rename(runs.with_name("moved")).rename(runs)) is None
    changes.close()


def test_what_lies_deeper_is_told_of(listings: list[str], runs: Path) -> None:
    """Guards weights two levels below a checkpoint: notifications tell all, so that none of them waits for the poll."""
    inner = runs / "step_1" / "policy" / "actor"
    inner.mkdir(parents=True)
    write(inner / "model.safetensors", mlp(), 1.0)
    changes = Changes(runs, 3600.0, threading.Event(), Select(within="policy/actor"))
    assert changes.tells_all()
    write(inner / "model.safetensors", mlp(), 2.0)
    assert changes.wait(DEADLINE)
    for name in ("step_2", "step_2/policy", "step_2/policy/actor", "policy", "policy/actor"):
        path = runs / name
        while changes.wait(0.05):
            pass
        path.mkdir()
        assert changes.wait(DEADLINE), path
    while changes.wait(0.05):
        pass
    for entry in (runs / "step_2", runs):  # the place may be a checkpoint itself
        write(entry / "policy/actor/model.safetensors", mlp(), 3.0)
        assert changes.wait(DEADLINE) and changes.tells_all()
        while changes.wait(0.05):
            pass
    changes.close()


def test_a_full_look_comes_now_and_then(
    listings: list[str], monkeypatch: pytest.MonkeyPatch, watch: Callable[[], Event]
) -> None:
    """Guards what no notification tells, such as a write through a memory map."""
    until(watch, "current")
    monkeypatch.setattr(Schedule, "full", 0.0)
    watch()
    before = len(listings)
    for _ in range(5):
        watch()
    assert len(listings) - before >= 4


def test_a_write_that_nobody_tells_of_is_seen_in_the_live_file(
    listings: list[str], watch: Callable[[], Event], runs: Path
) -> None:
    """Guards a live file whose times move without a notification of concern."""
    until(watch, "current")
    watch()
    before = len(listings)
    os.utime(runs / "step_1.safetensors", (1, 1))
    watch()
    watch()
    assert len(listings) > before


def test_a_pin_is_obeyed_without_a_notification(
    listings: list[str], watch: Callable[[], Event], runs: Path, runtime: Path
) -> None:
    """Guards `wsync pin` of another file beside an idle watch: the next pass puts it live."""
    other = write(runs.parent / "other.safetensors", mlp(), 2.0)
    until(watch, "current")
    watch()
    with State(NAME) as state:
        pin_checkpoint(NAME, str(other), runtime=runtime, state=state)
    assert "published" in [status(watch()) for _ in range(5)]


def test_an_edited_gate_is_asked_without_a_notification(segment: Segment, runs: Path) -> None:
    """Guards an operator who repairs a gate: a watch with nothing new tries what it refused, and once only."""
    gate = Path("gate.sh")
    write(runs / "step_1.safetensors", mlp(), 1.0)
    spec = Spec(SPEC, NAME, Path.cwd(), hooks=Hooks(gate="sh ./gate.sh"))
    with Syncer(spec, runs, state=State(NAME)) as syncer:
        passes = Idle(syncer)

        def once(text: str = "") -> tuple[str, int]:
            if text:
                gate.write_text(f"printf x >> asked; {text}")
            return passes.once(set()).status, len(Path("asked").read_text())

        assert once("exit 0") == ("published", 1)
        assert once() == ("current", 1)
        write(runs / "step_2.safetensors", mlp(), 2.0)
        assert [once("echo no; exit 1"), once(), once()] == [("rejected", 2)] * 3
        assert [once("exit 1"), once(), once()] == [("rejected", 3)] * 3
        assert [once("exit 0"), once(), once()] == [("published", 4), ("current", 4), ("current", 4)]


def test_what_may_pass_by_itself_is_looked_at_again(
    listings: list[str], watch: Callable[[], Event], runs: Path, segment: WritableSegment
) -> None:
    """Guards a newer checkpoint that is half written or met another publisher: no notification tells of its end."""
    until(watch, "current")
    half = write(runs.parent / "half.safetensors", mlp(), 2.0)
    os.truncate(half, half.stat().st_size - 1)
    half = half.rename(runs / "step_2.safetensors")
    while not getattr(watch(), "newer", None):
        pass
    before = len(listings)
    for _ in range(5):
        watch()
    assert len(listings) - before >= 4
    with segment.publishing():
        write(half, mlp(), 2.0)
        until(watch, "busy")
        watch()
    assert "published" in [status(watch()) for _ in range(5)]
