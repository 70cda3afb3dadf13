"""Checks whether weights are finite, without torch, and in the time that reading them once takes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .layout import Layout

Region = tuple[int, int, str]
"""Bytes ``[begin, end)`` of the weights that hold floats of one dtype."""

# For each float dtype: bytes of a (real) number, and the smallest bit pattern that is not finite, without its sign.
_NON_FINITE = {
    "F64": ("8", 0x7FF0 << 48),
    "F32": ("4", 0x7F80 << 16),
    "C64": ("4", 0x7F80 << 16),
    "F16": ("2", 0x7C00),
    "BF16": ("2", 0x7F80),
    "F8_E5M2": ("1", 0x7C),
    "F8_E4M3": ("1", 0x7F),
}
_WITH_INFINITY = {*_NON_FINITE} - {"F8_E4M3"}
_NAN_BYTE = {
    "F8_E4M3FNUZ": 0x80,
    "F8_E5M2FNUZ": 0x80,
    "F8_E8M0": 0xFF,
}  # these have one NaN and no infinity
_PIECE = 1 << 18  # bytes at once; they stay in the processor's cache


def float_regions(layout: Layout) -> tuple[Region, ...]:
    """The regions of a layout that hold floats; neighbours of one dtype are one region."""
    regions: list[Region] = []
    for entry in layout.tensors:
        if (entry.dtype in _NON_FINITE or entry.dtype in _NAN_BYTE) and entry.nbytes:
            if regions and regions[-1][1:] == (entry.offset, entry.dtype):
                regions[-1] = (regions[-1][0], entry.offset + entry.nbytes, entry.dtype)
            else:
                regions.append((entry.offset, entry.offset + entry.nbytes, entry.dtype))
    return tuple(regions)


def all_finite(weights: memoryview, regions: Iterable[Region], slices: Iterable[tuple[int, int]]) -> bool:
    """Whether the floats in these slices of the weights (offset and bytes) are finite; all other bytes pass."""
    for offset, nbytes in slices:
        for begin, end, dtype in regions:
            first, last = max(begin, offset), min(end, offset + nbytes)
            if first < last and not is_finite(weights[first:last], dtype):
                return False
    return True


def is_finite(floats: memoryview, dtype: str) -> bool:
    """Whether floats of one dtype are finite; bytes of any other dtype pass.

    For F32 and F64, numpy first multiplies one half by the other, as a dot product: a core reads two streams faster
    than one. The product is NaN or infinite if any element is, but it may also overflow. So the bits are then checked,
    as for other dtypes: their maximum as unsigned and as signed integers shows whether any exponent is all ones.
    """
    import numpy as np

    if dtype in _NAN_BYTE:
        return not (np.frombuffer(floats, "u1") == _NAN_BYTE[dtype]).any()
    if dtype not in _NON_FINITE:
        return True
    width, limit = _NON_FINITE[dtype]
    if dtype in ("F32", "F64"):
        values = np.frombuffer(floats, f"f{width}")
        half = len(values) // 2
        with np.errstate(all="ignore"):
            if math.isfinite(values[:half].dot(values[half : 2 * half])) and math.isfinite(values[-1]):
                return True
    bits = np.frombuffer(floats, f"u{width}")
    sign, step = 1 << (8 * int(width) - 1), _PIECE // int(width)
    pieces = (bits[at : at + step] for at in range(0, len(bits), step))  # the second look finds them in the cache
    return all(int(piece.max()) < sign | limit and int(piece.view(f"i{width}").max()) < limit for piece in pieces)


def has_nan(floats: memoryview, dtype: str) -> bool:
    """Whether floats of one dtype hold NaN; bytes of any other dtype do not."""
    import numpy as np

    if dtype not in _WITH_INFINITY:
        return not is_finite(floats, dtype)
    width, infinity = _NON_FINITE[dtype]
    sign = 1 << (8 * int(width) - 1)
    return bool((np.frombuffer(floats, f"u{width}") & (sign - 1) > infinity).any())


def same_infinities(floats: memoryview, others: memoryview, dtype: str) -> bool:
    """Whether ``others`` hold the same infinity wherever ``floats``, of the same dtype, hold one."""
    import numpy as np

    width, infinity = _NON_FINITE[dtype]
    sign = 1 << (8 * int(width) - 1)
    bits, theirs = np.frombuffer(floats, f"u{width}"), np.frombuffer(others, f"u{width}")
    infinite = bits & (sign - 1) == infinity
    return bits.shape == theirs.shape and bool((bits[infinite] == theirs[infinite]).all())


def not_finite(weights: memoryview, layout: Layout) -> list[str]:
    """The names of the tensors that hold NaN or infinity; they are checked one by one only if there are any."""
    if all_finite(weights, float_regions(layout), ((0, layout.nbytes),)):
        return []
    return [
        entry.name
        for entry in layout.tensors
        if entry.nbytes and not is_finite(weights[entry.offset : entry.offset + entry.nbytes], entry.dtype)
    ]
