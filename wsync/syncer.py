"""One pass of the whole job, and the loop around it.

A pass looks first and locks later: where the newest checkpoint is live already it costs a listing, two small reads and
no lock. It reads the policy's layout from the standing segment, and runs the user's code (which imports torch) only
where there is no segment, where the spec changed since, or to tell a wrong checkpoint from a changed policy.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from .checkpoint import Checkpoint, step_of
from .errors import (
    CheckpointChanged,
    CheckpointError,
    CheckpointMismatch,
    CheckpointRejected,
    Difference,
    IncompleteCheckpoint,
    LayoutDiffers,
    NoCheckpoint,
    SegmentBusy,
    UsageError,
    WithDifferences,
    WsyncError,
)
from .layout import Layout
from .publisher import rehearse
from .segment import Segment
from .segment_files import Publication
from .segment_updater import SharedMemoryWeightUpdater
from .source import Candidate, Changes
from .spec import Spec
from .weight_getter import CheckpointWeightGetter, place_of

EXIT_CODES = {
    "published": 0,
    "current": 0,
    "checked": 0,
    "failed": 1,
    "rejected": 65,
    "empty": 66,
    "busy": 75,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one pass did.

    Attributes:
        status: a key of ``EXIT_CODES``; ``checked`` is a dry run that would have published.
        name: of the segment.
        version: the live version afterwards; 0 before the first.
        step: of the checkpoint.
        checkpoint: its path.
        bytes: of weights that were staged.
        seconds: that the pass took.
        readers: living readers.
        reason: why nothing was published.
        differences: what does not fit.
        backwards: the step is lower than that of the version before.
        identity: of the checkpoint's file.
        passed_over: newer candidates that were refused on the way to this one.
    """

    status: str
    name: str
    version: int = 0
    step: int | None = None
    checkpoint: str | None = None
    bytes: int = 0
    seconds: float = 0.0
    readers: int = 0
    reason: str | None = None
    differences: tuple[Difference, ...] = ()
    backwards: bool = False
    identity: str = ""
    passed_over: tuple[Outcome, ...] = ()

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.status]


