"""A place of checkpoints: what counts as a candidate, which is newest, and waiting for the next one."""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import DEADLINE

from wsync.checkpoints.files.parts import identity
from wsync.discovery.changes import Changes
from wsync.discovery.listing import scan
from wsync.discovery.newest import Candidate, Select, natural, select
from wsync.discovery.weight_getter import live_candidate
from wsync.errors import CheckpointError, NoCheckpoint
from wsync.segment.publication import Publication

LONG = 10 * DEADLINE  # a poll that no test may come to wait for


def put(path: Path, mtime: int | None = None, content: bytes = b"x") -> Path:
    """A file with a modification time of so many seconds."""
    path.write_bytes(content)
    if mtime is not None:
        os.utime(path, (mtime, mtime))
    return path


def names(candidates: list[Candidate]) -> list[str]:
    return [candidate.path.name for candidate in candidates]


def candidate(name: str, mtime: int, state: str | None = None, place: str = "/runs") -> Candidate:
    return Candidate(Path(place, name), state or f"{name}@{mtime}", mtime)


# Candidates


@pytest.mark.parametrize(
    "name",
    [
        ".step_1.safetensors",
        ".hidden.step_1.safetensors",
        "~step_1.safetensors",
        "step_1.tmp.safetensors",
        "step_1-tmp.safetensors",
        "step_1.tmp8xk2.safetensors",
        "step_1_temp.safetensors",
        "step_1.PART.safetensors",
        "step_1.partial.safetensors",
        "step_1.incomplete.safetensors",
        "step_1.safetensors.tmp",
        "step_1.safetensors~",
        "Tmp_5.safetensors",
        "x.TEMP",
        "step_1-00001-of-00002.safetensors",
        "step_1.pt",
        "safetensors",
    ],
)
def test_what_a_writer_still_works_on_is_no_candidate(name: str, tmp_path: Path) -> None:
    """Guards that temporaries, hidden files and other formats are never opened."""
    put(tmp_path / name)
    assert scan(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["step_1.safetensors", "policy-part1.safetensors", "attempt.safetensors", "a b.safetensors"]
)
def test_ordinary_names_are_candidates(name: str, tmp_path: Path) -> None:
    """Guards that the filter of temporaries does not swallow checkpoints."""
    put(tmp_path / name)
    assert names(scan(tmp_path)) == [name]


def test_only_regular_files_are_candidates(tmp_path: Path) -> None:
    """Guards that FIFOs, directories, devices and broken or circular links are passed over."""
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "directory.safetensors").mkdir()
    (tmp_path / "device.safetensors").symlink_to("/dev/null")
    (tmp_path / "broken.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.safetensors").symlink_to(tmp_path / "circle.safetensors")
    (tmp_path / "link.safetensors").symlink_to(put(tmp_path / "target.bin"))
    assert names(scan(tmp_path)) == ["link.safetensors"]


def test_a_candidate_carries_the_state_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that a candidate's path is absolute and its identity is that of the opened file."""
    path = put(tmp_path / "step_1.safetensors", 5)
    monkeypatch.chdir(tmp_path)
    (found,) = scan(Path("."))
    assert (found.path, found.identity, found.mtime_ns) == (path, identity(path.stat()), 5 * 10**9)


def test_a_named_file_is_its_own_only_candidate(tmp_path: Path) -> None:
    """Guards that a file named outright is taken whatever its name, and its neighbours are not."""
    path = put(tmp_path / "weights.tmp")
    put(tmp_path / "step_1.safetensors")
    assert names(scan(path)) == ["weights.tmp"]


def test_a_place_that_is_not_there_is_no_checkpoint_yet(tmp_path: Path) -> None:
    """Guards that a directory that the trainer has still to make is "not yet" (66), never an OSError."""
    with pytest.raises(NoCheckpoint, match="yet"):
        scan(tmp_path / "runs" / "later")


def test_a_place_below_a_file_cannot_be_listed(tmp_path: Path) -> None:
    """Guards that every other failure of a listing is a CheckpointError that names the place."""
    with pytest.raises(CheckpointError, match="cannot be listed") as caught:
        scan(put(tmp_path / "file") / "runs")
    assert not isinstance(caught.value, NoCheckpoint)


