"""Copies a version into a policy's own tensors: ``target.copy_(source)``, from the leased slot.

Torch does the copying: it uses as many threads as its user allows (``torch.set_num_threads``), and handles strides,
subclasses, dtypes and devices. The views of a slot's weights are made once.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

import torch

from ..layout.layout import views
from ..layout.tensor_subclasses import copy_each, half_written, runs_code
from ..segment.segment import Segment
from ..segment.word_and_lease import Lease
from .tensors import Attached


class Copy:
    """The tensors of one policy, filled from the slots of a segment."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        self._segment: Segment | None = None
        self._slots: dict[int, list[torch.Tensor]] = {}  # views of the weights, in the order of ``_tensors``
        targets = sorted(attached.targets, key=lambda target: not runs_code(target[0]))
        self._tensors, self._places = [tensor for tensor, _ in targets], [index for _, index in targets]
        self._own = sum(map(runs_code, self._tensors))  # these come first, since they may refuse a copy

    def take(self, segment: Segment, lease: Lease) -> None:
        """Copies a leased slot into the policy's tensors.

        A later backward pass that needs their old values gets autograd's error.

        Raises:
            OSError, WsyncError: the slot cannot be mapped; the policy keeps its weights.
            UsageError: the policy's tensors are not the attached ones any more.
            CopyRefused: a tensor's class refused its copy; the policy keeps its weights.
            HalfWritten: a class refused its copy, and the tensors already written could not be restored; or a plain
                tensor, whose memory somebody replaced, could not be written.
        """
        self._attached.check()
        if segment is not self._segment:
            self._segment, self._slots = segment, {}
        if lease.slot >= segment.slots:  # an added slot may be another file the next time
            sources = self._map(segment, lease.slot)
        elif lease.slot in self._slots:
            sources = self._slots[lease.slot]
        else:
            sources = self._slots[lease.slot] = self._map(segment, lease.slot)
        try:
            self._copy(sources)
        except KeyboardInterrupt:  # in the code of a tensor's class, between two tensors
            self._copy(sources)
            raise

    def holds(self, lease: Lease) -> bool:
        return False

    def leases(self) -> tuple[tuple[int, ...], float]:
        return (), 0.0

    def close(self) -> None:
        self._segment, self._slots = None, {}

    def after_fork(self) -> None:
        pass

    def _copy(self, sources: list[torch.Tensor]) -> None:
        tensors, own = self._tensors, self._own
        with torch.inference_mode(any(map(torch.Tensor.is_inference, tensors))), torch.no_grad():
            if own:
                copy_each(tensors[:own], sources[:own])
            try:  # One call, so that no interrupt comes between two tensors.
                deque(map(torch.Tensor.copy_, islice(tensors, own, None), islice(sources, own, None)), 0)  # R4 use
            except RuntimeError as exc:
                raise half_written("a tensor could not be written", exc) from exc

    def _map(self, segment: Segment, slot: int) -> list[torch.Tensor]:
        storage = torch.frombuffer(segment.map_slot(slot), dtype=torch.uint8).untyped_storage()  # nothing is copied
        weights = views(segment.layout, storage, segment.data_offset)
        return [weights[index] for index in self._places]
