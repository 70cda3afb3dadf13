"""Decides whether a checkpoint's writer is done, before its bytes are trusted.

A file is not done while a process has it open for writing, while a part of it is reserved but not written, or while a
downloader's temporary file lies beside it. If the system does not say whether a file is open, or if a checkpoint has
several files, which are written one by one, the files must also have been unchanged for a while.

All files must be of one save. A trainer or rsync that overwrites an earlier save replaces one file after another; until
the last is replaced, the directory holds files of both saves, each of them whole. Three signs show this: some files are
still those published from this place and others are not; some shards are newer than the index and others older; or the
shards' metadata name different steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...errors import BeingRewritten, BeingWritten, OpenForWriting
from ...system.file_holes import unwritten
from ...system.memory import being_written
from .parts import Parts, fingerprint, fingerprints, identity, written

PATIENCE = 30.0
"""A checkpoint that looks incomplete is taken once it has not changed for this many times ``settle`` seconds."""
COMPANIONS = ("aria2", "part", "partial", "incomplete", "download", "crdownload", "filepart", "st")
"""Suffixes of the files that downloaders keep beside a file until it is complete."""
EXTRAS_PATIENCE = 5.0
"""As ``PATIENCE``, if only the weights or only the extras changed: extras are written quickly, and may never change."""
LONGEST_WAIT = 1.5  # seconds that a pass waits for a checkpoint to settle; longer is left to the next pass
_TICK = 0.01  # seconds: file systems' clocks tick at least so often
_SECOND = 1.0 + _TICK  # the same for times in whole seconds, as on ext3 and NFS exports of it
_WEB_TICK = 2.0  # seconds: many a web server tells versions apart only by size and a time in whole seconds


def let_files_settle(parts: Parts, fds: Sequence[int], settle: float) -> None:
    """Waits until a further write would show in a file's modification time, or its writer is likely done.

    A file system's clock may tick only every few milliseconds, or once a second: two writes in one tick look like one.
    The files must be unchanged for ``settle`` seconds if there are several, or if the system does not tell whether one
    is open for writing. If it does not tell, and a part of a file was never written, this takes ``PATIENCE`` times as
    long: the file is sparse, or its writer has stalled.

    Args:
        fds: open descriptors, one for each of ``parts.every``.
        settle: seconds.

    Raises:
        BeingWritten: a file is still open for writing, is incomplete, or changed too recently.
    """
    _check_downloads(parts)
    opened = {file: fd for file, fd in zip(parts.every, fds, strict=True) if file != parts.beside}
    files, fds = list(opened), list(opened.values())
    writing = [being_written(fd) for fd in fds]
    if True in writing:
        raise OpenForWriting(
            f"{files[writing.index(True)]} is still open for writing. Wait for its writer to close it; "
            "a writer should write under another name, and rename the file into place."
        )
    closed = not parts.is_several and None not in writing
    wanted = _TICK if closed else max(settle, _TICK)
    never_written = [unwritten(fd) for fd in fds]
    if "reserved" in never_written:
        raise BeingWritten(
            f"{files[never_written.index('reserved')]} is incomplete: room for the rest was reserved, and has "
            "not been written. Wait for its writer to finish, or write it again."
        )
    if "hole" in never_written and None in writing:
        wanted *= PATIENCE
    if not _stand_still(fds, wanted, closed=closed):
        raise _unsettled(parts.path, wanted)


def _stand_still(fds: Sequence[int], wanted: float, *, closed: bool) -> bool:
    """Whether the files have been unchanged for ``wanted`` seconds; waits if ``LONGEST_WAIT`` or less remain."""
    infos = [os.fstat(fd) for fd in fds]
    now = time.time()
    ends = [
        t / 1e9 + max(wanted, 0 if t % 10**9 else _SECOND)
        for info in infos
        for t in _times(info, closed=closed)
        if t / 1e9 <= now + 1  # a time further ahead of our clock says nothing
    ]
    left = max(ends, default=now) - now
    if 0 < left <= LONGEST_WAIT:
        time.sleep(left)
        after = [os.fstat(fd) for fd in fds]
        return [(identity(i), i.st_ctime_ns) for i in after] == [(identity(i), i.st_ctime_ns) for i in infos]
    return left <= 0


def _check_downloads(parts: Parts) -> None:
    """Raises BeingWritten if a downloader's temporary file lies beside one of the files."""
    for file in parts.every:
        for companion in (f"{file}.{end}" for end in COMPANIONS):
            if os.path.lexists(companion):
                raise BeingWritten(
                    f"{companion} says that {file.name} is still being downloaded. Wait for the download to end; if "
                    "it has ended, remove that file."
                )


def _times(info: os.stat_result, *, closed: bool) -> tuple[int, ...]:
    """The times, in ns, that count as a file's last change.

    A copy may keep the modification time of its original, so the change time counts as well if the modification time
    was likely set back, or if the system does not say that the file is closed.
    """
    was_set = info.st_ctime_ns - info.st_mtime_ns > 10**9
    return (info.st_mtime_ns,) if closed and not was_set else (info.st_mtime_ns, info.st_ctime_ns)


