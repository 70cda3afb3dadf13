"""Damage below the state directory: no traceback, no hang, and the weights go on."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from builders import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from others import in_a_small_place
from policies import mlp
from processes import Lines, Spawn

from wsync.errors import NoCheckpoint, SegmentUnsafe, StateError, UsageError
from wsync.history.pins import Pin
from wsync.history.rollback import rollback
from wsync.history.state import State
from wsync.segment.segment import Segment
from wsync.segment.segment_files import WORD_OFFSET
from wsync.settings.spec import load_spec
from wsync.sync.syncer import Syncer

SPEC, NAME, PAGE = "policies:mlp", "policies.mlp", 4096


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A history of some pages, as it lies on the disk."""
    place = tmp_path_factory.mktemp("state")
    with State(NAME, place) as state:
        for version in range(1, 150):
            kind, text = "publish" if version % 3 else "rollback", str(version)
            state.record(kind, version=version, step=version, checkpoint=text, identity=text, settings="{}")
            state.remember("strict", str(version), "why" * 20)
    return (place / f"{NAME}.sqlite").read_bytes()


def look_at(state: State) -> None:
    """Everything that a command asks of a history, and writes to it."""
    state.events(limit=5)
    state.events(kinds=("publish", "rollback"))
    state.last()
    state.remembered("strict")
    state.remember("strict", "new", "why")
    state.record("publish", version=200, identity="new", accepted="strict")
    assert any(event.version == 200 for event in state.events())


