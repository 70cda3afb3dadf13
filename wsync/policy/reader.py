"""The reader in a policy's process: refresh between steps, wait, close; ``attaching`` makes it.

There are two ways to take a version. ``swap`` points the policy's parameters and buffers at the leased slot: no bytes
move, and the time depends only on the number of tensors. ``copy`` copies into the policy's own tensors, which keep
their addresses.

``PlainReader`` takes a version while the caller waits; a policy on a CUDA device has another reader (``gpu.reader``).

A step with nothing new costs one load of eight bytes and one comparison. Call ``refresh()`` between steps, while no
other thread runs the policy; or let every thread run it inside ``using()``.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Literal, NoReturn

from ..checkpoints.files.extras import Extras
from ..errors import HalfWritten, SegmentDamaged, SegmentError, UsageError, from_os_error
from ..segment.publication import Publication
from ..segment.reader_records import Registration
from ..segment.segment import Segment
from ..segment.segment_files import WORD_OFFSET
from ..segment.word_and_lease import Lease
from ..system.memory import deadline_of, sleep_on
from .copying import Copy
from .reader_options import Terms
from .segment_search import Lookout, Search, is_gone
from .swap import Swap
from .tensors import Attached, drop_caches
from .user_threads import Users, skips

Way = Literal["swap", "copy"]
Mode = Literal["auto", "swap", "copy"]

_WORD = WORD_OFFSET // 8
_clock = partial(time.clock_gettime, time.CLOCK_BOOTTIME)  # seconds; never jumps, and counts suspended time
_WAITS = (
    "wait() was called by a signal handler in the middle of another call of this reader of {!r}. Have the handler set "
    "a flag, and wait where the program reads the flag."
)
_UNSENDABLE = (
    "a reader of {!r} cannot be sent to another process or copied: its leases belong to this process. Send the policy "
    "alone, and attach it there."
)


class Reader(ABC):
    """Keeps a policy in step with a segment; made by ``attach``.

    Attributes:
        name: name of the segment.
        mode: ``"swap"`` or ``"copy"``.
        version: the version of the policy's weights; 0 before the first.
        step: the producer's number for these weights; None if it gave none.
        extras: the files that travelled with these weights: bytes by file name.
        metadata: the metadata of their checkpoint.
    """

    def __init__(self, segment: Segment, mode: Way, terms: Terms) -> None:
        self.name, self.mode, self.version = segment.name, mode, 0
        self.step: int | None = None
        self.extras, self.metadata = Extras()
        self._lock = threading.RLock()  # re-entrant, so that a signal handler can tell that its thread holds it
        self._closed = self._close_asked = False
        self._half_written: HalfWritten | None = None  # if set, the policy must not be used any more
        self._terms, self._users, self._search, self._born = terms, Users(), Search(), 0.0
        self._schedule, self._calls_left = Lookout(1) if terms.max_age else Lookout(), 1
        self._registration = self._follow(segment)
        _readers.add(self)

    def refresh(self, wait: bool = False, users: Literal["wait", "skip"] = "wait") -> bool:
        """Takes the newest version if there is a newer one; call it between steps.

        Args:
            wait: on a GPU, whether to wait until a new version has arrived; if False, this call starts its transfer,
                and a later call takes it. On the CPU, each call takes a new version at once.
            users: if other threads are inside ``using()``: ``"wait"`` lets no more in, and waits until they have left;
                ``"skip"`` returns False, and a later call takes the version.

        Returns:
            Whether the policy has a new version; False in a signal handler that interrupted a call of this reader.
            If the segment was removed, the policy keeps its weights, a warning is logged once, and the reader follows
            a new segment of the same name and layout. An interrupt (Ctrl-C) is raised after the version is taken.

        Raises:
            Stale: the policy's version is older than ``max_age``; see ``attach``.
            SegmentError: a slot cannot be opened, mapped or read; the policy keeps its version.
            UsageError: this reader is closed; the policy was moved (``.to()``) since it was attached; this thread is
                inside ``using()``; on a GPU, also while a CUDA graph is captured, and in a forked child.
            CopyRefused: a tensor's class refused its copy; the policy keeps its version.
            HalfWritten: a copy failed, and tensors already written could not be restored; later calls raise it again.
            Exception: what ``on_version`` raised, with ``on_version_error="raise"``.
        """
        if self._words[_WORD] == self._seen:
            self._calls_left -= 1
            return self._calls_left <= 0 and self._look_around(users == "skip")
        return self._refresh(wait, skips(users))

    @contextmanager
    def using(self) -> Iterator[int]:
        """Keeps the version from changing during a block, in any number of threads; yields the version.

        Meanwhile ``refresh`` and ``close`` in other threads wait. A thread may enter such a block within another.

        Raises:
            UsageError: this reader is closed.
            HalfWritten: the policy has weights of two versions.
        """
        with self._users.inside():
            self._check_open()
            yield self.version

    def wait(self, timeout: float | None = None) -> bool:
        """Sleeps until ``refresh`` would take a version; False when time is up, or once the reader is closed.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            UsageError: this reader is closed already, timeout is not a number, or a signal handler interrupted a call.
        """
        deadline = deadline_of(timeout)
        if self._is_at_work():
            raise UsageError(_WAITS.format(self.name))
        self._check_open()
        while True:
            with self._lock:
                if self._closed:
                    return False
                self._check_open()
                if not (pause := self._pause()):
                    return True
                word, address = self._words[_WORD], self._address
            if deadline is not None and (pause := min(pause, deadline - time.monotonic())) <= 0:
                return False
            sleep_on(address, word, pause)

    def close(self) -> None:
        """Closes the segment, after a ``refresh`` under way; the policy keeps its weights, in tensors of its own."""
        if self._is_at_work():  # a signal handler called this
            self._close_asked = True
            return
        with self._users.alone() as alone, self._lock:
            if self._closed or not alone:
                self._close_asked = not self._closed  # a signal handler called this while this thread waits for others
                return
            self._closed = True
            try:
                self._give_own()
            finally:
                self._registration.close()
                self._words = CLOSED
                self._segment.close()

    @property
    def age(self) -> float:
        """Seconds since the policy's version was published (``attach`` explains the clock); 0 before the first."""
        return _clock() - self._born if self.version else 0.0

    @property
    def lag(self) -> int:
        """How many versions the live one is ahead of the policy's."""
        return max(0, (self._words[_WORD] >> 8) - self.version)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"version {self.version}, step {self.step}"
        return f"<wsync.Reader {self.name!r}: {state}, mode {self.mode!r}>"

    def _refresh(self, wait: bool = False, skip: bool = False) -> bool:
        if self._is_at_work():
            return False
        try:
            with self._users.alone(skip=skip) as alone:
                took = alone and self._take_newest(wait)
        finally:
            if self._close_asked:
                self.close()
        self._terms.check_age(self.name, self.version, self.age)
        return took

    def _take_newest(self, wait: bool) -> bool:
        """Takes the newest version while no other thread is inside, and calls ``on_version``."""
        born = self._born
        try:
            with self._lock:
                self._check_open()
                return self._advance(wait)
        except OSError as exc:
            if exc.errno is None:  # a signal handler's own TimeoutError
                raise
            raise from_os_error(exc, self._segment.path) from exc
        finally:
            if self._born != born:  # even if an interrupt came meanwhile
                with self._users.inside(alone=True):
                    self._terms.tell(self.name, self.version, self.step, self.extras)

    @abstractmethod
    def _advance(self, wait: bool) -> bool:
        """Takes the newest version; called under the lock. Returns whether it did."""

    def _is_at_work(self) -> bool:
        """Whether this thread already holds the lock: then this is a signal handler's call, which must not wait."""
        return self._lock._is_owned()  # type: ignore[attr-defined, no-any-return]  # as threading.Condition asks

    def _newest(self) -> Lease | None:
        """A lease of a version newer than the policy's; None if there is none to lease now."""
        try:
            lease = self._segment.lease()
        except SegmentDamaged:
            if not self._segment.damage():
                raise
            lease = None
        if lease is None:
            return self._newest() if self._find_again() else None
        if lease.version == self._taken:
            self._seen = lease.word
            lease.release()
            return None
        return lease

    def _pause(self) -> float:
        """Seconds after which ``wait`` must ask again, called under the lock; 0 if ``refresh`` has work now."""
        self._find_again()  # deletion by hand does not change the WORD
        with suppress(SegmentError, OSError):  # which ``refresh`` raises
            if self._words[_WORD] >> 8 == self._taken or not (lease := self._newest()):
                return 3600.0
            lease.release()
        return 0.0

    def _took(self, lease: Lease, publication: Publication, extras: Extras) -> None:
        drop_caches()
        self.extras, self.metadata = extras
        self.version = self._taken = lease.version
        self.step, self._seen = publication.step, lease.word
        self._born = _clock() - max(0.0, time.time() - publication.published_at)
        self._registration.update(self.version, *self._leases())

    def _look_around(self, skip: bool) -> bool:
        """Checks now and then whether the segment still exists, because deletion by hand does not change the WORD."""
        self._calls_left, due = self._schedule.next()
        if due and not (self._closed or self._is_at_work()) and is_gone(self._segment):
            with self._lock:
                found = self._find_again()
            if found:
                return self._refresh(skip=skip)
        self._terms.check_age(self.name, self.version, self.age)
        return False

    @abstractmethod
    def _give_own(self) -> None:
        """Gives the policy tensors of its own, with its weights, if its tensors are not its own yet."""

    @abstractmethod
    def _leases(self) -> tuple[tuple[int, ...], float]:
        """The slots that this reader leases, and when it took the oldest lease, in seconds since the epoch."""

    def _follow(self, segment: Segment) -> Registration:
        """Makes this the reader's segment, and adds the reader to its records."""
        registration, address = Registration(segment.path, self.mode), segment.control.address
        self._segment, self._address, self._seen, self._taken = segment, address, -1, 0  # the last two: WORD, version
        self._words = segment.control.words  # last: after an interrupt before it, all of this is done again
        return registration

    def _find_again(self) -> bool:
        """If this segment is gone, attaches to one of its name and layout; returns whether there was one."""
        if not (segment := self._search.find(self._segment, self.version)):
            return False
        left, record = self._segment, self._registration
        self._registration = self._follow(segment)
        self._search.over()
        record.close()
        left.close()
        return True

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"this reader of {self.name!r} is closed. Attach again for new versions.")
        if self._half_written:
            raise self._half_written

    def __reduce__(self) -> NoReturn:
        raise UsageError(_UNSENDABLE.format(self.name))

    def _after_fork(self) -> None:
        """Gives a forked child a record of its own. Leases are shared with the parent, until both release them."""
        self._lock, self._close_asked = threading.RLock(), False
        self._users.after_fork()
        if not self._closed:
            self._registration.close(unlink=False)
            self._registration = Registration(self._segment.path, self.mode, self.version, *self._leases())