def let_objects_settle(parts: Parts, settle: float, stands: Callable[[], bool], *, is_web: bool) -> None:
    """Waits like ``let_files_settle``, for objects of a store: each object is whole, but some may still be missing.

    Args:
        settle: seconds; counts only if there are several objects.
        stands: returns whether the store still has all objects as they were listed.
        is_web: whether the store is a web server.

    Raises:
        BeingWritten: an object changed too recently.
    """
    wanted = settle if parts.is_several else 0.0
    if is_web:
        wanted = max(wanted, _WEB_TICK)
    now = time.time()
    written = [file.stat().st_mtime for file in (*parts.files, *parts.extras.values())]
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


def check_files(parts: Parts, infos: Sequence[os.stat_result], settle: float, published: Sequence[str]) -> None:
    """Checks that shards and index, or an adapter's two files, are of one save, as far as times and identities show.

    Args:
        infos: stat results of ``parts.every``.
        settle: seconds.
        published: identities of what was published from this path before.

    Raises:
        BeingRewritten: they are of two saves; or they may be, and one changed within ``PATIENCE * settle`` seconds.
    """
    infos = infos[: len(parts.own)]
    *times, index = map(written, infos)
    mixed = min(times) < index < max(times)
    for earlier in map(fingerprints, published):
        mixed = _is_mixed(parts, [fingerprint(info) in earlier for info in infos]) or mixed
    if mixed:
        _check_patience(parts, infos, settle)


def check_changed(parts: Parts, infos: Sequence[os.stat_result], settle: float, since: int) -> None:
    """Checks the same by change times: files may be overwritten in place and have their modification times restored.

    Args:
        since: newest change time of all files when they were published, in ns.

    Raises:
        BeingRewritten: as ``check_files``.
    """
    infos = infos[: len(parts.own)]
    if _is_mixed(parts, [info.st_ctime_ns <= since for info in infos]):
        _check_patience(parts, infos, settle)


def check_extras_settled(
    parts: Parts, infos: Sequence[os.stat_result], settle: float, published: Sequence[str]
) -> None:
    """Checks that weights and extras are of one save, if both were published from this path before.

    Args:
        infos, settle, published: as of ``check_files``.

    Raises:
        BeingRewritten: only some files changed since then, and one did within ``EXTRAS_PATIENCE * settle`` seconds.
    """
    for earlier in map(fingerprints, published):
        if len({fingerprint(info) in earlier for info in infos}) == 2 and (
            left := _left(infos, EXTRAS_PATIENCE * settle)
        ):
            raise BeingRewritten(
                f"{parts.path} may hold files of two saves: of its weights and its extras ({', '.join(parts.extras)}) "
                f"some have changed since it was published, and others have not. It is published once all have "
                f"changed, or in {left:.1f} s if none changes ({EXTRAS_PATIENCE:g} times select.settle)."
            )


def _is_mixed(parts: Parts, each: Sequence[bool]) -> bool:
    """Whether only the weights, or only the index, changed; raises BeingRewritten if only some weights did.

    Args:
        each: for each of ``parts.own``, whether it is still the file that was published.
    """
    *same, index = each
    if any(same) and not all(same):
        raise BeingRewritten(
            f"{parts.path} is being rewritten: {same.count(False)} of its {len(same)} weight files have changed "
            f"since it was published, and {parts.files[same.index(True)].name} has not. It is published once all "
            "have. Wait for its writer; if the writer has ended, touch the files that stay as they are."
        )
    return any(same) != index


def _check_patience(parts: Parts, infos: Sequence[os.stat_result], settle: float) -> None:
    if _left(infos, PATIENCE * settle):
        assert parts.beside
        raise BeingRewritten(
            f"{parts.path} may hold files of two saves: {parts.beside.name} is older than some of its weights and "
            "newer than others, or only one of the two has changed. Wait for its writer: it is published once all "
            f"files have changed, or none has changed for {PATIENCE * settle:g} s ({PATIENCE:g} times select.settle)."
        )


def _left(infos: Sequence[os.stat_result], patience: float) -> float:
    """Seconds until none of the files has changed for ``patience`` seconds; 0 if none has."""
    now = time.time()
    changed = [t / 1e9 for info in infos for t in (info.st_mtime_ns, info.st_ctime_ns)]
    return max(0.0, max((t for t in changed if t <= now + 1), default=0.0) + patience - now)


def check_steps(parts: Parts, metadata: Sequence[Mapping[str, str]]) -> None:
    """Checks that no two files of a checkpoint name different steps.

    Args:
        metadata: that of each of ``parts.files``, in order.

    Raises:
        BeingRewritten: two do.
    """
    for key in ("step", "global_step"):
        named = {each[key].strip(): file.name for each, file in zip(metadata, parts.files, strict=True) if key in each}
        if len(named) > 1:
            (first, one), (second, other) = list(named.items())[:2]
            raise BeingRewritten(
                f"{parts.path} holds files of two saves: {one} is of step {first:.40}, and {other} of step "
                f"{second:.40}. Wait for its writer to finish, or write it again."
            )
