"""Where a checkpoint's bytes come from: local files, or objects of a store, behind the same few methods."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from ..layout.finite import Region
from .cast import Piece
from .digest import Digest
from .files import Parts, remote
from .plan import Read
from .reading import Files


class ByteSource(Protocol):
    """The files of one checkpoint, opened.

    Attributes:
        infos: what the system, or the store, said of each file when it was opened.
        digests: what the store itself says that the files have to be; empty where it does not say it of all.
        index: the same of the small file beside them (``Parts.index``); None without one.
    """

    infos: list[os.stat_result]
    index: os.stat_result | None
    digests: tuple[Digest, ...]

    def read_index(self, most: int) -> bytes:
        """All of the small file beside them, as it was when they were opened.

        Raises:
            FileNotFoundError: there was none.
            ValueError: it has more than ``most`` bytes, or is not a regular file.
            OSError: it cannot be read.
        """

    def read(self, file: int, nbytes: int, start: int) -> bytes:
        """Bytes of one of the files; fewer where it ends."""

    def in_order(self, file: int, start: int, nbytes: int) -> Iterator[memoryview]:
        """Yields a part of one of the files from its beginning to its end, in pieces that are good until the next."""

    def staged(
        self, weights: memoryview, reads: Sequence[Read], regions: Sequence[Region]
    ) -> Iterator[tuple[Read, bool]]:
        """Yields each read once its bytes are in the weights, with whether the floats in these regions are finite."""

    def converted(
        self, listed: Sequence[Piece], work: Callable[[Piece, memoryview], bool]
    ) -> Iterator[tuple[Piece, bool]]:
        """Yields each piece with whether ``work`` returned True for all of it.

        Args:
            work: called with a part of the piece and its bytes as they are stored, which are good until it returns.
        """

    def stands(self) -> bool:
        """Whether the files are still those that were opened, unchanged, and nobody is writing to them.

        A checkpoint that was deleted as a whole stands, as far as it can still be read.
        """

    def close(self) -> None: ...


def open_source(parts: Parts, settle: float) -> ByteSource:
    """Opens the files of a checkpoint.

    Args:
        settle: seconds that they must have stood still where nothing else tells that their writer is done.

    Raises:
        NoCheckpoint: one is not there.
        BeingWritten: the writer is still at work.
        MalformedCheckpoint: one is not a regular file.
        CheckpointError: one cannot be read.
    """
    if remote(parts.path) is None:
        return Files(parts, settle)
    from .objects import Objects

    return Objects(parts, settle)
