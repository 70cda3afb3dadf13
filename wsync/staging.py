"""How the bytes of files on this machine come into the weights: few large copies or reads, checked as they come.

What the page cache has is copied from there (mapped.py), and the finite check looks at it there: the copy that it has
just become is in no cache. What a disk has yet to give is read, ``CHUNK`` by ``CHUNK``, and asked for long before: by
the kernel's own reading ahead, which waits for us and lets us wait in turn, a GiB came at 0.5 to 0.9 GB/s, so at 1.1
to 1.4, as fast as with four threads, or past the page cache.

A second thread takes half of a large file where a processor has nothing to do: 64 MiB, checked, then take 9 ms and not
15 (18 by reads). Where a policy has the other processor it would cost the policy's steps: their 99th percentile, 1.2
times as long beside one thread that stages without a pause, was 1.3 to 2.1 times as long beside two. What is converted
is shared by two in any case, the second one at a niceness of its own: that takes processors, not memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from .casting import Piece, split
from .errors import CheckpointChanged
from .finite import Region, all_finite
from .fitting import Read, rows_of
from .mapped import Mapped
from .memory import copy

_ROW = 32 << 20  # bytes of one copy at most; from 20 on, on many machines, the C library's copy goes past the caches
_LARGE = 4 << 20  # bytes; less is read as fast
_BUFFER = 1 << 20  # bytes that are converted at once; still in the second cache then
_WORTH_TWO = 16 << 20  # bytes, of which a second thread takes some
_AHEAD = 32 << 20  # bytes that a disk is asked for before they are read
_ASK = 1 << 18  # bytes: the kernel takes no more of one request than it reads ahead of reads that come in order
_J = TypeVar("_J", Read, Piece)


class Files:
    """The open files of a checkpoint.

    Args:
        fds: one descriptor for each; the caller closes them.
        changed: makes the error of a file that is not what it was.
    """

    def __init__(self, fds: Sequence[int], changed: Callable[[], CheckpointChanged]) -> None:
        self._fds, self._changed = fds, changed
        self._mapped = [Mapped(fd) for fd in fds]

    def close(self) -> None:
        """Before the descriptors are."""
        for mapped in self._mapped:
            mapped.close()

    def staged(
        self, weights: memoryview, reads: Sequence[Read], regions: Sequence[Region]
    ) -> Iterator[tuple[Read, bool]]:
        """Each read, or several that are joined, once its bytes are there, with whether these regions are finite."""
        rows = list(rows_of(reads, _ROW))
        can_map, ask = self._how(rows)

        def work(read: Read) -> bool:
            if can_map and _is_large(read):
                with self._mapped[read.file].part(read.start, read.nbytes) as data:
                    if data is not None:
                        return _copied(weights, read, data, regions)
            slices = [weights[offset : offset + nbytes] for offset, nbytes in read.slices]
            self._fill(read.file, slices, read.start, read.nbytes)  # P4 stage
            return all_finite(weights, regions, read.slices)

        return self._each(rows if can_map else reads, work, idle=True, ask=ask)

    def converted(
        self, listed: Sequence[Piece], work: Callable[[Piece, memoryview], bool]
    ) -> Iterator[tuple[Piece, bool]]:
        """Each piece with what comes of it; the work gets its parts as they are stored, good until it returns."""
        buffers, (can_map, ask) = threading.local(), self._how(listed)

        def convert(piece: Piece) -> bool:
            if can_map and piece.nbytes >= _LARGE:
                with self._mapped[piece.file].part(piece.start, piece.nbytes) as data:
                    if data is not None:
                        there = data
                        return convert_parts(piece, lambda part: there[part.start - piece.start :][: part.nbytes])
            return convert_parts(piece, read)

        def read(part: Piece) -> memoryview:
            if not hasattr(buffers, "own"):
                buffers.own = memoryview(bytearray(_BUFFER))
            data: memoryview = buffers.own[: part.nbytes]
            self._fill(part.file, [data], part.start, part.nbytes)
            return data

        def convert_parts(piece: Piece, stored: Callable[[Piece], memoryview]) -> bool:
            good = [work(part, stored(part)) for part in split(piece, _BUFFER)]  # each, whatever the others are
            return all(good)

        return self._each(listed, convert, idle=False, ask=ask)

    def _how(self, listed: Sequence[Read] | Sequence[Piece]) -> tuple[bool, bool]:
        """Whether mapping is worth a try, and, where it is not, whether to ask for what may not be in memory yet.

        What is read anyway is read in pieces that stay in the third cache.
        """
        large = [(self._mapped[part.file], part) for part in listed if part.nbytes >= _LARGE]
        unknown = False
        for mapped, part in large:
            look = mapped.is_cached(part.start, part.nbytes)
            if look is False:
                return False, True
            unknown |= look is None
        can_map = all(mapped.is_trusted for mapped, _ in large)
        return can_map, unknown and not can_map

    def _each(
        self, jobs: Sequence[_J], work: Callable[[_J], bool], *, idle: bool, ask: bool
    ) -> Iterator[tuple[_J, bool]]:
        """Each job with what comes of it, in their order; two threads share them where that pays.

        Args:
            idle: there has to be a processor that nobody uses; else the second thread takes what others leave.
            ask: tell the system of those that come next.
        """
        if ask:
            work = self._asking(jobs, work)
        if len(jobs) < 2 or sum(job.nbytes for job in jobs) < _WORTH_TWO or not _has_second_processor(idle):
            return ((job, work(job)) for job in jobs)
        from .helper import side_by_side

        return side_by_side(jobs, work)

    def _asking(self, jobs: Iterable[_J], work: Callable[[_J], bool]) -> Callable[[_J], bool]:
        """The same work, done while the disk is at work on the jobs that come next."""
        for fd in self._fds:
            _advise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        coming, room, lock = iter(jobs), _AHEAD, threading.Lock()

        def ask_and_work(job: _J) -> bool:
            nonlocal room
            with lock:
                room += job.nbytes
                while room > 0 and (later := next(coming, None)):
                    room -= later.nbytes
                    end = later.start + later.nbytes
                    for start in range(later.start, end, _ASK):
                        _advise(self._fds[later.file], start, min(_ASK, end - start), os.POSIX_FADV_WILLNEED)
            return work(job)

        return ask_and_work

    def _fill(self, file: int, buffers: list[memoryview], start: int, missing: int) -> None:
        """Reads into buffers of so many bytes together; a single call may give less."""
        while missing:
            got = os.preadv(self._fds[file], buffers, start)
            if not got:
                raise self._changed()
            start, missing = start + got, missing - got
            while got and missing:
                if got >= len(buffers[0]):
                    got -= len(buffers.pop(0))
                else:
                    buffers[0], got = buffers[0][got:], 0


def _is_large(read: Read) -> bool:
    return read.nbytes >= _LARGE and len(read.slices) == 1


def _copied(weights: memoryview, read: Read, data: memoryview, regions: Sequence[Region]) -> bool:
    """Copies a row, and looks whether it is finite: where it was, for numpy would copy floats that lie askew."""
    ((offset, nbytes),) = read.slices
    copy(weights[offset : offset + nbytes], data)  # P4 stage
    if (read.start - offset) % 8:
        return all_finite(weights, regions, read.slices)
    return all_finite(data, regions, read.slices, offset)


def _advise(fd: int, start: int, nbytes: int, advice: int) -> None:
    try:
        os.posix_fadvise(fd, start, nbytes, advice)
    except OSError:  # which a file system need not take
        pass


def _has_second_processor(idle: bool) -> bool:
    """Whether this process may use more than one; if so wished, whether the machine has one that is idle right now."""
    if len(os.sched_getaffinity(0)) < 2:
        return False
    if not idle:
        return True
    try:
        runnable = Path("/proc/loadavg").read_text().split()[3].partition("/")[0]  # proc(5)
    except OSError:
        return False
    return int(runnable) < (os.cpu_count() or 1)
