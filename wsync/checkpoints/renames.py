"""Finds renames that may make a checkpoint's names the policy's: by names that end alike, and shapes that are equal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import permutations

from ..layout.layout import Layout, TensorEntry
from .fit import Fit
from .header import StoredTensor

_MOST = 4  # renames together
_LOOKED_AT = 2000  # tensors that the policy lacks


def guesses(tensors: Mapping[str, StoredTensor], layout: Layout, settings: Fit) -> Iterator[dict[str, str]]:
    """Renames to try, each for all tensors that are lacking; one rename of those may have to come before another."""
    named = {name: tensor for stored, tensor in tensors.items() if (name := settings.name(stored)) is not None}
    known = {name for entry in layout.tensors for name in entry.names}
    unknown: dict[tuple[str, tuple[int, ...]], list[list[str]]] = {}
    for name, tensor in named.items():
        if name not in known:
            parts = name.split(".")
            unknown.setdefault((parts[-1], tensor.shape), []).append(parts)
    lacking = [entry for entry in layout.tensors if named.keys().isdisjoint(entry.names)]
    found: Counter[tuple[str, str]] = Counter()
    for entry in lacking[:_LOOKED_AT]:
        if rule := _rule(entry, unknown):
            found[rule] += 1
    rules = [rule for rule, _ in found.most_common(_MOST)]
    if rules:
        yield from map(dict, permutations(rules))


def _rule(entry: TensorEntry, unknown: Mapping[tuple[str, tuple[int, ...]], list[list[str]]]) -> tuple[str, str] | None:
    """The rename that makes the policy's name of the one whose end is most like it; None where that is not one."""
    wanted = entry.name.split(".")
    alike = unknown.get((wanted[-1], entry.shape), [])[:_LOOKED_AT]
    scored = sorted(
        (((_common(wanted[::-1], each[::-1]), _common(wanted, each)), each) for each in alike), reverse=True
    )
    if not scored or (len(scored) > 1 and scored[0][0] == scored[1][0]):
        return None
    (ends, _), given = scored[0]
    begins = min(_common(wanted, given), len(wanted) - ends, len(given) - ends)
    before, old, new = given[:begins], given[begins : len(given) - ends], wanted[begins : len(wanted) - ends]
    after = given[len(given) - ends]
    if any(part.isdigit() for part in before):  # inside one of many numbered layers
        if not old:
            old, new = [after], [*new, after]
        return rf"/\.{re.escape('.'.join(old))}\./", ".".join(["", *new, ""])
    if not before and not old:
        old, new = [after], [*new, after]
    return rf"/^{re.escape('.'.join([*before, *old]))}\./", "".join(f"{part}." for part in [*before, *new])


def _common(first: list[str], second: list[str]) -> int:
    """How many parts two lists begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
