"""Real processes beside each other: trainer, watch and policies, in step and when one of them is killed."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import NAME, SPEC, mark_of, write
from policies import mlp
from processes import DEADLINE, Lines, Spawn

from wsync import CheckpointWeightGetter
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.cli.output.watch import WatchLog
from wsync.discovery.newest import Candidate
from wsync.errors import WsyncError
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec
from wsync.sync.loop import run
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer

pytestmark = pytest.mark.slow

LAST = 30

READER = """
import sys, torch, wsync
from builders import marks
from policies import mlp
torch.set_num_threads(1)
policy = mlp()
reader = wsync.attach(policy, "policies.mlp", mode=sys.argv[1], timeout=60)
while True:
    print(reader.version, reader.step, *marks(policy), flush=True)
    if reader.step == int(sys.argv[2]):
        break
    reader.wait(60)
    reader.refresh()
print(reader.mode, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def watch(spawn: Spawn, segment: WritableSegment) -> Callable[..., Lines]:
    """Starts a watch of ``runs`` and waits until its signals are handled."""

    def start(*options: str, place: str = "runs") -> Lines:
        lines = Lines(spawn("-m", "wsync", "watch", SPEC, place, *options))
        lines.until("watching")
        return lines

    return start


def ended(lines: Lines, number: signal.Signals) -> int:
    lines.process.send_signal(number)
    return lines.process.wait(DEADLINE)


def test_readers_see_whole_versions_in_order(
    watch: Callable[..., Lines], spawn: Spawn, segment: WritableSegment, runs: Path
) -> None:
    """Under a trainer that writes on, each read is one whole version, none goes back, and the last arrives."""
    log = watch("--poll", "0.1")
    write(runs / "step_1.safetensors", mlp(), 1.0)
    readers = [Lines(spawn("-c", READER, mode, str(LAST), stdin=-1)) for mode in ("swap", "copy")]
    heard = [[reader.next()] for reader in readers]
    for step in range(2, LAST + 1):
        write(runs / f"step_{step}.safetensors", mlp(), float(step))
        log.until(f"step {step}")
    for reader, mode, lines in zip(readers, ("swap", "copy"), heard, strict=True):
        while lines[-1] != mode:
            lines.append(reader.next())
        seen = [line.split() for line in lines[:-1]]
        assert all(len(words) == 3 and float(words[1]) == float(words[2]) for words in seen), seen
        versions = [int(words[0]) for words in seen]
        assert versions == sorted(versions)
        assert int(seen[-1][1]) == LAST
    assert (segment.version, mark_of(segment)) == (LAST, {float(LAST)})
    assert {(r.mode, r.version) for r in segment.readers()} == {("swap", LAST), ("copy", LAST)}
    assert ended(log, signal.SIGTERM) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_watch_stops_cleanly(
    watch: Callable[..., Lines], segment: WritableSegment, runs: Path, number: signal.Signals
) -> None:
    """Asked to stop, a watch says so and ends with 0, quickly also with a long poll, and the version stays live."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    log = watch("--poll", "3600")
    log.until("version 1")
    assert ended(log, number) == 0
    assert any("stopped" in line and "version 1" in line for line in log.rest())
    assert log.process.stderr and log.process.stderr.read() == ""
    assert segment.version == 1 and mark_of(segment) == {1.0}
    with segment.publishing():
        pass


def test_watch_stops_before_there_is_anything(watch: Callable[..., Lines]) -> None:
    """A watch that waits for a directory which is not there stops as cleanly."""
    log = watch("--poll", "3600", place="not/yet/there")
    log.until("empty")
    assert ended(log, signal.SIGTERM) == 0


def test_refusal_is_said_once_over_many_passes(
    segment: WritableSegment, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty passes that meet the same refused file read it once and say so once."""
    write(runs / "step_2.safetensors", mlp(), float("nan"))
    opened: list[Path] = []
    take = CheckpointWeightGetter.open

    def counted(getter: CheckpointWeightGetter, candidate: Candidate, *more: Any) -> Checkpoint:
        opened.append(candidate.path)
        return take(getter, candidate, *more)

    monkeypatch.setattr(CheckpointWeightGetter, "open", counted)
    stop, passes = threading.Event(), 0
    with (
        Syncer(replace(load_spec(SPEC), poll=0.001), runs, role="watch") as syncer,
        WatchLog(NAME, runs, "plain", lambda: None) as log,
    ):

        def tell(event: Outcome | WsyncError) -> None:
            nonlocal passes
            passes += 1
            assert isinstance(event, Outcome) and event.status == "rejected"
            log.tell(event)
            if passes == 20:
                stop.set()

        run(syncer, stop, tell)
    assert passes == 20 and len(opened) == 1
    assert capsys.readouterr().out.count("rejected") == 1


def test_every_publish_is_logged(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is published again at once, its segment having been removed, is a second line."""
    with WatchLog(NAME, runs, "plain", lambda: None) as log:
        for _ in range(2):
            log.tell(
                Outcome(
                    "published", NAME, bytes=232, version=1, step=1, checkpoint="runs/step_1.safetensors", identity="1"
                )
            )
    assert capsys.readouterr().out.count("step_1.safetensors") == 2


def test_notification_beats_the_clock(watch: Callable[..., Lines], segment: WritableSegment, runs: Path) -> None:
    """With a poll of an hour a new checkpoint goes live by the file system's notification alone."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    log = watch("--poll", "3600")
    log.until("version 1")
    wait_for_notifier(log.process)
    for step in (2, 3):
        write(runs / f"step_{step}.safetensors", mlp(), float(step))
        log.until(f"version {step}")
    assert mark_of(segment) == {3.0}


def wait_for_notifier(process: subprocess.Popen[str]) -> None:
    """Until a process has an inotify watch."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        for link in Path(f"/proc/{process.pid}/fdinfo").iterdir():
            if "inotify wd:" in link.read_text():
                return
        select.select([], [], [], 0.01)
    pytest.fail("no notifier")


def test_json_log(watch: Callable[..., Lines], segment: WritableSegment, runs: Path) -> None:
    """Each line of a JSON log is one object with time, level and event; outcomes carry what a push reports."""
    log = watch("--log-format", "json", "--poll", "0.1")
    log.until('"empty"')
    write(runs / "step_1.safetensors", mlp(), 1.0)
    log.until('"published"')
    write(runs / "step_2.safetensors", mlp(hidden=16), 1.0)
    log.until('"rejected"')
    assert ended(log, signal.SIGTERM) == 0
    log.rest()
    records: list[dict[str, Any]] = [json.loads(line) for line in log.seen]
    assert all(record.keys() >= {"time", "level", "event", "name"} for record in records)
    assert [record["event"] for record in records] == ["watch", "empty", "published", "rejected", "stop"]
    published, rejected = records[2], records[3]
    assert (published["version"], published["step"], published["level"]) == (1, 1, "info")
    assert (rejected["version"], rejected["level"]) == (1, "error")
    assert {d["name"] for d in rejected["differences"]} == {"0.weight", "0.bias", "2.weight"}


def test_watch_beside_another_publisher(watch: Callable[..., Lines], segment: WritableSegment, runs: Path) -> None:
    """A watch that finds the segment held says so and takes its turn when it is free."""
    with segment.publishing():
        log = watch("--poll", "0.05")
        write(runs / "step_1.safetensors", mlp(), 1.0)
        assert f"pid {os.getpid()}" in log.until("busy")
    log.until("version 1")
    assert mark_of(segment) == {1.0}


def test_watch_makes_a_removed_segment_anew(watch: Callable[..., Lines], segment: WritableSegment, runs: Path) -> None:
    """A segment that is removed under a watch comes back with the newest checkpoint under the next number."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    log = watch("--poll", "0.05")
    log.until("version 1")
    write(runs / "step_2.safetensors", mlp(), float("nan"))
    log.until("rejected")
    segment.remove()
    log.until("version 2", "step_1.safetensors")
    again = Segment.open(NAME)
    assert not segment.is_current() and (again.version, mark_of(again)) == (2, {1.0})


def test_a_refusal_behind_an_older_good_one_is_said_once_with_its_table(
    runs: Path, segment: WritableSegment, layouts_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the newest is refused and an older one goes live, the log tells both in that pass, and the refusal once."""
    good = write(runs / "step_1.safetensors", mlp(), 1.0)
    write(runs / "step_2.safetensors", mlp(hidden=3), 2.0)
    os.utime(good, (1, 1))
    with (
        Syncer(load_spec(SPEC), runs) as syncer,
        WatchLog(NAME, runs, "plain", lambda: None) as log,
    ):
        first = syncer.once()
        assert (first.status, [refused.status for refused in first.passed_over]) == ("published", ["rejected"])
        log.tell(first)
        log.tell(syncer.once())
    out = capsys.readouterr().out
    assert out.count("rejected") == 1 and out.count("version 1") >= 1 and "expected" in out


def test_a_long_stage_shows_a_bar(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where staging takes over a second the panel says how far it is, on a line of its own."""
    from rich.console import Console

    clock = [100.0]
    monkeypatch.setattr("wsync.cli.output.watch.time.monotonic", lambda: clock[0])
    log = WatchLog(NAME, runs, "rich", lambda: None)
    console = Console(width=60, file=io.StringIO(), color_system=None)
    log.progress(1_000_000, 4_000_000)
    with console.capture() as capture:
        console.print(log._panel())
    assert "staging" not in capture.get()
    clock[0] += 1.5
    log.progress(2_000_000, 4_000_000)
    with console.capture() as capture:
        console.print(log._panel())
    lines = [line.strip("│ ") for line in capture.get().splitlines()]
    assert "staging 2 MB of 4 MB" in lines and "no readers" in lines
    assert any("━" in line and "╭" not in line for line in lines)