# Order


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("step_9", "step_10"),
        ("step_09", "step_10"),
        ("run2_step_9", "run10_step_1"),
        ("step_1", "step_1_b"),
        ("a", "b"),
        ("9", "a"),
        ("step_", "step_a"),
    ],
)
def test_names_are_ordered_as_people_read_them(older: str, newer: str) -> None:
    """Guards the natural order that decides between files of one moment."""
    assert natural(older) < natural(newer)


def test_names_of_every_kind_can_be_compared() -> None:
    """Guards that no pair of names fails to compare: digits of other scripts, empty, longer than Linux allows."""
    odd = ["", "²", "١٢", "1²", "a" * 300, "1" * 300, "\udcff", "9a9", "a9a"]
    assert len(sorted(odd, key=natural)) == len(odd)


def test_newest_comes_first_and_ties_go_by_name(tmp_path: Path) -> None:
    """Guards the order of a real listing: modification time, then natural name."""
    for name, mtime in [("step_9", 100), ("step_10", 100), ("step_99", 50), ("step_2", 200)]:
        put(tmp_path / f"{name}.safetensors", mtime)
    listed = [name.removesuffix(".safetensors") for name in names(select(scan(tmp_path)))]
    assert listed == ["step_2", "step_10", "step_9", "step_99"]


LIVE = candidate("step_2", 20)


@pytest.mark.parametrize(
    ("listing", "newer"),
    [
        ([], []),
        ([LIVE], []),
        ([candidate("step_1", 10), LIVE], []),
        ([candidate("step_1", 10), LIVE, candidate("step_3", 30), candidate("step_4", 40)], ["step_4", "step_3"]),
        ([LIVE, candidate("step_3", 20)], ["step_3"]),
        ([LIVE, candidate("step_1", 20)], []),
        ([candidate("step_1", 10)], []),  # the live file is gone: what is older stays older
        ([candidate("step_1", 10), candidate("step_3", 30)], ["step_3"]),
        ([candidate("step_2", 30)], ["step_2"]),  # overwritten in place, or replaced by a rename
        ([candidate("step_2", 20, "another inode")], ["step_2"]),
        ([candidate("step_1", 10, place="/other")], ["step_1"]),  # what is live came from elsewhere
        ([candidate("step_1", 20, LIVE.identity, place="/other")], []),  # the same file by another way
    ],
)
def test_select_takes_what_is_newer_than_what_is_live(listing: list[Candidate], newer: list[str]) -> None:
    """Guards which candidates one listing offers beside a live version, whatever the listing's own order."""
    assert names(select(listing, LIVE)) == newer
    assert names(select(reversed(listing), LIVE)) == newer


def test_nothing_live_makes_all_new() -> None:
    """Guards that the first pass is offered the whole listing, newest first."""
    assert names(select([candidate("step_1", 10), candidate("step_3", 30), LIVE])) == ["step_3", "step_2", "step_1"]


@pytest.mark.parametrize(
    "beside",
    [
        [],
        [candidate("step_0", 5)],
        [candidate("step_1", 15)],
    ],
)
def test_a_live_file_replaced_by_an_older_one_is_new(beside: list[Candidate]) -> None:
    """Guards that the live name with other contents counts as new, also when a copy kept an old time (cp -p, mv)."""
    assert names(select([candidate("step_2", 10, "another inode"), *beside], LIVE)) == ["step_2"]


def test_real_replacements_are_new(tmp_path: Path) -> None:
    """Guards the same on a real file: overwritten in place, then replaced by a rename."""
    path = put(tmp_path / "latest.safetensors", 100)
    (live,) = scan(tmp_path)
    assert select(scan(tmp_path), live) == []
    put(path, 101)
    (overwritten,) = select(scan(tmp_path), live)
    put(tmp_path / "next", 101).replace(path)
    (renamed,) = select(scan(tmp_path), overwritten)
    assert renamed.identity != overwritten.identity


# Waiting


