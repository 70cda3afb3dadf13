"""The shared-memory area of one policy, and the protocol by which whole versions pass through it.

A segment is a directory of one user, who may let others read it (``system.access``):

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
  P5 verify   finite, source unchanged, gate   R5 release   the lease of the version before
  P6 release  the slot's lock
  P7 store    the WORD
  P8 wake     sleeping readers

P1 to P3 and P6 are in ``writable``, P4 and P5 in ``publishing`` and ``checkpoints.staging``, P7 and P8 in
``word_and_lease``. R1 to R3 are in this module, and R4 in ``policy``.

All locks are taken without waiting, so that nobody waits for a stopped process. Why each step is there:

- A leased slot is not written (P2 fails), a slot being written is not leased (R2 fails): nobody sees half a version.
- Between R1 and R2 the publisher may have published elsewhere and begun, or finished, writing this slot: R3 sees
  another WORD. It compares the version too, because the same slot may be live again with other weights.
- P3 comes after P1: the WORD may have changed before P1, when another publisher had the lock. The WORD is also checked
  before P2, so that the publisher does not lock the live slot even for a moment.
- P6 comes before P7, so that a reader that follows the new WORD never finds the slot locked by the publisher; and the
  system calls in between order the writes to the slot before the store, on every architecture.
- If every spare slot is leased (by an idle notebook, a forked child, a tensor that somebody keeps), P2 adds a slot, up
  to a bound. The publisher does it, because a process that holds a lease may not call wsync for hours. After a later
  publish it removes an added slot that nobody leases. A reader that had opened it before finds another WORD at R3; and
  since a slot of that number may be another file afterwards, a reader maps an added slot for one version only.
- The kernel drops flocks with their process: a publisher that is killed anywhere before P7 has published nothing, and
  the next one finds every lock free. After P7 only the wake-up is lost, and sleepers wake by themselves soon.

Locks are flock on a descriptor of their own: fcntl locks vanish when any descriptor of the file is closed. A slot is
never truncated and its bytes are reserved, so that no access can end in SIGBUS. ``multiprocessing.shared_memory`` is
not used: its resource tracker unlinks memory that others still use.

A slot number of ``NO_SLOT`` in the WORD means that nothing is live yet; ``REMOVED`` is stored before a segment is
removed, so that readers, which keep its memory mapped, notice it with the same one load.
"""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ..checkpoints.files.extras import Extras
from ..errors import LayoutDiffers, SegmentBusy, SegmentDamaged, SegmentMissing, SegmentUnsafe, from_os_error
from ..layout.layout import Layout
from ..system.access import Descriptor, base_owner, check_name, is_name, open_dir, open_owned
from ..system.memory import mapping, populate, read_at, runtime_dir, shut, try_lock
from .publication import METADATA_END, Publication
from .segment_files import (
    MAX_SLOTS,
    NO_SLOT,
    About,
    added_slots,
    damage,
    extras_damage,
    extras_name,
    map_control,
    open_readers,
    read_extras_file,
    slot_name,
)
from .word_and_lease import ControlPage, Lease, SlotMemory

if TYPE_CHECKING:
    from .reader_records import ReaderRecord


