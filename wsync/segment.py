"""The shared-memory area of one policy, and the protocol by which whole versions pass through it.

A segment is a directory of one user:

    control                one page: magic, format, and at byte 64 the WORD
    layout.json            the layout, the number of slots, the spec that it was made from
    publisher.lock         flock EX: the one publisher
    slot-0.safetensors …   full buffers of weights, each a valid safetensors file in the layout's order
    readers/               one locked file a living reader

The WORD is one aligned u64, ``version << 8 | slot``. It is stored once for each publish, and that store is the publish:
before it nobody looks at the new slot, after it everybody does. A load or store of eight aligned bytes is not torn
on the machines that wsync runs on.

The publisher                                The reader
  P1 lock     publisher.lock, exclusive        R1 load      the WORD
  P2 pick     a slot's lock, exclusive         R2 lease     the slot's lock, shared
  P3 check    the WORD: that slot not live     R3 recheck   the whole WORD; start over if it changed
  P4 stage    bytes into the slot              R4 use       swap to the slot, or copy out of it
  P5 verify   finite, gate, source unchanged   R5 release   the lease of the version before
  P6 release  the slot's lock
  P7 store    the WORD
  P8 wake     sleeping readers

All locks are taken without waiting, so that nobody waits for a stopped process. Why each step is there:

- A leased slot is not written (P2 fails), a slot being written is not leased (R2 fails): nobody sees half a version.
- Between R1 and R2 the publisher may have published elsewhere and begun, or finished, writing this slot: R3 sees
  another WORD. It compares the version too, because the same slot may be live again with other weights.
- P3 comes after P2: the WORD that is read under the slot's lock is one that no publisher changes any more.
- P6 comes before P7, so that a reader that follows the new WORD never finds the publisher's own lock in its way; and
  the system calls in between order the writes to the slot before the store, on every architecture.
- The kernel drops flocks with their process: killed anywhere before P7 a publisher has published nothing, and the next
  one finds every lock free. After P7 only the wake-up is lost, and sleepers look for themselves after a moment.

Locks are flock on a descriptor of their own: fcntl locks vanish when any descriptor of the file is closed. A slot is
never truncated and its bytes are reserved, so that no access can end in SIGBUS. ``multiprocessing.shared_memory`` is
not used: its resource tracker unlinks memory that others still use.

A slot number of ``NO_SLOT`` in the WORD means that nothing is live yet; ``REMOVED`` is stored before a segment is
removed, so that readers, who keep its memory mapped, learn of it at the price of the same one load.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LayoutDiffers, SegmentBusy, SegmentMissing, SegmentUnsafe, UsageError
from .layout import Layout
from .memory import PAGE, open_file, open_private_dir, runtime_dir, try_lock, wake
from .registry import ReaderRecord, readers
from .segment_files import (
    MAGIC,
    METADATA_END,
    NO_SLOT,
    REMOVED,
    WORD_OFFSET,
    Publication,
    discard,
    make,
    metadata_block,
    slot_name,
    sweep,
)

_NAME = re.compile(r"[^\W_][\w.+@=-]*")


def check_name(name: str) -> str:
    """A segment's name becomes a directory's: letters, digits and ``_ . + @ = -``, beginning with one of the first two.

    Raises:
        UsageError: it is not such a name.
    """
    if not _NAME.fullmatch(name) or len(name.encode()) > 200:
        raise UsageError(
            f"{name!r} cannot be a segment's name: use letters, digits and _ . + @ = -, beginning with a letter or "
            "digit, at most 200 bytes. Set another with --name or `name` in the TOML."
        )
    return name


class Segment:
    """An open segment; the publisher's handle when opened with ``write=True``, else a reader's."""

    def __init__(self, name: str, path: Path, *, write: bool = False) -> None:
        self.name, self.path, self.write = name, path, write
        try:
            self._dir = open_private_dir(path)
        except FileNotFoundError:
            raise SegmentMissing(
                f"there is no segment {name!r} in {path.parent}. `wsync push` or `wsync watch` makes it; "
                "`wsync status` lists what is there."
            ) from None
        try:
            self._control = self._map("control", write)
            with open(self._open("layout.json", os.O_RDONLY), "rb") as file:
                self.about: dict[str, Any] = json.load(file)
            self.slots = int(self.about["slots"])
            self.data_offset = int(self.about["data_offset"])
            self.spec = str(self.about["spec"])
        except (OSError, ValueError, KeyError, TypeError) as exc:
            os.close(self._dir)
            raise SegmentUnsafe(
                f"{path} is not a segment that this wsync can read ({type(exc).__name__}: {exc}). Remove it with "
                f"`wsync rm {name}`."
            ) from exc
        self._layout: Layout | None = None
        self._publishing = False
        self._words = memoryview(self._control).cast("Q")
        self._slot_maps: dict[int, mmap.mmap] = {}

    # --- opening, making and removing

    @classmethod
    def open(cls, name: str, runtime: str | os.PathLike[str] | None = None, *, write: bool = False) -> Segment:
        """Opens a standing segment.

        Raises:
            SegmentMissing: there is none of this name.
            SegmentUnsafe: what is there is not ours, or not a segment.
        """
        base = runtime_dir(runtime)
        _check_base(base)
        return cls(name, base / check_name(name), write=write)

    @classmethod
    def create(
        cls,
        name: str,
        layout: Layout,
        runtime: str | os.PathLike[str] | None = None,
        *,
        slots: int = 3,
        spec: str = "",
    ) -> Segment:
        """Makes a segment with all its memory, or opens the one that is there if its layout is the same.

        Args:
            slots: full buffers of weights; two work, three let a publish go on while one reader is late.

        Raises:
            LayoutDiffers: the standing segment holds another architecture.
            OutOfSharedMemory: there is no room.
        """
        base = runtime_dir(runtime)
        path = base / check_name(name)
        if not 2 <= slots <= 64:
            raise UsageError(f"--slots {slots}: a segment has 2 to 64 slots.")
        os.close(open_private_dir(base, create=True))
        if not path.exists():
            sweep(base)
            make(path, layout, slots, spec)
        segment = cls(name, path, write=True)
        if segment.layout.digest != layout.digest:
            differences = layout.differences(segment.layout)
            segment.close()
            raise LayoutDiffers(
                f"segment {name!r} holds another architecture than this policy: {len(differences)} tensors differ. "
                f"Stop its processes and `wsync rm {name}`, or give this policy another --name.",
                differences,
            )
        return segment

    def remove(self) -> None:
        """Tells the readers, then removes the segment; they keep the memory that they have mapped.

        Raises:
            SegmentBusy: a publisher holds it.
        """
        with self.publishing():
            self._words[WORD_OFFSET // 8] = self.word | REMOVED
            self.wake()
            discard(self.path)

    def close(self) -> None:
        """Gives the mappings and descriptors back; tensors that still point into a slot keep its memory."""
        self.unmap()
        self._words.release()
        directory, self._dir = self._dir, -1
        if directory >= 0:
            os.close(directory)

    def is_current(self) -> bool:
        """Whether the name still leads to this very segment."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._dir))
        except FileNotFoundError:
            return False

    # --- looking

    @property
    def layout(self) -> Layout:
        if self._layout is None:
            self._layout = Layout.from_json(self.about["layout"])
        return self._layout

    @property
    def words(self) -> memoryview:
        """The control page as u64s; the WORD is at ``WORD_OFFSET // 8``."""
        return self._words

    @property
    def word(self) -> int:
        return int(self._words[WORD_OFFSET // 8])

    @property
    def version(self) -> int:
        """The live version; 0 before the first."""
        return self.word >> 8

    def live(self) -> Publication | None:
        """What is live, or None before the first version.

        Needs no lease: a live slot is not written, so that a header read between two equal WORDs is whole.
        """
        while (word := self.word) & 0xFF < NO_SLOT:
            fd = self._open(slot_name(word & 0xFF), os.O_RDONLY)
            try:
                head = os.pread(fd, METADATA_END, 0)
            finally:
                os.close(fd)
            if self.word == word:
                return Publication.from_header(head)
        return None

    def readers(self) -> list[ReaderRecord]:
        return list(readers(self.path))

    # --- the reader's steps

    def lease(self) -> Lease | None:
        """R1 to R3: the live slot, held against being overwritten; None where there is none to be had now."""
        for _ in range(1000):  # publishes that fast in a row do not happen; a reader must never hang
            word = self.word  # R1 load
            if word & 0xFF >= NO_SLOT:
                return None
            try:
                fd = self._open(slot_name(word & 0xFF), os.O_RDONLY)
            except FileNotFoundError:  # the segment is being removed
                return None
            if try_lock(fd, shared=True) and self.word == word:  # R2 lease, R3 recheck
                return Lease(word >> 8, word & 0xFF, word, fd)
            os.close(fd)
        return None

    # --- the publisher's steps

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """P1: the one publisher, for as long as the block runs.

        Raises:
            SegmentBusy: another one is; the message names it.
        """
        if self._publishing:  # by this very object: a block within a block
            yield
            return
        try:
            fd = self._open("publisher.lock", os.O_RDWR)
        except FileNotFoundError:
            raise self._removed() from None
        try:
            if not try_lock(fd):  # P1 lock
                holder = os.pread(fd, 100, 0).decode(errors="replace").strip("\0\n ")
                raise SegmentBusy(
                    f"another publisher ({holder or 'unknown'}) is at work on segment {self.name!r}. "
                    "Try again later, or stop the other one."
                )
            if not self.is_current():
                raise self._removed()
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()}".encode(), 0)
            self._publishing = True
            yield
        finally:
            self._publishing = False
            os.close(fd)

    def _removed(self) -> SegmentBusy:
        return SegmentBusy(
            f"segment {self.name!r} was removed at this moment. Try again: it is made anew where it can be."
        )

    @contextmanager
    def spare_slot(self) -> Iterator[SpareSlot]:
        """P2, P3 and, when the block is left, P6: a slot that is not live and that nobody leases.

        Raises:
            SegmentBusy: readers lease every spare slot; the message names them.
        """
        for slot in range(self.slots):
            if slot == self.word & 0xFF:
                continue
            fd = self._open(slot_name(slot), os.O_RDWR)
            if try_lock(fd) and self.word & 0xFF != slot:  # P2 pick, P3 check
                try:
                    yield SpareSlot(slot, fd, self._slot_map(slot), self.data_offset)
                finally:
                    os.close(fd)  # P6 release
                return
            os.close(fd)
        live = self.word & 0xFF
        holders = [r for r in self.readers() if any(slot != live for slot in r.slots)]
        names = ", ".join(f"{r.process} (pid {r.pid}, version {r.version})" for r in holders)
        raise SegmentBusy(
            f"every spare slot of segment {self.name!r} is leased by readers: {names or 'unknown'}. Let them refresh, "
            "stop them, or make the segment anew with more --slots."
        )

    def store(self, version: int, slot: int) -> None:
        """P7 and P8: this slot is live from here on."""
        self._words[WORD_OFFSET // 8] = version << 8 | slot  # P7 store
        self.wake()  # P8 wake

    def wake(self) -> None:
        wake(self.word_address)

    @property
    def word_address(self) -> int:
        return _address(self._control) + WORD_OFFSET

    # --- memory

    def map_slot(self, slot: int) -> tuple[mmap.mmap, int]:
        """A leased slot as memory, its pages mapped at once, and the address, good while the mmap is referred to."""
        mapped = self._slot_map(slot)
        return mapped, _address(mapped)

    def live_weights(self) -> memoryview | None:
        """The live version's bytes, for the publisher, under whose lock they stay live; None before the first."""
        slot = self.word & 0xFF
        return None if slot >= NO_SLOT else memoryview(self._slot_map(slot))[self.data_offset :]

    def unmap(self) -> None:
        """Lets the slots' mappings go; the next access maps them anew."""
        self._slot_maps.clear()

    def _slot_map(self, slot: int) -> mmap.mmap:
        if slot not in self._slot_maps:
            # A descriptor of its own: mmap keeps a duplicate, which would go on holding a lock taken on the original.
            fd = self._open(slot_name(slot), os.O_RDWR if self.write else os.O_RDONLY)
            try:
                protection = mmap.PROT_READ | (mmap.PROT_WRITE if self.write else 0)
                self._slot_maps[slot] = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=protection)
            finally:
                os.close(fd)
        return self._slot_maps[slot]

    def _open(self, name: str, flags: int) -> int:
        return open_file(name, flags, self._dir)

    def _map(self, name: str, write: bool) -> mmap.mmap:
        fd = self._open(name, os.O_RDWR if write else os.O_RDONLY)
        try:
            if os.pread(fd, len(MAGIC), 0) != MAGIC or os.fstat(fd).st_size != PAGE:
                raise ValueError("its control page is not of this format")
            return mmap.mmap(fd, PAGE, prot=mmap.PROT_READ | (mmap.PROT_WRITE if write else 0))
        finally:
            os.close(fd)


class Lease:
    """A reader's hold on one slot: the slot is not written until this object is gone.

    It is let go by closing its descriptor, never by unlocking: after a fork both processes share the lock, and each
    lets go only of its own part.
    """

    __slots__ = ("_fd", "slot", "version", "word")

    def __init__(self, version: int, slot: int, word: int, fd: int) -> None:
        self.version, self.slot, self.word, self._fd = version, slot, word, fd

    def fileno(self) -> int:
        return self._fd

    def release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)  # R5 release

    __del__ = release


