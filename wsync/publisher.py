"""The writing side: stage a checkpoint into a spare slot, verify it, make it live.

Everything here runs under the publisher's lock. What is staged is checked before anything points to it; whatever goes
wrong before the WORD is stored leaves the live version as it was.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable

from .checkpoint import Checkpoint
from .layout import Layout
from .segment import Segment
from .segment_files import Publication


def publish(
    segment: Segment,
    checkpoint: Checkpoint,
    *,
    spec: str = "",
    progress: Callable[[int], None] | None = None,
) -> Publication:
    """Stages, verifies and publishes a checkpoint; the caller holds ``segment.publishing()``.

    Args:
        spec: fingerprint of the policy spec, recorded with the version.
        progress: called with the number of bytes of each read.

    Raises:
        CheckpointRejected: it does not fit, or is not finite.
        CheckpointChanged: it changed while it was read.
        SegmentBusy: every spare slot is leased.
    """
    plan = checkpoint.plan(segment.layout)
    with segment.spare_slot() as slot:
        with slot.weights as weights:
            checkpoint.read_into(weights, plan, progress=progress)  # P4 stage, P5 verify
        publication = Publication(
            version=segment.version + 1,
            step=checkpoint.step,
            source=str(checkpoint.path),
            identity=checkpoint.identity,
            published_at=time.time(),
            spec=spec,
        )
        slot.describe(publication)
    segment.store(publication.version, slot.number)
    return publication


def rehearse(layout: Layout, checkpoint: Checkpoint, progress: Callable[[int], None] | None = None) -> None:
    """Everything that ``publish`` checks, in memory of this process that is given back.

    Raises:
        CheckpointRejected: it does not fit, or is not finite.
        CheckpointChanged: it changed while it was read.
    """
    plan = checkpoint.plan(layout)
    with mmap.mmap(-1, max(layout.nbytes, 1)) as memory, memoryview(memory) as weights:
        checkpoint.read_into(weights, plan, progress=progress)
