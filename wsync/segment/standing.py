"""A publisher's segment, which others may remove and make anew at any time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import SegmentDamaged, SegmentMissing
from ..layout.layout import Layout
from ..system.access import Access
from ..system.memory import runtime_dir
from .segment_files import BOUND, SLOTS
from .writable import WritableSegment


class StandingSegment:
    """A publisher's segment: opened when it is first needed, and again after it was removed.

    Args:
        name: name of the segment.
        layout: returns the layout for a new segment; None if it is unknown.
        slots: slots of a new segment, each a full buffer of weights.
        max_slots: most slots that it may grow to while readers keep older versions.
        runtime_dir: where segments live; default ``memory.runtime_dir()``.

    Attributes:
        spec: fingerprint of the policy spec that a new segment is made for.
        access: who else may read the segment.
        last_version: the highest version ever published under this name; a segment that is made anew counts on from it.
    """

    def __init__(
        self,
        name: str,
        layout: Callable[[], Layout] | None = None,
        slots: int = SLOTS,
        max_slots: int = BOUND,
        runtime_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.name, self.slots, self.max_slots, self.runtime_dir = name, slots, max_slots, runtime_dir
        self.spec, self.access, self.last_version = "", Access(), 0
        self._layout = layout
        self._segment: WritableSegment | None = None

    @property
    def segment(self) -> WritableSegment | None:
        """The segment, opened anew if it was removed and made again; None if it does not exist."""
        if self._segment and (not self._segment.is_current() or self._segment.damage()):
            self.last_version = max(self.last_version, self._segment.version)
            self._segment.control.tell_removed()
            self.close()
        if self._segment is None:
            try:
                self._segment = WritableSegment.open(self.name, self.runtime_dir)
            except (SegmentMissing, SegmentDamaged):  # ``make_segment`` makes a new one
                return None
            if self._segment.damage():
                self.close()
        return self._segment

    @property
    def path(self) -> Path:
        """The segment's directory, even if it does not exist."""
        return runtime_dir(self.runtime_dir) / self.name

    @property
    def opened(self) -> WritableSegment | None:
        """The segment that is open here, which may have been removed meanwhile; None if none is open."""
        return self._segment

    def make_segment(self, otherwise: Callable[[], Layout] | None = None) -> WritableSegment:
        """Opens the segment, or makes a new one.

        Args:
            otherwise: returns the layout for a new segment if the publisher does not know it.

        Raises:
            SegmentMissing: it does not exist, and its layout is unknown.
            OutOfSharedMemory: there is no room for it.
        """
        standing = self.segment
        if standing is None:
            layout = self._layout or otherwise
            if layout is None:
                raise SegmentMissing(
                    f"there is no segment {self.name!r}, and the updater does not know its layout. Give the updater "
                    "policy=, or attach a policy first."
                )
            self._segment = standing = WritableSegment.create(
                self.name, layout(), self.runtime_dir, slots=self.slots, spec=self.spec, access=self.access
            )
        else:
            standing.share(self.access)
        standing.control.bound = self.max_slots
        return standing

    def close(self) -> None:
        """Closes the segment, which continues to exist; the next use opens it again."""
        segment, self._segment = self._segment, None
        if segment:
            segment.close()
