"""What ``wsync push`` and ``wsync promote`` print: the outcome as a line or as JSON, and a progress bar before."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import WithDifferences, harmless, printable
from ...sync.outcome import Outcome
from ...text import count, duration, size

_FIELDS = ("status", "name", "version", "step", "checkpoint", "bytes", "seconds", "readers", "reason")


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    data: dict[str, Any] = {name: getattr(outcome, name) for name in _FIELDS}
    if outcome.pin is not None:
        data["pin"] = outcome.pin
    for name in ("newer", "warning"):
        if (value := getattr(outcome, name)) is not None:
            data[name] = value
    if outcome.casts:
        data["casts"] = list(outcome.casts)
    if outcome.differences:
        data["differences"] = [asdict(d) for d in outcome.differences]
    return data


def outcome_line(outcome: Outcome) -> str:
    file = printable(Path(outcome.checkpoint).name) if outcome.checkpoint else "weights from memory"
    step = "" if outcome.step is None else f", step {outcome.step}"
    live = f"version {outcome.version} stays live" if outcome.version else ""
    match outcome.status:
        case "published":
            back = ", step went back" if outcome.backwards else ""
            staged = f"{size(outcome.bytes)} in {duration(outcome.seconds)}"
            return f"version {outcome.version}{step}{back}, {file}, {staged}, {count(outcome.readers, 'reader')}"
        case "checked":
            would = f"{file}{step} would be published, {size(outcome.bytes)}"
            return _joined(would, outcome.reason or "", live or "nothing is live")
        case "current":
            newer = f"{printable(Path(outcome.newer).name)} is newer, and not complete yet" if outcome.newer else ""
            return _joined(f"version {outcome.version}{step} is current, {file}", newer or outcome.reason or "")
    again = "`wsync push --retry` tries it again" if outcome.known else ""
    return _joined(f"{outcome.status}: {outcome.reason}", live, again)


def _joined(*clauses: str) -> str:
    """Joins clauses with semicolons; after a whole sentence, the next clause becomes a sentence, too."""
    text = ""
    for clause in filter(None, clauses):
        if text.endswith("."):
            text += f" {clause[0].upper()}{clause[1:].removesuffix('.')}."
        else:
            text += f"; {clause}" if text else clause
    return text


def tell(outcome: Outcome, *, as_json: bool, quiet: bool = False) -> None:
    """Prints what a push did: what went live to stdout, what did not to stderr, with the differences.

    Args:
        quiet: print nothing about what went live.
    """
    refusals = [*outcome.passed_over]
    if outcome.exit_code and not as_json:
        refusals.append(outcome)
    for refused in refusals:
        text = f"{refused.name}: {outcome_line(refused)}"
        print(harmless(str(WithDifferences(text, refused.differences))), file=sys.stderr)
    if as_json:
        print(json.dumps(outcome_json(outcome)))
        return
    if outcome.warning:
        print(harmless(f"{outcome.name}: {outcome.warning}"), file=sys.stderr)
    if quiet:
        return
    for cast in outcome.casts:
        print(harmless(f"{outcome.name}: {cast}"), file=sys.stderr)
    if not outcome.exit_code:
        print(harmless(f"{outcome.name}: {outcome_line(outcome)}"))


@contextmanager
def transfer_bar() -> Iterator[Callable[[int, int], None]]:
    """Shows bytes, rate and time left on stderr until the block ends; yields a function of bytes done and in total."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)
