"""One line for a monitoring system, and an exit code as Nagios and similar systems expect it.

0 is OK; 1, a warning: something is beyond its bound; 2, critical: nothing is live, or a segment cannot be read. A usage
error, such as a misspelt option, also ends with 2. The figures after ``|`` are for graphs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import StateError, UsageError, printable
from ..history.database import Event, State
from ..text import count, duration

_WORDS = ("OK", "WARNING", "CRITICAL")
_LOOKED_AT = 1000  # events


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds within which all is well; None sets no bound.

    Attributes:
        staleness: age of a live version, seconds.
        lag: versions that a reader may be behind.
        lag_seconds: seconds that a reader may be behind.
    """

    staleness: float | None = None
    lag: int | None = None
    lag_seconds: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (value >= 0 if field.name == "lag" else value > 0):
                flag = f"--max-{field.name.replace('_', '-')}"
                bound = "versions, 0 or more" if field.name == "lag" else "seconds above 0"
                raise UsageError(f"{flag} {value} is not a valid bound. Give {bound}.")

    @property
    def given(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields(self))


def check(told: list[dict[str, Any]], broken: Mapping[str, str], bounds: Bounds, state: Any) -> tuple[str, int]:
    """The line and the exit code.

    Args:
        told: the segments, as ``status.look`` has them.
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
        troubles = [f"version {each['version']} is {duration(age)} old"] if _above(age, bounds.staleness) else []
        troubles += _lagging(each, bounds, state)
        code = max(code, int(bool(troubles)))
        good = f"{name} is at version {each['version']}, {duration(age)} old, {count(len(readers), 'reader')}"
        words.append(f"{name}: {', '.join(troubles)}" if troubles else good)
        lag = max((reader["lag"] for reader in readers), default=0)
        figures += [f"{name}_age={age:.0f}s;{bounds.staleness or ''}", f"{name}_lag={lag};{_shown(bounds.lag)}"]
    words.sort(key=lambda word: " is at version " in word)  # what is wrong comes first
    line = f"WSYNC {_WORDS[code]}: {'; '.join(words)}"
    return printable(f"{line} | {' '.join(figures)}" if figures else line), code


def _lagging(told: dict[str, Any], bounds: Bounds, state: Any) -> list[str]:
    """Names the readers that are further behind than allowed."""
    behind = [reader for reader in told["readers"] if reader["lag"] > 0]
    late = [reader for reader in behind if _above(reader["lag"], bounds.lag)]
    words = [f"{_named(r)} is {count(r['lag'], 'version')} behind" for r in late]
    if bounds.lag_seconds is None or not behind:
        return words
    events = _publishes(told["name"], state)
    for reader in behind:
        missed = [event.at for event in events if (event.version or 0) > reader["version"]]
        since = max(reader["since"].timestamp(), min(missed, default=told["published_at"].timestamp()))
        seconds = time.time() - since
        if seconds > bounds.lag_seconds:
            words.append(f"{_named(reader)} has not refreshed for {duration(seconds)}")
    return words


def _publishes(name: str, place: Any) -> list[Event]:
    try:
        with State(name, place) as state:
            return state.events(kinds=("publish", "rollback"), limit=_LOOKED_AT)
    except StateError:  # the newest version's own time is known all the same
        return []


def _named(reader: dict[str, Any]) -> str:
    return f"reader {reader['process']} (pid {reader['pid']})"


def _above(value: float, bound: float | None) -> bool:
    return bound is not None and value > bound


def _shown(bound: float | None) -> str:
    return "" if bound is None else str(bound)
