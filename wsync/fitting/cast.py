"""Converts floats and integers between dtypes with numpy, so that a publisher that casts need not import torch.

Rounds to nearest, ties to even, as torch does. A number that is too large becomes an infinity, which the finite check
finds. Only the eight-bit floats are left to torch, because ml_dtypes treats overflow in them differently. ``F8_E4M3``
has no infinity: infinities and numbers beyond ±464 become NaN, where torch gives its largest number, 448.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ..layout.layout import DTYPE_BITS, TORCH_DTYPES, TensorEntry
from .header import StoredTensor

Pair = tuple[StoredTensor, TensorEntry]
"""A stored tensor and the layout entry that it becomes."""
_NUMPY = {"F16": "f2", "F32": "f4", "F64": "f8"}
_INTEGERS = {"U8": "u1", "I8": "i1", "I16": "i2", "U16": "u2", "I32": "i4", "U32": "u4", "I64": "i8", "U64": "u8"}


class Piece(NamedTuple):
    """Whole elements of one dtype, contiguous in a file and in the weights, read and converted together.

    Attributes:
        file: number of the checkpoint's file.
        start: first byte in the file.
        nbytes: size in the file, in bytes.
        source: dtype in the file.
        target: dtype in the weights.
        offset: first byte in the weights.
    """

    file: int
    start: int
    nbytes: int
    source: str
    target: str
    offset: int

    @property
    def becomes(self) -> int:
        """Size in the weights, in bytes."""
        return self.nbytes * DTYPE_BITS[self.target] // DTYPE_BITS[self.source]


def pieces(pairs: Iterable[Pair], most: int) -> Iterator[Piece]:
    """Cuts these tensors into pieces of at most ``most`` bytes, a multiple of eight; joins neighbours first."""
    rows: list[Piece] = []
    for stored, entry in pairs:
        new = Piece(stored.file, stored.start, stored.nbytes, stored.dtype, entry.dtype, entry.offset)
        if rows and _continues(rows[-1], new):
            rows[-1] = rows[-1]._replace(nbytes=rows[-1].nbytes + new.nbytes)
        else:
            rows.append(new)
    for row in rows:
        yield from split(row, most)


def _continues(row: Piece, new: Piece) -> bool:
    start, offset = row.start + row.nbytes, row.offset + row.becomes
    return new == Piece(row.file, start, new.nbytes, row.source, row.target, offset)


def split(row: Piece, most: int) -> Iterator[Piece]:
    """Cuts a piece into pieces of at most ``most`` bytes."""
    for at in range(0, row.nbytes, most):
        before, nbytes = row._replace(nbytes=at), min(most, row.nbytes - at)
        yield row._replace(start=row.start + at, nbytes=nbytes, offset=row.offset + before.becomes)


def convert(data: memoryview, source: str, target: str, out: memoryview | None = None) -> memoryview:
    """Converts elements of dtype ``source`` to dtype ``target``, into ``out`` or new memory, which it returns.

    The work is one call that releases the interpreter's lock, so that two threads convert twice as fast as one.

    Raises:
        OverflowError: an integer is beyond the target's range.
    """
    if out is None:
        out = memoryview(bytearray(len(data) * DTYPE_BITS[target] // DTYPE_BITS[source]))
    if source == target:
        out[:] = data
    elif source in _INTEGERS:
        import numpy as np

        whole: Any = np.frombuffer(data, _INTEGERS[source])
        bounds = np.iinfo(_INTEGERS[target])
        if len(whole) and not bounds.min <= int(whole.min()) <= int(whole.max()) <= bounds.max:
            raise OverflowError(f"{source} values up to {int(whole.max())} do not fit into {target}")
        np.copyto(np.frombuffer(out, _INTEGERS[target]), whole, casting="unsafe")
    elif {source, target} <= {*_NUMPY, "BF16"}:
        import numpy as np

        values: Any = np.frombuffer(data, _numpy(source))
        with np.errstate(all="ignore"):
            if source == "F64" and target != "F32":
                values = values.astype("f4")  # like torch, which rounds twice
            np.copyto(np.frombuffer(out, _numpy(target)), values, casting="unsafe")
    else:
        out[:] = _with_torch(data, source, target)
    return out


def _numpy(dtype: str) -> Any:
    if dtype != "BF16":
        return _NUMPY[dtype]
    import ml_dtypes

    return ml_dtypes.bfloat16


def _with_torch(data: memoryview, source: str, target: str) -> memoryview:
    import torch

    values = torch.frombuffer(bytearray(data), dtype=getattr(torch, TORCH_DTYPES[source]))
    cast = values.to(getattr(torch, TORCH_DTYPES[target])).view(torch.uint8)
    if target == "F8_E4M3":
        cast[values.float().abs() > 464] = 0x7F  # torch makes it 448, which would pass the finite check
    return memoryview(cast.numpy().data)
