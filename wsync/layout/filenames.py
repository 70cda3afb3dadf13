"""How the files of a checkpoint are named, on a disk and in a store."""

from __future__ import annotations

import json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SUMS = "SHA256SUMS"
SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
FORMS = (
    SINGLE,
    INDEX,
    ADAPTER,
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_model.safetensors.index.json",
)
"""The files that make a directory a checkpoint; the first that exists counts, or its index if that is newer."""
MAX_INDEX = 100_000_000  # bytes, as for a header
MAX_TENSORS = 300_000  # of one checkpoint: the largest mixtures of experts have some 210,000


def shards_of(index: bytes) -> list[str]:
    """The files that an index names; empty if it is broken, which is reported when it is opened."""
    try:
        return sorted({shard for shard in json.loads(index)["weight_map"].values() if is_file_name(shard)})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def is_file_name(shard: object) -> bool:
    """Whether this is the plain name of a file in the same directory."""
    if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or not shard.isprintable():
        return False
    return len(shard.encode()) <= 255
