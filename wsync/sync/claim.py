"""Says whose versions a spec may replace (its own, and those without an owner), and which watch will replace them.

Two specs of one name share a segment without knowing it (``runA/policy.toml`` and ``runB/policy.toml``), and each would
undo what the other publishes. So a version carries its owner, the spec, and the owner's place of checkpoints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import NamedTuple

from ..discovery.newest import Select
from ..discovery.weight_getter import CheckpointWeightGetter, live_candidate
from ..errors import CheckpointError, SegmentUnsafe, UsageError, parsed
from ..segment.publication import Publication
from ..segment.segment import Segment
from ..system.access import open_dir, open_file, opened
from ..system.memory import read_at, shut, try_lock, write_at
from .outcome import Outcome

_FILE, _SIZE = "watch.lock", 16_384


class Claim:
    """What one spec may replace.

    Args:
        name: of the segment.
        owner: the spec; if empty, this makes no claim, ignores others, and leaves a segment to its owner.
        place: where the spec's checkpoints come from.
        own: the place is from the spec itself, which may name another one than it did before.
        is_named: whether this is a push of one checkpoint, maybe from elsewhere, and not of a place where they appear.
        take_over: the next publish may replace another owner's version.
    """

    def __init__(
        self, name: str, owner: str, place: str, *, own: bool, is_named: Callable[[], bool], take_over: bool
    ) -> None:
        self._name, self._owner, self._place, self._own, self._is_named = name, owner, place, own, is_named
        self.take_over = take_over

    def is_foreign(self, live: Publication | None) -> bool:
        """Whether what is live is another owner's, so that nothing here is older or newer than it."""
        if live is None or not live.owner or not self._owner:
            return False
        if not _same(live.owner, self._owner):
            return True
        return bool(live.place) and not self._own and not _same(live.place, self._place) and not self._is_named()

    def check(self, live: Publication | None) -> None:
        """Raises UsageError if what is live is another owner's, and is not taken over."""
        if live and self.is_foreign(live) and not self.take_over:
            raise UsageError(
                f"version {live.version} of segment {self._name!r} came from {live.owner} (checkpoints in "
                f"{live.place or 'no directory'}), and this is {self._owner} (checkpoints in {self._place}). "
                "Give this one another --name, or take the segment over for good with --take-over."
            )

    def origin(self, live: Publication | None) -> tuple[str, str]:
        """Owner and place to record with the version that comes after what is live.

        Raises:
            UsageError: as ``check``.
        """
        if not self._owner:
            return (live.owner, live.place) if live else ("", "")
        self.check(live)
        if not self._is_named():
            return self._owner, self._place
        ours = live and _same(live.owner, self._owner)
        return self._owner, live.place if live and ours else ""  # one checkpoint changes nobody's place


def _same(one: str, other: str) -> bool:
    return one == other or (os.path.isabs(one) and os.path.realpath(one) == os.path.realpath(other))


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


def undone_by(segment: Segment | None, outcome: Outcome, select: Select) -> str:
    """Says which watch replaces what a push just published, and how to keep it; empty if none does.

    Args:
        segment: that the push published into.
        select: which entries of the watch's place are checkpoints, and which is newest.
    """
    if not segment or outcome.status != "published" or outcome.pin:
        return ""
    watch, live = watch_of(segment), segment.live()
    if not watch:
        return ""
    if live and live.version == outcome.version:
        try:
            if not CheckpointWeightGetter(watch.place, select=select).candidates(live_candidate(live)):
                return ""
        except CheckpointError:  # what the watch will find is unknown
            pass
    return (
        f"{watch} keeps this segment in step, and will replace version {outcome.version} in one of its next passes. "
        f"`wsync pin {outcome.name}` keeps the live version, `wsync rollback {outcome.name} --to {outcome.version}` "
        "what was just published."
    )
