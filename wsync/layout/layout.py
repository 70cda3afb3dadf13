"""What a policy's weights look like: names, dtypes, shapes, byte offsets and tied names.

A layout is data and nothing else: it knows neither files nor memory. Tensors follow one another without gaps, in the
order in which safetensors writes them (widest dtype first, then by name), so that a checkpoint of just these tensors is
one contiguous copy, and every tensor is aligned to its own element.

Tied weights (one storage under several names) are stored once, under the first of their names in sorted order, which
is also the name that ``safetensors.torch.save_model`` keeps; the others are its ``aliases``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import Difference, SpecError
from .tensor_names import bare, matching, seen_through

if TYPE_CHECKING:
    import torch

_DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "F4": (4, "float4_e2m1fn_x2"),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}
"""Bits per element of each safetensors dtype, and torch's name for it (None if it has no such dtype).

They are in safetensors' order; a file has the last of them first.
"""

DTYPE_BITS = {dtype: bits for dtype, (bits, _) in _DTYPES.items()}
TORCH_DTYPES = {dtype: attribute for dtype, (_, attribute) in _DTYPES.items() if attribute}
_FROM_TORCH = {f"torch.{attribute}": dtype for dtype, attribute in TORCH_DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES)}


class TensorEntry(NamedTuple):
    """One tensor of a layout.

    Attributes:
        name: the first of its names in sorted order.
        dtype: a safetensors dtype, such as ``"F32"``.
        shape: its dimensions.
        offset: where it begins in the weights, in bytes.
        aliases: the other names of the same storage, sorted.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    aliases: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def describe(self) -> str:
        return describe(self.dtype, self.shape)


