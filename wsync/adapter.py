"""A PEFT adapter merged into its base weights: W + scale · B A, in float32.

The layout of the files and the scale are those of PEFT (https://github.com/huggingface/peft, ``tuners/lora``): a tensor
``base_model.model.<module>.lora_A.weight`` of shape (r, in), its ``lora_B`` of shape (out, r), and the adapter's
``adapter_config.json`` with ``lora_alpha``, which is divided by r, or by its root under ``use_rslora``. Where the base
lies is said by the spec alone: what the adapter's own configuration says of it is data from elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from .casting import convert
from .errors import CheckpointMismatch, Difference, MalformedCheckpoint
from .fitting import Fit
from .header import StoredTensor
from .layout import Layout, TensorEntry, describe

CONFIG = "adapter_config.json"
_MAX_CONFIG = 1 << 20  # bytes
_ROOT = "base_model.model."
_LORA = re.compile(r"(.*)\.lora_(embedding_)?([AB])(?:\.weight)?")


@dataclass(frozen=True, slots=True)
class Delta:
    """What one adapted weight gets: ``scale`` · B A, transposed where the module keeps its weight so."""

    entry: TensorEntry
    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool


def deltas(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], layout: Layout, settings: Fit, path: Path
) -> tuple[list[Delta], list[tuple[StoredTensor, TensorEntry]]]:
    """What an adapter adds to which weights, and which tensors it replaces whole (``modules_to_save``, biases).

    Raises:
        CheckpointMismatch: a tensor has no place in the policy, another shape, or is of a kind that cannot be merged.
    """
    entries = {name: entry for entry in layout.tensors for name in entry.names}
    halves: dict[tuple[str, bool], dict[str, StoredTensor]] = {}
    added: list[Delta] = []
    replaced: list[tuple[StoredTensor, TensorEntry]] = []
    rows: list[Difference] = []
    for stored, tensor in tensors.items():
        match = _LORA.fullmatch(stored)
        if match:
            halves.setdefault((match[1], bool(match[2])), {})[match[3]] = tensor
            continue
        entry = entries.get(settings.name(stored.removeprefix(_ROOT)) or "")
        if entry is None or (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
            rows.append(
                Difference(stored, entry.describe() if entry else "absent", describe(tensor.dtype, tensor.shape))
            )
        else:
            replaced.append((tensor, entry))
    for (module, embedding), half in halves.items():
        name = f"{module.removeprefix(_ROOT)}.weight"
        entry = entries.get(settings.name(name) or "")
        transposed = embedding or bool(config.get("fan_in_fan_out"))
        if entry is None or half.keys() != {"A", "B"} or not _multiplies(half["A"], half["B"], entry, transposed):
            found = " and ".join(f"{key} {list(half[key].shape)}" for key in sorted(half))
            rows.append(Difference(name, entry.describe() if entry else "absent", f"an adapter of {found}"))
        else:
            scale = _scale(config, module.removeprefix(_ROOT), half["A"].shape[0])
            added.append(Delta(entry, half["A"], half["B"], scale, transposed))
    if rows:
        raise CheckpointMismatch(
            f"{path} is an adapter that cannot be merged into the policy: {len(rows)} of its tensors have no place. "
            "Check that the spec's base is the one that it was trained on.",
            tuple(sorted(rows, key=lambda row: row.name)),
        )
    return added, replaced


def read_config(directory: Path) -> dict[str, Any]:
    """An adapter's configuration.

    Raises:
        MalformedCheckpoint: it is missing, no JSON, or of a kind of adapter that is not merged here.
        OSError: the system could not read it.
    """
    file = directory / CONFIG
    try:
        if file.stat().st_size > _MAX_CONFIG:
            raise ValueError("too large")
        config = json.loads(file.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("no table")
        alpha = config.get("lora_alpha")
        if config.get("peft_type") != "LORA" or config.get("use_dora") or not isinstance(alpha, int | float):
            raise ValueError("no plain LoRA")
    except (FileNotFoundError, ValueError, RecursionError) as exc:
        raise MalformedCheckpoint(
            f"{file} does not describe an adapter that wsync can merge ({exc!s:.100}). Merge it where it was trained, "
            "and write the merged weights."
        ) from exc
    return config


def add(weights: memoryview, delta: Delta, a: memoryview, b: memoryview) -> None:
    """Adds a delta to its weight in place; ``a`` and ``b`` are the bytes of its halves."""
    import numpy as np

    entry = delta.entry
    part = slice(entry.offset, entry.offset + entry.nbytes)
    weight = np.frombuffer(convert(weights[part], entry.dtype, "F32"), "f4").reshape(entry.shape)
    with np.errstate(all="ignore"):  # what overflows is found by the finite check
        product = (_single(b, delta.b) @ _single(a, delta.a)) * np.float32(delta.scale)
        summed = np.ascontiguousarray(weight + (product.T if delta.transposed else product), "f4")
    weights[part] = convert(memoryview(summed.reshape(-1).view("u1").data), "F32", entry.dtype)


def _single(data: memoryview, tensor: StoredTensor) -> Any:
    import numpy as np

    return np.frombuffer(convert(data, tensor.dtype, "F32"), "f4").reshape(tensor.shape)


def _multiplies(a: StoredTensor, b: StoredTensor, entry: TensorEntry, transposed: bool) -> bool:
    if not len(a.shape) == len(b.shape) == len(entry.shape) == 2 or not a.shape[0]:
        return False
    product = (b.shape[0], a.shape[1])
    return a.shape[0] == b.shape[1] and entry.shape == (product[::-1] if transposed else product)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    patterns = config.get("alpha_pattern")
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = value
    return float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank)