class Segment:
    """An open segment, for reading; ``WritableSegment`` is the publisher's handle.

    Attributes:
        name: its name.
        path: its directory.
        slots: number of slots (full buffers of weights) that it was made with; see ``slot_numbers``.
        data_offset: where the weights begin in a slot, in bytes.
        spec: fingerprint of the policy spec that it was made for.
        control: the page with the WORD.
    """

    _write = False

    def __init__(self, name: str, path: Path, *, owner: int | None = None) -> None:
        self.name, self.path = name, path
        self._dir = -1
        try:
            self._dir = open_dir(path, owner)
            self._shut = weakref.finalize(self, shut, self._dir)  # also if it is dropped without a close
            self.control = ControlPage(map_control(self._dir, write=self._write))
            self._about = About.read(self._dir)
            shut(open_readers(path))
        except FileNotFoundError as exc:
            if self._dir >= 0 and self.is_current():
                raise damaged(self.name, f"has no {exc.filename}") from exc
            raise _missing(name, path) from exc
        except ValueError as exc:
            raise broken(self.name, f"cannot be read by this wsync ({exc})") from exc
        except OSError as exc:
            raise from_os_error(exc, path) from exc
        self.slots, self.data_offset, self.spec = self._about.slots, self._about.data_offset, self._about.spec

    @classmethod
    def open(
        cls,
        name: str,
        runtime: str | os.PathLike[str] | None = None,
        *,
        layout: Layout | None = None,
        exclude: Sequence[str] = (),
    ) -> Self:
        """Opens an existing segment.

        Args:
            layout: the layout that it must have; None for any.
            exclude: globs of further tensors that it may have.

        Raises:
            LayoutDiffers: it has another layout.
            SegmentMissing: there is no segment of this name.
            SegmentUnsafe: it is not a segment, or cannot be trusted; see ``system.access``.
        """
        base = runtime_dir(runtime)
        segment = cls(name, base / check_name(name), owner=base_owner(base, write=cls._write))
        if layout:
            segment._expect(layout, exclude)
        return segment

    def _expect(self, layout: Layout, exclude: Sequence[str] = ()) -> None:
        if layout.names_in(self.layout.without(exclude)) is None:
            self.close()
            raise _differs(layout, self)

    def close(self) -> None:
        """Closes the control page and the directory; tensors that still point into a slot keep its memory."""
        self.control.close()
        self._shut()

    def is_current(self) -> bool:
        """Whether the name still leads to this segment; raises OSError if the system does not say."""
        try:
            return os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self._dir))
        except (FileNotFoundError, NotADirectoryError):
            return False

    @cached_property
    def layout(self) -> Layout:
        try:
            return self._about.layout()
        except ValueError as exc:
            raise broken(self.name, f"has a layout.json that holds no layout ({exc})") from exc

    def damage(self) -> str:
        """What something outside wsync did to its files, as the end of a sentence; empty if all is well."""
        how, word = damage(self._dir, self.slots), self.word
        with suppress(SegmentUnsafe):  # reported when the header is read
            if not how and (live := self.live()) and live.extras:
                lost = extras_damage(self._dir, word & 0xFF, live.extras)
                return lost if self.word == word else ""  # else another version went live meanwhile
        return how

    @cached_property
    def _slot_bytes(self) -> int:
        return self.data_offset + self.layout.nbytes

    def slot_numbers(self) -> list[int]:
        """The numbers of all slots, those added later included."""
        return [*range(self.slots), *added_slots(self._dir, self.slots)]

    @property
    def bound(self) -> int:
        """Most slots that there may be at a time."""
        return max(self.slots, self.control.bound)

    @property
    def word(self) -> int:
        return self.control.word

    @property
    def version(self) -> int:
        """The live version; 0 before the first."""
        return self.word >> 8

    def live(self) -> Publication | None:
        """The record of the live version; None before the first.

        Needs no lease: a live slot is not written, so a header that is read between two equal WORDs is whole.

        Raises:
            SegmentUnsafe: the slot's header cannot be parsed, or is another version's.
        """
        while (word := self.word) & 0xFF < NO_SLOT:
            try:
                head = self._head(word & 0xFF)
            except SegmentBusy:  # the segment is being removed
                return None
            except SegmentUnsafe:
                if self.word == word:
                    raise
                continue  # it was an added slot, and was removed
            if self.word == word:
                live = self._publication(head, word & 0xFF)
                if live.version != word >> 8:
                    raise broken(self.name, f"says that version {word >> 8} is live, but its slot holds {live.version}")
                return live
        return None

    def leased(self, lease: Lease) -> Publication:
        """The record of the version in a leased slot.

        Raises:
            SegmentUnsafe: the slot's header cannot be parsed.
        """
        return self._publication(read_at(lease.fileno(), METADATA_END, 0), lease.slot)

    def extras(self, publication: Publication, slot: int) -> Extras:
        """The extras that belong to the weights of a leased or live slot.

        Raises:
            SegmentDamaged: their file is gone, was cut, or holds something else.
        """
        if not publication.extras:
            return Extras()
        with self._open_file(extras_name(slot), os.O_RDONLY) as file:
            try:
                return read_extras_file(file.fileno(), publication.extras)
            except ValueError as exc:
                raise damaged(self.name, f"has a {extras_name(slot)} that {exc}") from exc

    def _publication(self, head: bytes, slot: int) -> Publication:
        """Parses the first ``METADATA_END`` bytes of a live slot."""
        try:
            return Publication.from_header(head)
        except ValueError as exc:
            raise SegmentUnsafe(
                f"{self.path / slot_name(slot)} is live, and its header was damaged ({exc!s:.100}). Remove the segment "
                f"with `wsync rm {self.name}`; it is made anew."
            ) from exc

    def held_back(self, reader: ReaderRecord) -> list[int]:
        """Other versions that a reader keeps leased, because something in its process still has a tensor of them."""
        versions = set()
        for slot in reader.slots:
            with suppress(OSError, SegmentBusy, SegmentUnsafe, ValueError):  # its record is out of date
                versions.add(Publication.from_header(self._head(slot)).version)
        return sorted(versions - {reader.version})

    def _head(self, slot: int) -> bytes:
        with self._open_slot(slot, os.O_RDONLY) as file:
            return read_at(file.fileno(), METADATA_END, 0)

    def readers(self) -> list[ReaderRecord]:
        from .reader_records import readers  # a pass with nothing to do asks for none

        return readers(self.path)

    def lease(self) -> Lease | None:
        """R1 to R3: leases the live slot, so that it is not overwritten; None if nothing can be leased now."""
        for _ in range(1000):  # so many publishes in a row do not happen; a reader must never hang
            word = self.word  # R1 load
            if word & 0xFF >= NO_SLOT:
                return None
            try:
                file = self._open_slot(word & 0xFF, os.O_RDONLY)
            except SegmentBusy:  # the segment is being removed
                return None
            except SegmentUnsafe:
                if self.word == word:
                    raise
                continue  # it was an added slot, and was removed
            if os.fstat(file.fileno()).st_size != self._slot_bytes:  # using it would end in SIGBUS
                file.close()
                raise damaged(self.name, f"has a {slot_name(word & 0xFF)} that is not of {self._slot_bytes:,} bytes")
            lease = Lease(word, file)  # before it is locked: an interrupt leaves no lock behind
            if (
                try_lock(file.fileno(), shared=True)  # R2 lease
                and self.word == word  # R3 recheck
            ):
                return lease
            lease.release()
        return None

    def map_slot(self, slot: int) -> SlotMemory:
        """A new private mapping of a leased slot, with all its pages already mapped."""
        mapped, _ = self.map_pages(slot, private=True)
        populate(mapped)
        return mapped

    def map_pages(self, slot: int, *, write: bool = False, private: bool = False) -> tuple[SlotMemory, tuple[int, int]]:
        """A new mapping of a slot, and the device and inode of the slot's file.

        The file is opened anew: mmap keeps a duplicate of its descriptor, which would keep a lock taken on that one.

        Args:
            write: whether the mapping can be written to: by a publisher, or because a driver requires it.
            private: whether writes stay in this process; if False, the pages are shared with the publisher.
        """
        size = self._slot_bytes
        with self._open_slot(slot, os.O_RDWR if write else os.O_RDONLY) as file:
            fd = file.fileno()
            info = os.fstat(fd)
            if info.st_size != size:  # a mapping beyond its end would end in SIGBUS
                raise damaged(self.name, f"has a {slot_name(slot)} that is not of {size:,} bytes")
            flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if write or private else 0)
            with mapping(size, fd):
                return SlotMemory(fd, size, flags=flags, prot=protection), (info.st_dev, info.st_ino)

    def _open_slot(self, slot: int, flags: int) -> Descriptor:
        if slot >= MAX_SLOTS:
            raise broken(self.name, f"says that slot {slot} is live, and has {MAX_SLOTS} at most")
        return self._open_file(slot_name(slot), flags)

    def _open_file(self, name: str, flags: int) -> Descriptor:
        """Raises SegmentBusy if the segment is being removed."""
        try:
            return open_owned(name, flags, self._dir)
        except FileNotFoundError:
            raise (damaged(self.name, f"has no {name}") if self.is_current() else removed(self.name)) from None


