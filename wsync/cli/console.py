"""The output for people: one line for a push, tables for status, a panel or log lines for a watch.

rich is loaded only to draw a table or the panel, not for a line. Without a terminal there are
plain lines without colour, or JSON lines, one an event.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import SHOWN, BeingRewritten, Difference, WithDifferences, WsyncError, harmless, printable
from ..history.outcome import Outcome
from ..segment.reach import oldest_version
from ..segment.segment import Segment
from ..text import count, duration, size, when

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_STYLES = {"info": "", "warning": "yellow", "error": "red"}
_TOLD = ("status", "name", "version", "step", "checkpoint", "bytes", "seconds", "readers", "reason")
_REMEMBERED = 1024  # refused checkpoints that a log does not report again

LogFormat = Literal["rich", "plain", "json"]
LOGGED = 5
"""Differences that stand in a log line."""


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    data: dict[str, Any] = {name: getattr(outcome, name) for name in _TOLD}
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
    """One line that says what a pass did."""
    file = printable(Path(outcome.checkpoint).name) if outcome.checkpoint else "weights from memory"
    step = "" if outcome.step is None else f", step {outcome.step}"
    live = f"version {outcome.version} stays live" if outcome.version else ""
    match outcome.status:
        case "published":
            back = ", step went back" if outcome.backwards else ""
            staged = f"{size(outcome.bytes)} in {duration(outcome.seconds)}"
            return f"version {outcome.version}{step}{back}, {file}, {staged}, {count(outcome.readers, 'reader')}"
        case "checked":
            told = f"{file}{step} would be published, {size(outcome.bytes)}"
            return _joined(told, outcome.reason or "", live or "nothing is live")
        case "current":
            newer = f"{printable(Path(outcome.newer).name)} is newer, and not complete yet" if outcome.newer else ""
            return _joined(f"version {outcome.version}{step} is current, {file}", newer or outcome.reason or "")
    again = "`wsync push --retry` tries it again" if outcome.known else ""
    return _joined(f"{outcome.status}: {outcome.reason}", live, again)


def _joined(*clauses: str) -> str:
    """Clauses one after another; after one that is a sentence the next is one too."""
    told = ""
    for clause in filter(None, clauses):
        if told.endswith("."):
            told += f" {clause[0].upper()}{clause[1:].removesuffix('.')}."
        else:
            told += f"; {clause}" if told else clause
    return told


def one_line(text: str, differences: Iterable[Difference] = ()) -> str:
    """Joins a text of several lines into one line of printable characters, so that a log keeps it as one event.

    Differences follow the text, the first ``LOGGED`` of them.
    """
    rows = [f"{d.name}: expected {d.expected}, found {d.found}" for d in differences]
    more = [f"{len(rows) - LOGGED} more"] if len(rows) > LOGGED else []
    lines = [line.strip() for line in [*text.splitlines(), *rows[:LOGGED], *more]]
    return printable("; ".join(filter(None, lines)).replace(".; ", ". ").replace(":; ", ": "))


def complain(exc: WsyncError) -> None:
    print(f"wsync: {harmless(str(exc))}", file=sys.stderr)


def tell(outcome: Outcome, *, as_json: bool, quiet: bool = False) -> None:
    """Prints what a push did: what went live to stdout, what did not to stderr, with the differences.

    Args:
        quiet: print nothing about what went live.
    """
    told = [*outcome.passed_over]
    if outcome.exit_code and not as_json:
        told.append(outcome)
    for refused in told:
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


def unwind_at(*numbers: int) -> None:
    """Unwinds this process at the first of these signals, which ends what it started; later ones are ignored."""

    def end(number: int, _: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as of nohup(1)
            signal.signal(number, end)


@contextmanager
def transfer_bar() -> Iterator[Callable[[int, int], None]]:
    """Shows bytes, rate and time left on stderr until the block ends: called with bytes done, and bytes in all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


