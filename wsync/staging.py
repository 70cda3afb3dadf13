"""How the bytes of files on this machine come into the weights: few large copies or reads, checked as they come.

What the page cache has is copied from there (mapped.py), and the finite check looks at it there: the copy that it has
just become is in no cache. What a disk has yet to give is read, ``CHUNK`` by ``CHUNK``. Told that all comes in order,
the kernel reads further ahead: a cold file comes at 1.4 times the speed, that of the disk.

A second thread takes half of a large file where a processor has nothing to do: 64 MiB, checked, then take 9 ms and not
15 (18 by reads). Where a policy has the other processor it would cost the policy's steps: their 99th percentile, 1.2
times as long beside one thread that stages without a pause, was 1.3 to 2.1 times as long beside two. What is converted
is shared by two in any case, the second one at a niceness of its own: that takes processors, not memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
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

    def staged(
        self, weights: memoryview, reads: Sequence[Read], regions: Sequence[Region]
    ) -> Iterator[tuple[Read, bool]]:
        """Each read, or several that are joined, once its bytes are there, with whether these regions are finite."""
        for fd in self._fds:
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            except OSError:  # advice, which a file system need not take
                pass
        rows = list(rows_of(reads, _ROW))
        can_map = self._can_map(rows)

        def work(read: Read) -> bool:
            if can_map and _is_large(read):
                with self._mapped[read.file].part(read.start, read.nbytes) as data:
                    if data is not None:
                        return _copied(weights, read, data, regions)
            slices = [weights[offset : offset + nbytes] for offset, nbytes in read.slices]
            self._fill(read.file, slices, read.start, read.nbytes)  # P4 stage
            return all_finite(weights, regions, read.slices)

        return _each(rows if can_map else reads, work, idle=True)

    def converted(
        self, listed: Sequence[Piece], work: Callable[[Piece, memoryview], bool]
    ) -> Iterator[tuple[Piece, bool]]:
        """Each piece with what comes of it; the work gets its parts as they are stored, good until it returns."""
        buffers, can_map = threading.local(), self._can_map(listed)

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

        return _each(listed, convert, idle=False)

    def _can_map(self, listed: Sequence[Read] | Sequence[Piece]) -> bool:
        """Whether that is worth a try; what is read anyway is read in pieces that stay in the third cache."""
        maps = [(self._mapped[part.file], part) for part in listed if part.nbytes >= _LARGE]
        return all(mapped.is_trusted and mapped.is_cached(part.start, part.nbytes) for mapped, part in maps)

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


def _each(jobs: Sequence[_J], work: Callable[[_J], bool], *, idle: bool) -> Iterator[tuple[_J, bool]]:
    """Each job with what comes of it, in their order; two threads share them where that pays.

    Args:
        idle: there has to be a processor that nobody uses; else the second thread takes what others leave.
    """
    if len(jobs) < 2 or sum(job.nbytes for job in jobs) < _WORTH_TWO or not _has_second_processor(idle):
        return ((job, work(job)) for job in jobs)
    from .ahead import side_by_side

    return side_by_side(jobs, work)


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
