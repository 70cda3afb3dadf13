"""Reads the bytes of local files into the weights.

A file in the page cache is read straight into the slot, with one ``preadv`` for each planned read, and the finite check
looks at the bytes while they are still in a CPU cache. Any other file is read past the page cache (O_DIRECT) by two
threads: one waits for the disk while the other copies and checks. File systems without direct reads get buffered reads.

A cached file is read by one thread for every four processors of this process, at least one and at most eight, so that
on two cores the policy keeps one of them.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ...errors import IncompleteCheckpoint, NoCheckpoint
from ...fitting import plan
from ...fitting.cast import Piece, split
from ...fitting.header import malformed
from ...fitting.plan import Read
from ...layout.finite import Region, all_finite
from ...system.memory import PAGE, being_written, closed_on_error, read_at, shut
from . import settling
from .parts import Parts, changed_while_read, open_untrusted, parts_of, unreadable
from .source import ByteSource, Job, scatter

_MOST_THREADS = 8
_DELETING = 1.0  # seconds that the deletion of a checkpoint's files may take
_TICK = 0.01
# The kernel copies with `rep movsb`, which takes AMD's cores two to four times as long where (target - source) mod 4096
# is one of these. Two copies, by way of a buffer at another distance, take half of that time.
_SLOW_DISTANCES = {8, 16, 24}
_ELSEWHERE = 1024


class Files(ByteSource):
    """The open files of a checkpoint on a disk."""

    def __init__(self, parts: Parts, settle: float) -> None:
        self.parts = parts
        self._fds: list[int] = []
        self._direct: dict[int, int] = {}  # descriptors that read past the page cache, by index of the file
        self._own = threading.local()
        try:
            for file in parts.every:
                self._fds.append(_open(file))
            self.infos = [os.fstat(fd) for fd in self._fds]
            if parts.is_several and not self._are_in_place(parts):
                raise changed_while_read(parts.path)
            settling.let_files_settle(parts, self._fds, settle)
            self.infos = [os.fstat(fd) for fd in self._fds]  # a writer may have finished since they were opened
        except BaseException:  # an interrupt must not leave descriptors open, either
            self.close()
            raise

    def close(self) -> None:
        while self._direct:
            shut(self._direct.popitem()[1])
        while self._fds:
            shut(self._fds.pop())

    def stands(self) -> bool:
        """See ``ByteSource.stands``.

        On tmpfs, writes through a mapping change no timestamp; such a writer is noticed only while its mapping exists.
        """
        for file, fd, info in zip(self.parts.every, self._fds, self.infos, strict=True):
            if _state(os.fstat(fd)) != _state(info) or being_written(fd) or _times_were_put_back(file, fd, info):
                return False
        return not self.parts.is_several or self._are_in_place_or_gone()

    def _are_in_place_or_gone(self) -> bool:
        """Whether all files are still where they were opened, or all are gone.

        If some were replaced, they do not belong with the others. If some are gone, a trainer may be deleting the whole
        checkpoint: the others are given ``_DELETING`` seconds to go as well.
        """
        until = time.monotonic() + _DELETING
        while True:
            there = [os.path.lexists(file) for file in self.parts.own]
            if not any(there):
                return True
            with suppress(FileNotFoundError, NoCheckpoint, IncompleteCheckpoint):
                return self._are_in_place(parts_of(self.parts.path, self.parts.wanted))
            if time.monotonic() > until:
                return False
            time.sleep(_TICK)

    def _are_in_place(self, parts: Parts) -> bool:
        """Whether these parts are the very files that were opened."""
        return parts == self.parts and all(
            _is_same(file.stat(), info) for file, info in zip(parts.every, self.infos, strict=True)
        )

    def read(self, file: int, nbytes: int, start: int) -> bytes:
        return read_at(self._fds[file], nbytes, start)

    def in_order(self, file: int, start: int, nbytes: int) -> Iterator[memoryview]:
        self._open_direct([Piece(file, start, nbytes, "U8", "U8", 0)] if nbytes else [])
        yield from self._pieces(file, start, nbytes)

    def staged(
        self, weights: memoryview, reads: Sequence[Read], regions: Sequence[Region]
    ) -> Generator[tuple[Read, bool], None, None]:
        def stage(read: Read) -> bool:
            slices = read.places(weights)  # P4 stage
            if read.file in self._direct or (read.slices[0][0] - read.start) % PAGE in _SLOW_DISTANCES:
                for data in self._pieces(read.file, read.start, read.nbytes):
                    scatter(data, slices)
            else:
                self._fill(read.file, slices, read.start, read.nbytes)
            return all_finite(weights, regions, read.slices)

        return self._each(reads, stage)

    def converted(
        self, listed: Sequence[Piece], work: Callable[[Piece, memoryview], bool]
    ) -> Generator[tuple[Piece, bool], None, None]:
        def convert(piece: Piece) -> bool:
            parts = split(piece, plan.READING.buffer)
            stored = self._pieces(piece.file, piece.start, piece.nbytes)
            results = [work(part, data) for part, data in zip(parts, stored, strict=True)]  # all parts are converted
            return all(results)

        return self._each(listed, convert)

    def _each(self, jobs: Sequence[Job], work: Callable[[Job], bool]) -> Generator[tuple[Job, bool], None, None]:
        """Yields each job with its result, in order."""
        cold = self._open_direct(jobs)
        threads = max(2 if cold else 1, min(len(os.sched_getaffinity(0)) // 4, _MOST_THREADS))
        if threads == 1 or sum(job.nbytes for job in jobs) < plan.READING.worth_threads:
            yield from ((job, work(job)) for job in jobs)
            return
        from concurrent.futures import ThreadPoolExecutor  # takes 8 ms, and a small checkpoint does not need it

        # When the caller stops early, jobs that have not begun are dropped and the others are waited for: afterwards
        # the slot is not ours to write to.
        with ThreadPoolExecutor(threads, "wsync-staging") as pool:
            yield from zip(jobs, pool.map(work, jobs), strict=True)

    def _open_direct(self, jobs: Sequence[Job]) -> bool:
        """Opens large files that are not in the page cache for direct reads; returns whether any file is read so."""
        for file, fd in enumerate(self._fds):
            mine = [job for job in jobs if job.file == file]
            if file in self._direct or sum(job.nbytes for job in mine) < plan.READING.large:
                continue
            if not all(_is_cached(fd, job.start + job.nbytes - 1) for job in (mine[len(mine) // 2], mine[-1])):
                try:
                    self._direct[file] = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                except OSError:  # this file system has no direct reads, or there is no /proc
                    pass
        return bool(self._direct)

    def _pieces(self, file: int, start: int, nbytes: int) -> Iterator[memoryview]:
        """Yields a range of a file in pieces that share one buffer of this thread: each is valid until the next."""
        most = plan.READING.buffer
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(mmap.mmap(-1, most + 2 * PAGE))
        buffer, direct = self._own.buffer, self._direct.get(file)
        for at in range(start, start + nbytes, most):
            size = min(most, start + nbytes - at)
            first, got = (at + _ELSEWHERE) % PAGE, 0
            if direct is not None:  # a direct read fills whole pages of memory from whole pages of the file
                first = at % PAGE
                pages = buffer[: -(-(first + size) // PAGE) * PAGE]
                got = min(max(_read_direct(direct, pages, at - first) - first, 0), size)
            self._fill(file, [buffer[first + got : first + size]], at + got, size - got)
            yield buffer[first : first + size]

    def _fill(self, file: int, buffers: list[memoryview], start: int, missing: int) -> None:
        """Fills buffers of ``missing`` bytes in total; one ``preadv`` may return fewer."""
        while missing:
            got = os.preadv(self._fds[file], buffers, start)
            if not got:
                raise changed_while_read(self.parts.path)
            start, missing = start + got, missing - got
            while got and missing:
                if got >= len(buffers[0]):
                    got -= len(buffers.pop(0))
                else:
                    buffers[0], got = buffers[0][got:], 0


def _open(path: Path) -> int:
    try:
        fd = open_untrusted(path)
    except FileNotFoundError as exc:
        raise NoCheckpoint(f"there is no {path}. Name a checkpoint that exists.") from exc
    except OSError as exc:
        if exc.errno == errno.ENXIO:  # a socket
            raise malformed(path, "it is not a regular file") from exc
        raise unreadable(path, exc) from exc
    with closed_on_error(fd):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise malformed(path, "it is not a regular file")
    return fd


def _state(info: os.stat_result) -> tuple[int, int]:
    """Size and modification time, which tell states of a file apart; some file systems do not keep inode numbers."""
    return info.st_size, info.st_mtime_ns


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether both are of one file, even if inode numbers are not kept: a replacement has a later change time."""
    return os.path.samestat(one, other) or (*_state(one), one.st_ctime_ns) == (*_state(other), other.st_ctime_ns)


def _times_were_put_back(file: Path, fd: int, info: os.stat_result) -> bool:
    """Whether a file may have been written to and its modification time restored; its change time cannot be set.

    Removing or renaming a file also updates its change time, so a file that is gone counts as unwritten.
    """
    now = os.fstat(fd)
    if now.st_ctime_ns == info.st_ctime_ns or now.st_nlink < info.st_nlink:
        return False
    with suppress(FileNotFoundError):
        return _is_same(file.stat(), now)
    return False


def _is_cached(fd: int, at: int) -> bool:
    """Whether the page cache has a byte of a file; True also if the file system does not say."""
    try:
        os.preadv(fd, [bytearray(1)], at, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _read_direct(fd: int, pages: memoryview, start: int) -> int:
    """Reads past the page cache; returns the number of bytes, 0 if the file system refuses."""
    try:
        return os.preadv(fd, [pages], start)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        return 0
