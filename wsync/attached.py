"""The tensors of a policy as they were when it was attached, and whether they still are.

``.to()`` to another device, ``load_state_dict(assign=True)`` and whoever sets an attribute put other tensors in their
place, and ``.half()`` makes others of them. A reader that went on with those it knew would leave the policy behind.
"""

from __future__ import annotations

from operator import call, is_
from typing import Any

import torch

from .errors import moved
from .layout import Layout, named_tensors

_FORMS = [getattr(torch.Tensor, form).__get__ for form in ("device", "dtype", "shape")]
Targets = list[tuple[torch.Tensor, int]]


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
        self._looks = [table.get for _, table, _, _, _ in self._owners]
        self._keys = [key for _, _, key, _, _ in self._owners]
        self._owned = [tensor for _, _, _, tensor, _ in self._owners]
        self._forms = self._forms_now()

    def in_place(self) -> bool:
        """Whether the policy's tensors are these very ones; takes some 0.05 us for each."""
        return all(map(is_, map(call, self._looks, self._keys), self._owned))

    def check(self) -> None:
        """Raises UsageError where they are not these, or not of the devices, dtypes and shapes that they were."""
        if self.in_place() and self._forms_now() == self._forms:
            return
        for name, table, key, tensor, form in self._owners:
            now = table.get(key)
            if now is not tensor or (now.device, now.dtype, now.shape) != form:
                raise moved(name, "gone" if now is None else f"{now.dtype} {[*now.shape]} on {now.device}")

    def _forms_now(self) -> list[list[Any]]:
        return [list(map(form, self._owned)) for form in _FORMS]
