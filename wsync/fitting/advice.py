"""Finds the setting that would make a checkpoint fit. Each is tried before it is advised, so that the advice is true.

Trials go from small changes to large ones: cast, remove a prefix, add the policy's own wrapper, exclude other tensors,
or several of these. Renames are guessed from tensors of equal shape whose names end alike.
"""

from __future__ import annotations

import glob
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice, permutations
from math import prod
from typing import Any

from ..layout.layout import Layout, TensorEntry
from ..layout.tensor_names import bare
from .fit import Fit
from .header import StoredTensor
from .match import Match, match

_WRAPPERS = (
    "base_model.model.",  # PEFT
    "actor.",
    "policy.",
    "model.",
    "actor_network.",
)
"""Prefixes of a policy's names, besides those that ``match`` ignores."""
_CONSTANTS = ("inv_freq", "original_inv_freq")
_WHOLE = {"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"}
_EXPERT = re.compile(r"experts\.\d+\.")  # a tensor of one expert; a policy may hold all experts in one tensor
_PREFIXES = 16  # most prefixes tried
_GLOBS = 32  # most globs advised
_RENAMES = 5  # most renames that are tried together
_LOOKED_AT = 2000  # most tensors compared

HOPELESS = "It stays refused until it changes: "
"""How the advice begins where no setting makes a checkpoint fit."""

Tensors = Mapping[str, StoredTensor]
Change = dict[str, Any]


