"""Waits until something may have changed where checkpoints appear: by notification, and by polling.

Notifications come from inotify(7), which misses remote file systems, directories that do not exist yet, and writes
through a memory map; polling covers those. Between two events a watch sleeps in the kernel: a rename into place is
noticed within a millisecond, and idling costs 0.01 % of a core. (watchfiles, which polls a queue of its own, cost 0.8 %
of a core at 10 ms.)
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.files.parts import remote
from ..layout.filenames import CONFIG, INDEX, SUFFIX, SUMS
from .listing import TEMPORARY
from .newest import Select

if TYPE_CHECKING:
    from inotify_simple import INotify

_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "zfs", "f2fs", "overlay", "ramfs", "bcachefs"}
_SLICE = 0.25  # longest single sleep, in seconds, so that a stop by another thread or a signal is noticed


class Changes:
    """Notices changes in a directory, and in the checkpoints' directories in it.

    If the directory does not exist yet, its parent is watched. Watching begins when the object is made, so that changes
    before the first wait are not missed.

    Args:
        place: the directory, or a file in it.
        poll: longest wait by default, in seconds, after which the caller looks without a notification.
        stop: ends a wait when it is set.
        settings: which names matter besides those of checkpoints.
    """

    def __init__(self, place: Path, poll: float, stop: threading.Event, settings: Select = Select()) -> None:  # noqa: B008
        self._place, self._poll, self._stop, self._settings = place, poll, stop, settings
        self._is_complete = False
        self._notify: INotify | None = None
        self._watched: tuple[int, int] | None = None
        self._directory = place
        self._paths: dict[int, Path] = {}  # by watch descriptor
        self._named: set[str] | None = None
        self._begin()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits at most ``seconds``, default ``poll``; True after a change, or if one may have been missed before."""
        deadline = time.monotonic() + (self._poll if seconds is None else seconds)
        while not self._stop.is_set() and (left := deadline - time.monotonic()) > 0:
            if self._begin():
                return True  # changes before this were not notified
            if self._notify is None:
                self._stop.wait(min(left, _SLICE))
            elif self._notified(min(left, _SLICE)):
                return True
        return False

    def tells_all(self) -> bool:
        """Whether notifications cover every change: all directories are watched, and the file system is local."""
        return self._notify is not None and self._is_complete

    def named(self) -> set[str] | None:
        """The names of the files that changed since the last call; None if any file may have."""
        named, self._named = self._named, set()
        return named if self.tells_all() else None

    def close(self) -> None:
        if self._notify is not None:
            self._notify.close()
        self._notify = self._watched = None
        self._paths.clear()

    def _notified(self, seconds: float) -> bool:
        """Waits for a notification that matters; returns whether one came in time."""
        from inotify_simple import flags

        assert self._notify is not None
        has_come = False
        for event in self._notify.read(max(1, int(seconds * 1000))):
            if event.mask & (flags.Q_OVERFLOW | flags.UNMOUNT | flags.DELETE_SELF | flags.MOVE_SELF):
                self._watched = None  # list and watch the directory anew
            is_new = bool(event.mask & (flags.CREATE | flags.MOVED_TO))
            path = self._paths.get(event.wd, self._directory) / event.name
            is_directory = bool(event.mask & flags.ISDIR) or (is_new and _leads_to_directory(path))
            if is_new and is_directory:
                self._add_entry(self._directory / path.relative_to(self._directory).parts[0])
                self._add_levels(self._directory)  # the place may be a checkpoint itself
            if self._concerns(event.name, is_directory):
                has_come = True
                if is_directory or path.parent != self._place or self._settings.extras.files:
                    self._named = None
                elif self._named is not None:
                    self._named.add(event.name)
        return has_come

    def _concerns(self, name: str, is_directory: bool) -> bool:
        """Whether a file of this name matters to a pass, unlike logs and other files beside the checkpoints."""
        if name == self._place.name:
            return True
        endings = [each for each in (self._settings.marker, self._settings.pointer) if each]
        endings += [".sha256", SUMS] if self._settings.digest else []
        if any(map(name.endswith, endings)):  # even if it looks temporary: it may begin with a dot
            return True
        if not name or TEMPORARY.search(name):
            return False
        return is_directory or name.endswith((SUFFIX, INDEX, CONFIG)) or bool(self._settings.extras.files)

    def _begin(self) -> bool:
        """Starts watching at first, or after the directory was replaced; returns whether it did."""
        if remote(self._place):
            return False  # stores do not notify
        try:
            self._directory = self._place if self._place.is_dir() else self._place.parent
            info = self._directory.stat()
            if self._watched == (info.st_dev, info.st_ino):
                return False
            self.close()
            self._named = None
            from inotify_simple import INotify

            self._notify = INotify()
            is_flat = not any("/" in pattern for pattern in self._settings.extras.files)
            self._is_complete = self._directory == self._place and _is_local(info.st_dev) and is_flat
            self._add(self._directory, must=True)
            self._watched = (info.st_dev, info.st_ino)
            if self._directory == self._place:
                with os.scandir(self._place) as entries:
                    for entry in entries:
                        if entry.is_dir():
                            self._add_entry(Path(entry.path))
                self._add_levels(self._place)
        except OSError:  # nothing to watch, or no more watches allowed: polling remains
            self.close()
        return self._notify is not None

    def _add_entry(self, directory: Path) -> None:
        """Watches a directory in the place, and the levels of ``select.within`` below it."""
        self._add(directory)
        self._add_levels(directory)

    def _add_levels(self, directory: Path) -> None:
        """Watches the levels of ``select.within`` below this directory, as far as they exist."""
        for level in self._settings.within.split("/") if self._settings.within else ():
            directory = directory / level
            if not directory.is_dir():
                return
            self._add(directory)

    def _add(self, directory: Path, *, must: bool = False) -> None:
        """Watches one directory; raises an error only if it ``must``, because polling remains."""
        from inotify_simple import flags

        mask = flags.CLOSE_WRITE | flags.MOVED_TO | flags.MOVED_FROM | flags.CREATE | flags.DELETE | flags.ATTRIB
        mask |= flags.ONLYDIR | (flags.DELETE_SELF | flags.MOVE_SELF if must else 0)
        assert self._notify is not None
        try:
            self._paths[self._notify.add_watch(directory, mask)] = directory
        except OSError:
            if must:
                raise
            self._is_complete = False


def _leads_to_directory(path: Path) -> bool:
    """Whether a new entry is a directory or a link to one, such as ``latest``, whose notification does not say so."""
    return not TEMPORARY.search(path.name) and os.path.isdir(path)


def _is_local(device: int) -> bool:
    """Whether only this machine changes a file system, so that the kernel reports every change."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as mounts:  # proc_pid_mountinfo(5)
        kinds = [line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] == number]
    return bool(kinds) and kinds[0] in _LOCAL
