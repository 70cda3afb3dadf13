"""A watch that has nothing to do lists nothing: where notifications work, and the place's own times have not moved."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import NAME, SPEC, mark_of, write
from policies import mlp
from processes import DEADLINE

from wsync.errors import WsyncError
from wsync.history.database import State
from wsync.history.outcome import Outcome
from wsync.history.rollback import pin_checkpoint
from wsync.places import listing
from wsync.places.changes import Changes
from wsync.places.newest import Select
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import Spec
from wsync.sync.loop import Schedule, run
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
    monkeypatch.setattr("wsync.places.changes._is_local", lambda device: True)
    return made


@pytest.fixture
def watch(segment: Segment, runs: Path) -> Iterator[Callable[[], Event]]:
    """A watch of ``runs`` in a thread; gives the outcome of its next pass."""
    stop, told = threading.Event(), queue.SimpleQueue[Event]()
    write(runs / "step_1.safetensors", mlp(), 1.0)
    with Syncer(Spec(SPEC, NAME, Path.cwd(), poll=0.02), runs, state=State(NAME)) as syncer:
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
