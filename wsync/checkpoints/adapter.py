"""Plans how a PEFT adapter reaches a policy: loaded into the policy's own adapter, or merged into base weights.

The files are PEFT's (https://github.com/huggingface/peft, ``tuners/lora``): for each adapted module a tensor
``base_model.model.<module>.lora_A.weight`` of shape (r, in) and a ``lora_B`` of shape (out, r), and for all of them one
``adapter_config.json``. The location of the base comes from the spec, never from these files.

A policy may be a PEFT model itself. PEFT drops the adapter's name when it saves: the policy's ``lora_A.default.weight``
is ``lora_A.weight`` in the file. It does the same for ``modules_to_save`` (``utils/save_and_load.py``). The files hold
no base weights: these come from ``base``, keep their live values, or keep the values that the policy is built with.
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

_SMALL = 1 << 24  # elements of A and B together up to which any rank is taken; a hostile 4 KiB file can claim any rank
_ROOT = "base_model.model."
_BASE = ".base_layer."
_LORA = re.compile(r"(.*)\.lora_(embedding_)?([AB])(?:\.weight)?")
_OWN = re.compile(r"\.(?:lora_\w+|modules_to_save)\.([^.]+)(?:\.|$)")
_MORE = re.compile(r"(.*?)\.(?:lora_|token_adapter\.)")  # a tensor that PEFT adds to a module


@contextmanager
def blaming(base: object, adapter: Path) -> Iterator[None]:
    """Converts an error about the base into one that names base and adapter, and does not reject the adapter."""
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
        reason = unreadable(Path(str(base)), exc) if isinstance(exc, OSError) else exc
        raise CheckpointError(f"the base of the adapter {adapter} cannot be opened: {reason}") from exc


def plan_adapter(
    adapter: TensorTable, layout: Layout, settings: Fit, exc: CheckpointMismatch | PartialCheckpoint
) -> Plan:
    """Plans an adapter: loaded into the policy's own adapter if one has all its tensors, else merged into a base.

    Args:
        adapter: its ``base`` is set if the settings name one.
        exc: why the adapter does not fit as an ordinary checkpoint; its differences are listed if there is no base.

    Raises:
        CheckpointMismatch: there is no base; or a tensor has no place in the policy, has another shape, or is of a kind
            that cannot be merged.
        PartialCheckpoint: there are no live values for the base's weights to keep.
        IncompleteCheckpoint: the adapter's configuration is missing or cut off.
        MalformedCheckpoint: wsync cannot merge this kind of adapter.
        UnusableBase: the base does not fit, or lacks a weight that the adapter adds to.
        CheckpointError: the base cannot be opened.
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
    with blaming(path, adapter):
        base = TensorTable(path, settle=settle)
        if not base.parts.is_adapter:
            return base
        base.close()
        raise CheckpointError(f"{base.path} is an adapter itself. Name the weights that both were trained on.")


def _named_by_policy(tensors: Mapping[str, StoredTensor], layout: Layout) -> dict[str, StoredTensor] | None:
    """Renames an adapter's tensors to those of an adapter in the policy; None if no adapter there has all of them."""
    names = [name for entry in layout.tensors for name in entry.names]
    adapters = {match[1] for name in names if (match := _OWN.search(name))}
    for adapter in sorted(adapters, key=lambda each: (each != "default", each)):  # PEFT's default name first
        saved = {each: name for name in names for each in _saved_as(name, adapter)}
        if tensors.keys() <= saved.keys():
            return {saved[name]: tensor for name, tensor in tensors.items()}
    return None


def _plan_own(
    tensors: Mapping[str, StoredTensor], base: TensorTable | None, layout: Layout, settings: Fit, path: Path
) -> Plan:
    """Plans an adapter's tensors, given by their names in the policy, and those of the base if there is one."""
    own = replace(settings, prefix="", rename={}, include=(), exclude=(), strict=False)
    if base is None:
        return plan_of(tensors, layout, own, path)
    own = replace(own, partial=True)
    known = {name for entry in layout.tensors for name in entry.names}
    named = {name: tensor for stored, tensor in base.tensors.items() if (name := _in_policy(stored, known))}
    return _together(plan_of(tensors, layout, own, path), plan_of(named, layout, own, path), ())


def _saved_as(name: str, adapter: str) -> Iterator[str]:
    """Yields the names under which PEFT may save this tensor of the policy; none unless it is of this adapter."""
    match = _OWN.search(name)
    if match is None or match[1] != adapter:
        return
    bare = name[: match.start(1) - 1] + name[match.end(1) :]
    yield bare
    yield bare.replace(".modules_to_save.", ".").removesuffix(".modules_to_save")
    yield bare.removesuffix(".weight")  # lora_magnitude_vector


def _in_policy(stored: str, known: set[str]) -> str:
    """The name of a base's tensor in a policy that is a PEFT model; empty if it has none."""
    module, _, leaf = f"{_ROOT}{stored}".rpartition(".")
    names = (stored, f"{module}.{leaf}", f"{module}.base_layer.{leaf}", f"{module}.original_module.{leaf}")
    return next((name for name in names if name in known), "")


