"""One pass of the whole job, and the loop around it.

A pass looks first and locks later: where the newest checkpoint is live already it costs a listing, two small reads and
no lock. It reads the policy's layout from the standing segment, and runs the user's code (which imports torch) only
where there is no segment, where the spec changed since, or to tell a wrong checkpoint from a changed policy.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from ..checkpoints.checkpoint import Checkpoint, step_of
from ..checkpoints.files import remote
from ..checkpoints.fit import Fit
from ..errors import (
    CheckpointChanged,
    CheckpointError,
    CheckpointMismatch,
    CheckpointRejected,
    LayoutDiffers,
    NoCheckpoint,
    RetryLater,
    SegmentBusy,
    Stopped,
    UnusableBase,
    UsageError,
    WsyncError,
    refused,
)
from ..history.outcome import Outcome, status_of
from ..history.record import Record
from ..layout.layout import Layout
from ..places.candidates import Candidate
from ..places.weight_getter import CheckpointWeightGetter, place_of
from ..segment.files import Publication
from ..segment.publisher import Gate, Source, Staged, publish, rehearse
from ..segment.segment import Segment
from ..settings.spec import Spec
from ..updaters.shared_memory import SharedMemoryWeightUpdater

if TYPE_CHECKING:
    from ..history.database import Pin, State
    from ..hooks.runner import HookRunner

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Pass:
    """What is the same for all of one pass.

    Attributes:
        name: of the segment.
        live: what was live when the pass looked.
        started: when it began, by ``time.perf_counter``.
        force: publish the newest again though it is live.
        dry_run: check all, publish nothing.
        again: begin anew where an object of a store was overwritten while it was read. On a disk its writer may still
            be at work, and a notification tells when it is done.
    """

    name: str
    live: Publication | None
    started: float
    force: bool = False
    dry_run: bool = False
    again: bool = False

    def outcome(self, status: str, **more: object) -> Outcome:
        """What the pass did; the version is the one that is live."""
        version, seconds = self.live.version if self.live else 0, round(time.perf_counter() - self.started, 6)
        return Outcome(status, self.name, **{"version": version, "seconds": seconds, **more})  # type: ignore[arg-type]

    def standing(self, status: str, **more: object) -> Outcome:
        """The same for a pass after which that version stays live, with its step and checkpoint."""
        live = self.live
        return self.outcome(
            status, step=live.step if live else None, checkpoint=(live.source or None) if live else None, **more
        )


class Syncer:
    """Keeps one segment in step with one source of checkpoints.

    Args:
        spec: the policy and its settings.
        checkpoints: a directory or file; default the spec's.
        runtime: where segments live; default ``memory.runtime_dir()``.
        progress: called with bytes done and bytes in all while a checkpoint is staged.
        state: history, pin and rejections; None keeps none.

    Attributes:
        record: what it knows of the past.
        report: called from a hook's thread with its kind, whether it worked, and what to tell; None logs failures.
        hooks: what runs after a publish, with its counts; None before the first, or where there is nothing to run.

    Raises:
        UsageError: neither the caller nor the spec names checkpoints.
    """

    def __init__(
        self,
        spec: Spec,
        checkpoints: str | os.PathLike[str] | None = None,
        *,
        runtime: str | os.PathLike[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
        state: State | None = None,
    ) -> None:
        place = checkpoints or spec.checkpoints
        if place is None:
            raise UsageError(
                f"{spec.policy}: no checkpoints are named. Give a directory or a file after the spec, or set "
                "`checkpoints` in the TOML."
            )
        self.spec, self.progress = spec, progress
        self.getter = CheckpointWeightGetter(place, select=spec.select, fit=spec.weights)
        self.updater = SharedMemoryWeightUpdater(
            spec.name, weight_getter=self.getter, layout=spec.layout, slots=spec.slots, runtime_dir=runtime
        )
        self.updater.access = spec.access
        self.report: Callable[[str, bool, str], None] | None = None
        self.hooks: HookRunner | None = None
        self._stop: threading.Event | None = None
        self._version = 0  # that this syncer published last
        self.record = Record(state, spec.digest)
        self._cast: set[tuple[str, str, str]] = set()

    def __enter__(self) -> Syncer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.close(now=kind is not None and not issubclass(kind, Exception))

    def close(self, *, now: bool = False) -> None:
        """Lets go of the segment, once hooks that still run have ended, each within its time.

        Args:
            now: end the hooks instead.
        """
        try:
            if self.hooks:
                self.hooks.close(now=now)
        finally:
            self.updater.close()
            self.record.close()

    def _make_segment(self) -> Segment:
        """The standing segment, or a new one."""
        self.updater.spec = self.spec.fingerprint  # of the policy as it is now
        return self.updater.make_segment()

    def once(self, *, force: bool = False, dry_run: bool = False) -> Outcome:
        """One pass: the newest checkpoint that is complete, fits and is newer than what is live goes live.

        Args:
            force: publish the newest again though it is live.
            dry_run: check all, publish nothing.

        Raises:
            WsyncError: something else than the checkpoint is wrong, or it cannot be read.
        """
        collects = gc.isenabled()
        gc.disable()  # tables of 20,000 tensors are no garbage, and to look through them again and again doubles a pass
        try:
            outcome = self._once(force, dry_run)
        except WsyncError as exc:
            if not dry_run and not isinstance(exc, UsageError):
                self.record.failed(self._version, str(exc))
            raise
        except MemoryError as exc:
            raise WsyncError(
                "this process has no memory left. Raise its limit (`ulimit -v`, `ulimit -d`; the container's, or "
                "MemoryMax= of its systemd unit), and try again."
            ) from exc
        finally:
            if collects:
                gc.enable()
        if outcome.status == "failed":
            self.record.failed(outcome.version, outcome.reason or "")
        else:
            self.record.worked()
        return outcome

    def _once(self, force: bool, dry_run: bool) -> Outcome:
        this = Pass(self.spec.name, None, time.perf_counter(), force, dry_run)
        try:
            segment = self.updater.segment
            this = replace(this, live=segment.live() if segment else None)
            try:
                return self._pass(replace(this, again=remote(self.getter.checkpoints) is not None))
            except CheckpointChanged:
                return self._pass(this)
        except NoCheckpoint as exc:
            return this.outcome("empty", reason=str(exc))
        except CheckpointError as exc:  # the place itself is a checkpoint, and a broken or incomplete one
            return this.outcome(status_of(exc, False), reason=str(exc), kind=exc.kind)
        except SegmentBusy as exc:
            return this.outcome("busy", reason=str(exc))
        except OSError as exc:  # whatever concerns a checkpoint alone was told as such
            raise refused(exc, self.updater.path) from exc

    def _pass(self, this: Pass) -> Outcome:
        """Looks, and takes the newest."""
        if pin := self.record.pin():
            return self._pinned(this, pin)
        todo, refusal = self._busy(lambda: self._todo(this))
        if not todo:
            if not refusal and self._has_nothing_for(this.live):
                raise self.getter.nothing()
            return refusal or self._current(this)
        if this.dry_run:
            return self._try(this, todo, partial(self._rehearse, this))
        segment = self._make_segment()
        try:
            outcome = self._try(this, todo, partial(self._publish, this, segment))
        except NoCheckpoint:
            if refusal:
                return refusal
            raise
        if refusal and outcome.status in ("rejected", "empty"):  # what is older makes the newest no better
            return replace(refusal, passed_over=(outcome,) if outcome.status == "rejected" else ())
        return outcome

    def run(self, stop: threading.Event, tell: Callable[[Outcome | WsyncError], None]) -> bool:
        """Passes until ``stop`` is set: at each notification, and at least every ``spec.poll`` seconds.

        After passes that failed, or whose gate asked for later, it pauses longer (see ``schedule``).

        Args:
            tell: called with the outcome of each pass; with an error where the pass failed.

        Returns:
            Whether it was stopped; False where more than ``spec.max_failures`` passes failed in a row.

        Raises:
            UsageError: the first pass tells that a setting is wrong.
        """
        from .schedule import Schedule

        place = self.getter.checkpoints
        schedule = Schedule(self.spec, place, stop)
        passed = False  # from then on a wrong setting is no longer one that the operator just made
        event: Outcome | WsyncError
        self._stop = stop
        if away := remote(place):
            away.store.stop = stop
        try:
            while not stop.is_set():
                if not schedule.due(self.spec.poll):
                    continue
                try:
                    event, passed = self.once(), True
                except WsyncError as exc:
                    if isinstance(exc, UsageError) and not passed:
                        raise
                    event = exc
                if last := schedule.add(event):
                    tell(last)
                    return False
                tell(event)
                idle = isinstance(event, WsyncError) or event.status != "published"
                if idle and (segment := self.updater.opened):
                    segment.unmap()  # until the next publish
        except Stopped:
            pass
        finally:
            schedule.close()
        return True

    def _has_nothing_for(self, live: Publication | None) -> bool:
        """Whether nothing is in the place, and never was anything that is live: retention alone empties a place."""
        place = os.fspath(self.getter.checkpoints)
        here = live is not None and place in (live.source, os.path.dirname(live.source))
        return not here and not self.getter.candidates()

    def _todo(self, this: Pass) -> tuple[list[Candidate], Outcome | None]:
        """What to try; and, where the newest was refused as it is, that refusal once more."""
        newer = self.getter.candidates(None if this.force else place_of(this.live))
        refused = self.record.refusals(candidate.identity for candidate in newer)
        if this.force or not newer:
            return newer, None
        todo = [candidate for candidate in newer if candidate.identity not in refused]
        first = newer[0]
        if first.identity not in refused:
            return todo, None
        return todo, this.outcome(
            "rejected",
            step=step_of(first.path.name, {}),
            checkpoint=str(first.path),
            reason=refused[first.identity],
            identity=first.identity,
            known=not self.record.is_fresh(first.identity),
        )

    def _try(self, this: Pass, todo: list[Candidate], take: Callable[[Checkpoint], Outcome]) -> Outcome:
        """Goes down the list until one can be taken; tells of the newest if none can.

        Raises:
            CheckpointChanged: one changed while it was read, and the pass is to begin anew.
        """
        refusals: list[Outcome] = []
        for candidate in todo:
            opened = ""  # a link may have moved since it was listed
            try:
                with self._busy(partial(self.getter.open, candidate)) as checkpoint:
                    opened = checkpoint.identity
                    return replace(take(checkpoint), passed_over=tuple(refusals))
            except NoCheckpoint:
                continue  # a trainer's retention was faster
            except (CheckpointError, RetryLater) as exc:
                if this.again and isinstance(exc, CheckpointChanged):
                    raise
                identity = opened or getattr(exc, "identity", "") or candidate.identity
                refusal = self._refusal(
                    this,
                    exc,
                    named=candidate.path == self.getter.checkpoints,
                    step=step_of(candidate.path.name, {}),
                    checkpoint=str(candidate.path),
                    identity=identity,
                )
                if isinstance(exc, RetryLater):  # it may still go live: nothing older does in its place
                    return replace(refusal, passed_over=tuple(refusals))
                refusals.append(refusal)
                if isinstance(exc, CheckpointRejected) and not this.dry_run:
                    self.record.refuse(identity, exc.message, refusal)
        if not refusals:
            raise self.getter.nothing()
        return refusals[0]

    def _refusal(self, this: Pass, exc: CheckpointError | RetryLater, *, named: bool, **about: object) -> Outcome:
        """What a checkpoint was refused for, or a pass put off.

        Args:
            named: it was named itself, and not found in a directory.
            about: step, path and identity of the checkpoint.
        """
        return this.outcome(
            status_of(exc, named),
            reason=exc.message,
            differences=exc.differences,
            kind=exc.kind,
            **about,
        )

    def _busy(self, work: Callable[[], _T]) -> _T:
        """What this work gives, which may take long: a group tells its boxes meanwhile."""
        return work()

    def _publish(self, this: Pass, segment: Segment, checkpoint: Checkpoint) -> Outcome:
        """Publishes an opened checkpoint; it was waited for before the lock is taken, not while others want it."""
        if self.spec.fingerprint not in (segment.spec, this.live.spec if this.live else ""):
            self._check_layout(segment)
        try:
            outcome = self._deliver(this, segment, checkpoint, self.spec.weights)
        except (CheckpointMismatch, UnusableBase):
            self._check_layout(segment)
            raise
        return replace(outcome, casts=self._new_casts(checkpoint))

    def _deliver(
        self, this: Pass, segment: Segment, checkpoint: Checkpoint, fit: Fit, *, pinned: bool = False
    ) -> Outcome:
        """Publishes a checkpoint; all that may have changed since the pass began is looked at again under the lock."""
        with segment.publishing():
            before, this = this.live, replace(this, live=segment.live())
            if before != this.live and not pinned:  # another publisher was faster; maybe with this very checkpoint
                newer, _ = self._todo(this)
                if checkpoint.identity not in {candidate.identity for candidate in newer}:
                    return self._current(this)
            try:
                outcome = self._store(this, segment, checkpoint, fit, None if pinned else self._last_look)
            except RetryLater:
                if pin := self.record.pin():
                    return self._pinned_outcome(this, pin)
                raise
        self._keep(segment)
        return outcome

    def _keep(self, segment: Segment) -> None:
        """Keeps a copy of what is live, if copies are kept; the lock is free by then, so that others need not wait."""
        self.record.keep(segment, self.spec.keep)

    def _new_casts(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Tells of each conversion once, those between the same two dtypes together."""
        groups: dict[str, list[str]] = {}
        for stored, entry in checkpoint.planned.conversions if checkpoint.planned else ():
            if (cast := (stored.name, stored.dtype, entry.dtype)) not in self._cast:
                self._cast.add(cast)
                groups.setdefault(f"{stored.dtype} to {entry.dtype}", []).append(stored.name)
        return tuple(
            f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} cast from {dtypes}: "
            + ", ".join(names[:5])
            + (", …" if len(names) > 5 else "")
            for dtypes, names in groups.items()
        )

    def _last_look(self, staged: Staged) -> None:
        """The gate, where there is one, and the pin once more: by now it may be minutes since the pass began."""
        if self.spec.hooks.gate:
            self._gate(staged)
        if pin := self.record.pin():
            raise RetryLater(f"{staged.checkpoint}: {pin.name} was pinned meanwhile. Nothing to do: the pin holds.")

    def _gate(self, staged: Staged) -> None:
        from ..hooks.gate import ask

        try:
            ask(self.spec, staged, self._stop, self.record.directory)
        except WsyncError as exc:
            self.record.gate(str(exc), staged)
            raise
        self.record.gate("accepted", staged)

    def _store(
        self,
        this: Pass,
        segment: Segment,
        source: Source,
        fit: Fit,
        gate: Gate | None = None,
        last_version: int | None = None,
    ) -> Outcome:
        """Publishes what is given, and tells the history and the hooks; the caller holds the publisher's lock.

        Args:
            last_version: the version before it, where the caller knows better than the segment and the history.
        """
        if last_version is None:
            last_version = 0 if this.live else self.record.last_published()[0]
        publication = publish(
            segment,
            source,
            fit=fit,
            spec=self.spec.fingerprint,
            progress=self._counter(segment.layout.nbytes),
            gate=gate,
            last_version=last_version,
        )
        self._version, step, last = publication.version, publication.step, this.live.step if this.live else None
        try:
            readers = segment.readers()
        except (OSError, WsyncError):  # it is live already, whoever can be counted
            readers = []
        outcome = this.outcome(
            "published",
            version=publication.version,
            step=step,
            checkpoint=publication.source,
            bytes=segment.layout.nbytes,
            readers=len(readers),
            backwards=step is not None and last is not None and step < last,
            identity=publication.identity,
        )
        lag = max((publication.version - 1 - r.version for r in readers if r.version), default=0)
        fit = source.fitted or fit  # a copy was fitted when it was made
        self.record.published(outcome, lag, replace(fit, kept=publication.version) if source.kept else fit)
        if self.spec.hooks.exec or self.spec.hooks.webhook:
            from ..hooks.runner import HookRunner

            self.hooks = self.hooks or HookRunner(self.spec, segment.path.parent, self.report, self.record.directory)
            self.hooks.send(publication)
        return outcome

    def _pinned(self, this: Pass, pin: Pin) -> Outcome:
        """Keeps what is pinned live, and makes it so where the segment was made anew or the operator named a file."""
        if this.dry_run:
            return self._pinned_outcome(this, pin)
        if this.live and pin.holds(this.live):
            if this.live.source and (segment := self.updater.opened):
                self._keep(segment)  # for the next reboot, whatever became of its file
            return self._pinned_outcome(this, pin)
        segment = self._make_segment()
        try:
            checkpoint, fit = self._busy(lambda: self.record.reopen(pin, self.spec.weights))
            with checkpoint:
                return replace(self._deliver(this, segment, checkpoint, fit, pinned=True), pin=pin.name)
        except CheckpointError as exc:
            return self._unusable(this, pin, exc)

    def _unusable(self, this: Pass, pin: Pin, exc: CheckpointError) -> Outcome:
        """What is pinned cannot go live."""
        about = {"step": pin.step, "checkpoint": pin.checkpoint or None, "identity": pin.identity, "pin": pin.name}
        outcome = self._refusal(this, exc, named=True, **about)
        self.record.failed(outcome.version, outcome.reason or "")
        return outcome

    def _pinned_outcome(self, this: Pass, pin: Pin) -> Outcome:
        reason = f"{pin.name} is pinned ({pin.reason}); `wsync unpin {self.spec.name}` goes on with the newest"
        return this.standing("pinned", reason=reason, pin=pin.name)

    def _rehearse(self, this: Pass, checkpoint: Checkpoint) -> Outcome:
        layout, segment = self.spec.layout(), self.updater.opened
        if segment:
            self._check_layout(segment, layout)
        rehearse(layout, checkpoint, segment, fit=self.spec.weights, progress=self._counter(layout.nbytes))
        return this.outcome(
            "checked",
            step=checkpoint.step,
            checkpoint=str(checkpoint.path),
            bytes=layout.nbytes,
            reason="the gate was not asked" if self.spec.hooks.gate else None,
            identity=checkpoint.identity,
        )

    def _check_layout(self, segment: Segment, layout: Layout | None = None) -> None:
        """Tells a policy that changed since its segment was made.

        Raises:
            LayoutDiffers: it did.
        """
        layout = layout or self.spec.layout()
        if layout.digest != segment.layout.digest:
            differences = segment.layout.differences(layout)
            raise LayoutDiffers(
                f"segment {segment.name!r} was made for another architecture than {self.spec.policy} has now: "
                f"{len(differences)} tensors differ. Stop its processes and `wsync rm {segment.name}`, or give the new "
                "policy another --name.",
                differences,
            )

    def _counter(self, total: int) -> Callable[[int], None] | None:
        if self.progress is None:
            return None
        done, report = 0, self.progress

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            report(done, total)

        return count

    def _current(self, this: Pass) -> Outcome:
        if this.live is None:
            raise self.getter.nothing()
        return this.standing("current")
