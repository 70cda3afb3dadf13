"""One pass of the whole job: look, choose, stage, verify, publish.

A pass looks first and locks later: if the newest checkpoint is live already, it costs a listing, two small reads and no
lock. It reads the policy's layout from the standing segment, and runs the user's code (which imports torch) only if
there is no segment, if the spec changed since, or to tell a wrong checkpoint from a changed policy.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files.parts import led_to, remote
from ..discovery.newest import Candidate
from ..discovery.weight_getter import CheckpointWeightGetter, Look, live_candidate
from ..errors import (
    CheckpointChanged,
    CheckpointError,
    IncompleteCheckpoint,
    NoCheckpoint,
    RetryLater,
    SegmentBusy,
    UsageError,
    WsyncError,
    from_os_error,
    on_one_line,
)
from ..history.record import Record
from ..settings.policy_layout import PolicyLayout
from ..settings.spec import Spec
from . import report_once
from .claim import Claim, Watching, WatchLock
from .one_pass import Choice, Pass, choose
from .outcome import Outcome, status_of
from .publish_checkpoint import CheckpointPublisher
from .put_live import Box

if TYPE_CHECKING:
    from ..history.state import State


class Syncer:
    """Keeps one segment in step with one source of checkpoints.

    Args:
        spec: the policy and its settings.
        checkpoints: a directory or file; default the spec's.
        runtime: where segments live; default ``memory.runtime_dir()``.
        state: history, pin and rejections; None keeps none.
        role: ``"push"`` makes passes that somebody asks for, ``"watch"`` keeps the segment in step and locks it against
            other watches, and ``"member"`` is one box of a group, which decides whose version is live.
        take_over: the next publish may replace another spec's version.

    Attributes:
        box: this box's segment, its history and its hooks.
        standing: the segment of ``box``.
        record: what is known about the past.
        policy: the policy's layout, and whether it fits.
        publisher: publishes a chosen checkpoint, and knows how it reaches the readers.

    Raises:
        UsageError: neither the caller nor the spec names checkpoints.
    """

    def __init__(
        self,
        spec: Spec,
        checkpoints: str | os.PathLike[str] | None = None,
        *,
        runtime: str | os.PathLike[str] | None = None,
        state: State | None = None,
        role: Literal["push", "watch", "member"] = "push",
        take_over: bool = False,
    ) -> None:
        place = spec.checkpoints if checkpoints is None else checkpoints
        if place is None:
            raise UsageError(
                f"{spec.policy}: no checkpoints are named. Give a directory or a file after the spec, or set "
                "`checkpoints` in the TOML."
            )
        self.spec = spec
        self.getter = CheckpointWeightGetter(place, select=spec.select)
        self.policy = PolicyLayout(spec)
        self.record = Record(state, spec.digest)
        self.getter.memory = state.directory / f"{spec.name}.steps" if state else None
        claim = Claim(
            spec.name,
            "" if role == "member" else spec.origin,
            str(self.getter.checkpoints),
            own=checkpoints is None,
            is_named=self.getter.is_one_checkpoint if role == "push" else lambda: False,
            take_over=take_over,
        )
        self.box = Box(spec, self.policy.for_new_segment, self.record, claim, runtime)
        self.standing = self.box.standing
        self.publisher = CheckpointPublisher(self.box, self.policy, self._choose)
        about = Watching(os.getpid(), spec.origin, str(self.getter.checkpoints))
        self._lock = WatchLock(about) if role == "watch" else None

    def __enter__(self) -> Syncer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if self._lock:
            self._lock.close()
        self.box.__exit__(kind, *exc)

    def close(self, *, now: bool = False) -> None:
        """Closes the segment; see ``Box.close``."""
        if self._lock:
            self._lock.close()
        self.box.close(now=now)

    def prepare(self) -> None:
        """Reads the policy's layout if the first publish will need it, before there is a checkpoint to lose.

        Raises:
            WsyncError: the segment or the policy cannot be used.
        """
        try:
            segment = self.standing.segment
            if segment is None:
                self.policy.read()
            else:
                self.policy.check(segment, segment.live())
        except OSError as exc:
            raise from_os_error(exc, self.standing.path) from exc

    def once(self, *, force: bool = False, dry_run: bool = False, only: set[str] | None = None) -> Outcome:
        """One pass: the newest checkpoint that is complete, fits and is newer than what is live goes live.

        Args:
            force: publish the newest checkpoint again even if it is live.
            dry_run: check everything, publish nothing.
            only: the files of the place that may have changed since a pass found that what is live is current.

        Raises:
            WsyncError: something other than the checkpoint is wrong, or it cannot be read.
        """
        work = partial(self.look, force=force, dry_run=dry_run, only=only)
        return recorded(self.box, work, dry_run=dry_run)

    def look(self, *, force: bool = False, dry_run: bool = False, only: set[str] | None = None) -> Outcome:
        """One pass that leaves no trace in the history; see ``once``."""
        this = Pass(self.spec.name, None, time.perf_counter(), force, dry_run, only)
        self.policy.begin_pass()
        try:
            this = this.at(self.standing.segment)
            try:
                return self._pass(this._replace(again=remote(self.getter.checkpoints) is not None))
            except CheckpointChanged:
                return self._pass(this)
        except NoCheckpoint as exc:
            return this.outcome("empty", reason=str(exc))
        except CheckpointError as exc:  # the place itself is a checkpoint, and a broken or incomplete one
            if isinstance(exc, IncompleteCheckpoint) and this.live and self.getter.holds(this.live.checkpoint):
                return this.standing("current", newer=str(self.getter.checkpoints), reason=str(exc))
            reason = on_one_line(str(exc), str(self.getter.checkpoints))
            return this.outcome(status_of(exc, False), reason=reason, kind=exc.kind)
        except SegmentBusy as exc:
            return this.at(self.standing.opened).outcome("busy", reason=str(exc))  # another may have published
        except OSError as exc:  # errors of a checkpoint alone were reported as such
            raise from_os_error(exc, self.standing.path) from exc

    def _pass(self, this: Pass) -> Outcome:
        """Chooses the newest, and takes it."""
        choice = self.publisher.route.busy(partial(self._choose, this))
        if choice.pin or choice.todo or choice.refused:
            self.box.claim.check(this.live)
        self._wait_for_other_watch()
        if choice.pin:
            return self.publisher.pinned(this, choice.pin)
        refusal = self._known(this, choice.refused) if choice.refused else None
        if not choice.todo:
            return refusal or self._nothing_newer(this, choice)
        reads = self.policy.reads
        take = self.publisher.route.busy(partial(self.publisher.ready, this))
        self._wait_for_other_watch()  # also if the segment was just made
        if self.policy.reads > reads:  # that took seconds: what was listed may be gone
            return self._pass(this)
        try:
            outcome = self._try(this, choice, take)
        except NoCheckpoint:
            if refusal:
                return refusal
            raise
        if choice.is_new_run and outcome.status == "published":
            return outcome.warned(report_once.NEW_RUN)
        if refusal and outcome.status in ("rejected", "empty", "current"):  # an older one does not change that
            return replace(refusal, passed_over=(outcome,) if outcome.status == "rejected" else ())
        return outcome

    def _wait_for_other_watch(self) -> None:
        segment = self.standing.opened
        if segment and self._lock and (other := self._lock.hold(segment)):
            raise SegmentBusy(
                f"{other} keeps segment {segment.name!r} in step. This watch waits until that one ends; give it a "
                "--name of its own to run both."
            )

    def _choose(self, this: Pass) -> Choice:
        pin = self.record.pin()
        after = None if this.force or self.box.claim.is_foreign(this.live) else live_candidate(this.live)
        if after and this.live:
            after = after._replace(changed_ns=this.live.changed_ns)
        look = Look([]) if pin else self.getter.look(after, this.only)
        refusals = self.record.refusals(candidate.identity for candidate in look.newer)
        newer = [each for each in look.newer if this.force or not self.record.was_touched(each.identity, this.live)]
        chosen = choose(newer, this.live, refusals, pin, passed=self.record.passed, force=this.force)
        return chosen._replace(late=tuple(look.late), is_new_run=look.is_new_run, nothing=look.nothing)

    def _known(self, this: Pass, candidate: Candidate) -> Outcome:
        """The refusal of an earlier pass, again."""
        return this.outcome(
            "rejected",
            step=self.getter.step_of(candidate),
            checkpoint=str(candidate.path),
            reason=on_one_line(self.record.reason(candidate.identity), str(candidate.path)),
            identity=candidate.identity,
            known=not self.record.is_fresh(candidate.identity),
            live=this.live,
        )

    def _nothing_newer(self, this: Pass, choice: Choice) -> Outcome:
        """What is live is current.

        Raises:
            NoCheckpoint: nothing is live; or the place is empty and what is live never came from there. If it did,
                retention emptied the place.
        """
        if this.live is None or not (self.getter.holds(this.live.checkpoint) or self.getter.candidates()):
            raise self.getter.nothing()
        warning = None if this.dry_run else report_once.late(self.record, this.live, choice, self.spec.select.order)
        why, kind = choice.nothing or None, NoCheckpoint.kind if choice.nothing else ""
        return this.standing("current", warning=warning, reason=why, kind=kind)

    def _try(self, this: Pass, choice: Choice, take: Callable[[Checkpoint], Outcome]) -> Outcome:
        """Goes down the list until one can be taken; if none can, returns the refusal of the newest.

        Raises:
            CheckpointChanged: one changed while it was read, and the pass is to start over.
        """
        refusals: list[Outcome] = []
        passed = self.record.passed if this.live else frozenset()
        for candidate in choice.todo:
            opened = ""
            try:
                if why := "" if this.force else self.record.incomplete(candidate.identity):
                    raise IncompleteCheckpoint(why)
                published = partial(self._published_from, this, candidate.path)
                with self.publisher.route.busy(partial(self.getter.open, candidate, published)) as checkpoint:
                    opened = checkpoint.identity
                    if self.publisher.recognize(this, checkpoint):
                        continue
                    return replace(take(checkpoint), passed_over=tuple(refusals))
            except NoCheckpoint:
                continue  # a trainer's retention was faster
            except (CheckpointError, RetryLater) as exc:
                if this.again and isinstance(exc, CheckpointChanged):
                    raise
                refusal = _refusal(this, candidate, self.getter.step_of(candidate), exc, opened)
                if isinstance(exc, RetryLater):  # it may still go live: nothing older is published instead
                    return replace(refusal, passed_over=tuple(refusals))
                if isinstance(exc, IncompleteCheckpoint) and refusal.identity in passed:
                    continue
                if abandoned := report_once.is_abandoned(exc, candidate):
                    status, why = "rejected" if this.live else "empty", f"{exc.message} {report_once.ABANDONED}"
                    refusal = replace(refusal, status=status, reason=why, kind=IncompleteCheckpoint.kind)
                refusals.append(refusal)
                if not this.dry_run:
                    report_once.remember(self.record, exc, refusal, abandoned=abandoned and this.live is not None)
                    if type(exc) is IncompleteCheckpoint and remote(candidate.path):  # time alone changes nothing
                        self.record.found_incomplete(candidate.identity, exc.message)
        if not refusals and this.live:
            return this.standing("current")
        if not refusals:
            raise self.getter.nothing()
        first, *others = refusals
        if this.live and first.status == "empty":
            return this.standing("current", newer=first.checkpoint, reason=first.reason, passed_over=tuple(others))
        return first

    def _published_from(self, this: Pass, path: Path) -> list[str]:
        """Identities of what was published from a path."""
        source, live = str(led_to(path)), this.live
        known = self.record.published_from(source)
        return [*known, live.identity] if live and live.checkpoint == source else known


def _refusal(
    this: Pass, candidate: Candidate, step: int | None, exc: CheckpointError | RetryLater, opened: str
) -> Outcome:
    """The refusal of a candidate that was opened under an identity, or of one that could not be opened."""
    if "@" not in candidate.identity:  # else its identity has more than its files tell
        opened = opened or getattr(exc, "identity", "")  # a link may have moved since it was listed
    identity = opened or candidate.identity
    return this.refusal(exc, named=not candidate.name, step=step, checkpoint=str(candidate.path), identity=identity)


def recorded(box: Box, work: Callable[[], Outcome], *, dry_run: bool = False) -> Outcome:
    """Returns the outcome of a pass, and tells the history if it failed."""
    collects = gc.isenabled()
    gc.disable()  # tables of 20,000 tensors are not garbage; scanning them again and again doubles a pass
    try:
        outcome = work()
    except WsyncError as exc:
        if not dry_run and not isinstance(exc, UsageError):
            segment = box.standing.opened
            box.record.failed(segment.version if segment else 0, str(exc))
        raise
    except MemoryError as exc:
        raise WsyncError(
            "this process has no memory left. Raise its limit (`ulimit -v`, `ulimit -d`; the container's, or "
            "MemoryMax= of its systemd unit), and try again."
        ) from exc
    finally:
        if collects:
            gc.enable()
    if outcome.status != "failed":
        box.record.worked()
    elif not dry_run:
        box.record.failed(outcome.version, outcome.reason or "")
    return outcome
