"""Reads ranges of a store's objects into the weights.

Only the planned ranges are read, ``AT_ONCE`` at a time, piece by piece straight into the slot. This takes a few pieces
of 64 KiB of memory per range, and ``AHEAD`` chunks where tensors are converted.

Only the listed versions are read. If an object is overwritten meanwhile, the pass ends, and what was read is thrown
away; threads that are still reading no longer write to the slot.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import cast

from ...errors import NoCheckpoint
from ...fitting import plan
from ...fitting.cast import Piece, split
from ...fitting.plan import Read
from ...layout.finite import Region, all_finite
from ...stores.path import RemotePath
from ...stores.prefetch import prefetch
from ...stores.store import OtherVersion, Stored, into
from . import settling
from .digest import Digest
from .parts import Parts, changed_while_read
from .source import ByteSource, Job, scatter

AT_ONCE = 16  # ranges read at a time; a store delivers some 50 to 100 MB/s on each
AHEAD = 4  # most chunks that wait in memory to be converted


class Objects(ByteSource):
    """The objects of a checkpoint in a store."""

    def __init__(self, parts: Parts, settle: float) -> None:
        self.parts = parts
        self.infos = [file.stat() for file in parts.every]
        self._store = cast(RemotePath, parts.path).store
        self._stored = [_listed_as(file) for file in parts.every]
        digests = {file: self._store.sha256(stored) for file, stored in zip(parts.every, self._stored, strict=True)}
        known = {file: Digest(file, sha256, "the store") for file, sha256 in digests.items() if sha256}
        if known.keys() >= {*parts.files}:
            self.digests = tuple(known[file] for file in parts.files)
        self.extra_digests = {file: known[file] for file in parts.extras.values() if file in known}
        settling.let_objects_settle(parts, settle, self.stands, is_web=self._store.is_web)

    def stands(self) -> bool:
        looks = prefetch(self._stored, lambda file: self._store.head(file.key), AT_ONCE)
        return all(now and now.is_version(file) for file, now in looks)

    def read(self, file: int, nbytes: int, start: int) -> bytes:
        data = bytearray(nbytes)
        self._fetch(file, nbytes, start, into(data))
        return bytes(data)

    def ranges(self, jobs: Sequence[Job], at_once: int = AHEAD) -> Iterator[tuple[Job, memoryview]]:
        for job, data in prefetch(jobs, lambda job: self.read(job.file, job.nbytes, job.start), at_once):
            yield job, memoryview(data)

    def in_order(self, file: int, start: int, nbytes: int) -> Iterator[memoryview]:
        parts = list(split(Piece(file, start, nbytes, "U8", "U8", 0), plan.READING.chunk))
        return (data for _, data in self.ranges(parts, AT_ONCE))

    def staged(
        self, weights: memoryview, reads: Sequence[Read], regions: Sequence[Region]
    ) -> Generator[tuple[Read, bool], None, None]:
        lock, over = threading.Lock(), threading.Event()

        def work(read: Read) -> None:
            places = read.places(weights)

            def take(_: int, piece: memoryview) -> None:
                with lock:  # once a pass has failed, the slot is not ours to write to
                    if over.is_set():
                        raise _Abandoned
                    scatter(piece, places)

            self._fetch(read.file, read.nbytes, read.start, take)

        try:
            for read, _ in prefetch(reads, work, AT_ONCE):
                yield read, all_finite(weights, regions, read.slices)
        finally:
            with lock:
                over.set()

    def _fetch(self, file: int, nbytes: int, start: int, take: Callable[[int, memoryview], object]) -> None:
        if not nbytes:
            return
        try:
            self._store.read(self._stored[file], start, nbytes, take)
        except OtherVersion:
            raise changed_while_read(self.parts.path) from None
        except FileNotFoundError:
            raise NoCheckpoint(
                f"{self.parts.every[file]} is gone. You need not do anything: the next pass takes what it finds."
            ) from None


class _Abandoned(Exception):
    """The pass is over; nobody waits for this range."""


def _listed_as(file: Path) -> Stored:
    stored = cast(RemotePath, file).stored()
    if stored is None:
        raise NoCheckpoint(f"there is no {file}. Name a checkpoint that exists.")
    return stored
