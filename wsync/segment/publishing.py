"""The writing side: stages a checkpoint or tensors in a spare slot, verifies them, and makes them live.

What publishes here runs under the publisher's lock. Staged weights are checked before the WORD points to them; a
failure before that leaves the live version as it was.
"""

from __future__ import annotations

import mmap
import operator
import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from ..checkpoints.files.extras import Extras, checked
from ..errors import SegmentError, SegmentMissing, SegmentUnsafe
from ..fitting.fit import Fit
from ..layout.finite import not_finite
from ..layout.layout import Layout, views
from ..layout.tensor_names import seen_through
from ..system.memory import mapping, reserve, write_at
from .publication import MAX_VERSION, Publication, Version
from .segment import Segment
from .segment_files import SpareSlot, slot_header, slot_name
from .writable import WritableSegment

if TYPE_CHECKING:
    import torch

    from ..checkpoints.checkpoint import Checkpoint
    from ..fitting.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged(Version):
    """Weights that are staged and verified, but not live yet: what a gate is given.

    Attributes:
        path: the slot's file, a safetensors file; it has tied weights once, and step and version in its metadata.
        name: name of the segment.
        version: the number that the weights get if they go live.
        checkpoint: the path of the checkpoint; empty for weights from memory.
        extras: the files that go live with the weights: bytes by file name.
    """

    path: Path
    name: str
    checkpoint: str = ""
    extras: Mapping[str, bytes]


class Source(Protocol):
    """What can be published: a ``Checkpoint``, or an object that gets its weights from another box."""

    @property
    def path(self) -> str | Path: ...

    @property
    def step(self) -> int | None: ...

    @property
    def identity(self) -> str: ...

    @property
    def changed_ns(self) -> int: ...

    @property
    def mixed(self) -> bool: ...  # whether missing tensors keep their live values

    @property
    def fitted(self) -> Fit | None: ...

    @property
    def extras(self) -> Extras: ...  # known once the weights are read

    def plan(self, layout: Layout, settings: Fit) -> Plan: ...

    def read_into(
        self, weights: memoryview, plan: Plan, *, finite: bool, progress: Callable[[int], None] | None
    ) -> None: ...


Gate = Callable[[Staged], None]
"""Returns to accept; raises ``GateRejected``, ``RetryLater``, or any other error, which the caller gets."""


def publish(
    segment: WritableSegment,
    checkpoint: Source,
    *,
    fit: Fit = Fit(),  # noqa: B008  (frozen)
    spec: str = "",
    progress: Callable[[int], None] | None = None,
    gate: Gate | None = None,
    last_version: int = 0,
    origin: tuple[str, str] = ("", ""),
) -> Publication:
    """Stages, verifies and publishes a checkpoint; the caller holds ``segment.publishing()``.

    Args:
        fit: which tensors are taken, and how they are fitted.
        spec: fingerprint of the policy spec, recorded with the version.
        progress: called after each read with the number of bytes that it read.
        gate: called with the staged weights, after all other checks; if it raises, nothing is published.
        last_version: the highest version ever published under this name, for a segment that was made anew.
        origin: owner and place, recorded with the version (see ``Publication``).

    Raises:
        CheckpointRejected: it does not fit, is not finite, or the gate rejects it.
        PartialCheckpoint: missing tensors should keep their live values, and nothing is live.
        CheckpointError: for the other reasons of ``Checkpoint.read_into``, such as that it changed while it was read.
        RetryLater: the gate cannot decide yet.
        SegmentBusy: readers lease every spare slot, and no slot can be added.
    """
    plan = _plan(checkpoint, segment.layout, fit, segment)
    version, step = _next_version(segment, last_version), _whole(checkpoint.step)
    with segment.spare_slot() as slot:
        with slot.weights as weights:
            if plan.kept and (live := segment.live_weights()):
                for entry in plan.kept:
                    part = slice(entry.offset, entry.offset + entry.nbytes)
                    weights[part] = live[part]
            checkpoint.read_into(weights, plan, finite=fit.finite, progress=progress)  # P4 and P5 happen there
        about = Publication(
            version=version,
            step=step,
            checkpoint=None if checkpoint.path in (Path(), "") else str(checkpoint.path),  # a copy may be of memory
            identity=checkpoint.identity,
            spec=spec,
            owner=origin[0],
            place=origin[1],
            changed_ns=checkpoint.changed_ns,
        )
        publication = _describe(segment, slot, about, gate, checkpoint.extras)
    segment.store(publication.version, slot.number)
    return publication


def publish_again(segment: WritableSegment, version: int, identity: str, last_version: int) -> Publication | None:
    """Publishes an earlier version that a spare slot still holds whole; the caller holds ``segment.publishing()``.

    Args:
        version, identity: those of the earlier version.
        last_version: as for ``publish``.

    Returns:
        What is live now; None if no spare slot holds that version.
    """
    with segment.slot_with(version, identity) as (slot, held):
        if slot is None or held is None:
            return None
        number = _next_version(segment, last_version)
        publication = replace(held, version=number, published_at=time.time())
        slot.describe(publication)
    segment.store(publication.version, slot.number)
    return publication


