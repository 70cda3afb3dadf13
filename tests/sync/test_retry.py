"""What a watch does about passes that fail: how often it tries, what ends a pause, and when it gives up."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from builders import NAME, SPEC, SUPPORT, mark_of, write
from policies import mlp
from processes import DEADLINE, Cli

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.checkpoints.files import settling
from wsync.checkpoints.files.parts import Parts
from wsync.cli.output.watch import WatchLog
from wsync.discovery.listing import listing_of
from wsync.discovery.newest import Candidate, Select
from wsync.discovery.weight_getter import CheckpointWeightGetter
from wsync.errors import RetryLater, SpecError, UsageError, WsyncError
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import Spec, load_spec
from wsync.sync.loop import Schedule, pause_after, run
from wsync.sync.outcome import EXIT_CODES, Outcome
from wsync.sync.syncer import Syncer

LONG = 10 * DEADLINE  # a pause that no test may come to wait for
FAILED = WsyncError("the disk is broken")
Event = Outcome | WsyncError


@pytest.fixture
def schedule(stop: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Schedule]:
    """Of a watch on ``runs`` whose pauses, once passes fail, are as long as no test may wait."""
    monkeypatch.setattr("wsync.sync.loop.LONGEST", LONG)
    made = Schedule(Spec("policies:mlp", NAME, tmp_path, poll=0.01), tmp_path / "runs", stop)
    yield made
    made.close()


def failed(schedule: Schedule, times: int = 40) -> Schedule:
    """The same after so many failed passes that found the place as it is now."""
    schedule.add(FAILED)
    for _ in range(times - 1):
        schedule._next = 0.0
        assert schedule.due(LONG) and schedule.add(FAILED) is None
    return schedule


def until_due(schedule: Schedule) -> None:
    while not schedule.due(LONG):
        assert not schedule._stop.is_set()


# The pause


def test_pauses_double_and_are_bounded() -> None:
    """Guards that a failure that lasts is not tried ten times a second for a night, nor once an hour."""
    assert [pause_after(n, 1.0) for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert pause_after(10**9, 1e-9) == 60 and pause_after(1, 3600) == 60


def test_a_watch_looks_at_once_and_then_at_each_notification(stop: threading.Event, tmp_path: Path) -> None:
    """Guards that neither the first look nor a checkpoint that comes waits for the clock."""
    schedule = Schedule(Spec("policies:mlp", NAME, tmp_path, poll=LONG), tmp_path, stop)
    assert schedule.due(0.0)
    schedule.add(Outcome("current", NAME))
    assert not schedule.due(0.01)
    write(tmp_path / "step_1.safetensors", mlp())
    until_due(schedule)
    schedule.close()


@pytest.mark.parametrize("change", ["a checkpoint", "a mode", "gone", "back"])
def test_a_change_ends_the_pause(schedule: Schedule, tmp_path: Path, change: str) -> None:
    """Guards that what mends most failures is tried soon, also where nothing notifies (NFS): the listing tells."""
    place = tmp_path / "runs"
    path = write(place / "step_1.safetensors", mlp())
    if change == "back":
        place.rename(tmp_path / "away")
    failed(schedule)
    acts: dict[str, Callable[[], object]] = {
        "a checkpoint": lambda: write(place / "step_2.safetensors", mlp()),
        "a mode": lambda: path.chmod(0o600),
        "gone": lambda: shutil.rmtree(place),
        "back": lambda: (tmp_path / "away").rename(place),
    }
    schedule._changes.wait = lambda seconds=None: False  # type: ignore[method-assign]
    assert not schedule.due(0.05)
    acts[change]()
    until_due(schedule)


def test_a_notified_change_ends_the_pause_at_once(schedule: Schedule, tmp_path: Path) -> None:
    """Guards that the pass that will work waits for no clock: the README says that a change is tried at once."""
    (tmp_path / "runs").mkdir()
    failed(schedule)
    schedule._apart = LONG
    while not schedule._look > time.monotonic() + LONG / 2:  # until the look by the clock, after which none comes
        assert not schedule.due(0.01)
    write(tmp_path / "runs" / "step_1.safetensors", mlp())
    until_due(schedule)


def test_a_storm_of_notifications_ends_no_pause(schedule: Schedule) -> None:
    """Guards that a failure that lasts is not tried at each of a hundred notifications about nothing new."""
    failed(schedule)
    schedule._changes.wait = lambda seconds=None: True  # type: ignore[method-assign]
    assert not any(schedule.due(0.001) for _ in range(100))


def test_a_storm_of_changes_is_looked_at_now_and_then(
    stop: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards that a file that changes all the time does not bring a failing pass at every change."""
    states = iter(range(1000))
    monkeypatch.setattr("wsync.sync.loop.listing_of", lambda *_: next(states))
    schedule = failed(Schedule(Spec("policies:mlp", NAME, tmp_path, poll=3600.0), tmp_path, stop), 3)
    waits: list[float] = []
    monkeypatch.setattr(stop, "wait", waits.append)
    assert not schedule.due(LONG)
    schedule.close()
    assert 0.9 < waits[0] <= 1.0


