"""How a pass's checkpoint reaches the readers: on this box alone, or on all boxes of a group (``fleet``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.fit import Fit
from ..history.outcome import Outcome
from ..segment.writable import WritableSegment
from .box import Box
from .looks import Look
from .passes import Pass

T = TypeVar("T")


class Route(Protocol):
    """What a pass is given."""

    def busy(self, work: Callable[[], T]) -> T:
        """Returns what this work returns; it may take long, for a store may not answer."""
        ...

    def deliver(self, this: Pass, segment: WritableSegment, checkpoint: Checkpoint, fit: Fit, look: Look) -> Outcome:
        """Publishes an opened checkpoint.

        Raises:
            WsyncError: it was not published; what was live stays live.
        """
        ...


class OneBox:
    """The route of a watch or a push that keeps one box."""

    def __init__(self, box: Box) -> None:
        self._box = box

    def busy(self, work: Callable[[], T]) -> T:
        return work()

    def deliver(self, this: Pass, segment: WritableSegment, checkpoint: Checkpoint, fit: Fit, look: Look) -> Outcome:
        outcome = self._box.put_live(this, segment, checkpoint, fit, look)
        if outcome.status == "published":
            self._box.keep(segment)
        return outcome
