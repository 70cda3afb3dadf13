"""Reads from ``adapter_config.json`` how a PEFT adapter is merged.

The scale is PEFT's (https://github.com/huggingface/peft, ``tuners/lora``): ``lora_alpha`` divided by the rank, or by
the rank's square root under ``use_rslora``. The file also names a base; that path is untrusted and ignored.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import IncompleteCheckpoint, MalformedCheckpoint
from .files.source import ByteSource

_MAX_CONFIG = 1 << 20  # bytes
_MAX_PATTERNS = 1000
_PLAIN = re.compile(r"[\w.^$|\\\-]+")  # no repetition, so the time to match is proportional to the length
_KINDS = (
    *("use_dora", "use_qalora", "use_bdlora", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    *("lora_bias", "trainable_token_indices"),
)
"""Settings under which the merged weight is not W + scale · B A."""
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Beginnings of ``init_lora_weights`` under which PEFT changes the base before it trains."""


@dataclass(frozen=True, slots=True)
class Config:
    """How an adapter is merged.

    Attributes:
        alpha: the scale is this divided by the rank or its square root.
        patterns: expressions, each with the alpha of the modules whose names it matches; the first match counts.
        root: whether alpha is divided by the square root of the rank.
        transposed: whether the modules store their weights as (in, out).
    """

    alpha: float
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()
    root: bool = False
    transposed: bool = False

    def scale(self, module: str, rank: int) -> float:
        alpha = next((alpha for pattern, alpha in self.patterns if pattern.match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)


def read_config(adapter: ByteSource, file: Path) -> Config:
    """Reads an adapter's configuration.

    Args:
        file: the configuration's path, for messages.

    Raises:
        IncompleteCheckpoint: it is missing or cut off.
        MalformedCheckpoint: wsync cannot merge this kind of adapter.
        OSError: the system could not read it.
    """
    try:
        return _config(json.loads(adapter.read_beside(_MAX_CONFIG)))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as exc:
        raise IncompleteCheckpoint(
            f"{file} does not say how the adapter beside it is merged ({exc!s:.100}). Wait for its writer to finish, "
            "or write it again."
        ) from exc
    except (ValueError, OverflowError, RecursionError) as exc:
        raise MalformedCheckpoint(
            f"{file} does not describe an adapter that wsync can merge ({exc!s:.100}). Merge it where it was trained, "
            "and write the merged weights."
        ) from exc


def _config(table: Any) -> Config:
    """Converts a parsed configuration; raises ValueError with the reason if wsync cannot merge such an adapter."""
    if not isinstance(table, dict) or table.get("peft_type") != "LORA":
        raise ValueError("it is not a LoRA")
    if odd := [kind for kind in _KINDS if table.get(kind)]:
        raise ValueError(f"it has {odd[0]}")
    start = table.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise ValueError(f"{start:.40} changed the base that it was trained on")
    parameters = table.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(f".{name}".endswith(".weight") for name in parameters):
        raise ValueError("its target_parameters name something other than weights")
    patterns = table.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        raise ValueError("its alpha_pattern is not a table, or is too long")
    return Config(
        _number(table.get("lora_alpha")),
        tuple((_expression(key), _number(alpha)) for key, alpha in patterns.items()),
        bool(table.get("use_rslora")),
        bool(table.get("fan_in_fan_out")),
    )


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("an alpha is not a number")
    return float(value)


def _expression(key: str) -> re.Pattern[str]:
    """Compiles an ``alpha_pattern`` key as PEFT does; refuses one that could be slow to match."""
    if not _PLAIN.fullmatch(key):
        raise ValueError(f"its alpha_pattern {key!r:.40} is not a plain name")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as exc:
        raise ValueError(f"its alpha_pattern {key!r:.40} is not a regular expression") from exc