def advice(tensors: Tensors, layout: Layout, settings: Fit, most: int = 5_000_000) -> str:
    """The settings that would make all tensors fit, as TOML and as options; or what else to do.

    All trials together look at some ``most`` tensors, because a hostile header may have many.
    """
    trials = islice(_changes(tensors, layout, settings), 3 + most // max(len(tensors), 1))
    for found in (_tried(tensors, layout, settings, change) for change in trials):
        if found:
            return found
    part = match(tensors, layout, replace(settings, strict=False, partial=True))
    takes_part = part.kept and not part.rows
    other = "write checkpoints of this policy's own state_dict, or name the spec that fits."
    if takes_part and settings.partial:
        few = f"{len(layout.tensors) - len(part.kept)} of {len(layout.tensors)}"
        other += (
            f" If the checkpoint is meant to be a part of the policy, strict = false (--no-strict) takes {few} and "
            "keeps the rest as it is."
        )
    experts = any(_EXPERT.search(name) for name in tensors) and not any(_EXPERT.search(e.name) for e in layout.tensors)
    if experts or (part.kept and _are_as_many(tensors, layout)):
        other += (
            " If transformers wrote it in the hub's layout, save_pretrained(..., save_original_format=False) writes "
            "the names of the modules."
        )
    return f"{HOPELESS}{other}"


def _tried(tensors: Tensors, layout: Layout, settings: Fit, change: Change) -> str:
    """The advice to make this change; empty unless all tensors fit with it."""
    found = _match(tensors, layout, settings, change)
    absent = {row.name for row in found.rows if row.found == "absent"}
    if absent and all(_is_rarely_saved(entry) for entry in layout.tensors if entry.name in absent):
        change = {**change, "missing": "policy"}
        found = _match(tensors, layout, settings, change)
    if found.unknown and len(found.rows) == len(found.unknown):
        change = {**change, **_left_out(found.unknown, layout, settings)}
        found = _match(tensors, layout, settings, change)
    if found.rows or (found.kept and change) or not found.pairs:
        return ""
    if not settings.cast and any(stored.dtype != entry.dtype for stored, entry in found.pairs):
        change = {**change, "cast": True}
    if not change:
        return ""
    complete = not (found.kept or found.built)
    who = f"All {len(layout.tensors)} tensors of the policy" if complete else "The tensors in the checkpoint"
    words = " and ".join(f"{name} = {_toml(value)}" for name, value in change.items())
    text = f"{who} fit with the {'setting' if len(change) == 1 else 'settings'} {words} in [weights]."
    options = _options(change)
    return f"{text} As options: `{options}`." if options else text


def _are_as_many(tensors: Tensors, layout: Layout) -> bool:
    """Whether a checkpoint has as many elements as the policy: it may be the same weights in other shapes."""
    return sum(prod(t.shape) for t in tensors.values()) == sum(prod(entry.shape) for entry in layout.tensors)


def _is_rarely_saved(entry: TensorEntry) -> bool:
    """Whether a tensor is a counter or a constant, which some trainers do not save, and never a trained weight."""
    return entry.dtype in _WHOLE or entry.name.rpartition(".")[2] in _CONSTANTS


def _match(tensors: Tensors, layout: Layout, settings: Fit, change: Change) -> Match:
    return match(tensors, layout, replace(settings, **{**change, "cast": True}))


def _changes(tensors: Tensors, layout: Layout, settings: Fit) -> Iterator[Change]:
    """Yields changes to try, the smallest first."""
    yield {}
    renamed = bool(settings.rename) or any(bare(name) != name for name in tensors)
    for wrapper in ("", *_wrappers_of(layout)):
        changed = {"rename": {**settings.rename, "/^/": wrapper}} if wrapper else {}
        if changed:
            yield changed
        for prefix in _prefixes(tensors, layout, settings, wrapper, renamed):
            yield {"prefix": prefix, **changed}
    for renames in _guesses(tensors, layout, settings):
        yield {"rename": {**settings.rename, **renames}}


def _prefixes(tensors: Tensors, layout: Layout, settings: Fit, wrapper: str, renamed: bool) -> Iterable[str]:
    """Prefixes to try, the shortest first: those with which the checkpoint may have all of the policy's names.

    Args:
        wrapper: what is put in front of a name after its prefix is removed.
        renamed: whether names change in other ways, too; then only known wrappers and first parts of names are tried.
    """
    trained = [entry for entry in layout.tensors if not _is_rarely_saved(entry)] or layout.tensors
    wanted = [[n.removeprefix(wrapper) for n in entry.names] for entry in trained]
    if renamed:
        heads = {name[: name.find(".") + 1] for name in tensors}
        found = {*_WRAPPERS, *(heads if len(heads) <= _PREFIXES else ()), ""}
    else:
        ends = {name[: -len(end)] for name in tensors for end in wanted[0] if name.endswith(end)}
        found = {p for p in {*ends, ""} if all(any(p + n in tensors for n in names) for names in wanted)}
    return sorted(found - {settings.prefix}, key=lambda p: (len(p), p))[: _PREFIXES + len(_WRAPPERS)]


def _wrappers_of(layout: Layout) -> list[str]:
    """Up to four prefixes that all names of the policy share, the shortest first."""
    names = [name for entry in layout.tensors for name in entry.names]
    first, last = min(names), max(names)
    ends = [at + 1 for at, letter in enumerate(first) if letter == "." and first[: at + 1] == last[: at + 1]]
    return [first[:end] for end in ends[:4]]


def _left_out(unknown: list[str], layout: Layout, settings: Fit) -> Change:
    """Globs that exclude these names and none of the policy's; if they are too many, globs to include the policy's."""
    known = {name for entry in layout.tensors for name in entry.names}
    stems = {"", *(stem for name in known for stem in _stems(bare(name)))}
    globs = dict.fromkeys(settings.exclude)
    for name in unknown:
        stem = next((stem for stem in _stems(name) if bare(stem) not in stems), name)
        globs[glob.escape(stem) + ("" if stem == name else ".*")] = None
        if len(globs) > _GLOBS:
            break
    if len(globs) <= _GLOBS:
        return {"exclude": tuple(globs)}
    heads = {name.partition(".")[0]: "." in name for name in sorted(known)}
    takes = tuple(glob.escape(head) + (".*" if deep else "") for head, deep in heads.items())
    return {} if settings.include or len(takes) > _GLOBS else {"include": takes}


def _stems(name: str) -> Iterator[str]:
    """Yields ``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)
    yield name


def _toml(value: object) -> str:
    """Writes a setting as TOML, which takes JSON's strings, lists and booleans as they are."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(old)} = {json.dumps(new)}" for old, new in value.items()) + " }"
    return json.dumps(value)


def _options(change: Change) -> str:
    """Writes a change as command-line options; empty if options cannot express it."""
    words = []
    for name, value in change.items():
        if isinstance(value, dict):
            if any("=" in new for new in value.values()):
                return ""
            words += [f"--rename={old}={new}" for old, new in value.items()]
        else:
            words += (
                [f"--{name}"]
                if value is True
                else [f"--{name}={v}" for v in (value if isinstance(value, tuple) else (value,))]
            )
    return " ".join(map(shlex.quote, words)) if all(word.isprintable() for word in words) else ""


def _guesses(tensors: Tensors, layout: Layout, settings: Fit) -> Iterator[dict[str, str]]:
    """Yields sets of renames to try, in every order, because one rename may have to come before another."""
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
    rules = [rule for rule, _ in found.most_common(_RENAMES)]
    if rules:
        yield from map(dict, permutations(rules))


def _rule(entry: TensorEntry, unknown: Mapping[tuple[str, tuple[int, ...]], list[list[str]]]) -> tuple[str, str] | None:
    """A rename to the policy's name from the stored name whose end is most like it; None unless one is closest."""
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
    if any(part.isdigit() for part in before):  # in a numbered layer: the rule must hold for all of them
        if not old:
            old, new = [after], [*new, after]
        return rf"/\.{re.escape('.'.join(old))}\./", ".".join(["", *new, ""])
    if not before and not old:
        old, new = [after], [*new, after]
    if len(old) == len(given):  # the whole name is replaced
        return f"/^{re.escape('.'.join(old))}$/", ".".join(new)
    return rf"/^{re.escape('.'.join([*before, *old]))}\./", "".join(f"{part}." for part in [*before, *new])


def _common(first: list[str], second: list[str]) -> int:
    """How many leading parts two lists share."""
    pairs = zip(first, second, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
