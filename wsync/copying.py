"""How the tensors of a policy get a version as bytes of their own: copied from the leased slot, to where they are.

Two threads share the tensors, for one gets half of what memory gives. They are not torch's: its threads wait for each
other at the end of each tensor, and where other processes have the processors, of two cores three, that was seen to
take a hundred times as long. A tensor that is no plain row of bytes (strided, a subclass) is left to torch.

Of the 8 ms that 64 MiB in 200 tensors take, looking at the tensors is one: each question put to all of them costs 0.03
to 0.15 ms with cold caches. So where a slot's tensors are, and how they are cut into pieces, is found out once.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterable
from itertools import chain, compress, starmap
from operator import itemgetter, not_
from typing import Any, NamedTuple

import torch

from .attached import Attached
from .helper import Helper, undivided
from .layout import views
from .segment import Lease, Segment

_PIECE = 4 << 20  # bytes that one thread copies at a time
_LARGE = 1 << 17  # bytes; of less, two threads would spend their time on handing the interpreter to each other
_WORTH_TWO = 8 << 20  # bytes; less is copied before a second thread has begun
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
# Called for all tensors in one go: with cold caches, a loop over 200 of them takes a millisecond of a step.
_is_cpu = torch.Tensor.is_cpu.__get__  # type: ignore[attr-defined]

Copied = tuple[int, int, int]
"""Where to, where from, and how many bytes."""


class _Slot(NamedTuple):
    """A slot's weights, for the tensors of the policy in their order.

    Attributes:
        addresses: of those that are plain rows of bytes.
        tensors: over the others.
        memory: what keeps it mapped.
    """

    addresses: list[int]
    tensors: list[torch.Tensor]
    memory: Any


class Copy:
    """The tensors of one policy, filled from the slots of a segment."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        self._divide()

    def take(self, segment: Segment, lease: Lease) -> None:
        """Copies a leased slot; whoever uses a tensor's old values in a backward pass is told by autograd.

        Raises:
            OSError, WsyncError: the slot cannot be mapped; the policy has what it had.
            UsageError: the policy's tensors are others than those that were attached.
        """
        self._attached.check()
        if not _are_rows(self._rows):
            self._divide()
        if lease.slot not in self._slots:
            self._slots[lease.slot] = self._map(segment, lease.slot)
        slot, places = self._slots[lease.slot], list(map(torch.Tensor.data_ptr, self._rows))
        large, small = (
            [(places[of] + at, slot.addresses[of] + at, size) for of, at, size in pieces]
            for pieces in (self._large, self._small)
        )
        torch.autograd.graph.increment_version(self._rows)
        with torch.inference_mode(any(map(torch.Tensor.is_inference, self._others))), torch.no_grad():
            _copy(large, small, zip(self._others, slot.tensors, strict=True), held=(self._rows, slot))  # R4 use

    def forget(self) -> None:
        """Lets go of the slots, of a segment that is left."""
        self._slots.clear()

    def _divide(self) -> None:
        """Tells the tensors that are plain rows of bytes from those that are left to torch."""
        tensors = self._attached.tensors
        self._plain = [True] * len(tensors) if _are_rows(tensors) else [_are_rows([tensor]) for tensor in tensors]
        self._rows = list(compress(tensors, self._plain))
        self._others = list(compress(tensors, map(not_, self._plain)))
        sizes = enumerate(tensor.nbytes for tensor in self._rows)
        pieces = [(of, at, min(_PIECE, size - at)) for of, size in sizes for at in range(0, size, _PIECE)]
        self._large = [piece for piece in pieces if piece[2] >= _LARGE]
        self._small = [piece for piece in pieces if piece[2] < _LARGE]
        self._slots: dict[int, _Slot] = {}

    def _map(self, segment: Segment, slot: int) -> _Slot:
        mapped, address = segment.map_slot(slot)
        kind: Any = type("_Slot", (ctypes.c_uint8 * len(mapped),), {})  # a subclass can carry attributes
        memory = kind.from_address(address)
        memory.keep = mapped
        with torch.inference_mode(False):
            storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()  # nothing is copied
            tensors = views(segment.layout, storage, segment.data_offset)
        tensors = [tensors[index] for _, index in self._attached.targets]
        addresses = [tensor.data_ptr() for tensor in compress(tensors, self._plain)]
        return _Slot(addresses, list(compress(tensors, map(not_, self._plain))), memory)


def _are_rows(tensors: list[torch.Tensor]) -> bool:
    """Whether the bytes of each are its values, in this process's memory, in their order and with no gap."""
    return (
        all(map(_PLAIN.__contains__, map(type, tensors)))
        and all(map(_is_cpu, tensors))
        and all(map(torch.Tensor.is_contiguous, tensors))
        and not any(map(torch.Tensor.is_conj, tensors))
        and not any(map(torch.Tensor.is_neg, tensors))
        and not any(map(torch.Tensor._is_zerotensor, tensors))
    )


def _copy(
    large: list[Copied], small: list[Copied], others: Iterable[tuple[torch.Tensor, torch.Tensor]], held: object
) -> None:
    """Copies all, and raises what comes in between, an interrupt or an error, when nothing is under way any more.

    Args:
        large: what two threads may share.
        others: pairs, of a target and its source, that torch copies.
        held: what the pieces are of.
    """
    shared = starmap(ctypes.memmove, large)
    rest = chain(shared, starmap(ctypes.memmove, small), starmap(torch.Tensor.copy_, others))

    def assist(held: object = held) -> None:  # which stays mapped for as long as it runs
        deque(shared, 0)

    helper = Helper(assist, "wsync-copy")
    left_alone = sum(map(itemgetter(2), large)) < _WORTH_TWO

    def work() -> None:
        nonlocal left_alone
        if not left_alone:
            left_alone = True
            helper.start()
        deque(rest, 0)
        helper.wait()

    undivided(work)
    helper.check()
