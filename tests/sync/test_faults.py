"""Faults of the system under a push and a watch: each call fails once in each way, and sources change while read.

The calls fail by a library that is preloaded into a child (``faults.c``, ``faulty.py``); the other faults are real,
made at moments that the code itself tells (a progress callback, the end of a pass), never by the clock.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import SPEC, SUPPORT, write
from builders import mark_of as marks_of
from faulty import SCENARIOS, SHORT
from policies import mlp
from processes import DEADLINE
from rich.console import Console

from wsync.cli.output.watch import WatchLog
from wsync.errors import SegmentError
from wsync.fitting.fit import Fit
from wsync.layout.layout import layout_of
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec
from wsync.sync.syncer import Syncer

pytestmark = pytest.mark.slow

CALLS = {  # of a pass; a family that a scenario never calls would guard nothing
    "push": "close fcntl flock fstat mmap open opendir pread preadv pwrite readdir stat",
    "watch": "close fcntl flock fstat mmap open opendir pread preadv pwrite readdir stat",
    "current": "close fcntl fstat mmap open opendir pread readdir stat",
    "first": "close fallocate fcntl flock fstat mkdir mmap open opendir pread preadv pwrite rename stat",
    "shards": "close fstat open pread preadv readdir stat",
    "step": "close fcntl fstat open pread preadv",
    "cast": "fstat open pread",
    "dry run": "close fcntl fstat open pread preadv readdir stat",
    "named": "close fcntl fstat open pread preadv stat",
    "adapter": "close fstat open pread preadv readdir stat",
    "half saved": "close fstat open pread readdir stat",
}


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of faults, built with the C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc) to build the library of faults with")
    built = tmp_path_factory.mktemp("shim") / "faults.so"
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        "-o",
        str(built),
        str(SUPPORT / "faults.c"),
        "-ldl",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture
def faulty(shim: Path, runtime: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs ``faulty.py`` over a scenario to its end; what it says, object by object."""
    place, described = tmp_path / "runs", tmp_path / "layout.json"
    place.mkdir()
    described.write_text(json.dumps(layout_of(mlp()).to_json()))
    (runtime / "segments").mkdir(mode=0o700)

    def run(*scenarios: str) -> list[dict[str, Any]]:
        done = subprocess.run(
            [
                sys.executable,
                str(SUPPORT / "faulty.py"),
                str(place),
                str(runtime / "segments"),
                str(described),
                *scenarios,
            ],
            env={**os.environ, "LD_PRELOAD": str(shim)},
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def wrongs(said: dict[str, Any], *places: str) -> Iterator[str]:
    """What is wrong with how one fault was borne."""
    before, after, mark = said["before"], said["after"], float(said["mark"])
    fine = {"busy"} if said["scenario"] == "half saved" else {"published", "current", "checked"}
    if said["scenario"] == "half saved" and said["status"] == "published":
        yield "half a save is published"
    if not said["fired"]:
        yield "the fault never came"
    if said["status"] == "traceback":
        yield said["message"]
    if said["status"] == "rejected":
        yield "a good checkpoint was refused for ever"
    if said["status"] == "published":
        if after != [before[0] + 1, [mark]]:
            yield "what it says is live is not, or not whole"
    elif after != before:
        yield "what was live is not live any more, or no longer whole"
    if said["error"] == SHORT and said["status"] not in fine:
        yield f"a read or write of less than was asked for is none of its business: {said['message']}"
    if said["status"] not in ("published", "current", "checked") and not any(p in said["message"] for p in places):
        yield f"the message names no path: {said['message']}"
    if said["leak"] > 0:
        yield "a descriptor stays open"
    if said["left"]:
        yield f"something is left beside the segment: {said['left']}"
    if said["next"]["status"] not in ("published", "current") or said["final"][1] != [mark]:
        yield f"the next pass does not publish: {said['next']}"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_any_call_may_fail(
    faulty: Callable[..., list[dict[str, Any]]], runtime: Path, tmp_path: Path, scenario: str
) -> None:
    """Guards, for each call of a pass and each error: a path is named, live stays live, the next pass publishes."""
    counted, *injected = faulty(scenario)
    assert counted["status"] in ("published", "current", "checked", "busy") and len(injected) > 50
    assert set(CALLS[scenario].split()) <= set(counted["calls"])
    wrong = [
        f"{said['family']} {said['nth']} {errno.errorcode.get(said['error'], 'SHORT')}: {text}"
        for said in injected
        for text in wrongs(said, str(tmp_path), str(runtime))
    ]
    assert not wrong, f"{len(wrong)} of {len(injected)}:\n" + "\n".join(wrong[:10])


# Sources that change while they are read


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])


CHANGES: dict[str, tuple[Callable[[Path], object], str, str, float]] = {
    "cut": (cut, "busy", "current", 1.0),
    "emptied": (lambda path: os.truncate(path, 0), "busy", "current", 1.0),
    "grown": (lambda path: os.truncate(path, path.stat().st_size + 1), "busy", "rejected", 1.0),
    "rewritten": (rewrite, "busy", "rejected", 1.0),
    "replaced": (lambda path: write(path, Double(), 3.0), "published", "published", 3.0),
    "deleted": (lambda path: path.unlink(), "published", "current", 2.0),
}