def segment_json(segment: Segment) -> dict[str, Any]:
    """A segment and its readers, for programs and for the tables; each time is a ``datetime`` (see ``to_json``)."""
    live, readers = segment.live(), segment.readers()
    version = live.version if live else 0
    return {
        "name": segment.name,
        "version": version,
        "step": live.step if live else None,
        "checkpoint": (live.source or None) if live else None,
        "published_at": datetime.fromtimestamp(live.published_at, UTC) if live else None,
        "pin": None,
        "last_failure": None,
        "bytes": segment.layout.nbytes,
        "tensors": len(segment.layout.tensors),
        "slots": segment.slots,
        "added_slots": len(segment.slot_numbers()) - segment.slots,
        "max_slots": segment.bound,
        "oldest_version": oldest_version(segment),
        "readers": [
            {
                "pid": r.pid,
                "process": r.process,
                "mode": r.mode,
                "version": r.version,
                "lag": version - r.version,
                "since": datetime.fromtimestamp(r.since, UTC),
                "lease_since": datetime.fromtimestamp(r.oldest, UTC) if r.oldest else None,
                "holds": segment.held_back(r),
            }
            for r in readers
        ],
    }


def to_json(data: Any) -> str:
    """JSON on one line, with times as ``when`` writes them and paths as texts."""
    return json.dumps(
        data, default=lambda value: when(value.timestamp()) if isinstance(value, datetime) else str(value)
    )