class Waiter(threading.Thread):
    """Waits for changes in a thread of its own until it was told of one."""

    def __init__(self, place: Path, poll: float, marker: str = "") -> None:
        super().__init__(daemon=True)
        self.stop, self.told = threading.Event(), threading.Event()
        self.changes = Changes(place, poll, self.stop, Select(marker=marker))
        self.answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def run(self) -> None:
        while not self.stop.is_set():
            answer = self.changes.wait()
            self.answers.put(answer)
            if answer:
                self.told.set()
        self.changes.close()

    def settle(self) -> None:
        """Returns once a whole poll has passed without a change, and forgets the changes before it."""
        while not self.answers.empty():
            self.answers.get()
        deadline = time.monotonic() + DEADLINE
        while self.answers.get(timeout=DEADLINE):
            assert time.monotonic() < deadline, "never a quiet poll"
        self.told.clear()

    def told_while(self, act: Callable[[], object]) -> bool:
        """Whether it is told, the act repeated because nobody knows when the notifier began to listen."""
        deadline = time.monotonic() + DEADLINE
        self.told.wait(0.2)  # so that the first act, too, finds it waiting
        while not self.told.is_set() and time.monotonic() < deadline:
            act()
            self.told.wait(0.2)
        return self.told.is_set()


@pytest.fixture
def waiter() -> Iterator[Callable[..., Waiter]]:
    """Starts waiters; all are stopped and joined after the test."""
    started: list[Waiter] = []

    def start(place: Path, poll: float, marker: str = "") -> Waiter:
        started.append(Waiter(place, poll, marker))
        started[-1].start()
        return started[-1]

    yield start
    for thread in started:
        thread.stop.set()
    for thread in started:
        thread.join(DEADLINE)
        assert not thread.is_alive()


Start = Callable[..., Waiter]


def publish(directory: Path) -> None:
    put(directory / "next.tmp").replace(directory / "step_1.safetensors")


def test_a_rename_into_the_directory_wakes(waiter: Start, tmp_path: Path) -> None:
    """Guards that a checkpoint renamed into place is told at once, long before the poll is over."""
    assert waiter(tmp_path, LONG).told_while(lambda: publish(tmp_path))


def test_a_named_file_that_is_replaced_wakes(waiter: Start, tmp_path: Path) -> None:
    """Guards that a place that is one file, of any name, is watched in its directory."""
    path = tmp_path / "weights"
    assert waiter(path, LONG).told_while(lambda: put(tmp_path / "next.tmp").replace(path))


def test_a_directory_that_is_made_later_wakes(waiter: Start, tmp_path: Path) -> None:
    """Guards that a directory that is not there yet is awaited in its parent."""
    place = tmp_path / "runs"

    def make() -> None:
        if place.exists():
            place.rmdir()
        place.mkdir()

    assert waiter(place, LONG).told_while(make)


def test_a_directory_deep_in_nothing_is_found_by_the_clock(waiter: Start, tmp_path: Path) -> None:
    """Guards that a directory whose parents are missing too is seen by the poll once it is there."""
    place = tmp_path / "a" / "b" / "runs"
    thread = waiter(place, 0.05)

    def make_and_publish() -> None:
        place.mkdir(parents=True, exist_ok=True)
        publish(place)

    assert thread.told_while(make_and_publish)


def test_a_directory_that_was_replaced_is_watched_anew(waiter: Start, tmp_path: Path) -> None:
    """Guards that a directory removed and made again under its name is the one that is watched."""
    place = tmp_path / "runs"
    place.mkdir()
    thread = waiter(place, 0.2)
    assert thread.told_while(lambda: publish(place))
    place.rename(tmp_path / "old")
    place.mkdir()
    thread.settle()
    assert thread.told_while(lambda: publish(place))


@pytest.mark.parametrize("parents", ["", "runs", "a/b/runs"])
def test_what_came_before_the_wait_is_told(parents: str, tmp_path: Path) -> None:
    """Guards the moment between a listing and the wait: a checkpoint of then is told, and not found by the poll."""
    place = tmp_path / parents
    changes = Changes(place, 2.0, threading.Event())
    place.mkdir(parents=True, exist_ok=True)
    publish(place)
    try:
        assert changes.wait() is True
    finally:
        changes.close()


