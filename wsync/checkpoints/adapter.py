"""How a PEFT adapter is merged into its base weights, tensor by tensor.

The layout of the files is PEFT's (https://github.com/huggingface/peft, ``tuners/lora``): a tensor
``base_model.model.<module>.lora_A.weight`` of shape (r, in), its ``lora_B`` of shape (out, r), and the adapter's
``adapter_config.json``. Where the base lies is said by the spec alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import (
    CheckpointChanged,
    CheckpointError,
    CheckpointMismatch,
    Difference,
    NonFiniteWeights,
    PartialCheckpoint,
    UnusableBase,
)
from ..layout.filenames import CONFIG
from ..layout.layout import Layout, TensorEntry, describe
from . import plan as plan_module
from .adapter_config import Config, read_config
from .cast import Pair
from .files import place_at, unreadable
from .fit import FLOATS, Fit, is_castable
from .header import StoredTensor
from .plan import Delta, Merge, Plan
from .table import TensorTable

_SMALL = 1 << 24  # elements of both halves, whatever their rank; a hostile file of 4 KiB can claim any
_ROOT = "base_model.model."
_BASE = ".base_layer."
_LORA = re.compile(r"(.*)\.lora_(embedding_)?([AB])(?:\.weight)?")
_MORE = re.compile(r"(.*?)\.(?:lora_|token_adapter\.)")  # a part of a module that PEFT has beside its weight


@contextmanager
def blaming(base: object, adapter: Path) -> Iterator[None]:
    """Converts an error about the base into one that names both and does not refuse the adapter."""
    try:
        yield
    except (CheckpointChanged, PartialCheckpoint):
        raise
    except (CheckpointMismatch, NonFiniteWeights) as exc:
        raise UnusableBase(
            f"the base of the adapter {adapter} cannot be used: {exc.message} The adapter is tried again at the next "
            "pass.",
            exc.differences,
        ) from exc
    except (CheckpointError, OSError) as exc:
        told = unreadable(Path(str(base)), exc) if isinstance(exc, OSError) else exc
        raise CheckpointError(f"the base of the adapter {adapter} cannot be opened: {told}") from exc


def open_base(path: str, adapter: Path) -> TensorTable:
    """Opens the weights that an adapter is merged into."""
    with blaming(path, adapter):
        base = TensorTable(place_at(path))
        if not base.parts.is_adapter:
            return base
        base.close()
        raise CheckpointError(f"{base.path} is an adapter itself. Name the weights that both were trained on.")


def plan_of(adapter: TensorTable, base: TensorTable, layout: Layout, settings: Fit) -> Plan:
    """How an adapter is merged into a policy's weights.

    Raises:
        CheckpointMismatch: a tensor has no place in the policy, another shape, or is of a kind that cannot be merged.
        IncompleteCheckpoint: the adapter's configuration has not come.
        MalformedCheckpoint: it is of a kind that is not merged here.
        UnusableBase: the base does not fit, or lacks a weight that the adapter adds to.
    """
    with blaming(base.path, adapter.path):
        plan = plan_module.plan_of(base.tensors, layout, settings, base.path)
    try:
        config = read_config(adapter.source, adapter.parts.files[0].parent / CONFIG)
    except OSError as exc:
        raise unreadable(adapter.path, exc) from exc
    entries = {name: entry for entry in layout.tensors for name in entry.names}
    halves: dict[tuple[str, bool], dict[str, StoredTensor]] = {}
    others: dict[str, StoredTensor] = {}
    rows: list[Difference] = []
    for stored, tensor in adapter.tensors.items():
        name = stored.removeprefix(_ROOT)
        match = _LORA.fullmatch(name)
        half = halves.setdefault((match[1], bool(match[2])), {}) if match else others
        if (key := match[3] if match else name) in half:
            rows.append(Difference(stored, "one tensor", f"{half[key].name} is the same, too"))
        half[key] = tensor
    own = _replace(others, entries, settings, layout, rows)
    deltas, lacking = _add(halves, entries, config, settings, own, plan, rows)
    if not (rows or deltas or lacking or own.pairs):
        rows = [Difference(t.name, "absent", describe(t.dtype, t.shape)) for t in adapter.tensors.values()]
    if rows:
        raise CheckpointMismatch(
            f"{adapter.path} is an adapter that cannot be merged into the policy: {len(rows)} of its tensors have no "
            "place. Check that the spec's base is the one that it was trained on.",
            tuple(sorted(rows, key=lambda row: row.name)),
        )
    if lacking:
        with blaming(base.path, adapter.path):
            held = f"{base.path} lacks {len(lacking)} of the weights that the adapter adds to."
            raise CheckpointMismatch(held, tuple(lacking))
    replaced = {entry.name for _, entry in own.pairs}
    added = {delta.entry.name for delta in deltas}
    kept = tuple(entry for entry in plan.kept if entry.name not in replaced)
    built = tuple(entry for entry in plan.built if entry.name not in replaced)
    merge = Merge(plan.without(replaced | added), tuple(deltas))
    return replace(own.without(added), kept=kept, built=built, settings=settings, merge=merge)


def _replace(
    tensors: Mapping[str, StoredTensor],
    entries: Mapping[str, TensorEntry],
    settings: Fit,
    layout: Layout,
    rows: list[Difference],
) -> Plan:
    """What an adapter replaces (``modules_to_save``, biases); adds to ``rows`` what has no place."""
    pairs: list[Pair] = []
    twins: list[Pair] = []
    taken: dict[str, StoredTensor] = {}
    for bare, tensor in tensors.items():
        name = settings.name(bare.replace(_BASE, "."))  # what was trained, or saved, of an adapted module
        entry = entries.get(name) if name is not None else None
        more = None if entry else _MORE.match(bare)
        if more:  # it belongs to a weight, and is left out with it alone
            name = settings.name(f"{more[1]}.weight")
        castable = settings.cast and entry and is_castable(tensor.dtype, entry.dtype)
        if name is None or not (entry or more or settings.strict):
            continue
        if entry is None or tensor.shape != entry.shape or not (tensor.dtype == entry.dtype or castable):
            expected = entry.describe() if entry else "absent"
            rows.append(Difference(tensor.name, expected, describe(tensor.dtype, tensor.shape)))
        elif name in taken:
            rows.append(Difference(tensor.name, "one tensor", f"{taken[name].name} is also named {name}"))
        elif taken.keys() & set(entry.names):
            twins.append((tensor, entry))
        else:
            pairs.append((tensor, entry))
        taken[name] = tensor
    return Plan(layout, tuple(pairs), tuple(twins))


def _add(
    halves: Mapping[tuple[str, bool], dict[str, StoredTensor]],
    entries: Mapping[str, TensorEntry],
    config: Config,
    settings: Fit,
    own: Plan,
    base: Plan,
    rows: list[Difference],
) -> tuple[list[Delta], list[Difference]]:
    """What an adapter adds to which weights, and which neither plan brings; adds to ``rows`` what has no place."""
    lacking: list[Difference] = []
    deltas: list[Delta] = []
    brought, of_base = ({entry.name: stored for stored, entry in plan.pairs} for plan in (own, base))
    modules = {name.rpartition(".")[0] for name in entries}
    added: dict[str, str] = {}  # one tensor gets one delta: of tied modules with one each, none has the other's
    added |= {entry.name: t.name for t, entry in (*own.pairs, *own.twins) if _BASE not in t.name}
    for (module, embedding), half in halves.items():
        name = settings.name(f"{module}.weight")
        entry = entries.get(name) if name is not None else None
        if name is None or not (entry or settings.strict or name.rpartition(".")[0] in modules):
            continue
        transposed = embedding or config.transposed
        if entry is None or half.keys() != {"A", "B"} or not _multiplies(half["A"], half["B"], entry, transposed):
            found = " and ".join(f"{key} {describe(half[key].dtype, half[key].shape)}" for key in sorted(half))
            expected = entry.describe() if entry else "absent"
            rows.append(Difference(f"{module}.weight", expected, f"an adapter of {found}"))
        elif (rank := half["A"].shape[0]) > _highest(entry):
            rows.append(Difference(f"{module}.weight", f"a rank of {_highest(entry):,} at most", f"{rank:,}"))
        elif entry.name in added:
            rows.append(
                Difference(f"{module}.weight", "one tensor", f"{added[entry.name]} is the same tensor in the policy")
            )
        elif weight := brought.get(entry.name) or of_base.get(entry.name):
            scale = config.scale(module, rank)
            deltas.append(Delta(entry, half["A"], half["B"], scale, transposed, weight, entry.name not in brought))
            added[entry.name] = half["A"].name
        else:
            lacking.append(Difference(entry.name, entry.describe(), "absent"))
    return deltas, lacking


def _multiplies(a: StoredTensor, b: StoredTensor, entry: TensorEntry, transposed: bool) -> bool:
    if not len(a.shape) == len(b.shape) == len(entry.shape) == 2 or 0 in (*a.shape, *b.shape):
        return False
    if not {a.dtype, b.dtype, entry.dtype} <= FLOATS:
        return False
    product = (b.shape[0], a.shape[1])
    return a.shape[0] == b.shape[1] and entry.shape == (product[::-1] if transposed else product)


def _highest(entry: TensorEntry) -> int:
    """The highest rank that is taken: one that a weight can have, and any other while the halves stay small."""
    return max(min(entry.shape), _SMALL // sum(entry.shape))
