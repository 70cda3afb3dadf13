"""How bytes of local files come into the weights: from the page cache or past it, by one thread or by several."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import raw, write
from policies import mlp
from processes import DEADLINE, Lines, Spawn
from safetensors.torch import load_file

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.checkpoints.files import local_files as staging
from wsync.errors import CheckpointChanged, CheckpointError, NonFiniteWeights
from wsync.fitting.fit import Fit
from wsync.layout import finite
from wsync.layout.layout import Layout, layout_of

HIDDEN = 500


def weights_of(path: Path, **options: Any) -> bytes:
    with Checkpoint(path) as checkpoint:
        weights = bytearray(checkpoint.layout.nbytes)
        checkpoint.read_into(memoryview(weights), checkpoint.plan(checkpoint.layout), **options)
        return bytes(weights)


def as_stored(path: Path) -> bytes:
    """What the official reader finds, in the order of the layout."""
    stored = load_file(path)
    return b"".join(stored[entry.name].numpy().tobytes() for entry in layout_of(mlp(hidden=HIDDEN)).tensors)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "a.safetensors", mlp(hidden=HIDDEN), 1.5)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch, read_by: Callable[..., None]) -> Callable[[int], None]:
    """Has a small file come in many parts, like a large one, by as many threads as so many processors allow."""

    def of(processors: int) -> None:
        read_by(chunk=800, large=1, worth_threads=1)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))

    return of


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch, in_parts: Callable[[int], None]) -> list[int]:
    """Has small files taken for large ones that are not in the page cache; collects the direct reads' offsets."""
    in_parts(1)
    monkeypatch.setattr(staging, "_is_cached", lambda fd, at: False)
    seen: list[int] = []
    real = staging._read_direct

    def note(fd: int, pages: memoryview, start: int) -> int:
        seen.append(start)
        return real(fd, pages, start)

    monkeypatch.setattr(staging, "_read_direct", note)
    return seen


# Past the page cache


@pytest.mark.parametrize("buffer", [8, 4096, 1 << 20])
def test_a_cold_file_is_read_to_the_bit(buffer: int, path: Path, cold: list[int], read_by: Callable[..., None]) -> None:
    """Guards the first and last page of each part, which hold bytes of others, and the end of the file."""
    read_by(buffer=buffer)
    assert weights_of(path) == as_stored(path)
    assert cold and all(at % mmap.PAGESIZE == 0 for at in cold)


def test_a_cold_file_is_cast(path: Path, cold: list[int]) -> None:
    """Guards what is converted on the way, which comes by the same reads."""
    layout = layout_of(mlp(hidden=HIDDEN).bfloat16())
    weights = bytearray(layout.nbytes)
    with Checkpoint(path) as checkpoint:
        checkpoint.read_into(memoryview(weights), checkpoint.plan(layout, Fit(cast=True)))
    stored = load_file(path)
    expected = [stored[entry.name].bfloat16().view(torch.uint8).numpy().tobytes() for entry in layout.tensors]
    assert cold and weights == b"".join(expected)


