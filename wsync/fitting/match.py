"""Matches a checkpoint's tensors with a policy's layout: which becomes which, and what does not fit.

If a checkpoint holds experts singly and the policy holds them fused, each is read into its place in the fused tensor.
transformers 5 writes mixtures of experts in the hub's layout, ``experts.3.gate_proj.weight`` and so on. Its modules
hold ``experts.gate_up_proj`` of shape (experts, 2 x width, hidden) and ``experts.down_proj`` of (experts, hidden,
width); see https://github.com/huggingface/transformers, ``conversion_mapping.py``. Each expert is contiguous in them,
so its bytes are read as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

from ..errors import Difference
from ..layout.layout import Layout, TensorEntry, describe
from ..layout.tensor_names import seen_through
from .cast import Pair
from .fit import Fit
from .header import StoredTensor

_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
    "up_proj": (("up_proj",),),
    "gate_proj": (("gate_proj",),),
}
"""For each fused tensor, what one expert's tensors may be called, in the order in which they are fused."""
_FUSED = re.compile(r"(.*\.)?experts\.(" + "|".join(_PARTS) + r")(\.weight)?")


class Match(NamedTuple):
    """What a ``Plan`` holds, with what does not fit in ``rows``, and the names that the policy lacks in ``unknown``."""

    rows: list[Difference]
    pairs: list[Pair]
    twins: list[Pair]
    kept: list[TensorEntry]
    built: list[TensorEntry]
    unknown: list[str]


def match(tensors: Mapping[str, StoredTensor], layout: Layout, settings: Fit) -> Match:
    """Matches a checkpoint's tensors with a layout.

    Ignores what ``torch.compile`` and data-parallel wrappers add to names, and fuses experts.
    """
    taken, rows = _names(tensors, settings)
    found = Match(rows, [], [], [], [], [])
    whole: set[str] = set()  # names of fused tensors, which several fill
    wanted = {name for entry in layout.tensors for name in entry.names}
    for name, home in seen_through(taken, wanted).items():
        taken[home] = taken.pop(name)
    for entry in layout.tensors:
        if taken.keys().isdisjoint(entry.names) and (parts := _fused(entry, taken, settings)):
            found.pairs.extend(parts.values())
            whole.add(entry.name)
            for name in parts:
                del taken[name]
    if settings.strict:
        found.unknown.extend(name for name in taken if name not in wanted)
        rows += [Difference(taken[name].name, "absent", _say(taken[name])) for name in found.unknown]
    for entry in layout.tensors:
        stored = [taken[name] for name in entry.names if name in taken]
        for tensor in stored:
            if tensor.shape != entry.shape or not settings.takes(tensor.dtype, entry.dtype):
                rows.append(Difference(tensor.name, entry.describe(), _say(tensor)))
        if entry.name in whole:
            continue
        if stored:
            found.pairs.append((stored[0], entry))
            found.twins.extend((t, entry) for t in stored[1:])
        elif settings.missing == "policy":
            found.built.append(entry)
        elif settings.strict or not settings.partial:
            rows.append(Difference(entry.name, entry.describe(), "absent"))
        else:
            found.kept.append(entry)
    absent = found.kept + found.built
    if not rows and len(absent) == len(layout.tensors):
        rows += [Difference(entry.name, entry.describe(), "absent") for entry in absent]
    return found


def _names(tensors: Mapping[str, StoredTensor], settings: Fit) -> tuple[dict[str, StoredTensor], list[Difference]]:
    """The tensors that are taken, by their names in the policy; and those whose name another one has already."""
    taken: dict[str, StoredTensor] = {}
    rows = []
    for stored, tensor in tensors.items():
        name = settings.name(stored)
        if name is None:
            continue
        if name in taken:
            rows.append(Difference(stored, "one tensor", f"{taken[name].name} is also named {name}"))
        taken[name] = tensor
    return taken, rows


def _say(tensor: StoredTensor) -> str:
    return describe(tensor.dtype, tensor.shape)


def _fused(entry: TensorEntry, taken: Mapping[str, StoredTensor], settings: Fit) -> dict[str, Pair]:
    """The experts' tensors that fill a fused tensor, by name; empty if one is missing or does not fit.

    Each is paired with its part of the fused tensor: an entry with the offset and shape of that part.

    Args:
        taken: the checkpoint's tensors by their names in the policy.
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
    """Places the tensors one after another; empty unless they fill the fused one exactly."""
    rows, columns = entry.shape[1:]
    pairs: dict[str, Pair] = {}
    offset = entry.offset
    for name, tensor in tensors.items():
        if len(tensor.shape) != 2 or tensor.shape[1] != columns or not settings.takes(tensor.dtype, entry.dtype):
            return {}
        part = TensorEntry(entry.name, entry.dtype, tensor.shape, offset)
        pairs[name] = (tensor, part)
        offset += part.nbytes
    each = len(tensors) // entry.shape[0]
    heights = [tensor.shape[0] for tensor in tensors.values()]
    even = all(sum(heights[at : at + each]) == rows for at in range(0, len(heights), each))
    return pairs if even else {}
