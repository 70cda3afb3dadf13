"""Weights as callers bring them: a module, a TensorDict, a dict; nested, with tuple keys, or with dotted names.

All become a table from path (a tuple of names) to tensor, which is checked as a whole against the policy's tensors
before a byte is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from .tensor_names import seen_through
from .tensor_subclasses import check_copy, copy_each, runs_code

Path = tuple[str, ...]
Weights = torch.nn.Module | TensorDictBase | Mapping[Any, Any]

_INTS = {
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
}
TAKEN = "an nn.Module, a TensorDict, a dict of tensors (nested, or with dotted names), or None"


def extract(weights: object) -> TensorDictBase | Mapping[Any, Any]:
    """A module's parameters and all its buffers as a TensorDict; a TensorDict or dict as it is.

    Raises:
        TypeError: they are something else.
    """
    if isinstance(weights, TensorDictBase | Mapping):
        return weights
    if isinstance(weights, torch.nn.Module):
        table: TensorDictBase = TensorDict.from_module(weights)
        return table
    raise TypeError(f"weights are {TAKEN}; a TensorDict is what torchrl uses. Got a {type(weights).__name__}.")


def flatten(weights: object) -> dict[Path, torch.Tensor]:
    """Every tensor by its path; names are split at their dots.

    Raises:
        TypeError: a key is not a name, or a value is not a tensor.
        ValueError: a path is given twice, such as once nested and once dotted.
    """
    table: dict[Path, torch.Tensor] = {}
    for path, tensor in _leaves(extract(weights), ()):
        if path in table:
            raise ValueError(f"{dotted(path)!r} is given twice, under two spellings. Give each tensor once.")
        table[path] = tensor
    return table


def dotted(path: Iterable[str]) -> str:
    return ".".join(path)


def aligned(targets: Mapping[Path, torch.Tensor], sources: Mapping[Path, torch.Tensor]) -> dict[Path, torch.Tensor]:
    """The sources, under their targets' names if the two names differ only by wrappers."""
    paths = {dotted(path): path for path in (*sources, *targets)}
    homes = seen_through(map(dotted, sources), {dotted(path) for path in targets})
    return {
        paths[homes.get(name, name)]: source
        for name, source in zip(map(dotted, sources), sources.values(), strict=True)
    }


def check(
    targets: Mapping[Path, torch.Tensor],
    sources: Mapping[Path, torch.Tensor],
    *,
    strict: bool = False,
    finite: bool = False,
) -> None:
    """Checks that every source fits its target.

    Args:
        strict: whether every target must have a source; for tied targets, one is enough.
        finite: whether to refuse NaN and infinity, also after the cast to the target's dtype, except for infinities
            that the target already has in the same places.

    Raises:
        KeyError: a name is unknown, or, with ``strict``, missing.
        ValueError: a shape differs, a source is not finite, or tied targets have different sources.
        CopyRefused: a tensor's class refuses copies into it or out of it; also a TypeError.
        TypeError: a source or target is not a plain tensor; or a target's dtype cannot hold the values, such as an
            int's for a float or a wider int. Floats are cast to any float dtype.
    """
    for path, source in sources.items():
        target = targets.get(path)
        if target is None:
            raise KeyError(f"{dotted(path)!r} is unknown: the policy has no such tensor. It has {_some(targets)}.")
        _check_plain(path, source, target)
        if source.shape != target.shape:
            raise ValueError(
                f"{dotted(path)!r} has shape {list(source.shape)}, the policy's has {list(target.shape)}. Nothing was "
                "written; give a tensor of that shape."
            )
        if source.dtype != target.dtype and not _holds(target.dtype, source.dtype):
            raise TypeError(
                f"{dotted(path)!r} is {source.dtype}, the policy's is {target.dtype}, which cannot hold its values. "
                "Nothing was written; convert it first."
            )
        check_copy(dotted(path), target, source)
        if finite and not _is_finite(source, target.dtype) and not has_no_other_infinities(source, target):
            raise ValueError(f"{dotted(path)!r} holds NaN or infinity. Nothing was written; see what the trainer did.")
    if strict and targets.keys() - sources.keys():
        given = {_where(targets[path]) for path in sources}
        if missing := [path for path, target in targets.items() if path not in sources and _where(target) not in given]:
            raise KeyError(
                f"{len(missing)} tensors are missing: {_some(missing)}. Give all of them, or set strict=False."
            )
    _check_ties(targets, sources)


