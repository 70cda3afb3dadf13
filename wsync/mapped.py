"""A file's bytes where they are, in the page cache, for as long as nobody can change them.

A copy of many MiB from memory to memory goes past the processor's caches; read(2) does not, and takes twice as long: 64
MiB from the page cache took 12.4 ms by reads, and 6.9 mapped (2 cores, in a VM). But a mapped file that is cut kills
whoever reads on, and what was checked where it lies could be another thing afterwards. So a part is mapped under a read
lease (fcntl(2), F_SETLEASE) alone: whoever opens the file to write, or cuts it, waits until that one part is copied, or
two that are under way. That takes milliseconds, on a busy box some hundred; who will not wait (O_NONBLOCK) is refused.

The parts are of one mapping of the whole file: a thread that makes or ends a mapping waits until no other one fills the
process's page tables, and two with mappings of their own took 9.4 ms for 64 MiB, so 7.1.

All else is read: in a process that runs code of others, which may wait for its own lease, or that may not have so many
addresses; where no lease is given; and where one does not bind all who write, as on file systems that other machines
share, by themselves or by an NFS server here. What is left kills a publisher as kill -9 does: a file under an overlay
that is cut through it, a process that stands still for as long as a lease holds (45 s by default), or a disk that
fails, all within those milliseconds.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from mmap import PAGESIZE

from . import memory
from .memory import TMPFS, address_of, file_system, give_read_lease_back, populate, take_read_lease, unmap

_LOCAL = {0xEF53, 0x58465342, 0x9123683E, TMPFS, 0xF2F52010}  # ext, xfs, btrfs, tmpfs, f2fs: linux/magic.h
_EXPORTS = "/proc/fs/nfsd/exports"  # there where a server for NFS runs


class Mapped:
    """Parts of one open file; several threads may have one each."""

    def __init__(self, fd: int) -> None:
        self._fd, self._users, self._lock = fd, 0, threading.Lock()
        self._whole: mmap.mmap | None = None  # one mapping for all parts, there while there are any

    @contextmanager
    def part(self, start: int, nbytes: int) -> Iterator[memoryview | None]:
        """These bytes, good within the block; None where they can be had by reads alone."""
        if not self._begin():
            yield None
            return
        try:
            yield self._map(start, nbytes)
        finally:
            self._end(start, nbytes)

    def close(self) -> None:
        """Before the descriptor is: the mapping has one of its own, and would keep a lease that an interrupt left."""
        with self._lock:
            if self._users or self._whole:
                self._users, self._whole = 0, None
                give_read_lease_back(self._fd)

    def is_cached(self, start: int, nbytes: int) -> bool | None:
        """Whether memory has these bytes, by the last and the middle: the first mostly came with what is before it.

        None where the file system does not tell: it has them itself, as tmpfs, or fetches them over a network.
        """
        try:
            for at in (start + nbytes - 1, start + nbytes // 2):
                os.preadv(self._fd, [bytearray(1)], at, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    @cached_property
    def is_trusted(self) -> bool:
        """Whether a lease keeps out all who could write; where not, there are no parts."""
        if not memory.alone or file_system(self._fd) not in _LOCAL or os.path.exists(_EXPORTS):
            return False
        info = os.fstat(self._fd)
        return info.st_blocks * 512 >= info.st_size  # in a hole of tmpfs a look would take memory

    def _begin(self) -> bool:
        """Whether nobody can write until the end."""
        if not self.is_trusted:
            return False
        with self._lock:
            ours = take_read_lease(self._fd)
            self._users += ours
        return ours

    def _end(self, start: int, nbytes: int) -> None:
        try:
            if self._whole and self._users > 1:  # else all of it goes with the last
                first, last = -(-start // PAGESIZE) * PAGESIZE, (start + nbytes) // PAGESIZE * PAGESIZE
                unmap(address_of(self._whole) + first, max(last - first, 0))
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._whole = None
                    give_read_lease_back(self._fd)

    def _is_leased(self) -> bool:
        return fcntl.fcntl(self._fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK

    def _map(self, start: int, nbytes: int) -> memoryview | None:
        try:
            with self._lock:
                whole = self._whole = self._whole or mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)
        except (OSError, ValueError):  # this process may not have so much, or the file has nothing
            return None
        page = start // PAGESIZE * PAGESIZE
        # What cannot be had here would end us at its first use. And who waits to write, since this took a slow disk a
        # while or since another thread has a part, is not kept waiting by one part after another.
        if (
            start + nbytes > len(whole)
            or not populate(address_of(whole) + page, start + nbytes - page)
            or not self._is_leased()
        ):
            return None
        return memoryview(whole)[start : start + nbytes]