@pytest.mark.parametrize("refused", ["open", "read", "a part"])
def test_where_direct_reads_are_refused_it_is_read_all_the_same(
    refused: str, path: Path, cold: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards file systems without direct reads, those that refuse the first one, and reads that give less."""
    expected, opened, real = as_stored(path), os.open, os.preadv

    def open_refused(name: Any, flags: int, *more: Any, **also: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(name, flags, *more, **also)

    def read_refused(fd: int, pages: memoryview, start: int) -> int:
        cold.append(start)
        if refused == "read":
            return 0
        return real(fd, [pages[: len(pages) // 2 or 1]], start)

    if refused == "open":
        monkeypatch.setattr(os, "open", open_refused)
    else:
        monkeypatch.setattr(staging, "_read_direct", read_refused)
    assert weights_of(path) == expected
    assert bool(cold) == (refused != "open")


def test_a_direct_read_that_the_system_refuses_is_no_bytes(tmp_path: Path) -> None:
    """Guards the buffered read that follows EINVAL, here of an address that no direct read takes."""
    (tmp_path / "file").write_bytes(bytes(8192))
    fd = os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT)
    try:
        assert staging._read_direct(fd, memoryview(mmap.mmap(-1, 8192))[1:4097], 0) == 0
        with pytest.raises(OSError, match="Bad file descriptor"):
            staging._read_direct(-1, memoryview(bytearray(1)), 0)
    finally:
        os.close(fd)


def cached_pages(path: Path) -> int:
    """How many pages of a file the system has in memory; to look with a read would have it fetch more of them."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages)
    return sum(page & 1 for page in pages)


def test_what_the_disk_has_yet_to_give_is_read_past_the_page_cache(path: Path) -> None:
    """Counts the pages that the system has cached afterwards: of a large cold file none but the header's."""
    path = write(path, mlp(hidden=200_000), 1.5)  # 5.6 MB
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    pages = path.stat().st_size // mmap.PAGESIZE
    if cached_pages(path):
        pytest.skip("this file system keeps its pages")
    with Checkpoint(path) as checkpoint:
        weights, plan = bytearray(checkpoint.layout.nbytes), checkpoint.plan(checkpoint.layout)
        checkpoint.read_into(memoryview(weights), plan)
        assert vars(checkpoint.source)["_direct"]
    assert cached_pages(path) < pages // 4  # what was read ahead beside the header
    assert bytes(weights) == weights_of(path)


def test_a_file_in_the_page_cache_is_read_from_there(path: Path, in_parts: Callable[[int], None]) -> None:
    """Guards the warm file, which a direct read would fetch from the disk."""
    in_parts(1)
    path.read_bytes()
    with Checkpoint(path) as checkpoint:
        weights, plan = bytearray(checkpoint.layout.nbytes), checkpoint.plan(checkpoint.layout)
        checkpoint.read_into(memoryview(weights), plan)
        assert not vars(checkpoint.source)["_direct"]


# The copies that a processor makes slowly


@pytest.mark.parametrize("early", [8, 16, 24, 32])
def test_a_slow_distance_is_gone_round(early: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts reads by the distance of target and source: none is 8, 16 or 24 bytes, where AMD's cores copy slowly."""
    values = np.arange(100_000, dtype="<f4")
    header: dict[str, Any] = {"w": {"dtype": "F32", "shape": [100_000], "data_offsets": [0, 400_000]}}
    header["__metadata__"] = {"x": ""}
    shortest = raw(tmp_path / "a.safetensors", header).stat().st_size
    header["__metadata__"]["x"] = "x" * (-(shortest + early) % mmap.PAGESIZE)  # the data begins so early in a page
    path = raw(tmp_path / "a.safetensors", header, values.tobytes())
    weights = mmap.mmap(-1, 400_000)
    distances, real = [], os.preadv

    def note(fd: int, buffers: list[Any], at: int, flags: int = 0) -> int:
        if not flags:
            target = np.frombuffer(buffers[0], "u1").ctypes.data
            distances.append((target - at) % mmap.PAGESIZE)
        return real(fd, buffers, at, flags)

    with Checkpoint(path) as checkpoint:
        monkeypatch.setattr(os, "preadv", note)
        checkpoint.read_into(memoryview(weights), checkpoint.plan(checkpoint.layout))
    assert weights[:] == values.tobytes()
    assert distances and not set(distances) & {8, 16, 24}
    assert (32 in distances) == (early == 32)  # and nothing takes two copies that need not


# Threads


@pytest.mark.parametrize(("processors", "threads"), [(1, 1), (2, 1), (7, 1), (8, 2), (16, 4), (100, 8)])
def test_a_quarter_of_the_processors_stages(
    processors: int, threads: int, path: Path, in_parts: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the steps of a policy that has the other processors, and that all of that quarter has work."""
    in_parts(processors)
    expected, names, real = as_stored(path), set(), finite.all_finite
    all_there = threading.Barrier(threads)

    def check(*arguments: Any) -> bool:
        if threading.current_thread() not in names:
            names.add(threading.current_thread())
            all_there.wait(DEADLINE)
        return real(*arguments)

    monkeypatch.setattr(staging, "all_finite", check)
    assert weights_of(path) == expected
    assert len(names) == threads and (threads > 1 or names == {threading.current_thread()})


def test_a_small_checkpoint_takes_no_second_thread(
    path: Path, in_parts: Callable[[int], None], read_by: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the start of a push: threads cost more than a few MiB do."""
    in_parts(64)
    read_by(worth_threads=1 << 20)
    monkeypatch.setattr("concurrent.futures.ThreadPoolExecutor", None)
    assert weights_of(path) == as_stored(path)


@pytest.mark.parametrize("processors", [1, 8])
def test_what_is_wrong_in_any_part_is_found(
    processors: int, path: Path, in_parts: Callable[[int], None], tmp_path: Path
) -> None:
    """Guards the check of each part, and a file that is cut meanwhile, by one thread and by two."""
    in_parts(processors)
    with Checkpoint(path) as checkpoint:
        plan = checkpoint.plan(checkpoint.layout)
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(CheckpointChanged):
            checkpoint.read_into(memoryview(bytearray(plan.layout.nbytes)), plan)
    header = {"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}
    for bad in (0, 199, 200, 700, 999):
        values = np.arange(1000, dtype="<f4")
        values[bad] = np.nan
        with pytest.raises(NonFiniteWeights, match="1 of its tensors"):
            weights_of(raw(tmp_path / "b.safetensors", header, values.tobytes()))


@pytest.mark.parametrize("dtype", ["F32", "F64"], ids=["as stored", "cast"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error")])
def test_nothing_is_written_once_it_was_given_up(
    error: Any, dtype: str, path: Path, in_parts: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a slot that is given back after Ctrl-C or an error: no thread writes to it any more, nor goes on."""
    in_parts(16)
    started, given_up, real, shutdown = [], threading.Event(), os.preadv, ThreadPoolExecutor.shutdown

    def slow(fd: int, buffers: Any, at: int, flags: int = 0) -> int:
        if threading.current_thread() is not threading.main_thread():
            started.append(at)
            if len(started) > 1:  # the first one comes through, and with it the end
                given_up.wait(DEADLINE)
        return real(fd, buffers, at, flags)

    def end(self: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False) -> None:
        shutdown(self, wait=False, cancel_futures=cancel_futures)
        given_up.set()
        shutdown(self, wait=wait)

    def give_up(nbytes: int) -> None:
        raise error

    def keep(*given: Any) -> Any:  # as a tracer does
        kept.append(each(*given))
        return kept[-1]

    each, kept = staging.Files._each, list[Any]()
    monkeypatch.setattr(staging.Files, "_each", keep)
    monkeypatch.setattr(os, "preadv", slow)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", end)
    with Checkpoint(path) as checkpoint:
        layout = Layout.build({tensor.name: (dtype, tensor.shape) for tensor in checkpoint.tensors.values()}, {})
        plan = checkpoint.plan(layout, Fit(cast=True))
        weights = bytearray(plan.layout.nbytes)
        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            checkpoint.read_into(memoryview(weights), plan, progress=give_up)
        assert kept and (dtype == "F64" or len(started) < len(plan.reads))
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("wsync-staging")]


# Real files


STAGE = """
import sys, threading
from wsync.checkpoints.files import local_files as staging
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import CheckpointError

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


def test_a_file_that_is_cut_while_it_is_read_kills_nobody(tmp_path: Path, spawn: Spawn) -> None:
    """Guards against SIGBUS and torn weights: a trainer truncates and writes one file again and again, amid staging."""
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
        <= {*("begun", "whole", "CheckpointChanged", "OpenForWriting", "BeingWritten", "IncompleteCheckpoint")}
    )


def test_ctrl_c_amid_staging_ends_promptly(tmp_path: Path, spawn: Spawn) -> None:
    """Guards the operator's Ctrl-C: the process ends by it while bytes still come, and no thread holds it up."""
    path = write(tmp_path / "a.safetensors", mlp(hidden=2_000_000), 1.0)  # 90 MB
    more = "staging.os.sched_getaffinity = lambda pid: range(16)\n"
    process = spawn("-c", STAGE.replace("over =", f"{more}over =", 1), str(path), stdin=subprocess.PIPE)
    Lines(process).until("begun")
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE) in (-signal.SIGINT, 1, 130)
