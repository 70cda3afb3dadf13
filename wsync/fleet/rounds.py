"""One round of a group, on one box: prepares, brings all boxes to the same version if they differ, or leads or follows.

The leading box makes an ordinary pass, whose ``Route`` is ``Rounds``: it offers the pass's checkpoint to all boxes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, TypeVar

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files.extras import Extras
from ..errors import CheckpointRejected, GroupBroken, WsyncError, from_os_error
from ..fitting.fit import Fit
from ..segment.publication import Publication
from ..segment.publishing import Staged
from ..segment.writable import WritableSegment
from ..sync.one_pass import Pass, Recheck
from ..sync.outcome import Outcome
from ..sync.syncer import Syncer
from .delivery import Shared, Turn, deliver, judge
from .group import Group
from .member import Member
from .membership import few
from .reconcile import Change, Report, change_of, holder_of, leader_of

_T = TypeVar("_T")


class Rounds:
    """The rounds of this box.

    Args:
        syncer: makes the passes if this box leads; this object becomes its route.
        member: what this box knows about itself.
    """

    def __init__(self, syncer: Syncer, group: Group, member: Member) -> None:
        self._syncer, self._box, self._group, self._member = syncer, syncer.box, group, member
        self._failed: Change | None = None  # a change that failed; tried again only when rank 0 is due
        self._reports: Sequence[Report] = ()
        syncer.publisher.route = self

    def is_needed(self, reports: Sequence[Report]) -> bool:
        """Whether these reports require a round now."""
        return reports[0].due or change_of(reports) not in (None, self._failed)

    def make(self, reports: Sequence[Report]) -> Outcome:
        """Makes a round; returns its outcome on this box.

        Raises:
            GroupBroken: a box is gone.
            WsyncError: a box cannot take part, or the pass failed.
        """
        self._reports, started = reports, time.perf_counter()
        change = self._failed = change_of(reports)
        segment = self._prepare()
        this = Pass(self._box.spec.name, None, started).at(segment)
        if change:
            outcome = self._change(this, segment, change)
            self._failed = None
            return outcome
        self._member.settled = True
        holder, leader = holder_of(reports), leader_of(reports)
        if holder is not None:
            pin, name = reports[holder].pin, self._group.names[holder]
            reason = f"{pin} is pinned on {name}; `wsync unpin {this.name}` there goes on with the newest"
            return this.standing("pinned", reason=reason, pin=pin)
        return self._lead() if leader == self._group.rank else self._follow(this, leader)

    def _prepare(self) -> WritableSegment:
        """Makes or opens this box's segment, and checks that all boxes have the same layout and can read their pins.

        Raises:
            WsyncError: a box cannot, or has another policy.
        """

        def ready() -> dict[str, Any]:
            try:
                with self._os_errors():
                    self._box.record.pin()
                    segment = self._box.make_segment()
                    self._syncer.policy.check(segment, segment.live())
                    self._member.show_group(segment)
                    return {"layout": segment.layout.digest, "name": segment.name}
            except WsyncError as exc:
                return {"kind": "WsyncError", "text": str(exc)}

        answers, names = self._group.together(ready), self._group.names
        judge([answer if "kind" in answer else {} for answer in answers], names)
        for answer, name in zip(answers, names, strict=True):
            if answer != answers[0]:
                raise WsyncError(
                    f"{name} keeps another policy than {names[0]}: its segment {answer['name']!r} has another name, or "
                    "other tensors. One group is for one policy: give all boxes the same spec, or form another group "
                    "(--rdzv-id) for this one."
                )
        assert self._box.standing.opened
        return self._box.standing.opened

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        """Turns an error of the system into a ``WsyncError``, which is reported to the group."""
        try:
            yield
        except OSError as exc:
            raise from_os_error(exc, self._box.standing.path) from exc

    # The box that leads

    def _lead(self) -> Outcome:
        """Makes a pass, which offers its checkpoint to all boxes, and sends them the outcome."""
        try:
            outcome = self._syncer.look()
        except GroupBroken:
            raise
        except WsyncError as exc:
            self._group.tell({"failed": str(exc)})
            raise
        self._group.tell({"outcome": outcome.to_dict()})
        return outcome

    def busy(self, work: Callable[[], _T]) -> _T:
        """See ``Route``; meanwhile sends the other boxes signs of life."""
        return self._group.busy(work)

    def deliver(
        self, this: Pass, segment: WritableSegment, checkpoint: Checkpoint, fit: Fit, recheck: Recheck
    ) -> Outcome:
        """See ``Route``; delivers to all boxes, including this one."""
        version = max(report.last for report in self._reports) + 1
        weights = Publication(
            version=version,
            step=checkpoint.step,
            checkpoint=os.fspath(checkpoint.path),
            identity=checkpoint.identity,
            changed_ns=checkpoint.changed_ns,
        )
        gated = not any(report.pin for report in self._reports)  # an operator's pin has no gate
        self._group.tell({"offer": asdict(weights), "gated": gated})
        return self._take(this, Shared(weights, Turn(self._group), self._group.rank, checkpoint), gated, fit)

    # The boxes that follow

    def _follow(self, this: Pass, leader: int) -> Outcome:
        taken: Outcome | None = None
        names = self._group.names
        while True:
            told = self._group.hear(leader)
            if "failed" in told:
                named = any(told["failed"].startswith(f"{name}: ") for name in names)
                raise WsyncError(told["failed"] if named else f"{names[leader]}: {told['failed']}")
            if "outcome" in told:
                break
            shared = Shared(Publication(**told["offer"]), Turn(self._group), leader)
            try:
                taken = self._take(this, shared, told["gated"])
            except GroupBroken:
                raise
            except WsyncError:  # the leader reports the outcome
                pass
        said, record = Outcome.from_dict(told["outcome"]), self._box.record
        rejected = [each for each in (said, *said.passed_over) if each.status == "rejected" and not each.known]
        told_of = record.refusals(each.identity for each in rejected)
        for each in rejected:
            if each.identity not in told_of and not each.pin:
                record.refuse(each.identity, each.reason or "", replace(each, version=self._member.seen))
        mine = taken or this.outcome(said.status)
        own = {name: getattr(mine, name) for name in ("version", "bytes", "seconds", "readers", "backwards")}
        return replace(said, casts=(), **own)

    # A publish

    def _take(
        self,
        this: Pass,
        shared: Shared,
        gated: bool,
        fit: Fit = Fit(),  # noqa: B008  (frozen)
    ) -> Outcome:
        """Publishes the offered weights together with all boxes, under the offered number.

        Args:
            gated: whether this box asks its gate first.
        """
        weights = shared.weights

        def before(now: Pass) -> None:
            self._member.check_unchanged(segment)

        def agree(staged: Staged) -> None:
            def ask() -> None:
                if gated and self._box.spec.hooks.gate:
                    self._box.ask_gate(staged)
                self._member.check_unchanged(segment)

            shared.turn.vote(work=ask)  # agreed
            self._member.takes(weights)

        try:
            with self._os_errors():
                segment = self._box.make_segment()
                published = self._box.put_live(this, segment, shared, fit, Recheck(before, agree), weights.version - 1)
        except WsyncError as exc:
            shared.turn.refuse(exc)
        self._member.took(weights)

        def keep() -> dict[str, Any]:
            self._box.keep(segment)
            return {}

        self._group.together(keep)  # making a copy may take longer than a box may be silent
        return published

    def _change(self, this: Pass, segment: WritableSegment, change: Change) -> Outcome:
        """Brings the provider's weights to the boxes that are behind."""
        rank, provider, live = self._group.rank, change.provider, this.live
        if rank == provider:
            assert live
            weights = replace(live, version=change.version)
            self._group.tell(asdict(weights))
        else:
            weights = Publication(**self._group.hear(provider))
        turn = Turn(self._group)
        try:
            with self._os_errors():
                extras = segment.extras(weights, segment.word & 0xFF) if rank == provider else Extras()
            if rank in change.takers and rank != provider:
                return self._take(this, Shared(weights, turn, provider), change.gated)
            with self._os_errors(), segment.publishing():
                self._member.check_unchanged(segment)
                sent = segment.live_weights() if rank == provider else None
                if rank in change.takers:  # also the provider, if it needs another number
                    return self._take(this, Shared(weights, turn, provider, live=sent, extras=extras), gated=False)
                deliver(turn, provider, sent, segment.layout.nbytes, lambda: extras)  # sends, or drops what it receives
                turn.vote()  # agreed
                self._group.together(dict)  # waits while others make copies
        except CheckpointRejected as exc:
            if turn.objected:
                self._member.declined = weights.identity
            raise WsyncError(f"the live version of the group is refused: {exc}") from exc
        except WsyncError as exc:
            turn.refuse(exc)
        names = few([self._group.names[each] for each in sorted(change.takers)])
        self._group.note("info", "group", f"version {change.version} of {self._group.names[provider]} went to {names}")
        return this.standing("current")
