"""Checkpoints in several files that are saved over one another: policies never act on files of two saves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from builders import NAME, SPEC, mark_of, shards, write
from policies import mlp
from processes import DEADLINE
from safetensors.torch import load_file, save_file

from wsync.cli.output.push_quiet import News
from wsync.cli.output.watch import WatchLog
from wsync.discovery.newest import Select
from wsync.errors import BeingRewritten
from wsync.history.rollback import pin_checkpoint
from wsync.history.state import State
from wsync.layout.filenames import INDEX
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import Spec, load_spec
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("layouts_here")]

SETTLE = 0.1
SHARD_1, SHARD_2 = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
Writer = Callable[[Path, Path], object]


def spec(settle: float = SETTLE) -> Spec:
    return replace(load_spec(SPEC), select=Select(settle=settle))


def push(place: Path, settle: float = SETTLE) -> Outcome:
    """One pass as cron makes it: all that it knows of the past is in the segment and in the history."""
    with Syncer(spec(settle), place, state=State(NAME)) as syncer:
        return syncer.once()


def by_rename(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    temporary.rename(target)


def with_its_times(source: Path, target: Path) -> None:
    """As ``rsync -a`` does it."""
    temporary = target.with_name(f".{target.name}.x7Qz")
    shutil.copy2(source, temporary)
    temporary.rename(target)


def in_place(source: Path, target: Path) -> None:
    with target.open("r+b") as file:
        file.write(source.read_bytes())


@pytest.mark.parametrize(
    ("writes", "order"),
    [
        (by_rename, (SHARD_1, SHARD_2, INDEX)),
        (by_rename, (SHARD_2, SHARD_1, INDEX)),
        (by_rename, (INDEX, SHARD_1, SHARD_2)),
        (by_rename, (SHARD_2, INDEX, SHARD_1)),
        (with_its_times, (SHARD_1, SHARD_2, INDEX)),
        (in_place, (SHARD_1, SHARD_2, INDEX)),
        (in_place, (INDEX, SHARD_1, SHARD_2)),
    ],
)
def test_a_save_over_a_published_one_goes_live_whole(
    writes: Writer, order: tuple[str, ...], segment: WritableSegment, runs: Path
) -> None:
    """Guards a directory that is rewritten file by file, each of them long after the one before, in every order."""
    latest = shards(runs / "latest", mlp(), 1.0)
    assert push(runs).version == 1
    new = shards(runs.parent / "new", mlp(), 2.0)
    for name in order[:2]:
        writes(new / name, latest / name)
        assert (outcome := push(runs)).kind == BeingRewritten.kind, outcome
        assert (outcome.exit_code, outcome.version, mark_of(segment)) == (75, 1, {1.0})
    writes(new / order[2], latest / order[2])
    while (outcome := push(runs)).kind == BeingRewritten.kind:  # an index amid its shards is looked at for longer
        assert mark_of(segment) == {1.0}
    assert (outcome.status, outcome.version, mark_of(segment)) == ("published", 2, {2.0})
    assert push(runs).status == "current"


@pytest.mark.parametrize("named", [False, True])
def test_half_a_save_that_stays_is_told_once(
    named: bool, segment: WritableSegment, runs: Path, hours_later: Callable[[], None]
) -> None:
    """Guards a trainer that died within a save, and a copy that passes over a file: 65 once, not 75 for days."""
    place = shards(runs / "latest", mlp(), 1.0)
    assert push(place if named else runs).version == 1
    by_rename(shards(runs.parent / "new", mlp(), 2.0) / SHARD_1, place / SHARD_1)
    assert push(place if named else runs).exit_code == 75
    hours_later()
    told = push(place if named else runs)
    assert (told.exit_code, told.version) == (65, 1) and "Nothing has written to it" in (told.reason or "")
    assert [push(place if named else runs).exit_code for _ in range(2)] == [0, 0]
    with State(NAME) as state:
        assert len(state.events(kinds=("reject",))) == 1
    by_rename(runs.parent / "new" / SHARD_2, place / SHARD_2)
    while (outcome := push(place if named else runs)).kind == BeingRewritten.kind:  # the index has not changed
        pass
    assert (outcome.status, mark_of(segment)) == ("published", {2.0})


def test_half_a_save_that_stays_is_told_before_anything_is_live(
    segment: WritableSegment, runs: Path, hours_later: Callable[[], None]
) -> None:
    """Guards a first checkpoint of two saves: cron hears of it once, and no pass adds to the log."""
    place = shards(runs / "latest", mlp(), 1.0)
    for name, step in ((SHARD_1, "1"), (SHARD_2, "2")):
        save_file(load_file(place / name), place / name, metadata={"step": step})
    news = News("policies:mlp", None)
    outcome = push(runs)
    assert outcome.exit_code == 75 and not news.has(outcome)
    hours_later()
    outcomes = [push(runs) for _ in range(2)]
    assert [(each.exit_code, news.has(each)) for each in outcomes] == [(66, True), (66, False)]
    with State(NAME) as state:
        assert not state.events(kinds=("reject",))


def test_half_a_save_is_not_pinned(segment: WritableSegment, runs: Path) -> None:
    """Guards an operator who pins a directory while it is saved over: a pin would put files of two saves live."""
    place = shards(runs / "latest", mlp(), 1.0)
    os.utime(place / INDEX, (1e9, 1e9))  # the index first: by its times alone, half a save is whole
    assert push(runs).version == 1
    write(runs / "other.safetensors", mlp(), 5.0)
    assert push(runs).version == 2
    new = shards(runs.parent / "new", mlp(), 2.0)
    by_rename(new / SHARD_1, place / SHARD_1)
    with State(NAME) as state:
        with pytest.raises(BeingRewritten):
            pin_checkpoint(NAME, str(place), runtime=segment.path.parent, state=state)
        assert state.pin_file.read() is None
        for name in (SHARD_2, INDEX):
            by_rename(new / name, place / name)
        pin_checkpoint(NAME, str(place), runtime=segment.path.parent, state=state)
    assert (push(runs).status, mark_of(segment)) == ("published", {2.0})


@pytest.mark.parametrize("since", ["a reboot", "another checkpoint"])
def test_what_was_published_is_known_for_good(since: str, segment: WritableSegment, runs: Path) -> None:
    """Guards the same where something else is live by now, or the segment is gone: the history knows the files."""
    latest = shards(runs / "latest", mlp(), 1.0)
    assert push(runs).version == 1
    if since == "a reboot":
        shutil.rmtree(segment.path)
    else:
        write(runs / "other.safetensors", mlp(), 5.0)
        assert push(runs).version == 2
    new = shards(runs.parent / "new", mlp(), 2.0)
    for name in (INDEX, SHARD_2):  # by its times this is the index first, as a copy may bring it
        by_rename(new / name, latest / name)
    assert "is being rewritten" in (push(latest).reason or "")


def test_the_first_look_at_half_a_save_waits_for_long(segment: WritableSegment, runs: Path) -> None:
    """Guards a directory that nothing is known of: an index amid its shards waits, and comes through in the end."""
    latest = shards(runs / "latest", mlp(), 1.0)
    by_rename(shards(runs.parent / "new", mlp(), 1.0) / SHARD_1, latest / SHARD_1)
    outcome = push(runs)
    assert (outcome.status, outcome.version) == ("busy", 0)
    assert f"{30 * SETTLE:g} s" in (outcome.reason or "")
    while (outcome := push(runs)).kind == BeingRewritten.kind:
        pass
    assert (outcome.status, outcome.version) == ("published", 1)


@pytest.mark.parametrize("names", list(permutations([SHARD_1, SHARD_2, INDEX]))[::2])
def test_a_copy_without_times_comes_through(names: tuple[str, ...], segment: WritableSegment, runs: Path) -> None:
    """Guards that files that are stamped by their arrival are taken in the end, whatever their order."""
    source = shards(runs.parent / "source", mlp(), 3.0)
    (runs / "copy").mkdir()
    for at, name in enumerate(names):
        shutil.copyfile(source / name, runs / "copy" / name)
        os.utime(runs / "copy" / name, (1_000_000 + at, 1_000_000 + at))
    while (outcome := push(runs, 0.02)).kind == BeingRewritten.kind:
        assert names[1] == INDEX
    assert (outcome.status, mark_of(segment)) == ("published", {3.0})


def test_a_new_directory_is_not_waited_for(segment: WritableSegment, runs: Path) -> None:
    """Guards the time of what careful trainers do: a whole directory that is renamed into place counts at once."""
    for mark in (1.0, 2.0):
        made = shards(runs.parent / "made", mlp(), mark)
        if (runs / "latest").exists():
            shutil.rmtree(runs / "latest")
        made.rename(runs / "latest")
        outcome = push(runs)
        assert (outcome.status, mark_of(segment)) == ("published", {mark})


def test_files_that_stay_are_touched(segment: WritableSegment, runs: Path) -> None:
    """Guards the way out that the message names, for a copy that passes over files that have not changed."""
    latest = shards(runs / "latest", mlp(), 1.0)
    assert push(runs).version == 1
    by_rename(latest / SHARD_1, latest / SHARD_1)
    assert "touch the files that stay" in (push(runs).reason or "")
    (latest / SHARD_2).touch()
    (latest / INDEX).touch()
    assert push(runs).version == 2


def test_a_watch_tells_of_it_after_a_minute_and_once(
    segment: WritableSegment, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a log against a line for each save in place, and an operator against a save that never ends."""
    latest = shards(runs / "latest", mlp(), 1.0)
    with Syncer(spec(), runs) as syncer:
        for minute, lines in ((DEADLINE, 0), (0.0, 1)):
            assert syncer.once(force=True).status == "published"
            by_rename(latest / SHARD_1, latest / SHARD_1)
            with WatchLog(NAME, runs, "json", lambda: None, rewriting=minute) as log:
                for _ in range(4):
                    log.tell(syncer.once())
            told = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
            assert told == ["watch", *["busy"] * lines, "stop"]
            for file in latest.iterdir():
                file.touch()
