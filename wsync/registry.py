"""Who reads a segment: one small file a reader in the segment's ``readers/``, locked while the reader lives.

The record is for people (``wsync status``, the message that names who holds a slot back); no decision hangs on it.
That a reader lives is said by the lock on its file alone: pids mean nothing across containers. A file whose lock is
free was left by a dead reader and is removed by whoever looks and may.

In a shared segment others write these files. Nothing in them is believed: what is not a small regular file with the
fields that we know is passed over, and what they say is made harmless to print. And a reader that finds no room for a
record goes on without one.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .access import open_dir
from .errors import SegmentUnsafe, printable
from .memory import kept, shut, try_lock

_SIZE = 1024  # bytes of a record, padded, so that one write replaces it whole
_MOST = 2000  # records that one look takes in
_END_OF_TIME = 253_402_300_800.0  # the year 10000, which no calendar here can print


class ReaderRecord(NamedTuple):
    """What a reader says of itself.

    Attributes:
        pid: its process, in its own pid namespace.
        process: its program's name.
        version: the version that it acts on; 0 before its first.
        since: when it took that version, seconds since the epoch.
        mode: ``"swap"`` or ``"copy"``.
        slots: the slots that it leases.
        oldest: when it took the oldest of these leases, seconds since the epoch; 0 where it has none.
    """

    pid: int
    process: str
    version: int
    since: float
    mode: str
    slots: tuple[int, ...]
    oldest: float = 0.0

    @classmethod
    def parse(cls, text: bytes) -> ReaderRecord:
        """Raises ValueError, TypeError, KeyError or RecursionError where it is no record."""
        data: Any = json.loads(text)
        pid, process, version, since, mode = (data[key] for key in ("pid", "process", "version", "since", "mode"))
        slots = data["slots"]
        if not isinstance(process, str) or mode not in ("swap", "copy") or not isinstance(slots, list):
            raise TypeError("a field is of another kind")
        bounded = ((pid, 1 << 32), (version, 1 << 56), *((slot, 64) for slot in slots))
        if not all(type(number) is int and 0 <= number < most for number, most in bounded):
            raise ValueError("a number is beyond its bounds")
        oldest = data.get("oldest", 0)
        if not all(type(moment) in (int, float) and 0 <= moment < _END_OF_TIME for moment in (since, oldest)):
            raise ValueError("a time is beyond its bounds")
        return cls(pid, printable(process)[:64], version, float(since), mode, tuple(slots), float(oldest))


class Registration:
    """A reader's own record, there as long as this object is open, where one can be made."""

    def __init__(self, segment: Path, mode: str) -> None:
        self._always = json.dumps({"pid": os.getpid(), "process": _process_name(), "mode": mode}).rstrip("}")
        self._dir = self._fd = -1
        self._name = ""
        try:
            self._dir = open_readers(segment)
            self._fd = self._make()
            self._write(0, ())
        except (OSError, SegmentUnsafe) as exc:
            import logging

            logging.getLogger("wsync").warning(
                "this reader of %r is not listed, and reads all the same: %s", segment.name, exc
            )
            self.close()

    def update(self, version: int, slots: tuple[int, ...], oldest: float = 0.0) -> None:
        if self._fd >= 0:
            self._write(version, slots, oldest)

    def close(self, *, unlink: bool = True) -> None:
        if self._fd >= 0 and unlink:
            try:
                os.unlink(self._name, dir_fd=self._dir)
            except OSError:  # it is gone, or no longer ours to remove; whoever looks sees that it is free
                pass
        for fd in (self._fd, self._dir):
            if fd >= 0:
                shut(fd)
        self._fd = self._dir = -1

    def _make(self) -> int:
        for _ in range(100):
            self._name = f"{os.getpid()}-{os.urandom(8).hex()}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(self._name, flags, 0o600, dir_fd=self._dir)
            with kept(fd):
                os.fchmod(fd, 0o600 | os.fstat(self._dir).st_mode & 0o044)
                if try_lock(fd) and os.fstat(fd).st_nlink:
                    return fd
            shut(fd)  # somebody who looked took the new file for a dead reader's, and removes it
        raise SegmentUnsafe("its records are locked by somebody as soon as they are made")

    def _write(self, version: int, slots: tuple[int, ...], oldest: float = 0.0) -> None:
        # JSON by hand, for a policy's step pays for it.
        now = f'"version": {version}, "since": {time.time()}, "slots": {[*slots]}, "oldest": {oldest}'
        os.pwrite(self._fd, f"{self._always}, {now}}}".encode().ljust(_SIZE), 0)


def open_readers(segment: Path) -> int:
    """The directory of a segment's records, whose owner must be the segment's.

    Raises:
        FileNotFoundError: there is none.
        SegmentUnsafe: it is something else, or others may do more in it than add files of their own.
    """
    return open_dir(segment / "readers", os.stat(segment, follow_symlinks=False).st_uid, sticky=True)


def readers(segment: Path) -> Iterator[ReaderRecord]:
    """The living readers of a segment; the files of dead ones are removed on the way."""
    try:
        directory = open_readers(segment)
    except FileNotFoundError:
        return
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in itertools.islice(entries, _MOST))
        for name in names:
            record = _look(name, directory)
            if record is not None:
                yield record
    finally:
        shut(directory)


def _look(name: str, directory: int) -> ReaderRecord | None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:  # gone, a link, a socket, or closed to us: no record
        return None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:  # what has another name is not only a record
            return None
        if try_lock(fd):
            os.unlink(name, dir_fd=directory)
            return None
        for _ in range(8):  # a record that is just being replaced may not parse
            try:
                return ReaderRecord.parse(os.pread(fd, _SIZE, 0))
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
        return None
    except OSError:  # gone, or another's to remove
        return None
    finally:
        shut(fd)


def _process_name() -> str:
    return Path(sys.argv[0] or sys.executable).name[:64] if sys.argv else "python"
