"""Says which readers have a version, and which versions they still use."""

from __future__ import annotations

import math
import time

from ..segment.reader_records import ReaderRecord
from ..segment.segment import Segment
from ..system.memory import deadline_of
from ..text import count, duration

_SHORTEST, _LONGEST = 0.02, 0.5  # seconds between two looks at the readers' records


def wait_for_readers(segment: Segment, version: int, timeout: float | None = None) -> list[ReaderRecord]:
    """Waits until every living reader has this version or a newer one.

    Readers that end meanwhile are not waited for any more; readers that attach meanwhile are.

    Args:
        timeout: seconds; None waits for ever.

    Returns:
        The readers that still have an older version when the time is up; empty if all have this one.

    Raises:
        UsageError: the timeout is not a number.
    """
    deadline, pause = deadline_of(timeout), _SHORTEST
    while late := [reader for reader in segment.readers() if reader.version < version]:
        left = math.inf if deadline is None else deadline - time.monotonic()
        if left <= 0:
            break
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST)
    return late


def behind(late: list[ReaderRecord], version: int) -> str:
    """Says which readers do not have a version yet, and what to do."""
    now = time.time()
    said = [f"{r.process} (pid {r.pid}), on version {r.version} for {duration(now - r.since)}" for r in late[:5]]
    more = f" and {len(late) - 5} more" if len(late) > 5 else ""
    return (
        f"{count(len(late), 'reader')} did not take version {version} in time: {'; '.join(said)}{more}. See whether "
        "they still call refresh(), or wait longer."
    )


def oldest_version(segment: Segment) -> int:
    """The oldest version that a living reader uses or keeps; without readers the live one, and 0 before the first.

    A trainer may delete or reuse what belongs to older versions.
    """
    held = [version for r in segment.readers() for version in (r.version, *segment.held_back(r)) if version]
    return min([*held, segment.version])
