"""How the tensors of a policy get a version as bytes of their own: ``target.copy_(source)``, from the leased slot.

Torch copies, with as many threads as its user gave it (``torch.set_num_threads``), and knows about strides, subclasses,
dtypes and devices. The views of a slot's weights are made once.
"""

from __future__ import annotations

from collections import deque

import torch

from ..layout.layout import views
from ..segment.segment import Lease, Segment
from .tensors import Attached


class Copy:
    """The tensors of one policy, filled from the slots of a segment."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        self._segment: Segment | None = None
        self._slots: dict[int, list[torch.Tensor]] = {}  # views of the weights, in the order of the policy's tensors

    def take(self, segment: Segment, lease: Lease) -> bool:
        """Copies a leased slot; returns False: what the policy writes to its weights is its own.

        Whoever uses a tensor's old values in a backward pass is told by autograd.

        Raises:
            OSError, WsyncError: the slot cannot be mapped; the policy has what it had.
            UsageError: the policy's tensors are others than those that were attached.
        """
        self._attached.check()
        if segment is not self._segment:
            self._segment, self._slots = segment, {}
        if lease.slot >= segment.slots:  # it was added, and may be another file the next time
            sources = self._map(segment, lease.slot)
        elif lease.slot in self._slots:
            sources = self._slots[lease.slot]
        else:
            sources = self._slots[lease.slot] = self._map(segment, lease.slot)
        try:
            self._copy(sources)
        except KeyboardInterrupt:  # in the code of a tensor's own class, between two tensors
            self._copy(sources)
            raise
        return False

    def holds(self, lease: Lease) -> bool:
        return False

    def leases(self) -> tuple[tuple[int, ...], float]:
        return (), 0.0

    def close(self) -> None:
        self._segment, self._slots = None, {}

    def after_fork(self) -> None:
        pass

    def _copy(self, sources: list[torch.Tensor]) -> None:
        tensors = self._attached.tensors
        with torch.inference_mode(any(map(torch.Tensor.is_inference, tensors))), torch.no_grad():
            # One call, so that no interrupt comes between two tensors.
            deque(map(torch.Tensor.copy_, tensors, sources), 0)  # R4 use

    def _map(self, segment: Segment, slot: int) -> list[torch.Tensor]:
        storage = torch.frombuffer(segment.map_slot(slot), dtype=torch.uint8).untyped_storage()  # nothing is copied
        weights = views(segment.layout, storage, segment.data_offset)
        return [weights[index] for _, index in self._attached.targets]
