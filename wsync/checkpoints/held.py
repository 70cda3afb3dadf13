"""The bytes of a checkpoint in memory: an adapter is read out of order, and its digest must cover the bytes used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..layout.finite import Region, all_finite
from .cast import Piece
from .plan import Read
from .source import ByteSource


class Held:
    """What a source had, from memory: a ``ByteSource``."""

    def __init__(self, source: ByteSource) -> None:
        self._source, self.infos, self.digests = source, source.infos, source.digests
        self.stands, self.close = source.stands, source.close
        self.index, self.read_index = source.index, source.read_index
        self.data = [source.read(file, info.st_size, 0) for file, info in enumerate(source.infos)]

    def read(self, file: int, nbytes: int, start: int) -> bytes:
        return self.data[file][start : start + nbytes]

    def in_order(self, file: int, start: int, nbytes: int) -> Iterator[memoryview]:
        yield memoryview(self.data[file])[start : start + nbytes]

    def staged(
        self, weights: memoryview, reads: Sequence[Read], regions: Sequence[Region]
    ) -> Iterator[tuple[Read, bool]]:
        for read in reads:
            at = read.start
            for offset, nbytes in read.slices:
                weights[offset : offset + nbytes] = self.data[read.file][at : at + nbytes]
                at += nbytes
            yield read, all_finite(weights, regions, read.slices)

    def converted(
        self, listed: Sequence[Piece], work: Callable[[Piece, memoryview], bool]
    ) -> Iterator[tuple[Piece, bool]]:
        for piece in listed:
            yield piece, work(piece, memoryview(self.read(piece.file, piece.nbytes, piece.start)))
