"""Stages a checkpoint in the order of its bytes, and compares the digest of the very bytes that were staged.

SHA-256 goes from a file's first byte to its last, so everything is read, also what the plan does not take, once and by
one thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from ..layout.finite import Region, all_finite
from ..layout.layout import TensorEntry
from .cast import Pair, Piece, convert
from .digest import Digest
from .header import StoredTensor
from .plan import Plan
from .table import TensorTable

Work = Callable[[StoredTensor, Piece, memoryview], None]


def stage(
    table: TensorTable,
    weights: memoryview,
    plan: Plan,
    regions: Sequence[Region],
    digests: Sequence[Digest],
    progress: Callable[[int], None] | None,
) -> tuple[bool, Pair | None]:
    """Reads everything, and puts into the weights what the plan takes.

    Returns:
        Whether the floats in these regions are finite; and a copy of a tied tensor that differs, if there is one.

    Raises:
        WrongDigest: the bytes are others than their digest names.
        BeingWritten: the same, and the digest is older than they are.
    """
    targets = {stored.name: entry for stored, entry in (*plan.pairs, *plan.twins)}
    first: dict[int, str] = {}  # the stored name that was read into this place
    clean, different = True, None

    def put(tensor: StoredTensor, piece: Piece, data: memoryview) -> None:
        nonlocal clean, different
        entry = targets[tensor.name]
        there = weights[piece.offset : piece.offset + piece.becomes]
        if first.setdefault(entry.offset, tensor.name) != tensor.name:
            if convert(data, piece.source, piece.target) != there:
                different = different or (tensor, entry)
            return
        convert(data, piece.source, piece.target, there)
        clean = all_finite(weights, regions, ((piece.offset, piece.becomes),)) and clean
        if progress:
            progress(piece.becomes)

    for file, tensors in groupby(table.tensors.values(), lambda tensor: tensor.file):
        _sweep(table, file, list(tensors), targets, put, digests[file])
    return clean, different


def check_digests(table: TensorTable) -> None:
    """Reads everything, and compares the digests that were asked for.

    Raises:
        WrongDigest: the bytes are others than their digest names.
        BeingWritten: the same, and the digest is older than they are.
    """
    for file, digest in enumerate(table.digests):
        _sweep(table, file, [], {}, lambda *_: None, digest)


def _sweep(
    table: TensorTable,
    file: int,
    tensors: list[StoredTensor],
    targets: dict[str, TensorEntry],
    put: Work,
    digest: Digest,
) -> None:
    found = hashlib.sha256(table.heads[file])
    start = len(table.heads[file])
    nbytes = table.source.infos[file].st_size - start

    def chunks() -> Iterator[memoryview]:
        for data in table.source.in_order(file, start, nbytes):
            found.update(data)
            yield data

    _dispatch(chunks(), tensors, targets, put)
    digest.check(found.hexdigest())


def _dispatch(
    chunks: Iterator[memoryview], tensors: list[StoredTensor], targets: dict[str, TensorEntry], put: Work
) -> None:
    """Gives each tensor its bytes, whole elements at a time; ``tensors`` lie in a row, as ``chunks`` bring them."""
    data = memoryview(b"")
    for tensor in tensors:
        entry, at, held = targets.get(tensor.name), 0, b""
        while at + len(held) < tensor.nbytes:
            if not data:
                data = next(chunks)
            part = data[: tensor.nbytes - at - len(held)]
            data = data[len(part) :]
            if entry is None:
                at += len(part)
                continue
            ready = memoryview(held + part) if held else part
            whole = len(ready) if at + len(ready) == tensor.nbytes else len(ready) & ~7
            if whole:
                row = Piece(tensor.file, tensor.start, at, tensor.dtype, entry.dtype, entry.offset)
                offset = entry.offset + row.becomes
                put(tensor, row._replace(start=tensor.start + at, nbytes=whole, offset=offset), ready[:whole])
            at, held = at + whole, bytes(ready[whole:])
    for _ in chunks:
        pass
