"""What ``wsync watch`` prints: a panel on a terminal, or else plain lines or JSON lines, one per event."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...errors import (
    SHOWN,
    BeingRewritten,
    Difference,
    NoCheckpoint,
    WithDifferences,
    WsyncError,
    harmless,
    printable,
)
from ...segment.segment import Segment
from ...sync.outcome import Outcome
from ...text import count, size, when
from .push import outcome_json, outcome_line

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_STYLES = {"info": "", "warning": "yellow", "error": "red"}

LogFormat = Literal["rich", "plain", "json"]
LOGGED = 5
"""Most differences in a log line."""


def one_line(text: str, differences: Iterable[Difference] = ()) -> str:
    """Joins a text of several lines into one line of printable characters, so that a log keeps it as one event.

    Differences follow the text, the first ``LOGGED`` of them.
    """
    rows = [f"{d.name}: expected {d.expected}, found {d.found}" for d in differences]
    more = [f"{len(rows) - LOGGED} more"] if len(rows) > LOGGED else []
    lines = [line.strip() for line in [*text.splitlines(), *rows[:LOGGED], *more]]
    return printable("; ".join(filter(None, lines)).replace(".; ", ". ").replace(":; ", ": "))


class WatchLog:
    """Logs a watch's passes: each event once, not each pass.

    Args:
        name: name of the segment.
        checkpoints: where checkpoints appear.
        form: ``rich`` is a panel on a terminal, ``plain`` one line per event, ``json`` one JSON object per line.
        segment: returns the open segment, if any, for the readers in the panel.
        status: called with each event, as one line.
        rewriting: seconds for which a checkpoint may be rewritten before that is logged.
        remembered: most refused checkpoints that are remembered, so that they are not logged again.
    """

    def __init__(
        self,
        name: str,
        checkpoints: Path,
        form: LogFormat,
        segment: Callable[[], Segment | None],
        status: Callable[[str], None] | None = None,
        rewriting: float = 60.0,
        remembered: int = 1024,
    ) -> None:
        self._name, self._checkpoints, self._form, self._segment = name, checkpoints, form, segment
        self._status, self._remembered = status, remembered
        self._rewriting, self._rewritten_since = rewriting, 0.0
        self._last: tuple[str, str] = ("", "")
        self._refused: dict[str, str] = {}  # why, by identity; the one that was logged or seen last comes last
        self._failing: dict[str, str] = {}  # hooks whose last run failed, and why
        self._writing = threading.Lock()  # hooks report from threads of their own
        self._version = 0  # live after the last pass
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
        """Logs the outcome of a pass, or why it failed; does not repeat the last line, unless it is a publish."""
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
            is_current = event.status == "current" and event.kind != NoCheckpoint.kind
            known = key == self._last or (is_current and self._last[0] in ("current", "published"))
            if event.status == "rejected":
                self._refusal(event)
            elif event.status == "published" or not known:
                self._outcome({"busy": "warning", "failed": "error"}.get(event.status, "info"), event)
            if event.warning:
                self.note("warning", "late", event.warning)
            if self._form != "json":  # in JSON they are in the event
                for cast in event.casts:
                    self.note("info", "cast", cast)
        self._last = key

    def reached(self, version: int, readers: int, seconds: float) -> None:
        """Logs, for programs, that all readers have a version; people see it in the panel."""
        if self._form == "json":
            data = {"version": version, "readers": readers, "seconds": round(seconds, 6)}
            self.note("info", "reached", f"version {version} is with {count(readers, 'reader')}", data)

    def hook(self, kind: str, ok: bool, message: str) -> None:
        """Logs a failure of a hook, once for each message in a row; and then once that the hook works again."""
        known = self._failing.pop(kind, None)
        if not ok:
            self._failing[kind] = message
        if (known is not None) if ok else known != message:
            self.note("info" if ok else "warning", "hook", message)

    def _refusal(self, refused: Outcome) -> None:
        """Logs a refused checkpoint once, as long as neither it nor the reason changes."""
        if self._refused.pop(refused.identity, None) != (reason := refused.reason or ""):
            self._outcome("error", refused)
        self._refused[refused.identity] = reason
        while len(self._refused) > self._remembered:
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
            data: the fields of the JSON object; None for ``message`` with the text.
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

        from .status import segment_json, segment_view

        segment = self._segment()
        data: dict[str, Any] = {"name": self._name, "version": 0, "readers": []}
        with suppress(OSError, ValueError, WsyncError):  # it is being closed, or is gone: the next pass reports it
            data = segment_json(segment) if segment else data
        parts = [segment_view(data, most=SHOWN)]
        done, total = self._done
        if total and time.monotonic() - self._stage_began > 1:
            bar = Table.grid()
            bar.add_row(ProgressBar(total=total, completed=done, width=40))
            parts += [Text(f"staging {size(done)} of {size(total)}"), bar]
        return Panel(Group(*parts), title="wsync watch", title_align="left")


def default_format() -> LogFormat:
    """rich on a terminal, plain lines elsewhere."""
    return "rich" if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else "plain"
