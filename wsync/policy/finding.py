"""Finds out whether a reader's segment still exists, and which segment replaced it."""

from __future__ import annotations

import time
from contextlib import suppress

from ..errors import SegmentError
from ..segment.files import REMOVED
from ..segment.segment import Segment

_SELDOM, _SELDOM_SECONDS = 64, 1.0  # calls at most, and seconds, between two looks at the segment's directory


class Schedule:
    """When a reader that is called between steps is to look at its segment's directory.

    A look at the clock would double what an idle call costs: so many calls do without as took no second before.
    """

    def __init__(self) -> None:
        self._calls = 1
        self._clock = self._looked = 0.0

    def next(self) -> tuple[int, bool]:
        """How many calls may come until the next one of this, and whether now is the time."""
        now = time.monotonic()
        took, self._clock = max(now - self._clock, 1e-9), now
        self._calls = max(1, min(_SELDOM, 2 * self._calls, int(self._calls * _SELDOM_SECONDS / took)))
        due = now - self._looked >= _SELDOM_SECONDS
        if due:
            self._looked = now
        return self._calls, due


def is_gone(segment: Segment) -> bool:
    """Whether it was removed, or something outside wsync removed or cut a file of it."""
    try:
        return not segment.is_current() or bool(segment.damage())
    except OSError:  # the system does not tell; what is mapped is there
        return False


def what_became_of(segment: Segment) -> str:
    """The end of a sentence that says why it is gone."""
    with suppress(OSError):
        return segment.damage() or "was removed"
    return "was removed"


def find_again(segment: Segment) -> Segment | None:
    """The segment of the same name and layout that stands where this one was; None while there is none."""
    try:
        found = Segment.open(segment.name, segment.path.parent, layout=segment.layout)
    except SegmentError:
        return None
    if found.word & 0xFF == REMOVED or found.damage():  # the same still, or another on its way out
        found.close()
        return None
    return found