@pytest.mark.parametrize(
    "act",
    ["a file in it", "a marker in it", "a hidden marker", "itself renamed", "made", "a link to it", "its file's mode",
     "a configuration"],
)  # fmt: skip
def test_a_checkpoint_that_is_a_directory_wakes(act: str, waiter: Start, tmp_path: Path) -> None:
    """Guards checkpoints of several files: what happens in their directories, old or new, is told as well."""
    place, inner = tmp_path / "runs", tmp_path / "runs" / "checkpoint-500"
    inner.mkdir(parents=True)
    put(inner / "model.safetensors")
    number = itertools.count()

    def do() -> None:
        match act:
            case "a file in it":
                put(inner / "model-00001-of-00002.safetensors")
            case "a marker in it":
                (inner / f"all.{next(number)}.STABLE").touch()
            case "a hidden marker":
                (inner / f".{next(number)}.STABLE").touch()
            case "a link to it":
                (place / ".next").symlink_to(inner.name)
                (place / ".next").rename(place / "latest")
            case "a configuration":
                (inner / "adapter_config.json").touch()
            case "itself renamed":
                inner.rename(inner.with_name(f"checkpoint-{next(number)}")).rename(inner)
            case "made":
                new = place / f"checkpoint-9{next(number)}"
                new.mkdir()
                put(new / "model.safetensors")
            case _:
                (inner / "model.safetensors").chmod(0o600 + next(number) % 2 * 0o44)

    assert waiter(place, LONG, "STABLE").told_while(do)


def test_a_file_in_a_directory_that_came_later_wakes(waiter: Start, tmp_path: Path) -> None:
    """Guards that a directory made under the watch is watched itself: the last of its files is told, too."""
    thread = waiter(tmp_path, 0.2)
    late = tmp_path / "checkpoint-1"
    late.mkdir()
    thread.settle()
    assert thread.told_while(lambda: put(late / "model.safetensors"))


def test_notifications_that_were_lost_are_a_change(tmp_path: Path) -> None:
    """Guards against a queue that ran over: what was lost in it must not wait for the clock."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 100_000:
        pytest.skip(f"the system queues {limit:,} notifications")
    changes = Changes(tmp_path, LONG, threading.Event())
    logs = [put(tmp_path / "log.1"), put(tmp_path / "log.2")]
    for n in range(limit):  # an event each, and none of concern
        os.close(os.open(logs[n % 2], os.O_WRONLY))
    try:
        assert changes.wait(DEADLINE)
    finally:
        changes.close()


def test_other_files_do_not_wake(tmp_path: Path) -> None:
    """Guards that a log or a temporary beside the checkpoints costs no pass: the poll ends without a change."""
    stop = threading.Event()
    changes = Changes(tmp_path, 0.3, stop)
    writing = threading.Event()

    def write() -> None:
        while not writing.wait(0.02):
            put(tmp_path / "train.log")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert changes.wait() is False
    finally:
        writing.set()
        thread.join(DEADLINE)
        changes.close()


@pytest.mark.parametrize("place", ["", "runs", "a/b/runs"])
def test_stop_ends_the_wait(place: str, waiter: Start, tmp_path: Path) -> None:
    """Guards that a signal to stop does not wait for the poll, with the directory, its parent or neither there."""
    thread = waiter(tmp_path / place, LONG)
    thread.stop.set()
    thread.join(DEADLINE / 6)
    assert not thread.is_alive()
    assert not thread.told.is_set()


def test_a_time_ahead_of_the_clock_hides_nothing_that_comes_after(tmp_path: Path) -> None:
    """Guards against a file whose modification time was set an hour ahead keeping all later ones from going live."""
    first = tmp_path / "a.safetensors"
    first.write_bytes(b"1")
    os.utime(first, (time.time() + 3600,) * 2)
    live = scan(tmp_path)[0]
    second = tmp_path / "b.safetensors"
    second.write_bytes(b"2")
    assert [c.path.name for c in select(scan(tmp_path), live)] == ["b.safetensors"]
    after = next(c for c in scan(tmp_path) if c.path == second)
    assert select(scan(tmp_path), after) == []  # and the one from ahead does not come back
    published = Publication(
        version=1, checkpoint=str(first), identity=identity(first.stat()), published_at=time.time() - 1
    )
    first.unlink()
    assert [c.path.name for c in select(scan(tmp_path), live_candidate(published))] == ["b.safetensors"]
