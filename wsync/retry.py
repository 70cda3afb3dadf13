"""What a watch does about passes that fail: counts them, and pauses longer after each.

A pass that fails (a disk's error, no shared memory, a runtime directory that is gone) has mostly to be mended by
somebody, and may have read gigabytes before it failed; so the pause doubles from ``poll`` to ``LONGEST``. What mends
most failures is another checkpoint, or one that can be read again: the pause ends early when the listing of the place
is not the one that the failed pass had. It is the listing that counts, not the notification, so that a storm of
notifications about nothing new ends no pause, and that a remote file system, which notifies of nothing, does.

A gate that asks for the same again later is paused for likewise, because each time the weights are staged anew; it is
no failure, and not counted as one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import RetryLater, WsyncError

if TYPE_CHECKING:
    from .changes import Changes
    from .outcome import Outcome

LONGEST = 60.0  # seconds between two passes, however many failed
_APART = 1.0  # seconds between two looks at the listing, however many notifications come


def pause_after(failures: int, poll: float) -> float:
    """Seconds to pause after so many failures in a row, one or more."""
    return min(poll * 2.0 ** min(failures - 1, 64), LONGEST)


class Failures:
    """Counts the passes that failed in a row, and pauses after each.

    Args:
        changes: the notifications.
        listing: tells one state of the place from another; must not raise.
        poll: seconds of the first pause.
        stop: ends a pause.

    Attributes:
        count: passes that failed in a row.
        pauses: passes in a row that are to be followed by a pause: those, and those of which a gate asked for later.
    """

    def __init__(self, changes: Changes, listing: Callable[[], object], poll: float, stop: threading.Event) -> None:
        self.count = self.pauses = 0
        self._changes, self._listing, self._poll, self._stop = changes, listing, poll, stop
        self._tried: object = None

    def before(self) -> None:
        """Remembers, after a failure, what the next pass is going to find; so that no change during it is missed."""
        self._tried = self._listing() if self.pauses else None

    def add(self, event: Outcome | WsyncError, bound: int) -> WsyncError | None:
        """Counts a pass; an error that tells so where more than ``bound`` failed in a row (-1: never)."""
        failed = isinstance(event, WsyncError) or event.status == "failed"
        self.count = self.count + 1 if failed else 0
        later = not isinstance(event, WsyncError) and event.kind == RetryLater.kind
        self.pauses = self.pauses + 1 if failed or later else 0
        if not 0 <= bound < self.count:
            return None
        reason = event if isinstance(event, WsyncError) else event.reason
        passes = "1 pass" if self.count == 1 else f"{self.count:,} passes in a row"
        return WsyncError(
            f"{passes} failed, and --max-failures is {bound}: the watch ends. Mend the last failure, then start it "
            f"again: {reason}"
        )

    def pause(self) -> None:
        """Pauses until the time is up, the place is another than the pass found, or the watch is stopped."""
        deadline = time.monotonic() + pause_after(self.pauses, self._poll)
        while (left := deadline - time.monotonic()) > 0 and not self._stop.wait(min(left, self._poll, _APART)):
            told = self._changes.wait(min(deadline - time.monotonic(), self._poll))
            if told if self._tried is None else self._listing() != self._tried:
                return
