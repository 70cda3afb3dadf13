"""What an operator looks at: the screen of ``status --watch`` and the picture of ``log --plot``, in 80 columns."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console

from wsync.cli.output import log
from wsync.cli.output.status import view_of
from wsync.errors import SegmentUnsafe
from wsync.history.state import Event


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A terminal of 80 columns on which both are drawn; gives its lines."""
    console = Console(width=80, record=True, file=io.StringIO(), markup=False, highlight=False)
    monkeypatch.setattr(log, "stdout_console", lambda: console)

    def lines(shown: Any = None) -> list[str]:
        if shown is not None:
            console.print(shown)
        return console.export_text().splitlines()

    return lines


def told(name: str, **more: Any) -> dict[str, Any]:
    now = datetime.now(UTC)
    reader = {"pid": 4_000_000, "process": "a-program-of-a-long-name.py", "mode": "swap", "version": 5, "lag": 2}
    return {
        "name": name,
        "version": 7,
        "step": 1_000_000_000,
        "published_at": now - timedelta(days=40),
        "pin": None,
        "last_failure": None,
        "readers": [{**reader, "since": now}],
        **more,
    }


def test_the_screen_holds_all_segments_in_80_columns(screen: Callable[..., list[str]]) -> None:
    """What is in trouble comes first; what does not fit is counted, and no line is longer."""
    failure = {"at": datetime.now(UTC), "reason": "no room\nfor it " * 20}
    segments = [told("actor"), told("critic" * 30, pin="a"), told("failing", last_failure=failure)]
    segments.append(told("fresh", version=0, step=None, published_at=None, readers=[]))
    broken = {"broken": SegmentUnsafe("its control page is damaged. " * 9)}
    lines = screen(view_of(segments, broken, lambda name: 12, 40))
    assert max(map(len, lines)) <= 80 and "5 segments, 3 readers" in lines[0]
    assert lines[2].startswith("broken: its control page") and lines[3].startswith("failing ")
    (actor,) = (line.split() for line in lines if line.startswith("actor"))
    assert actor == ["actor", "7", "1000000000", "40", "d", "0", "h", "12"]
    assert any("nothing live" in line for line in lines) and any("(pinned)" in line for line in lines)
    lines = screen(view_of(segments, broken, lambda name: 12, 6))
    assert len(lines) == 6 and lines[-1] == "… and 6 more lines"


def test_the_picture_shows_steps_gaps_and_rejections(screen: Callable[..., list[str]]) -> None:
    """A column is a stretch of time: empty where nothing came, marked where a checkpoint was refused."""
    now = time.time()
    events = [
        Event(n, now - 6500 + 100 * n, "publish", version=n, step=n, bytes=100, seconds=0.5, lag=0)
        for n in range(65)
        if not 20 <= n < 40
    ]
    events.append(Event(99, now - 6500 + 3050, "reject", version=19, reason="NaN"))
    log.print_plot("actor", sorted(events, key=lambda event: event.at), now)
    lines = screen()
    assert max(map(len, lines)) <= 80 and "45 publishes" in lines[0]
    rows = {line[:15].strip(): line[15:] for line in lines if line[:15].strip()}
    assert {"step", "versions", "marks", "publish time", "staging speed", "version lag"} < rows.keys()
    assert rows["versions"].count(" ") == 20 == rows["step"].count(" ") and rows["step"].strip()[-1] == "█"
    assert rows["marks"].strip() == "x" and rows["marks"].index("x") == 30
    log.print_plot("actor", [], now)
    assert screen() == ["actor: no publish to draw"]
