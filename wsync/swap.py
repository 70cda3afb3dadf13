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

A mapping is private: what the policy writes in place hits pages of the process's own. They go home with the slot, and
are dropped there before it comes back (see ``renewal``).
"""

from __future__ import annotations

import ctypes
import errno
import time
import weakref
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


class Homes:
    """Where the pages of a segment's slots are mapped while they are in no window."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.nbytes = segment.data_offset + segment.layout.nbytes
        self.span = -(-self.nbytes // SPAN) * SPAN
        self._stretch = Stretch(segment.slots * self.span)
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
        written = False
        if slot not in self._renewals:
            self.segment.map_at(slot, self._at(slot), self.span)
            populate(self._at(slot), self.nbytes)
        else:
            renewal = self._renewals[slot]
            written = renewal.wait() if renewal else renew(self._at(slot), self.nbytes)
        self._renewals[slot] = None
        return written

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
            self._renewals[left] = Renewal(self._stretch, self._at(left), self.nbytes)

    def forget_renewals(self) -> None:
        """In a forked child, where nobody does them."""
        self._left = None
        self._renewals = dict.fromkeys(self._renewals)

    def _at(self, slot: int) -> int:
        return self._stretch.start + slot * self.span


@dataclass(slots=True)
class _Window:
    """What a policy's tensors point into.

    Attributes:
        homes: of the segment whose slots it shows.
        start: its first address.
        memory: what the storage is made of: torch keeps it for as long as a tensor points there, and it keeps the
            addresses (``keep``) and owns the lease (``lease``).
        storage: the one storage of all that points there.
        uses: of the storage by itself and the policy's tensors.
        addresses: of the policy's tensors.
    """

    homes: Homes
    start: int
    memory: Any
    storage: torch.UntypedStorage
    uses: int = 0
    addresses: tuple[int, ...] = ()

    def used(self) -> int:
        return int(torch._C._storage_Use_Count(self.storage._cdata))

    def holds_just(self, policy: Attached) -> bool:
        """Whether the policy's tensors are where they were put, and nothing else points into the window.

        A tensor in the place of one of them is one more that points here, or lies elsewhere.
        """
        try:
            return self.used() == self.uses and policy.addresses() == self.addresses
        except TypeError:
            return False


class Swap:
    """The tensors of one policy, pointed at the slots of a segment."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        self._window: _Window | None = None
        self._since = 0.0  # when the window's version was taken
        self._kept: list[tuple[int, weakref.ref[Any], float]] = []  # slots that outlive the policy's own use of them

    def take(self, segment: Segment, lease: Lease) -> bool:
        """Shows the policy a leased slot, and keeps the lease; True if the policy was seen to have written to one.

        Raises:
            OSError, WsyncError: the system refused it; the policy has what it had.
            UsageError: the policy's tensors are others than those that were attached, or of another form.
        """
        window = self._window
        attached = self._attached
        if window and window.homes.segment is segment and window.holds_just(attached):
            written = self._move(window, lease)
        else:
            attached.check()  # all before the first: a mixture is no version
            attached.look_again()
            written = self._point(segment, lease)
        self._since = time.time()
        return written

    def renew(self) -> None:
        """What is left to do after a take, and need not hold the policy's step up."""
        if self._window:
            self._window.homes.renew()

    def leases(self) -> tuple[tuple[int, ...], float]:
        """The slot that the policy points into and those that only a kept tensor still does; since when the oldest."""
        self._kept = [kept for kept in self._kept if kept[1]() is not None]
        held = [(self._window.memory.lease.slot, self._since)] if self._window else []
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
        homes, old = window.homes, window.memory.lease
        written = homes.prepare(lease.slot)
        written |= homes.take_back(old.slot, window.start)  # the window still shows its file
        homes.show(lease.slot, window.start)  # R4 use
        window.memory.lease = lease
        old.release()
        return written

    def _point(self, segment: Segment, lease: Lease) -> bool:
        """Makes a window for the slot and points the policy's tensors there; the one before is left as it is."""
        old = self._window
        homes = old.homes if old and old.homes.segment is segment else Homes(segment)
        window, written = _open(homes), homes.prepare(lease.slot)
        homes.show(lease.slot, window.start)
        window.memory.lease = lease
        with torch.inference_mode(False):  # set in inference mode, a parameter would become an inference tensor
            tensors = views(segment.layout, window.storage, segment.data_offset)
            for tensor, index in self._attached.targets:
                tensor.data = tensors[index]  # R4 use
        del tensors
        window.uses, window.addresses = window.used(), self._attached.addresses()
        self._window = window
        if old:
            written |= self._leave(old)
        return written

    def _leave(self, window: _Window) -> bool:
        """Releases the lease of a window that the policy left, or leaves it to the tensors that still point there."""
        lease = window.memory.lease
        if window.used() > 1:
            self._kept.append((lease.slot, weakref.ref(window.memory), self._since))
            window.homes.lose(lease.slot)
            return False
        try:
            written = window.homes.take_back(lease.slot, window.start)
        except (OSError, WsyncError):  # the pages go with the window
            window.homes.lose(lease.slot)
            written = False
        window.memory.lease = None
        lease.release()
        return written


def _open(homes: Homes) -> _Window:
    """A window that shows nothing yet; torch copies nothing."""
    stretch = Stretch(homes.span)
    kind: Any = type("_Window", (ctypes.c_uint8 * homes.nbytes,), {})  # a subclass can carry attributes
    memory = kind.from_address(stretch.start)
    memory.keep, memory.lease = stretch, None
    with torch.inference_mode(False):
        storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return _Window(homes, stretch.start, memory, storage)