@dataclass(frozen=True)
class Layout:
    """The tensors of a policy, in the order of their bytes."""

    tensors: tuple[TensorEntry, ...]

    @classmethod
    def build(cls, tensors: Mapping[str, tuple[str, tuple[int, ...]]], ties: Mapping[str, str]) -> Layout:
        """Orders tensors and gives each its offset.

        Args:
            tensors: dtype and shape of each tensor, by its name; without aliases.
            ties: for each alias, the name that it is tied to.
        """
        aliases: dict[str, list[str]] = {}
        for alias, name in ties.items():
            aliases.setdefault(name, []).append(alias)
        entries: list[TensorEntry] = []
        offset = 0
        for name in sorted(tensors, key=lambda name: (-_RANK[tensors[name][0]], name)):
            dtype, shape = tensors[name]
            entry = TensorEntry(name, dtype, shape, offset, tuple(sorted(aliases.get(name, ()))))
            entries.append(entry)
            offset += entry.nbytes
        return cls(tuple(entries))

    @cached_property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, dtypes, shapes and ties: equal for equal architectures."""
        import hashlib  # OpenSSL takes 4 ms to load, and a pass with nothing to do needs no digest

        return hashlib.sha256(json.dumps(self.to_json()["tensors"]).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        rows = [[e.name, e.dtype, list(e.shape), list(e.aliases)] for e in self.tensors]
        return {"tensors": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        ties: dict[str, str] = {}
        for name, dtype, shape, aliases in data["tensors"]:
            tensors[name] = (dtype, tuple(shape))
            ties.update(dict.fromkeys(aliases, name))
        return cls.build(tensors, ties)

    def names_in(self, other: Layout) -> dict[str, str] | None:
        """Maps each name to its name in another layout of the same tensors; None if those differ.

        Ignores what wraps modules (see ``tensor_names``).
        """
        mine = [name for entry in self.tensors for name in entry.names]
        if self.digest == other.digest:
            return dict(zip(mine, mine, strict=True))
        homes = seen_through(mine, {name for entry in other.tensors for name in entry.names})
        tensors, ties = {}, {}
        for entry in self.tensors:
            first, *aliases = sorted(homes.get(name, name) for name in entry.names)
            tensors[first] = (entry.dtype, entry.shape)
            ties.update(dict.fromkeys(aliases, first))
        if Layout.build(tensors, ties).digest != other.digest:
            return None
        return {name: homes.get(name, name) for name in mine}

    def without(self, globs: Sequence[str]) -> Layout:
        """This layout without the tensors that have a name which a glob matches."""
        out = matching((name for entry in self.tensors for name in entry.names), globs)
        left = [entry for entry in self.tensors if out.isdisjoint(entry.names)]
        ties = {alias: entry.name for entry in left for alias in entry.aliases}
        return Layout.build({entry.name: (entry.dtype, entry.shape) for entry in left}, ties) if out else self

    def more_than(self, other: Layout) -> list[str]:
        """The names that only this layout has; empty if anything else differs, too."""
        names = {name for entry in other.tensors for name in entry.names}
        more = [name for entry in self.tensors for name in entry.names if name not in names]
        import glob  # not on the way of a push with nothing to do

        return more if more and self.without([glob.escape(name) for name in more]).digest == other.digest else []

    def advice(self, other: Layout) -> str:
        """What to do if a segment has another layout than this policy; empty if the names give no hint."""
        mine, theirs = (sorted(name for e in each.tensors for name in e.names) for each in (self, other))
        outer = mine[0].removesuffix(theirs[0])
        if outer and mine == sorted(outer + name for name in theirs):
            return (
                f"The policy's names begin with {outer!r}, and the segment's are the same without it: give the part "
                f"inside, policy.{outer.strip('.')}."
            )
        outer = theirs[0].removesuffix(mine[0])
        if outer and theirs == sorted(outer + name for name in mine):
            return (
                f"The segment's names begin with {outer!r}, and the policy's are the same without it: the publisher "
                f"should give the part inside, policy.{outer.strip('.')}."
            )
        return ""

    def differences(self, other: Layout) -> tuple[Difference, ...]:
        """What ``other`` has that this layout does not expect, and the reverse, tensor by tensor."""
        expected = {name: e for e in self.tensors for name in e.names}
        found = {name: e for e in other.tensors for name in e.names}
        rows = []
        for name in sorted(expected.keys() | found.keys()):
            mine, theirs = expected.get(name), found.get(name)
            if mine and theirs and (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape):
                if mine.names != theirs.names:
                    rows.append(Difference(name, _tie(mine, name), _tie(theirs, name)))
            else:
                rows.append(
                    Difference(
                        name,
                        mine.describe() if mine else "absent",
                        theirs.describe() if theirs else "absent",
                    )
                )
        return tuple(rows)


def describe(dtype: str, shape: Iterable[int]) -> str:
    return f"{dtype} [{', '.join(map(str, shape))}]"


def _tie(entry: TensorEntry, name: str) -> str:
    others = [other for other in entry.names if other != name]
    return f"tied to {', '.join(others)}" if others else "not tied"


def named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of a module, each under every name that it has in its ``state_dict()``.

    Those are the names under which trainers save. They may differ from the names in the modules, for example if one is
    wrapped for activation checkpointing. A tensor that is not in the ``state_dict()`` has its name in the modules.

    The wrappers of ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` are left out of the names.

    Raises:
        SpecError: the module's own code failed.
    """
    saved = _saved_names(module)
    for name, tensor in _in_modules(module):
        others = saved.get(id(tensor)) or saved.get(tied_key(tensor)) or () if saved else ()
        same = [other for other in others if bare(other) == bare(name)]
        for each in (min([name, *same], key=len),) if same or not others else map(bare, others):
            yield each, tensor


def _saved_names(module: torch.nn.Module) -> dict[object, list[str]]:
    """Each tensor's names in ``state_dict()``, by ``id`` and ``tied_key``; empty if no module changes torch's own."""
    import torch

    own = torch.nn.Module
    if not any(
        getattr(each, "_state_dict_hooks", None)
        or getattr(each, "_state_dict_pre_hooks", None)
        or type(each).state_dict is not own.state_dict
        or type(each)._save_to_state_dict is not own._save_to_state_dict
        for _, each in named_modules(module)
    ):
        return {}
    names: dict[object, list[str]] = {}
    try:
        saved = module.state_dict(keep_vars=True)
        for name, tensor in saved.items():
            if isinstance(tensor, torch.Tensor):
                for key in {id(tensor), tied_key(tensor)}:
                    names.setdefault(key, []).append(name)
    except Exception:  # the user's code, or a kind of module that cannot save itself here
        return {}
    return names


def tied_key(tensor: torch.Tensor) -> object:
    """A key that is equal for tied tensors."""
    try:
        where = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        return where if tensor.numel() else id(tensor)
    except (RuntimeError, ValueError, NotImplementedError):  # a lazy tensor, or one without a storage
        return id(tensor)


