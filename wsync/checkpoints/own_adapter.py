"""An adapter for a policy that is a PEFT model itself: its tensors are some of the policy's own.

PEFT leaves the adapter's name out when it saves: ``lora_A.weight`` is ``lora_A.default.weight`` in the policy. So it
does with ``modules_to_save`` (https://github.com/huggingface/peft, ``utils/save_and_load.py``). The base's weights are
in no adapter: they keep their live values, or come from ``base``, or are as the policy is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ..layout.layout import Layout
from .fit import Fit
from .header import StoredTensor
from .plan import Merge, Plan, plan_of

_OWN = re.compile(r"\.(?:lora_\w+|modules_to_save)\.([^.]+)(?:\.|$)")
_ROOT = "base_model.model."


def has_adapters(layout: Layout) -> bool:
    """Whether a policy is a PEFT model."""
    return any(_OWN.search(name) for entry in layout.tensors for name in entry.names)


def named_by_policy(tensors: Mapping[str, StoredTensor], layout: Layout) -> dict[str, StoredTensor] | None:
    """An adapter's tensors by the names of the policy's own adapter; None where they are not all of that one.

    Of several adapters in the policy, ``default`` comes first.
    """
    names = [name for entry in layout.tensors for name in entry.names]
    adapters = {match[1] for name in names if (match := _OWN.search(name))}
    for adapter in sorted(adapters, key=lambda each: (each != "default", each)):
        saved = {each: name for name in names for each in _saved_as(name, adapter)}
        if tensors.keys() <= saved.keys():
            return {saved[name]: tensor for name, tensor in tensors.items()}
    return None


def plan_own(
    tensors: Mapping[str, StoredTensor],
    base: Mapping[str, StoredTensor] | None,
    layout: Layout,
    settings: Fit,
    path: Path,
) -> Plan:
    """How an adapter's tensors, by the policy's names, and those of the base reach the policy.

    Raises:
        CheckpointMismatch: a shape or dtype is another.
        PartialCheckpoint: there are no live values for the base's weights to keep.
    """
    own = replace(settings, prefix="", rename={}, include=(), exclude=(), strict=False)
    if base is None:
        return plan_of(tensors, layout, own, path)
    known = {name for entry in layout.tensors for name in entry.names}
    named = {name: tensor for stored, tensor in base.items() if (name := _in_policy(stored, known))}
    first = plan_of(named, layout, replace(own, partial=True), path)
    mine = plan_of(tensors, layout, replace(own, partial=True), path)
    brought = {entry.name for _, entry in (*first.pairs, *mine.pairs)}
    kept = tuple(entry for entry in mine.kept if entry.name not in brought)
    built = tuple(entry for entry in mine.built if entry.name not in brought)
    replaced = {entry.name for _, entry in mine.pairs}
    return replace(mine, kept=kept, built=built, merge=Merge(replace(first.without(replaced), built=built), ()))


def _saved_as(name: str, adapter: str) -> Iterator[str]:
    """The names under which PEFT saves a tensor of the policy's own adapter; none for any other tensor."""
    match = _OWN.search(name)
    if match is None or match[1] != adapter:
        return
    bare = name[: match.start(1) - 1] + name[match.end(1) :]
    yield bare
    yield bare.replace(".modules_to_save.", ".").removesuffix(".modules_to_save")
    yield bare.removesuffix(".weight")  # lora_magnitude_vector


def _in_policy(stored: str, known: set[str]) -> str:
    """The name of a base's tensor in a PEFT model of it; empty where it has none."""
    module, _, leaf = f"{_ROOT}{stored}".rpartition(".")
    names = (stored, f"{module}.{leaf}", f"{module}.base_layer.{leaf}", f"{module}.original_module.{leaf}")
    return next((name for name in names if name in known), "")
