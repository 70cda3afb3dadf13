"""What a publisher and readers meet by: the control page with the WORD, on whose change readers sleep; and leases."""

from __future__ import annotations

import mmap

from ..system.access import Descriptor
from ..system.memory import address_of, wake
from .segment_files import BOUND, BOUND_OFFSET, MAX_SLOTS, REMOVED, WORD_OFFSET

_WORD, _BOUND = WORD_OFFSET // 8, BOUND_OFFSET // 8


class ControlPage:
    """The mapped control page.

    Attributes:
        words: the page as u64s.
    """

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self.words = memoryview(mapped).cast("Q")

    @property
    def word(self) -> int:
        return int(self.words[_WORD])

    @property
    def bound(self) -> int:
        """How many slots the segment may grow to, as its publishers say; never more than ``MAX_SLOTS``."""
        return min(int(self.words[_BOUND]) or BOUND, MAX_SLOTS)

    @bound.setter
    def bound(self, slots: int) -> None:
        if self.words[_BOUND] != slots:
            self.words[_BOUND] = slots

    @property
    def address(self) -> int:
        """Where the WORD lies, for those who sleep on it."""
        return address_of(self._mapped) + WORD_OFFSET

    def store(self, word: int) -> None:
        """P7 and P8: from here on the WORD is what it says; every reader that sleeps on it wakes."""
        address = self.address  # anything that can fail in waking, even an import, fails before the store
        self.words[_WORD] = word  # P7 store
        wake(address)  # P8 wake

    def tell_removed(self) -> None:
        """Tells the readers that the segment is removed, also where it was deleted by hand."""
        self.store(self.word | REMOVED)

    def close(self) -> None:
        self.words.release()


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
