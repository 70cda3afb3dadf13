"""Reads the planned tensors of a checkpoint into the weights, and checks them there.

To check a digest, one thread reads a file once from its first byte to its last: SHA-256 needs every byte in order,
including those of tensors that the plan leaves out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import groupby
from pathlib import Path

from ..errors import CheckpointMismatch, Difference, NonFiniteWeights, UsageError, WsyncError
from ..fitting.cast import Pair, Piece, convert
from ..fitting.header import StoredTensor
from ..fitting.plan import Plan
from ..layout.finite import Region, all_finite, float_regions, has_nan, is_finite, not_finite, same_infinities
from ..layout.layout import TensorEntry
from .files.digest import Digest
from .files.parts import unreadable
from .files.source import ByteSource
from .tensor_table import TensorTable

_NAMED = 8  # most tensors that a message names
Progress = Callable[[int], None] | None
"""Called after each read with the number of bytes that it filled."""


def read_into(table: TensorTable, weights: memoryview, plan: Plan, *, finite: bool, progress: Progress) -> None:
    """Carries out a plan that merges nothing; see ``Checkpoint.read_into``."""
    try:
        fill(weights, plan)
        clean = stage(table, weights, plan, float_regions(plan.layout) if finite else (), progress)
        table.check_unchanged()  # P5 verify
    except OSError as exc:
        raise unreadable(table.path, exc) from exc
    except OverflowError as exc:
        raise too_large(table.path, exc) from exc
    if not clean:
        check_finite(table, weights, plan)


def too_large(path: Path, exc: OverflowError) -> CheckpointMismatch:
    return CheckpointMismatch(
        f"{path} holds integers that the policy's dtype cannot hold: {exc}. Write them in the policy's dtype, or "
        "give the policy a wider one."
    )


def fill(weights: memoryview, plan: Plan) -> None:
    """Fills the tensors of ``plan.built`` with the values that the policy has when it is built."""
    if not plan.built:
        return
    if plan.settings.built is None:
        raise UsageError(
            'missing = "policy" needs the policy of a spec. Publish with `wsync push SPEC` or `wsync watch SPEC`.'
        )
    for name, data in plan.settings.built([entry.name for entry in plan.built]).items():
        entry = next(entry for entry in plan.built if entry.name == name)
        weights[entry.offset : entry.offset + entry.nbytes] = data


def stage(table: TensorTable, weights: memoryview, plan: Plan, regions: Sequence[Region], progress: Progress) -> bool:
    """Reads the plan's own tensors, not those of a base; returns whether the floats in ``regions`` are finite.

    Raises:
        CheckpointMismatch: two copies of a tied tensor differ.
        WrongDigest, BeingWritten: see ``Digest.check``.
    """
    if digests := digests_for(table, plan):
        return _stage_in_order(table, weights, plan, regions, digests, progress)
    clean = True
    with closing(table.source.staged(weights, plan.reads, regions)) as reads:
        for read, finite_too in reads:
            clean = clean and finite_too
            if progress:
                progress(read.nbytes)
    clean = table.convert_each(plan.casts, partial(_put, weights, regions), progress) and clean
    for twin, entry in plan.twins:
        if not table.convert_each([(twin, entry)], partial(_equals, weights)):
            raise _different(table, twin, entry)
    return clean


def _put(weights: memoryview, regions: Sequence[Region], piece: Piece, data: memoryview) -> bool:
    """Converts a piece into its place in the weights; returns whether its floats in ``regions`` are finite."""
    convert(data, piece.source, piece.target, weights[piece.offset : piece.offset + piece.becomes])
    return all_finite(weights, regions, ((piece.offset, piece.becomes),))


def _equals(weights: memoryview, piece: Piece, data: memoryview) -> bool:
    """Whether a piece, once it is converted, equals the bytes that are already in its place."""
    there = weights[piece.offset : piece.offset + piece.becomes]
    return convert(data, piece.source, piece.target) == there


def _different(table: TensorTable, twin: StoredTensor, entry: TensorEntry) -> CheckpointMismatch:
    table.check_unchanged()
    return CheckpointMismatch(
        f"{table.path}: {twin.name} and {entry.name} are one tensor in the policy and two different ones "
        "in the file. Write the checkpoint from a model whose weights are tied.",
        (Difference(twin.name, f"equal to {entry.name}", "different"),),
    )


def digests_for(table: TensorTable, plan: Plan) -> tuple[Digest, ...]:
    """The digests to check while staging.

    The writer's digests are always checked. The store's own are checked only if the plan takes every tensor, because
    then nothing more has to be read for them.
    """
    if table.digests or not table.source.digests:
        return table.digests
    taken = sum(stored.nbytes for stored, _ in (*plan.pairs, *plan.twins))
    return table.source.digests if taken == sum(tensor.nbytes for tensor in table.tensors.values()) else ()


def stored_is_finite(table: TensorTable, tensor: StoredTensor) -> bool:
    """Whether a tensor is finite in the file, before any cast."""
    entry = TensorEntry(tensor.name, tensor.dtype, tensor.shape, 0)
    return table.convert_each([(tensor, entry)], lambda piece, data: is_finite(data, piece.source))


def _stage_in_order(
    table: TensorTable,
    weights: memoryview,
    plan: Plan,
    regions: Sequence[Region],
    digests: Sequence[Digest],
    progress: Progress,
) -> bool:
    """Reads every file from start to end, and puts the tensors that the plan takes into the weights; see ``stage``."""
    targets = {stored.name: entry for stored, entry in (*plan.pairs, *plan.twins)}
    first: dict[int, str] = {}  # by offset in the weights, the stored name that was read into it
    different: list[Pair] = []
    clean = True

    def put(tensor: StoredTensor, piece: Piece, data: memoryview) -> None:
        nonlocal clean
        entry = targets[tensor.name]
        if first.setdefault(entry.offset, tensor.name) != tensor.name:
            if not _equals(weights, piece, data):
                different.append((tensor, entry))
            return
        clean = _put(weights, regions, piece, data) and clean
        if progress:
            progress(piece.becomes)

    for file, tensors in groupby(table.tensors.values(), lambda tensor: tensor.file):
        wanted = [(tensor, targets.get(tensor.name)) for tensor in tensors]
        _sweep(table.source, file, wanted, put, digests[file])
    if different:
        raise _different(table, *different[0])
    return clean


def check_digests(table: TensorTable) -> None:
    """Reads all weight files, and checks them against ``table.digests``.

    Raises:
        WrongDigest: the bytes of a file do not match its digest.
        BeingWritten: the same, but the digest is older than the file.
    """
    for file, digest in enumerate(table.digests):
        _sweep(table.source, file, [], lambda *_: None, digest)


def _sweep(
    source: ByteSource,
    file: int,
    tensors: list[tuple[StoredTensor, TensorEntry | None]],
    put: Callable[[StoredTensor, Piece, memoryview], None],
    digest: Digest,
) -> None:
    """Reads one file from its first byte to its last, and compares its digest.

    Args:
        tensors: all tensors of the file in the order of their bytes, each with its place; None if it is not taken.
        put: called with a tensor that is taken, a piece of it, and the piece's bytes.
    """
    found = hashlib.sha256()

    def chunks() -> Iterator[memoryview]:
        for data in source.in_order(file, 0, source.infos[file].st_size):
            found.update(data)
            yield data

    header = tensors[0][0].start if tensors else 0
    stream, data = chunks(), memoryview(b"")
    for tensor, entry in [(StoredTensor("", "U8", (header,), 0, header), None), *tensors]:
        at, held = 0, b""
        while at + len(held) < tensor.nbytes:
            if not data:
                data = next(stream)
            part = data[: tensor.nbytes - at - len(held)]
            data = data[len(part) :]
            if entry is None:
                at += len(part)
                continue
            ready = memoryview(held + part) if held else part
            whole = len(ready) if at + len(ready) == tensor.nbytes else len(ready) & ~7
            if whole:
                row = Piece(file, tensor.start, at, tensor.dtype, entry.dtype, entry.offset)
                offset = entry.offset + row.becomes
                put(tensor, row._replace(start=tensor.start + at, nbytes=whole, offset=offset), ready[:whole])
            at, held = at + whole, bytes(ready[whole:])
    for _ in stream:
        pass
    digest.check(found.hexdigest())


def check_finite(table: TensorTable, weights: memoryview, plan: Plan) -> None:
    """Reports the tensors that were read and are not finite; called after a read that found some.

    Raises:
        NonFiniteWeights: a tensor holds NaN, or an infinity that neither the settings nor the built policy allow.
    """
    read = {entry.name for _, entry in plan.pairs}
    read |= {delta.entry.name for delta in plan.merge.deltas} if plan.merge else set()
    names = {*not_finite(weights, plan.layout)} & read
    infinite, rows, beyond = [], [], []
    casts = {entry.name: stored for stored, entry in plan.casts}
    for entry in (entry for entry in plan.layout.tensors if entry.name in names):
        stored = casts.get(entry.name)
        if stored and stored_is_finite(table, stored):
            beyond.append(Difference(entry.name, f"within the range of {entry.dtype}", f"beyond it, as {stored.dtype}"))
        elif has_nan(_part(weights, entry), entry.dtype):
            rows.append(Difference(entry.name, "finite", "NaN or infinity"))
        elif not plan.settings.may_be_infinite(entry):
            infinite.append(entry)
    if infinite:
        infinite = _unlike_the_policy(infinite, weights, plan)
    rows += [Difference(entry.name, "finite", "NaN or infinity") for entry in infinite]
    if rows:
        advice = "It is never published; look at the trainer, which has probably diverged."
        if len(infinite) == len(rows):
            globs = ", ".join(f'"{entry.name}"' for entry in infinite[:_NAMED]) + (", …" if infinite[_NAMED:] else "")
            advice += f" If these infinities belong there, write finite_except = [{globs}] in [weights]."
        raise NonFiniteWeights(
            f"{table.path} holds NaN or infinity in {len(rows) + len(beyond)} of its tensors. {advice}",
            tuple(rows + beyond),
        )
    if beyond:
        raise NonFiniteWeights(
            f"{table.path} holds values in {len(beyond)} of its tensors that are too large for the dtype that they are "
            "cast to. It is never published; give the policy a dtype of a wider range, or look at the trainer.",
            tuple(beyond),
        )


def _unlike_the_policy(infinite: list[TensorEntry], weights: memoryview, plan: Plan) -> list[TensorEntry]:
    """The tensors whose infinities are not those that the policy has when it is built."""
    if plan.settings.built is None:
        return infinite
    try:
        built = plan.settings.built([entry.name for entry in infinite])
    except WsyncError:  # it cannot be built, so nothing is known about it
        return infinite
    return [
        entry
        for entry in infinite
        if not same_infinities(_part(weights, entry), memoryview(built[entry.name]), entry.dtype)
    ]


def _part(weights: memoryview, entry: TensorEntry) -> memoryview:
    return weights[entry.offset : entry.offset + entry.nbytes]
