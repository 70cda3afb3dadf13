"""A PEFT adapter merged into its base weights: W + scale · B A, in float32.

The layout of the files and the scale are those of PEFT (https://github.com/huggingface/peft, ``tuners/lora``): a tensor
``base_model.model.<module>.lora_A.weight`` of shape (r, in), its ``lora_B`` of shape (out, r), and the adapter's
``adapter_config.json`` with ``lora_alpha``, which is divided by r, or by its root under ``use_rslora``. Where the base
lies is said by the spec alone: what the adapter's own configuration says of it is data from elsewhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .casting import convert
from .errors import CheckpointMismatch, Difference, IncompleteCheckpoint, MalformedCheckpoint
from .finite import all_finite
from .fitting import FLOATS, Fit
from .header import StoredTensor
from .layout import Layout, TensorEntry, describe
from .parts import CONFIG, Parts, read_small

_MAX_CONFIG = 1 << 20  # bytes
_MAX_PATTERNS = 1000
_ROOT = "base_model.model."
_LORA = re.compile(r"(.*)\.lora_(embedding_)?([AB])(?:\.weight)?")
_PLAIN = re.compile(r"[\w.^$|\\\-]+")  # an expression without repetition costs no more than its length
_KINDS = (
    *("use_dora", "use_qalora", "use_bdlora", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config"),
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
    """What one adapted weight gets: ``scale`` · B A, transposed where the module keeps its weight so."""

    entry: TensorEntry
    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool


@dataclass(frozen=True, slots=True)
class Merge:
    """What an adapter adds to which weights, and which it replaces (``modules_to_save``, biases), as stored or cast."""

    deltas: list[Delta]
    replaced: list[tuple[StoredTensor, TensorEntry]]
    casts: tuple[tuple[StoredTensor, TensorEntry], ...]

    @property
    def names(self) -> set[str]:
        """Of the weights to which it adds, or which it replaces."""
        return {delta.entry.name for delta in self.deltas} | {entry.name for _, entry in (*self.replaced, *self.casts)}


def deltas(tensors: Mapping[str, StoredTensor], config: Config, layout: Layout, settings: Fit, path: Path) -> Merge:
    """How an adapter is merged into a policy's weights.

    Raises:
        CheckpointMismatch: a tensor has no place in the policy, another shape, or is of a kind that cannot be merged.
    """
    entries = {name: entry for entry in layout.tensors for name in entry.names}
    halves: dict[tuple[str, bool], dict[str, StoredTensor]] = {}
    added: list[Delta] = []
    replaced: list[tuple[StoredTensor, TensorEntry]] = []
    casts: list[tuple[StoredTensor, TensorEntry]] = []
    rows: list[Difference] = []
    for stored, tensor in tensors.items():
        match = _LORA.fullmatch(stored)
        if match:
            halves.setdefault((match[1], bool(match[2])), {})[match[3]] = tensor
            continue
        name = settings.name(stored.removeprefix(_ROOT).replace(".base_layer.", "."))  # a bias that was trained
        entry = entries.get(name) if name is not None else None
        if entry and tensor.shape == entry.shape and tensor.dtype == entry.dtype:
            replaced.append((tensor, entry))
        elif entry and tensor.shape == entry.shape and settings.cast and {tensor.dtype, entry.dtype} <= FLOATS:
            casts.append((tensor, entry))
        elif _is_missed(name, entry, settings):
            expected = entry.describe() if entry else "absent"
            rows.append(Difference(stored, expected, describe(tensor.dtype, tensor.shape)))
    for (module, embedding), half in halves.items():
        module = module.removeprefix(_ROOT)
        name = settings.name(f"{module}.weight")
        entry = entries.get(name) if name is not None else None
        transposed = embedding or config.transposed
        if entry and half.keys() == {"A", "B"} and _multiplies(half["A"], half["B"], entry, transposed):
            scale = config.scale(module, half["A"].shape[0])
            added.append(Delta(entry, half["A"], half["B"], scale, transposed))
        elif _is_missed(name, entry, settings):
            found = " and ".join(f"{key} {describe(half[key].dtype, half[key].shape)}" for key in sorted(half))
            expected = entry.describe() if entry else "absent"
            rows.append(Difference(f"{module}.weight", expected, f"an adapter of {found}"))
    if not (rows or added or replaced or casts):
        rows = [Difference(t.name, "absent", describe(t.dtype, t.shape)) for t in tensors.values()]
    if rows:
        raise CheckpointMismatch(
            f"{path} is an adapter that cannot be merged into the policy: {len(rows)} of its tensors have no place. "
            "Check that the spec's base is the one that it was trained on.",
            tuple(sorted(rows, key=lambda row: row.name)),
        )
    return Merge(added, replaced, tuple(casts))


def _is_missed(name: str | None, entry: TensorEntry | None, settings: Fit) -> bool:
    """Whether a tensor that has no place is one that the settings want."""
    return name is not None and (entry is not None or settings.strict)


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


def add(weights: memoryview, delta: Delta, a: memoryview, b: memoryview) -> bool:
    """Adds a delta to its weight in place, and tells whether that was finite; ``a`` and ``b`` are its halves' bytes."""
    import numpy as np

    entry = delta.entry
    part = slice(entry.offset, entry.offset + entry.nbytes)
    finite = all_finite(weights[part], ((0, entry.nbytes, entry.dtype),), ((0, entry.nbytes),))
    weight = np.frombuffer(convert(weights[part], entry.dtype, "F32"), "f4").reshape(entry.shape)
    with np.errstate(all="ignore"):  # what overflows is found by the finite check
        product = (_single(b, delta.b) @ _single(a, delta.a)) * np.float32(delta.scale)
        summed = np.ascontiguousarray(weight + (product.T if delta.transposed else product), "f4")
    weights[part] = convert(memoryview(summed.reshape(-1).view("u1").data), "F32", entry.dtype)
    return finite


def _single(data: memoryview, tensor: StoredTensor) -> Any:
    import numpy as np

    return np.frombuffer(convert(data, tensor.dtype, "F32"), "f4").reshape(tensor.shape)


def _multiplies(a: StoredTensor, b: StoredTensor, entry: TensorEntry, transposed: bool) -> bool:
    if not len(a.shape) == len(b.shape) == len(entry.shape) == 2 or 0 in (*a.shape, *b.shape):
        return False
    if not {a.dtype, b.dtype, entry.dtype} <= FLOATS:
        return False
    product = (b.shape[0], a.shape[1])
    return a.shape[0] == b.shape[1] and entry.shape == (product[::-1] if transposed else product)
