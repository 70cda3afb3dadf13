"""One box as a member of its group: what it reports, and which of its versions came from the group."""

from __future__ import annotations

from ..errors import SegmentBusy, WsyncError
from ..history.pins import Pin
from ..segment.publication import Publication
from ..segment.segment import Segment
from ..sync.put_live import Box
from .group import Group
from .membership import GroupFile
from .reconcile import Report


class Member:
    """What one box knows about itself between two rounds.

    Attributes:
        settled: whether all boxes have had the same version once; what goes live after that counts as the group's.
        declined: identity of the group's live weights, if this box's gate refused them; else None.
        seen: the live version that this box reported last.
    """

    def __init__(self, box: Box, group: Group) -> None:
        self.settled, self.seen = False, 0
        self.declined: str | None = None
        self._box, self._group = box, group
        self._file: GroupFile | None = None
        self._pin: Pin | None = None  # the pin that this box reported last
        self._last = (0, "")  # the highest version on record here, and its identity

    def begin(self) -> None:
        """Looks up the highest version that was published here before."""
        self._last = self._box.record.last_published()

    def report(self, due: bool) -> Report:
        """What this box has; if that cannot be read, the round raises the error."""
        try:
            segment = self._box.standing.segment
            live = segment.live() if segment else None
            pin = self._pin = self._box.record.pin()
            if segment:
                self.show_group(segment)
        except (WsyncError, OSError):
            return Report(last=self._last[0], last_identity=self._last[1], due=due)
        version, identity = (live.version, live.identity) if live else (0, "")
        self.seen = version
        if version >= self._last[0]:
            self._last = (version, identity)
        known = self._file is not None and live is not None and self._file.came_from_group(live)
        ours = live is None or known or (self.settled and self.declined is None)
        held = pin is not None and live is not None and pin.holds(live)
        return Report(version, identity, *self._last, ours, pin.name if pin else "", held, self.declined, due)

    def show_group(self, segment: Segment) -> None:
        """Shows in the segment which group this box is in."""
        if self._file and self._file.is_at(segment.path):
            return
        self.close()
        about = {"run": self._group.run, "rank": self._group.rank, "size": self._group.size, "boxes": self._group.names}
        self._file = GroupFile(segment.path, about)

    def check_unchanged(self, segment: Segment) -> None:
        """Raises SegmentBusy if another publisher published, or the pin was changed, since this box reported."""
        if segment.version != self.seen:
            raise SegmentBusy(
                f"version {segment.version} went live while the group was about to publish. The next pass sends that "
                "version to all boxes first."
            )
        if self._box.record.pin() != self._pin:
            raise SegmentBusy("the pin was changed while the group was about to publish. The next pass obeys it.")

    def takes(self, weights: Publication) -> None:
        """Records, before a version is live, that it comes from the group."""
        if self._file:
            self._file.record(weights.version, weights.identity)

    def took(self, weights: Publication) -> None:
        """Records that the group's version is live here."""
        self.seen, self._last, self.declined = weights.version, (weights.version, weights.identity), None

    def close(self) -> None:
        if self._file:
            self._file.close()
