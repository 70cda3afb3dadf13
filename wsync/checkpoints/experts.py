"""Experts that a checkpoint holds one by one, and the policy fused: each is read into its place in the fused tensor.

transformers 5 writes mixtures of experts in the hub's layout, ``experts.3.gate_proj.weight`` and so on. Its modules
hold ``experts.gate_up_proj`` of shape (experts, 2 x width, hidden) and ``experts.down_proj`` of (experts, hidden,
width); see https://github.com/huggingface/transformers, ``conversion_mapping.py``. What is fused in that way lies in
one piece for each expert, so nothing is computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product

from ..layout.layout import TensorEntry
from .cast import Pair
from .fit import Fit, is_castable
from .header import StoredTensor

_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
    "up_proj": (("up_proj",),),
    "gate_proj": (("gate_proj",),),
}
"""The tensors of one expert, in their order in the fused one."""
_FUSED = re.compile(r"(.*\.)?experts\.(" + "|".join(_PARTS) + r")(\.weight)?")


def fused(entry: TensorEntry, taken: Mapping[str, StoredTensor], settings: Fit) -> dict[str, Pair]:
    """The checkpoint's tensors that together are one of the policy, by their names; empty where not all are there.

    Each becomes a part of the policy's tensor: an entry with the offset and shape of its place.

    Args:
        taken: what comes, by its names in the policy.
    """
    for name in entry.names:
        match = _FUSED.fullmatch(name)
        if match is None or len(entry.shape) != 3:
            continue
        for parts in _PARTS[match[2]]:
            experts = f"{match[1] or ''}experts."
            names = [f"{experts}{number}.{part}.weight" for number, part in product(range(entry.shape[0]), parts)]
            if all(each in taken for each in names):
                return _placed(entry, {each: taken[each] for each in names}, settings)
    return {}


def _placed(entry: TensorEntry, tensors: Mapping[str, StoredTensor], settings: Fit) -> dict[str, Pair]:
    """Each tensor with its place, one after another; nothing where their shapes do not fill the fused one."""
    rows, columns = entry.shape[1:]
    pairs: dict[str, Pair] = {}
    offset = entry.offset
    for name, tensor in tensors.items():
        castable = tensor.dtype == entry.dtype or (settings.cast and is_castable(tensor.dtype, entry.dtype))
        if len(tensor.shape) != 2 or tensor.shape[1] != columns or not castable:
            return {}
        place = TensorEntry(entry.name, entry.dtype, tensor.shape, offset)
        pairs[name] = (tensor, place)
        offset += place.nbytes
    each = len(tensors) // entry.shape[0]
    heights = [tensor.shape[0] for tensor in tensors.values()]
    even = all(sum(heights[at : at + each]) == rows for at in range(0, len(heights), each))
    return pairs if even else {}
