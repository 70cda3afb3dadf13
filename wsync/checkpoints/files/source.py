"""Where a checkpoint's bytes come from: a disk (``local_files``), a store (``store_objects``), or memory."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ...fitting import plan
from ...fitting.cast import Piece, split
from ...fitting.plan import Read
from ...layout.finite import Region, all_finite
from .digest import Digest
from .parts import Parts

Job = TypeVar("Job", Read, Piece)


class ByteSource:
    """The open files of one checkpoint; ``file`` is the index of one of them in ``Parts.every``.

    The methods here only use ``read``, one range after another; subclasses have faster ways.

    Attributes:
        parts: which files these are.
        infos: the stat result of each file when it was opened; in a store, made from the listing.
        digests: the store's own digests of the weight files; empty unless it has all of them.
        extra_digests: the store's own digests of extras, as far as it has them.
    """

    parts: Parts
    infos: list[os.stat_result]
    digests: tuple[Digest, ...] = ()
    extra_digests: Mapping[Path, Digest] = {}

    def read(self, file: int, nbytes: int, start: int) -> bytes:
        """Reads ``nbytes`` bytes of a file from offset ``start``; fewer at its end."""
        raise NotImplementedError

    def stands(self) -> bool:
        """Whether the files are still those that were opened, unchanged, and nobody is writing to them.

        A checkpoint that was deleted as a whole still stands, because it can still be read.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Closes what was opened."""

    def read_beside(self, most: int) -> bytes:
        """Reads the whole of ``Parts.beside``, in the state that was opened.

        Raises:
            FileNotFoundError: there was none.
            ValueError: it has more than ``most`` bytes, or is not a regular file.
            OSError: it cannot be read.
        """
        if self.parts.beside is None:
            raise FileNotFoundError("it is not there")
        info = self.infos[len(self.parts.files)]
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("it is not a regular file")
        if info.st_size > most:
            raise ValueError(f"{info.st_size:,} bytes")
        return self.read(len(self.parts.files), info.st_size, 0)

    def in_order(self, file: int, start: int, nbytes: int) -> Iterator[memoryview]:
        """Yields a range of a file in pieces, from its beginning to its end; each is valid until the next."""
        for _, data in self.ranges(list(split(Piece(file, start, nbytes, "U8", "U8", 0), plan.READING.chunk))):
            yield data

    def staged(
        self, weights: memoryview, reads: Sequence[Read], regions: Sequence[Region]
    ) -> Generator[tuple[Read, bool], None, None]:
        """Yields each read once its bytes are in the weights, and whether its floats in ``regions`` are finite."""
        for read, data in self.ranges(reads):
            scatter(data, read.places(weights))
            yield read, all_finite(weights, regions, read.slices)

    def converted(
        self, listed: Sequence[Piece], work: Callable[[Piece, memoryview], bool]
    ) -> Generator[tuple[Piece, bool], None, None]:
        """Yields each piece, and whether ``work`` returned True for all of it.

        Args:
            work: called with a part of the piece and its stored bytes, which are valid until it returns.
        """
        for piece, data in self.ranges(listed):
            yield piece, work(piece, data)

    def ranges(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, memoryview]]:
        """Yields each job, and the bytes of its range of a file."""
        for job in jobs:
            yield job, memoryview(self.read(job.file, job.nbytes, job.start))


class HeldInMemory(ByteSource):
    """Holds a source's bytes in memory: an adapter is read out of order, from the bytes whose digests are checked."""

    def __init__(self, source: ByteSource) -> None:
        self.parts, self.infos, self.digests = source.parts, source.infos, source.digests
        self.stands, self.close = source.stands, source.close  # type: ignore[method-assign]
        self.data = [source.read(file, info.st_size, 0) for file, info in enumerate(source.infos)]

    def read(self, file: int, nbytes: int, start: int) -> bytes:
        return self.data[file][start : start + nbytes]


def scatter(data: memoryview, slices: list[memoryview]) -> None:
    """Copies bytes into these slices in turn; removes the full ones, and shortens the one in which it ends."""
    while data:
        part = data[: len(slices[0])]
        slices[0][: len(part)] = part
        data, rest = data[len(part) :], slices[0][len(part) :]
        slices[:1] = [rest] if rest else []
