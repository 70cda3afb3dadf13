"""The system calls under a segment: reserved and mapped files, locks, and sleeping on a word of memory.

Each lock is a ``flock`` on a descriptor of its own: it ends with the process, whatever ends that, and works across pid
namespaces.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import operator
import os
import platform
import signal
import struct
import sys
import time
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import starmap
from pathlib import Path

from ..errors import OutOfSharedMemory, UsageError

PAGE = 4096

_FUTEX = {"x86_64": 202, "ppc64le": 221}.get(platform.machine(), 98)  # 98 on all newer machines
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_F_SETSIG = 10  # asm-generic/fcntl.h; the module has no name for it before Python 3.13
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE, _MADV_DONTNEED_LOCKED = 22, 23, 24  # asm-generic/mman-common.h
_PIECE = 4 << 20  # bytes that are copied at a time


def runtime_dir(path: str | os.PathLike[str] | None = None) -> Path:
    """Where segments live: ``path``, else ``WSYNC_RUNTIME_DIR``, else ``/dev/shm/wsync-<uid>``.

    Raises:
        UsageError: this is not Linux, or not a little-endian machine.
    """
    if sys.platform != "linux" or sys.byteorder != "little":
        raise UsageError(
            f"wsync needs Linux on a little-endian machine (flock, futex, tmpfs); this is {sys.platform}, "
            f"{sys.byteorder}-endian. Run it on the Linux machine that runs the policy."
        )
    chosen = path or os.environ.get("WSYNC_RUNTIME_DIR") or default_runtime_dir()
    if not isinstance(chosen, str | os.PathLike) or "\0" in os.fspath(chosen):
        raise UsageError(f"{chosen!r} is not a path. Name a directory with --runtime-dir.")
    return Path(chosen).absolute()


def default_runtime_dir() -> Path:
    return Path(f"/dev/shm/wsync-{os.getuid()}")


def file_system(path: Path) -> str:
    """The kind of the file system that holds a path, such as ``tmpfs``; empty if the system does not say."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as table:
        for line in table:
            mount, _, source = line.partition(" - ")
            if mount.split()[2] == wanted:
                return source.split()[0]
    return ""


def reserve(fd: int, size: int) -> None:
    """Reserves ``size`` bytes for a file; writing to a sparse one would raise SIGBUS when memory runs out."""
    os.posix_fallocate(fd, 0, size)


def shut(fd: int) -> None:
    """Closes a descriptor. If close(2) fails, it is closed all the same, and no write of ours was pending."""
    try:
        os.close(fd)
    except OSError:
        pass


@contextmanager
def closed_on_error(fd: int) -> Iterator[None]:
    """Closes a descriptor if the block fails."""
    try:
        yield
    except BaseException:
        shut(fd)
        raise


def read_at(fd: int, nbytes: int, offset: int) -> bytes:
    """Reads ``nbytes``, or fewer at the end of the file; a single pread(2) may return less, and does above 2 GiB."""
    data = b""
    while len(data) < nbytes and (more := os.pread(fd, nbytes - len(data), offset + len(data))):
        data += more
    return data


def write_at(fd: int, data: bytes, offset: int) -> None:
    """Writes all of these bytes into a file."""
    left = memoryview(data)
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written


@contextmanager
def mapping(size: int, fd: int = -1) -> Iterator[None]:
    """Converts a failure to map memory in the block into an error that says what to do.

    Args:
        size: bytes to map, for the message.
        fd: the mapped file, for the message; -1 if there is none.

    Raises:
        OutOfSharedMemory: this process may not map that much.
    """
    try:
        yield
    except OSError as exc:
        if exc.errno != errno.ENOMEM:
            raise
        what = f" of {os.path.realpath(f'/proc/self/fd/{fd}')}" if fd >= 0 else ""
        raise OutOfSharedMemory(
            f"this process cannot map {size:,} bytes{what}: its own memory is limited. Raise the limit (`ulimit -v`; "
            "LimitAS= of its systemd unit), or that of mappings, if it has tens of thousands (`sysctl "
            "vm.max_map_count`)."
        ) from exc


