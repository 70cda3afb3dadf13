"""The control page, whose WORD publishers store and readers wait for, and readers' leases on slots."""

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
        """Most slots that the segment may grow to, as its publishers set it; never more than ``MAX_SLOTS``."""
        return min(int(self.words[_BOUND]) or BOUND, MAX_SLOTS)

    @bound.setter
    def bound(self, slots: int) -> None:
        if self.words[_BOUND] != slots:
            self.words[_BOUND] = slots

    @property
    def address(self) -> int:
        """The address of the WORD, to sleep on."""
        return address_of(self._mapped) + WORD_OFFSET

    def store(self, word: int) -> None:
        """P7 and P8: stores the WORD, and wakes every reader that sleeps on it."""
        address = self.address  # first: whatever can fail in this, even an import, fails before the store
        self.words[_WORD] = word  # P7 store
        wake(address)  # P8 wake

    def tell_removed(self) -> None:
        """Tells the readers that the segment is removed, or was deleted by hand."""
        self.store(self.word | REMOVED)

    def close(self) -> None:
        self.words.release()


class Lease:
    """A reader's hold on one slot: no publisher writes to the slot until this is released, or dropped.

    It is released by closing its descriptor, never by unlocking: after a fork both processes share the lock, which
    lasts until both have closed it.
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
    """A mapping of a slot. In a reader's private one, what the process writes is seen by nobody else.

    Attributes:
        lease: released with this object, which torch keeps for as long as a tensor points there.
    """

    lease: Lease | None = None
