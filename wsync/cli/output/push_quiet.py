"""What ``wsync push --quiet`` prints: each problem once, until it changes or ends. cron mails what is printed."""

from __future__ import annotations

import hashlib
import os
import re

from ...errors import BeingWritten, NoCheckpoint, RetryLater, WsyncError
from ...history.state import state_dir
from ...sync.outcome import Outcome


class News:
    """The problem that was reported last, in a file below the state directory.

    Args:
        spec: the spec as it was named; each spec has a file of its own.
        state: the state directory; default as for the history.
    """

    def __init__(self, spec: str, state: str | os.PathLike[str] | None) -> None:
        named = os.path.abspath(spec) if os.path.exists(spec) else spec
        self._file = state_dir(state) / f"push-{hashlib.sha256(os.fsencode(named)).hexdigest()[:16]}.told"

    def has(self, event: Outcome | WsyncError) -> bool:
        """Whether this should be reported; remembers it. A problem that passes by itself is not reported."""
        trouble = _trouble(event)
        try:
            before = self._file.read_text() if self._file.is_file() else ""
            if trouble and trouble != before:
                self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._file.write_text(trouble)
            elif before and not trouble and event.exit_code == 0:
                self._file.unlink()
        except (OSError, UnicodeError):  # reporting too often is better than never
            return bool(trouble)
        return bool(trouble) and trouble != before


def _trouble(event: Outcome | WsyncError) -> str:
    """A text that identifies the problem; empty if there is no problem, or one that passes by itself."""
    if isinstance(event, WsyncError) or event.warning or event.kind == NoCheckpoint.kind:
        said = str(event) if isinstance(event, WsyncError) else event.warning or event.reason or ""
        return re.sub(r"\d+", "0", said).encode(errors="replace").decode()  # free bytes and pids differ each time
    passing = event.kind in (BeingWritten.kind, RetryLater.kind) or event.status == "busy"
    nothing = event.status == "empty" and not event.checkpoint and not event.version
    refused = [each for each in (*event.passed_over, event) if each.exit_code]
    if not refused or (passing and len(refused) == 1) or nothing:
        return ""
    return " ".join(each.identity or each.reason or each.status for each in refused)
