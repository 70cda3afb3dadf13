"""Puts weights live on this box: its segment and gate, and afterwards the history, the copies and the hooks.

Every version of a spec goes live through ``Box.put_live``, whether it comes from a checkpoint, a pin, or another box.
``wsync rollback`` does not: it has no spec, so ``history.rollback`` uses ``segment.publishing``, without gate or hooks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files.extras import Extras
from ..errors import WsyncError
from ..fitting.fit import Fit
from ..history.record import Record
from ..layout.layout import Layout
from ..segment.publication import Publication
from ..segment.standing import StandingSegment
from ..segment.writable import WritableSegment
from ..settings.layout_process import built_by
from ..settings.spec import Spec
from .claim import Claim
from .one_pass import Pass, Recheck
from .outcome import Outcome

if TYPE_CHECKING:
    from ..hooks.runner import HookRunner
    from ..segment.publishing import Source, Staged

T = TypeVar("T")


class Box:
    """The segment of a spec on this box, and what is told about each publish there.

    Args:
        spec: the policy and its settings.
        layout: gives the layout of the policy, for a segment that is made.
        record: what is known about the past.
        claim: whose versions this box may replace.
        runtime: where segments live; default ``memory.runtime_dir()``.

    Attributes:
        standing: opens and makes the segment.
        progress: called with bytes done and bytes in all while weights are staged.
        report: called from a hook's thread with its kind, whether it worked, and a message; None logs failures.
        hooks: what runs after a publish; None before the first, or if there is nothing to run.
        stop: ends a gate early, once set.
        built: gives values of the policy as it is built.
    """

    def __init__(
        self,
        spec: Spec,
        layout: Callable[[], Layout],
        record: Record,
        claim: Claim,
        runtime: str | os.PathLike[str] | None = None,
    ) -> None:
        self.spec, self.record, self.claim = spec, record, claim
        self.standing = StandingSegment(spec.name, layout, spec.slots, spec.max_slots, runtime)
        self.standing.access = spec.access
        self.progress: Callable[[int, int], None] | None = None
        self.report: Callable[[str, bool, str], None] | None = None
        self.hooks: HookRunner | None = None
        self.stop: threading.Event | None = None
        self.built = built_by(spec)

    def __enter__(self) -> Box:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self.close(now=kind is not None and not issubclass(kind, Exception))
        except (SystemExit, KeyboardInterrupt):  # a signal that comes while it is closed
            self.close(now=True)
            raise

    def make_segment(self) -> WritableSegment:
        """The standing segment, or a new one."""
        self.standing.spec = self.spec.fingerprint()  # of the policy as it is now
        return self.standing.make_segment()

    def busy(self, work: Callable[[], T]) -> T:
        """See ``publish_checkpoint.Route``; no other box waits for a sign of life."""
        return work()

    def deliver(
        self, this: Pass, segment: WritableSegment, checkpoint: Checkpoint, fit: Fit, recheck: Recheck
    ) -> Outcome:
        """See ``publish_checkpoint.Route``; delivers to this box alone."""
        outcome = self.put_live(this, segment, checkpoint, fit, recheck)
        if outcome.status == "published":
            self.keep(segment)
        return outcome

    def put_live(
        self,
        this: Pass,
        segment: WritableSegment,
        source: Source,
        fit: Fit,
        recheck: Recheck,
        last_version: int | None = None,
        reason: str | None = None,
    ) -> Outcome:
        """Publishes weights, and tells the history and the hooks.

        Args:
            recheck: what is looked at again under the lock.
            last_version: the version before, if the caller knows it better than the segment and the history.
            reason: why it is published, for the history.

        Raises:
            UsageError: what is live came from another spec or place.
            WsyncError: as ``publishing.publish``; what was live stays live.
        """
        from ..segment.publishing import publish  # a pass with nothing to do does not need it

        with segment.publishing():
            this = this.at(segment)
            origin = self.claim.origin(this.live)
            if ended := recheck.before(this):
                return ended
            if last_version is None:
                last_version = 0 if this.live else max(self.standing.last_version, self.record.last_published()[0])
            publication = publish(
                segment,
                source,
                fit=replace(fit, built=self.built),
                spec=self.spec.fingerprint(),
                progress=self.counter(segment.layout.nbytes),
                gate=recheck.staged,
                last_version=last_version,
                origin=origin,
            )
            self.claim.take_over = False
            fit = source.fitted or fit  # a copy was fitted when it was made
            fit = replace(fit, mixture=publication.version) if source.mixed else fit
            return self._tell(this, segment, publication, fit, source.extras, reason)

    def _tell(
        self,
        this: Pass,
        segment: WritableSegment,
        publication: Publication,
        fit: Fit,
        extras: Extras,
        reason: str | None,
    ) -> Outcome:
        step, last = publication.step, this.live.step if this.live else None
        try:
            readers = segment.readers()
        except (OSError, WsyncError):  # it is live, even if readers cannot be counted
            readers = []
        outcome = this.outcome(
            "published",
            **publication.which(),
            bytes=segment.layout.nbytes,
            readers=len(readers),
            reason=reason,
            backwards=step is not None and last is not None and step < last,
        )
        lag = max((publication.version - 1 - r.version for r in readers if r.version), default=0)
        self.record.published(outcome, lag, fit, publication.changed_ns, self.spec.extras)
        if self.spec.hooks.exec or self.spec.hooks.webhook:
            from ..hooks.runner import HookRunner

            self.hooks = self.hooks or HookRunner(self.spec, segment.path.parent, self.report, self.record.directory)
            self.hooks.send(publication, extras)
        return outcome

    def keep(self, segment: WritableSegment) -> None:
        """Keeps a copy of what is live, if ``keep`` asks for it; without the lock, so that others need not wait."""
        self.record.keep(segment, self.spec.keep)

    def ask_gate(self, staged: Staged) -> None:
        """Asks the spec's gate, and records its answer.

        Raises:
            GateRejected: it does not accept.
            RetryLater: it wants the same weights again later.
        """
        from ..hooks.gate import ask

        try:
            ask(self.spec, staged, self.stop, self.record.directory)
        except WsyncError as exc:
            self.record.gate(str(exc), staged)
            raise
        self.record.gate("accepted", staged)

    def counter(self, total: int) -> Callable[[int], None] | None:
        """Adds up the bytes of each read for ``progress``."""
        if self.progress is None:
            return None
        done, report = 0, self.progress

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            report(done, total)

        return count

    def close(self, *, now: bool = False) -> None:
        """Closes the segment once hooks that still run have ended, each within its time.

        Args:
            now: end the hooks instead.
        """
        try:
            if self.hooks:
                self.hooks.close(now=now)
        finally:
            self.standing.close()
            self.record.close()