class WatchLog:
    """Logs a watch's passes: each event once, not each pass.

    Args:
        name: of the segment.
        form: ``rich`` is a panel on a terminal, ``plain`` a line an event, ``json`` an object a line.
        segment: gives the standing segment, for the readers in the panel.
        status: called with each event in one line.
        rewriting: seconds for which a checkpoint may be rewritten before it is logged.
    """

    def __init__(
        self,
        name: str,
        checkpoints: Path,
        form: LogFormat,
        segment: Callable[[], Segment | None],
        status: Callable[[str], None] | None = None,
        rewriting: float = 60.0,
    ) -> None:
        self._name, self._checkpoints, self._form, self._segment = name, checkpoints, form, segment
        self._status = status
        self._rewriting, self._rewritten_since = rewriting, 0.0
        self._last: tuple[str, str] = ("", "")
        self._refused: dict[str, None] = {}  # the one that was logged or seen last comes last
        self._failing: dict[str, str] = {}  # hooks whose last run failed, and why
        self._writing = threading.Lock()  # hooks report from threads of their own
        self._version = 0  # that was live after the last pass
        self._done = (0, 0)
        self._stage_began = 0.0
        self._live: Live | None = None

    def __enter__(self) -> WatchLog:
        if self._form == "rich":
            from rich.console import Console
            from rich.live import Live

            console = Console(markup=False, emoji=False, highlight=False, log_path=False, log_time_format="%H:%M:%S")
            self._live = Live(console=console, get_renderable=self._panel, refresh_per_second=2, transient=True)
            self._live.start()
        self.note("info", "watch", f"watching {self._checkpoints}")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()
            self._live = None
        segment = self._segment()
        version = segment.version if segment else self._version
        live = f"version {version} stays live" if version else "nothing is live"
        self.note("info", "stop", f"stopped; {live}")

    def tell(self, event: Outcome | WsyncError) -> None:
        """Logs the outcome of a pass, or why it failed. Except for a publish, it does not repeat what it said last."""
        if isinstance(event, WsyncError):
            key = ("failed", str(event))
            if key != self._last:
                self.note("error", "failure", event.message, differences=event.differences)
        else:
            self._version = event.version
            for refused in event.passed_over:
                self._refusal(refused)
            if event.kind != BeingRewritten.kind:
                self._rewritten_since = 0.0
            elif not self._rewritten_since or time.monotonic() - self._rewritten_since < self._rewriting:
                self._rewritten_since = self._rewritten_since or time.monotonic()
                return
            key = (event.status, event.identity or event.reason or "")
            known = key == self._last or (event.status == "current" and self._last[0] in ("current", "published"))
            if event.status == "rejected":
                self._refusal(event)
            elif event.status == "published" or not known:
                self._outcome({"busy": "warning", "failed": "error"}.get(event.status, "info"), event)
            if event.warning:
                self.note("warning", "late", event.warning)
            if self._form != "json":  # there they are in the event
                for cast in event.casts:
                    self.note("info", "cast", cast)
        self._last = key

    def reached(self, version: int, readers: int, seconds: float) -> None:
        """Logs, for programs, that all readers have a version; people see it in the panel."""
        if self._form == "json":
            told = {"version": version, "readers": readers, "seconds": round(seconds, 6)}
            self.note("info", "reached", f"version {version} is with {count(readers, 'reader')}", told)

    def hook(self, kind: str, ok: bool, message: str) -> None:
        """Logs a failure of a hook once, as long as it stays the same, and once that the hook works again."""
        known = self._failing.pop(kind, None)
        if not ok:
            self._failing[kind] = message
        if (known is not None) if ok else known != message:
            self.note("info" if ok else "warning", "hook", message)

    def _refusal(self, refused: Outcome) -> None:
        """Logs a refused checkpoint once, as long as it does not change."""
        if refused.identity not in self._refused:
            self._outcome("error", refused)
        self._refused[refused.identity] = self._refused.pop(refused.identity, None)
        while len(self._refused) > _REMEMBERED:
            del self._refused[next(iter(self._refused))]

    def progress(self, done: int, total: int) -> None:
        if done < self._done[0] or not self._done[1]:
            self._stage_began = time.monotonic()
        self._done = (done, total) if done < total else (0, 0)
        if self._live and time.monotonic() - self._stage_began > 1:
            self._live.refresh()

    def _outcome(self, level: str, outcome: Outcome) -> None:
        self.note(level, outcome.status, outcome_line(outcome), outcome_json(outcome), outcome.differences)

    def note(
        self,
        level: str,
        event: str,
        text: str,
        data: dict[str, Any] | None = None,
        differences: tuple[Difference, ...] = (),
    ) -> None:
        """Logs one event.

        Args:
            data: the fields of the JSON object; with None it holds the text.
            differences: shown below the text.
        """
        text = f"{self._name}: {text}"
        now = when(time.time())
        line = one_line(text, differences)
        if self._status:
            self._status(line)
        whole = str(WithDifferences(text, differences))
        with self._writing:
            if self._form == "json":
                record = {"time": now, "level": level, "event": event, "name": self._name}
                print(json.dumps(record | (data or {"message": whole})), flush=True)
            elif self._live:
                from rich.text import Text

                console, table = self._live.console, harmless(whole[len(text) + 1 :])
                console.log(harmless(text), style=_STYLES[level])  # wrapped at words, beside the time
                if table:
                    console.print(Text(table, _STYLES[level], no_wrap=True, overflow="ignore"), crop=False)
            else:
                print(f"{now} {level:<7} {line}", flush=True)

    def _panel(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        from .tables import segment_view

        segment = self._segment()
        told: dict[str, Any] = {"name": self._name, "version": 0, "readers": []}
        with suppress(OSError, ValueError, WsyncError):  # it is being closed, or is gone: the next pass tells
            told = segment_json(segment) if segment else told
        parts = [segment_view(told, most=SHOWN)]
        done, total = self._done
        if total and time.monotonic() - self._stage_began > 1:
            bar = Table.grid()
            bar.add_row(ProgressBar(total=total, completed=done, width=40))
            parts += [Text(f"staging {size(done)} of {size(total)}"), bar]
        return Panel(Group(*parts), title="wsync watch", title_align="left")


def default_format() -> LogFormat:
    """rich on a terminal, plain lines elsewhere."""
    return "rich" if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else "plain"
