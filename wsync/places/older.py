"""What a listing may leave out: files that are older than what is live, and did not arrive after it.

Of these a place may have 100,000, and a pass has nothing to say of any. One that counts is kept, to tell that what is
live lies beside others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..checkpoints.files import written
from ..layout.filenames import FORMS, SUFFIX
from .candidates import Candidate

Told = Callable[[str], int | None]
_ANY = 1 << 63


@dataclass(frozen=True, slots=True)
class Older:
    """Tells them by one look at each.

    Attributes:
        where: what is live, which is never left out.
        mtime_ns: before when they were written.
        arrived_ns: until when they arrived.
        told: gives the step of a name, where the order is by step.
        step: which theirs is lower than.
    """

    where: str
    mtime_ns: int
    arrived_ns: int
    told: Told | None = None
    step: int = 0

    def without(self, entries: Iterable[os.DirEntry[str]], counts: Callable[[str], bool]) -> Iterator[os.DirEntry[str]]:
        """The entries but these; of them the first that counts by its name stays."""
        is_kept = False
        for entry in entries:
            if self._has(entry):
                if is_kept or not counts(entry.name):
                    continue
                is_kept = True
            yield entry

    def _has(self, entry: os.DirEntry[str]) -> bool:
        name = entry.name
        if not name.endswith(SUFFIX) or name in FORMS or entry.path == self.where:
            return False
        try:
            if not entry.is_file(follow_symlinks=False):
                return False
            info = entry.stat(follow_symlinks=False)
        except OSError:  # told where it is looked at as a candidate
            return False
        if info.st_mtime_ns >= self.mtime_ns or info.st_ctime_ns > self.arrived_ns:
            return False
        return self.told is None or ((step := self.told(name)) is not None and step < self.step)


def older_than(live: Candidate, order: str, told: Told | None) -> Older | None:
    """What is older than what is live; None where a listing has to have all.

    Args:
        live: with its path below the place as its name.
        told: gives the step of a name, where the order is by step and names are known to count as the metadata do.
    """
    where, arrived = str(live.location), live.arrived_ns
    try:
        info = os.stat(where)
    except OSError:
        info = None  # gone: by step, the newest of the others has to tell whether names count as metadata do
    if order == "mtime":
        return Older(where, min(live.mtime_ns, written(info)) if info else live.mtime_ns, arrived)
    if order == "arrival":
        return Older(where, _ANY, min(arrived, info.st_ctime_ns - 1) if info else arrived)
    if order == "step" and info and told and (step := told(live.name)) is not None:
        return Older(where, _ANY, arrived, told, step)
    return None
