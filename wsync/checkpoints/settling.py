"""Whether the writer of a checkpoint is done with it: seen before its bytes are believed.

A file that some process has open for writing is not done; nor is one with room that was reserved and never written, or
with the file of a downloader beside it. Where the system does not tell whether a file is open, and where a checkpoint
has several files, which are written one after another, it must have stood still for a while.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import BeingWritten
from ..system.extents import unwritten
from ..system.memory import being_written
from .files import Parts, identity

PATIENCE = 30.0
"""How many times ``settle`` a checkpoint stands still until it counts although something says that it is not whole."""
COMPANIONS = ("aria2", "part", "partial", "incomplete", "download", "crdownload", "filepart")
"""What downloaders add to the name of a file for another one, which lies beside it until all of it has come."""
LONGEST_WAIT = 1.5  # seconds that a pass waits for a checkpoint to settle; longer is left to the next pass
_TICK = 0.01  # seconds: no coarser than a file system's clock ticks
_SECOND = 1.0 + _TICK  # the same where its times have whole seconds, as on ext3, and NFS from there
_WEB_TICK = 2.0  # seconds: to a web server a version is often no more than a size and a time in whole seconds


def let_files_settle(parts: Parts, fds: Sequence[int], settle: float) -> None:
    """Waits until a further write would show in a file's modification time, or its writer is likely done.

    A file system's clock may stand still for some milliseconds, or for a second: of a write in the same tick as the
    last one before the file was opened, nothing would be seen. Several files are written one after another, and not
    every system tells whether a file is still open for writing: there the checkpoint must have stood still for
    ``settle``. Where nothing tells whether it is open, and a part of it was never written, that takes ``PATIENCE``
    times as long: it is sparse, or its writer has stalled.

    Args:
        fds: open descriptors, one for each of ``parts.files``.
        settle: seconds.

    Raises:
        BeingWritten: a file is still open for writing, is not all there, or does not stand still.
    """
    _check_downloads(parts)
    writing = [being_written(fd) for fd in fds]
    if True in writing:
        raise BeingWritten(
            f"{parts.files[writing.index(True)]} is still open for writing. Wait for its writer to close it; "
            "a writer should write under another name, and rename the file into place."
        )
    told = not parts.is_several and None not in writing
    wanted = _TICK if told else max(settle, _TICK)
    never_written = [unwritten(fd) for fd in fds]
    if "reserved" in never_written:
        raise BeingWritten(
            f"{parts.files[never_written.index('reserved')]} is incomplete: room for the rest was reserved, and has "
            "not been written. Wait for its writer to finish, or write it again."
        )
    if "hole" in never_written and None in writing:
        wanted *= PATIENCE
    infos = [os.fstat(fd) for fd in fds]
    # A copy may keep the time of what it copied, but not that of its own change. What is ahead of our clock by
    # more than a second says nothing.
    now = time.time()
    times = [t for i in infos for t in (i.st_mtime_ns, i.st_ctime_ns) if t == i.st_mtime_ns or not told or _is_set(i)]
    ends = [t / 1e9 + max(wanted, 0 if t % 10**9 else _SECOND) for t in times if t / 1e9 <= now + 1]
    left = max(ends, default=now) - now
    if left <= 0:
        return
    if left <= LONGEST_WAIT:
        time.sleep(left)
        after = [os.fstat(fd) for fd in fds]
        if [(identity(i), i.st_ctime_ns) for i in after] == [(identity(i), i.st_ctime_ns) for i in infos]:
            return
    raise _unsettled(parts.path, wanted)


def _check_downloads(parts: Parts) -> None:
    """Raises BeingWritten if the file of a downloader lies beside one of the checkpoint's files."""
    for file in (*parts.files, *([parts.index] if parts.index else [])):
        for companion in (f"{file}.{end}" for end in COMPANIONS):
            if os.path.lexists(companion):
                raise BeingWritten(
                    f"{companion} says that {file.name} is still being downloaded. Wait for the download to end; if "
                    "it has ended, remove that file."
                )


def _is_set(info: os.stat_result) -> bool:
    """Whether a file's modification time was likely set to an earlier one."""
    return info.st_ctime_ns - info.st_mtime_ns > 10**9


def let_objects_settle(parts: Parts, settle: float, stands: Callable[[], bool], *, is_web: bool) -> None:
    """The same for objects of a store, each of which is there whole or not at all.

    Args:
        stands: whether the store still has all objects as they were listed.
        is_web: whether the store is a web server.

    Raises:
        BeingWritten: they do not stand still.
    """
    wanted = settle if parts.is_several else 0.0
    if is_web:
        wanted = max(wanted, _WEB_TICK)
    now = time.time()
    written = [file.stat().st_mtime for file in parts.files]
    left = wanted - (now - max((t for t in written if t <= now + 1), default=0.0))
    if left > LONGEST_WAIT + _WEB_TICK:
        raise _unsettled(parts.path, wanted)
    if left > 0:
        time.sleep(left)
        if not stands():
            raise _unsettled(parts.path, wanted)


def _unsettled(path: Path, wanted: float) -> BeingWritten:
    return BeingWritten(
        f"{path} was written to a moment ago, and must not change for {wanted:g} s. It is looked at again at the "
        "next pass."
    )