def Double() -> Any:
    """The policy in float64, which is read and cast piece by piece, so that there is a middle."""
    return mlp().double()


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_while_it_is_read(
    segment: WritableSegment, runs: Path, change: str, read_by: Callable[..., None]
) -> None:
    """Guards that only bytes of one state of a file go live, and that the next pass takes what is there then."""
    read_by(chunk=64)
    act, status, afterwards, mark = CHANGES[change]
    spec = replace(load_spec(SPEC), weights=Fit(cast=True))
    write(runs / "step_1.safetensors", mlp(), 1.0)
    with Syncer(spec, runs) as syncer:
        assert syncer.once().status == "published"
        path = write(runs / "step_2.safetensors", Double(), 2.0)
        calls: list[int] = []

        def progress(done: int, total: int) -> None:
            calls.append(done)
            if len(calls) == 2:
                assert done < total
                act(path)

        syncer.box.progress = progress
        outcome = syncer.once()
        assert outcome.status == status and (status == "published" or "changed" in str(outcome.reason))
        assert marks_of(segment) == {2.0 if status == "published" else 1.0}
        syncer.box.progress = None
        assert syncer.once().status == afterwards
        assert marks_of(segment) == {mark}
        write(runs / "step_9.safetensors", mlp(), 9.0)
        assert syncer.once().status == "published" and marks_of(segment) == {9.0}


