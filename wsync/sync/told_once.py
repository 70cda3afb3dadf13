"""What a pass reports only once: unfinished checkpoints, files of other policies, late arrivals that count as older.

These do not count as a refusal of the newest checkpoint: the live version is current, and a monitor hears of them once.
"""

from __future__ import annotations

import time
from pathlib import Path

from ..errors import (
    BeingWritten,
    CheckpointError,
    CheckpointRejected,
    ForeignCheckpoint,
    IncompleteCheckpoint,
    PartialCheckpoint,
    WsyncError,
)
from ..history.outcome import Outcome
from ..history.record import Record
from ..places.candidates import Candidate
from ..segment.files import Publication
from .choosing import Choice

ABANDONED = "Nothing has written to it for a long time: it is passed over until it changes."
NEW_RUN = "The live checkpoint is gone, and every checkpoint here arrived after it: this is taken as a new run."
_LONG_AGO = 600.0  # seconds without a write after which nobody is thought to finish a checkpoint


def is_abandoned(exc: WsyncError, candidate: Candidate) -> bool:
    """Whether a checkpoint is incomplete, and nobody has written to it for long."""
    is_half = isinstance(exc, IncompleteCheckpoint) and not isinstance(exc, BeingWritten | PartialCheckpoint)
    return is_half and bool(candidate.name) and time.time() - candidate.mtime_ns / 1e9 > _LONG_AGO


def remember(record: Record, exc: CheckpointError | WsyncError, refusal: Outcome) -> None:
    """Remembers what stays refused, and what is passed over from now on."""
    is_half = isinstance(exc, IncompleteCheckpoint) and refusal.status == "rejected"
    if isinstance(exc, CheckpointRejected):
        record.refuse(refusal.identity, exc.message, refusal)
    if isinstance(exc, ForeignCheckpoint) or (is_half and refusal.reason and refusal.reason.endswith(ABANDONED)):
        record.pass_over(refusal.identity, exc.kind, refusal)


def late(record: Record, live: Publication, choice: Choice, order: str) -> str | None:
    """Says that a checkpoint arrived after what is live, and counts as older; None where that was said."""
    told_until = record.told_until() if choice.late else 0
    found = [candidate for candidate in choice.late if candidate.arrived_ns > told_until]
    if not found:
        return None
    last = max(found, key=lambda candidate: candidate.arrived_ns)
    record.told_of(last.arrived_ns)
    return (
        f'{last.path} arrived after {Path(live.source).name} went live, and counts as older (order = "{order}"). If '
        'it should be live, set order = "arrival" in [select] (--order arrival), or push it by its name.'
    )