def publish_tensors(
    segment: WritableSegment,
    tensors: Mapping[str, torch.Tensor],
    *,
    strict: bool = True,
    finite: bool = True,
    infinities: Mapping[str, torch.Tensor] = MappingProxyType({}),
    step: int | None = None,
    spec: str = "",
    gate: Gate | None = None,
    last_version: int = 0,
    extras: Mapping[str, bytes] = MappingProxyType({}),
) -> Publication:
    """Stages, verifies and publishes weights from memory; the caller holds ``segment.publishing()``.

    Args:
        tensors: the weights by dotted name, on any device; other float dtypes are cast to the segment's.
        strict: whether to refuse if a tensor is missing; if False, a missing tensor keeps its live values.
        finite: whether to refuse NaN and infinity, also if they come from a cast.
        infinities: the policy's own tensors with infinities, by name; the same infinities are accepted.
        step: recorded with the version: a whole number, which may be numpy's or in a tensor.
        spec: fingerprint of the policy spec, recorded with the version.
        gate, last_version: as for ``publish``.
        extras: the files that travel with the weights: bytes by file name.

    Raises:
        KeyError: a name is unknown, or a tensor is missing.
        ValueError: a shape differs, a value is not finite, or the step is beyond 64 bits.
        TypeError: the segment's dtype cannot hold a tensor's values, or the step is not a whole number.
        GateRejected, RetryLater: the gate rejects the weights, or cannot decide yet.
        SegmentBusy: readers lease every spare slot, and no slot can be added.
    """
    import torch

    from ..layout.weights import check, copy, has_no_other_infinities

    layout, travelling = segment.layout, checked(extras)
    version, step = _next_version(segment, last_version), _whole(step)
    homes = seen_through(tensors, {name for entry in layout.tensors for name in entry.names})
    tensors = {homes.get(name, name): tensor for name, tensor in tensors.items()}
    sources = {tuple(name.split(".")): tensor for name, tensor in tensors.items()}
    live = _live_values(segment, tensors, strict)
    with segment.spare_slot() as slot:
        staged = views(layout, torch.frombuffer(slot.memory, dtype=torch.uint8).untyped_storage(), slot.data_offset)
        targets = {
            tuple(name.split(".")): tensor
            for entry, tensor in zip(layout.tensors, staged, strict=True)
            for name in entry.names
        }
        check(targets, sources)
        if finite:  # a cast to this dtype turns an infinity into a finite number, so check before the cast
            eight = torch.float8_e4m3fn
            cast = {path: s for path, s in sources.items() if targets[path].dtype == eight != s.dtype}
            check(targets, cast, finite=True)
        if live is not None:
            slot.weights[:] = live
        copy(targets, sources)  # P4 stage
        wrong = not_finite(slot.weights, layout) if finite else []  # P5 verify
        for name in wrong:
            own, source = infinities.get(name), tensors.get(name)
            dtype = targets[tuple(name.split("."))].dtype
            if own is not None and source is not None and has_no_other_infinities(source, own.to(dtype)):
                continue
            raise ValueError(f"{name!r} holds NaN or infinity. Nothing was published; see what the trainer did.")
        publication = _describe(segment, slot, Publication(version=version, step=step, spec=spec), gate, travelling)
    segment.store(publication.version, slot.number)
    return publication


def _live_values(segment: WritableSegment, tensors: Collection[str], strict: bool) -> memoryview | None:
    """The live weights, whose values missing tensors keep; None if no tensor is missing.

    Raises:
        KeyError: tensors are missing, and ``strict`` is set or nothing is live.
    """
    missing = [entry.name for entry in segment.layout.tensors if not any(name in tensors for name in entry.names)]
    if not missing:
        return None
    live = None if strict else segment.live_weights()
    if live is None:
        why = (
            "Give all of them, or set strict=False" if strict else "There are no live values to keep: give all of them"
        )
        raise KeyError(f"{len(missing)} tensors are missing: {', '.join(missing[:5])}. {why}.")
    return live


def _next_version(segment: WritableSegment, last_version: int) -> int:
    segment.live()  # raises if the WORD and its slot disagree: never count on from a damaged version
    version = max(segment.version, operator.index(last_version)) + 1  # plain, so that a slot's header can hold it
    if version >= MAX_VERSION:
        raise SegmentUnsafe(
            f"segment {segment.name!r} says that its version is {version - 1}, which is impossible: it is damaged. "
            f"Remove it with `wsync rm {segment.name}`, and publish again."
        )
    return version


def _whole(step: int | None) -> int | None:
    """A step as a plain int, which a slot's header can hold and every reader can read."""
    if step is None:
        return None
    try:
        number = None if isinstance(step, bool) else operator.index(step)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"step = {step!r} is not a whole number. Nothing was published: give an int, or None.")
    if abs(number) >= 1 << 63:
        raise ValueError(
            f"step = {number} does not fit into 64 bits. Nothing was published: give a smaller one, or None."
        )
    return number


