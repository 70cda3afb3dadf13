"""What ``wsync bench`` prints: one table for people, and one JSON object for programs."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import wsync

from ...bench.rows import Row, Settings
from ...system.memory import spare_memory
from ...text import size
from ..terminal import stdout_console


def box() -> dict[str, Any]:
    """Describes the machine; called before measuring, which is load itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": next(names, platform.machine()),
        "memory_free": spare_memory(),
        "load": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "wsync": wsync.__version__,
    }


def as_json(settings: Settings, about: Mapping[str, Any], rows: Iterable[Row]) -> dict[str, Any]:
    """``box``, ``settings`` and ``results``, a list of rows; what is missing is null or empty."""
    return {"box": about, "settings": asdict(settings), "results": [asdict(row) for row in rows]}


def print_rows(settings: Settings, about: Mapping[str, Any], rows: Iterable[Row]) -> None:
    """Prints the table to stdout; above it the machine, below it what was not measured and how many aims are met."""
    from rich.table import Column, Table
    from rich.text import Text

    console = stdout_console()
    console.print(
        f"{about['processor']}, {about['cores']} cores, {size(about['memory_free'])} free, load {about['load']}\n"
        f"Linux {about['kernel']}, Python {about['python']}, torch {about['torch']}\n"
        f"{size(settings.size)} in {settings.tensors:,} tensors, {settings.readers} readers",
    )
    if about["load"] > about["cores"] / 2:
        console.print("The box is busy with something else: take these figures again when it is idle.")
    whole = partial(Column, no_wrap=True)
    figure = partial(whole, justify="right")
    columns = ("measured", figure("wsync"), "beside", figure(), figure("ratio"), whole("aim"), whole())
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    verdicts = {True: Text("met", "green"), False: Text("MISSED", "bold red"), None: Text("")}
    met, absent = [], []
    for row in rows:
        if row.value is None:
            why = f"failed: {row.failed}" if row.failed else f"not measured: {row.skipped}"
            absent.append(Text(f"{row.case} {why}", "bold red" if row.failed else "dim"))
            continue
        other = "" if row.beside_value is None else amount(row.beside_value, row.unit)
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        aim = ""
        if row.aim:
            met.append(row.met)
            aim = f"{row.aim.sense} {f'{row.aim.bound:.3g}' if row.beside else amount(row.aim.bound, row.unit)}"
        table.add_row(row.name, amount(row.value, row.unit), row.beside, other, ratio, aim, verdicts[row.met])
    console.print(table, *absent, sep="\n")
    console.print(f"{met.count(True)} of {len(met)} aims met. A ratio is wsync's figure divided by the other.")


def amount(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.2g} %"
    if unit != "s":
        return size(value) + unit[1:]
    for name, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 0.9995:
            return f"{value * factor:.3g} {name}"
    return f"{value * 1e9:.3g} ns"