def copy(targets: Mapping[Path, torch.Tensor], sources: Mapping[Path, torch.Tensor]) -> None:
    """Copies checked sources into their targets, which keep their memory.

    A source in the memory of any target is cloned first, because a copy may overwrite it.

    Raises:
        CopyRefused: a tensor's class refused its copy after all; all targets have the values that they had.
        HalfWritten: a class refused its copy, and the targets already written could not be restored.
    """
    memory = {t.untyped_storage()._cdata for t in targets.values()}
    pairs = []
    for path, source in sources.items():
        target = targets[path]
        if source is target:
            continue
        if source.untyped_storage()._cdata in memory:
            source = source.detach().clone()
        pairs.append((target, source))
    own = [pair for pair in pairs if any(map(runs_code, pair))]
    plain = [pair for pair in pairs if not any(map(runs_code, pair))]
    with torch.inference_mode(any(target.is_inference() for target, _ in pairs)), torch.no_grad():
        if own:
            copy_each(*zip(*own, strict=True))
        if plain:
            torch._foreach_copy_([target for target, _ in plain], [source for _, source in plain])


def _check_plain(path: Path, source: torch.Tensor, target: torch.Tensor) -> None:
    """Checks that the source has values, and the target a place for each, so that no copy fails half-way."""
    for tensor in (source, target):
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            kind = "on the meta device" if tensor.is_meta else "sparse, nested or quantised"
            raise TypeError(
                f"{'the policy has' if tensor is target else 'given is'} a {dotted(path)!r} that is {kind}. Nothing "
                "was written: weights are plain tensors with values, as to_dense() or dequantize() return them."
            )
    strides = () if target.is_contiguous() else zip(target.shape, target.stride(), strict=True)
    if any(size > 1 and not stride for size, stride in strides):
        raise TypeError(
            f"the policy has a {dotted(path)!r} that is expanded: several of its elements share one place in memory. "
            "Nothing was written; clone() it in the policy first."
        )


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype can hold the values of another; torch casts ints to narrower ones, too, and they wrap around."""
    if {dtype, other} <= _INTS:
        mine, theirs = torch.iinfo(dtype), torch.iinfo(other)
        return mine.min <= theirs.min and theirs.max <= mine.max
    return torch.can_cast(other, dtype)


def _is_finite(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor's values are finite, and remain so when cast to this dtype."""
    for values in (tensor.detach().to(each) for each in {tensor.dtype, dtype}):
        if values.is_floating_point() and values.element_size() == 1:  # torch.isfinite does not know these
            values = values.float()
        if not bool(torch.isfinite(values).all()):
            return False
    return True


def has_no_other_infinities(source: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether each value is finite, also in the policy's dtype, or is the infinity that the policy's own tensor has."""
    if source.shape != own.shape:
        return False
    cast = source.detach().to(own.dtype)
    given, cast, own = (each.detach().to("cpu", torch.float64) for each in (source, cast, own))
    return bool((given.isfinite() & cast.isfinite() | (given == own) & (cast == own)).all())


def with_infinities(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Clones of the tensors that hold an infinity, as masks and bounds do, by name."""
    floats = [(n, t) for n, t in tensors if t.is_floating_point() and not t.is_meta and not runs_code(t)]
    floats = [(n, t) for n, t in floats if t.dtype != torch.float4_e2m1fn_x2]  # has no infinity, and no cast
    return {n: t.detach().clone() for n, t in floats if bool(t.detach().to(torch.float64).isinf().any())}


def _leaves(weights: object, prefix: Path) -> Iterator[tuple[Path, torch.Tensor]]:
    if isinstance(weights, torch.Tensor):
        yield prefix, weights
    elif isinstance(weights, TensorDictBase | Mapping):
        for key, value in weights.items():
            yield from _leaves(value, prefix + _names(key))
    else:
        raise TypeError(f"{dotted(prefix)!r} is a {type(weights).__name__}, not a tensor. Weights are {TAKEN}.")


def _names(key: object) -> Path:
    if isinstance(key, str):
        return tuple(key.split("."))
    if isinstance(key, tuple) and key and all(isinstance(part, str) for part in key):
        return tuple(name for part in key for name in part.split("."))
    raise TypeError(f"{key!r} cannot name a tensor. Use a string or a tuple of strings; weights are {TAKEN}.")


def _check_ties(targets: Mapping[Path, torch.Tensor], sources: Mapping[Path, torch.Tensor]) -> None:
    first: dict[object, Path] = {}
    for path in sources:
        other = first.setdefault(_where(targets[path]), path)
        if other != path and not torch.equal(sources[path], sources[other]):
            raise ValueError(
                f"{dotted(other)!r} and {dotted(path)!r} are one tensor in the policy, but two different ones in the "
                "weights given. Nothing was written; give equal ones, or only one."
            )


def _where(target: torch.Tensor) -> object:
    """A key that is equal for tied tensors, as in ``layout_of_tensors``."""
    place = target.data_ptr(), target.shape, target.stride(), target.dtype
    return place if place[0] else id(target)  # an empty tensor has no address


def _some(paths: Iterable[Path]) -> str:
    names = sorted(dotted(path) for path in paths)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
