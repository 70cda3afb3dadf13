"""What a pass reports only once: unfinished checkpoints, files of other policies, late arrivals, and conversions.

None of these counts as a refusal of the newest checkpoint: the live version stays current.
"""

from __future__ import annotations

import time
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..discovery.newest import Candidate
from ..errors import (
    BeingWritten,
    CheckpointError,
    CheckpointRejected,
    ForeignCheckpoint,
    IncompleteCheckpoint,
    OpenForWriting,
    PartialCheckpoint,
    WsyncError,
)
from ..history.record import Record
from ..segment.publication import Publication
from .one_pass import Choice
from .outcome import Outcome

ABANDONED = "Nothing has written to it for a long time: it is passed over until it changes."
NEW_RUN = "The live checkpoint is gone, and every checkpoint here arrived after it: this is taken as a new run."
_LONG_AGO = 600.0  # seconds without a write after which a checkpoint counts as abandoned


def is_abandoned(exc: WsyncError, candidate: Candidate) -> bool:
    """Whether a checkpoint is incomplete, and nobody has written to it for long."""
    is_half = isinstance(exc, IncompleteCheckpoint) and not isinstance(exc, OpenForWriting | PartialCheckpoint)
    is_one_of_many = bool(candidate.name) or isinstance(exc, BeingWritten)
    arrived = candidate.arrived_ns if isinstance(exc, BeingWritten) else 0  # a copy that keeps times may be under way
    last = max(candidate.mtime_ns, arrived) / 1e9
    return is_half and is_one_of_many and time.time() - last > _LONG_AGO


def remember(record: Record, exc: CheckpointError, refusal: Outcome, *, abandoned: bool) -> None:
    """Remembers that a checkpoint stays refused, or is passed over from now on."""
    if isinstance(exc, CheckpointRejected):
        record.refuse(refusal.identity, exc.message, refusal)
    if isinstance(exc, ForeignCheckpoint) or abandoned:
        record.pass_over(refusal.identity, exc.kind, refusal)


def late(record: Record, live: Publication, choice: Choice, order: str) -> str | None:
    """Says that a checkpoint arrived after what is live, and counts as older; None if that was said."""
    reported = record.late_until() if choice.late else 0
    found = [candidate for candidate in choice.late if candidate.arrived_ns > reported]
    if not found:
        return None
    last = max(found, key=lambda candidate: candidate.arrived_ns)
    record.reported_late(last.arrived_ns)
    name = Path(live.checkpoint or "").name
    return (
        f'{last.path} arrived after {name} went live, and counts as older (order = "{order}"). If it should be live, '
        'set order = "arrival" in [select] (--order arrival), or push it by its name.'
    )


def casts(told: set[tuple[str, str]], checkpoint: Checkpoint) -> tuple[str, ...]:
    """Lines about each dtype conversion, and each missing tensor that gets the policy's own value.

    Args:
        told: tensors that were reported, and how; new ones are added.
    """
    groups: dict[str, list[str]] = {}
    if plan := checkpoint.planned:
        said = [(stored.name, f"cast from {stored.dtype} to {entry.dtype}") for stored, entry in plan.conversions]
        text = "missing from the checkpoint, with the values of the policy when it is built"
        said += [(entry.name, text) for entry in plan.built]
        for name, words in said:
            if (name, words) not in told:
                told.add((name, words))
                groups.setdefault(words, []).append(name)
    return tuple(
        f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {words}: "
        + ", ".join(names[:5])
        + (", …" if len(names) > 5 else "")
        for words, names in groups.items()
    )
