"""Moves a policy to another slot: points each of its tensors at its part of the slot's memory.

A slot is mapped once, and the views of its weights are made once. Taking a version is ``parameter.data = view`` for
each tensor: no bytes move, and the time depends only on the number of tensors.

The mapped memory owns the lease, and torch keeps the memory for as long as any tensor points there. When the policy
leaves a slot, the uses of its storage are counted. If only this module's views are left, the lease is released, and the
mapping and the views are kept for the slot's next version. Otherwise somebody keeps a tensor of the old version: that
mapping is left to the tensor, and the slot is mapped anew for its next version. If the tensor still exists one version
later, a thread copies its memory into pages of this process, and then releases the lease: a kept tensor costs its owner
memory, but costs nobody a slot. If the system cannot do that (before Linux 5.14), the slot stays leased until the
tensor is gone.

The mapping is private: what the policy writes to its weights in place goes to pages of this process. They must be
dropped before the slot is used again. Looking for them takes longer the more weights there are (0.4 ms for 64 MiB), so
a thread does it, while the policy runs, as soon as the policy has left the slot.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ..layout.layout import views
from ..segment.segment import Segment
from ..segment.word_and_lease import Lease, SlotMemory
from ..system.memory import renew, take_over
from .tensors import Attached, Targets, addresses

_log = logging.getLogger("wsync")
_WRITES = (
    "the policy attached to %r writes to its weights in place: these writes belong to it alone, and are lost with the "
    'next version. Attach with mode="copy" to give it tensors of its own.'
)
_point: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_looks = ThreadPoolExecutor(1, "wsync-look")


class _Slot:
    """A mapped slot.

    Attributes:
        memory: the mapping; owns the lease while the policy, or a tensor that somebody keeps, points there.
        added: whether the slot was added to the segment later. Its file may be another one the next time, so it is
            mapped for one version only.
        views: of the weights, in the order of the policy's tensors.
        addresses: of the views.
        alone: ``uses()`` while nothing but ``views`` uses the storage.
        since: when its version was taken, in seconds since the epoch.
        look: the thread's search for pages that the policy wrote to; None if it has not begun.
    """

    def __init__(self, segment: Segment, slot: int, targets: Targets) -> None:
        self.memory = segment.map_slot(slot)
        self.added = slot >= segment.slots
        with torch.inference_mode(False):
            self._storage = torch.frombuffer(self.memory, dtype=torch.uint8).untyped_storage()  # nothing is copied
            weights = views(segment.layout, self._storage, segment.data_offset)
        self.views = [weights[index] for _, index in targets]
        del weights
        self.addresses = addresses(self.views)
        self.alone = self.uses()
        self.since = 0.0
        self.look: Future[bool] | None = None
        _mapped[self._storage._cdata] = self

    def uses(self) -> tuple[int, int]:
        """How many tensors use the storage, and how often Python references the storage object."""
        return int(torch._C._storage_Use_Count(self._storage._cdata)), sys.getrefcount(self._storage)

    def begin_look(self) -> None:
        """Has a thread drop what the policy wrote here."""
        try:
            self.look = _looks.submit(renew, self.memory)
        except RuntimeError:  # this process may have no more threads, or is about to end
            self.look = None

    def end_look(self) -> bool:
        """Waits until the memory shows the file again; returns whether the policy had written there.

        Raises:
            OSError: the system refused to drop the pages. The next call tries again.
        """
        look, self.look = self.look, None
        return look.result() if look else renew(self.memory)


_HeldBack = tuple[int, weakref.ref[SlotMemory], float]
"""A slot that the policy left but that others' tensors keep leased: its number, its memory, and when it was taken."""

_mapped: weakref.WeakValueDictionary[int, _Slot] = weakref.WeakValueDictionary()


def own_uses(storage: torch.UntypedStorage) -> int:
    """How many uses of a storage are this module's own views; 0 if it is not a slot's."""
    slot = _mapped.get(storage._cdata)
    return slot.alone[0] if slot else 0


