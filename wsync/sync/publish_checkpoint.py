"""Publishes a checkpoint that was chosen, or only checks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from ..checkpoints.checkpoint import Checkpoint
from ..discovery.identity import was_changed
from ..errors import CheckpointError, CheckpointMismatch, RetryLater, SegmentBusy, UnusableBase
from ..fitting.fit import Fit
from ..history.pins import Pin
from ..layout.layout import Layout
from ..segment.writable import WritableSegment
from ..settings.policy_layout import PolicyLayout
from . import report_once
from .one_pass import Choice, Pass, Recheck
from .outcome import Outcome
from .put_live import Box

if TYPE_CHECKING:
    from ..segment.publishing import Staged

T = TypeVar("T")


class Route(Protocol):
    """How a checkpoint reaches the readers: a ``Box`` alone, or all boxes of a group (``fleet``)."""

    def busy(self, work: Callable[[], T]) -> T:
        """Does work that may take long, because a store may not answer; returns its result."""
        ...

    def deliver(
        self, this: Pass, segment: WritableSegment, checkpoint: Checkpoint, fit: Fit, recheck: Recheck
    ) -> Outcome:
        """Publishes an opened checkpoint.

        Args:
            recheck: what this box checks under its lock. A group does not call it: there each box checks its own pin
                and asks its own gate.

        Raises:
            WsyncError: it was not published; what was live stays live.
        """
        ...


class CheckpointPublisher:
    """Publishes checkpoints for one box.

    Args:
        policy: the policy's layout, and whether it fits.
        choose: chooses what a pass tries; called once more under the lock.

    Attributes:
        route: how checkpoints reach the readers; a fleet sets its own.
    """

    def __init__(self, box: Box, policy: PolicyLayout, choose: Callable[[Pass], Choice]) -> None:
        self.route: Route = box
        self._box, self._policy, self._choose = box, policy, choose
        self._casts: set[tuple[str, str]] = set()  # casts that were reported

    def ready(self, this: Pass) -> Callable[[Checkpoint], Outcome]:
        """Returns what to do with an opened checkpoint. All that needs the policy's layout is done first, here.

        Raises:
            LayoutDiffers: the segment holds another architecture than the policy.
            WsyncError: the segment cannot be opened or made, or the policy cannot be built.
        """
        if this.dry_run:
            layout, segment = self._policy.read(), self._box.standing.opened
            if segment:
                self._policy.compare(segment, layout)
            return partial(self._rehearse, this, layout, fit=self._box.spec.weights)
        segment = self._box.make_segment()
        self._policy.check(segment, this.live)
        return partial(self._publish, this, segment)

    def recognize(self, this: Pass, checkpoint: Checkpoint) -> bool:
        """Compares a checkpoint whose file changed since it went live with the live bytes, under the lock.

        Returns:
            Whether they are equal; it is remembered then.

        Raises:
            BeingRewritten: some of its files hold other bytes, and others have not changed yet.
            CheckpointRejected: it does not fit any more, or is not finite.
            CheckpointChanged: it changed while it was read.
            SegmentBusy: another publisher is at work.
        """
        segment, live, box = self._box.standing.opened, this.live, self._box
        if this.force or not segment or not live or not was_changed(live.identity, checkpoint.identity):
            return False
        from ..segment.publishing import holds

        with segment.publishing():
            if segment.live() != live:
                return False
            fit = replace(box.spec.weights, built=box.built)
            is_same = self.route.busy(partial(holds, segment, checkpoint, fit))
        if not is_same and checkpoint.parts.beside:
            from ..checkpoints.files.settling import check_changed  # a pass with nothing new does not need it

            settle = box.spec.select.settle
            check_changed(checkpoint.parts, checkpoint.source.infos, settle, live.changed_ns)
        if is_same and not this.dry_run:
            box.record.touched(live, checkpoint)
        return is_same

    def pinned(self, this: Pass, pin: Pin) -> Outcome:
        """Keeps what is pinned live, or puts it live if the segment was made anew or the operator named a file."""
        box = self._box
        segment = box.standing.opened
        if segment and this.live and pin.holds(this.live):
            if this.live.checkpoint and not this.dry_run:
                box.keep(segment)  # for the next reboot, even if its file is gone by then
            return this.pinned(pin)

        def check_pin(_: object) -> None:
            if box.record.pin() != pin:
                raise SegmentBusy(
                    f"the pin of {this.name!r} was changed while {pin.name} was about to go live. Try again: the next "
                    "pass obeys the new one."
                )

        deliver: Callable[[Checkpoint, Fit], Outcome]
        if this.dry_run:
            deliver = partial(self._rehearse, this, segment.layout if segment else self._policy.read())
        else:
            deliver = partial(self.route.deliver, this, box.make_segment(), recheck=Recheck(check_pin, check_pin))
        try:
            checkpoint, fit = self.route.busy(lambda: box.record.reopen(pin, box.spec.weights, box.spec.extras))
            with checkpoint:
                if not checkpoint.fitted:  # a kept copy is not the file that the digest belongs to
                    checkpoint.expect(box.spec.select.digest)
                return replace(deliver(checkpoint, fit), pin=pin.name, reason=None)  # the operator decides, not a gate
        except CheckpointError as exc:
            about = {"step": pin.step, "checkpoint": pin.checkpoint, "identity": pin.identity, "pin": pin.name}
            outcome = this.refusal(exc, named=True, **about)
            if not this.dry_run:
                box.record.failed(outcome.version, outcome.reason or "")
            return outcome

    def _publish(self, this: Pass, segment: WritableSegment, checkpoint: Checkpoint) -> Outcome:
        """Publishes an opened checkpoint. Any wait for it is over, so that nobody waits for the lock meanwhile."""

        def before(now: Pass) -> Outcome | None:
            if now.live == this.live:
                return None
            choice = self._choose(now)  # another publisher was faster, maybe with this very checkpoint
            if choice.pin:
                return now.pinned(choice.pin)
            todo = {candidate.identity for candidate in choice.todo}
            return None if checkpoint.identity in todo else now.standing("current")

        def staged(weights: Staged) -> None:
            if self._box.spec.hooks.gate:
                self._box.ask_gate(weights)
            if pin := self._box.record.pin():
                raise RetryLater(
                    f"{weights.checkpoint}: {pin.name} was pinned meanwhile. You need not do anything: the pin holds."
                )

        try:
            outcome = self.route.deliver(this, segment, checkpoint, self._box.spec.weights, Recheck(before, staged))
        except (CheckpointMismatch, UnusableBase):
            self.route.busy(partial(self._policy.recheck, segment))
            raise
        except RetryLater:
            if pin := self._box.record.pin():
                return this.at(segment).pinned(pin)
            raise
        return replace(outcome, casts=report_once.casts(self._casts, checkpoint))

    def _rehearse(self, this: Pass, layout: Layout, checkpoint: Checkpoint, fit: Fit) -> Outcome:
        from ..segment.publishing import rehearse

        progress, fit = self._box.counter(layout.nbytes), replace(fit, built=self._box.built)
        rehearse(layout, checkpoint, self._box.standing.opened, fit=fit, progress=progress)
        return this.outcome(
            "checked",
            step=checkpoint.step,
            checkpoint=str(checkpoint.path),
            bytes=layout.nbytes,
            reason="the gate was not asked" if self._box.spec.hooks.gate else None,
            identity=checkpoint.identity,
        )
