"""A watch that keeps a whole group of boxes in step: one of them reads a checkpoint, and all put it live, or none.

All boxes of a group (``group``) go through the same rounds. In each round, every box reports what is live there and
what is pinned, and all draw the same conclusion (``reconcile``). Rank 0 looks for checkpoints, opens the newest, and
offers it; each box then publishes by ``publishing.publish``, with three votes on the way. Unless a vote is unanimous,
the publish ends on all boxes, with an error that names who refused, and why:

  ready    a spare slot is locked, in a segment of the same layout. Only then do bytes move
  read     on the box that reads: the weights are finite, and the file did not change. Then they are sent and compared
  agreed   each box's own gate accepts the staged weights
  store    no vote: every box stores the WORD, under a number one above the highest that any of them ever had

If a box dies before the last vote is counted, nothing is live anywhere, and the next group tries again. A box that
counted the vote stores the WORD; one that died, or was cut off, between that count and its store comes back one version
behind. Every box had accepted that version, so the next group brings it there, too: if boxes differ, the one with the
highest version that came from the group provides it (of two with the same number, the one that more boxes have). The
same happens to a box that joins late. A box that comes with other weights, under whatever number, gets the group's; if
its numbers are higher than the group's, all boxes take the next number, so that versions only grow. Weights that went
live elsewhere must pass a joining box's own gate; if it refuses them, that box keeps what it had, and reports that.

A pin on one box holds the whole group at what that box has: a ``wsync rollback`` or ``wsync pin`` there goes to all
boxes at the next round, without their gates, as on one machine, and ``wsync unpin`` there ends it. A rollback uses what
that box itself still has, in a slot, as a kept copy, or as a file. What a ``wsync push`` publishes on one box goes to
all boxes, too, through their gates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from ..checkpoints.files.parts import remote
from ..errors import GroupBroken, Stopped, WsyncError
from ..sync.loop import Schedule
from ..sync.outcome import Outcome
from ..sync.syncer import Syncer, recorded
from .group import BEAT, Group
from .member import Member
from .reconcile import Report
from .rounds import Rounds

_GRACE = 2.0  # seconds that the current step may take once the watch is stopped


class Fleet:
    """Keeps this box's segment in step with the group.

    Args:
        syncer: this box's syncer; it reads checkpoints only if this box is the one that looks for them.
        group: this box's group, which stays the same when the settings are read again.
    """

    def __init__(self, syncer: Syncer, group: Group) -> None:
        self._syncer, self._group = syncer, group
        self._member = Member(syncer.box, group)
        self._rounds = Rounds(syncer, group, self._member)
        self._error: BaseException | None = None
        self._worked = True

    def close(self) -> None:
        """Closes the segment, unless a round still uses it: then it stays open until the process ends."""
        if self._group.thread and self._group.thread.is_alive():
            return
        self._member.close()
        self._syncer.close()

    def run(self, stop: threading.Event, tell: Callable[[Outcome | WsyncError], None]) -> bool:
        """Makes rounds until ``stop`` is set; False if too many failed. A thread makes them, so that no signal waits.

        Raises:
            GroupBroken: a box of the group is gone.
            UsageError: the settings of this box are wrong.
        """

        def rounds() -> None:
            try:
                self._worked = self._run(ended, tell)
            except Stopped:
                pass
            except BaseException as exc:
                self._error = exc
            finally:
                ended.set()
                stop.set()

        group = self._group
        if group.thread:  # it may still be at work, from before the settings were read again
            group.thread.join()
        ended = threading.Event()
        self._syncer.box.stop = group.stop = ended
        if away := remote(self._syncer.getter.checkpoints):
            away.store.stop = ended
        group.thread = threading.Thread(target=rounds, name="wsync-group", daemon=True)
        group.thread.start()
        while not stop.wait(BEAT):  # not for ever: a signal in another thread does not wake this one
            pass
        ended.set()
        group.thread.join(_GRACE)
        if self._error:
            raise self._error
        return self._worked

    def _run(self, stop: threading.Event, tell: Callable[[Outcome | WsyncError], None]) -> bool:
        group = self._group
        if not group.names:
            group.join()
        self._member.begin()
        schedule = Schedule(self._syncer.spec, self._syncer.getter.checkpoints, stop)
        try:
            while not stop.is_set():
                report = lambda: asdict(self._member.report(group.rank == 0 and schedule.due(BEAT)))  # noqa: E731
                reports = [Report(**each) for each in group.together(report)]
                if stop.is_set():
                    break
                if not self._rounds.is_needed(reports):
                    continue
                event: Outcome | WsyncError
                try:
                    event = recorded(self._syncer.box, partial(self._rounds.make, reports))
                except GroupBroken:
                    raise
                except WsyncError as exc:
                    event = exc
                if last := schedule.add(event):
                    tell(last)
                    return False
                tell(event)
        finally:
            schedule.close()
        return True
