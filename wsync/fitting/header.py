"""Reads the header of one safetensors file, and checks it against the file's real size before anything uses it.

Everything that the official reader refuses is refused here as well, with a reason
(https://github.com/huggingface/safetensors, ``safetensors/src/tensor.rs``), and so is a duplicate key. Pickles and
files of ``torch.save`` are recognised by their first bytes and never loaded, because loading one can run any code.

The headers of one run's checkpoints differ only in their metadata, so the last tables are cached by their text: a
header of 2,000 tensors takes 8 ms to parse and 0.3 ms to recognise.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import IncompleteCheckpoint, MalformedCheckpoint
from ..layout.filenames import MAX_TENSORS
from ..layout.layout import DTYPE_BITS, describe

MAX_HEADER = 100_000_000  # bytes; the official reader's bound
# These bounds are beyond any policy: the largest mixtures of experts have some 210,000 tensors, numpy takes 64
# dimensions, and the longest names have a few hundred letters. Without them, a header could take a minute to parse.
MAX_RANK = 128
MAX_NAME = 4096  # characters
MAX_METADATA = 10_000_000  # characters: configurations and vocabularies are kept there
_MAX_SIZES = 20 * MAX_TENSORS  # of all shapes and offsets together
_IN_METADATA = 100_000  # most braces in metadata that holds JSON
_MAX_ENTRY = MAX_NAME + 500  # bytes
_DEEPEST = 126  # levels of nesting in one entry, as in the official reader
_FIRST = '{"__metadata__":{'
_KEPT = 4 << 20  # most bytes of a header that is cached
_PICKLES = range(2, 6)  # protocols of pickles that begin with 0x80
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
_KEYS = {"dtype", "shape", "data_offsets"}


class StoredTensor(NamedTuple):
    """Where one tensor lies: ``nbytes`` bytes from byte ``start`` of the checkpoint's file with number ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    file: int = 0


def read_header(
    read: Callable[[int, int], bytes], size: int, path: Path, number: int = 0
) -> tuple[Mapping[str, StoredTensor], Mapping[str, str]]:
    """Reads the tensors, in the order of their bytes, and the metadata. They are cached: callers must not change them.

    Args:
        read: returns as many bytes of the file from an offset, fewer at its end.
        size: size of the file, in bytes.
        number: number of the file in its checkpoint.

    Raises:
        IncompleteCheckpoint: the file ends before the header says.
        MalformedCheckpoint: the official reader would refuse it, or it is beyond a bound of this module.
    """
    text = _text(read, size, path)
    begin = 8 + len(text)
    try:
        own, rest = _split(text.decode())
        known = _table if len(text) <= _KEPT else _table.__wrapped__  # do not cache a huge one
        table, metadata = known(rest, begin, number)
        if own and metadata is not None:
            raise ValueError("a key appears twice")
    except (ValueError, RecursionError) as exc:
        raise malformed(path, f"its header is wrong ({exc})") from exc
    last = next(reversed(table.values()), None)
    end = last.start + last.nbytes if last else begin
    if end > size:
        raise _incomplete(path, size, f"its header says {end:,}")
    if end < size:
        more = f"{size - end:,} bytes" if size - end > 1 else "a byte"
        raise malformed(path, f"it has {more} more than its header says")
    return table, own or metadata or {}


def _text(read: Callable[[int, int], bytes], size: int, path: Path) -> bytes:
    """Reads the JSON text of a header; refuses one that is incomplete or too large."""
    head = read(min(1 << 16, size), 0)
    if kind := kind_of(head):
        raise MalformedCheckpoint(
            f"{path} is {kind}, not a safetensors file. wsync never opens one, since loading it can run any code. Let "
            f"the trainer write safetensors: {instead(path.name)}"
        )
    if len(head) < 8:
        raise _incomplete(path, size, "its length field has 8")
    if other := _other_format(head):
        raise malformed(path, other)
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
    if why := _too_large(text):
        raise malformed(path, f"its header {why}, more than any policy has")
    return text


def kind_of(head: bytes) -> str:
    """Names a kind of file that holds a pickle, by its first bytes; empty for any other file.

    The ninth byte of a safetensors file is the brace that begins its header, whatever the eight of its length are.
    """
    if head[8:9] == b"{":
        return ""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "a zip archive, as torch.save and stable-baselines3 write it, with a pickle in it"
    if head[:1] == b"\x80" and head[1:2] and head[1] in _PICKLES:
        return "a pickle"
    return ""


def _other_format(head: bytes) -> str:
    """Says if a file is compressed, or text such as a git-lfs pointer or a server's error page; else empty."""
    if head[8:9] == b"{":
        return ""
    packed = next((name for start, name in _PACKED.items() if head.startswith(start)), "")
    if packed:
        return f"it is packed by {packed}, and has to be unpacked first"
    text = head[:60].split(b"\n")[0].decode("ascii", "replace").strip()
    return f"it is text that begins with {text!r}" if len(text) > 3 and text.isascii() and text.isprintable() else ""


