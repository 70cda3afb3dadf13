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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .casting import Piece, convert
from .errors import CheckpointMismatch, Difference, IncompleteCheckpoint, MalformedCheckpoint
from .finite import all_finite
from .fitting import FLOATS, Fit, Plan
from .header import StoredTensor
from .layout import DTYPE_BITS, Layout, TensorEntry, describe
from .parts import CONFIG, Parts, read_small

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
        of_base: whether it is the base's weight that gets it, and not one that the adapter brings itself.
        stored: that weight in its file, where it is cast; None where it stands in the weights as it was.
        late: whether it is only read then.
    """

    entry: TensorEntry
    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool
    of_base: bool = True
    stored: StoredTensor | None = None
    late: bool = False


@dataclass(frozen=True, slots=True)
class Merge:
    """What an adapter adds to which weights, and which it replaces (``modules_to_save``, biases), as stored or cast.

    ``twins`` are further copies of what it replaces, of weights that are tied in the policy.
    """

    deltas: list[Delta]
    replaced: list[tuple[StoredTensor, TensorEntry]]
    casts: list[tuple[StoredTensor, TensorEntry]]
    twins: list[tuple[StoredTensor, TensorEntry]]

    @property
    def names(self) -> set[str]:
        """Of the weights to which it adds, or which it replaces."""
        return {delta.entry.name for delta in self.deltas} | {entry.name for _, entry in (*self.replaced, *self.casts)}

    def onto(self, base: Plan) -> tuple[Merge, Plan]:
        """The same with what is added to weights that are cast added before that; and what else to read of the base."""
        own = {entry.name: stored for stored, entry in self.casts}
        brought = own.keys() | {entry.name for _, entry in self.replaced}
        of_base = {entry.name: stored for stored, entry in base.casts if entry.name not in brought}
        cast = of_base | own
        late = of_base.keys() - {entry.name for _, entry in base.twins}  # which are compared with what is read
        deltas = [
            replace(delta, of_base=name not in brought, stored=cast.get(name), late=name in late)
            for delta in self.deltas
            for name in (delta.entry.name,)
        ]
        late &= {delta.entry.name for delta in deltas}
        casts = tuple(pair for pair in base.casts if pair[1].name not in late)
        return replace(self, deltas=deltas), base._replace(casts=casts)


def deltas(tensors: Mapping[str, StoredTensor], config: Config, layout: Layout, settings: Fit, path: Path) -> Merge:
    """How an adapter is merged into a policy's weights.

    Raises:
        CheckpointMismatch: a tensor has no place in the policy, another shape, or is of a kind that cannot be merged.
    """
    entries = {name: entry for entry in layout.tensors for name in entry.names}
    halves: dict[tuple[str, bool], dict[str, StoredTensor]] = {}
    others: dict[str, StoredTensor] = {}
    rows: list[Difference] = []
    for stored, tensor in tensors.items():
        name = stored.removeprefix(_ROOT)
        match = _LORA.fullmatch(name)
        half = halves.setdefault((match[1], bool(match[2])), {}) if match else others
        if (key := match[3] if match else name) in half:
            rows.append(Difference(stored, "one tensor", f"{half[key].name} is the same, too"))
        half[key] = tensor
    merge = Merge([], [], [], [])
    rows += _replace(merge, others, entries, settings)
    rows += _add(merge, halves, entries, config, settings)
    if not (rows or merge.names):
        rows = [Difference(t.name, "absent", describe(t.dtype, t.shape)) for t in tensors.values()]
    if rows:
        raise CheckpointMismatch(
            f"{path} is an adapter that cannot be merged into the policy: {len(rows)} of its tensors have no place. "
            "Check that the spec's base is the one that it was trained on.",
            tuple(sorted(rows, key=lambda row: row.name)),
        )
    return merge


def _replace(
    merge: Merge, tensors: Mapping[str, StoredTensor], entries: Mapping[str, TensorEntry], settings: Fit
) -> list[Difference]:
    """Puts what an adapter replaces into its merge; gives what has no place."""
    rows: list[Difference] = []
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
            rows.append(_unplaced(tensor, entry))
        elif name in taken:
            rows.append(Difference(tensor.name, "one tensor", f"{taken[name].name} is {name}, too"))
        elif taken.keys() & set(entry.names):
            merge.twins.append((tensor, entry))
        else:
            (merge.replaced if tensor.dtype == entry.dtype else merge.casts).append((tensor, entry))
        taken[name] = tensor
    return rows


def _add(
    merge: Merge,
    halves: Mapping[tuple[str, bool], dict[str, StoredTensor]],
    entries: Mapping[str, TensorEntry],
    config: Config,
    settings: Fit,
) -> list[Difference]:
    """Puts what an adapter adds into its merge; gives what has no place."""
    rows: list[Difference] = []
    modules = {name.rpartition(".")[0] for name in entries}
    added: dict[str, str] = {}  # one tensor gets one delta: of tied modules with one each, none has the other's
    added |= {e.name: t.name for t, e in (*merge.replaced, *merge.casts, *merge.twins) if _BASE not in t.name}
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
        else:
            scale = config.scale(module, rank)
            merge.deltas.append(Delta(entry, half["A"], half["B"], scale, transposed))
            added[entry.name] = half["A"].name
    return rows


def _unplaced(tensor: StoredTensor, entry: TensorEntry | None) -> Difference:
    return Difference(tensor.name, entry.describe() if entry else "absent", describe(tensor.dtype, tensor.shape))


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


def adding(weights: memoryview, delta: Delta, a: memoryview, b: memoryview) -> Callable[[Piece, memoryview], bool]:
    """What puts pieces of a weight, given as they are stored, and what is added to them into the weights, cast once.

    It tells of each whether it was finite before.

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
        finite = all_finite(data, ((0, piece.nbytes, piece.source),), ((0, piece.nbytes),))
        wide = "F64" if "F64" in (piece.source, piece.target) else "F32"
        summed = convert(data, piece.source, wide)
        values = np.frombuffer(summed, "f8" if wide == "F64" else "f4")
        with np.errstate(all="ignore"):  # what overflows is found by the finite check
            values += product((piece.offset - entry.offset) // width, len(values)) * scale
        convert(summed, wide, piece.target, weights[piece.offset : piece.offset + piece.becomes])
        return finite

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
