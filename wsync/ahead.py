"""Jobs done by threads, ahead of whoever takes their results one after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

_J = TypeVar("_J")
_R = TypeVar("_R")


def ahead(jobs: Iterable[_J], work: Callable[[_J], _R], most: int, *, join: bool = False) -> Iterator[tuple[_J, _R]]:
    """Each job with its result, in their order, while up to ``most`` of them are under way.

    Args:
        join: where it ends early, wait for those that are; else they go on, and their results are nobody's.
    """
    pool = ThreadPoolExecutor(most)
    pending: deque[tuple[_J, Future[_R]]] = deque()
    try:
        for job in jobs:
            pending.append((job, pool.submit(work, job)))
            if len(pending) >= most:
                yield _first(pending)
        while pending:
            yield _first(pending)
    finally:
        pool.shutdown(wait=join, cancel_futures=True)


def _first(pending: deque[tuple[_J, Future[_R]]]) -> tuple[_J, _R]:
    """Waits for the first of them; where any one fails, no longer than until then."""
    job, first = pending[0]
    while not first.done():
        wait([future for _, future in pending if not future.done()], return_when=FIRST_COMPLETED)
        for _, future in pending:
            if future.done():
                future.result()
    pending.popleft()
    return job, first.result()
