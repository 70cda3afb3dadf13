"""Results for people and for programs: a table with bars in 80 columns, and one JSON object.

Whether an aim is met stands there as a word, too: colour alone says nothing to a file, or to those who do not see it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .bench import Aim, Result, Settings
from .bench_place import free_memory
from .console import size

if TYPE_CHECKING:
    from rich.console import RenderableType

_BAR = 10  # columns of the longest bar
_COLUMNS: tuple[tuple[int, Literal["left", "right"]], ...] = (
    (26, "left"),
    (10, "right"),
    (_BAR, "left"),
    (10, "right"),
    (13, "left"),
    (6, "left"),
)
_STYLES = {"met": "green", "MISSED": "bold red"}
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def amount(value: float, unit: str) -> str:
    """A figure in its unit, for people."""
    match unit:
        case "s":
            return _span(value)
        case "B/s":
            return f"{size(value)}/s"
        case "B":
            return size(value)
        case "share":
            return f"{value * 100:.2g} %"
        case "exponent":
            return f"n^{value:.2f}"
        case _:
            return f"{value:,.0f} {unit}"


def _span(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 0.9995:
            return f"{seconds * factor:,.3g} {unit}" if seconds * factor < 999.5 else f"{seconds * factor:,.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def ratio(value: float) -> str:
    """``1.42``, ``5.2``, ``38``; below a fifth as a part: ``1/25``."""
    if value < 0.2:
        return f"1/{1 / value:,.0f}" if value < 0.095 else f"1/{1 / value:.1f}"
    return f"{value:.2f}" if value < 9.995 else f"{value:,.0f}"


def aim(wanted: Aim, unit: str) -> str:
    if wanted.of == "ratio":
        return f"{wanted.sense} {ratio(wanted.bound)}"
    known = unit in ("s", "B/s", "B", "share", "exponent")  # what is counted stands beside it already
    return f"{wanted.sense} {amount(wanted.bound, unit if known else '').strip()}"


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def bar(value: float, most: float, *, blocks: bool = True) -> str:
    """A length as characters, in eighths of one where the terminal has blocks."""
    if most <= 0:
        return ""
    eighths = max(round(value / most * _BAR * 8), 1)
    if not blocks:
        return "#" * max(eighths // 8, 1)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def as_json(settings: Settings, about: Mapping[str, Any], results: Iterable[Result]) -> dict[str, Any]:
    """One object: the box, what was asked for, and every result with ``met``."""
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    rows = [{**asdict(result), "met": result.met} for result in results]
    return {"box": about, "settings": asked, "results": rows}


def box() -> dict[str, Any]:
    """What the figures belong to; taken before they are, because measuring is load, too."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_free": free_memory(),
        "load": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("wsync", "torch", "numpy", "safetensors", "tensordict", "torchrl")},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def headline(settings: Settings, about: Mapping[str, Any]) -> str:
    """A few lines: the box, and what was asked for."""
    lines = [
        f"{about['processor']}, {about['cores']} cores, {size(about['memory_free'])} free, load {about['load']}",
        f"Linux {about['kernel']}, Python {about['python']}, torch {about['torch']}",
        f"{size(settings.size)} in {settings.tensors:,} tensors, {settings.readers} readers",
    ]
    if about["load"] > about["cores"] / 2:
        lines.append("the box is busy with something else: take these figures again when it is idle")
    return "\n".join(lines)


def print_results(title: str, results: list[Result]) -> None:
    """The table on stdout: each thing that was measured, and under it what it stands beside, with bars."""
    from .tables import stdout_console

    console = stdout_console()
    blocks = (console.encoding or "").lower().startswith("utf")
    console.print(title, markup=False)
    for _, group in groupby(results, key=lambda result: (result.case, result.name)):
        console.print(_group(list(group), blocks=blocks))
    console.print(summary(results), markup=False)


def _group(results: list[Result], *, blocks: bool) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1, 0, 0))
    for width, side in _COLUMNS:
        table.add_column(width=width, justify=side, no_wrap=True)
    for name, value, length, figure, wanted, told in _rows(results, blocks=blocks):
        table.add_row(f"  {name}", value, Text(length, "cyan"), figure, wanted, Text(told, _STYLES.get(told, "")))
    reasons = [
        Text(f"  {result.beside}{': ' if result.beside else ''}not measured: {result.skipped}", "dim")
        for result in results
        if result.skipped
    ]
    return Group(Text(""), Text(results[0].name, "bold"), *([table] if table.rows else []), *reasons)


def _rows(results: list[Result], *, blocks: bool) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Name, figure, bar, ratio, aim and verdict of each line: ours, the others, and the points of a curve."""
    measured = [result for result in results if result.value is not None]
    if not measured:
        return
    first = measured[0]
    assert first.value is not None
    others = [result for result in measured if result.beside_value is not None]
    lengths = [first.value, *(result.beside_value or 0.0 for result in others)] if others else [0.0]
    most = max(lengths)
    told = _aims(first, "value", first.value)
    yield ("wsync", amount(first.value, first.unit), bar(first.value, most, blocks=blocks), "", *told)
    for result in others:
        assert result.beside_value is not None and result.ratio is not None
        spread = "" if result.spread is None else f" {'±' if blocks else '+-'}{result.spread * 100:.0f}%"
        told = _aims(result, "ratio", result.ratio)
        length = bar(result.beside_value, most, blocks=blocks)
        yield (result.beside, amount(result.beside_value, result.unit), length, ratio(result.ratio) + spread, *told)
    longest = max((seconds for _, seconds in first.points), default=0.0)
    for number, seconds in first.points:
        yield (f"{number:,.0f}", amount(seconds, "s"), bar(seconds, longest, blocks=blocks), "", "", "")


def _aims(result: Result, of: str, figure: float) -> tuple[str, str]:
    wanted = [each for each in result.aims if each.of == of]
    if not wanted:
        return "", ""
    return aim(wanted[0], result.unit), verdict(all(each.met_by(figure) for each in wanted))


def summary(results: Iterable[Result]) -> str:
    """How many aims are met; the last line of the table."""
    told = [result.met for result in results if result.met is not None]
    left = sum(bool(result.skipped) for result in results)
    skipped = f"; {left} not measured" if left else ""
    return f"\n{told.count(True)} of {len(told)} within the aim{skipped}. A ratio is wsync by the other."
