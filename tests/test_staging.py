"""How bytes of files come into the weights: mapped where nobody can write them, else read; by one thread or by two."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DEADLINE, Lines, Spawn, leases, raw, write
from hypothesis import given
from hypothesis import settings as at_most
from hypothesis import strategies as st
from policies import mlp
from safetensors.torch import load_file

from wsync import finite, mapped, memory, staging
from wsync.checkpoint import Checkpoint
from wsync.errors import CheckpointChanged, NonFiniteWeights
from wsync.fitting import Fit, Read, rows_of
from wsync.layout import layout_of
from wsync.mapped import Mapped


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A descriptor of three pages and a byte, the pages numbered, at ``tmp_path / "file"``; skips without leases."""
    if not leases(tmp_path):
        pytest.skip("this file system grants no leases")
    monkeypatch.setattr(memory, "alone", True)
    (tmp_path / "file").write_bytes(b"".join(bytes([n]) * 4096 for n in range(3)) + b"\xff")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def mapping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, int]]:
    """Has small files mapped like large ones, and tells by which thread, and how many bytes."""
    if not leases(tmp_path):
        pytest.skip("this file system grants no leases")
    monkeypatch.setattr(memory, "alone", True)
    monkeypatch.setattr(staging, "_LARGE", 1)
    seen: list[tuple[str, int]] = []
    real = Mapped._map

    def note(self: Mapped, start: int, nbytes: int) -> memoryview | None:
        data = real(self, start, nbytes)
        if data is not None:
            seen.append((threading.current_thread().name, nbytes))
        return data

    monkeypatch.setattr(Mapped, "_map", note)
    return seen


def can_be_written(path: Path) -> bool:
    """Whether a writer would be let in at once; if not, it stands at the door from now on."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except BlockingIOError:
        return False
    return True


def pages(path: Path) -> int:
    """How many pages of a file this process has mapped, so that to look at them is no fault."""
    blocks = Path("/proc/self/smaps").read_text().split("VmFlags:")
    sizes = [
        line.split()[1] for block in blocks if f" {path}\n" in block for line in block.splitlines() if "Rss:" in line
    ]
    return sum(map(int, sizes)) * 1024 // mmap.PAGESIZE


def weights_of(path: Path, **options: Any) -> bytes:
    with Checkpoint(path) as checkpoint:
        weights = bytearray(checkpoint.layout.nbytes)
        checkpoint.read_into(memoryview(weights), checkpoint.plan(checkpoint.layout), **options)
        return bytes(weights)


# Parts of a file


@pytest.mark.parametrize(("start", "nbytes"), [(0, 12289), (0, 1), (4095, 2), (8192, 4096), (12288, 1), (5000, 7000)])
def test_a_part_is_those_bytes(file: int, start: int, nbytes: int) -> None:
    """Guards each border: pages are mapped whole, and what was asked for is given."""
    with Mapped(file).part(start, nbytes) as data:
        assert data is not None and bytes(data) == os.pread(file, nbytes, start)
        assert data.readonly


def test_nobody_writes_to_a_part(file: int, tmp_path: Path) -> None:
    """Guards against SIGBUS, and against bytes that become others after they were checked: a writer waits."""
    path, parts = tmp_path / "file", Mapped(file)
    assert can_be_written(path)
    with parts.part(0, 4096) as first, parts.part(4096, 4096) as second:
        assert first is not None and second is not None
        assert not can_be_written(path)
    assert can_be_written(path)


def test_who_waits_to_write_waits_for_no_further_part(file: int, tmp_path: Path) -> None:
    """Guards a trainer that writes the file anew: what is under way is finished, and nothing more begun."""
    path, parts = tmp_path / "file", Mapped(file)
    with parts.part(0, 4096) as first:
        assert first is not None and not can_be_written(path)
        with parts.part(4096, 4096) as second:
            assert second is None
        assert not can_be_written(path)
    assert can_be_written(path)
    with parts.part(4096, 4096) as again:
        assert again is not None


def test_what_is_copied_is_let_go_of(file: int, tmp_path: Path) -> None:
    """Counts the pages that a process has of a file: those of the parts that it has, and after the last not even one.

    Those that a part shares with a neighbour stay as long as that.
    """
    with (tmp_path / "file").open("wb") as grown:
        grown.write(bytes(96 * 4096))
    parts = Mapped(file)
    with parts.part(100, 32 * 4096) as first:
        assert first is not None and pages(tmp_path / "file") >= 33
        with parts.part(32 * 4096 + 100, 63 * 4096) as second:
            assert second is not None and pages(tmp_path / "file") == 96
        assert pages(tmp_path / "file") == 33 + 1
    del first, second
    assert pages(tmp_path / "file") == 0


def test_an_interrupt_at_the_end_of_a_part_ends_it(file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a trainer, who would wait 45 s for a lease that nobody needs any more."""

    def interrupted(address: int, size: int) -> None:
        raise KeyboardInterrupt

    parts = Mapped(file)
    monkeypatch.setattr(mapped, "unmap", interrupted)
    with parts.part(0, 4096) as first:
        with pytest.raises(KeyboardInterrupt), parts.part(4096, 4096) as second:
            assert first is not None and second is not None
        assert not can_be_written(tmp_path / "file")
    assert can_be_written(tmp_path / "file")


