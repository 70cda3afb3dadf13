"""Tells a watch when it need not list a place again: no notification came, and the place's own times are unchanged.

Among 10,000 files a listing a second took 15 % of a core. A full look still comes now and then (see ``loop``).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from ..checkpoints.files import remote
from ..history.outcome import Outcome
from ..segment.files import Publication
from .passes import Pass

Times = tuple[int, ...]


class Idle:
    """The last pass that left all as it was.

    Args:
        place: where checkpoints appear.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        self._last: tuple[Publication | None, Times, Outcome] | None = None

    def times(self, live: Publication | None) -> Times | None:
        """The directory's own times, and those of what is live, which a memory map may write to without a word.

        None where they do not tell what is in it.
        """
        if remote(self._place) or not live:
            return None
        try:
            infos = [os.stat(path) for path in (self._place, live.source)]
        except OSError:
            return None
        return tuple(number for i in infos for number in (i.st_ino, i.st_size, i.st_mtime_ns, i.st_ctime_ns))

    def keep(self, this: Pass, times: Times | None, outcome: Outcome) -> Outcome:
        """Remembers the outcome of a full pass, if the next one would have the same."""
        is_settled = outcome.status in ("current", "rejected") and not outcome.newer
        self._last = (this.live, times, outcome) if times and is_settled and not this.force else None
        return outcome

    def again(self, this: Pass, times: Times | None) -> Outcome | None:
        """The same outcome once more; None where something moved."""
        if not self._last or self._last[:2] != (this.live, times):
            return None
        seconds = round(time.perf_counter() - this.started, 6)
        return self._last[2]._replace(seconds=seconds, warning=None, passed_over=(), casts=())
