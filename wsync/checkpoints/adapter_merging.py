"""Reads base weights and adds an adapter: W + scale · B A, from W as stored, in float32 or wider, then cast once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import Difference, NonFiniteWeights
from ..fitting.cast import Piece, convert
from ..fitting.header import StoredTensor
from ..fitting.plan import Delta, Plan
from ..layout.finite import Region, all_finite, float_regions
from ..layout.layout import DTYPE_BITS
from . import staging
from .adapter import blaming
from .files.parts import changed_while_read, unreadable
from .files.source import HeldInMemory
from .staging import Progress
from .tensor_table import TensorTable


def read_into(
    adapter: TensorTable, base: TensorTable, weights: memoryview, plan: Plan, *, finite: bool, progress: Progress
) -> None:
    """Carries out a plan that merges an adapter into a base; see ``Checkpoint.read_into``."""
    assert plan.merge
    regions = float_regions(plan.layout) if finite else ()
    try:
        if adapter.digests:  # what is read must be the very bytes whose digests are checked
            adapter.source = HeldInMemory(adapter.source)
        with blaming(base.path, adapter.path):
            staging.read_into(base, weights, plan.merge.plan, finite=finite, progress=progress)
        clean = staging.stage(adapter, weights, plan, regions, progress)
        clean = _add(adapter, base, plan.merge.deltas, weights, regions, progress) and clean
        adapter.check_unchanged()  # P5 verify, for the adapter's part
    except OSError as exc:
        raise unreadable(adapter.path, exc) from exc
    except OverflowError as exc:
        raise staging.too_large(adapter.path, exc) from exc
    if not clean:
        staging.check_finite(adapter, weights, plan)


def _add(
    adapter: TensorTable,
    base: TensorTable,
    deltas: Sequence[Delta],
    weights: memoryview,
    regions: Sequence[Region],
    progress: Progress,
) -> bool:
    """Reads the adapted weights and adds the deltas; returns whether the sums are finite.

    Raises:
        UnusableBase: an adapted weight of the base is not finite.
    """
    finite = True
    rows: list[Difference] = []
    for delta in deltas:
        pairs = [(delta.weight, delta.entry)]
        work = _adding(weights, delta, _whole(adapter, delta.a), _whole(adapter, delta.b), regions)
        if not delta.of_base:
            finite = adapter.convert_each(pairs, work, progress) and finite
            continue
        with blaming(base.path, adapter.path):
            if not base.convert_each(pairs, work, progress):
                finite = False
                if not staging.stored_is_finite(base, delta.weight):
                    rows.append(Difference(delta.entry.name, "finite", "NaN or infinity"))
    with blaming(base.path, adapter.path):
        base.check_unchanged()
        if rows:
            raise NonFiniteWeights(
                f"{base.path} holds NaN or infinity in {len(rows)} tensors. Name another base.", tuple(rows)
            )
    return finite


def _whole(adapter: TensorTable, tensor: StoredTensor) -> Any:
    """Reads a whole tensor, as a float32 array of its shape."""
    import numpy as np

    data = memoryview(adapter.source.read(tensor.file, tensor.nbytes, tensor.start))
    if len(data) != tensor.nbytes:
        raise changed_while_read(adapter.path)
    return np.frombuffer(convert(data, tensor.dtype, "F32"), "f4").reshape(tensor.shape)


def _adding(
    weights: memoryview, delta: Delta, right: Any, left: Any, regions: Sequence[Region]
) -> Callable[[Piece, memoryview], bool]:
    """Returns a function that adds the delta to one piece of a weight, and writes the sum into the weights.

    The function takes a piece and its stored bytes, and returns whether the sum is finite in ``regions``.

    Args:
        right, left: A and B, float32, of shapes (r, in) and (out, r).
    """
    import numpy as np

    entry, scale = delta.entry, np.float32(delta.scale)
    if delta.transposed:
        left, right = right.T, left.T
    width, columns = DTYPE_BITS[entry.dtype] // 8, entry.shape[1]

    def product(first: int, number: int) -> Any:
        """``number`` elements of B A in row-major order, from element ``first``."""
        top, begin = divmod(first, columns)
        if begin + number <= columns:
            return left[top] @ right[:, begin : begin + number]
        rows = left[top : -(-(first + number) // columns)] @ right
        return rows.reshape(-1)[begin : begin + number]

    def work(piece: Piece, data: memoryview) -> bool:
        wide = "F64" if "F64" in (piece.source, piece.target) else "F32"
        summed = convert(data, piece.source, wide)
        values = np.frombuffer(summed, "f8" if wide == "F64" else "f4")
        with np.errstate(all="ignore"):  # the finite check finds an overflow
            values += product((piece.offset - entry.offset) // width, len(values)) * scale
        convert(summed, wide, piece.target, weights[piece.offset : piece.offset + piece.becomes])
        return all_finite(weights, regions, ((piece.offset, piece.becomes),))

    return work
