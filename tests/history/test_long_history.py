"""A history of months costs a push, a pin and a rollback no more than one of a day."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import write
from policies import mlp

from wsync.errors import NoCheckpoint, SpecError
from wsync.history.rollback import pin_checkpoint, rollback
from wsync.history.state import Event, State
from wsync.segment.writable import remove
from wsync.settings.spec import Spec, load_spec
from wsync.sync.syncer import Syncer

NAME = "policies.mlp"
NUMBER = 5_000


class Watched:
    """What is asked of the history: every statement, and how many events were made of its rows."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.statements: list[str] = []
        self.events = 0

    def scans(self) -> list[str]:
        """The statements about events that look at all rows."""
        found = []
        with closing(sqlite3.connect(self.file)) as database:
            for text in self.statements:
                if "events" not in text or not text.startswith(("SELECT", "DELETE")):
                    continue
                plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {text}")]
                if "SCAN events" in plan:
                    found.append(f"{text}: {plan}")
        return found


@pytest.fixture
def watched(runtime: Path, tmp_path: Path, layouts_here: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """A history of many publishes whose files are gone, and then one whose file is there and kept."""
    monkeypatch.chdir(tmp_path)
    with State(NAME) as state:
        state.record("pin")
        file = state.directory / f"{NAME}.sqlite"
    with closing(sqlite3.connect(file)) as database, database:
        database.executemany(
            "INSERT INTO events (at, kind, version, step, checkpoint, identity, settings) VALUES (?, ?, ?, ?, ?, ?, ?)",
            ((float(n), "publish", n, n, f"/gone/{n}.safetensors", f"{n}-1-1", "{}") for n in range(1, NUMBER + 1)),
        )
    found = Watched(file)
    push(1)
    push(2)
    connect, checked = sqlite3.connect, Event.checked

    def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **options)
        connection.set_trace_callback(found.statements.append)
        return connection

    def counted(row: Any) -> Event:
        found.events += 1
        return checked(row)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", traced)
        patch.setattr(Event, "checked", counted)
        yield found


def spec() -> Spec:
    return replace(load_spec("policies:mlp"), keep=1, checkpoints=Path("runs").absolute())


def push(mark: float | None = None) -> tuple[str, int]:
    """One pass as cron makes it."""
    if mark is not None:
        write(Path(f"runs/step_{mark:g}.safetensors"), mlp(), mark)
    with Syncer(spec(), state=State(NAME)) as syncer:
        outcome = syncer.once()
        return outcome.status, outcome.version


def test_a_push_reads_a_few_rows(watched: Watched) -> None:
    """The last version, and the copies that are kept, are found by an index."""
    assert push(3) == ("published", NUMBER + 3)
    remove(NAME)
    assert push(4) == ("published", NUMBER + 4), "also where the history says which version was the last"
    assert watched.events <= 12 and not watched.scans()


def test_a_pin_reads_a_few_rows(watched: Watched) -> None:
    """Its checkpoint is found by an index, and published again after a reboot."""
    with State(NAME) as state:
        pin_checkpoint(NAME, None, runtime=None, state=state)
    assert push() == ("pinned", NUMBER + 2)
    remove(NAME)
    assert push() == ("published", NUMBER + 3)
    assert watched.events <= 12 and not watched.scans()


def test_a_rollback_reads_a_few_rows(watched: Watched) -> None:
    """So does one to the version before, and one to a version that is named."""
    with State(NAME) as state:
        live, _, was = rollback(NAME, runtime=None, state=state)
        assert (live.version, was) == (NUMBER + 3, NUMBER + 1)
        live, _, was = rollback(NAME, NUMBER + 2, runtime=None, state=state)
        assert (live.version, was) == (NUMBER + 4, NUMBER + 2)
    assert watched.events <= 12 and not watched.scans()


def test_a_rollback_to_what_is_gone_looks_for_some_files(watched: Watched) -> None:
    """The list of what can still be had is of the newest versions, and of the kept ones, however old."""
    with State(NAME) as state:
        with pytest.raises(NoCheckpoint, match=rf"(?s)\n  {NUMBER + 2} .*\n  {NUMBER + 1} "):
            rollback(NAME, 7, runtime=None, state=state)
        assert watched.events <= 1030
        with closing(sqlite3.connect(watched.file)) as database, database:
            later = "SELECT at, kind, ?, step, checkpoint, identity, settings FROM events WHERE version <= 1000"
            into = "INSERT INTO events (at, kind, version, step, checkpoint, identity, settings)"
            database.execute(f"{into} {later}", (NUMBER + 3,))
        with pytest.raises(NoCheckpoint, match=f"\n  {NUMBER + 2} .* kept copy"):
            rollback(NAME, 7, runtime=None, state=state)
        for copy in state.copies.iterdir():
            copy.unlink()
        with pytest.raises(NoCheckpoint, match="None of the last 1,000 versions can be put live any more"):
            rollback(NAME, 7, runtime=None, state=state)


def test_the_history_is_trimmed_to_a_setting(watched: Watched) -> None:
    """A bound that is lowered removes what is older; what went live and all else are counted apart."""
    bounded = replace(spec(), history=50)
    with State(NAME, bound=bounded.history) as state:
        for number in range(200):
            state.record("failure", version=number, reason="x")
        assert len(state.published()) == 50 and len(state.events(kinds=["failure"])) <= 150


@pytest.mark.parametrize(("keep", "history"), [(0, 0), (5, 4), (0, -1)])
def test_a_history_that_forgets_what_is_kept_is_refused(keep: int, history: int) -> None:
    """A copy that is not on record could not be gone back to."""
    with pytest.raises(SpecError, match="history"):
        replace(load_spec("policies:mlp"), keep=keep, history=history)
