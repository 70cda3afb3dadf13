"""The loop of a watch: pass after pass until it is stopped."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from ..checkpoints.files import remote
from ..errors import Stopped, UsageError, WsyncError
from ..history.outcome import Outcome
from ..segment.watching import Watching, WatchLock
from .schedule import Schedule
from .syncer import Syncer


def run(syncer: Syncer, stop: threading.Event, tell: Callable[[Outcome | WsyncError], None]) -> bool:
    """Runs passes until ``stop`` is set: at each notification, and at least every ``spec.poll`` seconds.

    Before the first pass it reads the policy's layout, unless that is known to fit. After passes that failed, or whose
    gate asked for later, it pauses longer (see ``schedule``).

    Args:
        tell: called with the outcome of each pass; with an error if the pass failed.

    Returns:
        Whether it was stopped; False if more than ``spec.max_failures`` passes failed in a row.

    Raises:
        UsageError: the first pass tells that a setting is wrong.
    """
    place = syncer.getter.checkpoints
    schedule = Schedule(syncer.spec, place, stop)
    passed = False  # from then on a wrong setting is no longer one that the operator just made
    event: Outcome | WsyncError
    syncer.box.stop = stop
    syncer.box.claim.one_shot = False
    syncer.lock = syncer.lock or WatchLock(Watching(os.getpid(), syncer.spec.origin, str(place)))
    if away := remote(place):
        away.store.stop = stop
    try:
        while not stop.is_set():
            if not schedule.due(syncer.spec.poll):
                continue
            try:
                if not passed:
                    syncer.prepare()
                event, passed = syncer.once(idle=schedule.is_idle), True
            except WsyncError as exc:
                if isinstance(exc, UsageError) and not passed:
                    raise
                event = exc
            if last := schedule.add(event):
                tell(last)
                return False
            tell(event)
            idle = isinstance(event, WsyncError) or event.status != "published"
            if idle and (segment := syncer.updater.opened):
                segment.unmap()  # until the next publish
    except Stopped:
        pass
    finally:
        schedule.close()
    return True