def _in_modules(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, each under every name that it has in the modules.

    Reads the modules' tables, as ``state_dict()`` does, because a subclass may override ``named_parameters``.
    """
    try:
        for prefix, owner in named_modules(module):
            for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                if tensor is not None and name not in owner._non_persistent_buffers_set:
                    yield prefix + name, tensor
    except Exception as exc:
        raise unreadable(module, exc) from exc


def scratch_of(module: torch.nn.Module) -> set[str]:
    """The names of a module's non-persistent buffers, in the form that ``named_tensors`` gives the others."""
    owners = named_modules(module)
    return {prefix + name for prefix, owner in owners for name in owner._non_persistent_buffers_set}


def named_modules(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """Yields a module and those in it, each under every name that it has, as a prefix that ends in a dot (or empty)."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from named_modules(child, prefix if _wraps(module, name) else f"{prefix}{name}.")


def _wraps(module: torch.nn.Module, name: str) -> bool:
    """Whether a module only wraps its child of this name."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    return name == "_orig_mod" or (name == "module" and isinstance(module, DataParallel | DistributedDataParallel))


def unreadable(module: torch.nn.Module, exc: Exception) -> SpecError:
    """The error for a module whose own code fails while its tensors are listed."""
    if isinstance(exc, SpecError):
        return exc
    return SpecError(
        f"the tensors of the policy ({type(module).__name__}) cannot be read: {type(exc).__name__}: {exc}. Correct its "
        "code, or give wsync the module inside that holds the weights."
    )


NO_TENSORS = (
    "the policy has neither parameters nor persistent buffers: there is nothing to keep in step. Give a policy with "
    "weights."
)


def layout_of(module: torch.nn.Module) -> Layout:
    """The layout of a module's parameters and persistent buffers.

    Works on the meta device, too: no byte of a weight is read.

    Raises:
        SpecError: there are no tensors; one has no shape yet (a lazy module), or a dtype that safetensors cannot hold;
            the module's own code failed.
    """
    return layout_of_tensors(named_tensors(module))


def layout_of_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> Layout:
    """The layout of named tensors; those with the same storage, offset, shape, stride and dtype are tied.

    Raises:
        SpecError: as ``layout_of``.
    """
    groups: dict[object, list[str]] = {}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in tensors:
        try:
            shape, storage = tuple(tensor.shape), tensor.untyped_storage()._cdata
        except Exception as exc:  # of a lazy module, or in the code of a tensor's own class
            raise SpecError(
                f"tensor {name!r} of the policy has no shape or storage of its own "
                f"({type(exc).__name__}: {exc}). Run a lazy module once before you give it to wsync."
            ) from exc
        dtype = _FROM_TORCH.get(str(tensor.dtype))
        if dtype is None:
            raise SpecError(
                f"tensor {name!r} has dtype {tensor.dtype}, which a safetensors file cannot hold. Convert it."
            )
        packed = (*shape[:-1], shape[-1] * 2) if dtype == "F4" and shape else shape
        shapes[name] = (dtype, packed)
        where = (storage, tensor.storage_offset(), shape, tensor.stride(), dtype)
        groups.setdefault(where if tensor.numel() else name, []).append(name)
    if not shapes:
        raise SpecError(NO_TENSORS)
    firsts, ties = {}, {}
    for names in groups.values():
        first, *others = sorted(set(names))
        firsts[first] = shapes[first]
        ties.update(dict.fromkeys(others, first))
    return Layout.build(firsts, ties)


def torch_shape(entry: TensorEntry) -> tuple[int, ...]:
    """The shape of a tensor in torch, where one element of an F4 tensor holds two numbers."""
    return (*entry.shape[:-1], entry.shape[-1] // 2) if entry.dtype == "F4" and entry.shape else entry.shape


def views(layout: Layout, storage: torch.UntypedStorage, start: int) -> list[torch.Tensor]:
    """Views of a storage, one for each tensor of a layout, in its order; the weights begin at byte ``start``."""
    import torch

    tensors = []
    for entry in layout.tensors:
        dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
        shape = torch_shape(entry)
        strides = torch.empty(shape, device="meta").stride()
        first = (start + entry.offset) // dtype.itemsize
        tensors.append(torch.empty(0, dtype=dtype, device=storage.device).set_(storage, first, shape, strides))
    return tensors