class PlainReader(Reader):
    """A ``Reader`` whose ``refresh`` takes a version at once; for a policy on the CPU or on several devices."""

    def __init__(self, attached: Attached, segment: Segment, mode: Way, terms: Terms) -> None:
        self._way: Swap | Copy = Swap(attached) if mode == "swap" else Copy(attached)
        super().__init__(segment, mode, terms)

    def _advance(self, wait: bool) -> bool:
        lease = self._newest()
        if lease is None:
            return False
        try:
            self._take_in(lease)
        except Exception as exc:
            self._half_written = exc if isinstance(exc, HalfWritten) else None
            raise
        except BaseException:  # an interrupt: first finish what was begun
            self._take_in(lease)
            raise
        finally:
            if not self._way.holds(lease):  # it was copied, or taking it failed
                lease.release()
        return True

    def _take_in(self, lease: Lease) -> None:
        """Gives the policy a leased version; may be called again after an interrupt."""
        publication = self._segment.leased(lease)
        extras = self._segment.extras(publication, lease.slot)
        self._way.take(self._segment, lease)
        self._took(lease, publication, extras)

    def _give_own(self) -> None:
        self._way.close()

    def _leases(self) -> tuple[tuple[int, ...], float]:
        return self._way.leases()

    def _after_fork(self) -> None:
        self._way.after_fork()
        super()._after_fork()


CLOSED = memoryview(bytes(WORD_OFFSET + 8)).cast("Q")
_readers: weakref.WeakSet[Reader] = weakref.WeakSet()


def _after_fork() -> None:
    for reader in list(_readers):
        reader._after_fork()


os.register_at_fork(after_in_child=_after_fork)
