"""Plans a read: where each tensor's bytes go in the layout.

A plan is data, and records what is cast, what keeps its live values and what an adapter adds. If some tensors do not
fit, the error lists them all, and names the setting that would make them fit if there is one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..errors import CheckpointMismatch, ForeignCheckpoint, PartialCheckpoint
from ..layout.layout import Layout, TensorEntry
from .cast import Pair
from .fit import Fit
from .header import StoredTensor
from .match import match

_MAX_BUFFERS = 512  # most buffers of one preadv; Linux takes 1,024


class Reading(NamedTuple):
    """Sizes, in bytes, by which checkpoints are read; tests replace ``READING``.

    Attributes:
        chunk: most bytes of one read: few calls, and the bytes are still in the L3 cache for the finite check.
        buffer: size of each thread's buffer, which stays in its core's L2 cache.
        large: least to read of a file past the page cache; for less, reads through the cache are as fast.
        worth_threads: least to read with several threads; less is done before a second one has started.
    """

    chunk: int = 8 << 20
    buffer: int = 1 << 20
    large: int = 4 << 20
    worth_threads: int = 16 << 20


READING = Reading()


class Read(NamedTuple):
    """One system call: ``nbytes`` from ``start`` of a file into slices ``(offset, nbytes)`` of the weights."""

    file: int
    start: int
    nbytes: int
    slices: tuple[tuple[int, int], ...]

    def places(self, weights: memoryview) -> list[memoryview]:
        """The memory of the slices."""
        return [weights[offset : offset + nbytes] for offset, nbytes in self.slices]


@dataclass(frozen=True)
class Plan:
    """How a checkpoint's bytes reach a layout.

    Attributes:
        layout: the policy's layout.
        pairs: the tensors that are read, each with the entry that it becomes.
        twins: further copies of a tied tensor, which must equal the one that is read.
        kept: missing tensors, which keep their live values.
        built: missing tensors, which get the values that the policy has when it is built.
        settings: the settings that the plan was made with.
        merge: for an adapter, what it adds to its base, and the plan of the base.
    """

    layout: Layout
    pairs: tuple[Pair, ...] = ()
    twins: tuple[Pair, ...] = ()
    kept: tuple[TensorEntry, ...] = ()
    built: tuple[TensorEntry, ...] = ()
    settings: Fit = field(default_factory=Fit)
    merge: Merge | None = None

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """The reads of pairs that need no cast, in the order of the files."""
        return _reads(pair for pair in self.pairs if pair[0].dtype == pair[1].dtype)

    @cached_property
    def casts(self) -> tuple[Pair, ...]:
        """The pairs that are converted on the way."""
        return tuple(pair for pair in self.pairs if pair[0].dtype != pair[1].dtype)

    @property
    def conversions(self) -> tuple[Pair, ...]:
        """``casts``, and those of an adapter's base."""
        return (*self.merge.conversions, *self.casts) if self.merge else self.casts

    def without(self, names: Collection[str]) -> Plan:
        """This plan without these tensors, except those that have twins."""
        left_out = set(names) - {entry.name for _, entry in self.twins}
        return replace(self, pairs=tuple(pair for pair in self.pairs if pair[1].name not in left_out))


@dataclass(frozen=True, slots=True)
class Delta:
    """What is added to one weight: ``scale`` · B A.

    Attributes:
        entry: the place of the sum in the weights.
        a, b: A of shape (r, in) and B of shape (out, r).
        transposed: whether the weight is stored as (in, out).
        weight: the stored weight that the delta is added to.
        of_base: whether ``weight`` is from the base, not from the adapter.
    """

    entry: TensorEntry
    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool
    weight: StoredTensor
    of_base: bool


@dataclass(frozen=True)
class Merge:
    """What an adapter adds to its base; ``plan`` reads the base's other weights."""

    plan: Plan
    deltas: tuple[Delta, ...]

    @property
    def conversions(self) -> tuple[Pair, ...]:
        added = ((d.weight, d.entry) for d in self.deltas if d.weight.dtype != d.entry.dtype)
        return (*self.plan.conversions, *added)


_last: tuple[Mapping[str, StoredTensor], Layout, Fit, Plan] | None = None  # a run's checkpoints share a plan


def plan_of(tensors: Mapping[str, StoredTensor], layout: Layout, settings: Fit, path: Path) -> Plan:
    """Plans how a checkpoint's tensors reach a layout.

    Args:
        path: the checkpoint, for messages.

    Raises:
        CheckpointMismatch: a tensor is missing, unknown, or of another dtype or shape; the error lists all of them.
        PartialCheckpoint: some tensors are missing, as allowed, but there are no live values to keep for them.
    """
    global _last
    if _last and _last[0] is tensors and _last[1] is layout and _last[2] == settings:
        last = _last[3]  # with its cached reads
        return last if last.settings.built is settings.built else replace(last, settings=settings)
    found = match(tensors, layout, settings)
    if found.rows:
        rows = tuple(sorted(found.rows, key=lambda row: row.name))
        if not settings.strict and not match(tensors, layout, replace(settings, partial=True)).rows:
            raise PartialCheckpoint(
                f"{path} holds only a part of the policy's weights: {len(rows)} of {len(layout.tensors)} tensors are "
                "missing, and nothing is live, so they have no values to keep. Publish a whole checkpoint first, or "
                'give them the values that they have when the policy is built: missing = "policy" in [weights], or '
                "--missing policy.",
                rows,
            )
        from .advice import HOPELESS, advice  # few passes need it

        hint = advice(tensors, layout, settings)
        known = {name for entry in layout.tensors for name in entry.names}
        is_foreign = hint.startswith(HOPELESS) and known.isdisjoint(map(settings.name, tensors))
        if is_foreign:
            hint += " If it is not one of the policy's checkpoints, leave it out with pattern in [select] (--pattern)."
        kind = ForeignCheckpoint if is_foreign else CheckpointMismatch
        raise kind(f"{path} does not fit the policy: {len(rows)} of its tensors differ. {hint}", rows)
    plan = Plan(layout, tuple(found.pairs), tuple(found.twins), tuple(found.kept), tuple(found.built), settings)
    _last = (tensors, layout, settings, plan)
    return plan


def _reads(chosen: Iterable[Pair]) -> tuple[Read, ...]:
    """Plans reads of at most a chunk in the order of the files; each fills all tensors that lie in its range."""
    reads: list[Read] = []
    slices: list[tuple[int, int]] = []
    file = start = end = 0

    def flush() -> None:
        if slices:
            reads.append(Read(file, start, end - start, tuple(slices)))
            slices.clear()

    for stored, entry in sorted(chosen, key=lambda pair: (pair[0].file, pair[0].start)):
        at = 0
        while at < stored.nbytes:
            here = stored.start + at
            room = READING.chunk - (end - start) & ~7  # so that no element is split
            if (stored.file, here) != (file, end) or not room or len(slices) >= _MAX_BUFFERS:
                flush()
                file, start, end, room = stored.file, here, here, READING.chunk
            size = min(stored.nbytes - at, room)
            if slices and sum(slices[-1]) == entry.offset + at:
                slices[-1] = (slices[-1][0], slices[-1][1] + size)
            else:
                slices.append((entry.offset + at, size))
            end, at = here + size, at + size
    flush()
    return tuple(reads)
