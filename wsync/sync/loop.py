"""The loop of a watch: makes passes until it is stopped, and says when the next is due; also for rank 0 of a group.

A pass is due at each notification, and every ``poll`` seconds. After a pass that failed (a disk error, no shared
memory, a missing runtime directory) the pause doubles from ``poll`` to ``LONGEST``: the pass may have read gigabytes
before it failed, and somebody has to repair the cause. Most failures end with another checkpoint, or one that can be
read again, so the pause ends early when the listing of the place differs from the one before the failed pass. The place
is listed at each notification and every second, but not within a second of the failed pass. The listing decides, not
the notification: a storm of notifications about nothing new does not end a pause, and a change on a remote file system,
which sends none, does.

A gate that asks for the same again later causes the same pauses, because each pass stages the weights anew; it does not
count as a failure.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..checkpoints.files.parts import remote
from ..discovery.changes import Changes
from ..discovery.listing import listing_of
from ..errors import RetryLater, Stopped, UsageError, WsyncError
from ..settings.spec import Spec
from .outcome import Outcome
from .syncer import Syncer

LONGEST = 60.0  # seconds between two passes, however many failed
_APART = 1.0  # seconds between two looks at the listing of a directory; a store is listed every ``poll`` seconds


def pause_after(failures: int, poll: float) -> float:
    """Seconds to pause after so many failures in a row, one or more."""
    return min(poll * 2.0 ** min(failures - 1, 64), LONGEST)


class Schedule:
    """Says when the next pass is due; the first one is due at once.

    Args:
        spec: with ``poll``, ``max_failures``, and what counts as a checkpoint.
        place: where checkpoints appear.
        stop: ends a wait.

    Attributes:
        failures: passes that failed in a row.
        pauses: passes in a row that are followed by a pause: failures, and those whose gate asked for later.
        named: the files that were notified since the last pass, where no others can have changed; else None.
    """

    full = 60.0  # seconds between two full looks at a place whose changes are all notified

    def __init__(self, spec: Spec, place: Path, stop: threading.Event) -> None:
        self.failures = self.pauses = 0
        self._spec, self._place, self._stop = spec, place, stop
        self._changes = Changes(place, spec.poll, stop, spec.select)
        self._apart = spec.poll if remote(place) else min(spec.poll, _APART)
        # By the monotonic clock: when a pass is due, when the place is listed, and until when no pass is made.
        self._next = self._look = self._rest = 0.0
        self.named: set[str] | None = None
        self._full = -self.full
        self._found: object = None  # the listing before the last pass, if the one before failed

    def due(self, seconds: float) -> bool:
        """Waits until the next pass is due, at most ``seconds``; whether it is."""
        until, due, before = time.monotonic() + seconds, self._next, self._found
        if before is not None:  # the last two passes failed: a notification only causes a look at the listing
            self._stop.wait(max(0.0, min(until, due, self._rest) - time.monotonic()))
            if time.monotonic() < min(due, self._rest):
                return False
            due = min(due, self._look)
        told = self._changes.wait(min(until, due) - time.monotonic())
        if not told and time.monotonic() < due:
            return False
        self.named = self._changes.named() if time.monotonic() - self._full < self.full else None
        if self.named is None:
            self._full = time.monotonic()
        self._look = time.monotonic() + self._apart
        self._found = listing_of(self._place, self._spec.select) if self.pauses else None
        return before is None or self._found != before or time.monotonic() >= self._next

    def add(self, event: Outcome | WsyncError) -> WsyncError | None:
        """Counts a pass; an error that says so where more than ``max_failures`` failed in a row (-1: never)."""
        failed = isinstance(event, WsyncError) or event.status == "failed"
        later = not isinstance(event, WsyncError) and event.kind == RetryLater.kind
        self.failures = self.failures + 1 if failed else 0
        self.pauses = self.pauses + 1 if failed or later else 0
        pause = pause_after(self.pauses, self._spec.poll) if self.pauses else self._spec.poll
        self._next = time.monotonic() + pause
        self._look = self._rest = time.monotonic() + self._apart
        if not self.pauses:
            self._found = None
        bound = self._spec.max_failures
        if not 0 <= bound < self.failures:
            return None
        reason = event if isinstance(event, WsyncError) else event.reason
        passes = "1 pass" if self.failures == 1 else f"{self.failures:,} passes in a row"
        return WsyncError(
            f"{passes} failed, and --max-failures is {bound}: the watch ends. Remove the cause of the last failure, "
            f"then start it again: {reason}"
        )

    def close(self) -> None:
        self._changes.close()


class Idle:
    """Makes a watch's passes, and has them look at no more than may have changed since the last one.

    Where notifications tell all, a pass looks at the files that they name. Where they name none, and neither the
    place's times nor those of the live file have moved (a memory map writes without a word), the last outcome is
    repeated. Among 100,000 files a listing takes a third of a second.
    """

    def __init__(self, syncer: Syncer) -> None:
        self._syncer = syncer
        self._last: tuple[object, object, Outcome] | None = None  # what ``_look`` gave, and what a pass then found

    def once(self, named: set[str] | None) -> Outcome:
        """As ``Syncer.once``.

        Args:
            named: files of the place that were notified since the last pass; None if others may have changed.
        """
        started, (live, place), last = time.perf_counter(), self._look(), self._last
        is_known = named is not None and live is not None and last is not None and last[0] == live
        if last and last[2].status == "rejected" and self._syncer.record.is_outdated():
            is_known = False
        if last and is_known and not named and last[1] == place:
            seconds = round(time.perf_counter() - started, 6)
            return replace(last[2], seconds=seconds, warning=None, passed_over=(), casts=())
        only = named if last and is_known and last[2].status == "current" else None
        outcome = self._syncer.once(only=only or None)
        is_settled = outcome.status in ("current", "rejected") and not outcome.newer
        self._last = (live, place, outcome) if is_settled else None
        return outcome

    def _look(self) -> tuple[object, object]:
        """What is live and its file's times, and those of the place; None if they do not tell what is there."""
        place = self._syncer.getter.checkpoints
        try:
            segment = self._syncer.standing.segment
            live = segment.live() if segment else None
            if not live or not live.checkpoint or self._syncer.record.pin():
                return None, None
            infos = [os.stat(path) for path in (live.checkpoint, place)]
        except (OSError, WsyncError):  # a pass reports it
            return None, None
        file, directory = [(i.st_ino, i.st_size, i.st_mtime_ns, i.st_ctime_ns) for i in infos]
        return (live, file), directory