def _describe(
    segment: WritableSegment, slot: SpareSlot, publication: Publication, gate: Gate | None, extras: Extras
) -> Publication:
    """Writes the slot's header and extras, and calls the gate; the WORD does not point to the slot yet.

    The publish time is set after the gate, which may be slow. The extras are then written again, because the gate may
    have written to their file.
    """
    data = extras.to_bytes()
    publication = replace(publication, extras=len(data), published_at=time.time())
    segment.put_extras(slot, data)
    slot.describe(publication)
    if gate:
        file = segment.path / slot_name(slot.number)
        about = {**publication.which(), "checkpoint": publication.checkpoint or ""}
        staged = Staged(path=file, name=segment.name, extras=extras.files, **about)
        try:
            try:
                gate(staged)
            finally:
                _check_file(segment, slot, file)
        except SegmentError:  # the slot was changed: make it whole and empty
            _restore(segment, slot)
            raise
        publication = replace(publication, published_at=time.time())
        segment.put_extras(slot, data)
        slot.describe(publication)
    return publication


def _check_file(segment: WritableSegment, slot: SpareSlot, file: Path) -> None:
    """Checks that the slot's name still leads to its whole file, in a segment that others can open.

    Raises:
        SegmentError: it does not: the gate changed the segment's files.
    """
    try:
        with suppress(SegmentMissing):
            Segment.open(segment.name, segment.path.parent).close()
    except SegmentUnsafe as exc:
        raise SegmentError(
            f"{segment.path} was damaged while the gate looked at its weights, and nothing went live. Let the gate "
            f"change no file of a segment, and run `wsync rm {segment.name}`."
        ) from exc
    info = os.fstat(slot.fd)
    try:
        there = segment.is_current() and os.path.samestat(info, os.stat(file, follow_symlinks=False))
    except FileNotFoundError:
        there = False
    if not there:
        raise SegmentError(
            f"{file} was removed while the gate looked at it, and nothing went live. Let the gate change no file of a "
            f"segment. If the next pass fails because of it, run `wsync rm {segment.name}`."
        )
    if info.st_size != slot.data_offset + segment.layout.nbytes:
        raise SegmentError(
            f"{file} was cut or lengthened while the gate looked at it, and nothing went live. Let the gate change no "
            "file of a segment."
        )


def _restore(segment: WritableSegment, slot: SpareSlot) -> None:
    size = slot.data_offset + segment.layout.nbytes
    os.ftruncate(slot.fd, size)
    reserve(slot.fd, size)
    write_at(slot.fd, slot_header(segment.layout), 0)


def _plan(checkpoint: Source, layout: Layout, settings: Fit, segment: WritableSegment | None) -> Plan:
    """The checkpoint's plan; without a live version, no tensor may be missing."""
    if segment is None or not segment.version:
        settings = replace(settings, partial=False)
    return checkpoint.plan(layout, settings)


def rehearse(
    layout: Layout,
    checkpoint: Checkpoint,
    segment: WritableSegment | None = None,
    *,
    fit: Fit = Fit(),  # noqa: B008  (frozen)
    progress: Callable[[int], None] | None = None,
) -> None:
    """Checks what ``publish`` checks, except the gate, in memory of this process that is freed afterwards.

    Raises:
        CheckpointRejected: it does not fit, or is not finite.
        CheckpointError: it cannot be read, or changed while it was read.
    """
    _read_aside(layout, checkpoint, _plan(checkpoint, layout, fit, segment), fit, progress)


def holds(segment: WritableSegment, checkpoint: Source, fit: Fit) -> bool:
    """Whether the live version equals a checkpoint and its extras; the caller holds ``publishing()``.

    Raises:
        CheckpointRejected: it does not fit, or is not finite.
        CheckpointError: it cannot be read, or changed while it was read.
    """
    live, publication = segment.live_weights(), segment.live()
    if live is None or publication is None:
        return False
    plan = _plan(checkpoint, segment.layout, fit, segment)
    staged = _read_aside(segment.layout, checkpoint, plan, fit)
    if checkpoint.extras.files != segment.extras(publication, segment.word & 0xFF).files:
        return False
    for entry in plan.kept:
        part = slice(entry.offset, entry.offset + entry.nbytes)
        staged[part] = live[part]
    return staged[: segment.layout.nbytes] == live[: segment.layout.nbytes]


def _read_aside(
    layout: Layout, checkpoint: Source, plan: Plan, fit: Fit, progress: Callable[[int], None] | None = None
) -> memoryview:
    """Reads the weights of a checkpoint into new memory of this process, and returns that."""
    with mapping(layout.nbytes):
        memory = mmap.mmap(-1, max(layout.nbytes, 1))
    weights = memoryview(memory)
    checkpoint.read_into(weights, plan, finite=fit.finite, progress=progress)
    return weights
