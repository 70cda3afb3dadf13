"""A second thread, for one whom a signal may interrupt anywhere: what they tell each other, and how they share work.

It costs no import that a push would feel; what works ahead, with many threads, is in ``ahead``.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

_NICE = 10  # added to the niceness of who helps: it takes what others leave
_LOOK = 0.25  # seconds between two looks: a signal that another thread gets wakes nobody
_J = TypeVar("_J")
_R = TypeVar("_R")


class Done:
    """Told once by one thread, and awaited by another that a signal may interrupt anywhere.

    ``threading.Event`` is not for that: an interrupt in it can leave its lock held, and who is to tell waits for ever.
    """

    def __init__(self) -> None:
        self._told, self._lock = False, threading.Lock()
        self._lock.acquire()

    def __bool__(self) -> bool:
        return self._told

    def tell(self) -> None:
        self._told = True
        self._lock.release()

    def wait(self, seconds: float = math.inf) -> bool:
        """Whether it is told in that time."""
        deadline = time.monotonic() + seconds
        while not self._told and (left := deadline - time.monotonic()) > 0:
            self._lock.acquire(timeout=min(left, _LOOK))
        return self._told


class Helper:
    """A second thread that does a part of the work of one whom a signal may interrupt anywhere."""

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self._work, self._name, self._begun, self._done = work, name, False, Done()
        self._error: BaseException | None = None

    def start(self) -> None:
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError:  # this process may have no more threads
            pass

    def wait(self) -> None:
        """Until it has done its part; one that has not begun is not waited for, and is to find nothing left."""
        if self._begun:
            self._done.wait()

    def check(self) -> None:
        """Raises what ended it: something of its part may be lost."""
        if self._error:
            raise self._error

    def _run(self) -> None:
        self._begun = True
        try:
            self._work()
        except BaseException as exc:
            self._error = exc
        finally:
            self._done.tell()


class _Work(Generic[_J, _R]):
    """A job that somebody has begun, and what comes of it."""

    def __init__(self, job: _J) -> None:
        self.job, self.done = job, Done()
        self._result: tuple[_R] | BaseException

    def do(self, work: Callable[[_J], _R]) -> None:
        try:
            self._result = (work(self.job),)
        except BaseException as exc:
            self._result = exc
        self.done.tell()

    def result(self) -> _R:
        self.done.wait()
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result[0]


def side_by_side(jobs: Iterable[_J], work: Callable[[_J], _R]) -> Iterator[tuple[_J, _R]]:
    """Each job with its result, in their order; this thread does some of them, and a second one does others.

    The second one gives way to other processes: where they need the processors, this thread does nearly all. When this
    ends, early or not, no job is under way any more.
    """
    left, lock = iter(jobs), threading.Lock()
    begun: deque[_Work[_J, _R]] = deque()

    def do_one() -> bool:
        with lock:
            for job in left:
                mine = _Work[_J, _R](job)
                begun.append(mine)
                break
            else:
                return False
        mine.do(work)
        return True

    def assist() -> None:
        _give_way()
        while do_one():
            pass

    helper = Helper(assist, "wsync-staging")
    try:
        helper.start()
        more = True
        while more or begun:
            more = more and do_one()
            while begun and (not more or begun[0].done):
                first = begun.popleft()
                yield first.job, first.result()
    finally:
        with lock:
            left = iter(())
        undivided(helper.wait)
    helper.check()


def undivided(work: Callable[[], object]) -> None:
    """Calls it until it returns, however often that is interrupted, and raises the first that came in between.

    Wait so for ``Done``, and not for a thread: ``Thread.join`` once interrupted takes one for ended that is not
    (Python 3.11).
    """
    raised: BaseException | None = None
    while True:
        try:
            work()
            break
        except BaseException as exc:
            raised = raised or exc
    if raised:
        raise raised


def _give_way() -> None:
    try:  # of this thread alone: setpriority(2), "C library/kernel differences"
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(os.getpriority(os.PRIO_PROCESS, 0) + _NICE, 19))
    except OSError:
        pass
