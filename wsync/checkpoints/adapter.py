"""A PEFT adapter merged into its base weights: W + scale · B A, in float32, from the base as it is stored, then cast.

The layout of the files and the scale are those of PEFT (https://github.com/huggingface/peft, ``tuners/lora``): a tensor
``base_model.model.<module>.lora_A.weight`` of shape (r, in), its ``lora_B`` of shape (out, r), and the adapter's
``adapter_config.json`` with ``lora_alpha``, which is divided by r, or by its root under ``use_rslora``. Where the base
lies is said by the spec alone: what the adapter's own configuration says of it is data from elsewhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import (
    CheckpointChanged,
    CheckpointError,
    CheckpointMismatch,
    Difference,
    IncompleteCheckpoint,
    MalformedCheckpoint,
    NonFiniteWeights,
    PartialCheckpoint,
    UnusableBase,
)
from ..layout.filenames import CONFIG
from ..layout.finite import Region, all_finite
from ..layout.layout import DTYPE_BITS, Layout, TensorEntry, describe
from .cast import Pair, Piece, convert
from .checkpoint import Checkpoint, open_checkpoint
from .files import Parts, read_small, unreadable
from .fit import FLOATS, Fit, Plan
from .header import StoredTensor

_MAX_CONFIG = 1 << 20  # bytes
_MAX_PATTERNS = 1000
_SMALL = 1 << 24  # elements of both halves, whatever their rank; a hostile file of 4 KiB can claim any
_ROOT = "base_model.model."
_BASE = ".base_layer."
_LORA = re.compile(r"(.*)\.lora_(embedding_)?([AB])(?:\.weight)?")
_MORE = re.compile(r"(.*?)\.(?:lora_|token_adapter\.)")  # a part of a module that PEFT has beside its weight
_PLAIN = re.compile(r"[\w.^$|\\\-]+")  # an expression without repetition costs no more than its length
_KINDS = (
    *("use_dora", "use_qalora", "use_bdlora", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    *("lora_bias", "trainable_token_indices"),
)
"""What makes of an adapter one that is more, or elsewhere, than W + scale · B A."""
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Beginnings of ``init_lora_weights`` by which training began with another base than the one it was given."""


