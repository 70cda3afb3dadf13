"""Floats of one dtype as those of another, with numpy: a publisher that casts need not import torch.

Rounds to nearest, ties to even, as torch does. What the target cannot hold becomes an infinity, which the finite check
then finds. The eight-bit floats alone are left to torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .header import StoredTensor
from .layout import DTYPE_BITS, TORCH_DTYPES, TensorEntry

Pair = tuple[StoredTensor, TensorEntry]
"""What is stored, and what it becomes."""
_NUMPY = {"F16": "f2", "F32": "f4", "F64": "f8"}
_BLOCK = 1 << 15  # elements that are worked on at a time: they stay in the processor's second cache


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole elements of one dtype, in a row in a file and in the weights, that are read and converted together.

    Attributes:
        file: number of the checkpoint's file.
        start: byte of the file.
        nbytes: that are stored.
        source: their dtype.
        target: the dtype that they get.
        offset: byte of the weights.
    """

    file: int
    start: int
    nbytes: int
    source: str
    target: str
    offset: int

    @property
    def becomes(self) -> int:
        """Bytes that they are in the weights."""
        return self.nbytes * DTYPE_BITS[self.target] // DTYPE_BITS[self.source]


def pieces(pairs: Iterable[Pair], most: int) -> Iterator[Piece]:
    """The bytes of these tensors, neighbours as one, in pieces of at most so many bytes, a multiple of eight."""
    row: Piece | None = None
    for stored, entry in pairs:
        new = Piece(stored.file, stored.start, stored.nbytes, stored.dtype, entry.dtype, entry.offset)
        if row and _continues(row, new):
            row = replace(row, nbytes=row.nbytes + new.nbytes)
            continue
        if row:
            yield from _split(row, most)
        row = new
    if row:
        yield from _split(row, most)


def _continues(row: Piece, new: Piece) -> bool:
    stands, goes = row.start + row.nbytes, row.offset + row.becomes
    return new == Piece(row.file, stands, new.nbytes, row.source, row.target, goes)


def _split(row: Piece, most: int) -> Iterator[Piece]:
    for at in range(0, row.nbytes, most):
        before, nbytes = replace(row, nbytes=at), min(most, row.nbytes - at)
        yield replace(row, start=row.start + at, nbytes=nbytes, offset=row.offset + before.becomes)


def convert(data: memoryview, source: str, target: str) -> memoryview:
    """The bytes of floats of dtype ``source`` as bytes of dtype ``target``."""
    if source == target:
        return data
    if not {source, target} <= {*_NUMPY, "BF16"}:
        return _with_torch(data, source, target)
    import numpy as np

    with np.errstate(all="ignore"):
        values: Any
        if source == "BF16":
            values = (np.frombuffer(data, "u2").astype("u4") << 16).view("f4")
        else:
            values = np.frombuffer(data, _NUMPY[source])
        if target == "BF16":
            values = _rounded(values if source == "F32" else values.astype("f4"))
        elif (source, target) == ("F64", "F16"):
            values = values.astype("f4").astype("f2")  # by the same way as torch, which rounds twice
        else:
            values = values.astype(_NUMPY[target])
    return memoryview(values.view("u1").data)


def _rounded(single: Any) -> Any:
    """The upper halves of float32 values, rounded: half of the lower half's range is added, and carries over.

    What lies just between two values goes to the even one, so there the last bit is cleared; there are few such, and
    most blocks have none. A NaN would be made another value, and is a quiet one.
    """
    import numpy as np

    bits, rounded = single.view("u4"), np.empty(len(single), "u2")
    sums, lower = np.empty((2, min(len(single), _BLOCK)), "u4")
    for at in range(0, len(single), _BLOCK):
        part = slice(at, min(at + _BLOCK, len(single)))
        total, rest = sums[: part.stop - at], lower[: part.stop - at]
        np.add(bits[part], 0x8000, out=total)
        np.bitwise_and(total, 0xFFFF, out=rest)
        np.right_shift(total, 16, out=total)
        rounded[part] = total
        if not rest.min():
            rounded[part][rest == 0] &= 0xFFFE
        if np.isnan(single[part].max()):
            rounded[part][np.isnan(single[part])] = 0x7FC0
    return rounded


def _with_torch(data: memoryview, source: str, target: str) -> memoryview:
    import torch

    values = torch.frombuffer(bytearray(data), dtype=getattr(torch, TORCH_DTYPES[source]))
    return memoryview(values.to(getattr(torch, TORCH_DTYPES[target])).view(torch.uint8).numpy().data)
