"""Who reads a segment: each reader has a small file in the segment's ``readers/``, locked while it lives.

The record is for people (``wsync status``, the message that names the readers of a leased slot), and says which
versions are in use; the protocol does not depend on it. Only the lock on its file says that a reader lives: pids mean
nothing across containers. A file with a free lock was left by a dead reader; whoever finds it removes it, if permitted.

In a shared segment other users write these files, so nothing in them is trusted: anything but a small regular file with
the known fields is ignored, and its text is made harmless to print. A reader that cannot make a record goes on without.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import SegmentUnsafe, parsed, printable
from ..system.access import opened
from ..system.memory import closed_on_error, shut, try_lock
from .publication import END_OF_TIME
from .segment_files import MAX_SLOTS, open_readers

_SIZE = 1024  # bytes of a record, padded, so that one write replaces all of it
_MOST = 2000  # most records that are read at a time


class ReaderRecord(NamedTuple):
    """What a reader says about itself.

    Attributes:
        pid: its process, in its own pid namespace.
        process: its program's name, at most 64 characters.
        version: the version that it uses; 0 before its first.
        since: when it took that version, seconds since the epoch.
        mode: ``"swap"`` or ``"copy"``.
        slots: the slots that it leases.
        oldest: when it took the oldest of these leases, seconds since the epoch; 0 if it leases none.
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
        """Raises ValueError if it is not a record."""
        with parsed():
            said = cls(**json.loads(text))
            if not isinstance(said.process, str) or said.mode not in ("swap", "copy"):
                raise TypeError("a field is of another kind")
            bounded = ((said.pid, 1 << 32), (said.version, 1 << 56), *((slot, MAX_SLOTS) for slot in said.slots))
            if not all(type(number) is int and 0 <= number < most for number, most in bounded):
                raise ValueError("a number is beyond its bounds")
            times = said.since, said.oldest
            if not all(type(moment) in (int, float) and 0 <= moment < END_OF_TIME for moment in times):
                raise ValueError("a time is beyond its bounds")
            return said._replace(process=printable(said.process)[:64], slots=tuple(said.slots))


class Registration:
    """A reader's own record, which lasts until ``close``; a warning is logged if it cannot be made."""

    def __init__(
        self, segment: Path, mode: str, version: int = 0, slots: tuple[int, ...] = (), oldest: float = 0.0
    ) -> None:
        process = Path(sys.argv[0] or sys.executable).name[:64] if sys.argv else "python"
        self._record = ReaderRecord(os.getpid(), process, 0, 0.0, mode, ())
        self._fd = -1
        try:
            self._fd = self._make(segment / "readers")
            self.update(version, slots, oldest)
            readers(segment)  # removes the records of killed readers
        except (OSError, SegmentUnsafe) as exc:
            import logging

            logging.getLogger("wsync").warning(
                "this reader of %r is not in the list of readers, but reads all the same: %s", segment.name, exc
            )
            self.close()

    def update(self, version: int, slots: tuple[int, ...], oldest: float = 0.0) -> None:
        self._record = self._record._replace(version=version, since=time.time(), slots=slots, oldest=oldest)
        if self._fd >= 0:
            os.pwrite(self._fd, json.dumps(self._record._asdict()).encode().ljust(_SIZE), 0)

    def close(self, *, unlink: bool = True) -> None:
        if self._fd >= 0:
            if unlink:
                with suppress(OSError):  # gone, or not this user's to remove; others see that its lock is free
                    self._path.unlink()
            shut(self._fd)
            self._fd = -1

    def _make(self, records: Path) -> int:
        with opened(open_readers(records.parent)) as directory:
            for _ in range(100):
                self._path = records / f"{os.getpid()}-{os.urandom(8).hex()}"
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(self._path.name, flags, 0o600, dir_fd=directory)
                with closed_on_error(fd):
                    os.fchmod(fd, 0o600 | os.fstat(directory).st_mode & 0o044)
                    if try_lock(fd) and os.fstat(fd).st_nlink:
                        return fd
                shut(fd)  # another process took the new file for a dead reader's, and removes it
        raise SegmentUnsafe(
            f"another process locks each new record in {records}. Find it with `fuser -v {records}`, end it, and "
            "attach again."
        )


def readers(segment: Path) -> list[ReaderRecord]:
    """The living readers of a segment; removes the files of dead ones."""
    try:
        directory = open_readers(segment)
    except FileNotFoundError:
        return []
    with opened(directory), os.scandir(directory) as entries:
        names = sorted(entry.name for entry in itertools.islice(entries, _MOST))
        return [record for name in names if (record := _look(name, directory))]


def _look(name: str, directory: int) -> ReaderRecord | None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    # OSError: it is gone, a link or a socket, or this user may not open or remove it.
    with suppress(OSError), opened(os.open(name, flags, dir_fd=directory)) as fd:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:  # a file with another name is not only a record
            return None
        if try_lock(fd):
            os.unlink(name, dir_fd=directory)
            return None
        for _ in range(8):  # a record that is being replaced at this moment may not parse
            with suppress(ValueError):
                return ReaderRecord.parse(os.pread(fd, _SIZE, 0))
    return None
