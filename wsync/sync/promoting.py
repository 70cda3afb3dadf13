"""Promotes: publishes what is live in one segment into another, such as a canary's weights into everybody's segment.

A reader's lease holds the source until its bytes are in a slot of the target, so that a publish there meanwhile does
not reach them. The rest is a publish like any other (``Box.put_live``): under the target's lock, with its gate, its
history and its hooks.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files.parts import Parts
from ..checkpoints.files.source import ByteSource
from ..errors import (
    CheckpointError,
    LayoutDiffers,
    RetryLater,
    SegmentBusy,
    SegmentError,
    SegmentMissing,
    StateError,
    UsageError,
)
from ..fitting.fit import Fit
from ..history.record import Record
from ..history.reopening import fit_from_json
from ..history.state import State
from ..segment.publishing import Staged, holds
from ..segment.segment import Segment
from ..segment.segment_files import slot_name
from ..segment.word_and_lease import Lease
from ..segment.writable import WritableSegment
from ..settings.policy_layout import PolicyLayout
from ..settings.spec import Spec, load_spec
from ..system.access import is_name
from ..system.memory import read_at
from .claim import Claim, watch_of
from .one_pass import Pass, Recheck
from .outcome import Outcome
from .put_live import Box
from .syncer import recorded


class _Bytes(ByteSource):
    """The bytes of a leased slot: nobody writes to it, although its publisher may have it open for writing."""

    def __init__(self, parts: Parts, lease: Lease) -> None:
        self.parts, self.infos, self._lease = parts, [os.fstat(lease.fileno())], lease

    def read(self, file: int, nbytes: int, start: int) -> bytes:
        return read_at(self._lease.fileno(), nbytes, start)

    def stands(self) -> bool:
        return True

    def close(self) -> None:
        self._lease.release()


class _Slot(Checkpoint):
    """A leased slot as a safetensors file."""

    def __init__(self, segment: Segment, lease: Lease) -> None:
        self._lease = lease
        super().__init__(segment.path / slot_name(lease.slot))

    def _open(self) -> ByteSource:
        return _Bytes(self.parts, self._lease)


class _Live:
    """A leased version as the ``Source`` of a publish, with the path, step and identity of its checkpoint.

    The history of its segment tells how the checkpoint was fitted, so that a rollback of the target can read its file
    again. A version that is not on record there can come back only from a slot or a kept copy.
    """

    def __init__(self, segment: Segment, lease: Lease, state: State) -> None:
        slot, live = _Slot(segment, lease), segment.leased(lease)
        self.slot, self.plan, self.read_into, self.close = slot.path, slot.plan, slot.read_into, slot.close
        self.path, self.step, self.changed_ns = live.checkpoint or "", live.step, live.changed_ns
        self.extras = segment.extras(live, lease.slot)
        # The history tells versions apart by their identities, and weights from memory have none.
        self.identity = live.identity or f"memory-{live.version}-{live.published_at * 1e9:.0f}"
        self.came_from = f"promoted from {segment.name}, version {live.version}"
        self.fitted: Fit | None = None
        with suppress(StateError):
            if found := state.published("version = ? AND identity = ?", (live.version, self.identity), 1):
                self.fitted = fit_from_json(found[0].settings)
        self.mixed = self.fitted is None or self.fitted.mixture > 0


def promote(
    source: str,
    target: str,
    *,
    take_over: bool = False,
    runtime: str | os.PathLike[str] | None = None,
    state_dir: str | os.PathLike[str] | None = None,
) -> Outcome:
    """Publishes what is live in one segment into another; returns the outcome there.

    Args:
        source: the name of a segment.
        target: a spec, whose segment is made if there is none; or the name of a segment, which stands for the spec that
            published its live version.
        take_over: replace what another spec published.

    Raises:
        UsageError: both are one segment, the spec cannot be used, or what is live in the target is another spec's.
        SegmentMissing: there is no source; or the target is named without its spec, and has no version yet.
    """
    spec = _spec_of(target, source, runtime)
    if spec.name == source:
        raise UsageError(f"{source!r} cannot be promoted to itself. Name the segment that is to take its live version.")
    with ExitStack() as stack:
        segment = stack.enter_context(closing(Segment.open(source, runtime)))
        lease = segment.lease()
        if lease is None:
            reason = f"nothing is live in segment {source!r} yet. Publish there first, then promote it."
            return Outcome("empty", spec.name, reason=reason)
        known = stack.enter_context(State(source, state_dir))
        live = stack.enter_context(closing(_Live(segment, lease, known)))
        policy, record = PolicyLayout(spec), Record(State(spec.name, state_dir, spec.history), spec.digest)
        record.complain = lambda exc: logging.getLogger("wsync").warning("%s", exc)
        claim = Claim(spec.name, spec.origin, str(live.slot), own=False, is_named=lambda: True, take_over=take_over)
        box = stack.enter_context(Box(spec, policy.for_new_segment, record, claim, runtime))
        return recorded(box, partial(_promote, box, policy, segment, live))


def _spec_of(target: str, source: str, runtime: str | os.PathLike[str] | None) -> Spec:
    if not is_name(target) or target.endswith(".toml"):
        return load_spec(target)
    with suppress(SegmentMissing), closing(WritableSegment.open(target, runtime)) as segment:
        if live := segment.live():
            if os.path.isabs(live.owner):
                return load_spec(live.owner, name=target)
            bare = Fit(finite=False)  # nothing says which values may be infinite: they were checked in the source
            return Spec(policy="", name=target, directory=Path.cwd(), max_slots=segment.bound, weights=bare)
    raise SegmentMissing(
        f"segment {target!r} has no version yet, and only a spec says how it is made and which gate it has. Name its "
        f"spec for the first time, as in `wsync promote {source} {target}.toml`."
    )


def _promote(box: Box, policy: PolicyLayout, source: Segment, live: _Live) -> Outcome:
    spec = box.spec
    this = Pass(spec.name, None, time.perf_counter())
    try:
        segment = box.make_segment()
        this = this.at(segment)
        if spec.policy:
            policy.check(segment, this.live)
        if source.layout.names_in(segment.layout) is None:
            differences = segment.layout.differences(source.layout)
            raise LayoutDiffers(
                f"segment {source.name!r} holds another architecture than {spec.name!r}: {len(differences)} tensors "
                "differ. Promote it into a segment that was made for the same policy.",
                differences,
            )
        fit = Fit(finite=spec.weights.finite, finite_except=spec.weights.finite_except)
        outcome = box.put_live(this, segment, live, fit, _recheck(box, segment, live, fit), reason=live.came_from)
        if outcome.status == "published":
            box.keep(segment)
            if watch := watch_of(segment):
                told = f"{watch} keeps this segment in step, and replaces this version with its next checkpoint. "
                return outcome.warned(f"{told}`wsync pin {spec.name}` keeps it.")
        return outcome
    except (CheckpointError, RetryLater) as exc:
        about = {"step": live.step, "checkpoint": live.path or None, "identity": live.identity}
        return this.refusal(exc, named=True, **about)
    except SegmentError as exc:
        status = "busy" if isinstance(exc, SegmentBusy) else "failed"
        return this.outcome(status, reason=exc.message, differences=exc.differences)


def _recheck(box: Box, segment: WritableSegment, live: _Live, fit: Fit) -> Recheck:
    """What is checked under the target's lock: whether it has this version already, its pin, and its gate."""

    def check_pin() -> None:
        if pin := box.record.pin():
            raise RetryLater(
                f"{pin.name} is pinned in segment {segment.name!r} ({pin.reason}). Run `wsync unpin {segment.name}`, "
                "then promote again."
            )

    def before(now: Pass) -> Outcome | None:
        there = now.live and (now.live.checkpoint or "", now.live.step, now.live.identity)
        if there == (live.path, live.step, live.identity) and holds(segment, live, fit):
            return now.standing("current")
        check_pin()
        return None

    def staged(weights: Staged) -> None:
        live.close()  # its bytes are in the target, and a gate may take long
        if box.spec.hooks.gate:
            box.ask_gate(weights)
        check_pin()

    return Recheck(before, staged)