def test_a_checkpoint_that_is_closed_keeps_no_lease(
    tmp_path: Path, mapping: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a trainer where an interrupt came so that a part was not ended: its mapping keeps the file open."""

    def interrupted(self: Mapped, start: int, nbytes: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Mapped, "_end", interrupted)
    path = write(tmp_path / "a.safetensors", mlp(), 1.5)
    checkpoint = Checkpoint(path)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.read_into(memoryview(bytearray(checkpoint.layout.nbytes)), checkpoint.plan(checkpoint.layout))
    assert mapping and not can_be_written(path)
    checkpoint.close()
    assert can_be_written(path)


@pytest.mark.parametrize("looks", [[None, False], [False, None], [True, False]])
def test_one_cold_shard_makes_a_cold_checkpoint(looks: list[bool | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a checkpoint on several file systems, of which one does not tell what is in memory."""
    files = staging.Files([-1, -1], CheckpointChanged)
    for each, look in zip(files._mapped, looks, strict=True):
        monkeypatch.setattr(each, "is_cached", lambda *_, look=look: look)
        monkeypatch.setattr(each, "is_trusted", True)
    reads = [Read(file, 0, 8 << 20, ((0, 8 << 20),)) for file in range(2)]
    assert files._how(reads) == (False, True)


def test_what_somebody_writes_is_not_mapped(file: int, tmp_path: Path) -> None:
    """Guards against a writer who was there before."""
    with (tmp_path / "file").open("r+b"), Mapped(file).part(0, 4096) as data:
        assert data is None
    with Mapped(file).part(0, 4096) as data:
        assert data is not None


def test_a_part_beyond_the_end_is_none(file: int, tmp_path: Path) -> None:
    """Guards a file that was cut since: its read tells what happened."""
    os.truncate(tmp_path / "file", 5000)
    for start, nbytes in ((0, 8192), (8192, 4096)):
        with Mapped(file).part(start, nbytes) as data:
            assert data is None
    assert can_be_written(tmp_path / "file")


@pytest.mark.parametrize("why", ["shared", "exported", "a hole", "others' code", "old kernel", "waited for"])
def test_what_is_not_certain_is_not_mapped(
    file: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards files that others can write to, holes, pages that cannot be had, and a lease that was lost meanwhile.

    And threads and signal handlers of one's own, which may wait for the lease while they keep who is to give it back.
    """

    def wait_at_the_door(address: int, size: int) -> bool:
        assert not can_be_written(tmp_path / "file")
        return True

    if why == "shared":
        monkeypatch.setattr(mapped, "file_system", lambda _: 0x6969)  # NFS
    elif why == "exported":
        (tmp_path / "exports").touch()
        monkeypatch.setattr(mapped, "_EXPORTS", tmp_path / "exports")
    elif why == "a hole":
        os.truncate(tmp_path / "file", 1 << 20)
    elif why == "others' code":
        monkeypatch.setattr(memory, "alone", False)
    else:
        monkeypatch.setattr(mapped, "populate", wait_at_the_door if why == "waited for" else lambda *_: False)
    with Mapped(file).part(0, 4096) as data:
        assert data is None
    assert can_be_written(tmp_path / "file")


def test_the_kind_of_file_system_is_told(tmp_path: Path) -> None:
    """Guards the list of those that are trusted: the system's own numbers."""
    kinds = {}
    for place in (Path("/proc/self/status"), Path("/dev/shm"), tmp_path):
        fd = os.open(place, os.O_RDONLY)
        kinds[place] = memory.file_system(fd)
        os.close(fd)
    assert kinds[Path("/proc/self/status")] == 0x9FA0 and kinds[Path("/dev/shm")] == 0x01021994
    told = subprocess.run(["stat", "-f", "-c", "%t", tmp_path], capture_output=True, text=True, check=True).stdout
    assert kinds[tmp_path] == int(told, 16)


def test_what_the_disk_has_yet_to_give_is_not_taken_for_cached(tmp_path: Path) -> None:
    """Guards cold files, which come faster by reads."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if Mapped(fd).is_cached(0, 1 << 20):
            pytest.skip("the page cache cannot be dropped here, or does not tell")
        os.pread(fd, 1 << 20, 0)
        assert Mapped(fd).is_cached(0, 1 << 20)
    finally:
        os.close(fd)


@pytest.mark.parametrize("there", [set(), {0}, {0, 500}, {0, 999}, {500, 999}])
def test_a_file_is_cached_where_all_of_it_is(there: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a look at the beginning, which came with the header, or at one place alone."""

    def preadv(fd: int, buffers: list[bytearray], at: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        if at in there:
            return 1
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", preadv)
    assert Mapped(-1).is_cached(0, 1000) is (there == {500, 999})


def test_some_file_systems_do_not_tell_what_is_cached() -> None:
    """Guards tmpfs, which has all in memory, and a network's, which may have nothing, against a guess."""
    fd = os.memfd_create("file")
    os.truncate(fd, 1000)
    assert Mapped(fd).is_cached(0, 1000) is None
    os.close(fd)


# Rows


def test_a_copy_is_of_equally_many_bytes() -> None:
    """Guards the memory behind a target that is too small."""
    with pytest.raises(ValueError, match="8 bytes do not fill 7"):
        memory.copy(memoryview(bytearray(7)), memoryview(bytes(8)))


@given(st.data())
@at_most(max_examples=200, deadline=None)
def test_rows_are_the_same_bytes(data: st.DataObject) -> None:
    """Guards every byte in its place once, whatever is joined and split, and that no element of 8 bytes is split."""
    reads, start = [], 0
    for _ in range(data.draw(st.integers(0, 8))):
        file, gap = data.draw(st.integers(0, 1)), data.draw(st.sampled_from([0, 0, 8]))
        sizes = data.draw(st.lists(st.sampled_from([8, 16, 80]), min_size=1, max_size=2))
        start += gap
        slices, at = [], start + data.draw(st.sampled_from([0, 0, 1000]))
        for size in sizes:
            slices.append((at, size))
            at += size + 8
        reads.append(Read(file, start, sum(sizes), tuple(slices)))
        start += sum(sizes)

    def bytes_of(listed: list[Read]) -> list[tuple[int, int, int]]:
        found = []
        for read in listed:
            at = read.start
            for offset, nbytes in read.slices:
                found += [(read.file, at + n, offset + n) for n in range(nbytes)]
                at += nbytes
            assert at == read.start + read.nbytes
        return found

    most = data.draw(st.sampled_from([24, 64, 1 << 20]))
    rows = list(rows_of(reads, most))
    assert bytes_of(rows) == bytes_of(reads)
    assert all(row.nbytes <= most for row in rows if len(row.slices) == 1)
    assert all((row.start - read.start) % 8 == 0 for row in rows for read in reads[:1])


def test_a_file_of_one_row_is_split_evenly() -> None:
    """Counts the copies of 64 MiB and a little: three alike, none of a few bytes."""
    size = (64 << 20) + 800
    chunks = [
        Read(0, 8 + at, min(8 << 20, size - at), ((at, min(8 << 20, size - at)),)) for at in range(0, size, 8 << 20)
    ]
    rows = list(rows_of(chunks, 32 << 20))
    assert len(rows) == 3 and max(row.nbytes for row in rows) - min(row.nbytes for row in rows) <= 24


# Checkpoints


@pytest.mark.parametrize("told", [True, False])
def test_a_large_file_is_copied_from_where_it_is(
    told: bool, tmp_path: Path, mapping: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards every byte in its place, also where a file system does not tell what is in memory, as tmpfs does not.

    And that nobody is kept from writing afterwards.
    """

    def preadv(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        assert flags == os.RWF_NOWAIT
        if told:
            return 1
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "preadv", preadv)
    path = write(tmp_path / "a.safetensors", mlp(hidden=500), 1.5)
    layout, expected = layout_of(mlp(hidden=500)), load_file(path)
    assert weights_of(path) == b"".join(expected[entry.name].numpy().tobytes() for entry in layout.tensors)
    assert mapping == [("MainThread", layout.nbytes)]
    assert can_be_written(path)


def test_what_is_not_cached_is_read(tmp_path: Path, mapping: list[tuple[str, int]], monkeypatch: Any) -> None:
    """Guards cold files against faults one after another."""
    path = write(tmp_path / "a.safetensors", mlp(), 1.5)
    expected = weights_of(path)
    mapping.clear()
    monkeypatch.setattr(Mapped, "is_cached", lambda *_: False)
    assert weights_of(path) == expected and not mapping


@pytest.mark.parametrize("cached", [False, None, True])
@pytest.mark.parametrize("cast", [False, True])
def test_what_may_not_be_in_memory_is_asked_for_before_it_is_read(
    cached: bool | None, cast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts what a disk is asked for: each byte once, some time before its read and not all at once; or nothing."""
    policy = mlp(hidden=500)
    path = write(tmp_path / "a.safetensors", policy, 1.5)
    expected, asked, ahead = weights_of(path), list[range](), list[int]()
    for name, nbytes in {"_LARGE": 1, "_AHEAD": 2400, "_ASK": 160, "_BUFFER": 80}.items():
        monkeypatch.setattr(staging, name, nbytes)
    monkeypatch.setattr(memory, "alone", False)
    monkeypatch.setattr("wsync.fitting.CHUNK", 800)
    monkeypatch.setattr(Checkpoint, "_piece", 800)
    monkeypatch.setattr(Mapped, "is_cached", lambda *_: cached)
    read, advise = os.preadv, os.posix_fadvise

    def note_advice(fd: int, start: int, nbytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            assert 0 < nbytes <= 160
            asked.append(range(start, start + nbytes))
        advise(fd, start, nbytes, advice)

    def note_read(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        got = read(fd, buffers, at, flags)
        if asked:
            ahead.append(asked[-1].stop - at - got)
        return got

    monkeypatch.setattr(os, "posix_fadvise", note_advice)
    monkeypatch.setattr(os, "preadv", note_read)
    if cast:
        with Checkpoint(path) as checkpoint:
            layout = layout_of(mlp(hidden=500).bfloat16())
            weights = bytearray(layout.nbytes)
            checkpoint.read_into(memoryview(weights), checkpoint.plan(layout, Fit(cast=True)))
    else:
        assert weights_of(path) == expected
    if cached:
        assert not asked
    else:
        end = path.stat().st_size
        bytes_asked = [byte for part in asked for byte in part]
        assert bytes_asked == list(range(end - len(expected), end))
        assert min(ahead) >= 0 and 1600 < max(ahead) <= 2400 + 800


def test_a_library_reads_in_pieces_as_planned(
    tmp_path: Path, mapping: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the finite check of what is read, which is to come while a piece is still in the processor's cache."""
    monkeypatch.setattr(memory, "alone", False)
    monkeypatch.setattr("wsync.fitting.CHUNK", 800)
    got: list[int] = []
    weights = weights_of(write(tmp_path / "a.safetensors", mlp(hidden=500), 1.5), progress=got.append)
    assert max(got) == 800 and sum(got) == len(weights) and not mapping


@pytest.mark.parametrize("shift", range(8))
@pytest.mark.parametrize("bad", [None, 0, 700, 999])
def test_floats_that_lie_askew_are_checked(
    shift: int, bad: int | None, tmp_path: Path, mapping: list[tuple[str, int]]
) -> None:
    """Guards headers of any length: what is copied is right, and what is not finite is found, wherever it begins."""
    values = np.arange(1000, dtype="<f4")
    if bad is not None:
        values[bad] = np.nan
    header = {"__metadata__": {"x": "x" * shift}, "w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}
    path = raw(tmp_path / "a.safetensors", header, values.tobytes())
    assert weights_of(path, finite=False) == values.tobytes()
    if bad is None:
        weights_of(path)
    else:
        with pytest.raises(NonFiniteWeights, match="1 of its tensors"):
            weights_of(path)
    assert len(mapping) == 2


@pytest.mark.parametrize("shift", [0, 4])
def test_floats_that_lie_askew_are_not_copied_once_more(
    shift: int, tmp_path: Path, mapping: list[tuple[str, int]]
) -> None:
    """Counts memory: numpy takes as much again for floats that do not begin at a multiple of their size."""
    size = 1 << 20
    header = {
        "__metadata__": {"x": "x" * shift},
        "w": {"dtype": "F64", "shape": [size // 8], "data_offsets": [0, size]},
    }
    path = raw(tmp_path / "a.safetensors", header, bytes(size))
    with Checkpoint(path) as checkpoint:
        weights, plan = bytearray(size), checkpoint.plan(checkpoint.layout)
        checkpoint.read_into(memoryview(weights), plan)
        tracemalloc.start()
        try:
            checkpoint.read_into(memoryview(weights), plan)
            assert tracemalloc.get_traced_memory()[1] < size // 4
        finally:
            tracemalloc.stop()
    assert len(mapping) == 2


@pytest.mark.parametrize("way", ["read", "mapped"])
def test_two_threads_share_a_large_file(
    way: str, tmp_path: Path, mapping: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards every byte in its place, the check of each, and a file that is cut meanwhile, with two threads at it."""
    read_by, both, real = set(), threading.Barrier(2), finite.all_finite

    def check(*arguments: Any) -> bool:
        if threading.current_thread().name not in read_by:
            read_by.add(threading.current_thread().name)
            both.wait(DEADLINE)  # each of the two has one
        return real(*arguments)

    monkeypatch.setattr(staging, "all_finite", check)
    monkeypatch.setattr(staging, "_ROW", 800)
    monkeypatch.setattr(staging, "_WORTH_TWO", 1)
    monkeypatch.setattr(staging, "_has_second_processor", lambda idle: idle)
    if way == "read":
        monkeypatch.setattr(staging, "_LARGE", 1 << 30)
    path, layout = write(tmp_path / "a.safetensors", mlp(hidden=500), 1.5), layout_of(mlp(hidden=500))
    expected, weights = load_file(path), bytearray(layout.nbytes)
    with Checkpoint(path) as checkpoint:
        plan = checkpoint.plan(layout)
        checkpoint.read_into(memoryview(weights), plan)
        assert read_by == {"MainThread", "wsync-staging"}
        assert {name for name, _ in mapping} == (read_by if way == "mapped" else set())
        assert weights == b"".join(expected[entry.name].numpy().tobytes() for entry in layout.tensors)
        assert can_be_written(path)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(CheckpointChanged):
            checkpoint.read_into(memoryview(weights), plan)
    write(path, mlp(hidden=500), float("nan"))
    with pytest.raises(NonFiniteWeights):
        weights_of(path)


@pytest.mark.parametrize(
    ("may_use", "runnable", "second", "idle"),
    [({0, 1}, "1/99", True, True), ({0, 1}, "2/99", True, False), ({1}, "1/99", False, False)],
)
def test_a_second_thread_takes_an_idle_processor(
    may_use: set[int], runnable: str, second: bool, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the steps of a policy that has the other processor: two, of which one is ours and one is busy."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: may_use)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(Path, "read_text", lambda path: f"0.50 0.40 0.30 {runnable} 4711\n")
    assert staging._has_second_processor(False) is second
    assert staging._has_second_processor(True) is idle


def test_where_nobody_tells_how_busy_the_box_is_one_thread_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a system without that file: no error, and no guess at a policy's cost."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    def refuse(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert not staging._has_second_processor(True) and staging._has_second_processor(False)


STAGE = """
import sys, threading
from wsync import memory, staging
from wsync.checkpoint import Checkpoint
from wsync.errors import CheckpointError

memory.alone = True
staging._LARGE = staging._WORTH_TWO = 1
staging._ROW = 1 << 23
staging._has_second_processor = lambda idle: True
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), over.set()), daemon=True).start()
while not over.is_set():
    try:
        with Checkpoint(sys.argv[1]) as checkpoint:
            layout = checkpoint.layout
            weights = bytearray(layout.nbytes)
            plan = checkpoint.plan(layout)
            print("begun", flush=True)
            checkpoint.read_into(memoryview(weights), plan)
    except CheckpointError as exc:
        print(type(exc).__name__, flush=True)
    else:
        print("torn" if weights.strip(weights[:4]) else "whole", flush=True)
"""


def test_a_file_that_is_cut_while_it_is_mapped_kills_nobody(tmp_path: Path, spawn: Spawn) -> None:
    """Guards against SIGBUS and torn weights: a trainer truncates and writes one file again and again, amid staging."""
    if not leases(tmp_path):
        pytest.skip("this file system grants no leases")
    path, policy = tmp_path / "a.safetensors", mlp(hidden=400_000)  # 18 MB
    contents = [write(path, policy, mark).read_bytes() for mark in (1.0, 2.0)]
    process = spawn("-c", STAGE, str(path), stdin=subprocess.PIPE)
    said = Lines(process)
    for turn in range(60):
        said.until("begun")
        with path.open("r+b") as file:
            file.truncate(len(contents[0]) // (1 + turn % 3) - 1)
            file.seek(0)
            file.write(contents[turn % 2])
    said.until("whole")
    assert process.stdin
    process.stdin.write("over\n")
    process.stdin.flush()
    assert process.wait(DEADLINE) == 0, process.stderr and process.stderr.read()
    assert (
        {"whole", "CheckpointChanged"}
        <= {*said.seen, *said.rest()}
        <= {*("begun", "whole", "CheckpointChanged", "BeingWritten", "IncompleteCheckpoint")}
    )
