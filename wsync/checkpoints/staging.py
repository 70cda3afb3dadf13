"""Brings the planned bytes of a checkpoint into the weights, and checks them there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import CheckpointMismatch, Difference, NonFiniteWeights
from ..layout.finite import Region, all_finite, float_regions, not_finite
from ..layout.layout import TensorEntry
from .cast import Piece, convert
from .digest import Digest
from .files import unreadable
from .header import StoredTensor
from .plan import Plan
from .table import TensorTable

Progress = Callable[[int], None] | None
"""Called with the number of bytes of each read."""


def read_into(table: TensorTable, weights: memoryview, plan: Plan, *, finite: bool, progress: Progress) -> None:
    """Reads what a plan without an adapter says; see ``Checkpoint.read_into``."""
    try:
        clean = stage(table, weights, plan, float_regions(plan.layout) if finite else (), progress)
        table.check_unchanged()  # P5 verify
    except OSError as exc:
        raise unreadable(table.path, exc) from exc
    if not clean:
        raise non_finite(table, weights, plan)


def stage(table: TensorTable, weights: memoryview, plan: Plan, regions: Sequence[Region], progress: Progress) -> bool:
    """Reads what a plan takes of the checkpoint itself; returns whether the floats in these regions are finite.

    Raises:
        CheckpointMismatch: two copies of a tied tensor differ.
    """
    if digests := digests_for(table, plan):
        from . import verified

        clean, different = verified.stage(table, weights, plan, regions, digests, progress)
        if different:
            table.check_unchanged()
            raise _different(table, *different)
        return clean
    clean = True
    for read, finite_too in table.source.staged(weights, plan.reads, regions):
        clean = clean and finite_too
        if progress:
            progress(read.nbytes)

    def cast(piece: Piece, data: memoryview) -> bool:
        there = weights[piece.offset : piece.offset + piece.becomes]
        convert(data, piece.source, piece.target, there)
        return all_finite(weights, regions, ((piece.offset, piece.becomes),))

    clean = table.convert_each(plan.casts, cast, progress) and clean
    for twin, entry in plan.twins:
        _compare(table, weights, twin, entry)
    return clean


def _compare(table: TensorTable, weights: memoryview, twin: StoredTensor, entry: TensorEntry) -> None:
    def work(piece: Piece, data: memoryview) -> bool:
        there = weights[piece.offset : piece.offset + piece.becomes]
        return convert(data, piece.source, piece.target) == there

    if not table.convert_each([(twin, entry)], work):
        table.check_unchanged()
        raise _different(table, twin, entry)


def _different(table: TensorTable, twin: StoredTensor, entry: TensorEntry) -> CheckpointMismatch:
    return CheckpointMismatch(
        f"{table.path}: {twin.name} and {entry.name} are one tensor in the policy and two different ones "
        "in the file. Write the checkpoint from a model whose weights are tied.",
        (Difference(twin.name, f"equal to {entry.name}", "different"),),
    )


def digests_for(table: TensorTable, plan: Plan) -> tuple[Digest, ...]:
    """The digests that are checked while this is staged.

    One that the writer was to leave is always checked. One that the store knows by itself is checked where the plan
    takes every tensor, so that nothing more is read for it.
    """
    if table.digests or not table.source.digests:
        return table.digests
    taken = sum(stored.nbytes for stored, _ in (*plan.pairs, *plan.twins))
    return table.source.digests if taken == sum(tensor.nbytes for tensor in table.tensors.values()) else ()


def non_finite(table: TensorTable, weights: memoryview, plan: Plan) -> NonFiniteWeights:
    """Tells what is not finite of all that was read."""
    casts = {pair[1].name: pair for pair in plan.casts}
    read = {entry.name for _, entry in plan.pairs}
    read |= {delta.entry.name for delta in plan.merge.deltas} if plan.merge else set()
    rows = []
    for name in (name for name in not_finite(weights, plan.layout) if name in read):
        if (cast := casts.get(name)) and table.is_finite(cast[0]):
            rows.append(Difference(name, f"within the range of {cast[1].dtype}", f"beyond it, as {cast[0].dtype}"))
        else:
            rows.append(Difference(name, "finite", "NaN or infinity"))
    if any(row.expected == "finite" for row in rows):
        return NonFiniteWeights(
            f"{table.path} holds NaN or infinity in {len(rows)} of its tensors. It is never published; look at the "
            "trainer, which has probably diverged.",
            tuple(rows),
        )
    return NonFiniteWeights(
        f"{table.path} holds values in {len(rows)} of its tensors that are too large for the dtype that they are "
        "cast to. It is never published; give the policy a dtype of a wider range, or look at the trainer.",
        tuple(rows),
    )
