"""How a policy comes to lie on another slot: pages move, and neither weights nor tensors do.

All tensors of a policy are views of one *window*, a stretch of addresses. Each slot has a *home*, another such stretch,
where its pages are mapped once. To take a version the pages in the window go home, and those of the leased slot come
into the window: two calls of mremap(2), which move entries of page tables, 512 pages at a time, in some ten
microseconds for 64 MiB. To point tensor after tensor elsewhere takes half a microsecond each, all that torch does for
``tensor.data = …``: that is done once, when the window is made.

What is in the window changes for whoever points there. So before a move it is made sure that the policy's tensors are
there, all of them, and nobody else: the uses of the window's storage are counted, and the tensors' addresses compared.
Where that is not so (a detached alias, a ``state_dict``, a tensor that was given other memory) the version gets a
window of its own, to which the policy's tensors are pointed. The old one stays as it is, and leased, until nothing
points there any more: the memory that torch wraps for it owns the lease.

That look is most of what a version costs: 0.15 us a tensor while all is in the caches, and some 0.7 where a copy of 64
MiB has just been through them, as is all else here several times slower then (0.5 ms for 200 tensors, 0.1 ms with warm
caches). A move must interrupt the processors on which other threads of the process ran, which takes 0.1 ms of it.

A graph saves a parameter as the tensor object that it is, which no storage counts and no move spares: autograd is told
that the tensors were written, so that a backward pass over a version is its error. Where nothing but Python has them no
graph has, and they are left alone, for with cold caches to tell it takes 0.4 us a tensor, and to ask 0.1.

A mapping is private: what the policy writes in place hits pages of the process's own. They go home with the slot, and
are dropped there before it comes back (see ``renewal``).
"""

from __future__ import annotations

import ctypes
import errno
import sys
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from .addresses import SPAN, Stretch, move
from .attached import Attached
from .errors import WsyncError
from .layout import views
from .memory import has_own_pages, populate, renew
from .renewal import Renewal
from .segment import Lease, Segment

_use_count = torch.Tensor._use_count  # type: ignore[attr-defined]  # one of the Python object; a graph has its own


