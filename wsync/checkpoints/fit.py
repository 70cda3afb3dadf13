"""How a checkpoint's tensors fit a policy's layout: which are taken, under which names, in which dtypes.

The result is a plan: which bytes of which file go where. What does not fit is told as a whole, tensor by tensor; and
where one setting would make it fit, the message says which.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import CheckpointMismatch, Difference, PartialCheckpoint, UsageError
from ..layout.layout import Layout, TensorEntry, describe
from .cast import Pair
from .header import StoredTensor

if TYPE_CHECKING:
    from .adapter import Merge

CHUNK = 8 << 20  # bytes of one read: few enough calls, and still in the third cache for the finite check
_MAX_BUFFERS = 512  # of one preadv; Linux takes 1024
FLOATS = {"F16", "BF16", "F32", "F64", "F8_E5M2", "F8_E4M3"}


@dataclass(frozen=True)
class Fit:
    """What is taken of a checkpoint, and how: the settings of ``[weights]``.

    Attributes:
        prefix: only tensors whose names begin so are taken, without it.
        rename: old name to new, after the prefix is gone: exact, or a regular expression where the old one is written
            between slashes; its groups are ``\\1`` … in the new one.
        include: only names that match one of these globs are taken; empty takes all.
        exclude: names that match one of these globs are not.
        cast: floats of another float dtype are converted to the policy's.
        strict: every tensor of the policy must come, and no other; else what does not come keeps its live values, and
            what the policy does not know is passed over.
        finite: NaN and infinity are refused.
        base: checkpoint that a PEFT adapter is merged into, where the policy has the base's names, not the adapter's.
    """

    prefix: str = ""
    rename: Mapping[str, str] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    cast: bool = False
    strict: bool = True
    finite: bool = True
    base: str = ""
    partial: bool = True  # whether there are live values to keep; known to the publisher alone
    kept: int = field(default=0, repr=False)  # the version that kept live values, which is no file's; for the record

    def __post_init__(self) -> None:
        for old, new in self.rename.items():
            try:
                expression = self._expression(old)
                if expression:
                    expression.sub(new, "")  # also tells a group that is not there
            except (re.error, IndexError) as exc:
                raise UsageError(
                    f"weights.rename: {old!r} to {new!r} is no regular expression ({exc}). Mend it."
                ) from exc

    def name(self, stored: str) -> str | None:
        """What a checkpoint's tensor is called in the policy; None where it is not taken."""
        if not stored.startswith(self.prefix):
            return None
        name = stored[len(self.prefix) :]
        for old, new in self._renames:
            name = (new if name == old else name) if isinstance(old, str) else old.sub(new, name)
        if self.include and not any(fnmatch.fnmatchcase(name, glob) for glob in self.include):
            return None
        return None if any(fnmatch.fnmatchcase(name, glob) for glob in self.exclude) else name

    @cached_property
    def _renames(self) -> list[tuple[str | re.Pattern[str], str]]:
        return [(self._expression(old) or old, new) for old, new in self.rename.items()]

    @staticmethod
    def _expression(old: str) -> re.Pattern[str] | None:
        return re.compile(old[1:-1]) if len(old) > 2 and old[0] == old[-1] == "/" else None


class Read(NamedTuple):
    """One system call: ``nbytes`` from ``start`` of a file into slices ``(offset, nbytes)`` of the weights."""

    file: int
    start: int
    nbytes: int
    slices: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """How a checkpoint's bytes reach a layout.

    Attributes:
        pairs: what is read of the checkpoint, and what it becomes.
        twins: further copies of a tied tensor, which must equal the one that is read.
        kept: tensors that do not come and keep their live values.
        merge: what an adapter adds to, and what is read of its base.
    """

    layout: Layout
    pairs: tuple[Pair, ...] = ()
    twins: tuple[Pair, ...] = ()
    kept: tuple[TensorEntry, ...] = ()
    merge: Merge | None = None

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """What is read as it is stored, in the order of the files."""
        return _reads(pair for pair in self.pairs if pair[0].dtype == pair[1].dtype)

    @cached_property
    def casts(self) -> tuple[Pair, ...]:
        """What is converted on the way."""
        return tuple(pair for pair in self.pairs if pair[0].dtype != pair[1].dtype)

    @property
    def conversions(self) -> tuple[Pair, ...]:
        """The same with what an adapter's base brings."""
        return (*self.merge.conversions, *self.casts) if self.merge else self.casts

    def without(self, names: Collection[str]) -> Plan:
        """The same without these tensors, unless a further copy is compared with them."""
        left_out = set(names) - {entry.name for _, entry in self.twins}
        return replace(self, pairs=tuple(pair for pair in self.pairs if pair[1].name not in left_out))


_last: tuple[Mapping[str, StoredTensor], Layout, Fit, Plan] | None = None  # those of one run are planned alike


