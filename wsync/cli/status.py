"""``wsync status``: what is live, pinned and failing, for people, for programs, and for a monitor's exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from typing import Any

from ..errors import SegmentError, StateError, UsageError
from ..fleet.membership import group_of
from ..history.database import State
from ..segment.segment import Segment, segments
from .console import complain, segment_json, to_json

_REFRESH = 1.0  # seconds
Place = str | os.PathLike[str] | None


def show(name: str | None, runtime: Place, state: Place, max_staleness: float | None, *, as_json: bool) -> int:
    """Prints one look at the standing segments; returns the exit code.

    Args:
        name: of one segment; None takes all.
        max_staleness: seconds after which a live version is too old for a monitor; None never is.

    Raises:
        UsageError: that is no time.
        SegmentError: the one segment that was named is not there, or is unusable.
    """
    if max_staleness is not None and not max_staleness > 0:
        raise UsageError(f"--max-staleness {max_staleness} is no time. Give seconds above 0.")
    told, code = look(name, runtime, state)
    if as_json:
        print(to_json(told[0] if name else {"segments": told}))
    else:
        from .tables import status_view, stdout_console

        stdout_console().print(status_view(told), soft_wrap=True)
    if max_staleness is None:
        return code
    ages = [time.time() - each["published_at"].timestamp() if each["version"] else max_staleness for each in told]
    return code or int(max(ages, default=max_staleness) >= max_staleness)


def follow(name: str | None, runtime: Place, state: Place) -> None:
    """Shows it again and again until interrupted: in place, or one below the other where that is no terminal."""
    from rich.live import Live

    from .tables import status_view, stdout_console

    console = stdout_console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the cursor is shown again
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        view = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        while True:
            shown = status_view(look(name, runtime, state)[0])
            if view:
                view.update(shown, refresh=True)
            else:
                console.print(shown)
                sys.stdout.flush()
            time.sleep(_REFRESH)


def look(name: str | None, runtime: Place, state: Place) -> tuple[list[dict[str, Any]], int]:
    """What there is to tell of each segment, as ``segment_json`` has it, and 1 where one of them is unusable."""
    told, code = [], 0
    for each in [name] if name else segments(runtime):
        try:
            with closing(Segment.open(each, runtime)) as segment:
                segment.check()
                told.append(_told(segment, state))
        except SegmentError as exc:  # one that is unusable, or was just removed, must not hide the others
            if name:
                raise
            complain(exc)
            code = exc.exit_code
    return told, code


def _told(segment: Segment, place: Place) -> dict[str, Any]:
    """The segment, its pin, the last failure where nothing was published since, and its group where it has one."""
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
