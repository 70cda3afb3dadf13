"""Finds out whether a reader's segment still exists, and which segment replaced it."""

from __future__ import annotations

import logging
import time
from contextlib import suppress

from ..errors import SegmentError
from ..segment.segment import Segment
from ..segment.segment_files import REMOVED

_log = logging.getLogger("wsync")


class Lookout:
    """Says when a reader that is called between steps must look at its segment's directory.

    Reading the clock would double the cost of an idle call, so it is read only once in as many calls as took a second
    before.

    Args:
        most: calls that may go by without reading it.
    """

    seconds = 1.0  # between two looks

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._calls = 1
        self._clock = self._looked = 0.0

    def next(self) -> tuple[int, bool]:
        """The number of calls to skip before the next check, and whether to look now."""
        now = time.monotonic()
        took, self._clock = max(now - self._clock, 1e-9), now
        self._calls = max(1, min(self._most, 2 * self._calls, int(self._calls * self.seconds / took)))
        due = now - self._looked >= self.seconds
        if due:
            self._looked = now
        return self._calls, due


def is_gone(segment: Segment) -> bool:
    """Whether the segment was removed, or something outside wsync removed or cut a file of it."""
    try:
        return not segment.is_current() or bool(segment.damage())
    except OSError:  # the system does not say; what is mapped stays there
        return False


class Search:
    """Looks for the segment that replaces one that is gone, not too often; says once that it is gone."""

    seconds = 0.1  # between two looks

    def __init__(self) -> None:
        self._next = 0.0

    def find(self, segment: Segment, version: int) -> Segment | None:
        """The segment of the same name and layout that now stands there; None if there is none yet.

        Args:
            version: that the policy keeps.
        """
        now = time.monotonic()
        if now < self._next:
            return None
        if not self._next:
            what = "was removed"
            with suppress(OSError):
                what = segment.damage() or what
            _log.warning("segment %r %s; the policy keeps version %d", segment.name, what, version)
        self._next = now + self.seconds
        try:
            found = Segment.open(segment.name, segment.path.parent, layout=segment.layout)
        except SegmentError:
            return None
        if found.word & 0xFF == REMOVED or found.damage():  # still the same one, or another that is being removed
            found.close()
            return None
        return found

    def over(self) -> None:
        """Ends the search: the reader has what was found."""
        self._next = 0.0