def fit(tensors: Mapping[str, StoredTensor], layout: Layout, settings: Fit, path: Path) -> Plan:
    """Plans how a checkpoint's tensors reach a layout.

    Args:
        path: of the checkpoint, for the message.

    Raises:
        CheckpointMismatch: a tensor is missing, unknown, or of another dtype or shape; all of them are listed, with the
            setting that would make them fit where there is one.
        PartialCheckpoint: a part came, as it may, and there are no live values for the rest to keep.
    """
    global _last
    if _last and _last[0] is tensors and _last[1] is layout and _last[2] == settings:
        return _last[3]
    found = match(tensors, layout, settings)
    if found.rows:
        rows = tuple(sorted(found.rows, key=lambda row: row.name))
        if not settings.strict and not match(tensors, layout, replace(settings, partial=True)).rows:
            raise PartialCheckpoint(
                f"{path} holds a part of the policy's weights: {len(rows)} of {len(layout.tensors)} tensors do not "
                "come. Nothing is live whose values they could keep. Publish a whole checkpoint first.",
                rows,
            )
        from .advice import advice

        raise CheckpointMismatch(
            f"{path} does not fit the policy: {len(rows)} of its tensors differ. " + advice(tensors, layout, settings),
            rows,
        )
    plan = Plan(layout, tuple(found.pairs), tuple(found.twins), tuple(found.kept))
    _last = (tensors, layout, settings, plan)
    return plan


class Match(NamedTuple):
    """Which tensor of a checkpoint becomes which of a layout, as in a plan; and in ``rows`` what does not fit."""

    rows: list[Difference]
    pairs: list[Pair]
    twins: list[Pair]
    kept: list[TensorEntry]
    unknown: list[str]


def match(tensors: Mapping[str, StoredTensor], layout: Layout, settings: Fit) -> Match:
    """Holds a checkpoint's tensors against a layout; ``unknown`` are the policy's names for what it does not have."""
    taken, rows = _names(tensors, settings)
    found = Match(rows, [], [], [], [])
    wanted = {name for entry in layout.tensors for name in entry.names}
    if settings.strict:
        found.unknown.extend(name for name in taken if name not in wanted)
        rows += [Difference(taken[name].name, "absent", _say(taken[name])) for name in found.unknown]
    for entry in layout.tensors:
        stored = [taken[name] for name in entry.names if name in taken]
        for tensor in stored:
            castable = settings.cast and {tensor.dtype, entry.dtype} <= FLOATS
            if tensor.shape != entry.shape or (tensor.dtype != entry.dtype and not castable):
                rows.append(Difference(tensor.name, entry.describe(), _say(tensor)))
        if stored:
            found.pairs.append((stored[0], entry))
            found.twins.extend((t, entry) for t in stored[1:])
        elif settings.strict or not settings.partial:
            rows.append(Difference(entry.name, entry.describe(), "absent"))
        else:
            found.kept.append(entry)
    if not rows and len(found.kept) == len(layout.tensors):
        rows += [Difference(entry.name, entry.describe(), "absent") for entry in found.kept]
    return found


def _names(tensors: Mapping[str, StoredTensor], settings: Fit) -> tuple[dict[str, StoredTensor], list[Difference]]:
    """The tensors that are taken by their names in the policy; and those that two names lead to."""
    taken: dict[str, StoredTensor] = {}
    rows = []
    for stored, tensor in tensors.items():
        name = settings.name(stored)
        if name is None:
            continue
        if name in taken:
            rows.append(Difference(stored, "one tensor", f"{taken[name].name} is {name}, too"))
        taken[name] = tensor
    return taken, rows


def _say(tensor: StoredTensor) -> str:
    return describe(tensor.dtype, tensor.shape)


def _reads(chosen: Iterable[Pair]) -> tuple[Read, ...]:
    """Reads of at most ``CHUNK`` bytes that follow the files, each filling as many tensors as lie in it in a row."""
    reads: list[Read] = []
    slices: list[tuple[int, int]] = []
    file = start = end = 0

    def flush() -> None:
        if slices:
            reads.append(Read(file, start, end - start, tuple(slices)))
            slices.clear()

    for stored, entry in sorted(chosen, key=lambda pair: (pair[0].file, pair[0].start)):
        at = 0
        while at < stored.nbytes:
            here = stored.start + at
            room = CHUNK - (end - start) & ~7  # so that no element is split
            if (stored.file, here) != (file, end) or not room or len(slices) >= _MAX_BUFFERS:
                flush()
                file, start, end, room = stored.file, here, here, CHUNK
            size = min(stored.nbytes - at, room)
            if slices and sum(slices[-1]) == entry.offset + at:
                slices[-1] = (slices[-1][0], slices[-1][1] + size)
            else:
                slices.append((entry.offset + at, size))
            end, at = here + size, at + size
    flush()
    return tuple(reads)