def test_a_change_during_the_pass_is_not_missed(schedule: Schedule, tmp_path: Path) -> None:
    """Guards that the listing is compared with the one before the failed pass, not after it."""
    failed(schedule)
    write(tmp_path / "runs" / "step_1.safetensors", mlp())
    schedule.add(FAILED)
    until_due(schedule)


def test_reading_a_checkpoint_is_no_change(tmp_path: Path) -> None:
    """Guards that a failed pass, which reads, does not end its own pause."""
    path = write(tmp_path / "step_1.safetensors", mlp())
    os.utime(path, ns=(1, 1))
    before = listing_of(tmp_path)
    path.read_bytes()
    assert listing_of(tmp_path) == before


@pytest.mark.parametrize("times", [0, 9])
def test_stop_ends_a_pause(times: int, tmp_path: Path) -> None:
    """Guards that Ctrl-C is heeded at once in a long pause too."""
    stop = threading.Event()
    schedule = Schedule(Spec("policies:mlp", NAME, tmp_path, poll=LONG), tmp_path, stop)
    schedule.add(Outcome("current", NAME))
    if times:
        failed(schedule, times)
    timer = threading.Timer(0.05, stop.set)
    timer.start()
    began = time.monotonic()
    while not stop.is_set():
        assert not schedule.due(LONG)
    schedule.close()
    timer.join()
    assert time.monotonic() - began < DEADLINE / 2


# Giving up


@pytest.mark.parametrize("status", EXIT_CODES)
def test_only_a_failure_counts_and_all_else_ends_the_row(schedule: Schedule, status: str) -> None:
    """Guards which passes are failures: not one that is rejected, empty, busy, current or published."""
    failed(schedule, 3).add(Outcome(status, NAME, reason="it is so"))
    assert schedule.failures == schedule.pauses == (4 if status == "failed" else 0)


def test_a_gate_that_asks_for_later_is_paused_for_and_is_no_failure(tmp_path: Path, stop: threading.Event) -> None:
    """Guards against weights that are staged at each look, or sent to all boxes, for a gate that has no answer yet."""
    schedule = Schedule(Spec("policies:mlp", NAME, tmp_path, poll=10.0, max_failures=0), tmp_path, stop)
    for pauses, seconds in enumerate((10.0, 20.0, 40.0), 1):
        later = Outcome("busy", NAME, reason="the gate has no answer", kind=RetryLater.kind)
        assert schedule.add(later) is None
        assert (schedule.failures, schedule.pauses) == (0, pauses)
        assert seconds / 2 < schedule._next - time.monotonic() <= seconds
    schedule.add(Outcome("published", NAME))
    assert schedule.pauses == 0 and schedule._next - time.monotonic() <= 10
    schedule.close()


@pytest.mark.parametrize(("bound", "passes"), [(-1, None), (0, 1), (1, 2), (5, 6)])
def test_one_failure_more_than_is_borne_ends_it(
    tmp_path: Path, stop: threading.Event, bound: int, passes: int | None
) -> None:
    """Guards the number: 0 ends at the first failure, -1 at none."""
    schedule = Schedule(Spec("policies:mlp", NAME, tmp_path, max_failures=bound), tmp_path, stop)
    ends = [number for number in range(1, 101) if schedule.add(FAILED)]
    schedule.close()
    assert ends[:1] == ([] if passes is None else [passes])


