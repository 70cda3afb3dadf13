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

    Reading the clock would double the cost of an idle call, so it is read only once in about as many calls as are made
    in a second.

    Args:
        most: most calls between two readings of the clock.
    """

    seconds = 1.0  # between two looks

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._calls = 1
        self._clock = self._looked = 0.0

    def next(self) -> tuple[int, bool]:
        """The number of calls until the clock is read again, and whether to look at the directory now."""
        now = time.monotonic()
        took, self._clock = max(now - self._clock, 1e-9), now
        self._calls = max(1, min(self._most, 2 * self._calls, int(self._calls * self.seconds / took)))
        due = now - self._looked >= self.seconds
        if due:
            self._looked = now
        return self._calls, due


def is_gone(segment: Segment) -> bool:
    """Whether the segment was removed or is being removed, or something outside wsync removed or cut a file of it."""
    try:
        return not segment.is_current() or segment.word & 0xFF == REMOVED or bool(segment.damage())
    except OSError:  # unknown; what is mapped stays usable
        return False


class Search:
    """Looks, not too often, for the segment that replaces one that is gone; warns once that it is gone."""

    seconds = 0.1  # between two looks

    def __init__(self) -> None:
        self._next = 0.0

    def find(self, segment: Segment, version: int) -> Segment | None:
        """Opens the new segment of the same name and layout; None if the old one is not gone, or there is no new one.

        Args:
            version: the version that the policy keeps, for the warning.
        """
        now = time.monotonic()
        if now < self._next or not is_gone(segment):
            return None
        if not self._next:
            what = "was removed"
            with suppress(OSError):
                if segment.is_current():  # else its files may be gone because it was removed
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
        """Ends the search: the reader now uses the segment that was found."""
        self._next = 0.0
