"""A small file in the segment that says which group its watch is in, locked while the watch is in it.

``wsync status`` reads it; a file with a free lock was left by a dead watch, and is ignored. It also records, for the
next time that this box joins the same group, which versions came from the group: what others published into the segment
meanwhile does not count as the group's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..segment.publication import Publication
from ..system.access import opened
from ..system.memory import shut, try_lock, write_at

FILE = "group.json"
_SHOWN = 8  # most names of boxes in a line


class GroupFile:
    """The file of one segment, written and locked by its watch.

    Args:
        about: ``run``, ``rank``, ``size`` and ``boxes`` of the group.
    """

    def __init__(self, segment: Path, about: dict[str, Any]) -> None:
        self._about = about
        self._fd = os.open(segment / FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        said = _read(self._fd) or {}
        self._recorded: list[list[Any]] = said.get("given", []) if said.get("run") == about["run"] else []
        self.info = os.fstat(self._fd)
        self._write()

    def is_at(self, segment: Path) -> bool:
        """Whether the file is still the one in the segment at that path, which may have been made anew."""
        try_lock(self._fd)  # each time: a reader of the file may have held the lock before
        with suppress(OSError):
            return os.path.samestat(self.info, os.stat(segment / FILE))
        return False

    def came_from_group(self, live: Publication) -> bool:
        return [live.version, live.identity] in self._recorded

    def record(self, version: int, identity: str) -> None:
        """Records a version that is about to go live; keeps the one before, because this one may not go live."""
        self._recorded = [*self._recorded[-1:], [version, identity]]
        self._write()

    def close(self) -> None:
        shut(self._fd)

    def _write(self) -> None:
        write_at(self._fd, json.dumps({**self._about, "given": self._recorded}).encode() + b"\n", 0)


def group_of(segment: Path) -> dict[str, Any] | None:
    """``rank``, ``size`` and ``boxes`` of the group that a segment's watch is in; None if it is in no group now."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(KeyError, OSError), opened(os.open(segment / FILE, flags)) as fd:
        said = None if try_lock(fd, shared=True) else _read(fd)
        return {key: said[key] for key in ("rank", "size", "boxes")} if said else None
    return None


def few(boxes: Sequence[str]) -> str:
    """The names of boxes in one line: the first few, and the number of others."""
    more = len(boxes) - _SHOWN
    return ", ".join(boxes[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _read(fd: int) -> dict[str, Any] | None:
    try:
        said = json.loads(os.pread(fd, 1 << 20, 0).partition(b"\n")[0])
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None
