"""Lists the other segments, for a reader that waits for one that nobody publishes."""

from __future__ import annotations

import difflib
import os
from contextlib import suppress
from pathlib import Path

from ..errors import SegmentError, printable
from ..system.memory import default_runtime_dir
from .segment import segments

_SHOWN = 8


def told_of_neighbours(name: str, base: Path) -> str:
    """A sentence for each place where segments are: first ``base``, then what other users have beside it.

    Args:
        name: whose nearest relatives come first.
    """
    told = ""
    with suppress(SegmentError, OSError):
        there = [other for other in segments(base) if other != name]
        told = f"There are {_listed(name, there)}. " if there else "There is no other segment. "
    pattern = default_runtime_dir().name.rpartition("-")[0] + "-*"
    for place in sorted(base.parent.glob(pattern)):
        with suppress(SegmentError, OSError):  # most of them are closed to us
            if place != base and (there := segments(place)):
                told += f"In {printable(os.fspath(place))} (runtime_dir=) there are {_listed(name, there)}. "
    return told


def _listed(name: str, there: list[str]) -> str:
    near = difflib.get_close_matches(name, there, n=_SHOWN)
    ordered = [*near, *(other for other in there if other not in near)]
    more = len(ordered) - _SHOWN
    return ", ".join(map(repr, ordered[:_SHOWN])) + (f" and {more} more" if more > 0 else "")