def no_room(exc: OSError, where: Path, wanted: int = PAGE, files: int = 1) -> OutOfSharedMemory | None:
    """The error for files that there was no room for; None if ``exc`` has another reason.

    Args:
        where: the directory; files that were made there before the failure are removed by now.
        wanted: bytes that all files take.
        files: number of all files and directories.
    """
    if exc.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
        return None
    info = os.statvfs(next(path for path in (where, *where.parents) if path.exists()))
    inodes = f" (inodes: {files} wanted, {info.f_favail:,} of {info.f_files:,} free)" if info.f_files else ""
    return OutOfSharedMemory(
        f"{where} has no room ({exc.strerror}): the segment takes {wanted:,} bytes, {info.f_bavail * info.f_frsize:,} "
        f"are free{inodes}. Make it larger (docker run "
        "--shm-size, or a memory-backed emptyDir with a sizeLimit; nr_inodes= of its mount), use fewer --slots, raise "
        "what this process may write (`ulimit -f`; LimitFSIZE= of its systemd unit), or name another place with "
        "--runtime-dir."
    )


def spare_memory() -> int:
    """Bytes that this process can take, by what the machine and each of its cgroups have left.

    A cgroup at its limit does not refuse memory: the kernel ends one of its processes (cgroup-v2.rst, "memory.max").
    Files that it caches count as spare.
    """
    with open("/proc/meminfo") as table:
        spare = [int(line.split()[1]) * 1024 for line in table if line.startswith("MemAvailable:")]
    with open("/proc/self/cgroup") as table:
        own = [line.strip().removeprefix("0::/") for line in table if line.startswith("0::/")]
    places = [Path("/sys/fs/cgroup", name) for name in own]
    for group in [group for place in places for group in (place, *place.parents)]:
        try:
            limit, used = ((group / f"memory.{what}").read_text().strip() for what in ("max", "current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:  # the root has no limit, and other hierarchies lack these files
            continue
        if limit != "max":
            spare.append(int(limit) - int(used) + int(stat["inactive_file"]) + int(stat["active_file"]))
    return min(spare)


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Takes a flock without waiting; False if another open file description holds it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def being_written(fd: int) -> bool | None:
    """Whether some process has this file open for writing; None if the system does not say.

    The kernel grants a read lease on the file only if no process has it open for writing. A writer that opens the file
    meanwhile waits until the lease is given back, which is at once: no other thread runs Python between the two calls.
    Otherwise a thread that opens the file while it holds the interpreter's lock, as safetensors' ``save_file`` did,
    could wait for ever for this process.
    """
    import ctypes

    try:  # a broken lease sends SIGIO, which would end this process; SIGURG is ignored by default
        fcntl.fcntl(fd, _F_SETSIG, signal.SIGURG)
    except OSError:
        return None
    take, give = ctypes.PyDLL(None, use_errno=True), ctypes.PyDLL(None)  # both keep Python's lock; one keeps errno
    calls = [(take.fcntl, fd, fcntl.F_SETLEASE, fcntl.F_RDLCK), (give.fcntl, fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)]
    taken, _ = starmap(operator.call, calls)  # no Python code runs between the two calls
    return False if not taken else True if ctypes.get_errno() == errno.EAGAIN else None


def populate(mapped: mmap.mmap) -> None:
    """Maps the pages of a private or read-only mapping, so that the first use of each costs no fault."""
    try:
        mapped.madvise(_MADV_POPULATE_READ)
    except OSError:  # before Linux 5.14
        pass


def renew(mapped: mmap.mmap) -> bool:
    """Drops what this process wrote into a private mapping, so that it shows the file again; True if it had written.

    Looks at the page tables (/proc/self/pagemap), which takes a hundredth of the time that reading the memory takes.
    If they cannot be read, drops the pages anyway, and returns False.
    """
    written = has_own_pages(mapped)
    if written is False:
        return False
    try:
        mapped.madvise(mmap.MADV_DONTNEED)
    except OSError:  # the process keeps all its memory from being swapped out (mlockall(2))
        mapped.madvise(_MADV_DONTNEED_LOCKED)
    return bool(written)


def take_over(mapped: mmap.mmap) -> bool:
    """Gives this process its own copy of every page of a private mapping; False if the system cannot do that.

    Copies the memory piece by piece without the interpreter's lock, so that other threads go on.
    """
    import ctypes

    libc, start = ctypes.CDLL(None), address_of(mapped)
    pieces = ((at, min(_PIECE, len(mapped) - at)) for at in range(0, len(mapped), _PIECE))
    return not any(
        libc.madvise(ctypes.c_void_p(start + at), ctypes.c_size_t(size), _MADV_POPULATE_WRITE) for at, size in pieces
    )


def trim() -> None:
    """Returns freed memory to the system; glibc would keep it, some of it for ever (malloc_trim(3))."""
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)


def has_own_pages(mapped: mmap.mmap) -> bool | None:
    """Whether any page of a private mapping is a copy of the file's; None if the system does not say."""
    import numpy as np

    pages = -(-len(mapped) // PAGE)
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            table = read_at(fd, pages * 8, address_of(mapped) // PAGE * 8)
        finally:
            os.close(fd)
    except OSError:
        return None
    flags = np.frombuffer(table, np.uint8)[7::8]  # of each page: 0x80 is present, 0x40 is swapped, 0x20 is the file's
    return bool(((flags & 0xC0 != 0) & (flags & 0x20 == 0)).any())


def address_of(mapped: mmap.mmap | memoryview) -> int:
    """The address of a mapping; ctypes refuses a read-only one."""
    import ctypes

    view = ctypes.py_object(mapped)
    buffer = (ctypes.c_ssize_t * 11)()  # a Py_buffer: its first field is the address
    ctypes.pythonapi.PyObject_GetBuffer(view, ctypes.byref(buffer), 0)
    try:
        return int(buffer[0])
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


def wake(address: int) -> None:
    """Wakes whoever sleeps on the 32 bits at ``address``, in any process that maps them."""
    _futex(address, _FUTEX_WAKE, 0x7FFFFFFF, None)


def sleep_on(address: int, expected: int, seconds: float, nap: float = 0.25) -> None:
    """Sleeps until ``wake`` is called for this address, its 32 bits are not ``expected``, or the time is up.

    May return early, and does after ``nap`` seconds, because a publisher may end before it wakes anybody; the caller
    must look again. See futex(2).
    """
    seconds = min(max(seconds, 0.0), nap)
    _futex(address, _FUTEX_WAIT, expected & 0xFFFFFFFF, struct.pack("@ll", 0, int(seconds * 1e9)))


def deadline_of(timeout: float | None) -> float | None:
    """The ``time.monotonic()`` at which a timeout in seconds ends; None for never.

    Raises:
        UsageError: the timeout is not a number.
    """
    try:
        if timeout is None or not math.isnan(timeout):
            return None if timeout is None else time.monotonic() + timeout
    except (TypeError, OverflowError):  # not a number, or one that no float holds
        pass
    raise UsageError(f"timeout={timeout!r} is not a number of seconds. Give one, or None to wait for ever.")


def _futex(address: int, operation: int, value: int, timeout: bytes | None) -> None:
    import ctypes  # 5 ms, and needed only to wait or wake

    word, number = ctypes.c_void_p(address), ctypes.c_long(_FUTEX)
    ctypes.CDLL(None).syscall(number, word, operation, ctypes.c_uint32(value), timeout)


def permissions(addresses: Sequence[int]) -> list[str]:
    """How each address is mapped, as /proc/self/maps says: ``rw-p``, or ``rw-s`` if shared; empty if unknown."""
    starts, maps = [], []
    try:
        with open("/proc/self/maps", "rb") as file:
            for line in file:
                where, how, _ = line.split(maxsplit=2)
                start, end = (int(number, 16) for number in where.split(b"-"))
                starts.append(start)
                maps.append((end, how.decode()))
    except OSError:
        pass
    found = (maps[bisect(starts, address) - 1] if starts else (0, "") for address in addresses)
    return [how if address < end else "" for address, (end, how) in zip(addresses, found, strict=True)]
