"""The tables that rich draws: segments and their readers, and what is in a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import count, duration, size
from .registry import ReaderRecord
from .segment import Segment
from .segment_files import Publication

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def stdout_console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def print_status(segments: list[Segment]) -> None:
    """The tables of ``wsync status``."""
    console = stdout_console()
    if not segments:
        console.print("no segments")
        return
    for segment in segments:
        live, readers = segment.live(), segment.readers()
        console.print(_headline(segment, live), soft_wrap=True)
        if readers:
            console.print(reader_table(live, readers))


def _headline(segment: Segment, live: Publication | None) -> RenderableType:
    from rich.text import Text

    text = Text(segment.name, style="bold")
    if live is None:
        return text.append("  no version yet", style="not bold yellow")
    text.append(f"  version {live.version}", style="not bold green")
    step = "" if live.step is None else f"  step {live.step}"
    age = duration(max(0.0, time.time() - live.published_at))
    file = live.source or "weights from memory"
    text.append(f"{step}  {size(segment.layout.nbytes)}  {age} ago\n  {file}", style="not bold")
    if not segment.readers():
        text.append("\n  no readers", style="dim not bold")
    return text


def reader_table(live: Publication | None, readers: list[ReaderRecord]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("  reader", overflow="ellipsis", no_wrap=True)
    for column in ("pid", "version", "lag", "since"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    for r in readers:
        lag = (live.version if live else 0) - r.version
        since = duration(max(0.0, time.time() - r.since))
        table.add_row(
            f"  {r.process}",
            str(r.pid),
            str(r.version),
            f"[yellow]{lag}[/]" if lag else "0",
            since,
            r.mode,
        )
    return table


def print_inspection(looked: dict[str, Any]) -> None:
    """What ``wsync inspect`` found, as tables."""
    from rich.table import Table
    from rich.text import Text

    console = stdout_console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    if "candidates" in looked:
        console.print(
            f"{looked['path']}: {count(len(looked['candidates']), 'candidate')}, newest first", soft_wrap=True
        )
        for column in ("checkpoint", "step", "size", "verdict"):
            table.add_column(column, overflow="fold")
        for each in looked["candidates"]:
            good = each["complete"] and each.get("fits", True)
            verdict = ("fits" if "fits" in each else "complete") if good else each["reason"].split("\n")[0]
            step = "" if each["step"] is None else str(each["step"])
            weight = "" if each["bytes"] is None else size(each["bytes"])
            table.add_row(Text(Path(each["path"]).name), step, weight, Text(verdict, "" if good else "red"))
        console.print(table)
        return
    if not looked["complete"]:
        console.print(Text(looked["reason"], "red"), soft_wrap=True)
        return
    step = "" if looked["step"] is None else f", step {looked['step']}"
    files = "" if len(looked["files"]) == 1 else f" in {len(looked['files'])} files"
    console.print(
        f"{looked['path']}: {count(len(looked['tensors']), 'tensor')}, {size(looked['bytes'])}{files}{step}",
        markup=False,
        soft_wrap=True,
    )
    for key, value in looked["metadata"].items():
        console.print(f"  {key} = {value}", markup=False, soft_wrap=True)
    if "fits" in looked:
        verdict = "fits the policy" if looked["fits"] else looked["reason"]
        console.print(Text(verdict, "green" if looked["fits"] else "red"), soft_wrap=True)
    table.add_column("tensor", overflow="fold")
    for column in ("dtype", "shape", "bytes"):
        table.add_column(column, justify="right" if column == "bytes" else "left", no_wrap=True)
    if any("finite" in tensor for tensor in looked["tensors"]):
        table.add_column("finite")
    for tensor in looked["tensors"]:
        finite = [Text("yes") if tensor["finite"] else Text("NO", "red")] if "finite" in tensor else []
        table.add_row(
            Text(tensor["name"]), tensor["dtype"], Text(str(tensor["shape"])), f"{tensor['bytes']:,}", *finite
        )
    console.print(table)
