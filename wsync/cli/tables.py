"""The tables that people see: segments and their readers, the screen of ``status --watch``, what is in a checkpoint.

rich lays them; this module, and rich with it, is imported where one is printed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..errors import harmless, printable
from ..fleet.membership import few
from ..history.database import Event
from ..text import count, duration, size

if TYPE_CHECKING:
    from .config import Setting

_PIPE = 100_000  # columns: a line is never broken there
_COLUMNS = 80  # of the screen of ``status --watch``, as top(1) shows processes
_HEAD = f"{'segment, reader':<31}{'version':>8}{'lag':>5}{'step':>11}{'age':>12}{'per min':>9}"


def stdout_console() -> Console:
    """Where tables go: as wide as the terminal, and in a pipe or a file one line a row, however long."""
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _PIPE
    return console


def _table(*columns: str) -> Table:
    """A table without lines; a text that does not fit is folded, unless its column says otherwise."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def status_view(told: list[dict[str, Any]]) -> RenderableType:
    """The tables of ``wsync status``, of what ``status.look`` found."""
    return Group(*map(segment_view, told)) if told else Text("no segments")


def segment_view(told: dict[str, Any], most: int | None = None) -> RenderableType:
    """Shows a segment as ``segment_json`` gives it, and at most ``most`` of its readers."""
    readers = told["readers"]
    parts: list[RenderableType] = [_headline(told)]
    parts += [Text(f"  {note}", "yellow") for note in _notes(told)]
    parts.append(_reader_table(readers[:most]) if readers else Text("  no readers", "dim"))
    if most and len(readers) > most:
        parts.append(Text(f"  … and {count(len(readers) - most, 'more reader')}"))
    return Group(*parts)


def _headline(told: dict[str, Any]) -> Text:
    name = (told["name"], "bold")
    if not told["version"]:
        return Text.assemble(name, ("  no version yet", "yellow"))
    step = "" if told["step"] is None else f"  step {told['step']}"
    file = printable(told["checkpoint"] or "weights from memory")
    more = f"{step}  {size(told['bytes'])}  {age(told['published_at'])} ago\n  {file}"
    return Text.assemble(name, (f"  version {told['version']}", "green"), more)


def _notes(told: dict[str, Any]) -> Iterator[str]:
    if told.get("pin"):
        yield f"pinned: {printable(told['pin'])}"
    if told.get("added_slots"):
        slots = told["slots"] + told["added_slots"]
        yield f"{slots} slots, {told['max_slots']} at most: readers keep older versions"
    if group := told.get("group"):
        yield f"group: rank {group['rank']} of {group['size']}: {few(group['boxes'])}"
    if failure := told.get("last_failure"):
        reason = " ".join((failure["reason"] or "").split())
        yield f"last failure {age(failure['at'])} ago: {printable(reason[:200])}"


def age(moment: datetime) -> str:
    return duration(max(0.0, time.time() - moment.timestamp()))


