"""What ``wsync log`` prints: a table of events, and with ``--plot`` a picture as wide as the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path

from rich.console import JustifyMethod
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ...errors import printable
from ...history.state import Event
from ...text import duration, size
from ..terminal import stdout_console

_LABEL, _MOST = 15, 200  # columns
_BARS = "▁▂▃▄▅▆▇█"
_MARKS = {"reject": "x", "failure": "!", "rollback": "r", "pin": "p", "unpin": "u"}
"""The mark of a column with such an event; if it has several kinds, the first in this table counts."""

Of = Callable[[Sequence[Event]], float | None]


def print_plot(name: str, events: list[Event], end: float) -> None:
    """Draws steps, versions and marks, and below them how publishing went; each column is a span of time.

    Args:
        end: the time at the right edge, in seconds since the epoch.
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
        legend = ", ".join(f"{mark} {kind}" for kind, mark in _MARKS.items() if mark in marks)
        console.print(f"{'marks':<{_LABEL}}{marks}".rstrip(), soft_wrap=True)
        console.print(f"{'':<{_LABEL}}{legend}", style="dim")
    draw("publish time", _greatest(lambda e: e.seconds), duration)
    speed = _greatest(lambda e: e.bytes / e.seconds if e.bytes and e.seconds else None)
    draw("staging speed", speed, lambda value: f"{size(value)}/s")
    draw("version lag", _greatest(lambda e: e.lag), number)


def _greatest(of: Callable[[Event], float | None]) -> Of:
    """Returns a function that gives the greatest value in a column; None if there is no value."""

    def greatest(column: Iterable[Event]) -> float | None:
        return max((float(value) for event in column if (value := of(event)) is not None), default=None)

    return greatest


def bar(value: float, most: float) -> str:
    """A block whose height shows a value between 0 and ``most``."""
    return _BARS[round(value / most * (len(_BARS) - 1))] if most > 0 else _BARS[0]


_LOG_COLUMNS: tuple[tuple[str, int, JustifyMethod], ...] = (  # heading, least width in characters, alignment
    ("time", 14, "left"),
    ("event", 8, "left"),
    ("version", 7, "right"),
    ("step", 6, "right"),
    ("took", 7, "right"),
    ("checkpoint", 24, "left"),
)
_LOG_STYLES = {"reject": "red", "failure": "red", "rollback": "yellow", "pin": "yellow", "unpin": "yellow"}


def print_log(name: str, events: list[Event], coming: Iterable[Event]) -> None:
    """Prints the table of ``wsync log``: one line per event, with its reason below it on a terminal, else in the line.

    Args:
        coming: further events, printed as they come.
    """
    console = stdout_console()
    beside = not console.is_terminal
    if events:
        heads = [head for head, _, _ in _LOG_COLUMNS]
        console.print(_log_line([Text(head, "bold") for head in (*heads, *["reason"] * beside)]))
    else:
        console.print(f"{name}: no history")
    for event in itertools.chain(events, coming):
        reason = Text(printable(" ".join((event.reason or "").split())))
        console.print(_log_line([*_log_row(event), *[reason] * beside]))
        if reason and not beside:
            console.print(Padding(reason, (0, 0, 0, 4)))


def _log_line(cells: list[Text]) -> Table:
    """Lays out one event by itself, because with ``--follow`` the next events are not known yet."""
    line = Table.grid(padding=(0, 2, 0, 0))
    for head, least, justify in _LOG_COLUMNS:
        line.add_column(min_width=least, justify=justify, no_wrap=head != "checkpoint", overflow="fold")
    line.add_row(*cells)
    return line


def _log_row(event: Event) -> list[Text]:
    return [
        Text(datetime.fromtimestamp(event.at).strftime("%m-%d %H:%M:%S")),
        Text(event.kind, _LOG_STYLES.get(event.kind, "")),
        Text("" if event.version_then is None else str(event.version_then)),
        Text("" if event.step is None else str(event.step)),
        Text("" if event.seconds is None else duration(event.seconds)),
        Text(printable(Path(event.checkpoint).name) if event.checkpoint else ""),
    ]