def run(syncer: Syncer, stop: threading.Event, tell: Callable[[Outcome | WsyncError], None]) -> bool:
    """Runs passes until ``stop`` is set: at each notification, and at least every ``spec.poll`` seconds.

    Before the first pass it reads the policy's layout, unless that is known to fit. After passes that failed, or whose
    gate asked for later, it pauses longer.

    Args:
        tell: called with the outcome of each pass; with an error if the pass failed.

    Returns:
        Whether it was stopped; False if more than ``spec.max_failures`` passes failed in a row.

    Raises:
        UsageError: the first pass finds that a setting is wrong.
    """
    place = syncer.getter.checkpoints
    schedule, passes = Schedule(syncer.spec, place, stop), Idle(syncer)
    passed = False  # after that, a wrong setting is not one that the operator has just made
    event: Outcome | WsyncError
    syncer.box.stop = stop
    if away := remote(place):
        away.store.stop = stop
    try:
        while not stop.is_set():
            if not schedule.due(syncer.spec.poll):
                continue
            try:
                if not passed:
                    syncer.prepare()
                event, passed = passes.once(schedule.named), True
            except WsyncError as exc:
                if isinstance(exc, UsageError) and not passed:
                    raise
                event = exc
            if last := schedule.add(event):
                tell(last)
                return False
            tell(event)
            idle = isinstance(event, WsyncError) or event.status != "published"
            if idle and (segment := syncer.standing.opened):
                segment.unmap()  # until the next publish
    except Stopped:
        pass
    finally:
        schedule.close()
    return True
