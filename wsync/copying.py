"""How the tensors of a policy get a version as bytes of their own: copied from the leased slot, to where they are.

Two threads share the tensors, for one gets half of what memory gives. They are not torch's: its threads wait for each
other at the end of each tensor, and where other processes have the processors, of two cores three, that was seen to
take a hundred times as long. A tensor that is no plain row of bytes (strided, a subclass) is left to torch.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from itertools import chain, compress, filterfalse, starmap
from typing import Any

import torch

from .ahead import Done, undivided
from .attached import Attached
from .layout import views
from .segment import Lease, Segment

_PIECE = 4 << 20  # bytes that one thread copies at a time
_LARGE = 1 << 17  # bytes; of less, two threads would spend their time on handing the interpreter to each other
_WORTH_TWO = 8 << 20  # bytes; less is copied before a second thread has begun
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
# Called for all tensors in one go: with cold caches, a loop over 200 of them takes a millisecond of a step.
_is_cpu, _nbytes = torch.Tensor.is_cpu.__get__, torch.Tensor.nbytes.__get__  # type: ignore[attr-defined]
_data_ptr = torch.Tensor.data_ptr

Copied = tuple[int, int, int]
"""Where to, where from, and how many bytes."""


class Copy:
    """The tensors of one policy, filled from the slots of a segment."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        self._sources: dict[int, list[torch.Tensor]] = {}  # by slot, in the order of the policy's tensors

    def take(self, segment: Segment, lease: Lease) -> None:
        """Copies a leased slot; whoever uses a tensor's old values in a backward pass is told by autograd.

        Raises:
            OSError, WsyncError: the slot cannot be mapped; the policy has what it had.
            UsageError: the policy's tensors are others than those that were attached.
        """
        self._attached.check()
        targets = self._attached.tensors
        if lease.slot not in self._sources:
            self._sources[lease.slot] = self._views(segment, lease.slot)
        sources = self._sources[lease.slot]
        plain = [True] * len(targets) if _are_rows(targets) else [_are_rows([tensor]) for tensor in targets]
        rows = list(compress(targets, plain))
        others = [pair for pair, row in zip(zip(targets, sources, strict=True), plain, strict=True) if not row]
        with torch.inference_mode(any(map(torch.Tensor.is_inference, targets))), torch.no_grad():
            _copy(rows, list(compress(sources, plain)), others)  # R4 use
        torch.autograd.graph.increment_version(list(filterfalse(torch.Tensor.is_inference, rows)))

    def forget(self) -> None:
        """Lets go of the slots, of a segment that is left."""
        self._sources.clear()

    def _views(self, segment: Segment, slot: int) -> list[torch.Tensor]:
        """Tensors over a leased slot's memory; torch copies nothing."""
        mapped, address = segment.map_slot(slot)
        kind: Any = type("_Slot", (ctypes.c_uint8 * len(mapped),), {})  # a subclass can carry attributes
        memory = kind.from_address(address)
        memory.keep = mapped
        with torch.inference_mode(False):
            storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
            tensors = views(segment.layout, storage, segment.data_offset)
            return [tensors[index] for _, index in self._attached.targets]


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


def _pieces(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> list[Copied]:
    where = zip(map(_data_ptr, targets), map(_data_ptr, sources), map(_nbytes, targets), strict=True)
    return [
        (target + at, source + at, min(_PIECE, nbytes - at))
        for target, source, nbytes in where
        for at in range(0, nbytes, _PIECE)
    ]


def _copy(
    targets: list[torch.Tensor], sources: list[torch.Tensor], others: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Copies all, and raises what comes in between, an interrupt or an error, when nothing is under way any more."""
    pieces = _pieces(targets, sources)
    large = iter([piece for piece in pieces if piece[2] >= _LARGE])
    small = [piece for piece in pieces if piece[2] < _LARGE]
    rest = chain(starmap(ctypes.memmove, chain(large, small)), starmap(torch.Tensor.copy_, others))
    done, helped = Done(), list[Done]()

    def assist(*held: list[torch.Tensor]) -> None:  # what it holds stays mapped for as long as it runs
        helped.append(done)
        deque(starmap(ctypes.memmove, large), 0)
        done.tell()

    helper = threading.Thread(target=assist, args=(targets, sources), name="wsync-copy", daemon=True)
    left_alone = sum(nbytes for *_, nbytes in pieces if nbytes >= _LARGE) < _WORTH_TWO

    def work() -> None:
        nonlocal left_alone
        if not left_alone:
            left_alone = True
            try:
                helper.start()
            except RuntimeError:  # this process may have no more threads
                pass
        deque(rest, 0)
        if helped:  # else, should it still begin, nothing is left for it
            done.wait()

    undivided(work)
