"""The tables that rich draws: segments and their readers, and what is in a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import count, duration, size
from .errors import harmless, printable
from .registry import ReaderRecord
from .segment import Segment
from .segment_files import Publication

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from .history import Setting
    from .state import Event


def stdout_console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def print_status(segments: list[Segment], notes: Mapping[str, list[str]]) -> None:
    """The tables of ``wsync status``.

    Args:
        notes: of each segment, what its state says: a pin, a failure.
    """
    stdout_console().print(status_view(segments, notes), soft_wrap=True)


def status_view(segments: list[Segment], notes: Mapping[str, list[str]]) -> RenderableType:
    """The same as one thing to draw."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for segment in segments:
        live, readers = segment.live(), segment.readers()
        parts.append(_headline(segment, live))
        parts += [Text(f"  {note}", "yellow") for note in notes.get(segment.name, [])]
        if readers:
            parts.append(reader_table(live, readers, segment))
    return Group(*parts) if parts else Text("no segments")


def _headline(segment: Segment, live: Publication | None) -> RenderableType:
    from rich.text import Text

    text = Text(segment.name, style="bold")
    if live is None:
        return text.append("  no version yet", style="not bold yellow")
    text.append(f"  version {live.version}", style="not bold green")
    step = "" if live.step is None else f"  step {live.step}"
    age = duration(max(0.0, time.time() - live.published_at))
    file = printable(live.source) or "weights from memory"
    text.append(f"{step}  {size(segment.layout.nbytes)}  {age} ago\n  {file}", style="not bold")
    if not segment.readers():
        text.append("\n  no readers", style="dim not bold")
    return text


