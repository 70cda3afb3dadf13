"""What outlives a reboot: history, pin and rejections, on real files, by several processes at once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import stat
import threading
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
from others import as_person, run_cli
from processes import DEADLINE, Spawn

from wsync.errors import StateError, UsageError
from wsync.history.pins import Pin
from wsync.history.record import Record
from wsync.history.reopening import fit_from_json
from wsync.history.state import State, state_dir

PIN = Pin(checkpoint="/runs/a.safetensors", identity="1-2-3-4", version=7, step=70, since=1.5, reason="by hand")


def test_history_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Guards every field of an event, their order, and the bounds of a query, through a close and a new process."""
    with State("nets", tmp_path / "state") as state:
        assert state.events() == [] and state.last()[0] == 0
        state.record("publish", version=1, step=10, checkpoint="/runs/a", identity="1", bytes=5, seconds=0.5, lag=2)
        state.record("reject", version=1, checkpoint="/runs/b", identity="2", reason="NaN")
        state.record("rollback", version=2, settings="{}")
    with State("nets", tmp_path / "state") as state:
        first, second, third = state.events()
        assert (first.kind, first.version, first.step, first.checkpoint) == ("publish", 1, 10, "/runs/a")
        assert (first.bytes, first.seconds, first.lag, first.reason) == (5, 0.5, 2, None)
        assert (second.kind, second.identity, second.reason) == ("reject", "2", "NaN")
        assert state.events(limit=1) == [third] == state.events(kinds=["rollback"])
        assert state.events(after=first.id) == [second, third]
        assert state.events(since=third.at) == [third]
        assert state.last()[0] == 2


def test_a_pin_that_could_not_be_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the state directory, on a full disk, against halves of pins."""

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with State("nets", tmp_path) as state:
        state.pin_file.write(PIN)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StateError, match="No space left"):
            state.pin_file.write(replace(PIN, version=8))
        assert state.pin_file.read() == PIN and [path.name for path in tmp_path.iterdir()] == ["nets.pin"]


def test_a_place_that_may_not_be_entered_only_warns(tmp_path: Path) -> None:
    """A service's user and root's directory: a pass goes on as with any place where nothing can be written."""
    place = tmp_path / "state"
    place.mkdir(mode=0o700)

    def work() -> tuple[Pin | None, list[str], int]:
        told: list[str] = []
        record = Record(State("nets", place), str)
        record.complain = lambda exc: told.append(str(exc))
        pin, _ = record.pin(), record.last_published()
        return pin, told, run_cli("log", "nets", "--state-dir", str(place))[0]

    pin, told, code = as_person(65_534, work)
    assert pin is None and len(told) == 1 and str(place) in told[0] and code == 1


def test_a_history_that_was_removed_begins_anew(tmp_path: Path) -> None:
    """Guards a watch of months against writing on into a file that has no name any more."""
    with State("nets", tmp_path / "state") as watch:
        watch.record("publish", version=1)
        shutil.rmtree(tmp_path / "state")
        watch.record("publish", version=2)
        with State("nets", tmp_path / "state") as log:
            assert [event.version for event in log.events()] == [2]
            log.record("pin", version=2)
        assert [event.kind for event in watch.events()] == ["publish", "pin"]


def test_a_rejection_is_known_by_file_and_settings(tmp_path: Path) -> None:
    """Guards against a file that is retried for ever, and against one that stays refused under mended settings."""
    with State("nets", tmp_path) as state:
        assert state.remembered("strict") == {}
        state.remember("strict", "1", "does not fit")
        state.remember("strict", "1", "does not fit at all")
        assert state.remembered("strict") == {"1": "does not fit at all"}
        assert state.remembered("lax") == {}


def test_old_rejections_and_events_go(tmp_path: Path) -> None:
    """Guards against a record that grows for as long as the box runs."""
    with State("nets", tmp_path, bound=3) as state:
        state.trim, state.most_remembered = 1, 2
        for number in range(6):
            state.record("publish", version=number)
            state.remember("", str(number), "why")
        assert [event.version for event in state.events()] == [3, 4, 5]
        for _ in range(6):
            state.record("gate", version=6)
        assert [event.version for event in state.events()] == [3, 4, 5, 6, 6, 6] and state.last()[0] == 5
        assert len(state.remembered("")) <= 3 and "5" in state.remembered("")


def test_what_was_accepted_is_rejected_no_more(tmp_path: Path) -> None:
    """Guards the start after a reboot against a refusal that `--retry` has overcome; under other settings it stands."""
    with State("nets", tmp_path) as state:
        state.remember("strict", "1", "why")
        state.remember("lax", "1", "why")
        state.remember("strict", "2", "why")
        state.record("publish", version=1, identity="1", accepted="strict")
        assert (state.remembered("strict"), state.remembered("lax")) == ({"2": "why"}, {"1": "why"})


@pytest.mark.parametrize("change", [{"version": "1"}, {"checkpoint": 1}, {"since": "now"}, {"more": 1}, {"step": []}])
def test_what_is_no_pin_is_told(change: dict[str, object], tmp_path: Path) -> None:
    """Guards what the operator holds, and against a traceback: a pin that cannot be read is an error, and no pin."""
    state = State("nets", tmp_path)
    state.pin_file.write(PIN)
    (tmp_path / "nets.pin").write_text(json.dumps({**asdict(PIN), **change}))
    with pytest.raises(StateError, match="unpin"):
        state.pin_file.read()
    (tmp_path / "nets.pin").write_text("[" * 100_000)
    with pytest.raises(StateError, match="unpin"):
        state.pin_file.read()


def test_who_has_no_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a container's user, whom no file of the system knows, against a traceback."""
    for name in ("WSYNC_STATE_DIR", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UsageError, match="--state-dir"):
        state_dir()


