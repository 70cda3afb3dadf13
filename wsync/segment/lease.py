"""A reader's hold on a slot, and the memory that may keep it."""

from __future__ import annotations

import mmap

from .access import Descriptor


class Lease:
    """A reader's hold on one slot: the slot is not written until this object is gone.

    It is released by closing its descriptor, never by unlocking: after a fork both processes share the lock, and each
    releases only its own part.
    """

    __slots__ = ("_file", "slot", "version", "word")

    def __init__(self, word: int, file: Descriptor) -> None:
        self.version, self.slot, self.word, self._file = word >> 8, word & 0xFF, word, file

    @property
    def held(self) -> bool:
        return not self._file.closed

    def fileno(self) -> int:
        return self._file.fileno()

    def release(self) -> None:
        self._file.close()  # R5 release

    __del__ = release


class SlotMemory(mmap.mmap):
    """A mapping of a slot. A reader's is private: what the process writes there is its own, and part of no version.

    Attributes:
        lease: released with the memory, which torch keeps for as long as a tensor points there.
    """

    lease: Lease | None = None
