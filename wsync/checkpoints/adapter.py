"""Plans how a PEFT adapter reaches a policy: as the policy's own adapter, or merged into its base weights.

The layout of the files is PEFT's (https://github.com/huggingface/peft, ``tuners/lora``): a tensor
``base_model.model.<module>.lora_A.weight`` of shape (r, in), its ``lora_B`` of shape (out, r), and the adapter's
``adapter_config.json``. Only the spec says where the base is.

A policy may be a PEFT model itself. PEFT leaves the adapter's name out when it saves: ``lora_A.weight`` is
``lora_A.default.weight`` in the policy. The same goes for ``modules_to_save`` (``utils/save_and_load.py``). An adapter
has no base weights: they keep their live values, come from ``base``, or stay as the policy is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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
from ..fitting.cast import Pair
from ..fitting.fit import FLOATS, Fit
from ..fitting.header import StoredTensor
from ..fitting.plan import Delta, Merge, Plan, plan_of
from ..layout.filenames import CONFIG
from ..layout.layout import Layout, TensorEntry, describe
from .adapter_config import Config, read_config
from .files.parts import unreadable
from .tensor_table import TensorTable

_SMALL = 1 << 24  # elements in both halves for which any rank is taken; a hostile 4 KiB file can claim any
_ROOT = "base_model.model."
_BASE = ".base_layer."
_LORA = re.compile(r"(.*)\.lora_(embedding_)?([AB])(?:\.weight)?")
_OWN = re.compile(r"\.(?:lora_\w+|modules_to_save)\.([^.]+)(?:\.|$)")
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


def plan_adapter(
    adapter: TensorTable, layout: Layout, settings: Fit, exc: CheckpointMismatch | PartialCheckpoint
) -> Plan:
    """Plans an adapter: into the policy's own adapter where one fits, else merged into a base.

    Args:
        adapter: its ``base`` is set to the opened base.
        exc: why it does not fit as it is.

    Raises:
        CheckpointMismatch: there is no base; a tensor has no place in the policy, another shape, or is of a kind that
            cannot be merged.
        PartialCheckpoint: there are no live values for the base's weights to keep.
        IncompleteCheckpoint: the adapter's configuration has not come.
        MalformedCheckpoint: wsync cannot merge its kind.
        UnusableBase: the base does not fit, or lacks a weight that the adapter adds to.
    """
    own = _named_by_policy(adapter.tensors, layout)
    if own is None and not settings.base:
        has = any(_OWN.search(name) for entry in layout.tensors for name in entry.names)
        policy = "the policy's own adapters have other tensors" if has else "the policy has no adapters"
        raise CheckpointMismatch(
            f"{adapter.path} is an adapter, and {policy}. Name the weights that it is merged "
            'into: base = "…" in [weights].',
            exc.differences,
        ) from None
    if settings.base and not adapter.base:
        adapter.base = _open_base(settings.base, adapter.path, adapter.settle)
    if own is not None:
        return _plan_own(own, adapter.base, layout, settings, adapter.path)
    assert adapter.base
    return _plan_merge(adapter, adapter.base, layout, settings)


def _open_base(path: str, adapter: Path, settle: float) -> TensorTable:
    """Opens the weights that an adapter is merged into."""
    with blaming(path, adapter):
        base = TensorTable(path, settle=settle)
        if not base.parts.is_adapter:
            return base
        base.close()
        raise CheckpointError(f"{base.path} is an adapter itself. Name the weights that both were trained on.")


def _named_by_policy(tensors: Mapping[str, StoredTensor], layout: Layout) -> dict[str, StoredTensor] | None:
    """An adapter's tensors under the names of the policy's own adapter; None unless one has them all.

    Of several adapters in the policy, ``default`` comes first.
    """
    names = [name for entry in layout.tensors for name in entry.names]
    adapters = {match[1] for name in names if (match := _OWN.search(name))}
    for adapter in sorted(adapters, key=lambda each: (each != "default", each)):
        saved = {each: name for name in names for each in _saved_as(name, adapter)}
        if tensors.keys() <= saved.keys():
            return {saved[name]: tensor for name, tensor in tensors.items()}
    return None


def _plan_own(
    tensors: Mapping[str, StoredTensor], base: TensorTable | None, layout: Layout, settings: Fit, path: Path
) -> Plan:
    """Plans an adapter's tensors, under the policy's names, together with the base's."""
    own = replace(settings, prefix="", rename={}, include=(), exclude=(), strict=False)
    if base is None:
        return plan_of(tensors, layout, own, path)
    own = replace(own, partial=True)
    known = {name for entry in layout.tensors for name in entry.names}
    named = {name: tensor for stored, tensor in base.tensors.items() if (name := _in_policy(stored, known))}
    return _together(plan_of(tensors, layout, own, path), plan_of(named, layout, own, path), ())


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
    """A base tensor's name in a PEFT model; empty if it has none."""
    module, _, leaf = f"{_ROOT}{stored}".rpartition(".")
    names = (stored, f"{module}.{leaf}", f"{module}.base_layer.{leaf}", f"{module}.original_module.{leaf}")
    return next((name for name in names if name in known), "")


def _plan_merge(adapter: TensorTable, base: TensorTable, layout: Layout, settings: Fit) -> Plan:
    """How an adapter is merged into a policy's weights."""
    with blaming(base.path, adapter.path):
        plan = plan_of(base.tensors, layout, settings, base.path)
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
    named = _for_names(settings, [f"{module}.weight" for module, _ in halves], entries)
    own = _replace(others, entries, named, layout, rows)
    deltas, lacking = _add(halves, entries, config, named, own, plan, rows)
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
    return _together(replace(own, settings=settings), plan, tuple(deltas))


def _for_names(settings: Fit, names: Sequence[str], entries: Mapping[str, TensorEntry]) -> Fit:
    """The settings for an adapter: without renames, which are the base's, where only so its names are the policy's."""
    renamed = [settings.name(name) for name in names]
    is_lost = any(name is not None and name not in entries for name in renamed)
    return replace(settings, prefix="", rename={}) if is_lost and entries.keys() >= {*names} else settings


def _together(own: Plan, base: Plan, deltas: tuple[Delta, ...]) -> Plan:
    """Joins what an adapter brings, what its base brings and the deltas for either into one plan."""
    added = {delta.entry.name for delta in deltas}
    replaced = {entry.name for _, entry in own.pairs}
    kept = tuple(entry for entry in base.kept if entry.name not in replaced)
    built = tuple(entry for entry in base.built if entry.name not in replaced)
    return replace(own.without(added), kept=kept, built=built, merge=Merge(base.without(replaced | added), deltas))


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
        if more:  # belongs to a weight and is left out only with it
            name = settings.name(f"{more[1]}.weight")
        if name is None or not (entry or more or settings.strict):
            continue
        if entry is None or tensor.shape != entry.shape or not settings.takes(tensor.dtype, entry.dtype):
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
    """The deltas, and the adapted weights that neither plan brings; adds what has no place to ``rows``."""
    lacking: list[Difference] = []
    deltas: list[Delta] = []
    brought, of_base = ({entry.name: stored for stored, entry in plan.pairs} for plan in (own, base))
    modules = {name.rpartition(".")[0] for name in entries}
    added: dict[str, str] = {}  # one delta per tensor: tied modules with one each cannot share a merged weight
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
    """The highest rank accepted: the most that a weight can have, or more while the halves stay small."""
    return max(min(entry.shape), _SMALL // sum(entry.shape))