def _missing(name: str, path: Path) -> SegmentMissing:
    return SegmentMissing(
        f"there is no segment {name!r} in {path.parent}. `wsync push` or `wsync watch` makes it; `wsync status` lists "
        "what is there."
    )


def removed(name: str) -> SegmentBusy:
    return SegmentBusy(f"segment {name!r} was just removed. Try again: the next publish makes it anew.")


def damaged(name: str, how: str) -> SegmentDamaged:
    return SegmentDamaged(
        f"segment {name!r} {how}: something outside wsync removed or cut its files (systemd's RemoveIPC, a "
        f"cleaner of temporary files). Publish again, which makes it anew, or `wsync rm {name}`."
    )


def broken(name: str, how: str) -> SegmentUnsafe:
    return SegmentUnsafe(f"segment {name!r} {how}. Remove it with `wsync rm {name}`, and publish again.")


def _differs(layout: Layout, segment: Segment) -> LayoutDiffers:
    differences = layout.differences(segment.layout)
    return LayoutDiffers(
        f"segment {segment.name!r} holds another architecture than this policy: {len(differences)} tensors differ. "
        f"{_advice(layout, segment)}",
        differences,
    )


def _advice(layout: Layout, segment: Segment) -> str:
    """What to do about a policy whose layout is not the segment's."""
    if advice := layout.advice(segment.layout):
        return advice
    own = layout.more_than(segment.layout)
    told = f"If it keeps these for itself, attach it with exclude={json.dumps(own)}. Else: "
    return (told if 0 < len(own) < 9 else "") + (
        f"Stop its processes and `wsync rm {segment.name}`, give this policy another name, or build it as the "
        "segment's publisher does."
    )


def segments(runtime: str | os.PathLike[str] | None = None) -> list[str]:
    """Names of the existing segments, sorted; those that this user may not enter are left out.

    Raises:
        SegmentUnsafe: the runtime directory cannot be trusted.
    """
    base = runtime_dir(runtime)
    base_owner(base, write=False)
    names = os.listdir(base) if base.exists() else []
    return sorted(name for name in names if is_name(name) and os.path.exists(base / name / "control"))