def reader_table(live: Publication | None, readers: list[ReaderRecord], segment: Segment) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("  reader", overflow="ellipsis", no_wrap=True)
    for column in ("pid", "version", "lag", "since"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    table.add_column("oldest lease", justify="right", no_wrap=True)
    for r in readers:
        held = segment.held_back(r)
        lease = duration(max(0.0, time.time() - r.oldest)) if r.oldest else ""
        lag = (live.version if live else 0) - r.version
        since = duration(max(0.0, time.time() - r.since))
        table.add_row(
            Text(f"  {r.process}"),
            str(r.pid),
            str(r.version),
            f"[yellow]{lag}[/]" if lag else "0",
            since,
            r.mode,
            lease + (f", version {', '.join(map(str, held))}" if held else ""),
        )
    return table


def print_inspection(looked: dict[str, Any]) -> None:
    """What ``wsync inspect`` found, as tables."""
    console = stdout_console()
    if "complete" in looked:
        _print_checkpoint(console, looked)
    if "candidates" in looked:
        _print_candidates(console, looked)


def _print_candidates(console: Console, looked: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    found = looked["candidates"]
    others = "other " if "complete" in looked else ""
    console.print(
        f"{printable(looked['path'])}: {count(len(found), f'{others}candidate')}, newest first",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("checkpoint", "step", "size", "verdict"):
        table.add_column(column, overflow="fold")
    for each in found:
        good = each["complete"] and each.get("fits", True)
        verdict = ("fits" if "fits" in each else "complete") if good else each["reason"].split("\n")[0]
        step = "" if each["step"] is None else str(each["step"])
        weight = "" if each["bytes"] is None else size(each["bytes"])
        name = printable(Path(each["path"]).name)
        table.add_row(Text(name), step, weight, Text(printable(verdict), "" if good else "red"))
    console.print(table)


def _print_checkpoint(console: Console, looked: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    if not looked["complete"]:
        console.print(Text(harmless(looked["reason"]), "red"), soft_wrap=True)
        return
    step = "" if looked["step"] is None else f", step {looked['step']}"
    files = "" if len(looked["files"]) == 1 else f" in {len(looked['files'])} files"
    console.print(
        f"{printable(looked['path'])}: {count(len(looked['tensors']), 'tensor')}, {size(looked['bytes'])}{files}{step}",
        markup=False,
        soft_wrap=True,
    )
    for key, value in looked["metadata"].items():
        console.print(f"  {printable(key)} = {printable(value)}", markup=False, soft_wrap=True)
    if "fits" in looked:
        verdict = _how_it_fits(looked) if looked["fits"] else printable(looked["reason"])
        console.print(Text(verdict, "green" if looked["fits"] else "red"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tensor", overflow="fold")
    for column in ("dtype", "shape", "bytes"):
        table.add_column(column, justify="right" if column == "bytes" else "left", no_wrap=True)
    if any("finite" in tensor for tensor in looked["tensors"]):
        table.add_column("finite")
    for tensor in looked["tensors"]:
        finite = [Text("yes") if tensor["finite"] else Text("NO", "red")] if "finite" in tensor else []
        table.add_row(
            Text(printable(tensor["name"])),
            tensor["dtype"],
            Text(str(tensor["shape"])),
            f"{tensor['bytes']:,}",
            *finite,
        )
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


_LOG_COLUMNS = (("time", 14), ("event", 8), ("version", 7), ("step", 6), ("took", 7), ("checkpoint", 24))
_LOG_STYLES = {"reject": "red", "failure": "red", "rollback": "yellow", "pin": "yellow", "unpin": "yellow"}
_REASON = 40  # columns that a reason needs to stand beside its event


def print_log(name: str, events: list[Event], *, header: bool = True) -> None:
    """The table of ``wsync log``; a reason stands beside its event, on a narrow terminal below it."""
    from rich.cells import cell_len, set_cell_size
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = stdout_console()
    if not events and header:
        console.print(f"{name}: no history")
        return
    rows = [_log_row(event) for event in events]
    widths = [max(least, *(cell_len(row[n]) for row in rows)) for n, (_, least) in enumerate(_LOG_COLUMNS)]
    if console.is_terminal:
        widths[-1] = min(widths[-1], 40, max(12, console.width - sum(widths[:-1]) - 2 * len(widths[:-1])))
    taken = sum(widths) + 2 * len(widths)

    def line(cells: Sequence[str]) -> list[str]:
        right = [head in ("version", "step", "took") for head, _ in _LOG_COLUMNS]
        return [
            " " * (width - cell_len(cell)) + cell
            if at_right
            else set_cell_size(cell if cell_len(cell) <= width else f"{set_cell_size(cell, width - 1)}…", width)
            for cell, width, at_right in zip(cells, widths, right, strict=True)
        ]

    if header:
        heads = "  ".join([*line([head for head, _ in _LOG_COLUMNS]), "reason"])
        beside = not console.is_terminal or taken + _REASON <= console.width
        console.print(Text(heads if beside else heads.removesuffix("  reason").rstrip(), "bold"), soft_wrap=True)
    for event, row in zip(events, rows, strict=True):
        first, kind, *rest = line(row)
        told = Text.assemble(first, "  ", (kind, _LOG_STYLES.get(event.kind, "")), "  ", "  ".join(rest))
        reason = Text(printable(" ".join((event.reason or "").split())))
        if not console.is_terminal or not reason:
            told.append("  ").append_text(reason)
            told.rstrip()
            console.print(told, soft_wrap=True)
        elif taken + _REASON <= console.width:
            grid = Table.grid()
            grid.add_column(width=taken)
            grid.add_column(overflow="fold")
            grid.add_row(told, reason)
            console.print(grid)
        else:
            told.rstrip()
            console.print(told, soft_wrap=True)
            console.print(Padding(reason, (0, 0, 0, 4)))


def _log_row(event: Event) -> tuple[str, ...]:
    return (
        datetime.fromtimestamp(event.at).strftime("%m-%d %H:%M:%S"),
        event.kind,
        "" if event.version is None else str(event.version),
        "" if event.step is None else str(event.step),
        "" if event.seconds is None else duration(event.seconds),
        printable(Path(event.checkpoint).name) if event.checkpoint else "",
    )


def print_plot(name: str, events: list[Event]) -> None:
    """Publish time, staging speed and version lag over time, each as one line of bars."""
    from .history import sparkline

    console = stdout_console()
    if not events:
        console.print(f"{name}: no publish to draw")
        return
    first, last = (datetime.fromtimestamp(e.at).strftime("%Y-%m-%d %H:%M:%S") for e in (events[0], events[-1]))
    console.print(f"{name}: {count(len(events), 'publish').replace('publishs', 'publishes')}, {first} to {last}")
    took = [event.seconds or 0.0 for event in events]
    speed = [(e.bytes or 0) / e.seconds if e.seconds else 0.0 for e in events]
    lag = [float(event.lag or 0) for event in events]
    rows = (
        ("publish time", took, duration),
        ("staging speed", speed, lambda value: f"{size(value)}/s"),
        ("version lag", lag, lambda value: f"{value:.0f}"),
    )
    for label, values, say in rows:
        width = max(10, console.width - 16)
        console.print(f"{label:<14}  {sparkline(values, width)}", soft_wrap=True)
        console.print(f"{'':<14}  last {say(values[-1])}, most {say(max(values))}", style="dim")


def print_config(rows: list[Setting]) -> None:
    """The table of ``wsync config``."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("setting", "value", "from"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(Text(row.name), Text("" if row.value is None else printable(str(row.value))), row.origin)
    stdout_console().print(table)