def test_a_watch_gives_up(cli: Cli, runs: Path, runtime: Path) -> None:
    """Guards that a service manager sees a watch that cannot work: exit code 1, the last failure once, the count."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    Path("file").touch()
    Path("spec.toml").write_text('policy = "policies:mlp"\n[watch]\nmax_failures = 2\npoll = 0.01\n')
    shutil.copy(SUPPORT / "policies.py", "policies.py")
    done = cli("watch", "spec.toml", "runs", "--runtime-dir", "file/below")
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line for line in lines if "3 passes in a row failed" in line and "--max-failures is 2" in line]
    assert len([line for line in lines if " error " in line]) == 2 and "stopped" in lines[-1]
    assert "file/below" in lines[1] and "file/below" in lines[2]
    first = cli(
        "watch", "spec.toml", "runs", "--runtime-dir", "file/below", env={**os.environ, "WSYNC_MAX_FAILURES": "0"}
    )
    assert first.returncode == 1 and "1 pass failed" in first.stdout
    assert cli("watch", "spec.toml", "runs", "--max-failures", "-2").returncode == 2


# The loop


def pass_by_pass(
    syncer: Syncer, stop: threading.Event, acts: list[Callable[[], object]]
) -> tuple[list[str], list[Event]]:
    """Runs a watch: after each pass that told something new one of the acts is done, and after the last it stops."""
    events: list[Event] = []
    statuses: list[str] = []

    def tell(event: Event) -> None:
        status = event.status if isinstance(event, Outcome) else "failed"
        if statuses[-1:] == [status]:
            return
        statuses.append(status)
        events.append(event)
        if len(statuses) <= len(acts):
            acts[len(statuses) - 1]()
        else:
            stop.set()

    assert run(syncer, stop, tell)
    return statuses, events


def test_a_runtime_directory_that_is_gone_and_one_that_is_unsafe(
    segment: WritableSegment, runs: Path, runtime: Path, stop: threading.Event, layouts_here: None
) -> None:
    """Guards that neither ends a watch, wherever it notices: in a pass, or when it rests between two."""
    write(runs / "step_1.safetensors", mlp(), 1.0)

    def spoil() -> None:
        shutil.rmtree(runtime / NAME)
        (runtime / NAME).touch()

    with Syncer(replace(load_spec(SPEC), poll=0.01), runs, runtime=runtime) as syncer:
        acts: list[Callable[[], object]] = [spoil, lambda: (runtime / NAME).unlink()]
        statuses, events = pass_by_pass(syncer, stop, acts)
    assert statuses == ["published", "failed", "published"]
    assert str(runtime / NAME) in str(events[1])
    assert mark_of(Segment.open(NAME)) == {1.0}


def test_a_setting_that_is_wrong_later_is_a_failure(
    segment: WritableSegment, runs: Path, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards that a policy's file that is being edited does not end the watch; at the start it does."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    once = Syncer.once

    def broken(self: Syncer, **_: object) -> Outcome:
        raise SpecError("policies.py has a syntax error")

    with Syncer(replace(load_spec(SPEC), poll=0.01), runs) as syncer:
        acts: list[Callable[[], object]] = [
            lambda: monkeypatch.setattr(Syncer, "once", broken),
            lambda: monkeypatch.setattr(Syncer, "once", once),
        ]
        statuses, _ = pass_by_pass(syncer, stop, acts)
        assert statuses == ["published", "failed", "current"]
        monkeypatch.setattr(Syncer, "once", broken)
        stop.clear()
        with pytest.raises(UsageError):
            run(syncer, stop, lambda _: None)


# Locks and what is remembered


def test_a_checkpoint_settles_before_the_lock_is_taken(
    segment: WritableSegment, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards that a publisher that waits for a checkpoint to stand still does not hold off another one."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    settle, free = settling.let_files_settle, []

    def settled(parts: Parts, fds: Sequence[int], seconds: float) -> None:
        with WritableSegment.open(NAME).publishing():
            free.append(True)
        settle(parts, fds, seconds)

    monkeypatch.setattr(settling, "let_files_settle", settled)
    with Syncer(load_spec(SPEC), runs) as syncer:
        assert syncer.once().status == "published" and free == [True]


@pytest.mark.parametrize("same", [True, False])
def test_what_another_publisher_just_published_is_not_published_again(
    segment: WritableSegment, runs: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    """Guards the second look under the lock: no second version of the same weights, and nothing older after newer."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    opened = CheckpointWeightGetter.open

    def faster(self: CheckpointWeightGetter, candidate: Candidate, *published: Callable[[], list[str]]) -> Checkpoint:
        checkpoint = opened(self, candidate, *published)
        monkeypatch.setattr(CheckpointWeightGetter, "open", opened)
        if not same:
            os.utime(write(runs / "step_2.safetensors", mlp(), 2.0), (time.time(), time.time()))
        with Syncer(load_spec(SPEC), runs) as other:
            assert other.once().status == "published"
        return checkpoint

    monkeypatch.setattr(CheckpointWeightGetter, "open", faster)
    with Syncer(load_spec(SPEC), runs) as syncer:
        outcome = syncer.once()
    assert (outcome.status, outcome.version) == ("current", 1)
    assert (segment.version, mark_of(segment)) == (1, {1.0 if same else 2.0})


def test_what_is_remembered_of_checkpoints_is_bounded(
    segment: WritableSegment, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards that a watch of months keeps nothing of checkpoints that are gone: steps, refusals, what was told."""
    spec = replace(load_spec(SPEC), select=Select(order="step"))
    with Syncer(spec, runs) as syncer, WatchLog(NAME, runs, "plain", lambda: None, remembered=3) as log:
        for number in range(5):
            path = write(runs / f"step_{number}.safetensors", mlp(), float("nan"), number)
            for _ in range(2):
                log.tell(syncer.once())
            assert len(syncer.record._refused) == 1 and len(syncer.getter._steps or ()) == 1
            path.unlink()
        assert len(log._refused) == 3
    assert capsys.readouterr().out.count("rejected") == 5
