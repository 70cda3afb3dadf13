"""Addresses of this process as things of their own: reserved, mapped over, and what is mapped there moved.

Python's ``mmap`` owns what it maps and would unmap it where it was; here it is the addresses that are owned.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource

from .memory import no_memory

SPAN = 2 << 20
"""Bytes that one page of a page table maps; between places that begin on a multiple of it such pages move whole."""
_FIXED = 0x10  # MAP_FIXED, asm-generic/mman-common.h; the module has no name for it
_MOVE = 1 | 2 | 4  # MREMAP_MAYMOVE, MREMAP_FIXED and MREMAP_DONTUNMAP: linux/mman.h

_libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock: another thread would run on in between
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_FAILED = ctypes.c_void_p(-1).value


class Stretch:
    """Consecutive addresses, this object's for as long as it lives: nothing else of the process comes to lie there.

    Attributes:
        start: the first, a multiple of ``SPAN``.

    Raises:
        OutOfSharedMemory: this process may not have so many.
    """

    def __init__(self, nbytes: int) -> None:
        self._length = nbytes + SPAN
        self._first = _map(None, self._length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self.start = -(-self._first // SPAN) * SPAN

    def __del__(self) -> None:
        if hasattr(self, "_first"):
            _libc.munmap(ctypes.c_void_p(self._first), ctypes.c_size_t(self._length))


def map_over(address: int, nbytes: int, fd: int) -> None:
    """Maps a file privately in place of what lies at addresses of a stretch; nothing may touch what is beyond its end.

    Raises:
        OutOfSharedMemory: this process may not have so much.
    """
    _map(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _FIXED, fd)


def move(source: int, target: int, nbytes: int) -> None:
    """Moves mapped pages in place of what lies at the target; the source shows the same file on, its pages yet to come.

    Raises:
        OSError: EINVAL where the system cannot (of files, before Linux 5.13); both are as they were.
        OutOfSharedMemory: this process may not have more mappings; both are as they were.
    """
    length = ctypes.c_size_t(nbytes)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _mapped():  # lowered since: what is at the target would be lost
        raise no_memory(nbytes, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), -1)
    if _libc.mremap(ctypes.c_void_p(source), length, length, _MOVE, ctypes.c_void_p(target)) == _FAILED:
        raise no_memory(nbytes, _error(), -1)


def _map(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    found = _libc.mmap(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), protection, flags, fd, ctypes.c_long(0))
    if found == _FAILED:
        raise no_memory(nbytes, _error(), fd)
    return int(found)


def _mapped() -> int:
    """Bytes of addresses that this process has; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[0]) * mmap.PAGESIZE
    except OSError:
        return 0


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