def instead(name: str) -> str:
    """The line of code that writes safetensors in place of a file of this name."""
    stem, suffix = os.path.splitext(name)
    policy = "model.policy" if suffix == ".zip" else "policy"
    return f'safetensors.torch.save_file({policy}.state_dict(), "{stem}.safetensors")'


def _too_large(text: bytes) -> str:
    """Says why a header is too large to parse; empty if it is not. Only counts bytes: 0.2 s for 100 MB."""
    tensors, sizes, strings = text.count(b"{"), text.count(b","), text.count(b'"')
    if tensors > MAX_TENSORS + _IN_METADATA:
        return f"has {tensors:,} entries"
    if sizes > _MAX_SIZES or strings > _MAX_SIZES:
        return f"has {max(sizes, strings):,} sizes and names"
    if len(text) > MAX_METADATA + tensors * _MAX_ENTRY:
        return f"takes {len(text):,} bytes for {tensors:,} entries"
    return ""


def _incomplete(path: Path, size: int, says: str) -> IncompleteCheckpoint:
    return IncompleteCheckpoint(
        f"{path} is incomplete: it has {size:,} bytes, {says}. Wait for its writer to finish, or write it again."
    )


def malformed(path: Path, reason: str) -> MalformedCheckpoint:
    if len(reason) > 300:  # quote at most a line of a hostile header
        reason = f"{reason[:200]} … {reason[-90:]}"
    return MalformedCheckpoint(f"{path} is not a safetensors file: {reason}. Write it again.")


def _split(text: str) -> tuple[dict[str, str], str]:
    """Splits the metadata from a header that begins with it, as the official writer's do; returns any other whole."""
    if text.startswith(_FIRST):
        metadata, end = _JSON.raw_decode(text, len(_FIRST) - 1)
        if end > MAX_METADATA:
            raise ValueError(f"its __metadata__ takes {end:,} characters, over the bound of {MAX_METADATA:,}")
        if text[end : end + 2] == ',"' and metadata and _are_strings(metadata) and "\\u" not in text[:end]:
            return metadata, "{" + text[end + 1 :]
    return {}, text


@functools.lru_cache(maxsize=8)
def _table(text: str, data: int, number: int) -> tuple[dict[str, StoredTensor], dict[str, str] | None]:
    """Parses a header: its tensors in the order of their bytes, the first at offset ``data``, and its metadata.

    Raises:
        ValueError: it is not JSON, or not a header.
    """
    header = _JSON.decode(text)
    if not isinstance(header, dict):
        raise ValueError("it is not a JSON object")
    if "\\u" in text:
        json.dumps(header, ensure_ascii=False).encode()  # fails for a lone surrogate, which an escape can write
    metadata = {} if header.get("__metadata__", {}) is None else header.get("__metadata__")
    header.pop("__metadata__", None)
    if metadata is not None and not _are_strings(metadata):
        raise ValueError("its __metadata__ is not a table of strings")
    if metadata and sum(len(key) + len(value) for key, value in metadata.items()) > MAX_METADATA:
        raise ValueError(f"its __metadata__ is over the bound of {MAX_METADATA:,} characters")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it has {len(header):,} tensors, over the bound of {MAX_TENSORS:,}")
    stored = [_stored(name, info, data, number) for name, info in header.items()]
    stored.sort(key=lambda t: (t.start, t.nbytes))
    end = data
    for tensor in stored:
        if tensor.start != end:
            raise ValueError(f"the bytes of {tensor.name!r} overlap others, or leave a gap")
        end += tensor.nbytes
    return {t.name: t for t in stored}, metadata


def _stored(name: str, info: object, data: int, number: int) -> StoredTensor:
    """Validates one entry of a header."""
    if len(name) > MAX_NAME:
        raise ValueError(f"the name {name[:100]!r} … has {len(name):,} characters, over the bound of {MAX_NAME:,}")
    if not isinstance(info, dict) or not info.keys() >= _KEYS:
        raise ValueError(f"the entry of {name!r} does not have dtype, shape and data_offsets")
    if len(info) > len(_KEYS) and _depth(info) > _DEEPEST:
        raise ValueError(f"the entry of {name!r} is nested too deeply")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}"[:200])
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise ValueError(f"{name!r} has an impossible shape or byte range")
    if len(shape) > MAX_RANK:
        raise ValueError(f"{name!r} has {len(shape):,} dimensions, over the bound of {MAX_RANK}")
    elements = 1
    for size in shape:
        elements *= size
        if elements >= 1 << 64:  # too large even if a 0 follows, as in the official reader
            break
    bits = DTYPE_BITS[dtype] * elements
    if bits >= 1 << 64 or bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise ValueError(f"{name!r}: {describe(dtype, shape)} does not match the number of bytes that it is given")
    return StoredTensor(name, dtype, tuple(shape), data + offsets[0], offsets[1] - offsets[0], number)


def _are_strings(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n < 1 << 64 for n in value)


def _depth(value: object) -> int:
    """How deeply tables and lists are nested."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table


def _integer(text: str) -> int | float:
    """Returns an int for at most 20 digits, which can be a size; for anything else a float, which cannot."""
    return int(text) if len(text) <= 20 and text.isdecimal() else _float(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_integer, parse_float=_float)
