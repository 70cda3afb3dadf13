"""Opens a segment for a reader and waits for its first version; says what exists, in case its name is misspelt."""

from __future__ import annotations

import difflib
import logging
import os
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from ..errors import AttachTimeout, SegmentDamaged, SegmentError, SegmentMissing, Stale, from_os_error, printable
from ..layout.layout import Layout
from ..segment.segment import Segment, segments
from ..segment.writable import WritableSegment
from ..system.memory import deadline_of, default_runtime_dir, runtime_dir
from .reader import Reader

_log = logging.getLogger("wsync")
_LOOK = 0.1  # seconds between two looks if no WORD will change
_SHOWN = 8  # most names of other segments in a message


class Opening:
    """Opens a segment for a new reader, makes it if needed, and waits for its first version.

    If the block fails, a segment that was made here is removed, unless somebody published to it or waits for it.

    Args:
        name: name of the segment.
        runtime: where segments live; None for the default.
        timeout: seconds to wait for the first version; None waits for ever.
    """

    patience = 5.0  # seconds without a version, after which a warning says which segments exist

    def __init__(self, name: str, runtime: str | os.PathLike[str] | None, timeout: float | None) -> None:
        self._name, self._runtime, self._timeout = name, runtime, timeout
        self._deadline = deadline_of(timeout)
        self._made: WritableSegment | None = None

    def __enter__(self) -> Opening:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if self._made:
            with closing(self._made), suppress(SegmentError, OSError):
                if kind:
                    self._made.remove_unused()

    def open(self, layout: Layout, exclude: Sequence[str] = ()) -> Segment:
        """Opens the segment, or makes one with the policy's layout.

        Args:
            exclude: globs of tensors that the segment may have or lack. If set, waits until a publisher makes it.
        """
        while True:
            with suppress(SegmentMissing, SegmentDamaged):
                segment = Segment.open(self._name, self._runtime, layout=layout, exclude=exclude)
                if not segment.damage():
                    return segment
                segment.close()
            if not exclude:
                break
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise AttachTimeout(f"{self._nobody()} The wait ended after {self._timeout} s (timeout=).")
            time.sleep(_LOOK)
        try:
            self._made = WritableSegment.create(self._name, layout, self._runtime)
        except OSError as exc:
            raise from_os_error(exc, runtime_dir(self._runtime)) from exc
        return Segment.open(self._name, self._runtime, layout=layout)

    def wait(self, reader: Reader) -> None:
        """Returns once the policy has its first version; after ``patience`` seconds, warns that nobody publishes.

        Raises:
            AttachTimeout: no version came in time.
        """
        due: float | None = time.monotonic() + self.patience
        if _has_first(reader):
            return
        while True:
            now = time.monotonic()
            if due is not None and now >= due:
                due = None
                _log.warning("%s The policy keeps waiting.", self._nobody())
            left = None if self._deadline is None else self._deadline - now
            times = [seconds for seconds in (left, None if due is None else due - now) if seconds is not None]
            if reader.wait(min(times, default=None)) and _has_first(reader):
                return
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise AttachTimeout(f"{self._nobody()} The wait ended after {self._timeout} s (timeout=).")

    def _nobody(self) -> str:
        base = runtime_dir(self._runtime)
        return (
            f"segment {self._name!r} has no version yet: nobody has published to {base / self._name} (uid "
            f"{os.geteuid()}). {_told_of_neighbours(self._name, base)}Start `wsync watch` or `wsync push` for this "
            "name, or attach to another one."
        )


def _has_first(reader: Reader) -> bool:
    """Takes a version if there is one, even one that is too old; returns whether the policy has one."""
    with suppress(Stale):
        reader.refresh(wait=True)
    return reader.version > 0


def _told_of_neighbours(name: str, base: Path) -> str:
    """A sentence for each directory of segments: first ``base``, then other users' directories beside it.

    Args:
        name: names like this one are listed first.
    """
    told = ""
    with suppress(SegmentError, OSError):
        there = [each for each in segments(base) if each != name]
        told = f"There are {_listed(name, there)}. " if there else "There is no other segment. "
    pattern = default_runtime_dir().name.rpartition("-")[0] + "-*"
    for other in sorted(base.parent.glob(pattern)):
        with suppress(SegmentError, OSError):  # this user may not enter most of them
            if other != base and (there := segments(other)):
                told += f"In {printable(os.fspath(other))} (runtime_dir=) there are {_listed(name, there)}. "
    return told


def _listed(name: str, there: list[str]) -> str:
    near = difflib.get_close_matches(name, there, n=_SHOWN)
    ordered = [*near, *(other for other in there if other not in near)]
    more = len(ordered) - _SHOWN
    return ", ".join(map(repr, ordered[:_SHOWN])) + (f" and {more} more" if more > 0 else "")
