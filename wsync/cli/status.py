"""``wsync status``: what is live, pinned and failing, for people, for programs, and for a monitor's exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from typing import Any

from ..errors import SegmentError, StateError
from ..fleet.membership import group_of
from ..history.database import State
from ..segment.segment import Segment, segments
from .check import Bounds, check
from .console import complain, segment_json, to_json

_REFRESH = 1.0  # seconds
Place = str | os.PathLike[str] | None


def show(name: str | None, runtime: Place, state: Place, bounds: Bounds, *, as_json: bool) -> int:
    """Prints one look at the standing segments, or one line where bounds are given; returns the exit code.

    Args:
        name: of one segment; None takes all.

    Raises:
        SegmentError: the one segment that was named is not there, or is unusable, and no bounds are given.
    """
    told, broken = look(name, runtime, state)
    if name and broken and not bounds.given:
        raise broken[name]
    line, code = "", int(bool(broken))
    if bounds.given:
        line, code = check(told, {each: str(exc) for each, exc in broken.items()}, bounds, state)
    if not line or as_json:
        for exc in broken.values():
            complain(exc)
    if as_json:
        print(to_json((told[0] if told else {}) if name else {"segments": told}))
    elif line:
        print(line)
    else:
        from .tables import status_view, stdout_console

        stdout_console().print(status_view(told), soft_wrap=True)
    return code


def follow(name: str | None, runtime: Place, state: Place) -> None:
    """Shows the status again and again until interrupted: in place on a terminal, otherwise one below the other."""
    from rich.live import Live

    from .tables import stdout_console
    from .top import view_of

    console = stdout_console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the cursor is shown again
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        view = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        while True:
            told, broken = look(name, runtime, state)
            lines = console.height - 1 if view else sys.maxsize
            shown = view_of(told, broken, lambda each: recent(each, state), lines)
            if view:
                view.update(shown, refresh=True)
            else:
                console.print(shown)
                sys.stdout.flush()
            time.sleep(_REFRESH)


def recent(name: str, place: Place) -> int:
    """Versions that went live within the last minute."""
    try:
        with State(name, place) as state:
            return len(state.events(kinds=("publish", "rollback"), since=time.time() - 60))
    except StateError:
        return 0


def look(name: str | None, runtime: Place, state: Place) -> tuple[list[dict[str, Any]], dict[str, SegmentError]]:
    """Returns each readable segment as ``segment_json`` gives it, and the error of each other one by name."""
    told: list[dict[str, Any]] = []
    broken: dict[str, SegmentError] = {}
    for each in [name] if name else segments(runtime):
        try:
            with closing(Segment.open(each, runtime)) as segment:
                segment.check()
                told.append(_told(segment, state))
        except SegmentError as exc:  # one that is unusable, or was just removed, must not hide the others
            broken[each] = exc
    return told, broken


def _told(segment: Segment, place: Place) -> dict[str, Any]:
    """The segment, its pin, its last failure if nothing was published since, and its group if it has one."""
    told = segment_json(segment)
    with State(segment.name, place) as state:
        try:
            if pin := state.pin():
                told["pin"] = pin.name
        except StateError as exc:
            complain(exc)
        try:
            for failure in state.events(kinds=("failure", "reject"), limit=1):
                at = datetime.fromtimestamp(failure.at, UTC)
                if not told["published_at"] or at > told["published_at"]:
                    told["last_failure"] = {"at": at, "reason": failure.reason}
        except StateError as exc:
            complain(exc)
    if group := group_of(segment.path):
        told["group"] = group
    return told
