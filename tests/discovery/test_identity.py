"""File systems that number a file anew at each look: what is live is known again."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from builders import NAME, SPEC, mark_of, shards, write
from policies import mlp

from wsync.checkpoints.files import parts
from wsync.discovery import identity, newest
from wsync.history.rollback import pin_checkpoint, rollback, unpin
from wsync.history.state import State
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer


def renumber(path: Path) -> None:
    """Gives the files of a checkpoint other inodes, and keeps their modification times."""
    for file in path.iterdir() if path.is_dir() else [path]:
        shutil.copy2(file, other := file.with_name(".other"))
        other.replace(file)


def headers_differ(path: Path, *, back: bool = False) -> None:
    """Renames a tensor in a header, or back: the file keeps its size and its time."""
    file = min(path.glob("model*.safetensors")) if path.is_dir() else path
    times = file.stat()
    old, new = (b"0.weight", b"0.wEight")[:: -1 if back else 1]
    file.write_bytes(file.read_bytes().replace(old, new))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("form", ["file", "directory", "shards"])
@pytest.mark.parametrize("named", [False, True])
def test_what_is_live_is_published_once(
    form: str, named: bool, segment: WritableSegment, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a version at every pass; where inodes are kept, another one is another file."""
    if form == "shards":
        path = shards(runs / "step_1", mlp(), 1.0)
    elif form == "directory":
        path = write(runs / "step_1" / "model.safetensors", mlp(), 1.0).parent
    else:
        path = write(runs / "step_1.safetensors", mlp(), 1.0)
    with Syncer(load_spec(SPEC), path if named else runs, state=State(NAME)) as syncer:
        now = time.time
        with monkeypatch.context() as later:  # the change times of the files, which nobody can set, are older
            later.setattr(time, "time", lambda: now() + 100)
            assert syncer.once().version == 1
        for keeps, status in ((False, "current"), (False, "current"), (True, "published")):
            renumber(path)
            monkeypatch.setattr(identity, "inodes_change", lambda where, keeps=keeps: not keeps)
            assert syncer.once().status == status
    assert mark_of(segment) == {1.0}


def test_a_file_that_changed_after_it_went_live_is_new(
    segment: WritableSegment, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards that where inodes are not kept, a checkpoint of the same size and time is still taken when it arrives."""
    path = write(runs / "latest.safetensors", mlp(), 1.0)
    monkeypatch.setattr(identity, "inodes_change", lambda where: True)
    with Syncer(load_spec(SPEC), runs) as syncer:
        assert syncer.once().version == 1
        live, before = segment.live(), path.stat().st_mtime_ns
        os.utime(other := write(runs.parent / "other", mlp(), 2.0), ns=(0, before))
        while live and other.stat().st_ctime_ns <= live.published_at * 1e9:  # the file system's clock ticks coarsely
            os.utime(other, ns=(0, before))
        other.replace(path)
        assert syncer.once().version == 2
    assert mark_of(segment) == {2.0}


def test_inodes_that_change_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards how it is told: by two looks at one file, or by the kind of its file system."""
    path = write(tmp_path / "step_1.safetensors", mlp())
    assert not identity.inodes_change(str(path))
    assert not identity.inodes_change(str(tmp_path / "gone"))
    with monkeypatch.context() as fuse:
        fuse.setattr(identity, "_KINDS", range(1 << 63))
        assert identity.inodes_change(str(path))
    real, number = os.stat, iter(range(10))

    def renumbered(where: Any) -> os.stat_result:
        info = real(where)
        times = {"st_mtime_ns": info.st_mtime_ns, "st_ctime_ns": info.st_ctime_ns}
        return os.stat_result((info.st_mode, next(number), *info[2:]), times)

    monkeypatch.setattr(os, "stat", renumbered)
    assert identity.inodes_change(str(path))


def test_a_refusal_is_told_once(segment: WritableSegment, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards cron's mail where inodes change: what was refused is known again by its path, its size and its times."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    monkeypatch.setattr(identity, "inodes_change", lambda where: True)
    number = itertools.count(1)
    monkeypatch.setattr(parts, "identity", lambda info: f"{next(number)}-{info.st_size}-{info.st_mtime_ns}")
    monkeypatch.setattr(newest, "identity", parts.identity)

    def push() -> Outcome:
        with Syncer(load_spec(SPEC), runs, state=State(NAME)) as syncer:
            return syncer.once()

    assert (push().version, push().status) == (1, "current")
    for name in ("step_2", "step_3"):  # of one size, and maybe of one time
        write(runs / f"{name}.safetensors", mlp(), float("nan"))
        assert [(each.status, each.known) for each in (push(), push())] == [("rejected", False), ("rejected", True)]
    write(runs / "step_3.safetensors", mlp(), 3.0)
    assert (push().version, push().status) == (2, "current")


@pytest.mark.usefixtures("layouts_here")
def test_what_was_touched_goes_live_again(
    segment: WritableSegment, runs: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a good checkpoint that got other rights while it was live: it comes back after a reboot and a rollback."""
    monkeypatch.setattr(identity, "_KINDS", range(1 << 63))

    def push(**options: Any) -> tuple[str, int, int | None]:
        with Syncer(load_spec(SPEC), runs, state=State(NAME)) as syncer:
            outcome = syncer.once(**options)
            return outcome.status, outcome.version, outcome.step

    write(runs / "step_1.safetensors", mlp(), 1.0)
    assert push() == ("published", 1, 1)
    path = write(runs / "step_2.safetensors", mlp(), 2.0)
    assert push() == ("published", 2, 2)
    path.chmod(0o640)
    assert [push() for _ in range(3)] == [("current", 2, 2)] * 3
    assert push(force=True) == ("published", 3, 2)
    path.chmod(0o600)
    assert push() == ("current", 3, 2)
    shutil.rmtree(segment.path)
    assert push() == ("published", 4, 2)
    path.chmod(0o640)
    assert push() == ("current", 4, 2)
    with State(NAME) as state:
        rollback(NAME, 1, runtime=runtime, state=state)
        unpin(state)
    assert [push() for _ in range(2)] == [("published", 6, 2), ("current", 6, 2)]


@pytest.mark.slow
@pytest.mark.usefixtures("layouts_here")
@pytest.mark.parametrize("form", ["file", "shards"])
def test_a_pin_holds_where_inodes_change(
    form: str, segment: WritableSegment, runs: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `wsync pin NAME CHECKPOINT` of what is live, and a pin after a reboot, and that it lets go else."""
    path = write(runs / "a.safetensors", mlp(), 1.0) if form == "file" else shards(runs / "a", mlp(), 1.0)
    keeps = False
    monkeypatch.setattr(identity, "inodes_change", lambda where: not keeps)
    with State(NAME) as state, Syncer(load_spec(SPEC), runs, state=state) as syncer:
        assert syncer.once().version == 1
        renumber(path)
        pin, is_live = pin_checkpoint(NAME, str(path), runtime=runtime, state=state)
        assert (is_live, pin.version) == (True, 1)
        assert syncer.once().status == "pinned"
        shutil.rmtree(segment.path)
        renumber(path)
        assert [syncer.once().status for _ in range(3)] == ["published", "pinned", "pinned"]
        shutil.rmtree(segment.path)
        renumber(path)
        headers_differ(path)
        assert "gone or was changed" in (syncer.once().reason or "")
        headers_differ(path, back=True)
        assert syncer.once().status == "published"
        shutil.rmtree(segment.path)
        renumber(path)
        keeps = True
        assert "gone or was changed" in (syncer.once().reason or "")