def _reader_table(readers: list[dict[str, Any]]) -> RenderableType:
    table = _table()
    table.add_column("  reader", overflow="ellipsis", no_wrap=True)
    for column in ("pid", "version", "lag", "since"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    table.add_column("oldest lease", justify="right", no_wrap=True)
    for r in readers:
        lease = age(r["lease_since"]) if r["lease_since"] else ""
        table.add_row(
            f"  {r['process']}",
            str(r["pid"]),
            str(r["version"]),
            Text(str(r["lag"]), "yellow" if r["lag"] else ""),
            age(r["since"]),
            r["mode"],
            lease + (f", version {', '.join(map(str, r['holds']))}" if r["holds"] else ""),
        )
    return table


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
        rows += _segment_rows(each, recent(each["name"]))
    if len(rows) > lines:
        rows = [*rows[: lines - 1], Text(f"… and {len(rows) - lines + 1} more lines", "dim")]
    return Group(*rows)


def _segment_rows(told: dict[str, Any], recent: int) -> list[Text]:
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


def print_inspection(looked: dict[str, Any]) -> None:
    """What ``wsync inspect`` found, as tables."""
    console = stdout_console()
    if "complete" in looked:
        _print_checkpoint(console, looked)
    if "candidates" in looked:
        _print_candidates(console, looked)


def _print_candidates(console: Console, looked: dict[str, Any]) -> None:
    found = looked["candidates"]
    others = "other " if "complete" in looked else ""
    title = f"{printable(looked['path'])}: {count(len(found), f'{others}candidate')}, newest first"
    console.print(title, soft_wrap=True)
    table = _table("checkpoint", "step", "size", "verdict")
    for each in found:
        good = each["complete"] and each.get("fits", True)
        verdict = ("fits" if "fits" in each else "complete") if good else each["reason"].split("\n")[0]
        verdict += f"; step from the {_origin(each)}" if each.get("other_numbers") else ""
        step = "" if each["step"] is None else str(each["step"])
        weight = "" if each["bytes"] is None else size(each["bytes"])
        name = printable(Path(each["path"]).name)
        table.add_row(name, step, weight, Text(printable(verdict), "" if good else "red"))
    console.print(table)


def _origin(looked: dict[str, Any]) -> str:
    """Says where the step was read, and which other numbers a setting could take instead."""
    others = ", ".join(looked["other_numbers"])
    more = f", which also holds {others}: select.step would take another" if others else ""
    return printable(f"{looked['step_from']}{more}")


def _print_checkpoint(console: Console, looked: dict[str, Any]) -> None:
    if not looked["complete"]:
        console.print(harmless(looked["reason"]), style="red", soft_wrap=True)
        return
    step = "" if looked["step"] is None else f", step {looked['step']}"
    files = "" if len(looked["files"]) == 1 else f" in {len(looked['files'])} files"
    tensors = looked["tensors"]
    title = f"{printable(looked['path'])}: {count(len(tensors), 'tensor')}, {size(looked['bytes'])}{files}{step}"
    console.print(title, soft_wrap=True)
    if looked["step_from"]:
        console.print(f"step {looked['step']} is from the {_origin(looked)}", soft_wrap=True)
    for key, value in looked["metadata"].items():
        console.print(f"  {printable(key)} = {printable(value)}", soft_wrap=True)
    if "fits" in looked:
        verdict = _how_it_fits(looked) if looked["fits"] else printable(looked["reason"])
        console.print(verdict, style="green" if looked["fits"] else "red", soft_wrap=True)
    table = _table("tensor")
    for column in ("dtype", "shape", "bytes"):
        table.add_column(column, justify="right" if column == "bytes" else "left", no_wrap=True)
    scanned = any("finite" in tensor for tensor in tensors)
    if scanned:
        table.add_column("finite")
    for tensor in tensors:
        cells = printable(tensor["name"]), tensor["dtype"], str(tensor["shape"]), f"{tensor['bytes']:,}"
        finite = [Text("yes") if tensor["finite"] else Text("NO", "red")] if scanned else []
        table.add_row(*cells, *finite)
    console.print(table)


def _how_it_fits(looked: dict[str, Any]) -> str:
    parts = [f"merged into {looked['base']}"] if looked["base"] else []
    if casts := looked["casts"]:
        kinds = sorted({f"{cast['from']} to {cast['to']}" for cast in casts})
        parts.append(f"{count(len(casts), 'tensor')} cast ({', '.join(kinds)})")
    if kept := looked["kept"]:
        parts.append(f"{count(len(kept), 'tensor')} of the policy not in it")
    if left := looked["left_out"]:
        parts.append(f"{len(left):,} of its own left out")
    return printable("; ".join(["fits the policy", *parts]))


_LOG_COLUMNS: tuple[tuple[str, int, JustifyMethod], ...] = (  # with the columns that each takes at least
    ("time", 14, "left"),
    ("event", 8, "left"),
    ("version", 7, "right"),
    ("step", 6, "right"),
    ("took", 7, "right"),
    ("checkpoint", 24, "left"),
)
_LOG_STYLES = {"reject": "red", "failure": "red", "rollback": "yellow", "pin": "yellow", "unpin": "yellow"}


def print_log(name: str, events: list[Event], coming: Iterable[Event]) -> None:
    """The table of ``wsync log``: a line an event, with its reason below it on a terminal and beside it in a pipe.

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
        Text("" if event.version is None else str(event.version)),
        Text("" if event.step is None else str(event.step)),
        Text("" if event.seconds is None else duration(event.seconds)),
        Text(printable(Path(event.checkpoint).name) if event.checkpoint else ""),
    ]


def print_config(rows: list[Setting]) -> None:
    """The table of ``wsync config``."""
    table = _table("setting", "value", "from")
    for row in rows:
        table.add_row(row.name, "" if row.value is None else printable(str(row.value)), row.origin)
    stdout_console().print(table)
