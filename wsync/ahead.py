"""Jobs done by threads ahead of one who takes their results one after another."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from .errors import Stopped

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
