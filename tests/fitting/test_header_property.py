"""Mutated headers and files: what the official reader takes we take, what it refuses we refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import IncompleteCheckpoint, MalformedCheckpoint
from wsync.layout.layout import DTYPE_BITS

SIZES = st.one_of(st.integers(0, 5), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64]))
TEXT = st.text(st.characters(exclude_categories=[]), max_size=3)  # half surrogates, too
ODD = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(allow_nan=False), TEXT, st.integers(-3, -1), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(TEXT, inner, max_size=2)),
    max_leaves=4,
)


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, int]:
    """A header that is right but for at most a few changes, and the bytes of data behind it."""
    table: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(TEXT, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        elements = 1
        for size in shape:
            elements *= size
        nbytes = elements * DTYPE_BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    if draw(st.booleans()):
        table["__metadata__"] = draw(st.dictionaries(TEXT, TEXT, max_size=2))
    for _ in range(draw(st.integers(0, 2))):
        _change(draw, table)
    text = json.dumps(table, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 1))):
        at = draw(st.integers(0, max(len(text) - 1, 0)))
        text = text[:at] + draw(st.binary(max_size=2)) + text[at + draw(st.integers(0, 2)) :]
    return text + b" " * draw(st.integers(0, 3)), max(0, end + draw(st.sampled_from([0, 0, 0, 0, 1, -1])))


def _change(draw: st.DrawFn, table: dict[str, Any]) -> None:
    names = [name for name, entry in table.items() if isinstance(entry, dict) and "dtype" in entry]
    if not names:
        return
    entry = table[draw(st.sampled_from(names))]
    match draw(st.sampled_from(["size", "offset", "odd", "drop", "more", "dtype"])):
        case "size":
            entry["shape"] = [*entry["shape"], draw(SIZES)] if isinstance(entry.get("shape"), list) else []
        case "offset":
            entry["data_offsets"] = [draw(SIZES), draw(SIZES)]
        case "odd":
            entry[draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(ODD)
        case "drop":
            entry.pop(draw(st.sampled_from(["shape", "data_offsets"])), None)
        case "more":
            entry["more"] = draw(ODD)
        case "dtype":
            entry["dtype"] = draw(st.sampled_from(sorted(DTYPE_BITS)))


def _official(path: Path) -> bool:
    try:
        with safe_open(path, "np") as file:
            file.keys()
    except SafetensorError:
        return False
    return True


def _ours(path: Path) -> bool:
    try:
        Checkpoint(path).close()
    except (MalformedCheckpoint, IncompleteCheckpoint):
        return False
    return True


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers") / "a.safetensors"


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=headers())
def test_we_take_what_the_official_reader_takes(case: tuple[bytes, int], file: Path) -> None:
    """Guards agreement with the reference over headers that are nearly right; keys that are there twice aside."""
    text, nbytes = case
    try:
        json.loads(text, object_pairs_hook=_once)
    except ValueError as exc:
        if "twice" in str(exc):
            return  # refused here on purpose: of two entries nobody can say which is meant
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(nbytes))
    assert _ours(file) == _official(file), text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("twice")
    return dict(pairs)
