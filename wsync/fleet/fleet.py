"""A watch that keeps a whole group of boxes in step: one of them reads a checkpoint, and all put it live, or none.

All boxes of a group (``group``) go through the same rounds. In each, every box says what is live there and whether a
pin holds, and all draw the same conclusion (``reconcile``). Rank 0 looks for checkpoints, opens the newest, and offers
it; each box then publishes by ``publishing.publish``, with three votes on the way. Each vote is unanimous, or ends the
publish on all boxes, naming who refused, and why:

  ready    a spare slot is locked, in a segment of the same layout. Only then do bytes move
  read     on the box that reads: they are finite and the file stood still. Then they go to the others, with a checksum
  agreed   each box's own gate accepts what was staged
  store    the WORD, on every box, under the number that is one above the highest that any of them ever had

What is lost when a box dies: before the last vote is counted, nothing is live anywhere, and the next group tries again.
A box that counted it stores the WORD; one that died, or was cut off, between that count and its store comes back one
version behind. Everybody had accepted that version, so the next group brings it there too: where boxes differ, the one
with the highest version that came from the group provides it (of two under one number, the one that more boxes have).
The same goes for a box that joins late. A box that comes with weights of its own, whatever their number, is brought to
the group's; where its numbers went further than the group's, all boxes take the next number, so that versions only
grow. Weights that went live elsewhere pass a joining box's own gate before they go live there; where it says no, that
box stays with what it had, and says so.

A pin on one box holds the whole group, on what that box has: a ``wsync rollback`` or ``wsync pin`` there goes to all at
the next round, without their gates, as on one machine, and ``wsync unpin`` there lets go. A rollback takes what that
very box still has, in a slot, as a copy that it keeps, or as a file. What a ``wsync push`` made live on one box goes to
all, too; their gates are asked.
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
        syncer: of this box; it reads checkpoints only when this box is the one that looks for them.
        group: stays when the settings are read again.
    """

    def __init__(self, syncer: Syncer, group: Group) -> None:
        self._syncer, self._group = syncer, group
        self._member = Member(syncer.box, group)
        self._rounds = Rounds(syncer, group, self._member)
        self._error: BaseException | None = None
        self._worked = True

    def close(self) -> None:
        """Closes the segment; what a round still uses stays until the process ends."""
        if self._group.thread and self._group.thread.is_alive():
            return
        self._member.close()
        self._syncer.close()

    def run(self, stop: threading.Event, tell: Callable[[Outcome | WsyncError], None]) -> bool:
        """Makes rounds until ``stop`` is set, in another thread, so that a signal need not wait for another box.

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
        if group.thread:  # the last step before the settings were read again
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