@dataclass(frozen=True, slots=True)
class SpareSlot:
    """A slot that is being staged: locked, mapped, not live."""

    number: int
    fd: int
    memory: mmap.mmap
    data_offset: int

    @property
    def weights(self) -> memoryview:
        """The slot's weights, writable."""
        return memoryview(self.memory)[self.data_offset :]

    def describe(self, publication: Publication) -> None:
        """Writes what the slot holds into its header."""
        os.pwrite(self.fd, metadata_block(publication.to_metadata()), 8)


def remove(name: str, runtime: str | os.PathLike[str] | None = None) -> None:
    """Removes a segment, also one that is broken.

    Raises:
        SegmentMissing: there is none of this name.
        SegmentBusy: a publisher holds it.
        SegmentUnsafe: it is another user's, or no directory.
    """
    try:
        segment = Segment.open(name, runtime, write=True)
    except SegmentUnsafe:
        path = runtime_dir(runtime) / check_name(name)
        os.close(open_private_dir(path))
        discard(path)
        return
    segment.remove()
    segment.close()


def segments(runtime: str | os.PathLike[str] | None = None) -> list[str]:
    """Names of the standing segments, sorted."""
    base = runtime_dir(runtime)
    if not base.exists():
        return []
    _check_base(base)
    return sorted(p.name for p in base.iterdir() if _NAME.fullmatch(p.name) and (p / "control").exists())


def _check_base(base: Path) -> None:
    try:
        os.close(open_private_dir(base))
    except FileNotFoundError:
        pass


def _address(mapped: mmap.mmap) -> int:
    """Where a mapping lies, read-only ones included, for which ctypes alone has no answer."""
    import ctypes

    view = ctypes.py_object(mapped)
    buffer = (ctypes.c_ssize_t * 11)()  # a Py_buffer: its first field is the address
    ctypes.pythonapi.PyObject_GetBuffer(view, ctypes.byref(buffer), 0)
    try:
        return int(buffer[0])
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