class Syncer:
    """Keeps one segment in step with one source of checkpoints.

    Args:
        spec: the policy and its settings.
        checkpoints: a directory or file; default the spec's.
        runtime: where segments live; default ``memory.runtime_dir()``.
        progress: called with bytes done and bytes in all while a checkpoint is staged.

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
        self.updater.register_post_hook(self._note)
        self._before: Publication | None = None
        self._started = 0.0
        self._published: Outcome | None = None
        self._refused: dict[str, str] = {}

    def __enter__(self) -> Syncer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.updater.close()

    @property
    def segment(self) -> Segment | None:
        """The standing segment; None where there is none."""
        return self.updater.segment

    def rest(self) -> None:
        """Gives the slots' mappings back until the next publish."""
        if segment := self.segment:
            segment.unmap()

    def once(self, *, force: bool = False, dry_run: bool = False) -> Outcome:
        """One pass: the newest checkpoint that is complete, fits and is newer than what is live goes live.

        Args:
            force: publish the newest again though it is live.
            dry_run: check all, publish nothing.

        Raises:
            WsyncError: something else than the checkpoint is wrong, or it cannot be read.
        """
        started = time.perf_counter()
        segment = self.segment
        live = segment.live() if segment else None
        try:
            todo, refusal = self._todo(live, force, started)
            if todo and not dry_run:
                self.updater.spec = self.spec.fingerprint
                segment = self.updater.make_segment()
                with segment.publishing():
                    live = segment.live()  # another publisher may have been faster
                    todo, refusal = self._todo(live, force, started)
                    if todo:
                        return self._try(todo, lambda c: self._publish(segment, c, live, started), live, started)
            elif todo:
                return self._try(todo, lambda c: self._rehearse(segment, c, live, started), live, started)
            if refusal:
                return refusal
            if live is None:
                raise self.getter.nothing()
            return self._outcome("current", live, started, step=live.step, checkpoint=live.source or None)
        except NoCheckpoint as exc:
            return self._outcome("empty", live, started, reason=str(exc))
        except CheckpointError as exc:  # the place itself is a checkpoint, and a broken or incomplete one
            return self._outcome(_status(exc, False), live, started, reason=str(exc))
        except SegmentBusy as exc:
            return self._outcome("busy", live, started, reason=str(exc))

    def run(self, stop: threading.Event, tell: Callable[[Outcome | WsyncError], None]) -> None:
        """Passes until ``stop`` is set: at each notification, and at least every ``spec.poll`` seconds.

        Args:
            tell: called with the outcome of each pass; with an error where the pass failed.
        """
        changes = Changes(self.getter.checkpoints, self.spec.poll, stop, self.spec.select.marker)
        try:
            while not stop.is_set():
                try:
                    tell(self.once())
                except UsageError:
                    raise
                except WsyncError as exc:
                    tell(exc)
                except OSError as exc:
                    tell(WsyncError(f"the system refused: {exc}. It is tried again at the next pass."))
                if not changes.wait():
                    self.rest()
        finally:
            changes.close()

    def _todo(self, live: Publication | None, force: bool, started: float) -> tuple[list[Candidate], Outcome | None]:
        """What to try; and, where the newest was refused as it is, that refusal once more."""
        newer = self.getter.candidates(None if force else place_of(live))
        if force:
            return newer, None
        todo = [candidate for candidate in newer if candidate.identity not in self._refused]
        reason = self._refused.get(newer[0].identity) if newer else None
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
        )

    def _try(
        self,
        todo: list[Candidate],
        take: Callable[[Checkpoint], Outcome],
        live: Publication | None,
        started: float,
    ) -> Outcome:
        """Goes down the list until one can be taken; tells of the newest if none can."""
        refusals: list[Outcome] = []
        for candidate in todo:
            try:
                with self.getter.open(candidate) as checkpoint:
                    return replace(take(checkpoint), passed_over=tuple(refusals))
            except NoCheckpoint:
                continue  # a trainer's retention was faster
            except CheckpointError as exc:
                if isinstance(exc, CheckpointRejected):
                    self._refused[candidate.identity] = exc.message
                named = candidate.path == self.getter.checkpoints
                status = _status(exc, named)
                refusals.append(
                    self._outcome(
                        status,
                        live,
                        started,
                        step=step_of(candidate.path.name, {}),
                        checkpoint=str(candidate.path),
                        reason=exc.message if isinstance(exc, WithDifferences) else str(exc),
                        differences=exc.differences if isinstance(exc, WithDifferences) else (),
                        identity=candidate.identity,
                    )
                )
        if not refusals:
            raise self.getter.nothing()
        return refusals[0]

    def _publish(self, segment: Segment, checkpoint: Checkpoint, live: Publication | None, started: float) -> Outcome:
        if self.spec.fingerprint not in (segment.spec, live.spec if live else ""):
            self._check_layout(segment)
        self.updater.progress = self._counter(segment.layout.nbytes)
        self._before, self._started = live, started
        try:
            self.updater.push_weights(checkpoint)
        except CheckpointMismatch:
            self._check_layout(segment)
            raise
        assert self._published is not None
        return self._published

    def _note(self) -> None:
        """The post hook: what was published, in words."""
        publication, segment, before = self.updater.published, self.updater.segment, self._before
        assert publication is not None and segment is not None
        step, last = publication.step, before.step if before else None
        self._published = self._outcome(
            "published",
            publication,
            self._started,
            step=publication.step,
            checkpoint=publication.source,
            bytes=segment.layout.nbytes,
            readers=len(segment.readers()),
            backwards=step is not None and last is not None and step < last,
            identity=publication.identity,
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

    def _outcome(self, status: str, live: Publication | None, started: float, **more: object) -> Outcome:
        return Outcome(
            status=status,
            name=self.spec.name,
            version=live.version if live else 0,
            seconds=round(time.perf_counter() - started, 6),
            **more,  # type: ignore[arg-type]
        )


def _status(exc: CheckpointError, named: bool) -> str:
    """A half-written file in a directory is none yet; one that was named itself is refused as it is."""
    if isinstance(exc, CheckpointRejected) or (named and isinstance(exc, IncompleteCheckpoint)):
        return "rejected"
    if isinstance(exc, IncompleteCheckpoint):
        return "empty"
    return "busy" if isinstance(exc, CheckpointChanged) else "failed"
