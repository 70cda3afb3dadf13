"""What ``wsync push --quiet`` prints: each problem once, until it changes or ends. cron mails what is printed."""

from __future__ import annotations

import hashlib
import os
import re

from ...errors import BeingWritten, NoCheckpoint, RetryLater, WsyncError
from ...history.state import state_dir
from ...sync.outcome import Outcome

_NUMBER = r"(\d[\d.,]*( (ms|s|min|h|d|[kMGT]?B)\b)? ?)+"  # with its unit, as ``text`` writes them


class News:
    """The problems of the last push, in a file below the state directory.

    Args:
        spec: the spec as it was named; each spec has a file of its own.
        state: the state directory; default as for the history.
    """

    def __init__(self, spec: str, state: str | os.PathLike[str] | None) -> None:
        named = os.path.abspath(spec) if os.path.exists(spec) else spec
        self._file = state_dir(state) / f"push-{hashlib.sha256(os.fsencode(named)).hexdigest()[:16]}.told"

    def has(self, event: Outcome | WsyncError) -> bool:
        """Whether this should be reported; remembers it. A problem that passes by itself is not reported."""
        problems = _problems(event)
        try:
            before = self._file.read_text().splitlines() if self._file.is_file() else []
            if problems and problems != before:
                self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._file.write_text("\n".join(problems))
            elif before and not problems and event.exit_code == 0:
                self._file.unlink()
        except (OSError, UnicodeError):  # reporting too often is better than never
            return bool(problems)
        return not set(problems) <= set(before)


def _problems(event: Outcome | WsyncError) -> list[str]:
    """A line for each problem that identifies it, without those that pass by themselves."""
    if isinstance(event, WsyncError):
        said, refused = str(event), []
    else:
        said = event.warning or (event.reason if event.kind == NoCheckpoint.kind else "") or ""
        refused = [each for each in (*event.passed_over, event) if each.exit_code]
        passing = event.kind in (BeingWritten.kind, RetryLater.kind) or event.status == "busy"
        nothing = event.status == "empty" and not event.checkpoint and not event.version
        if (passing and len(refused) == 1) or nothing:
            refused = []
    said = re.sub(_NUMBER, "0 ", said).encode(errors="replace").decode()  # times and pids differ each time
    lines = (said, *(each.identity or each.reason or each.status for each in refused))
    return [" ".join(line.split()) for line in lines if line]