def test_what_can_fail_fails_before_the_store(
    segment: WritableSegment, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards that a pass that failed has published nothing: waking readers, last of all, loads a library first."""
    write(runs / "step_1.safetensors", mlp(), 1.0)

    def refuse(_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with Syncer(load_spec(SPEC), runs) as syncer:
        with monkeypatch.context() as patch:
            patch.setattr("wsync.segment.word_and_lease.address_of", refuse)
            with pytest.raises(SegmentError, match="Too many open files"):
                syncer.once()
        assert segment.version == 0
        assert syncer.once().status == "published"


def test_readers_that_cannot_be_counted_do_not_make_a_publish_a_failure(
    segment: WritableSegment, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards that what went live is told as published, though a look after it fails."""
    write(runs / "step_1.safetensors", mlp(), 1.0)

    def refuse(_: WritableSegment) -> list[object]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(WritableSegment, "readers", refuse)
    with Syncer(load_spec(SPEC), runs) as syncer:
        assert (syncer.once().status, segment.version) == ("published", 1)


@pytest.mark.parametrize("fault", ["EIO", "a link in a circle"])
def test_a_checkpoint_that_cannot_be_looked_at_is_told(runs: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Guards that a disk's error is not told as "nothing there yet", which nobody would look into; a bad link is."""
    path = runs / "step_1.safetensors"
    if fault == "EIO":
        write(path, mlp(), 1.0)
        entry = unittest.mock.Mock(path=str(path), **{"stat.side_effect": OSError(errno.EIO, os.strerror(errno.EIO))})
        entry.name = path.name
        listed = unittest.mock.MagicMock(**{"__enter__.return_value": [entry]})
        monkeypatch.setattr(os, "scandir", lambda _: listed)
    else:
        path.symlink_to(path.name)
    outcome = Syncer(load_spec(SPEC), runs).once()
    assert outcome.status == ("failed" if fault == "EIO" else "empty")
    assert fault != "EIO" or str(path) in str(outcome.reason)


def test_a_policy_that_cannot_be_looked_at_has_a_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that a policy's directory that is unreadable or stale fails no pass that needs no policy."""

    def refuse(_: Path) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert load_spec(SPEC).fingerprint()


def test_the_panel_of_a_segment_that_is_being_closed(segment: WritableSegment, runs: Path) -> None:
    """Guards the thread that draws: what the watch closes or loses under it is shown as nothing, not a traceback."""
    publication = write(runs / "step_1.safetensors", mlp(), 1.0)
    with Syncer(load_spec(SPEC), publication) as syncer:
        assert syncer.once().status == "published"
    closed = Segment.open("policies.mlp")
    log = WatchLog("policies.mlp", runs, "rich", lambda: closed)
    closed.close()
    written = io.StringIO()
    console = Console(width=60, file=written)
    console.print(log._panel())
    assert "no version yet" in written.getvalue()


# Places that go and come back under a watch

WATCH = """
import errno, faulthandler, json, os, resource, sys, threading
from dataclasses import replace
from pathlib import Path
import ctypes, hashlib, numpy, pwd, shutil, tempfile, inotify_simple  # nobody may not read them later
from faulty import NAME, Box, Faults
import wsync.discovery.changes, wsync.sync.loop
from wsync.layout.layout import Layout
from wsync.sync.outcome import Outcome
from wsync.settings import layout_process
from wsync.settings.spec import Spec
from wsync.sync.loop import run
from wsync.sync.syncer import Syncer

place, runtime, layout = Path(sys.argv[1]), Path(sys.argv[2]), Layout.from_json(json.loads(sys.argv[3]))
faulthandler.dump_traceback_later(60, exit=True)
if os.geteuid() == 0 and sys.argv[4] == "nobody":
    for path in (place, runtime):
        os.chown(path, 65534, 65534)
    os.setegid(65534)
    os.seteuid(65534)
layout_process.layout_of_spec = lambda spec: layout
box, stop, told, acts = Box(place, runtime, layout, "push"), threading.Event(), [], []

def watch(poll, *then, first=lambda: None):
    acts.extend(then)
    box.prepare()
    first()
    with Syncer(replace(box.spec, poll=poll), place, runtime=runtime, role="watch") as syncer:
        assert run(syncer, stop, tell)
    print(json.dumps(told))

def tell(event):
    status = event.status if isinstance(event, Outcome) else "failed"
    if told and told[-1][0] == status:
        return
    told.append((status, event.reason if isinstance(event, Outcome) else str(event), *box.live()))
    acts.pop(0)() if acts else stop.set()
"""

Watched = Callable[..., list[list[Any]]]


@pytest.fixture
def watched(runtime: Path) -> Iterator[Watched]:
    """Runs a watch in a child whose script says what happens after each outcome; what was told, and was live then."""
    place = Path(tempfile.mkdtemp(prefix="wsync-test-"))  # not below tmp_path, which is root's alone
    segments = runtime / "segments"
    segments.mkdir(mode=0o700)
    runtime.chmod(0o711)
    place.chmod(0o755)
    described = json.dumps(layout_of(mlp()).to_json())

    def run(script: str, user: str = "", preload: Path | None = None) -> list[list[Any]]:
        environment = os.environ | ({"LD_PRELOAD": str(preload)} if preload else {})
        done = subprocess.run(
            [sys.executable, "-c", WATCH + script, str(place), str(segments), described, user],
            env=environment,
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE,
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        told: list[list[Any]] = json.loads(done.stdout)
        for status, message, *_ in told:
            assert status != "failed" or str(place) in message or str(segments) in message, message
        return told

    yield run
    place.chmod(0o700)
    shutil.rmtree(place, ignore_errors=True)


def outcomes(told: list[list[Any]]) -> list[tuple[str, int, list[float]]]:
    return [(status, version, marks) for status, _, version, marks in told]


def test_a_directory_that_vanishes_and_comes_back(watched: Watched) -> None:
    """Guards that a watch follows the name, not the inode: what is in the new directory goes live."""
    told = watched("""
def vanish():
    place.rename(f"{place}-old")
def return_():
    place.mkdir()
    Path(f"{place}-old").rename(place / "old")
    box.place = place / "new"
    box.place.mkdir()
    box.prepare()
    (box.place / f"step_{box.mark}.safetensors").rename(place / f"step_{box.mark}.safetensors")
watch(0.05, vanish, return_)
""")
    assert outcomes(told) == [("published", 1, [1.0]), ("empty", 1, [1.0]), ("published", 2, [2.0])]


@pytest.mark.parametrize("what", ["place", "file"])
def test_what_cannot_be_read_for_a_while(watched: Watched, what: str) -> None:
    """Guards that a mode that is wrong is told as what it is and ends no watch; chmod alone mends it."""
    told = watched(
        f"""
def hide():
    box.prepare()
    global file
    file = {"place" if what == "place" else "place / f'step_{box.mark}.safetensors'"}
    file.chmod(0)
def show():
    file.chmod(0o755)
watch(0.05, hide, show)
""",
        "nobody",
    )
    assert outcomes(told) == [("published", 1, [1.0]), ("failed", 1, [1.0]), ("published", 2, [2.0])]


def test_a_mount_that_goes_stale(watched: Watched, shim: Path) -> None:
    """Guards that ESTALE from every call, the notifier's own looks among them, is a failure of passes and no more."""
    told = watched(
        """
faults = Faults(place, Path("/nowhere"))
def mend():
    faults.shim.fault_disarm()
    box.prepare()
watch(0.05, lambda: faults.shim.fault_arm(b"*", 0, errno.ESTALE), mend)
""",
        preload=shim,
    )
    assert outcomes(told) == [("published", 1, [1.0]), ("failed", 1, [1.0]), ("published", 2, [2.0])]


def test_no_descriptor_is_to_be_had(watched: Watched) -> None:
    """Guards a process at its limit of open files, from before the notifier was made: passes fail, then go on."""
    told = watched("""
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
def starve():
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, limits[1]))
def feed():
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
live, box.live = box.live, lambda: live() if resource.getrlimit(resource.RLIMIT_NOFILE) == limits else (0, [])
watch(0.05, feed, first=starve)
""")
    assert outcomes(told) == [("failed", 0, []), ("published", 1, [1.0])]
