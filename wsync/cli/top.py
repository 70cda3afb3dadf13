"""``wsync status --watch``: every segment and its readers on one screen of 80 columns, as top(1) shows processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ..errors import printable
from ..text import count
from .tables import age

_COLUMNS = 80
_HEAD = f"{'segment, reader':<31}{'version':>8}{'lag':>5}{'step':>11}{'age':>12}{'per min':>9}"


def view_of(
    told: list[dict[str, Any]], broken: Mapping[str, Exception], recent: Callable[[str], int], lines: int
) -> RenderableType:
    """One look, the segments first that are in trouble.

    Args:
        told: the segments, as ``status.look`` has them.
        broken: why others cannot be read, by name.
        recent: versions that went live in a segment within the last minute.
        lines: of the screen.
    """
    readers = sum(len(each["readers"]) for each in told)
    segments = count(len(told) + len(broken), "segment")
    rows = [Text(f"wsync {time.strftime('%H:%M:%S')}  {segments}, {count(readers, 'reader')}"), Text(_HEAD, "bold")]
    rows += [Text(_fit(f"{name}: {' '.join(str(why).split())}"), "red") for name, why in broken.items()]
    for each in sorted(told, key=lambda each: (not each["last_failure"], each["name"])):
        rows += _segment(each, recent(each["name"]))
    if len(rows) > lines:
        rows = [*rows[: lines - 1], Text(f"… and {len(rows) - lines + 1} more lines", "dim")]
    return Group(*rows)


def _segment(told: dict[str, Any], recent: int) -> list[Text]:
    step = "" if told["step"] is None else str(told["step"])
    live = told["version"]
    since = age(told["published_at"]) if live else "nothing live"
    pinned = " (pinned)" if told["pin"] else ""
    name = f"{told['name']:.{31 - len(pinned) - 1}}{pinned}"
    rows = [
        Text(_fit(f"{name:<31}{live or '':>8}{'':>5}{step:>11}{since:>12}{recent:>9}"), "green" if live else "yellow")
    ]
    for reader in sorted(told["readers"], key=lambda reader: -reader["lag"]):
        who = printable(f"  {reader['process']:.18} {reader['pid']}")
        line = f"{who:<31}{reader['version']:>8}{reader['lag']:>5}{reader['mode']:>11}{age(reader['since']):>12}"
        rows.append(Text(_fit(line), "yellow" if reader["lag"] else ""))
    if failure := told["last_failure"]:
        reason = printable(" ".join((failure["reason"] or "").split()))
        rows.append(Text(_fit(f"  failed {age(failure['at'])} ago: {reason}"), "red"))
    return rows


def _fit(line: str) -> str:
    return line if len(line) <= _COLUMNS else f"{line[: _COLUMNS - 1]}…"
