"""One pass as a record (what it is for, when it began, what was live), and a pure function that says what it tries."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..discovery.newest import Candidate
from ..errors import CheckpointError, RetryLater, on_one_line
from ..history.pins import Pin
from ..segment.publication import Publication
from ..segment.segment import Segment
from .outcome import Outcome, status_of

if TYPE_CHECKING:
    from ..segment.publishing import Gate


class Pass(NamedTuple):
    """What stays the same during one pass.

    Attributes:
        name: of the segment.
        live: what was live when the pass last looked.
        started: when it began, by ``time.perf_counter``.
        force: publish the newest checkpoint again even if it is live.
        dry_run: check everything, publish nothing.
        only: the files of the place that may have changed since a pass found that what is live is current; None if any
            may have.
        again: start over if an object of a store was overwritten while it was read. On a disk its writer may still be
            at work, and a notification comes when it is done.
    """

    name: str
    live: Publication | None
    started: float
    force: bool = False
    dry_run: bool = False
    only: Collection[str] | None = None
    again: bool = False

    def at(self, segment: Segment | None) -> Pass:
        """The same pass with what is live by now."""
        return self._replace(live=segment.live() if segment else None)

    def outcome(self, status: str, **more: object) -> Outcome:
        """What the pass did; the version is the one that is live."""
        version, seconds = self.live.version if self.live else 0, round(time.perf_counter() - self.started, 6)
        return Outcome(status, self.name, **{"version": version, "seconds": seconds, **more})  # type: ignore[arg-type]

    def standing(self, status: str, **more: object) -> Outcome:
        """The outcome of a pass that leaves the live version alone, with that version's step and checkpoint."""
        about = {"step": self.live.step, "checkpoint": self.live.checkpoint} if self.live else {}
        return self.outcome(status, **about, **more)

    def pinned(self, pin: Pin) -> Outcome:
        """The outcome of a pass that a pin of this box holds."""
        reason = f"{pin.name} is pinned ({pin.reason}); `wsync unpin {self.name}` goes on with the newest"
        return self.standing("pinned", reason=reason, pin=pin.name)

    def refusal(self, exc: CheckpointError | RetryLater, *, named: bool, **about: object) -> Outcome:
        """The outcome if a checkpoint was refused, or must be tried later.

        Args:
            named: it was named itself, and not found in a directory.
            about: step, path and identity of the checkpoint.
        """
        reason = on_one_line(exc.message, str(about.get("checkpoint") or ""))
        more = {"reason": reason, "differences": exc.differences, "kind": exc.kind, **about}
        return self.outcome(status_of(exc, named), **more)


class Recheck(NamedTuple):
    """What a pass checks again under the publisher's lock, because it may have begun minutes ago.

    Attributes:
        before: called before a byte is staged, with what is live by now; an outcome from it ends the pass.
        staged: called when the weights are staged and checked; what it raises leaves them unpublished.
    """

    before: Callable[[Pass], Outcome | None]
    staged: Gate


class Choice(NamedTuple):
    """What a pass tries.

    Attributes:
        todo: candidates, newest first; the first one that can be published goes live.
        refused: the newest candidate, if it was refused before and is not tried again.
        pin: the pin that holds; no candidate is tried.
        late: candidates that count as older than what is live, although they arrived after it.
        is_new_run: what is live is gone, and all candidates arrived after it.
        nothing: why the place offers nothing to choose from; see ``Look``.
    """

    todo: tuple[Candidate, ...] = ()
    refused: Candidate | None = None
    pin: Pin | None = None
    late: tuple[Candidate, ...] = ()
    is_new_run: bool = False
    nothing: str = ""


def choose(
    newer: Sequence[Candidate],
    live: Publication | None,
    refusals: Collection[str],
    pin: Pin | None,
    *,
    passed: Collection[str] = (),
    force: bool = False,
) -> Choice:
    """Chooses what a pass tries; nothing if what is live stays live.

    Args:
        newer: the candidates that are newer than what is live, newest first.
        refusals: identities of checkpoints that were refused before.
        passed: identities of those that are skipped silently while something is live: each was reported once.
        pin: the pin that holds; it comes before everything else.
        force: try refused candidates again.
    """
    if pin:
        return Choice(pin=pin)
    if force:
        return Choice(tuple(newer))
    todo = tuple(candidate for candidate in newer if candidate.identity not in refusals)
    first = next((candidate for candidate in newer if not live or candidate.identity not in passed), None)
    return Choice(todo, first if first and first.identity in refusals else None)
