"""Drops what a policy wrote into its private mapping of a slot, beside its steps.

A reader maps slots privately, so that what the policy writes there is its own. Such pages must be gone when the slot
comes back with its next version. To look for them takes the longer the more weights there are (1 ms for 64 MiB), so it
is done by a thread as soon as the policy has left a slot: nothing of the process points there any more, and the slot is
staged anew before it comes back. A swap then costs the same whatever the weights' size.
"""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue

from .addresses import Stretch
from .helper import Done
from .memory import renew


class Renewal:
    """One private mapping of a slot on its way to show the file again."""

    def __init__(self, stretch: Stretch, nbytes: int) -> None:
        self._stretch: Stretch | None = stretch  # until it is done
        self._address, self._nbytes = stretch.start, nbytes
        self._done = Done()
        self._written = False
        self._error: Exception | None = None
        try:
            _todo().put(self)
        except RuntimeError:  # this process may have no more threads
            self._run()

    def wait(self) -> bool:
        """Whether the policy had written there, once it is done.

        Raises:
            OSError: the system refused it; the mapping may still show what was written.
        """
        self._done.wait()
        if self._error:
            raise self._error
        return self._written

    def _run(self) -> None:
        try:
            self._written = renew(self._address, self._nbytes)
        except Exception as exc:  # whatever it is, somebody waits, and more may come
            self._error = exc
        self._stretch = None
        self._done.tell()


_queue: SimpleQueue[Renewal] | None = None


def _todo() -> SimpleQueue[Renewal]:
    """What the one thread of this process takes its work from; it starts with the first."""
    global _queue
    if _queue is None:
        queue: SimpleQueue[Renewal] = SimpleQueue()
        threading.Thread(target=_work, args=(queue,), name="wsync-renewal", daemon=True).start()
        _queue = queue
    return _queue


def _work(queue: SimpleQueue[Renewal]) -> None:
    while True:
        queue.get()._run()


def _after_fork() -> None:
    """A child has no such thread; what its parent began is done anew by who needs it."""
    global _queue
    _queue = None


os.register_at_fork(after_in_child=_after_fork)
