"""Runs a bounded number of jobs in threads, ahead of a caller that takes their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

LOOK = 0.25  # longest single wait, in seconds: a signal does not end it if another thread receives it
_J = TypeVar("_J")
_R = TypeVar("_R")


def prefetch(jobs: Iterable[_J], work: Callable[[_J], _R], most: int) -> Iterator[tuple[_J, _R]]:
    """Yields each job with its result, in order, while up to ``most`` jobs are running.

    The first error of a job is raised at once. Jobs that are running then go on, and their results are dropped.
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
        pool.shutdown(wait=False, cancel_futures=True)


def _first(pending: deque[tuple[_J, Future[_R]]]) -> tuple[_J, _R]:
    job, first = pending[0]
    while not first.done():
        wait([future for _, future in pending if not future.done()], LOOK, FIRST_COMPLETED)
        for _, future in pending:
            if future.done():
                future.result()
    pending.popleft()
    return job, first.result()