def _plan_merge(adapter: TensorTable, base: TensorTable, layout: Layout, settings: Fit) -> Plan:
    with blaming(base.path, adapter.path):
        plan = plan_of(base.tensors, layout, settings, base.path)
    try:
        config = read_config(adapter.source, adapter.parts.files[0].parent / CONFIG)
    except OSError as exc:
        raise unreadable(adapter.path, exc) from exc
    entries = {name: entry for entry in layout.tensors for name in entry.names}
    loras: dict[tuple[str, bool], dict[str, StoredTensor]] = {}  # by module, and whether it is an embedding
    others: dict[str, StoredTensor] = {}
    rows: list[Difference] = []
    for stored, tensor in adapter.tensors.items():
        name = stored.removeprefix(_ROOT)
        match = _LORA.fullmatch(name)
        group = loras.setdefault((match[1], bool(match[2])), {}) if match else others
        if (key := match[3] if match else name) in group:
            rows.append(Difference(stored, "one tensor", f"{group[key].name} is the same tensor"))
        group[key] = tensor
    named = _for_names(settings, [f"{module}.weight" for module, _ in loras], entries)
    own = _replace(others, entries, named, layout, rows)
    deltas, lacking = _add(loras, entries, config, named, own, plan, rows)
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
            message = f"{base.path} lacks {len(lacking)} of the weights that the adapter adds to."
            raise CheckpointMismatch(message, tuple(lacking))
    return _together(replace(own, settings=settings), plan, tuple(deltas))


def _for_names(settings: Fit, names: Sequence[str], entries: Mapping[str, TensorEntry]) -> Fit:
    """The settings for an adapter's names: the base's prefix and renames are dropped if only then all names match."""
    renamed = [settings.name(name) for name in names]
    is_lost = any(name is not None and name not in entries for name in renamed)
    return replace(settings, prefix="", rename={}) if is_lost and entries.keys() >= {*names} else settings


def _together(own: Plan, base: Plan, deltas: tuple[Delta, ...]) -> Plan:
    """Joins the adapter's plan, the base's plan and the deltas into one plan."""
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
    """Plans the tensors that an adapter replaces (``modules_to_save``, biases); adds what does not fit to ``rows``."""
    pairs: list[Pair] = []
    twins: list[Pair] = []
    taken: dict[str, StoredTensor] = {}
    for bare, tensor in tensors.items():
        name = settings.name(bare.replace(_BASE, "."))  # PEFT keeps an adapted module's own tensors in base_layer
        entry = entries.get(name) if name is not None else None
        more = None if entry else _MORE.match(bare)
        if more:  # left out only together with the weight of its module
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
    loras: Mapping[tuple[str, bool], dict[str, StoredTensor]],
    entries: Mapping[str, TensorEntry],
    config: Config,
    settings: Fit,
    own: Plan,
    base: Plan,
    rows: list[Difference],
) -> tuple[list[Delta], list[Difference]]:
    """Returns the deltas, and the adapted weights that neither plan reads; adds what does not fit to ``rows``."""
    lacking: list[Difference] = []
    deltas: list[Delta] = []
    brought, of_base = ({entry.name: stored for stored, entry in plan.pairs} for plan in (own, base))
    modules = {name.rpartition(".")[0] for name in entries}
    added: dict[str, str] = {}  # by weight, what changes it: tied modules share one, which takes one delta
    added |= {entry.name: t.name for t, entry in (*own.pairs, *own.twins) if _BASE not in t.name}
    for (module, embedding), lora in loras.items():
        name = settings.name(f"{module}.weight")
        entry = entries.get(name) if name is not None else None
        if name is None or not (entry or settings.strict or name.rpartition(".")[0] in modules):
            continue
        transposed = embedding or config.transposed
        if entry is None or lora.keys() != {"A", "B"} or not _multiplies(lora["A"], lora["B"], entry, transposed):
            found = " and ".join(f"{key} {describe(lora[key].dtype, lora[key].shape)}" for key in sorted(lora))
            expected = entry.describe() if entry else "absent"
            rows.append(Difference(f"{module}.weight", expected, f"an adapter of {found}"))
        elif (rank := lora["A"].shape[0]) > _highest(entry):
            rows.append(Difference(f"{module}.weight", f"a rank of {_highest(entry):,} at most", f"{rank:,}"))
        elif entry.name in added:
            rows.append(
                Difference(f"{module}.weight", "one tensor", f"{added[entry.name]} is the same tensor in the policy")
            )
        elif weight := brought.get(entry.name) or of_base.get(entry.name):
            scale = config.scale(module, rank)
            deltas.append(Delta(entry, lora["A"], lora["B"], scale, transposed, weight, entry.name not in brought))
            added[entry.name] = lora["A"].name
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
    """The highest rank accepted: the weight's smaller dimension, or more while A and B stay within ``_SMALL``."""
    return max(min(entry.shape), _SMALL // sum(entry.shape))
