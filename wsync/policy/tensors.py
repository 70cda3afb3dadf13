"""The tensors of a policy as they were when it was attached, and whether they are still the same.

``.to()`` to another device, ``load_state_dict(assign=True)``, a new submodule or a set attribute replace tensors, and
``.half()`` changes them. If a reader went on with the old tensors, the policy would get no more versions. Modules
without tensors may come and go, and modules may be wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import pairwise
from operator import call, is_
from typing import Any

import torch
from torch.nn.utils import parametrize

from ..errors import moved
from ..layout.layout import Layout, named_modules, named_tensors
from ..layout.module import check_unmerged
from ..layout.tensor_subclasses import runs_code
from ..system.memory import permissions

_use_count = torch.Tensor._use_count  # type: ignore[attr-defined]  # references to the tensor itself; Python has one
_FORMS = [getattr(torch.Tensor, form).__get__ for form in ("device", "dtype", "shape")]
Targets = list[tuple[torch.Tensor, int]]
Tensors = Iterable[tuple[str, torch.Tensor]]


class Attached:
    """The parameters and persistent buffers of a policy.

    Args:
        layout: the segment's layout.
        names: each tensor's name in the layout, by its name in the policy.

    Attributes:
        targets: every tensor object once, with the index of its entry in the layout.
        tensors: the tensors of ``targets``.
    """

    def __init__(self, policy: torch.nn.Module, layout: Layout, names: Mapping[str, str]) -> None:
        index = {name: number for number, entry in enumerate(layout.tensors) for name in entry.names}
        seen: dict[int, tuple[torch.Tensor, int]] = {}
        self._names: dict[int, str] = {}
        for name, tensor in named_tensors(policy):
            if name in names:
                seen.setdefault(id(tensor), (tensor, index[names[name]]))
                self._names.setdefault(id(tensor), name)
        self.targets: Targets = list(seen.values())
        self.tensors = [tensor for tensor, _ in self.targets]
        self._policy = policy
        self._others = {name for name, _ in named_tensors(policy)} - names.keys()  # no version changes these
        self._forms = self._forms_now()
        self._note()

    def in_place(self) -> bool:
        """Whether the policy still has the same modules and tensors; takes about 0.05 us for each."""
        if any(each.merged_adapters for each in self._adapted):
            return False
        return list(map(len, self._tables)) == self._sizes and all(
            map(is_, map(call, self._getters, self._keys), self._held)
        )

    def check(self) -> None:
        """Raises UsageError if tensors were replaced or changed device, dtype or shape, or adapters were merged."""
        if self.in_place() and self._forms_now() == self._forms:
            return
        forms = dict(zip(map(id, self.tensors), zip(*self._forms, strict=True), strict=True))
        gone = self._names.copy()
        for name, now in named_tensors(self._policy):
            if name in self._others:
                continue
            if forms.get(id(now)) != (now.device, now.dtype, now.shape):
                raise moved(name, f"{now.dtype} {[*now.shape]} on {now.device}")
            gone.pop(id(now), None)
        for name in gone.values():
            raise moved(name, "gone")
        self._note()
        check_unmerged(self._adapted)

    def check_unshared(self) -> None:
        """Raises UsageError if other processes share a tensor's memory: they would keep the old weights."""
        for name in shared(zip(self._names.values(), self.tensors, strict=True)):
            raise moved(name, "in memory that other processes share (share_memory(), a torch.multiprocessing queue)")

    def spare_holders(self) -> None:
        """Prepares for pointing the tensors elsewhere: protects code that holds a tensor itself, not only its memory.

        An autograd graph that saved a parameter, or a cache that is keyed by a parameter's version, would see other
        weights. So all tensors' versions are incremented, and a backward pass over the old weights raises autograd's
        error. A frozen tensor may have been exported, by ``torch.from_dlpack`` or numpy: its Python object gets a new
        TensorImpl, and holders of the old one keep it with its memory.
        """
        if sum(map(_use_count, self.tensors)) > len(self.tensors):
            for tensor in self.tensors:
                if _use_count(tensor) > 1 and not tensor.requires_grad:
                    _give_new_body(tensor)
        torch.autograd.graph.increment_version(self.tensors)

    def _note(self) -> None:
        """Records where the policy has its modules and tensors, which may have moved to other modules since."""
        modules = {id(module): module for _, module in named_modules(self._policy)}.values()
        self._adapted: list[Any] = [each for each in modules if hasattr(each, "merged_adapters")]  # by PEFT
        self._tables = [table for each in modules for table in (each._modules, each._parameters, each._buffers)]
        self._sizes = list(map(len, self._tables))
        places = [
            (_getter(table), key, held)
            for table in self._tables
            for key, held in table.items()
            if isinstance(held, torch.nn.Module) or id(held) in self._names
        ]
        self._getters = [getter for getter, _, _ in places]
        self._keys = [key for _, key, _ in places]
        self._held = [held for _, _, held in places]

    def _forms_now(self) -> list[list[Any]]:
        return [list(map(form, self.tensors)) for form in _FORMS]


def _give_new_body(tensor: torch.Tensor) -> None:
    """Gives a frozen tensor a new TensorImpl; others must keep theirs, because autograd identifies them by it."""
    body = tensor.data
    body.grad = tensor.grad
    with suppress(RuntimeError):  # something in C++ has a weak reference to it
        torch._C._swap_tensor_impl(tensor, body)


def drop_caches() -> None:
    """Drops what torch derived from weights that have just changed, and would reuse.

    These are the casts that autocast keeps until its block ends, and what ``torch.nn.utils.parametrize.cached`` keeps.
    """
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def mapped(tensors: Tensors) -> dict[str, str]:
    """How the memory of each plain CPU tensor is mapped, by the tensor's name; see ``memory.permissions``."""
    there = {name: tensor for name, tensor in tensors if tensor.device.type == "cpu" and not runs_code(tensor)}
    return dict(zip(there, permissions(list(map(torch.Tensor.data_ptr, there.values()))), strict=True))


def shared(tensors: Tensors) -> list[str]:
    """The names of the tensors whose memory other processes share, or may share."""
    return [name for name, how in mapped(tensors).items() if how.startswith("rw") and how.endswith("s")]


def lie_together(tensors: Tensors, layout: Layout, own_uses: Callable[[torch.UntypedStorage], int]) -> bool:
    """Whether other tensors share memory with these, or two of these do that are not tied; all must be contiguous.

    Args:
        layout: the layout of these tensors.
        own_uses: returns how many uses of a storage are a reader's own views.
    """
    storages: dict[int, tuple[torch.UntypedStorage, list[tuple[torch.Tensor, int]]]] = {}
    index = {name: number for number, entry in enumerate(layout.tensors) for name in entry.names}
    for tensor, number in {id(tensor): (tensor, index[name]) for name, tensor in tensors}.values():
        storage = tensor.untyped_storage()
        storages.setdefault(storage._cdata, (storage, []))[1].append((tensor, number))
    for storage, targets in storages.values():
        own = own_uses(storage) or 1  # the storage object is one
        if torch._C._storage_Use_Count(storage._cdata) > len(targets) + own:
            return True
        spans = sorted({(tensor.data_ptr(), tensor.nbytes, number) for tensor, number in targets})
        if any(at + nbytes > after for (at, nbytes, _), (after, _, _) in pairwise(spans)):
            return True
    return False


def addresses(tensors: list[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))


def _getter(table: Mapping[str, Any]) -> Callable[[str], Any]:
    """``table.get``, which TorchScript's tables lack."""
    return table.get if isinstance(table, dict) else lambda key: dict(table.items()).get(key)
