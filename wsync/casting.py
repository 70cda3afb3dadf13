"""Floats of one dtype as those of another, with numpy: a publisher that casts need not import torch.

Rounds to nearest, ties to even, as torch does. What the target cannot hold becomes an infinity, which the finite check
then finds. The eight-bit floats alone are left to torch.
"""

from __future__ import annotations

from typing import Any

from .layout import TORCH_DTYPES

_NUMPY = {"F16": "f2", "F32": "f4", "F64": "f8"}


def convert(data: memoryview, source: str, target: str) -> memoryview:
    """The bytes of floats of dtype ``source`` as bytes of dtype ``target``."""
    import numpy as np

    if not {source, target} <= {*_NUMPY, "BF16"}:
        return _with_torch(data, source, target)
    with np.errstate(all="ignore"):
        values: Any
        if source == "BF16":
            values = (np.frombuffer(data, "u2").astype("u4") << 16).view("f4")
        else:
            values = np.frombuffer(data, _NUMPY[source])
        if target != "BF16":
            if (source, target) == ("F64", "F16"):
                values = values.astype("f4")  # by the same way as torch, which rounds twice
            return memoryview(values.astype(_NUMPY[target]).view("u1").data)
        single = values.astype("f4")
        bits = single.view("u4")
        rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype("u2")
        rounded[np.isnan(single)] = 0x7FC0
    return memoryview(rounded.view("u1").data)


def _with_torch(data: memoryview, source: str, target: str) -> memoryview:
    import torch

    values = torch.frombuffer(bytearray(data), dtype=getattr(torch, TORCH_DTYPES[source]))
    return memoryview(values.to(getattr(torch, TORCH_DTYPES[target])).view(torch.uint8).numpy().data)