class Swap:
    """The tensors of one policy, pointed at the slots of a segment."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        self._segment: Segment | None = None
        self._slots: dict[int, _Slot] = {}
        self._live: _Slot | None = None  # the policy's slot; after an interrupt, maybe the one that it was moving to
        self._held_back: list[_HeldBack] = []  # never bound anew: a thread appends to it, and that would be lost
        self._told_of_writing = False

    def take(self, segment: Segment, lease: Lease) -> None:
        """Points the policy at a leased slot; warns once if the policy had written to that slot before.

        A backward pass that needs the old weights gets autograd's error, as after any write in place.

        Raises:
            OSError, WsyncError: the slot cannot be mapped; the policy keeps its weights.
            UsageError: the policy's tensors are not the attached ones, or their device, dtype or shape changed.
        """
        slots = self._slots if segment is self._segment else {}
        slot, written = self._prepare(slots, segment, lease.slot)
        self._attached.spare_holders()
        others = {*self._slots.values(), *slots.values()} - {slot}
        slot.memory.lease, slot.since = lease, time.time()
        self._segment, self._slots, self._live = segment, slots, slot
        # One call, so that no interrupt comes between two tensors.
        deque(map(_point, self._attached.tensors, slot.views), 0)  # R4 use
        self._take_over_held_back()
        for other in others:  # more than one if the last take was interrupted
            if self._leave(other):
                other.begin_look()
        if written and not self._told_of_writing:
            self._told_of_writing = True
            _log.warning(_WRITES, segment.name)

    def holds(self, lease: Lease) -> bool:
        """Whether the policy may point into this slot, even after an interrupted take."""
        return any(slot.memory.lease is lease for slot in self._slots.values())

    def leases(self) -> tuple[tuple[int, ...], float]:
        """The slots that the policy, or a tensor that somebody keeps, uses; and when the oldest of them was taken."""
        held = [(slot.memory.lease.slot, slot.since) for slot in self._slots.values() if slot.memory.lease]
        held += [(slot, since) for slot, left, since in self._held_back if (memory := left()) and memory.lease]
        return tuple(slot for slot, _ in held), min((since for _, since in held), default=0.0)

    def close(self) -> None:
        """Gives the policy tensors of its own, with its weights; tensors that somebody keeps stay valid.

        A tensor of the policy that its user pointed elsewhere, or shared with other processes, stays where it is.
        """
        if self._live is None:
            return
        self._attached.spare_holders()
        own: dict[int, torch.Tensor] = {}
        ours = {address for slot in self._slots.values() for address in slot.addresses}
        with torch.inference_mode(False):  # in inference mode a parameter would become an inference tensor
            for tensor, index in self._attached.targets:
                if tensor.data_ptr() not in ours:
                    continue
                if index not in own:  # tied tensors stay tied
                    own[index] = tensor.detach().clone()
                tensor.data = own[index]
        slots, self._slots, self._live = self._slots, {}, None
        for slot in slots.values():
            self._leave(slot)
        self._take_over_held_back()

    def after_fork(self) -> None:
        """Forgets the parent's searches in a forked child, which has its own pages and none of the parent's threads."""
        for slot in self._slots.values():
            slot.look = None

    def _prepare(self, slots: dict[int, _Slot], segment: Segment, number: int) -> tuple[_Slot, bool]:
        """Maps a slot, or renews its mapping, and checks the policy; also returns whether that had written there."""
        slot, written = slots.get(number), False
        if slot and not slot.added:
            written = slot.end_look()
        else:
            slot = slots[number] = _Slot(segment, number, self._attached.targets)
        live, attached = self._live, self._attached
        if not (live and attached.in_place() and addresses(attached.tensors) == live.addresses):
            attached.check()
            attached.check_unshared()
        return slot, written

    def _take_over_held_back(self) -> None:
        """Has a thread free the slots that were already held back at the last version; most are free by then."""
        for _ in range(len(self._held_back)):
            one = self._held_back.pop(0)
            try:
                _looks.submit(self._take_over, one)
            except RuntimeError:  # this process may have no more threads, or is about to end
                self._held_back.append(one)

    def _take_over(self, held: _HeldBack) -> None:
        """Gives the tensors in a held-back slot a copy of its pages, and releases its lease."""
        memory = held[1]()
        lease = memory.lease if memory else None
        if not (memory and lease):
            return
        if take_over(memory):
            memory.lease = None
            lease.release()
        else:
            self._held_back.append(held)

    def _leave(self, slot: _Slot) -> bool:
        """Releases the lease of a slot that the policy left if no tensor uses it; returns whether its mapping stays."""
        lease = slot.memory.lease
        if lease is None:
            return False
        is_held = slot.uses() != slot.alone
        if is_held:
            self._held_back.append((lease.slot, weakref.ref(slot.memory), slot.since))
        else:
            slot.memory.lease = None
            lease.release()
        if (is_held or slot.added) and self._slots.get(lease.slot) is slot:
            del self._slots[lease.slot]
        return not is_held and not slot.added


def _after_fork() -> None:
    global _looks
    _looks = ThreadPoolExecutor(1, "wsync-look")


os.register_at_fork(after_in_child=_after_fork)
