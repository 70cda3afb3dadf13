"""``wsync status``: what is live, pinned and failing, for people, for programs, and for a monitoring system.

A monitor gets one line, and an exit code as Nagios and similar systems expect it. 0 is OK; 1, a warning: something is
beyond its bound; 2, critical: nothing is live, or a segment cannot be read. A usage error, such as a misspelt option,
also ends with 2. The figures after ``|`` are for graphs.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

from ..errors import SegmentError, StateError, UsageError, printable
from ..fleet.membership import group_of
from ..history.database import Event, State
from ..segment.segment import Segment, segments
from ..text import count, duration
from .console import complain, segment_json, to_json, unwind_at

_REFRESH = 1.0  # seconds
_WORDS = ("OK", "WARNING", "CRITICAL")
_LOOKED_AT = 1000  # events
Place = str | os.PathLike[str] | None


class Bounds(NamedTuple):
    """The bounds within which all is well; None sets no bound.

    Attributes:
        staleness: age of a live version, seconds.
        lag: versions that a reader may be behind.
        lag_seconds: seconds that a reader may be behind.
    """

    staleness: float | None = None
    lag: int | None = None
    lag_seconds: float | None = None

    def check(self) -> None:
        """Raises UsageError for a bound that nothing can keep, or that everything keeps."""
        for name, value in self._asdict().items():
            if value is not None and not (value >= 0 if name == "lag" else value > 0):
                bound = "versions, 0 or more" if name == "lag" else "seconds above 0"
                raise UsageError(f"--max-{name.replace('_', '-')} {value} is not a valid bound. Give {bound}.")


def show(name: str | None, runtime: Place, state: Place, bounds: Bounds, *, as_json: bool) -> int:
    """Prints one look at the standing segments, or one line where bounds are given; returns the exit code.

    Args:
        name: of one segment; None takes all.

    Raises:
        SegmentError: the one segment that was named is not there, or is unusable, and no bounds are given.
    """
    is_check = bounds != Bounds()
    told, broken = look(name, runtime, state)
    if name and broken and not is_check:
        raise broken[name]
    line, code = "", int(bool(broken))
    if is_check:
        line, code = check(told, {each: str(exc) for each, exc in broken.items()}, bounds, state)
    if not line or as_json:
        for exc in broken.values():
            complain(exc)
    if as_json:
        print(to_json((told[0] if told else {}) if name else {"segments": told}))
    elif line:
        print(line)
    else:
        from .tables import status_view, stdout_console

        stdout_console().print(status_view(told), soft_wrap=True)
    return code


def follow(name: str | None, runtime: Place, state: Place) -> None:
    """Shows the status again and again until interrupted: in place on a terminal, otherwise one below the other."""
    from rich.live import Live

    from .tables import stdout_console, view_of

    console = stdout_console()
    unwind_at(signal.SIGTERM)  # the cursor is shown again
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        view = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        while True:
            told, broken = look(name, runtime, state)
            lines = console.height - 1 if view else sys.maxsize
            shown = view_of(told, broken, lambda each: len(_publishes(each, state, since=time.time() - 60)), lines)
            if view:
                view.update(shown, refresh=True)
            else:
                console.print(shown)
                sys.stdout.flush()
            time.sleep(_REFRESH)


def look(name: str | None, runtime: Place, state: Place) -> tuple[list[dict[str, Any]], dict[str, SegmentError]]:
    """Returns each readable segment as ``segment_json`` gives it, and the error of each other one by name."""
    told: list[dict[str, Any]] = []
    broken: dict[str, SegmentError] = {}
    for each in [name] if name else segments(runtime):
        try:
            with closing(Segment.open(each, runtime)) as segment:
                segment.check()
                told.append(_told(segment, state))
        except SegmentError as exc:  # one that is unusable, or was just removed, must not hide the others
            broken[each] = exc
    return told, broken


def _told(segment: Segment, place: Place) -> dict[str, Any]:
    """The segment, its pin, its last failure if nothing was published since, and its group if it has one."""
    told = segment_json(segment)
    with State(segment.name, place) as state:
        try:
            if pin := state.pin():
                told["pin"] = pin.name
        except StateError as exc:
            complain(exc)
        try:
            for failure in state.events(kinds=("failure", "reject"), limit=1):
                at = datetime.fromtimestamp(failure.at, UTC)
                if not told["published_at"] or at > told["published_at"]:
                    told["last_failure"] = {"at": at, "reason": failure.reason}
        except StateError as exc:
            complain(exc)
    if group := group_of(segment.path):
        told["group"] = group
    return told


def check(told: list[dict[str, Any]], broken: Mapping[str, str], bounds: Bounds, state: Place) -> tuple[str, int]:
    """The line and the exit code.

    Args:
        told: the segments, as ``look`` has them.
        broken: why others cannot be read, by name.
        state: the directory of histories, which show since when a reader is behind.
    """
    code, words, figures = (0, [], []) if told or broken else (2, ["there is no segment"], [])
    for name, why in broken.items():
        code, words = 2, [*words, f"{name} cannot be read: {' '.join(why.split())}"]
    for each in told:
        name = each["name"]
        if not each["version"]:
            code, words = 2, [*words, f"{name} has no version yet"]
            continue
        age, readers = time.time() - each["published_at"].timestamp(), each["readers"]
        is_stale = bounds.staleness is not None and age > bounds.staleness
        troubles = [f"version {each['version']} is {duration(age)} old"] if is_stale else []
        troubles += _lagging(each, bounds, state)
        code = max(code, int(bool(troubles)))
        good = f"{name} is at version {each['version']}, {duration(age)} old, {count(len(readers), 'reader')}"
        words.append(f"{name}: {', '.join(troubles)}" if troubles else good)
        lag = max((reader["lag"] for reader in readers), default=0)
        figures += [
            f"{name}_age={age:.0f}s;{bounds.staleness or ''}",
            f"{name}_lag={lag};{'' if bounds.lag is None else bounds.lag}",
        ]
    words.sort(key=lambda word: " is at version " in word)  # what is wrong comes first
    line = f"WSYNC {_WORDS[code]}: {'; '.join(words)}"
    return printable(f"{line} | {' '.join(figures)}" if figures else line), code


def _lagging(told: dict[str, Any], bounds: Bounds, state: Place) -> list[str]:
    """Names the readers that are further behind than allowed."""
    behind = [reader for reader in told["readers"] if reader["lag"] > 0]
    late = [reader for reader in behind if bounds.lag is not None and reader["lag"] > bounds.lag]
    words = [f"{_named(r)} is {count(r['lag'], 'version')} behind" for r in late]
    if bounds.lag_seconds is None or not behind:
        return words
    events = _publishes(told["name"], state, limit=_LOOKED_AT)
    for reader in behind:
        missed = [event.at for event in events if (event.version or 0) > reader["version"]]
        since = max(reader["since"].timestamp(), min(missed, default=told["published_at"].timestamp()))
        seconds = time.time() - since
        if seconds > bounds.lag_seconds:
            words.append(f"{_named(reader)} has not refreshed for {duration(seconds)}")
    return words


def _publishes(name: str, place: Place, **bounds: Any) -> list[Event]:
    """What went live, within bounds as ``State.events`` takes them; nothing if the history cannot be read."""
    try:
        with State(name, place) as state:
            return state.events(kinds=("publish", "rollback"), **bounds)
    except StateError:  # the newest version's own time is known all the same
        return []


def _named(reader: dict[str, Any]) -> str:
    return f"reader {reader['process']} (pid {reader['pid']})"
