"""Holds a checkpoint's tensors against a policy's layout: which tensor becomes which, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..errors import Difference
from ..layout.layout import Layout, TensorEntry, describe
from ..layout.names import seen_through
from .cast import Pair
from .experts import fused
from .fit import Fit, is_castable
from .header import StoredTensor


class Match(NamedTuple):
    """Which tensor of a checkpoint becomes which of a layout, as in a plan; and in ``rows`` what does not fit."""

    rows: list[Difference]
    pairs: list[Pair]
    twins: list[Pair]
    kept: list[TensorEntry]
    built: list[TensorEntry]
    unknown: list[str]


def match(tensors: Mapping[str, StoredTensor], layout: Layout, settings: Fit) -> Match:
    """Holds a checkpoint's tensors against a layout; ``unknown`` are the policy's names for what it does not have.

    What ``torch.compile`` and data parallels put into names is seen through, and experts are fused.
    """
    taken, rows = _names(tensors, settings)
    found = Match(rows, [], [], [], [], [])
    whole: set[str] = set()  # what is fused of several
    wanted = {name for entry in layout.tensors for name in entry.names}
    for name, home in seen_through(taken, wanted).items():
        taken[home] = taken.pop(name)
    for entry in layout.tensors:
        if taken.keys().isdisjoint(entry.names) and (parts := fused(entry, taken, settings)):
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
            castable = settings.cast and is_castable(tensor.dtype, entry.dtype)
            if tensor.shape != entry.shape or (tensor.dtype != entry.dtype and not castable):
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
    """The tensors that are taken by their names in the policy; and those that two names lead to."""
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
