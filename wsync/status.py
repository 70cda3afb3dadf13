"""``wsync status``: what is live, pinned and failing, for people, for programs, and for a monitor's exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack, suppress

from .badge import few, group_of
from .console import complain, duration, segment_json
from .errors import SegmentError, StateError, UsageError, printable
from .segment import Segment, segments
from .segment_files import Publication
from .state import Event, State

_REFRESH = 1.0  # seconds


class Status:
    """One look at the standing segments.

    Args:
        name: of one segment; None takes all.
        max_staleness: seconds after which a live version is too old for a monitor; None never is.

    Raises:
        UsageError: that is no time.
    """

    def __init__(
        self,
        name: str | None,
        runtime: str | os.PathLike[str] | None,
        state: str | os.PathLike[str] | None,
        max_staleness: float | None = None,
    ) -> None:
        if max_staleness is not None and not max_staleness > 0:
            raise UsageError(f"--max-staleness {max_staleness} is no time. Give seconds above 0.")
        self._name, self._runtime, self._state, self._max = name, runtime, state, max_staleness

    def show(self, *, as_json: bool) -> int:
        """Prints it; the exit code.

        Raises:
            SegmentError: the one segment that was named is not there, or is unusable.
        """
        opened, code = self._open()
        if as_json:
            import json

            told = [segment_json(segment, *self._pin_and_failure(segment)) for segment in opened]
            for table, segment in zip(told, opened, strict=True):
                if group := group_of(segment.path):
                    table["group"] = group
            print(json.dumps(told[0] if self._name else {"segments": told}))
        else:
            from .tables import print_status

            print_status(opened, {segment.name: self._notes(segment) for segment in opened})
        stale = self._max is not None and (not opened or any(self._is_stale(segment.live()) for segment in opened))
        for segment in opened:
            segment.close()
        return code or int(stale)

    def follow(self) -> None:
        """Shows it again and again until interrupted: in place, or one below the other where that is no terminal."""
        from rich.live import Live

        from .tables import status_view, stdout_console

        console = stdout_console()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the cursor is shown again
        with suppress(KeyboardInterrupt), ExitStack() as stack:
            view = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
            while True:
                opened, _ = self._open()
                shown = status_view(opened, {s.name: self._notes(s) for s in opened})
                if view:
                    view.update(shown, refresh=True)
                else:
                    console.print(shown)
                    sys.stdout.flush()
                for segment in opened:
                    segment.close()
                time.sleep(_REFRESH)

    def _open(self) -> tuple[list[Segment], int]:
        opened, code = [], 0
        for each in [self._name] if self._name else segments(self._runtime):
            try:
                segment = Segment.open(each, self._runtime)
                segment.check()
                opened.append(segment)
            except SegmentError as exc:  # one that is unusable, or was just removed, must not hide the others
                if self._name:
                    raise
                complain(exc)
                code = exc.exit_code
        return opened, code

    def _is_stale(self, live: Publication | None) -> bool:
        return self._max is not None and (live is None or time.time() - live.published_at > self._max)

    def _pin_and_failure(self, segment: Segment) -> tuple[str | None, Event | None]:
        """What is pinned, and the last failure where nothing was published since."""
        live = segment.live()
        pin, failures = None, list[Event]()
        with State(segment.name, self._state) as state:
            try:
                pin = state.pin()
            except StateError as exc:
                complain(exc)
            try:
                failures = state.events(kinds=("failure", "reject"), limit=1)
            except StateError as exc:
                complain(exc)
        failure = failures[-1] if failures and (live is None or failures[-1].at > live.published_at) else None
        return pin.name if pin else None, failure

    def _notes(self, segment: Segment) -> list[str]:
        pin, failure = self._pin_and_failure(segment)
        notes = [f"pinned: {printable(pin)}"] if pin else []
        if group := group_of(segment.path):
            notes.append(f"group: rank {group['rank']} of {group['size']}: {few(group['boxes'])}")
        if failure:
            ago = duration(max(0.0, time.time() - failure.at))
            reason = " ".join((failure.reason or "").split())
            notes.append(f"last failure {ago} ago: {printable(reason[:200])}")
        return notes
