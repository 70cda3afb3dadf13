"""The reader of a policy with tensors on a CUDA device.

It keeps the promises of every reader, and one more: a step never waits for the bus. A ``refresh()`` that finds a new
version begins to copy it and returns False, as do later calls while the copy is under way; the first call after the
copy gives the policy the version and returns True. The slot is leased until the copy over the bus is done. A version
that is published meanwhile is taken after this one. Without a buffer on the device (``staging="none"``), ``refresh()``
waits for the bus. A policy that is split over devices has a ``PlainReader``, which copies tensor by tensor.
"""

from __future__ import annotations

import logging
import time

from ...checkpoints.files.extras import Extras
from ...errors import HalfWritten, OutOfDeviceMemory, UsageError
from ...segment.publication import Publication
from ...segment.segment import Segment
from ...segment.word_and_lease import Lease
from ..reader import CLOSED, Reader, Way
from ..reader_options import Terms
from ..tensors import Attached
from .transfer import DeviceWeights

_log = logging.getLogger("wsync")
_NAP = 0.0005  # seconds between two looks at a copy under way


class DeviceReader(Reader):
    """The ``Reader`` of a policy on one CUDA device; made by ``attach``."""

    full = 1.0  # seconds until memory is asked of a full device again: asking drops torch's caches there

    def __init__(self, attached: Attached, segment: Segment, mode: Way, weights: DeviceWeights, terms: Terms) -> None:
        self._attached, self._weights = attached, weights
        super().__init__(segment, mode, terms)
        # The copy under way: what it copies, and since when.
        self._sent: tuple[Lease, Publication, Extras, float] | None = None
        self._again = 0.0
        self._told_of_room = False
        self._forked = False

    def _pause(self) -> float:
        flight = self._weights.flight
        if flight is not None and flight.query():
            return 0.0
        return _NAP if flight is not None or time.monotonic() < self._again else super()._pause()

    def _advance(self, wait: bool) -> bool:
        landed = False
        if self._sent is not None:
            landed = self._land(wait)
            if not (landed and wait):
                return landed
        if time.monotonic() < self._again:
            return landed
        lease = self._newest()
        return (lease is not None and self._begin(lease) and self._land(wait)) or landed

    def _begin(self, lease: Lease) -> bool:
        """Begins to copy the leased version; False if there is no room for it."""
        try:
            self._attached.check()
            publication = self._segment.leased(lease)
            extras = self._segment.extras(publication, lease.slot)
            self._weights.start(self._segment, lease.slot)
        except OutOfDeviceMemory as exc:
            lease.release()
            if self.version == 0:
                raise
            self._no_room(exc)
            return False
        except BaseException:  # even an interrupt: nothing reads the slot any more
            lease.release()
            raise
        self._sent = lease, publication, extras, time.time()
        self._again, self._told_of_room = 0.0, False
        self._registration.update(self.version, *self._leases())
        return True

    def _land(self, wait: bool) -> bool:
        assert self._sent is not None
        if not self._weights.landed(wait=wait):
            return False
        (lease, publication, extras, _), self._sent = self._sent, None
        lease.release()
        self._attached.check()  # again: the policy may have been moved during the copy
        first = self.version == 0
        try:
            self._weights.take()
        except HalfWritten as exc:
            self._half_written = exc
            raise
        self._took(lease, publication, extras)
        if first:
            self._weights.make_room(self._segment.layout)  # now, so that ``attach`` reports if there is no room
        return True

    def _no_room(self, exc: OutOfDeviceMemory) -> None:
        self._again = time.monotonic() + self.full
        if not self._told_of_room:
            self._told_of_room = True
            _log.warning("the policy attached to %r keeps version %d: %s", self.name, self.version, exc)

    def _leases(self) -> tuple[tuple[int, ...], float]:
        return ((), 0.0) if self._sent is None else ((self._sent[0].slot,), self._sent[3])

    def _find_again(self) -> bool:
        if self._sent is not None:  # called by a waiting thread: a copy under way still needs its locked pages
            return False
        found = super()._find_again()
        if found:
            self._weights.lock(self._segment)
        return found

    def _give_own(self) -> None:
        """Waits for a copy under way, and drops its version; the policy's tensors are its own already."""
        try:
            self._weights.close()
        finally:
            if self._sent is not None:
                self._sent[0].release()
                self._sent = None

    def _check_open(self) -> None:
        if self._forked:
            raise UsageError(
                f"this reader of {self.name!r} was attached before a fork, and CUDA does not work after one. Attach "
                'in the child, in a process started with the method "spawn".'
            )
        super()._check_open()
        self._weights.check_uncaptured(self.name)

    def _after_fork(self) -> None:
        super()._after_fork()
        if not self._closed:
            self._closed = self._forked = True
            self._registration.close()
            self._weights.forget()
            if self._sent is not None:
                self._sent[0].release()  # only this process's part of it
                self._sent = None
            self._words = CLOSED

    def __del__(self) -> None:
        weights = getattr(self, "_weights", None)
        if weights is not None:
            weights.close()  # a copy under way still reads the leased slot
