"""A watch that keeps a whole group of boxes in step: one of them reads a checkpoint, and all go live with it, or none.

All boxes of a group (``group``) go through the same rounds. In each, every box tells what is live on it and whether a
pin holds there, and all draw the same conclusion (``reconcile``). Rank 0 looks for checkpoints, opens the newest, and
offers it; each box then publishes by ``publisher.publish``, with three votes on the way, of which each is unanimous or
ends the matter on all boxes, with those named that refused, and why:

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

import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, TypeVar

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files import remote
from ..checkpoints.fit import Fit
from ..errors import (
    CheckpointError,
    CheckpointRejected,
    GroupBroken,
    SegmentBusy,
    Stopped,
    WsyncError,
    refused,
)
from ..history.database import Pin
from ..history.outcome import Outcome
from ..segment.publisher import Source, Staged
from ..segment.segment import Segment
from ..settings.spec import Spec
from ..sync.schedule import Schedule
from ..sync.syncer import Pass, Syncer
from .delivery import Shared, Turn, deliver, judge
from .group import BEAT, Group
from .membership import Badge, few
from .reconcile import Change, Report, change_of, holder_of, leader_of

_T = TypeVar("_T")
_GRACE = 2.0  # seconds that the step at hand may take once the watch is stopped


class FleetSyncer(Syncer):
    """Keeps this box's segment in step with the group's.

    Args:
        spec, checkpoints, more: as of ``Syncer``; a box reads checkpoints only when it is the one that looks for them.
        group: stays when the settings are read again.
    """

    def __init__(self, spec: Spec, checkpoints: str | os.PathLike[str] | None, *, group: Group, **more: Any) -> None:
        Syncer.__init__(self, spec, checkpoints, **more)
        self.group = group
        self._badge: Badge | None = None
        self._settled = False  # once all were the same in this group; what goes live from then on counts as its own
        self._last = (0, "")  # the highest version on record here, and what it came from
        self._declined: str | None = None  # identity of the group's live weights that this box's gate does not want
        self._failed: Change | None = None  # what is only tried again when rank 0 is due
        self._reports: list[Report] = []
        self._seen = 0  # the version that this box reported
        self._error: BaseException | None = None
        self._worked = True

    def close(self, *, now: bool = False) -> None:
        """As of ``Syncer``; what a round still uses is left to the end of the process."""
        if self.group.thread and self.group.thread.is_alive():
            return
        if self._badge:
            self._badge.close()
        Syncer.close(self, now=now)

    def run(self, stop: threading.Event, tell: Callable[[Outcome | WsyncError], None]) -> bool:
        """Rounds until ``stop`` is set, in a thread of their own: a signal must not wait for another box.

        Raises:
            GroupBroken: the group is none any more.
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

        if self.group.thread:  # the last step before the settings were read again
            self.group.thread.join()
        ended = threading.Event()
        self._stop = self.group.stop = ended
        if away := remote(self.getter.checkpoints):
            away.store.stop = ended
        self.group.thread = threading.Thread(target=rounds, name="wsync-group", daemon=True)
        self.group.thread.start()
        while not stop.wait(BEAT):  # not for ever: a signal that another thread gets does not wake this one
            pass
        ended.set()
        self.group.thread.join(_GRACE)
        if self._error:
            raise self._error
        return self._worked

    def _run(self, stop: threading.Event, tell: Callable[[Outcome | WsyncError], None]) -> bool:
        if not self.group.names:
            self.group.join()
        self._last = self.record.last_published()
        schedule = Schedule(self.spec, self.getter.checkpoints, stop)
        try:
            while not stop.is_set():
                report = lambda: asdict(self._report(self.group.rank == 0 and schedule.due(BEAT)))  # noqa: E731
                self._reports = [Report(**each) for each in self.group.together(report)]
                if stop.is_set():
                    break
                if not self._reports[0].due and change_of(self._reports) in (None, self._failed):
                    continue
                event: Outcome | WsyncError
                try:
                    event = self.once()
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

    def _report(self, due: bool) -> Report:
        """What this box has; what is wrong with it is told by ``_prepare``."""
        try:
            segment = self.updater.segment
            live = segment.live() if segment else None
            pin = self.record.pin()
            if segment:
                self._wear(segment)
        except (WsyncError, OSError):
            return Report(last=self._last[0], last_identity=self._last[1], due=due)
        version, identity = (live.version, live.identity) if live else (0, "")
        self._seen = version
        if version >= self._last[0]:
            self._last = (version, identity)
        known = self._badge is not None and live is not None and self._badge.came_from_group(live)
        ours = live is None or known or (self._settled and self._declined is None)
        held = pin is not None and live is not None and pin.holds(live)
        return Report(version, identity, *self._last, ours, pin.name if pin else "", held, self._declined, due)

    def _wear(self, segment: Segment) -> None:
        if self._badge and self._badge.is_at(segment.path):
            return
        if self._badge:
            self._badge.close()
        about = {"run": self.group.run, "rank": self.group.rank, "size": self.group.size, "boxes": self.group.names}
        self._badge = Badge(segment.path, about)

    # --- a round

    def _once(self, force: bool, dry_run: bool) -> Outcome:
        started = time.perf_counter()
        change = self._failed = change_of(self._reports)
        segment = self._prepare()
        this = Pass(self.spec.name, segment.live(), started)
        if change:
            outcome = self._change(this, segment, change)
            self._failed = None
            return outcome
        self._settled = True
        holder, leader = holder_of(self._reports), leader_of(self._reports)
        if holder is not None:
            pin, box, name = self._reports[holder].pin, self.group.names[holder], self.spec.name
            reason = f"{pin} is pinned on {box}; `wsync unpin {name}` there goes on with the newest"
            return this.standing("pinned", reason=reason, pin=pin)
        return self._lead(force) if leader == self.group.rank else self._follow(this, leader)

    def _prepare(self) -> Segment:
        """A segment on every box, of the same layout, and a pin that can be read, if there is one.

        Raises:
            WsyncError: a box cannot have that, or has another policy.
        """

        def ready() -> dict[str, Any]:
            try:
                try:
                    self.record.pin()
                    segment = self._make_segment()
                    live = segment.live()
                    if self.spec.fingerprint not in (segment.spec, live.spec if live else ""):
                        self._check_layout(segment)
                    self._wear(segment)
                    return {"layout": segment.layout.digest, "name": segment.name}
                except OSError as exc:
                    raise refused(exc, self.updater.path) from exc
            except WsyncError as exc:
                return {"kind": "WsyncError", "text": str(exc)}

        answers = self.group.together(ready)
        judge([answer if "kind" in answer else {} for answer in answers], self.group.names)
        for answer, name in zip(answers, self.group.names, strict=True):
            if answer != answers[0]:
                raise WsyncError(
                    f"{name} keeps another policy than {self.group.names[0]}: its segment {answer['name']!r} has "
                    "another name, or other tensors. One group is for one policy: give all boxes the same spec, or "
                    "form another group (--rdzv-id) for this one."
                )
        assert self.updater.opened
        return self.updater.opened

    # --- the box that looks

    def _lead(self, force: bool) -> Outcome:
        """A pass as of one box; what it publishes is offered to all, and what comes of it is told to all."""
        try:
            outcome = Syncer._once(self, force, False)
        except GroupBroken:
            raise
        except WsyncError as exc:
            self.group.tell({"failed": str(exc)})
            raise
        self.group.tell({"outcome": asdict(outcome)})
        return outcome

    def _busy(self, work: Callable[[], _T]) -> _T:
        return self.group.busy(work)  # a store may not answer

    def _deliver(
        self, this: Pass, segment: Segment, checkpoint: Checkpoint, fit: Fit, *, pinned: bool = False
    ) -> Outcome:
        """Offers an opened checkpoint to all boxes, this one among them."""
        offer = {
            "path": os.fspath(checkpoint.path),
            "step": checkpoint.step,
            "identity": checkpoint.identity,
            "version": max(report.last for report in self._reports) + 1,
            "gated": not pinned,
        }
        self.group.tell({"offer": offer})
        turn = Turn(self.group)
        return self._take(this, turn, Shared(offer, self.group.rank, turn, checkpoint), offer, fit)

    def _unusable(self, this: Pass, pin: Pin, exc: CheckpointError) -> Outcome:
        raise exc

    # --- the boxes that follow

    def _follow(self, this: Pass, leader: int) -> Outcome:
        taken: Outcome | None = None
        while True:
            told = self.group.hear(leader)
            if "failed" in told:
                named = any(told["failed"].startswith(f"{name}: ") for name in self.group.names)
                raise WsyncError(told["failed"] if named else f"{self.group.names[leader]}: {told['failed']}")
            if "outcome" in told:
                break
            turn = Turn(self.group)
            try:
                taken = self._take(this, turn, Shared(told["offer"], leader, turn), told["offer"])
            except GroupBroken:
                raise
            except WsyncError:  # the leader tells what comes of it
                pass
        said = Outcome.from_dict(told["outcome"])
        rejected = [each for each in (said, *said.passed_over) if each.status == "rejected" and not each.known]
        told_of = self.record.refusals(each.identity for each in rejected)
        for each in rejected:
            if each.identity not in told_of:
                self.record.refuse(each.identity, each.reason or "", replace(each, version=self._seen))
        mine = taken or this.outcome(said.status)
        own = {name: getattr(mine, name) for name in ("version", "bytes", "seconds", "readers", "backwards")}
        return replace(said, casts=(), **own)

    # --- a publish

    def _take(
        self,
        this: Pass,
        turn: Turn,
        source: Source,
        offer: dict[str, Any],
        fit: Fit = Fit(),  # noqa: B008  (frozen)
    ) -> Outcome:
        """Publishes what is offered, with all boxes, under the number that is offered."""
        try:
            try:
                segment = self._make_segment()
                with segment.publishing():
                    self._check_unchanged(segment)
                    gate = lambda staged: self._agree(turn, staged, offer)  # noqa: E731
                    this = replace(this, live=segment.live())
                    published = self._store(this, segment, source, fit, gate, offer["version"] - 1)
            except OSError as exc:
                raise refused(exc, self.updater.path) from exc
        except WsyncError as exc:
            turn.refuse(exc)
        self._seen, self._last = offer["version"], (offer["version"], offer["identity"])
        self._declined = None

        def keep() -> dict[str, Any]:
            self._keep(segment)
            return {}

        self.group.together(keep)  # a copy may take longer than a box may be silent
        return published

    def _check_unchanged(self, segment: Segment) -> None:
        if segment.version != self._seen:
            raise SegmentBusy(
                f"version {segment.version} went live while the group was about to publish. It goes to all boxes first."
            )

    def _agree(self, turn: Turn, staged: Staged, offer: dict[str, Any]) -> None:
        asked = offer["gated"] and self.spec.hooks.gate
        turn.vote(work=(lambda: self._gate(staged)) if asked else None)  # agreed
        if self._badge:
            self._badge.give(offer["version"], offer["identity"])

    def _change(self, this: Pass, segment: Segment, change: Change) -> Outcome:
        """Brings the boxes that are behind to what the provider has."""
        rank, provider, live = self.group.rank, change.provider, this.live
        if rank == provider:
            assert live
            offer: dict[str, Any] = {
                "path": live.source,
                "step": live.step,
                "identity": live.identity,
                "version": change.version,
                "gated": change.gated,
            }
            self.group.tell(offer)
            offer["gated"] = False  # it is live here
        else:
            offer = self.group.hear(provider)
        turn = Turn(self.group)
        try:
            if rank in change.takers and rank != provider:
                return self._take(this, turn, Shared(offer, provider, turn), offer)
            with segment.publishing():
                self._check_unchanged(segment)
                weights = segment.live_weights() if rank == provider else None
                if rank in change.takers:
                    return self._take(this, turn, Shared(offer, provider, turn, live=weights), offer)
                deliver(turn, provider, weights, segment.layout.nbytes)  # it is sent from here, or goes by
                turn.vote()  # agreed
                self.group.together(dict)  # others keep copies
        except CheckpointRejected as exc:
            if turn.objected:
                self._declined = offer["identity"]
            raise WsyncError(f"what is live in the group is refused: {exc}") from exc
        except WsyncError as exc:
            turn.refuse(exc)
        names = few([self.group.names[each] for each in sorted(change.takers)])
        self.group.note("info", "group", f"version {change.version} of {self.group.names[provider]} went to {names}")
        return this.standing("current")
