"""Who reads a segment: one small file a reader in the segment's ``readers/``, locked while the reader lives.

The record is for people (``wsync status``, the message that names who holds a slot back); no decision hangs on it.
That a reader lives is said by the lock on its file alone: pids mean nothing across containers. A file whose lock is
free was left by a dead reader and is removed by whoever looks.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .memory import open_file, open_private_dir, try_lock

_SIZE = 1024  # bytes of a record, padded, so that one write replaces it whole


@dataclass(frozen=True, slots=True)
class ReaderRecord:
    """What a reader says of itself.

    Attributes:
        pid: its process, in its own pid namespace.
        process: its program's name.
        version: the version that it acts on; 0 before its first.
        since: when it took that version, seconds since the epoch.
        mode: ``"swap"`` or ``"copy"``.
        slots: the slots that it leases.
    """

    pid: int
    process: str
    version: int
    since: float
    mode: str
    slots: tuple[int, ...]


class Registration:
    """A reader's own record, there as long as this object is open."""

    def __init__(self, segment: Path, mode: str) -> None:
        self._dir = open_private_dir(segment / "readers")
        self._self = {"pid": os.getpid(), "process": _process_name(), "mode": mode}
        while True:
            self._name = f"{os.getpid()}-{time.monotonic_ns():x}"
            self._fd = open_file(self._name, os.O_RDWR | os.O_CREAT | os.O_EXCL, self._dir)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if os.fstat(self._fd).st_nlink:  # else a sweeper took the new file for a dead reader's
                break
            os.close(self._fd)
        self.update(0, ())

    def update(self, version: int, slots: tuple[int, ...]) -> None:
        record = {**self._self, "version": version, "since": time.time(), "slots": slots}
        os.pwrite(self._fd, json.dumps(record).encode().ljust(_SIZE), 0)

    def close(self, *, unlink: bool = True) -> None:
        if self._fd < 0:
            return
        if unlink:
            try:
                os.unlink(self._name, dir_fd=self._dir)
            except FileNotFoundError:
                pass
        os.close(self._fd)
        os.close(self._dir)
        self._fd = -1


def readers(segment: Path) -> Iterator[ReaderRecord]:
    """The living readers of a segment; the files of dead ones are removed on the way."""
    try:
        directory = open_private_dir(segment / "readers")
    except FileNotFoundError:
        return
    try:
        for name in sorted(os.listdir(directory)):
            record = _look(name, directory)
            if record is not None:
                yield record
    finally:
        os.close(directory)


def _look(name: str, directory: int) -> ReaderRecord | None:
    try:
        fd = open_file(name, os.O_RDWR, directory)
    except FileNotFoundError:
        return None
    try:
        if try_lock(fd):
            os.unlink(name, dir_fd=directory)
            return None
        for _ in range(8):  # a record that is just being replaced may not parse
            try:
                data = json.loads(os.pread(fd, _SIZE, 0))
                return ReaderRecord(**{**data, "slots": tuple(data["slots"])})
            except (ValueError, TypeError, KeyError):
                continue
        return None
    except FileNotFoundError:
        return None
    finally:
        os.close(fd)


def _process_name() -> str:
    return Path(sys.argv[0] or sys.executable).name[:64] if sys.argv else "python"