@dataclass(frozen=True, slots=True)
class Config:
    """What an adapter's configuration says of its merge.

    Attributes:
        alpha: divided by the rank, or by its root, it is the scale.
        patterns: alphas of single modules, by expressions that their names match; the first counts.
        root: whether it is the rank's root.
        transposed: whether the modules keep their weights so.
    """

    alpha: float
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()
    root: bool = False
    transposed: bool = False

    def scale(self, module: str, rank: int) -> float:
        alpha = next((alpha for pattern, alpha in self.patterns if pattern.match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one adapted weight gets: ``scale`` · B A, transposed where the module keeps its weight so.

    Attributes:
        weight: what it is added to, as it is stored.
        of_base: whether that is the base's, and not one that the adapter brings itself.
    """

    entry: TensorEntry
    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool
    weight: StoredTensor
    of_base: bool


@dataclass(frozen=True)
class Merge:
    """What an adapter is added to: its base, which brings all other weights as ``plan`` says."""

    base: Checkpoint
    plan: Plan
    deltas: list[Delta]

    @property
    def conversions(self) -> tuple[Pair, ...]:
        added = ((d.weight, d.entry) for d in self.deltas if d.weight.dtype != d.entry.dtype)
        return (*self.plan.conversions, *added)

    def add(
        self,
        adapter: Checkpoint,
        weights: memoryview,
        regions: Sequence[Region],
        progress: Callable[[int], None] | None,
    ) -> bool:
        """Reads the adapted weights, each with what is added to it; returns whether the sums are finite.

        Raises:
            UnusableBase: one is not finite in the base.
        """
        finite = True
        rows: list[Difference] = []
        for delta in self.deltas:
            pairs = [(delta.weight, delta.entry)]
            work = _adding(weights, delta, adapter.whole(delta.a), adapter.whole(delta.b), regions)
            if not delta.of_base:
                finite = adapter.convert_each(pairs, work, progress) and finite
                continue
            with blaming(self.base.path, adapter.path):
                if not self.base.convert_each(pairs, work, progress):
                    finite = False
                    if not self.base.is_finite(delta.weight):
                        rows.append(Difference(delta.entry.name, "finite", "NaN or infinity"))
        with blaming(self.base.path, adapter.path):
            self.base.check_unchanged()
            if rows:
                raise NonFiniteWeights(f"{self.base.path} holds NaN or infinity in {len(rows)} tensors.", tuple(rows))
        return finite


@contextmanager
def blaming(base: object, adapter: Path) -> Iterator[None]:
    """Converts an error about the base into one that names both and does not refuse the adapter."""
    try:
        yield
    except (CheckpointChanged, PartialCheckpoint):
        raise
    except (CheckpointMismatch, NonFiniteWeights) as exc:
        raise UnusableBase(
            f"the base of the adapter {adapter} cannot be used: {exc.message} The adapter is tried again at the next "
            "pass.",
            exc.differences,
        ) from exc
    except (CheckpointError, OSError) as exc:
        told = unreadable(Path(str(base)), exc) if isinstance(exc, OSError) else exc
        raise CheckpointError(f"the base of the adapter {adapter} cannot be had: {told}") from exc


def open_base(path: str, adapter: Path) -> Checkpoint:
    """What an adapter is merged into, opened."""
    with blaming(path, adapter):
        base = open_checkpoint(path)
        if not base.parts.is_adapter:
            return base
        base.close()
        raise CheckpointError(f"{base.path} is an adapter itself. Name the weights that both were trained on.")


def merge(adapter: Checkpoint, base: Checkpoint, layout: Layout, settings: Fit) -> Plan:
    """How an adapter is merged into a policy's weights.

    Raises:
        CheckpointMismatch: a tensor has no place in the policy, another shape, or is of a kind that cannot be merged.
        IncompleteCheckpoint: the adapter's configuration has not come.
        MalformedCheckpoint: it is of a kind that is not merged here.
        UnusableBase: the base does not fit, or lacks a weight that the adapter adds to.
    """
    with blaming(base.path, adapter.path):
        plan = base.plan(layout, settings)
    try:
        config = read_config(adapter.parts)
    except OSError as exc:
        raise unreadable(adapter.path, exc) from exc
    entries = {name: entry for entry in layout.tensors for name in entry.names}
    halves: dict[tuple[str, bool], dict[str, StoredTensor]] = {}
    others: dict[str, StoredTensor] = {}
    rows: list[Difference] = []
    for stored, tensor in adapter.tensors.items():
        name = stored.removeprefix(_ROOT)
        match = _LORA.fullmatch(name)
        half = halves.setdefault((match[1], bool(match[2])), {}) if match else others
        if (key := match[3] if match else name) in half:
            rows.append(Difference(stored, "one tensor", f"{half[key].name} is the same, too"))
        half[key] = tensor
    own = _replace(others, entries, settings, layout, rows)
    deltas, lacking = _add(halves, entries, config, settings, own, plan, rows)
    if not (rows or deltas or lacking or own.pairs):
        rows = [Difference(t.name, "absent", describe(t.dtype, t.shape)) for t in adapter.tensors.values()]
    if rows:
        raise CheckpointMismatch(
            f"{adapter.path} is an adapter that cannot be merged into the policy: {len(rows)} of its tensors have no "
            "place. Check that the spec's base is the one that it was trained on.",
            tuple(sorted(rows, key=lambda row: row.name)),
        )
    if lacking:
        with blaming(base.path, adapter.path):
            held = f"{base.path} lacks {len(lacking)} of the weights that the adapter adds to."
            raise CheckpointMismatch(held, tuple(lacking))
    replaced = {entry.name for _, entry in own.pairs}
    added = {delta.entry.name for delta in deltas}
    kept = tuple(entry for entry in plan.kept if entry.name not in replaced)
    return replace(own.without(added), kept=kept, merge=Merge(base, plan.without(replaced | added), deltas))


def _replace(
    tensors: Mapping[str, StoredTensor],
    entries: Mapping[str, TensorEntry],
    settings: Fit,
    layout: Layout,
    rows: list[Difference],
) -> Plan:
    """What an adapter replaces (``modules_to_save``, biases); adds to ``rows`` what has no place."""
    pairs: list[Pair] = []
    twins: list[Pair] = []
    taken: dict[str, StoredTensor] = {}
    for bare, tensor in tensors.items():
        name = settings.name(bare.replace(_BASE, "."))  # what was trained, or saved, of an adapted module
        entry = entries.get(name) if name is not None else None
        more = None if entry else _MORE.match(bare)
        if more:  # it belongs to a weight, and is left out with it alone
            name = settings.name(f"{more[1]}.weight")
        castable = settings.cast and entry and {tensor.dtype, entry.dtype} <= FLOATS
        if name is None or not (entry or more or settings.strict):
            continue
        if entry is None or tensor.shape != entry.shape or not (tensor.dtype == entry.dtype or castable):
            expected = entry.describe() if entry else "absent"
            rows.append(Difference(tensor.name, expected, describe(tensor.dtype, tensor.shape)))
        elif name in taken:
            rows.append(Difference(tensor.name, "one tensor", f"{taken[name].name} is {name}, too"))
        elif taken.keys() & set(entry.names):
            twins.append((tensor, entry))
        else:
            pairs.append((tensor, entry))
        taken[name] = tensor
    return Plan(layout, tuple(pairs), tuple(twins))


def _add(
    halves: Mapping[tuple[str, bool], dict[str, StoredTensor]],
    entries: Mapping[str, TensorEntry],
    config: Config,
    settings: Fit,
    own: Plan,
    base: Plan,
    rows: list[Difference],
) -> tuple[list[Delta], list[Difference]]:
    """What an adapter adds to which weights, and which neither plan brings; adds to ``rows`` what has no place."""
    lacking: list[Difference] = []
    deltas: list[Delta] = []
    brought, of_base = ({entry.name: stored for stored, entry in plan.pairs} for plan in (own, base))
    modules = {name.rpartition(".")[0] for name in entries}
    added: dict[str, str] = {}  # one tensor gets one delta: of tied modules with one each, none has the other's
    added |= {entry.name: t.name for t, entry in (*own.pairs, *own.twins) if _BASE not in t.name}
    for (module, embedding), half in halves.items():
        name = settings.name(f"{module}.weight")
        entry = entries.get(name) if name is not None else None
        if name is None or not (entry or settings.strict or name.rpartition(".")[0] in modules):
            continue
        transposed = embedding or config.transposed
        if entry is None or half.keys() != {"A", "B"} or not _multiplies(half["A"], half["B"], entry, transposed):
            found = " and ".join(f"{key} {describe(half[key].dtype, half[key].shape)}" for key in sorted(half))
            expected = entry.describe() if entry else "absent"
            rows.append(Difference(f"{module}.weight", expected, f"an adapter of {found}"))
        elif (rank := half["A"].shape[0]) > _highest(entry):
            rows.append(Difference(f"{module}.weight", f"a rank of {_highest(entry):,} at most", f"{rank:,}"))
        elif entry.name in added:
            rows.append(Difference(f"{module}.weight", "one tensor", f"{added[entry.name]} is the same in the policy"))
        elif weight := brought.get(entry.name) or of_base.get(entry.name):
            scale = config.scale(module, rank)
            deltas.append(Delta(entry, half["A"], half["B"], scale, transposed, weight, entry.name not in brought))
            added[entry.name] = half["A"].name
        else:
            lacking.append(Difference(entry.name, entry.describe(), "absent"))
    return deltas, lacking


def read_config(parts: Parts) -> Config:
    """An adapter's configuration.

    Raises:
        IncompleteCheckpoint: it has not come, or not all of it.
        MalformedCheckpoint: it is of a kind of adapter that is not merged here.
        OSError: the system could not read it.
    """
    file = parts.files[0].parent / CONFIG
    try:
        if parts.index is None:
            raise FileNotFoundError("it is not there")
        return _config(json.loads(read_small(file, _MAX_CONFIG)))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as exc:
        raise IncompleteCheckpoint(
            f"{file} does not tell how the adapter beside it is merged ({exc!s:.100}). Wait for its writer to finish, "
            "or write it again."
        ) from exc
    except (ValueError, OverflowError, RecursionError) as exc:
        raise MalformedCheckpoint(
            f"{file} does not describe an adapter that wsync can merge ({exc!s:.100}). Merge it where it was trained, "
            "and write the merged weights."
        ) from exc


def _config(table: Any) -> Config:
    """A configuration from its JSON; a ValueError says why it is none."""
    if not isinstance(table, dict) or table.get("peft_type") != "LORA":
        raise ValueError("no LoRA")
    if odd := [kind for kind in _KINDS if table.get(kind)]:
        raise ValueError(f"it has {odd[0]}")
    start = table.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise ValueError(f"{start:.40} changed the base that it was trained on")
    parameters = table.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(f".{name}".endswith(".weight") for name in parameters):
        raise ValueError("its target_parameters are not weights alone")
    patterns = table.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        raise ValueError("its alpha_pattern is no short table")
    return Config(
        _number(table.get("lora_alpha")),
        tuple((_expression(key), _number(alpha)) for key, alpha in patterns.items()),
        bool(table.get("use_rslora")),
        bool(table.get("fan_in_fan_out")),
    )


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("an alpha is no number")
    return float(value)


def _expression(key: str) -> re.Pattern[str]:
    """The modules that a key of ``alpha_pattern`` means, by PEFT's own rule; it is not to cost more than a look."""
    if not _PLAIN.fullmatch(key):
        raise ValueError(f"its alpha_pattern {key!r:.40} is no plain name")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as exc:
        raise ValueError(f"its alpha_pattern {key!r:.40} is no expression") from exc


def _adding(
    weights: memoryview, delta: Delta, a: memoryview, b: memoryview, regions: Sequence[Region]
) -> Callable[[Piece, memoryview], bool]:
    """Returns a function that adds the delta to pieces of a weight and casts each sum once, into the weights.

    It takes a piece and its bytes as they are stored, and returns whether the sum is finite in these regions.

    Args:
        a: with ``b`` the bytes of the delta's halves.
    """
    import numpy as np

    entry, scale = delta.entry, np.float32(delta.scale)
    left, right = _single(b, delta.b), _single(a, delta.a)
    if delta.transposed:
        left, right = right.T, left.T
    width, columns = DTYPE_BITS[entry.dtype] // 8, entry.shape[1]

    def product(first: int, number: int) -> Any:
        """So many elements of the product, by rows, from ``first`` on."""
        top, begin = divmod(first, columns)
        if begin + number <= columns:
            return left[top] @ right[:, begin : begin + number]
        rows = left[top : -(-(first + number) // columns)] @ right
        return rows.reshape(-1)[begin : begin + number]

    def work(piece: Piece, data: memoryview) -> bool:
        wide = "F64" if "F64" in (piece.source, piece.target) else "F32"
        summed = convert(data, piece.source, wide)
        values = np.frombuffer(summed, "f8" if wide == "F64" else "f4")
        with np.errstate(all="ignore"):  # what overflows is found by the finite check
            values += product((piece.offset - entry.offset) // width, len(values)) * scale
        convert(summed, wide, piece.target, weights[piece.offset : piece.offset + piece.becomes])
        return all_finite(weights, regions, ((piece.offset, piece.becomes),))

    return work


def _single(data: memoryview, tensor: StoredTensor) -> Any:
    import numpy as np

    floats = data if tensor.dtype == "F32" else convert(data, tensor.dtype, "F32")
    return np.frombuffer(floats, "f4").reshape(tensor.shape)


def _multiplies(a: StoredTensor, b: StoredTensor, entry: TensorEntry, transposed: bool) -> bool:
    if not len(a.shape) == len(b.shape) == len(entry.shape) == 2 or 0 in (*a.shape, *b.shape):
        return False
    if not {a.dtype, b.dtype, entry.dtype} <= FLOATS:
        return False
    product = (b.shape[0], a.shape[1])
    return a.shape[0] == b.shape[1] and entry.shape == (product[::-1] if transposed else product)


def _highest(entry: TensorEntry) -> int:
    """The highest rank that is taken: one that a weight can have, and any other while the halves stay small."""
    return max(min(entry.shape), _SMALL // sum(entry.shape))
