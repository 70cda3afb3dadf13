"""The system calls under a segment: private directories, reserved files, locks, and sleeping on a word of memory.

Everything is opened relative to a directory's descriptor and never through a symbolic link, so that nothing
prepared at our paths can lead elsewhere. Locks are ``flock`` on a descriptor of their own: they end with the process,
whatever ends it, and work across pid namespaces.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import signal
import stat
import struct
import sys
import time
from pathlib import Path

from .errors import OutOfSharedMemory, SegmentUnsafe, UsageError

PAGE = 4096

_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221}.get(platform.machine())
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_F_SETSIG = 10  # asm-generic/fcntl.h; the module has no name for it before Python 3.13
_NAP = 0.25  # seconds between looks where a wake-up may have been lost with its publisher


def runtime_dir(path: str | os.PathLike[str] | None = None) -> Path:
    """Where segments live: ``path``, else ``WSYNC_RUNTIME_DIR``, else ``/dev/shm/wsync-<uid>``.

    Raises:
        UsageError: this is not Linux, or not a little-endian machine.
    """
    if sys.platform != "linux" or sys.byteorder != "little":
        raise UsageError(
            f"wsync needs Linux on a little-endian machine (flock, futex, tmpfs); this is {sys.platform}, "
            f"{sys.byteorder}-endian. Run it on the Linux box that runs the policy."
        )
    chosen = path or os.environ.get("WSYNC_RUNTIME_DIR") or f"/dev/shm/wsync-{os.getuid()}"
    return Path(chosen).absolute()


def open_private_dir(path: Path, *, create: bool = False) -> int:
    """Opens a directory that only its owner, who is this user, can change.

    Raises:
        FileNotFoundError: there is none, and ``create`` is False.
        SegmentUnsafe: a symbolic link, another user's, writable by others, or no directory.
    """
    if create:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except OSError as exc:
            raise SegmentUnsafe(
                f"{path} cannot be made ({exc.strerror}). Name another place with --runtime-dir."
            ) from exc
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise SegmentUnsafe(
            f"{path} is not a directory of its own ({os.strerror(exc.errno or 0)}). "
            "Remove what lies there, or name another with --runtime-dir."
        ) from exc
    info = os.fstat(fd)
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o022:
        os.close(fd)
        raise SegmentUnsafe(
            f"{path} belongs to uid {info.st_uid} with mode {stat.S_IMODE(info.st_mode):04o}; wsync needs a "
            f"directory of uid {os.geteuid()} that nobody else may write. Remove it, or name another with "
            "--runtime-dir."
        )
    return fd


def open_file(name: str, flags: int, dir_fd: int, mode: int = 0o600) -> int:
    """Opens a regular file of a private directory, never through a link."""
    try:
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode, dir_fd=dir_fd)
    except OSError as exc:
        if exc.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise SegmentUnsafe(
            f"{name} in a segment is not a regular file ({exc.strerror}). Remove the segment with wsync rm."
        ) from exc
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
        os.close(fd)
        raise SegmentUnsafe(
            f"{name} in a segment is not a regular file of uid {os.geteuid()}. Remove the segment with wsync rm."
        )
    return fd


def reserve(fd: int, size: int, *, wanted: int, free: int, where: Path) -> None:
    """Gives a file ``size`` bytes that are really there: a sparse one would end in SIGBUS when memory runs out.

    Raises:
        OutOfSharedMemory: they are not; the message tells the bytes ``wanted`` in all, and those ``free`` before.
    """
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
            raise
        raise out_of_memory(wanted, free, where) from exc


def free_bytes(where: Path) -> int:
    """Bytes that a file system still has for this user."""
    info = os.statvfs(where)
    return info.f_bavail * info.f_frsize


def out_of_memory(wanted: int, free: int, where: Path) -> OutOfSharedMemory:
    return OutOfSharedMemory(
        f"{where} has no room: the segment takes {wanted:,} bytes, {free:,} are free. Make it larger (docker run "
        "--shm-size, or a memory-backed emptyDir with a sizeLimit), use fewer --slots, or name another place with "
        "--runtime-dir."
    )


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Takes a flock without waiting; False where another description holds it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def being_written(fd: int) -> bool | None:
    """Whether some process has this file open for writing; None where the system does not tell.

    Asks for a read lease (fcntl(2), F_SETLEASE), which is only given on a file that nobody writes, and only to the
    file's owner or root. A writer that opens it in that moment waits until the lease is given back, in the next line.
    """
    try:
        fcntl.fcntl(fd, _F_SETSIG, signal.SIGURG)  # what a broken lease sends, ignored by default; SIGIO would end us
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError:
        return None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def wake(address: int) -> None:
    """Wakes whoever sleeps on the 32 bits at ``address``, in any process that maps them."""
    if _FUTEX is not None:
        _syscall(_FUTEX, address, _FUTEX_WAKE, 0x7FFFFFFF, None)


def sleep_on(address: int, expected: int, seconds: float) -> None:
    """Sleeps until the 32 bits at ``address`` are woken, or are not ``expected``, or the time is up.

    May return early: the caller looks again. See futex(2).
    """
    seconds = min(max(seconds, 0.0), _NAP)
    if _FUTEX is None:
        time.sleep(min(seconds, 0.005))
        return
    whole = int(seconds)
    timeout = struct.pack("@ll", whole, int((seconds - whole) * 1e9))
    _syscall(_FUTEX, address, _FUTEX_WAIT, expected & 0xFFFFFFFF, timeout)


def _syscall(number: int, address: int, operation: int, value: int, timeout: bytes | None) -> None:
    import ctypes  # 5 ms, and only needed by those who wait or wake

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_int(operation),
        ctypes.c_uint32(value),
        timeout,
        None,
        ctypes.c_int(0),
    )
