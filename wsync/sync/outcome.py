"""The outcome of one pass, for the terminal, the log and programs."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, asdict, dataclass, replace
from typing import Any

from ..errors import (
    BeingWritten,
    CheckpointError,
    Difference,
    IncompleteCheckpoint,
    RetryLater,
    printable,
)
from ..segment.publication import Publication, Version

EXIT_CODES = {
    "published": 0,
    "current": 0,
    "pinned": 0,
    "checked": 0,
    "failed": 1,
    "rejected": 65,
    "empty": 66,
    "busy": 75,
}


@dataclass(frozen=True, slots=True)
class Outcome(Version):
    """What one pass did. Its version is the live one; the rest of ``Version`` tells the checkpoint that it is about.

    Attributes:
        status: a key of ``EXIT_CODES``; ``checked`` is a dry run that would have published.
        name: of the segment.
        bytes: of weights that were staged.
        seconds: that the pass took.
        readers: living readers.
        reason: why nothing was published; of a dry run, what it left out.
        differences: what does not fit.
        backwards: the step is lower than that of the version before.
        passed_over: newer candidates that were refused on the way to this one.
        pin: the pinned checkpoint, if a pin holds.
        known: whether an earlier run refused and reported it.
        kind: of the error that refused it, in one word; empty if this pass did not refuse it.
        newer: path of a checkpoint that is newer than what is live, but not complete yet; the reason says why.
        warning: what an operator may want to change; some of it is given only once.
        casts: what is converted, if this pass was the first to do it.
        live: what is live, for a refusal that was known before.
    """

    status: str
    name: str
    _: KW_ONLY
    bytes: int = 0
    seconds: float = 0.0
    readers: int = 0
    reason: str | None = None
    differences: tuple[Difference, ...] = ()
    backwards: bool = False
    passed_over: tuple[Outcome, ...] = ()
    pin: str | None = None
    known: bool = False
    kind: str = ""
    newer: str | None = None
    warning: str | None = None
    casts: tuple[str, ...] = ()
    live: Publication | None = None

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.status]

    def warned(self, text: str) -> Outcome:
        """Adds a warning to the one that it may have, which is given only once; an empty text adds nothing."""
        return replace(self, warning=" ".join(filter(None, (self.warning, text))) or None)

    def told_before(self) -> Outcome:
        """Turns a refusal that an earlier push reported into the outcome of a later one: current, with a note."""
        if not (self.known and self.live):
            return self
        file = os.path.basename(self.checkpoint or "")
        again = f"`wsync push --retry` tries {printable(file)} again, which was rejected before: {self.reason}"
        return replace(self, **{**self.live.which(), "version": self.version}, status="current", reason=again)

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON; ``from_dict`` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Outcome:
        """Reads what ``to_dict`` wrote."""
        return cls(
            **{
                **told,
                "differences": tuple(Difference(**row) for row in told["differences"]),
                "passed_over": tuple(cls.from_dict(each) for each in told["passed_over"]),
                "casts": tuple(told["casts"]),
                "live": Publication(**told["live"]) if told["live"] else None,
            }
        )


def status_of(exc: CheckpointError | RetryLater, named: bool) -> str:
    """The status for an error. A half-written file in a directory is ignored; one that was named is refused."""
    if named and isinstance(exc, IncompleteCheckpoint) and not isinstance(exc, BeingWritten):
        return "rejected"
    return next((status for status in ("rejected", "empty", "busy") if EXIT_CODES[status] == exc.exit_code), "failed")
