"""``wsync log --plot``: events over time, in as many columns as the terminal has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

from ..history.database import Event
from ..text import duration, size
from .tables import stdout_console

_LABEL, _MOST = 15, 200  # columns
_BARS = "▁▂▃▄▅▆▇█"
_MARKS = {"reject": "x", "failure": "!", "rollback": "r", "pin": "p", "unpin": "u"}
"""What a column shows of the events in it; where there are several the first of these counts."""

Of = Callable[[Sequence[Event]], float | None]


def print_plot(name: str, events: list[Event], end: float) -> None:
    """Draws steps, versions and marks, and below them how publishing went; a column is a stretch of time.

    Args:
        end: of the picture, seconds since the epoch.
    """
    console = stdout_console()
    published = [event for event in events if event.kind in ("publish", "rollback")]
    if not published:
        console.print(f"{name}: no publish to draw")
        return
    width = max(10, min(console.width, _MOST) - _LABEL)
    start = events[0].at
    step = max((end - start) / width, 1e-3)
    columns: list[list[Event]] = [[] for _ in range(width)]
    for event in events:
        columns[min(int(max(0.0, event.at - start) / step), width - 1)].append(event)
    first, last = (datetime.fromtimestamp(at).strftime("%m-%d %H:%M:%S") for at in (start, end))
    versions = f"{len(published)} publish{'' if len(published) == 1 else 'es'}"
    console.print(f"{name}: {versions}, {first} to {last}, a column is {duration(step)}", soft_wrap=True)

    def draw(label: str, of: Of, say: Callable[[float], str], low: float = 0.0) -> None:
        found = [of([e for e in column if e.kind in ("publish", "rollback")]) for column in columns]
        known = [value for value in found if value is not None]
        if known:
            most = max(known)
            line = "".join(" " if value is None else bar(value - low, most - low) for value in found)
            console.print(f"{label:<{_LABEL}}{line}".rstrip(), soft_wrap=True)
            console.print(f"{'':<{_LABEL}}last {say(known[-1])}, most {say(most)}", style="dim")

    steps = [event.step for event in published if event.step is not None]
    number = "{:,.0f}".format
    draw("step", _greatest(lambda e: e.step), number, min(steps, default=0))
    draw("versions", lambda column: float(len(column)) or None, number)
    kinds = [{event.kind for event in column} for column in columns]
    marks = "".join(next((mark for kind, mark in _MARKS.items() if kind in found), " ") for found in kinds)
    if marks.strip():
        told = ", ".join(f"{mark} {kind}" for kind, mark in _MARKS.items() if mark in marks)
        console.print(f"{'marks':<{_LABEL}}{marks}".rstrip(), soft_wrap=True)
        console.print(f"{'':<{_LABEL}}{told}", style="dim")
    draw("publish time", _greatest(lambda e: e.seconds), duration)
    speed = _greatest(lambda e: e.bytes / e.seconds if e.bytes and e.seconds else None)
    draw("staging speed", speed, lambda value: f"{size(value)}/s")
    draw("version lag", _greatest(lambda e: e.lag), number)


def _greatest(of: Callable[[Event], float | None]) -> Of:
    """The greatest of a column; None where nothing came."""

    def greatest(column: Iterable[Event]) -> float | None:
        return max((float(value) for event in column if (value := of(event)) is not None), default=None)

    return greatest


def bar(value: float, most: float) -> str:
    """A value between 0 and the greatest one as a block of that height."""
    return _BARS[round(value / most * (len(_BARS) - 1))] if most > 0 else _BARS[0]
