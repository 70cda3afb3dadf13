"""When a group's rank 0 looks for checkpoints: it never waits longer than the others may wait for a sign of life."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from .changes import Changes
from .errors import WsyncError
from .group import BEAT
from .outcome import Outcome
from .retry import Failures, pause_after
from .source import listing_of
from .spec import Spec


class Pace:
    """When rank 0 looks: at each notification, every ``poll`` seconds, and more rarely after passes that failed."""

    def __init__(self, spec: Spec, place: Path, stop: threading.Event) -> None:
        self._spec, self._place = spec, place
        self._changes = Changes(place, spec.poll, stop, spec.select.marker)
        self._failures = Failures(self._changes, self._listing, self._spec.poll, stop)
        self._next = 0.0  # when it is due, by the monotonic clock
        self._look = 0.0  # when the place is listed again after a failure, which may be a request to a store
        self._tried: object = None

    def mood(self) -> str:
        """Waits for what may be new, but not longer than the others may wait for a sign of life."""
        failing = self._failures.pauses > 0
        left = self._next - time.monotonic()
        told = left > 0 and self._changes.wait(min(left, BEAT))
        if failing and self._tried is not None and (told or time.monotonic() >= self._look):
            told = self._listing() != self._tried
            self._look = time.monotonic() + self._spec.poll
        if not told and time.monotonic() < self._next:
            return "failure" if failing else "idle"
        self._tried = self._listing() if failing else None
        return "due"

    def add(self, event: Outcome | WsyncError) -> WsyncError | None:
        """Counts a pass, as ``Failures.add``."""
        last = self._failures.add(event, self._spec.max_failures)
        pauses = self._failures.pauses
        self._next = time.monotonic() + (pause_after(pauses, self._spec.poll) if pauses else self._spec.poll)
        return last

    def close(self) -> None:
        self._changes.close()

    def _listing(self) -> object:
        return listing_of(self._place, self._spec.select)