def test_settings_of_an_earlier_wsync_are_read() -> None:
    """Guards a rollback over an update: what had live values in it, too, comes only from a copy."""
    assert fit_from_json('{"prefix": "actor.", "kept": 3}').mixture == 3


def test_a_pin_is_there_until_it_is_taken_away(tmp_path: Path) -> None:
    """Guards the one thing that a watch must not forget over a reboot."""
    state = State("nets", tmp_path / "state")
    assert state.pin_file.read() is None
    state.pin_file.write(PIN)
    assert State("nets", tmp_path / "state").pin_file.read() == PIN
    state.pin_file.write(None)
    state.pin_file.write(None)
    assert state.pin_file.read() is None and not list((tmp_path / "state").glob("*.tmp"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"checkpoint": 1}', b"\xff"])
def test_a_broken_pin_is_not_taken_for_none(tmp_path: Path, content: bytes) -> None:
    """Guards against letting go, because of a bad disk, what an operator holds."""
    (tmp_path / "nets.pin").write_bytes(content)
    with pytest.raises(StateError, match="wsync unpin nets"):
        State("nets", tmp_path).pin_file.read()


def test_files_are_private(tmp_path: Path) -> None:
    """Guards against paths of a user's runs being readable by others."""
    with State("nets", tmp_path / "state") as state:
        state.record("publish", version=1)
        state.pin_file.write(PIN)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").iterdir()}
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert set(modes.values()) == {0o600}, modes


def test_a_broken_or_unwritable_database_is_told(tmp_path: Path) -> None:
    """Guards against a traceback; what is no database is set aside, what cannot be made is an error."""
    warned: list[StateError] = []
    (tmp_path / "nets.sqlite").write_bytes(b"no database at all" * 100)
    with State("nets", tmp_path) as state:
        state.warn = warned.append
        state.record("publish", version=1)
        assert len(state.events()) == 1 and "set aside" in str(*warned)
    assert (tmp_path / "nets.sqlite.damaged").read_bytes().startswith(b"no database")
    (tmp_path / "file").write_bytes(b"")
    with State("nets", tmp_path / "file") as state, pytest.raises(StateError, match="--state-dir"):
        state.record("publish", version=1)


def test_many_processes_write_one_history(tmp_path: Path, spawn: Spawn) -> None:
    """Guards against events lost, or a process failing, where cron, watch and hand write at the same time."""
    code = (
        "import sys; from wsync.history.state import State; s = State('nets', sys.argv[1]); "
        "print('ready', flush=True); "
        "input(); [s.record('publish', version=n) for n in range(50)]"
    )
    workers = [spawn("-c", code, str(tmp_path), stdin=-1) for _ in range(4)]
    for worker in workers:
        assert worker.stdout and worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("\n")
        worker.stdin.flush()
    for worker in workers:
        assert worker.wait(DEADLINE) == 0
    with State("nets", tmp_path) as state:
        assert len(state.events()) == 200


@pytest.mark.parametrize("ends", [True, False])
def test_a_history_that_another_process_just_makes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """Guards the first event of cron and watch that start together: the one waits for the other's transaction."""
    asked, connect = threading.Event(), sqlite3.connect

    class Asking(sqlite3.Connection):
        def executescript(self, script: str) -> sqlite3.Cursor:
            asked.set()
            return super().executescript(script)

    other = connect(tmp_path / "nets.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(sqlite3, "connect", partial(connect, factory=Asking))
    if not ends:
        monkeypatch.setattr("wsync.history.sqlite_file.PATIENCE", 0.0)
    release = threading.Thread(target=lambda: asked.wait(DEADLINE) and ends and other.execute("ROLLBACK"))
    release.start()
    with State("nets", tmp_path) as state:
        with nullcontext() if ends else pytest.raises(StateError, match="database is locked"):
            state.record("publish", version=1)
        assert not ends or len(state.events()) == 1
    release.join(DEADLINE)
    other.close()


def test_where_the_state_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the order: argument, variable, root's place, the user's."""
    monkeypatch.setenv("WSYNC_STATE_DIR", "/from/variable")
    assert state_dir("/given") == Path("/given") and state_dir() == Path("/from/variable")
    monkeypatch.delenv("WSYNC_STATE_DIR")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert state_dir() == Path("/var/lib/wsync")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/a/.state")
    assert state_dir() == Path("/home/a/.state/wsync")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/a")
    assert state_dir() == Path("/home/a/.local/state/wsync")


def test_the_database_is_one_that_other_tools_read(tmp_path: Path) -> None:
    """Guards the promise of an ordinary SQLite file in WAL mode."""
    with State("nets", tmp_path) as state:
        state.record("publish", version=3)
        other = sqlite3.connect(tmp_path / "nets.sqlite")
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert other.execute("SELECT kind, version FROM events").fetchall() == [("publish", 3)]
        other.close()


def test_a_name_that_is_no_text_is_recorded(tmp_path: Path) -> None:
    """Guards against a file's odd name ending a watch at the moment that its history is written."""
    with State("nets", tmp_path) as state:
        state.record("publish", version=1, checkpoint="/runs/\udcff.safetensors")
        state.remember("", "1", "/runs/\udcff does not fit")
        assert state.events()[0].checkpoint == "/runs/\\udcff.safetensors" and state.remembered("")
