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
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint, step_of
from .errors import (
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
    WithDifferences,
    WsyncError,
    refused,
)
from .fitting import Fit
from .layout import Layout
from .outcome import Outcome, status_of
from .parts import remote
from .publisher import Gate, Source, Staged, publish, rehearse
from .record import Record
from .retry import Failures
from .segment import Segment
from .segment_files import Publication
from .segment_updater import SharedMemoryWeightUpdater
from .source import Candidate, listing_of
from .spec import Spec
from .weight_getter import CheckpointWeightGetter, place_of

if TYPE_CHECKING:
    from .hook_runner import HookRunner
    from .state import Pin, State


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
        self.updater.register_post_hook(self._note)
        self.updater.gate = self._last_look
        self.report: Callable[[str, bool, str], None] | None = None
        self.hooks: HookRunner | None = None
        self._stop: threading.Event | None = None
        self._before: Publication | None = None
        self._source: Source | None = None  # of what is being published, with how it fits
        self._fit = spec.weights
        self._started = 0.0
        self._published: Outcome | None = None
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

    @property
    def segment(self) -> Segment | None:
        """The standing segment; None where there is none."""
        return self.updater.segment

    def rest(self) -> None:
        """Gives the slots' mappings back until the next publish."""
        if segment := self.updater.opened:
            segment.unmap()

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
                published = self.updater.published
                self.record.failed(published.version if published else 0, str(exc))
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
        started = time.perf_counter()
        live: Publication | None = None
        try:
            segment = self.updater.segment
            live = segment.live() if segment else None
            return self._pass(segment, live, started, force=force, dry_run=dry_run)
        except NoCheckpoint as exc:
            return self._outcome("empty", live, started, reason=str(exc))
        except CheckpointError as exc:  # the place itself is a checkpoint, and a broken or incomplete one
            return self._outcome(status_of(exc, False), live, started, reason=str(exc), kind=exc.kind)
        except SegmentBusy as exc:
            return self._outcome("busy", live, started, reason=str(exc))
        except OSError as exc:  # whatever concerns a checkpoint alone was told as such
            raise refused(exc, self.updater.path) from exc

    def _pass(
        self,
        segment: Segment | None,
        live: Publication | None,
        started: float,
        *,
        force: bool,
        dry_run: bool,
        last: bool = False,
    ) -> Outcome:
        """Looks, and takes the newest; once more (``last``) where an object of a store was overwritten meanwhile.

        On a disk its writer may still be at work, and a notification tells when it is done.
        """
        if pin := self.record.pin():
            return self._pinned(pin, live, started, dry_run)
        todo, refusal = self._todo(live, force, started)
        if not todo:
            if not refusal and self._has_nothing_for(live):
                raise self.getter.nothing()
            return refusal or self._current(live, started)
        again = None
        if remote(self.getter.checkpoints) and not last:
            again = partial(self._pass, segment, live, started, force=force, dry_run=dry_run, last=True)
        if dry_run:
            take = partial(self._rehearse, segment, live=live, started=started)
            return self._try(todo, take, live, started, again, remember=False)
        self.updater.spec = self.spec.fingerprint
        target = self.updater.make_segment()
        take = partial(self._publish, target, live=live, started=started, force=force)
        try:
            outcome = self._try(todo, take, live, started, again)
        except NoCheckpoint:
            if refusal:
                return refusal
            raise
        if refusal and outcome.status in ("rejected", "empty"):  # what is older makes the newest no better
            return replace(refusal, passed_over=(outcome,) if outcome.status == "rejected" else ())
        return outcome

    def run(self, stop: threading.Event, tell: Callable[[Outcome | WsyncError], None]) -> bool:
        """Passes until ``stop`` is set: at each notification, and at least every ``spec.poll`` seconds.

        After passes that failed, or whose gate asked for later, it pauses longer (see ``retry``).

        Args:
            tell: called with the outcome of each pass; with an error where the pass failed.

        Returns:
            Whether it was stopped; False where more than ``spec.max_failures`` passes failed in a row.

        Raises:
            UsageError: the first pass tells that a setting is wrong.
        """
        from .changes import Changes

        place, spec = self.getter.checkpoints, self.spec
        changes = Changes(place, spec.poll, stop, spec.select.marker)
        failures = Failures(changes, lambda: listing_of(place, spec.select), spec.poll, stop)
        passed = False  # from then on a wrong setting is no longer one that the operator just made
        event: Outcome | WsyncError
        self._stop = stop
        if away := remote(place):
            away.store.stop = stop
        try:
            while not stop.is_set():
                failures.before()
                try:
                    event, passed = self.once(), True
                except WsyncError as exc:
                    if isinstance(exc, UsageError) and not passed:
                        raise
                    event = exc
                if last := failures.add(event, spec.max_failures):
                    tell(last)
                    return False
                tell(event)
                if failures.pauses:
                    self.rest()
                    failures.pause()
                elif not changes.wait():
                    self.rest()
        except Stopped:
            pass
        finally:
            changes.close()
        return True

    def _has_nothing_for(self, live: Publication | None) -> bool:
        """Whether nothing is in the place, and never was anything that is live: retention alone empties a place."""
        place = os.fspath(self.getter.checkpoints)
        here = live is not None and place in (live.source, os.path.dirname(live.source))
        return not here and not self.getter.candidates()

    def _todo(self, live: Publication | None, force: bool, started: float) -> tuple[list[Candidate], Outcome | None]:
        """What to try; and, where the newest was refused as it is, that refusal once more."""
        newer = self.getter.candidates(None if force else place_of(live))
        refused = self.record.refusals(candidate.identity for candidate in newer)
        if force:
            return newer, None
        todo = [candidate for candidate in newer if candidate.identity not in refused]
        reason = refused.get(newer[0].identity) if newer else None
        if reason is None:
            return todo, None
        return todo, self._outcome(
            "rejected",
            live,
            started,
            step=step_of(newer[0].path.name, {}),
            checkpoint=str(newer[0].path),
            reason=reason,
            identity=newer[0].identity,
            known=not self.record.is_fresh(newer[0].identity),
        )

    def _try(
        self,
        todo: list[Candidate],
        take: Callable[[Checkpoint], Outcome],
        live: Publication | None,
        started: float,
        again: Callable[[], Outcome] | None,
        *,
        remember: bool = True,
    ) -> Outcome:
        """Goes down the list until one can be taken; tells of the newest if none can.

        Args:
            again: gives the outcome in its place where one was overwritten while it was read.
            remember: that one is refused, so that no later pass, and no later run, tries it again.
        """
        refusals: list[Outcome] = []
        for candidate in todo:
            opened = ""  # a link may have moved since it was listed
            try:
                with self._open(candidate) as checkpoint:
                    opened = checkpoint.identity
                    return replace(take(checkpoint), passed_over=tuple(refusals))
            except NoCheckpoint:
                continue  # a trainer's retention was faster
            except (CheckpointError, RetryLater) as exc:
                if again and isinstance(exc, CheckpointChanged):
                    outcome = again()
                    return replace(outcome, passed_over=(*refusals, *outcome.passed_over))
                if isinstance(exc, CheckpointError):
                    opened = opened or exc.identity
                identity = opened or candidate.identity
                about = {
                    "step": step_of(candidate.path.name, {}),
                    "checkpoint": str(candidate.path),
                    "identity": identity,
                }
                named = candidate.path == self.getter.checkpoints
                refusals.append(self._refusal(exc, live, started, named=named, **about))
                if remember and isinstance(exc, CheckpointRejected):
                    self.record.refuse(identity, exc.message, refusals[-1])
                if isinstance(exc, RetryLater):  # it may still go live: nothing older does in its place
                    return replace(refusals.pop(), passed_over=tuple(refusals))
        if not refusals:
            raise self.getter.nothing()
        return refusals[0]

    def _refusal(
        self,
        exc: CheckpointError | RetryLater,
        live: Publication | None,
        started: float,
        *,
        named: bool,
        **about: object,
    ) -> Outcome:
        """What a checkpoint was refused for, or a pass put off.

        Args:
            named: it was named itself, and not found in a directory.
            about: step, path and identity of the checkpoint.
        """
        return self._outcome(
            status_of(exc, named),
            live,
            started,
            reason=exc.message if isinstance(exc, WithDifferences) else str(exc),
            differences=exc.differences if isinstance(exc, WithDifferences) else (),
            kind=exc.kind,
            **about,
        )

    def _open(self, candidate: Candidate) -> Checkpoint:
        return self.getter.open(candidate)

    def _publish(
        self, segment: Segment, checkpoint: Checkpoint, live: Publication | None, started: float, force: bool
    ) -> Outcome:
        """Publishes an opened checkpoint; it was waited for before the lock is taken, not while others want it."""
        if self.spec.fingerprint not in (segment.spec, live.spec if live else ""):
            self._check_layout(segment)
        self.updater.progress = self._counter(segment.layout.nbytes)
        try:
            with segment.publishing():
                before = segment.live()
                if pin := self.record.pin():  # just now
                    return self._pinned_outcome(pin, before, started)
                if before is None:
                    self.updater.last_version = self.record.last_version()
                if before != live:  # another publisher was faster; maybe with this very checkpoint
                    newer, _ = self._todo(before, force, started)
                    if checkpoint.identity not in {candidate.identity for candidate in newer}:
                        return self._current(before, started)
                self._before, self._started = before, started
                self._source, self._fit = checkpoint, self.spec.weights
                try:
                    self.updater.push_weights(checkpoint)
                except RetryLater:
                    if pin := self.record.pin():
                        return self._pinned_outcome(pin, before, started)
                    raise
        except (CheckpointMismatch, UnusableBase):
            self._check_layout(segment)
            raise
        assert self._published is not None and self.updater.published is not None
        self.record.keep(segment, self.updater.published, self.spec.keep)  # a copy that others need not wait for
        return replace(self._published, casts=self._new_casts(checkpoint))

    def _new_casts(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Tells of each conversion once, those between the same two dtypes together."""
        groups: dict[str, list[str]] = {}
        for stored, entry in checkpoint.casts:
            if (cast := (stored.name, stored.dtype, entry.dtype)) not in self._cast:
                self._cast.add(cast)
                groups.setdefault(f"{stored.dtype} to {entry.dtype}", []).append(stored.name)
        return tuple(
            f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} cast from {dtypes}: "
            + ", ".join(names[:5])
            + (", …" if len(names) > 5 else "")
            for dtypes, names in groups.items()
        )

    def _note(self) -> None:
        """The post hook: what was published, in words."""
        publication, segment, before = self.updater.published, self.updater.opened, self._before
        assert publication is not None and segment is not None
        step, last = publication.step, before.step if before else None
        try:
            readers = segment.readers()
        except (OSError, WsyncError):  # it is live already, whoever can be counted
            readers = []
        self._published = self._outcome(
            "published",
            publication,
            self._started,
            step=publication.step,
            checkpoint=publication.source,
            bytes=segment.layout.nbytes,
            readers=len(readers),
            backwards=step is not None and last is not None and step < last,
            identity=publication.identity,
        )
        lag = max((publication.version - 1 - r.version for r in readers if r.version), default=0)
        fit, mixed = self._fit, self._source is not None and self._source.kept
        if self._source and self._source.fitted:  # a copy of what came of that
            fit = self._source.fitted
        self.record.published(self._published, lag, replace(fit, kept=publication.version) if mixed else fit)
        if self.spec.hooks.exec or self.spec.hooks.webhook:
            from .hook_runner import HookRunner

            self.hooks = self.hooks or HookRunner(self.spec, segment.path.parent, self.report, self.record.directory)
            self.hooks.send(publication)

    def _last_look(self, staged: Staged) -> None:
        """The gate, where there is one, and the pin once more: by now it may be minutes since the pass began."""
        if self.spec.hooks.gate:
            self._gate(staged)
        if pin := self.record.pin():
            raise RetryLater(f"{staged.checkpoint}: {pin.name} was pinned meanwhile. Nothing to do: the pin holds.")

    def _gate(self, staged: Staged) -> None:
        from .gate import ask

        about = staged.version, staged.checkpoint, staged.step
        try:
            ask(self.spec, staged, self._stop, self.record.directory)
        except WsyncError as exc:
            self.record.gate(str(exc), *about)
            raise
        self.record.gate("accepted", *about)

    def _store(
        self,
        segment: Segment,
        source: Source,
        fit: Fit,
        started: float,
        gate: Gate | None = None,
        last_version: int = 0,
    ) -> Outcome:
        """Publishes what is given, by ``publish``; the caller holds the publisher's lock."""
        self._before, self._started = segment.live(), started
        self._source, self._fit = source, fit
        self.updater.published = publish(
            segment,
            source,
            fit=fit,
            spec=self.spec.fingerprint,
            progress=self._counter(segment.layout.nbytes),
            gate=gate,
            last_version=last_version,
        )
        self._note()
        assert self._published
        return self._published

    def _pinned(self, pin: Pin, live: Publication | None, started: float, dry_run: bool) -> Outcome:
        """Keeps what is pinned live, and makes it so where the segment was made anew or the operator named a file."""
        if dry_run or (live and pin.holds(live)):
            if live and live.source and not dry_run and (segment := self.updater.opened):
                self.record.keep(segment, live, self.spec.keep)  # for the next reboot, whatever became of its file
            return self._pinned_outcome(pin, live, started)
        self.updater.spec = self.spec.fingerprint
        segment = self.updater.make_segment()
        try:
            checkpoint, fit = self.record.reopen(pin, self.spec.weights)
            with checkpoint, segment.publishing():
                last = 0 if segment.live() else self.record.last_version()
                outcome = replace(self._store(segment, checkpoint, fit, started, last_version=last), pin=pin.name)
        except CheckpointError as exc:
            return self._unusable(pin, exc, live, started)
        if self.updater.published:
            self.record.keep(segment, self.updater.published, self.spec.keep)
        return outcome

    def _unusable(self, pin: Pin, exc: CheckpointError, live: Publication | None, started: float) -> Outcome:
        """What is pinned cannot go live."""
        about = {"step": pin.step, "checkpoint": pin.checkpoint or None, "identity": pin.identity, "pin": pin.name}
        outcome = self._refusal(exc, live, started, named=True, **about)
        self.record.failed(outcome.version, outcome.reason or "")
        return outcome

    def _pinned_outcome(self, pin: Pin, live: Publication | None, started: float) -> Outcome:
        return self._outcome(
            "pinned",
            live,
            started,
            step=live.step if live else None,
            checkpoint=(live.source or None) if live else None,
            reason=f"{pin.name} is pinned ({pin.reason}); `wsync unpin {self.spec.name}` goes on with the newest",
            pin=pin.name,
        )

    def _rehearse(
        self,
        segment: Segment | None,
        checkpoint: Checkpoint,
        live: Publication | None,
        started: float,
    ) -> Outcome:
        layout = self.spec.layout()
        if segment:
            self._check_layout(segment, layout)
        rehearse(layout, checkpoint, segment, fit=self.spec.weights, progress=self._counter(layout.nbytes))
        return self._outcome(
            "checked",
            live,
            started,
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

    def _current(self, live: Publication | None, started: float) -> Outcome:
        if live is None:
            raise self.getter.nothing()
        return self._outcome("current", live, started, step=live.step, checkpoint=live.source or None)

    def _outcome(self, status: str, live: Publication | None, started: float, **more: object) -> Outcome:
        return Outcome(
            status=status,
            name=self.spec.name,
            version=live.version if live else 0,
            seconds=round(time.perf_counter() - started, 6),
            **more,  # type: ignore[arg-type]
        )
