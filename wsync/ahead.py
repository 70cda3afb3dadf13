"""Jobs done by threads, for one who takes their results one after another: ahead of him, or side by side with him."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from .errors import Stopped

_NICE = 10  # added to the niceness of who helps: it takes what others leave
_LOOK = 0.25  # seconds between two looks whether to stop
_J = TypeVar("_J")
_R = TypeVar("_R")


def ahead(jobs: Iterable[_J], work: Callable[[_J], _R], most: int, stop: threading.Event) -> Iterator[tuple[_J, _R]]:
    """Each job with its result, in their order, while up to ``most`` of them are under way.

    Jobs that are under way when this ends early go on, and their results are nobody's.

    Args:
        stop: once set, nothing is waited for any more.

    Raises:
        Stopped: ``stop`` is set.
    """
    pool = ThreadPoolExecutor(most)
    pending: deque[tuple[_J, Future[_R]]] = deque()
    try:
        for job in jobs:
            pending.append((job, pool.submit(work, job)))
            if len(pending) >= most:
                yield _first(pending, stop)
        while pending:
            yield _first(pending, stop)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _first(pending: deque[tuple[_J, Future[_R]]], stop: threading.Event) -> tuple[_J, _R]:
    """Waits for the first of them; where any one fails, no longer than until then."""
    job, first = pending[0]
    while not first.done():
        wait_for_one([future for _, future in pending if not future.done()], stop)
        for _, future in pending:
            if future.done():
                future.result()
    pending.popleft()
    return job, first.result()


def wait_for_one(futures: Iterable[Future[Any]], stop: threading.Event) -> None:
    """Returns once one of them is done.

    Raises:
        Stopped: ``stop`` is set.
    """
    pending = list(futures)
    while not stop.is_set():
        if wait(pending, _LOOK, FIRST_COMPLETED).done:
            return
    raise Stopped


def side_by_side(jobs: Iterable[_J], work: Callable[[_J], _R]) -> Iterator[tuple[_J, _R]]:
    """Each job with its result, in their order; this thread does some of them, and a second one does others.

    The second one gives way to other processes: where they need the processors, this thread does nearly all. When this
    ends, early or not, no job is under way any more.
    """
    left, lock = iter(jobs), threading.Lock()
    begun: deque[tuple[_J, Future[_R]]] = deque()

    def do_one() -> bool:
        with lock:
            for job in left:
                future: Future[_R] = Future()
                begun.append((job, future))
                break
            else:
                return False
        try:
            future.set_result(work(job))
        except BaseException as exc:
            future.set_exception(exc)
        return True

    def assist() -> None:
        try:
            _give_way()
            while do_one():
                pass
        finally:
            done.set()

    done, helper = threading.Event(), threading.Thread(target=assist, name="wsync-staging", daemon=True)
    try:
        try:
            helper.start()
        except RuntimeError:  # this process may have no more threads
            pass
        more = True
        while more or begun:
            more = more and do_one()
            while begun and (not more or begun[0][1].done()):
                job, future = begun.popleft()
                yield job, future.result()
    finally:
        with lock:
            left = iter(())
        if helper.ident is not None:  # else, should it still begin, nothing is left for it
            undivided(done.wait)


def undivided(work: Callable[[], object]) -> None:
    """Calls it until it returns, however often that is interrupted, and raises the first that came in between.

    Wait for an event so, and not for a thread: ``Thread.join`` once interrupted takes one for ended that is not
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
