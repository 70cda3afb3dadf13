"""The tensors of a policy as they were when it was attached, and whether they still are.

``.to()`` to another device, ``load_state_dict(assign=True)`` and whoever sets an attribute put other tensors in their
place, and ``.half()`` makes others of them. A reader that went on with those it knew would leave the policy behind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any

import torch

from .errors import moved
from .layout import Layout, named_tensors

Targets = list[tuple[torch.Tensor, int]]
_address: Any = torch.Tensor.data_ptr


class Attached:
    """The parameters and persistent buffers of a policy.

    Attributes:
        targets: every tensor object once, with the place of its weights in the layout.
        tensors: the same without the places.
    """

    def __init__(self, policy: torch.nn.Module, layout: Layout) -> None:
        index = {name: place for place, entry in enumerate(layout.tensors) for name in entry.names}
        seen: dict[int, tuple[torch.Tensor, int]] = {}
        for name, tensor in named_tensors(policy):
            seen.setdefault(id(tensor), (tensor, index[name]))
        self.targets: Targets = list(seen.values())
        self.tensors = [tensor for tensor, _ in self.targets]
        self._owners = [
            (f"{prefix}.{key}".lstrip("."), table, key, tensor, (tensor.device, tensor.dtype, tensor.shape))
            for prefix, module in policy.named_modules()
            for table in (module._parameters, module._buffers)
            for key, tensor in table.items()
            if tensor is not None and id(tensor) in seen
        ]
        self.look_again()

    def look_again(self) -> None:
        """Takes note of which of the policy's tables hold its tensors and nothing else."""
        self._whole: list[Collection[torch.Tensor]] = []
        self._some: list[tuple[Mapping[str, torch.Tensor | None], list[str]]] = []
        keys: dict[int, list[str]] = {}
        for _, table, key, _, _ in self._owners:
            keys.setdefault(id(table), []).append(key)
        for table in {id(table): table for _, table, _, _, _ in self._owners}.values():
            if len(table) == len(keys[id(table)]):
                self._whole.append(table.values())
            else:
                self._some.append((table, keys[id(table)]))

    def addresses(self) -> tuple[int, ...]:
        """Where the tensors lie that the policy has at this moment; takes some 0.1 us for each.

        Raises:
            TypeError: one is gone.
        """
        some = (map(table.get, keys) for table, keys in self._some)
        return tuple(map(_address, chain(chain.from_iterable(self._whole), chain.from_iterable(some))))

    def check(self) -> None:
        """Raises UsageError where they are not these, or not of the devices, dtypes and shapes that they were."""
        for name, table, key, tensor, form in self._owners:
            now = table.get(key)
            if now is not tensor or (now.device, now.dtype, now.shape) != form:
                raise moved(name, "gone" if now is None else f"{now.dtype} {[*now.shape]} on {now.device}")
