"""Which watch keeps a segment in step: it holds a lock on a file of the segment for as long as it runs."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

from ..errors import SegmentUnsafe
from ..system.memory import read_at, shut, try_lock, write_at
from .access import open_dir, open_file, opened
from .segment import Segment
from .segment_files import parsed

_FILE, _SIZE = "watch.lock", 16_384


class Watching(NamedTuple):
    """What a watch says about itself.

    Attributes:
        pid: its process.
        spec: its spec: the TOML's path, or the import string.
        place: where its checkpoints appear.
    """

    pid: int
    spec: str
    place: str

    def __str__(self) -> str:
        return f"the watch of {self.spec} (pid {self.pid}, checkpoints in {self.place})"


class WatchLock:
    """The lock of one watch, on the segment that it keeps in step."""

    def __init__(self, about: Watching) -> None:
        self._about, self._fd = about, -1

    def hold(self, segment: Segment) -> Watching | None:
        """Takes the lock if it is free; otherwise returns the watch that holds it.

        Raises:
            OSError: the file cannot be made.
        """
        with opened(open_dir(segment.path)) as directory:
            fd = open_file(_FILE, os.O_RDWR | os.O_CREAT, directory)
        if self._fd >= 0 and os.path.samestat(os.fstat(fd), os.fstat(self._fd)):
            shut(fd)
            return None
        if not try_lock(fd):
            with opened(fd):
                return _parse(fd)
        self.close()
        self._fd = fd
        write_at(fd, json.dumps(self._about).encode().ljust(_SIZE), 0)
        return None

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        shut(fd)


def watch_of(segment: Segment) -> Watching | None:
    """The watch that keeps a segment in step; None if there is none."""
    try:
        with (
            opened(open_dir(segment.path)) as directory,
            opened(open_file(_FILE, os.O_RDONLY, directory)) as fd,
        ):
            return None if try_lock(fd, shared=True) else _parse(fd)
    except (OSError, SegmentUnsafe):
        return None


def _parse(fd: int) -> Watching:
    try:
        with parsed():
            pid, spec, place = json.loads(read_at(fd, _SIZE, 0))
            return Watching(int(pid), str(spec), str(place))
    except ValueError:  # it is being written at this moment
        return Watching(0, "unknown", "unknown")
