"""Copies versions to a device, and gives them to a policy there.

A version crosses the bus as one contiguous copy, from the slot into a flat buffer on the device that is laid out like
the slot. With ``mode="swap"`` there are two such buffers: the policy's tensors are views of one, and are pointed at the
other for the next version; they are aligned only to their element, as in the slot. With ``mode="copy"`` there is one
buffer, and its views are copied on the policy's stream into the policy's own tensors, which keep their addresses. Both
take device memory for a second set of weights. ``staging="none"`` does not: the slot is copied straight into the
policy's tensors, on the policy's stream.

A buffer is overwritten only if nothing else uses its storage. If somebody kept a tensor that points into it, the next
version gets a new buffer, and the old one is left to that tensor.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import weakref
from dataclasses import dataclass
from typing import Literal

import torch

from ...errors import SegmentError, UsageError
from ...layout.layout import Layout, named_tensors, views
from ...layout.tensor_subclasses import copy_each, runs_code
from ...segment.segment import Segment
from ...system.memory import address_of, populate
from ..tensors import Attached, Targets
from .cuda import Cuda, Flight

_log = logging.getLogger("wsync")
_WORDS = {  # dtype to copy as, if a tensor's own has no GPU kernel that copies many at once
    torch.float8_e5m2: torch.uint8,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2fnuz: torch.uint8,
    torch.float8_e4m3fnuz: torch.uint8,
    torch.float8_e8m0fnu: torch.uint8,
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}


def check_contiguous(policy: torch.nn.Module) -> None:
    """Raises UsageError if a tensor of the policy is not contiguous, so that a copy into it would need a buffer."""
    for name, tensor in named_tensors(policy):
        if not tensor.is_contiguous():
            raise UsageError(
                f"{name} is not contiguous in memory: copying it takes a buffer on the device, and "
                'staging="none" allows no buffer. Make it contiguous, or leave staging out.'
            )


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


class LockedSlot:
    """A slot's own pages, mapped once in this process for all its readers, and page-locked if that is allowed.

    Attributes:
        weights: the slot's weights, as uint8.
        hindrance: why the pages are not locked; empty if they are.
    """

    def __init__(self, segment: Segment, slot: int, mapped: mmap.mmap, device: Cuda) -> None:
        self._mapped = mapped
        self.hindrance = device.lock(address_of(mapped), len(mapped), read_only=True)
        if self.hindrance:
            self._lock_writable(segment, slot, device)
        if self.hindrance:
            populate(self._mapped)
        memory = (ctypes.c_uint8 * len(self._mapped)).from_address(address_of(self._mapped))
        with torch.inference_mode(False):
            self.weights = torch.frombuffer(memory, dtype=torch.uint8)[segment.data_offset :]
        self._unlock = weakref.finalize(self, _unlock, None if self.hindrance else device, self._mapped, os.getpid())
        self._unlock.atexit = False  # a process that ends unlocks everything, and the driver may be gone by then

    def _lock_writable(self, segment: Segment, slot: int, device: Cuda) -> None:
        """Tries to lock a writable mapping: many drivers cannot lock a read-only one.

        See ``cudaDevAttrHostRegisterReadOnlySupported``. Only the segment's owner may map a slot writable.
        """
        try:
            mapped, _ = segment.map_pages(slot, write=True)
        except (OSError, SegmentError):
            return
        self.hindrance = device.lock(address_of(mapped), len(mapped), read_only=False)
        if not self.hindrance:
            self._mapped = mapped


_slots: weakref.WeakValueDictionary[tuple[int, int], LockedSlot] = weakref.WeakValueDictionary()
_locking = threading.Lock()


def lock_slot(segment: Segment, slot: int, device: Cuda) -> LockedSlot:
    """The slot's pages, which are shared with other readers in this process.

    Raises:
        SegmentError: the slot's file is missing or damaged.
    """
    with _locking:
        mapped, file = segment.map_pages(slot, write=False)
        locked = _slots.get(file)
        if locked is None:
            locked = _slots[file] = LockedSlot(segment, slot, mapped, device)
        return locked


def _unlock(device: Cuda | None, mapped: mmap.mmap, pid: int) -> None:
    if device is not None and pid == os.getpid() and not device.unlock(address_of(mapped)):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapped))  # for ever: nothing else may be mapped at its address


@dataclass(slots=True)
class _Buffer:
    """A flat buffer on the device.

    Attributes:
        flat: all its bytes, as uint8.
        storage: the storage of ``flat`` and ``tensors``.
        tensors: views of ``flat``, one for each tensor of the layout.
        uses: the storage's use count while only ``flat`` and ``tensors`` use it.
    """

    flat: torch.Tensor
    storage: torch.UntypedStorage
    tensors: list[torch.Tensor]
    uses: int = 0

    def is_ours(self) -> bool:
        return int(torch._C._storage_Use_Count(self.storage._cdata)) == self.uses


class DeviceWeights:
    """The tensors of one policy on a device, and at most one version that is under way to them.

    Args:
        attached: the policy's tensors.
        staged: whether versions go through a buffer on the device.

    Attributes:
        flight: the copy over the bus that is under way; None if there is none.
    """

    def __init__(self, attached: Attached, device: Cuda, mode: Literal["swap", "copy"], *, staged: bool) -> None:
        self._attached, self._targets, self._device = attached, attached.targets, device
        self._mode, self._staged = mode, staged
        self._by_dtype: dict[torch.dtype, Targets] = {}  # one kernel copies many tensors of one dtype
        self._own = [target for target in attached.targets if runs_code(target[0])]
        for tensor, index in attached.targets:
            if runs_code(tensor):
                continue
            self._by_dtype.setdefault(_WORDS.get(tensor.dtype, tensor.dtype), []).append((tensor, index))
        self._slots: dict[int, LockedSlot] = {}
        self._added: LockedSlot | None = None  # an added slot whose copy is under way
        self._live: _Buffer | None = None  # the policy's tensors are views of it
        self._spare: _Buffer | None = None
        self._told = False
        self.flight: Flight | None = None

    def lock(self, segment: Segment) -> None:
        """Page-locks all slots of a segment now, so that no later version waits for that; unlocks any other slots.

        Raises:
            SegmentError: a slot's file is missing or damaged.
        """
        self._slots = {}  # first: if a lock fails, another segment's slots must not be taken for this one's
        self._slots = {slot: lock_slot(segment, slot, self._device) for slot in range(segment.slots)}
        refused = {slot.hindrance for slot in self._slots.values()} - {""}
        if refused and not self._told:
            self._told = True
            _log.warning(
                "the slots of segment %r cannot be page-locked (%s): versions reach the device by unlocked copies, "
                "which are slower, and refresh() takes part in them. Raise the limit (`ulimit -l`; LimitMEMLOCK= of "
                "the systemd unit), or run as the segment's owner: many drivers lock only memory that may be written.",
                segment.name,
                ", ".join(sorted(refused)),
            )

    def check_uncaptured(self, name: str) -> None:
        """Raises UsageError while the policy's stream is captured, because a copy would end the capture."""
        if self._device.capturing():
            raise UsageError(
                f"a CUDA graph is being captured, in which no version of {name!r} can be taken: it would be part of "
                "the graph. Call attach, refresh and wait before the capture, or between replays."
            )

    def make_room(self, layout: Layout) -> None:
        """Allocates the buffer for the next version, if there is none.

        Raises:
            OutOfDeviceMemory: the device has no room for it.
        """
        if self._staged and self._spare is None:
            with torch.inference_mode(False):  # otherwise the policy's parameters would become inference tensors
                flat = self._device.empty(layout.nbytes)
                storage = flat.untyped_storage()
                self._spare = _Buffer(flat, storage, views(layout, storage, 0))
            self._spare.uses = int(torch._C._storage_Use_Count(storage._cdata))

    def start(self, segment: Segment, slot: int) -> None:
        """Begins to copy a leased slot; the lease must last until ``landed``.

        Raises:
            OutOfDeviceMemory: the device has no room; the policy keeps its version.
            SegmentError: a slot's file is missing or damaged.
        """
        added = slot >= segment.slots  # its file may be another one the next time
        self._added = lock_slot(segment, slot, self._device) if added else None
        if not added and slot not in self._slots:
            self.lock(segment)
        self.make_room(segment.layout)
        weights = (self._added or self._slots[slot]).weights
        if self._spare is not None:
            self.flight = self._device.send([self._spare.flat], [weights], aside=True)
            return
        slices = views(segment.layout, weights.untyped_storage(), segment.data_offset)
        mine, new = [t for t, _ in self._targets], [slices[i] for _, i in self._targets]
        with torch.inference_mode(any(t.is_inference() for t in mine)), torch.no_grad():
            self.flight = self._device.send(mine, new, aside=False)

    def landed(self, *, wait: bool) -> bool:
        """Whether the copy over the bus is done; if so, ``take`` comes next."""
        if self.flight is None:  # the last call was interrupted
            return True
        if wait or not self._staged:
            self.flight.synchronize()
        elif not self.flight.query():
            return False
        self.flight = self._added = None
        return True

    def take(self) -> None:
        """Gives the policy the version that landed."""
        spare = self._spare
        if spare is None:
            return
        if self._mode == "copy":
            with torch.inference_mode(any(t.is_inference() for t, _ in self._targets)), torch.no_grad():
                if self._own:
                    copy_each([t for t, _ in self._own], [spare.tensors[i] for _, i in self._own])
                for dtype, group in self._by_dtype.items():
                    mine, new = [_as(t, dtype) for t, _ in group], [_as(spare.tensors[i], dtype) for _, i in group]
                    torch._foreach_copy_(mine, new)
            return
        before, self._live, self._spare = self._live, spare, None  # first: after an interrupt, nothing overwrites it
        self._attached.spare_holders()
        for tensor, index in self._targets:
            tensor.data = spare.tensors[index]
        if before is None:
            self._device.trim()  # frees the policy's own weights: the two buffers are enough
        elif before.is_ours():
            self._spare = before

    def close(self) -> None:
        """Waits for a copy that is under way, and frees all memory except what the policy's tensors use."""
        flight, self.flight = self.flight, None
        if flight is not None:
            try:
                flight.synchronize()  # before the pages are unlocked and the buffer is freed
            except RuntimeError:  # the device failed: it copies nothing any more, and the policy's next use reports it
                pass
        self._live = self._spare = None
        self._slots = {}

    def forget(self) -> None:
        """Forgets everything in a forked child, which must not call CUDA.

        An event, or a buffer that two streams used, would call CUDA when destroyed, and so end the child: they are
        never destroyed.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object((self.flight, self._live, self._spare)))
        self.flight = self._live = self._spare = None
        self._slots = {}
