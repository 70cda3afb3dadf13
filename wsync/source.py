"""A place where checkpoints appear: which files are candidates, which is newest, and waiting for a change.

Choosing is a pure function of one listing (``select``); the listing costs one ``scandir`` and a ``stat`` a file, and
opens none of them. Whether a candidate is complete is only known when it is opened: the caller goes down the list.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import identity
from .errors import CheckpointError, NoCheckpoint

if TYPE_CHECKING:
    from watchfiles._rust_notify import RustNotify

SUFFIX = ".safetensors"
_TEMPORARY = re.compile(r"^\.|^~|~$|[.\-_](tmp|temp|part|partial|incomplete)\b", re.IGNORECASE)
_STEP = 10  # milliseconds between two looks of watchfiles at its queue: half of the delay, and most of the idle cost


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that may be a checkpoint.

    Attributes:
        path: absolute.
        identity: of the file as it was listed.
        mtime_ns: its modification time, which is its place in the order; ties go by natural name.
    """

    path: Path
    identity: str
    mtime_ns: int

    @property
    def place(self) -> tuple[int, list[tuple[int, int, str]]]:
        """Sorts candidates from oldest to newest."""
        return self.mtime_ns, natural(self.path.name)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key by which ``step_9`` comes before ``step_10``."""
    return [
        (0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part)
        for part in re.split(r"([0-9]+)", name[:255])
        if part
    ]


def scan(place: Path) -> list[Candidate]:
    """The candidates of a directory, or the one file that ``place`` is. Nothing is opened.

    Raises:
        NoCheckpoint: there is no such place yet.
        CheckpointError: it cannot be listed.
    """
    try:
        if not stat.S_ISDIR(place.stat().st_mode):
            return [_candidate(place, place.stat())]
        with os.scandir(place) as entries:
            found = []
            for entry in entries:
                if not entry.name.endswith(SUFFIX) or _TEMPORARY.search(entry.name):
                    continue
                try:
                    info = entry.stat()
                except FileNotFoundError:
                    continue  # a trainer's retention was faster
                except OSError:
                    continue  # a link that leads nowhere or in a circle
                if stat.S_ISREG(info.st_mode):
                    found.append(_candidate(Path(entry.path), info))
            return found
    except FileNotFoundError as exc:
        raise NoCheckpoint(f"there is no {place} yet. It is looked at again at the next pass.") from exc
    except OSError as exc:
        raise CheckpointError(f"{place} cannot be listed ({exc.strerror}). Check its owner and mode.") from exc


def select(candidates: Iterable[Candidate], live: Candidate | None = None) -> list[Candidate]:
    """What is newer than what is live, newest first.

    Args:
        candidates: one listing.
        live: where the live version came from; None takes everything as newer. A live file that was replaced under its
            own name counts as new; one from another directory says nothing about what is newer here.
    """
    chosen = []
    for candidate in sorted(candidates, key=lambda c: c.place, reverse=True):
        if live and candidate.identity == live.identity:
            break
        if live and candidate.path.parent == live.path.parent and candidate.place < live.place:
            if candidate.path == live.path:  # replaced by an older file, which is new all the same
                chosen.append(candidate)
            break
        chosen.append(candidate)
    return chosen


class Changes:
    """Waits until something may have changed in a directory: by notification, and by the clock.

    Notifications come from watchfiles; they miss remote file systems and directories that are not there yet, for which
    the clock is. A directory that is not there is awaited in its parent. Watching begins when the object is made, so
    that nothing that happens before the first wait is missed.
    """

    def __init__(self, place: Path, poll: float, stop: threading.Event) -> None:
        self._place, self._poll, self._stop = place, poll, stop
        self._notify: RustNotify | None = None
        self._watched: tuple[int, int] | None = None
        self._current()

    def wait(self) -> bool:
        """Waits for a change, at most ``poll`` seconds; True where a notification came."""
        deadline = time.monotonic() + self._poll
        while not self._stop.is_set() and (left := deadline - time.monotonic()) > 0:
            fresh, notify = self._current()
            if fresh:
                return True  # what happened before this watch began was told to nobody
            try:
                changes = notify.watch(0, _STEP, max(1, int(left * 1000)), self._stop) if notify else None
            except RuntimeError:  # the notifier gave up; the clock remains
                changes = None
            if changes is None:
                self.close()
                self._stop.wait(left)
            elif isinstance(changes, set) and any(self._concerns(path) for _, path in changes):
                return True
        return False

    def close(self) -> None:
        if self._notify is not None:
            self._notify.close()
        self._notify = self._watched = None

    def _concerns(self, path: str) -> bool:
        return path.endswith(SUFFIX) or os.path.basename(path) == self._place.name

    def _current(self) -> tuple[bool, RustNotify | None]:
        """Whether watching began just now, and the watcher of the directory that is there; a replaced one is new."""
        from watchfiles._rust_notify import RustNotify  # documented for direct use; all else there needs asyncio

        directory = self._place if self._place.is_dir() else self._place.parent
        try:
            info = directory.stat()
            if self._watched == (info.st_dev, info.st_ino):
                return False, self._notify
            self.close()
            self._notify = RustNotify([str(directory)], False, False, 0, False, True)
            self._watched = (info.st_dev, info.st_ino)
        except OSError:  # there is nothing to watch, or no watch is left to be had
            self.close()
        return self._notify is not None, self._notify


def _candidate(path: Path, info: os.stat_result) -> Candidate:
    return Candidate(path.absolute(), identity(info), info.st_mtime_ns)
