"""A live checkpoint that is written over in place by a writer who puts its times back, and what only looks so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import NAME, SPEC, mark_of, shards, write
from policies import mlp

from wsync.checkpoints.files.parts import parts_of
from wsync.discovery.newest import Select
from wsync.errors import BeingRewritten, NoCheckpoint
from wsync.history.rollback import pin_checkpoint, rollback
from wsync.history.state import State
from wsync.layout.filenames import INDEX
from wsync.segment.publishing import holds
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("layouts_here")]

SETTLE = 0.02
SHARD_1, SHARD_2 = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


def syncer(place: Path, order: str = "mtime", keep: int = 0, settle: float = SETTLE) -> Syncer:
    select = Select(settle=settle, order=order)  # type: ignore[arg-type]
    return Syncer(replace(load_spec(SPEC), select=select, keep=keep), place, state=State(NAME))


def push(place: Path, order: str = "mtime", keep: int = 0) -> Outcome:
    """One pass as cron makes it: all that it knows of the past is in the segment and in the history."""
    with syncer(place, order, keep) as one:
        return one.once()


def over(source: Path, target: Path) -> None:
    """Writes over a file of the same size in place, and gives it back its modification time."""
    info = target.stat()
    with target.open("r+b") as file:
        file.write(source.read_bytes())
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert (target.stat().st_size, target.stat().st_mtime_ns) == (info.st_size, info.st_mtime_ns)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a checkpoint is read to be compared with what is live."""
    calls: list[int] = []

    def counted(*args: Any) -> bool:
        calls.append(1)
        return holds(*args)

    monkeypatch.setattr("wsync.segment.publishing.holds", counted)
    return calls


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("watches", [False, True])
def test_a_file_written_over_in_place_goes_live(
    named: bool, watches: bool, segment: WritableSegment, runs: Path, compared: list[int]
) -> None:
    """Guards `rsync --inplace -t` and `cp -p` onto the live file, again and again, for a watch and for cron."""
    latest = write(runs / "latest.safetensors", mlp(), 1.0)
    place = latest if named else runs
    with syncer(place) as watch:
        look: Callable[[], Outcome] = watch.once if watches else lambda: push(place)
        assert (look().version, look().status, compared) == (1, "current", [])
        for mark in (2.0, 3.0):
            over(write(runs.parent / "new.safetensors", mlp(), mark), latest)
            outcome = look()
            assert (outcome.status, outcome.version, mark_of(segment)) == ("published", int(mark), {mark})
            assert (look().status, len(compared)) == ("current", int(mark) - 1)


def test_shards_written_over_in_place_go_live_together(segment: WritableSegment, runs: Path) -> None:
    """Guards a sharded save over the live one: with one shard of the new save nothing goes live, however long."""
    latest, new = shards(runs / "latest", mlp(), 1.0), shards(runs.parent / "new", mlp(), 2.0)
    for file in latest.iterdir():
        os.utime(file, (1e9, 1e9))  # change times alone tell when it was written
    assert push(runs).version == 1
    over(new / SHARD_1, latest / SHARD_1)
    for _ in range(2):
        with syncer(runs, settle=0.0) as one:  # so that it has stood still for long
            outcome = one.once()
        assert (outcome.kind, outcome.exit_code) == (BeingRewritten.kind, 75), outcome
        assert mark_of(segment) == {1.0}
    over(new / SHARD_2, latest / SHARD_2)
    with syncer(runs, settle=0.3) as one:
        assert "may hold files of two saves" in (one.once().reason or "")
    while (outcome := push(runs)).kind == BeingRewritten.kind:  # the index has not changed: it stands still for longer
        assert mark_of(segment) == {1.0}
    assert (outcome.status, outcome.version, mark_of(segment)) == ("published", 2, {2.0})
    over(new / INDEX, latest / INDEX)
    assert [push(runs).status for _ in range(2)] == ["current", "current"]