@settings(max_examples=60, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_page_begins_a_new_history(tmp_path: Path, database: bytes, data: st.DataObject) -> None:
    """Whatever a page holds, each question is answered, what is told is of its kind, and what is written is kept."""
    place = tmp_path / "state"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    damaged = bytearray(database)
    at = data.draw(st.integers(0, len(database) - 1))
    what = data.draw(st.one_of(st.binary(min_size=1, max_size=64), st.sampled_from([b"\0" * PAGE, b"\xff" * PAGE])))
    start = at // PAGE * PAGE if len(what) == PAGE else at
    damaged[start : start + len(what)] = what
    del damaged[len(database) :]
    (place / f"{NAME}.sqlite").write_bytes(damaged)
    with State(NAME, place) as state:
        state.warn = lambda exc: None
        look_at(state)


def test_a_value_of_another_kind_is_damage(tmp_path: Path) -> None:
    """Guards against a TypeError, or a version that is a text, far from where it was read."""
    changes = (
        "version = 'x'",
        "version = -1 << 60",
        "checkpoint = x'ff00'",
        "at = 'now'",
        "settings = '['",
        "step = 1.5",
    )
    for number, change in enumerate(changes):
        warned: list[StateError] = []
        with State(f"{NAME}{number}", tmp_path) as state:
            state.warn = warned.append
            state.record("publish", version=1, identity="1")
            state._write(lambda database, change=change: database.execute(f"UPDATE events SET {change}"))  # type: ignore[misc]
            look_at(state)
        assert len(warned) == 1 and "set aside" in str(warned[0]), change


def test_a_watch_goes_on_with_a_new_history(runs: Path, spawn: Spawn, segment: Segment) -> None:
    """Damage under a running watch costs neither weights nor hooks, and is told once."""
    state = Path(os.environ["WSYNC_STATE_DIR"]) / f"{NAME}.sqlite"
    write(runs / "step_1.safetensors", mlp(), 1.0)
    hook = "echo $WSYNC_HOOK_VERSION >> told"
    watch = Lines(spawn("-m", "wsync", "watch", SPEC, "runs", "--exec", hook, "--log-format", "plain"))
    watch.until("version 1,")
    with open(state, "r+b") as file:
        file.write(b"\xff" * os.fstat(file.fileno()).st_size)
    Path(f"{state}-wal").write_bytes(b"\xff" * 9000)
    write(runs / "step_2.safetensors", mlp(), 2.0)
    watch.until("version 2,")
    write(runs / "step_3.safetensors", mlp(), 3.0)
    watch.until("version 3,")
    watch.process.terminate()
    watch.rest()
    assert watch.process.returncode == 0 and Path("told").read_text().split()[-1] == "3"
    assert sum("set aside" in line for line in watch.seen) <= 1 and not any("Traceback" in line for line in watch.seen)
    with State(NAME) as again:
        again.record("publish", version=4)
        assert again.events()[-1].version == 4


@pytest.mark.parametrize("kind", ["fifo", "directory", "loop", "large"])
def test_a_pin_that_is_no_file_is_told(tmp_path: Path, kind: str) -> None:
    """Guards against a push that waits for the writer of a pipe; what cannot be read is no word to let go."""
    state, pin = State("nets", tmp_path), tmp_path / "nets.pin"
    if kind == "fifo":
        os.mkfifo(pin)
    elif kind == "directory":
        pin.mkdir()
    elif kind == "loop":
        pin.symlink_to(pin)
    else:
        pin.write_bytes(b"{" * 10_000_000)
    with pytest.raises(StateError, match="wsync unpin nets"):
        state.pin_file.read()
    if kind != "directory":
        state.pin_file.write(Pin(checkpoint="/a", identity="1", version=1, step=1, since=1.5, reason="by hand"))
        assert (state.pin_file.read() or pytest.fail("no pin")).checkpoint == "/a"


def test_a_database_that_is_a_pipe_is_told(tmp_path: Path) -> None:
    """Guards against a command that hangs in opening it, and against SQLite's words for it."""
    os.mkfifo(tmp_path / "nets.sqlite")
    with State("nets", tmp_path) as state, pytest.raises(StateError, match="not a regular file"):
        state.record("publish", version=1)


@pytest.mark.parametrize("word", [(1 << 64) - 1, ((1 << 56) - 1) << 8, 0, 1, 6 << 8 | 63, 7 << 8, 5 << 8 | 0xFE])
def test_a_damaged_word_is_told_and_never_goes_back(runs: Path, segment: Segment, word: int) -> None:
    """A WORD that its slot does not confirm is an error that names the way out, after which versions go on."""
    with Syncer(load_spec(SPEC), runs, state=State(NAME)) as syncer:
        for mark in range(1, 7):
            write(runs / f"step_{mark}.safetensors", mlp(), float(mark))
            assert syncer.once().version == mark
    segment.control.words[WORD_OFFSET // 8] = word
    with Syncer(load_spec(SPEC), runs, state=State(NAME)) as syncer:
        try:
            assert syncer.once(force=True).version > 6
        except SegmentUnsafe as exc:
            assert f"wsync rm {NAME}" in str(exc)
    with suppress(UsageError, NoCheckpoint, SegmentUnsafe), State(NAME) as state:
        assert rollback(NAME, 5, runtime=None, state=state)[0].version > 6


def test_a_history_that_never_ends_is_not_copied(tmp_path: Path) -> None:
    """Guards a database that is a link to a device: nobody reads it to its end."""
    (tmp_path / "nets.sqlite").symlink_to("/dev/zero")
    with State("nets", tmp_path) as state, pytest.raises(StateError, match="cannot be kept"):
        state.events()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system")
def test_a_full_disk_keeps_nobody_from_reading(tmp_path: Path) -> None:
    """``log`` and what a rollback lists are read from a copy, where SQLite could not even make its own files."""
    place = tmp_path / "full"
    place.mkdir()

    def work() -> tuple[list[int], int, bool]:
        with State("nets", place) as state:
            state.record("publish", version=1)
        with suppress(OSError), open(place / "filler", "wb", 0) as filler:
            while filler.write(bytes(4096)):
                pass
        with State("nets", place) as state:
            read = [event.version for event in state.events()], state.last()[0]
            try:
                for _ in range(1000):
                    state.record("publish", version=2, reason="x" * 1000)
            except StateError as exc:
                return *read, "make room" in str(exc)
            return *read, False

    try:
        assert in_a_small_place(place, work, "size=256k") == ([1], 1, True)
    except OSError as exc:
        pytest.skip(f"this box mounts nothing: {exc}")
