"""The header of one safetensors file, believed only after it was checked against the file's real size.

What the official reader refuses is refused here, each with its reason
(https://github.com/huggingface/safetensors, ``safetensors/src/tensor.rs``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import IncompleteCheckpoint, MalformedCheckpoint
from .layout import DTYPE_BITS, describe

MAX_HEADER = 100_000_000  # bytes; the official reader's bound


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: ``start`` counts bytes from the beginning of the checkpoint's file of that number."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    file: int = 0


def read_header(
    read: Callable[[int, int], bytes], size: int, path: Path
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The validated tensors and metadata of an open safetensors file of ``size`` bytes.

    Args:
        read: gives so many bytes of the file from an offset, fewer where it ends.

    Raises:
        IncompleteCheckpoint: the file ends before the header says.
        MalformedCheckpoint: anything that the official reader refuses as well.
    """
    head = read(min(1 << 16, size), 0)
    if len(head) < 8:
        raise _incomplete(path, size, "its length field has 8")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        raise malformed(path, f"its header claims {length:,} bytes, over the bound of {MAX_HEADER:,}")
    if 8 + length > size:
        raise _incomplete(path, size, f"its header alone takes {8 + length:,}")
    text = head[8 : 8 + length]
    if len(text) < length:
        text += read(length - len(text), 8 + len(text))
    if len(text) < length:
        raise _incomplete(path, len(text) + 8, f"its header alone takes {8 + length:,}")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_integer)
    except (ValueError, RecursionError) as exc:
        raise malformed(path, f"its header is not JSON ({exc})") from exc
    if not isinstance(header, dict):
        raise malformed(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise malformed(path, "its __metadata__ is not a table of strings")
    tensors = sorted(
        (_stored(name, info, path) for name, info in header.items()),
        key=lambda t: (t.start, t.nbytes),
    )
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            raise malformed(path, f"the bytes of {tensor.name!r} overlap others, or leave a gap")
        end += tensor.nbytes
    data = 8 + length
    if data + end > size:
        raise _incomplete(path, size, f"its header says {data + end:,}")
    if data + end < size:
        raise malformed(path, f"it has {size - data - end:,} bytes more than its header says")
    located = (StoredTensor(t.name, t.dtype, t.shape, t.start + data, t.nbytes) for t in tensors)
    return {t.name: t for t in located}, metadata


def _incomplete(path: Path, size: int, says: str) -> IncompleteCheckpoint:
    return IncompleteCheckpoint(
        f"{path} is incomplete: it has {size:,} bytes, {says}. Wait for its writer to finish, or write it again."
    )


def malformed(path: Path, reason: str) -> MalformedCheckpoint:
    if len(reason) > 300:  # of a hostile header's own words no more than a line
        reason = f"{reason[:200]} … {reason[-90:]}"
    return MalformedCheckpoint(f"{path} is not a safetensors file: {reason}. Write it again.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    for key in table:
        key.encode()  # half a surrogate is no text
    if len(table) != len(pairs):
        raise ValueError("a key is there twice")
    return table


def _integer(digits: str) -> int:
    if digits == "-0":
        raise ValueError("minus zero is no size")
    return int(digits)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _stored(name: str, info: object, path: Path) -> StoredTensor:
    """One entry of a header, its byte range still relative to the data."""
    if not isinstance(info, dict) or not info.keys() >= {"dtype", "shape", "data_offsets"}:
        raise malformed(path, f"the entry of {name!r} does not have dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise malformed(path, f"{name!r} has the unknown dtype {dtype!r}"[:200])
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise malformed(path, f"{name!r} has an impossible shape or byte range")
    bits = DTYPE_BITS[dtype] * _product(shape)
    if bits >= 1 << 64 or bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise malformed(path, f"{name!r}: {describe(dtype, shape)} does not take the bytes that it is given")
    return StoredTensor(name, dtype, tuple(shape), offsets[0], offsets[1] - offsets[0])


def _product(shape: list[int]) -> int:
    """The elements of a shape; beyond 64 bits as soon as any partial product is, as the official reader has it."""
    elements = 1
    for size in shape:
        elements *= size
        if elements >= 1 << 64:
            break
    return elements


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