def chmod(path: Path) -> None:
    for file in parts_of(path).files:
        file.chmod(0o640)


def link(path: Path) -> None:
    for number, file in enumerate(parts_of(path).files):
        os.link(file, path.parents[1] / f"{number}.kept")


def rename(path: Path) -> None:
    path.rename(path.with_name("aside"))
    path.with_name("aside").rename(path)


def same_bytes(path: Path) -> None:
    for file in parts_of(path).files:
        over(file, file)


@pytest.mark.parametrize("change", [chmod, link, rename, same_bytes])
@pytest.mark.parametrize("form", ["file", "shards"])
def test_what_keeps_its_bytes_is_no_version(
    form: str, change: Callable[[Path], None], segment: WritableSegment, runs: Path, compared: list[int]
) -> None:
    """Guards that the live weights are not published again, and are read once at most to see that."""
    path = write(runs / "step_1.safetensors", mlp(), 1.0) if form == "file" else shards(runs / "step_1", mlp(), 1.0)
    assert push(runs).version == 1
    change(path)
    assert [push(runs).status for _ in range(3)] == ["current"] * 3
    assert (len(compared) <= 1, segment.version) == (True, 1)
    with State(NAME) as state:
        assert [event.kind for event in state.events()] == ["publish"]


def test_what_is_compared_hides_nothing(segment: WritableSegment, runs: Path) -> None:
    """Guards that a pass goes on to the next checkpoint where the live one was only touched after it arrived."""
    path = write(runs / "step_1.safetensors", mlp(), 1.0)
    assert push(runs, "arrival").version == 1
    write(runs / "step_2.safetensors", mlp(), 2.0)
    path.chmod(0o640)
    assert (push(runs, "arrival").version, mark_of(segment)) == (2, {2.0})


def test_force_publishes_what_was_written_over_again(segment: WritableSegment, runs: Path) -> None:
    """Guards `push --force` of a live checkpoint that was written over in place: the same bytes go live again."""
    latest = write(runs / "latest.safetensors", mlp(), 1.0)
    assert push(runs).version == 1
    over(write(runs.parent / "new.safetensors", mlp(), 2.0), latest)
    assert push(runs).version == 2
    with syncer(runs) as one:
        assert (one.once(force=True).status, segment.version) == ("published", 3)


def test_a_dry_run_remembers_and_publishes_nothing(segment: WritableSegment, runs: Path, runtime: Path) -> None:
    """Guards `push --dry-run` of a touched file, and beside a pin: no memory of it, no copy, no version."""
    path = write(runs / "step_1.safetensors", mlp(), 1.0)
    assert push(runs).version == 1
    path.chmod(0o640)
    other = write(runs.parent / "other.safetensors", mlp(), 2.0)
    with syncer(runs, keep=1) as one, State(NAME) as state:
        assert one.once(dry_run=True).status == "current"
        assert state.remembered(f"{one.spec.digest()}+same") == {}
        for pinned, status in ((None, "pinned"), (str(other), "checked")):  # what is live, and what is not
            pin_checkpoint(NAME, pinned, runtime=runtime, state=state)
            assert one.once(dry_run=True).status == status
        assert (segment.version, state.copies.exists()) == (1, False)


def test_what_was_written_over_is_refused_once(segment: WritableSegment, runs: Path) -> None:
    """Guards a diverged trainer that writes in place: refused, remembered, and taken once it is good again."""
    latest = write(runs / "latest.safetensors", mlp(), 1.0)
    assert push(runs).version == 1
    over(write(runs.parent / "new.safetensors", mlp(), float("nan")), latest)
    first, second = push(runs), push(runs)
    assert (first.status, first.known, second.status, second.known) == ("rejected", False, "rejected", True)
    with latest.open("r+b") as file:
        file.write((99).to_bytes(8, "little"))
    os.utime(latest, ns=(0, int(latest.stat().st_mtime_ns)))
    assert push(runs).status in ("rejected", "current")
    assert mark_of(segment) == {1.0}
    shutil.copy2(write(runs.parent / "good.safetensors", mlp(), 4.0), latest)
    assert (push(runs).version, mark_of(segment)) == (2, {4.0})