class Homes:
    """Where the pages of a segment's slots are mapped while they are in no window."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.nbytes = segment.data_offset + segment.layout.nbytes
        self.span = -(-self.nbytes // SPAN) * SPAN
        self.kind: Any = type("_Window", (ctypes.c_uint8 * self.nbytes,), {})  # a subclass can carry attributes
        self._stretches: dict[int, Stretch] = {}  # of the slots that were live so far: most segments' last never are
        self._renewals: dict[int, Renewal | None] = {}
        self._left: int | None = None
        self._moves = True  # before Linux 5.13 a window is mapped anew instead

    def prepare(self, slot: int) -> bool:
        """Has the pages of a leased slot ready, as they are in its file; True if the policy had written there.

        Raises:
            OSError, WsyncError: the system refused it.
        """
        if not self._moves:
            return False
        if slot in self._renewals:
            renewal, self._renewals[slot] = self._renewals[slot], None  # one that failed is tried anew
            return renewal.wait() if renewal else renew(self._at(slot), self.nbytes)
        if slot not in self._stretches:
            self._stretches[slot] = Stretch(self.span)
        self.segment.map_at(slot, self._at(slot), self.span)
        populate(self._at(slot), self.nbytes)
        self._renewals[slot] = None
        return False

    def show(self, slot: int, window: int) -> None:
        """Puts the pages of a slot that is prepared into a window.

        Raises:
            OSError, WsyncError: the system refused it, and the window is as it was.
        """
        if self._moves:
            try:
                move(self._at(slot), window, self.span)
                return
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise
                self._moves = False
        self.segment.map_at(slot, window, self.span)
        populate(window, self.nbytes)

    def take_back(self, slot: int, window: int) -> bool:
        """Puts the pages of a slot from a window where they belong; True if it shows already that they were written."""
        if not self._moves:
            return has_own_pages(window, self.nbytes) is True
        move(window, self._at(slot), self.span)
        self._left = slot
        return False

    def lose(self, slot: int) -> None:
        """Of a slot whose pages stay in a window for good: they are mapped anew when it comes back."""
        self._renewals.pop(slot, None)

    def renew(self) -> None:
        """Begins to drop what the policy wrote to the slot that it left last."""
        left, self._left = self._left, None
        if left is not None:
            self._renewals[left] = Renewal(self._stretches[left], self.nbytes)

    def forget_renewals(self) -> None:
        """In a forked child, where nobody does them."""
        self._left = None
        self._renewals = dict.fromkeys(self._renewals)

    def _at(self, slot: int) -> int:
        return self._stretches[slot].start


@dataclass(slots=True)
class _Window:
    """What a policy's tensors point into.

    Attributes:
        homes: of the segment whose slots it shows.
        start: its first address.
        memory: what the storage is made of: torch keeps it for as long as a tensor points there, and it keeps the
            addresses (``keep``) and owns the lease (``leases``), two of them where a move was cut short: then nobody
            knows which slot it shows, nor what the homes show, and none of them is moved again.
        storage: the one storage of all that points there.
        alone: its uses (see ``uses``) before anything points there.
        held: its uses when just the policy's tensors do.
        addresses: of the policy's tensors there.
    """

    homes: Homes
    start: int
    memory: Any
    storage: torch.UntypedStorage
    alone: tuple[int, int] = (0, 0)
    held: tuple[int, int] = (0, 0)
    addresses: tuple[int, ...] = ()

    def uses(self) -> tuple[int, int]:
        """How many tensors point there, and who has the storage object, which is one and the same for all who ask."""
        return int(torch._C._storage_Use_Count(self.storage._cdata)), sys.getrefcount(self.storage)

    def holds_just(self, tensors: list[torch.Tensor]) -> bool:
        """Whether these tensors are where they were put, and nothing else points into the window."""
        return self.uses() == self.held and _addresses(tensors) == self.addresses


class Swap:
    """The tensors of one policy, pointed at the slots of a segment."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        shown = [(tensor, index) for tensor, index in attached.targets if tensor.numel()]  # who has no bytes stays
        self._tensors, self._indices = [tensor for tensor, _ in shown], [index for _, index in shown]
        self._window: _Window | None = None
        self._since = 0.0  # when the window's version was taken
        self._kept: list[tuple[int, weakref.ref[Any], float]] = []  # slots that outlive the policy's own use of them

    def take(self, segment: Segment, lease: Lease) -> bool:
        """Shows the policy a leased slot, and keeps the lease; True if the policy was seen to have written to one.

        Whoever uses the old weights in a backward pass is told by autograd, as after any write in place.

        Raises:
            OSError, WsyncError: the system refused it; the policy has what it had.
            UsageError: the policy's tensors are others than those that were attached, or of another form.
        """
        window, attached = self._window, self._attached
        same = window and window.homes.segment is segment and len(window.memory.leases) == 1
        homes = window.homes if window and same else Homes(segment)
        written = homes.prepare(lease.slot)  # may wait: what points where is looked at afterwards
        stays = window if window and same and window.holds_just(self._tensors) and attached.in_place() else None
        if stays is None:
            attached.check()  # all before the first: a mixture is no version
        if sum(map(_use_count, self._tensors)) > len(self._tensors):
            torch.autograd.graph.increment_version(self._tensors)
        written |= self._move(stays, lease) if stays else self._point(homes, lease)
        self._since = time.time()
        return written

    def holds(self, lease: Lease) -> bool:
        """Whether the policy may point into this slot, also where a take was cut short."""
        return self._window is not None and lease in self._window.memory.leases

    def renew(self) -> None:
        """What is left to do after a take, and need not hold the policy's step up."""
        if self._window:
            self._window.homes.renew()

    def leases(self) -> tuple[tuple[int, ...], float]:
        """The slot that the policy points into and those that only a kept tensor still does; since when the oldest."""
        self._kept = [kept for kept in self._kept if kept[1]() is not None]
        held = [(lease.slot, self._since) for lease in self._window.memory.leases] if self._window else []
        leases = [*held, *((slot, since) for slot, _, since in self._kept)]
        return tuple(slot for slot, _ in leases), min((since for _, since in leases), default=0.0)

    def give_own(self) -> None:
        """Gives the policy tensors of its own, with the weights that it has, and lets go of all but what is kept."""
        if self._window is None:
            return
        own: dict[int, torch.Tensor] = {}
        with torch.inference_mode(False):
            for tensor, index in self._attached.targets:
                if index not in own:  # tied tensors stay tied
                    own[index] = tensor.detach().clone()
                tensor.data = own[index]
        window, self._window = self._window, None
        self._leave(window)

    def after_fork(self) -> None:
        """In the child: what a thread of the parent was to do is done by who needs it."""
        if self._window:
            self._window.homes.forget_renewals()

    def _move(self, window: _Window, lease: Lease) -> bool:
        homes, (old,) = window.homes, window.memory.leases
        window.memory.leases = (old, lease)  # so it stays where an interrupt, or a fork, comes in between
        try:
            written = homes.take_back(old.slot, window.start)  # the window still shows its file
            homes.show(lease.slot, window.start)  # R4 use
        except (OSError, WsyncError):
            window.memory.leases = (old,)
            raise
        window.memory.leases = (lease,)
        old.release()
        return written

    def _point(self, homes: Homes, lease: Lease) -> bool:
        """Makes a window for the slot and points the policy's tensors there; the one before is left as it is."""
        old, window = self._window, _open(homes)
        homes.show(lease.slot, window.start)
        window.memory.leases = (lease,)
        with torch.inference_mode(False):  # set in inference mode, a parameter would become an inference tensor
            tensors = views(homes.segment.layout, window.storage, homes.segment.data_offset)
            tensors = [tensors[index] for index in self._indices]
            self._window = window
            point: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]
            # One call, so that no interrupt comes between two tensors.
            deque(map(point, self._tensors, tensors), 0)  # R4 use
        del tensors
        window.held = window.alone[0] + len(self._tensors), window.uses()[1]  # another thread may hold a tensor already
        window.addresses = _addresses(self._tensors)
        return self._leave(old) if old else False

    def _leave(self, window: _Window) -> bool:
        """Releases the lease of a window that the policy left, or leaves it to the tensors that still point there."""
        leases, written = window.memory.leases, False
        if window.uses() != window.alone:
            self._kept.extend((lease.slot, weakref.ref(window.memory), self._since) for lease in leases)
            window.homes.lose(leases[0].slot)
            return False
        if len(leases) == 1:
            try:
                written = window.homes.take_back(leases[0].slot, window.start)
            except (OSError, WsyncError):  # the pages go with the window
                window.homes.lose(leases[0].slot)
        window.memory.leases = ()
        for lease in leases:
            lease.release()
        return written


def _addresses(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    return tuple(map(torch.Tensor.data_ptr, tensors))


def _open(homes: Homes) -> _Window:
    """A window that shows nothing yet; torch copies nothing."""
    stretch = Stretch(homes.span)
    memory = homes.kind.from_address(stretch.start)
    memory.keep, memory.leases = stretch, ()
    with torch.inference_mode(False):
        window = _Window(homes, stretch.start, memory, torch.frombuffer(memory, dtype=torch.uint8).untyped_storage())
    window.alone = window.uses()
    return window
