"""Makes the thread that changes a policy and those that run it wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UsageError


def skips(users: str) -> bool:
    """Whether ``users`` is ``"skip"`` and not ``"wait"``; raises UsageError if it is neither."""
    if users not in ("wait", "skip"):
        raise UsageError(f'users={users!r} is unknown. Use "wait" or "skip".')
    return users == "skip"


class Users:
    """Counts the threads that are inside ``using()``; a change waits for them, and lets no others in meanwhile."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # re-entrant, for a signal handler
        self._inside: dict[int, int] = {}  # how many blocks each thread is inside
        self._changer = 0  # the thread that changes the policy or waits to; 0 if none

    @contextmanager
    def inside(self, *, alone: bool = False) -> Iterator[None]:
        """Counts this thread as inside for the block; it may enter again.

        Args:
            alone: whether this thread is the one that is alone; then it does not wait for its own change.
        """
        me = threading.get_ident()
        with self._changed:
            while self._changer and not alone and me not in self._inside:
                self._changed.wait()
            self._inside[me] = self._inside.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                    self._changed.notify_all()

    @contextmanager
    def alone(self, *, skip: bool = False) -> Iterator[bool]:
        """Yields True once no thread is inside; False at once if this one is alone, or others are and ``skip`` is set.

        Raises:
            UsageError: this thread is inside.
        """
        me = threading.get_ident()
        with self._changed:
            if me in self._inside and self._changer != me:
                raise UsageError(
                    "this thread is inside a using() block, which keeps the version from changing. Refresh or close "
                    "after the block."
                )
            free = not (self._changer == me or (skip and (self._changer or self._inside)))
            while free and self._changer:
                self._changed.wait()
            if free:
                self._changer = me
        if not free:
            yield False
            return
        try:
            with self._changed:
                while self._inside:
                    self._changed.wait()
            yield True
        finally:
            with self._changed:
                self._changer = 0
                self._changed.notify_all()

    def after_fork(self) -> None:
        """Called in the child, which has one thread."""
        me = threading.get_ident()
        self._changed, self._changer = threading.Condition(), 0
        self._inside = {me: self._inside[me]} if me in self._inside else {}