@pytest.mark.parametrize("keep", [0, 3])
@pytest.mark.parametrize("publishes", [False, True])
def test_the_way_back_is_to_the_bytes_of_then(
    publishes: bool, keep: int, segment: WritableSegment, runs: Path, runtime: Path
) -> None:
    """Guards rollback: a version whose file was written over comes from a slot or a copy, and never from that file."""
    first = write(runs / "step_1.safetensors", mlp(), 1.0)
    for mark in (1.0, 2.0, 3.0, 4.0):
        assert push(write(runs / f"step_{mark:.0f}.safetensors", mlp(), mark), keep=4 * keep).version == mark
    over(write(runs.parent / "new.safetensors", mlp(), 5.0), first)
    if publishes:
        assert push(first, keep=4 * keep).version == 5
    with State(NAME) as state:
        if keep:
            rollback(NAME, 1, runtime=runtime, state=state)
            assert mark_of(segment) == {1.0}
            return
        with pytest.raises(NoCheckpoint, match="was changed .*takes it as it is now"):
            rollback(NAME, 1, runtime=runtime, state=state)
        pin_checkpoint(NAME, str(first), runtime=runtime, state=state)
        push(runs)
        assert mark_of(segment) == {5.0}


def test_what_was_touched_while_it_was_live_is_on_record(segment: WritableSegment, runs: Path, runtime: Path) -> None:
    """Guards rollback to a checkpoint that got a second name, as that of the best one, after it went live."""
    first = write(runs / "step_1.safetensors", mlp(), 1.0)
    push(runs)
    os.link(first, runs.parent / "best.safetensors")
    assert push(runs).status == "current"
    for mark in (2.0, 3.0, 4.0):
        push(write(runs / f"step_{mark:.0f}.safetensors", mlp(), mark))
    with State(NAME) as state:
        rollback(NAME, 1, runtime=runtime, state=state)
    assert mark_of(segment) == {1.0}


@pytest.mark.parametrize("published", [1, 2])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("goes_back", [False, True])
def test_a_pin_is_of_the_bytes_of_then(
    goes_back: bool, again: bool, published: int, segment: WritableSegment, runs: Path, runtime: Path
) -> None:
    """Guards a pin after a reboot: a file that was written over once more, and never published, is not what it pins."""
    latest = write(runs / "latest.safetensors", mlp(), 1.0)
    assert push(runs).version == 1
    if published == 2:
        over(write(runs.parent / "new.safetensors", mlp(), 2.0), latest)
        assert push(runs).version == 2
    with State(NAME) as state:
        if goes_back:
            push(write(runs / "other.safetensors", mlp(), 4.0))
            rollback(NAME, published, runtime=runtime, state=state)
        else:
            pin_checkpoint(NAME, None, runtime=runtime, state=state)
    if again:
        over(write(runs.parent / "new.safetensors", mlp(), 3.0), latest)
    shutil.rmtree(segment.path)
    outcome = push(runs)
    if again:
        assert "gone or was changed" in (outcome.reason or "")
    else:
        assert (outcome.status, mark_of(WritableSegment.open(NAME))) == ("published", {float(published)})


def test_a_history_of_an_older_wsync_goes_on(segment: WritableSegment, runs: Path, runtime: Path) -> None:
    """Guards a database that was made before change times were recorded: it is not taken for a damaged one."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    push(runs)
    with State(NAME) as state:
        state._write(lambda database: database.execute("ALTER TABLE events DROP COLUMN changed_ns"))
    write(runs / "step_2.safetensors", mlp(), 2.0)
    push(runs)
    with State(NAME) as state:
        assert [event.version for event in state.events()] == [1, 2]
        rollback(NAME, 1, runtime=runtime, state=state)
    assert mark_of(segment) == {1.0}
