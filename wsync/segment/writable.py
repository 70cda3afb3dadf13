"""The publisher's handle on a segment: makes, shares and removes it, and does the P steps (see ``segment``)."""

from __future__ import annotations

import mmap
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Self

from ..errors import SegmentBusy, SegmentDamaged, SegmentError, SegmentUnsafe, UsageError, from_os_error, printable
from ..layout.layout import Layout
from ..system.access import Access, base_owner, check_name, make_base, open_dir, opened
from ..system.memory import file_system, no_room, populate, read_at, runtime_dir, shut, spare_memory, try_lock
from .publication import METADATA_END, Publication
from .segment import Segment, damaged, removed
from .segment_files import (
    MAX_SLOTS,
    NO_SLOT,
    SLOTS,
    SpareSlot,
    add_slot,
    added_slots,
    discard,
    make,
    remove_extras,
    set_aside,
    share,
    slot_header,
    slot_name,
    sweep,
    sweep_slot,
    write_extras,
)


class WritableSegment(Segment):
    """The publisher's handle on a segment of this user: all that a reader may do, and the P steps."""

    _write = True

    def __init__(self, name: str, path: Path, *, owner: int | None = None) -> None:
        super().__init__(name, path, owner=owner)
        self._publishing = False
        self._slot_maps: dict[int, mmap.mmap] = {}

    @classmethod
    def create(
        cls,
        name: str,
        layout: Layout,
        runtime: str | os.PathLike[str] | None = None,
        *,
        slots: int = SLOTS,
        spec: str = "",
        access: Access = Access(),  # noqa: B008  (frozen)
    ) -> Self:
        """Makes a segment and reserves all its memory, or opens an existing one with the same layout.

        Args:
            slots: number of slots; two suffice, and with three a publish need not wait for a late reader.
            access: who else may read it; if nothing is set, a new one is private and an existing one stays as it is.

        Raises:
            LayoutDiffers: the existing segment has another layout.
            OutOfSharedMemory: there is no room.
            UsageError: the number of slots is invalid, or the users who should read cannot be given access.
        """
        base = runtime_dir(runtime)
        path = base / check_name(name)
        if not 2 <= slots <= MAX_SLOTS:
            raise UsageError(f"--slots {slots}: a segment has 2 to {MAX_SLOTS} slots. Give such a number.")
        make_base(base, access)
        if os.path.lexists(path):
            _set_aside_if_damaged(name, path)
        if not os.path.lexists(path):
            sweep(base)
            make(path, layout, slots, spec, access)
            _warn_of_disk(base)
        segment = cls(name, path)
        segment._expect(layout)
        segment.share(access)
        return segment

    def share(self, access: Access) -> None:
        """Lets others read, if ``access`` says so and they cannot yet.

        Raises:
            UsageError: they cannot be given access.
        """
        if access.given and not access.holds(self._dir):
            access.check_enterable(self.path.parent)
            share(self._dir, self.slot_numbers(), access)

    def remove(self) -> None:
        """Tells the readers, then removes the segment; they keep their mapped memory.

        Raises:
            SegmentBusy: a publisher holds it.
        """
        with self.publishing():
            self.control.tell_removed()
            discard(self.path)

    def remove_unused(self) -> None:
        """Removes the segment if nobody has published to it and no reader waits for it.

        Raises:
            SegmentBusy: another process is about to publish.
        """
        with self.publishing():
            if not self.version and not self.readers():
                self.remove()

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """P1: makes this the only publisher while the block runs; blocks may be nested.

        Raises:
            SegmentBusy: there is another publisher, which the message names, or the segment was just removed.
        """
        if self._publishing:  # a nested block
            yield
            return
        with self._open_file("publisher.lock", os.O_RDWR) as file:
            fd = file.fileno()
            if not try_lock(fd):  # P1 lock
                holder = printable(os.pread(fd, 100, 0).decode(errors="replace").strip("\0\n "))
                raise SegmentBusy(
                    f"another publisher ({holder or 'unknown'}) is at work on segment {self.name!r}. "
                    "Try again later, or stop the other one."
                )
            if not self.is_current():
                raise removed(self.name)
            os.pwrite(fd, f"pid {os.getpid()}".encode().ljust(32), 0)  # never truncated: its page might not come back
            try:
                self._publishing = True
                yield
            finally:
                self._publishing = False

    @contextmanager
    def spare_slot(self) -> Iterator[SpareSlot]:
        """P2 and P3, and P6 at the end of the block: yields a slot that is not live and that nobody leases.

        If readers lease all spare slots, adds one.

        Raises:
            SegmentBusy: readers, which the message names, lease every spare slot, and no slot can be added.
        """
        with closing(self._spare_slots(chain(self.slot_numbers(), self._add_slot()))) as spares:
            spare = next(spares)
            spare.forget()  # so that a header describes only a whole version
            try:
                yield spare
            except BaseException:
                spare.forget()
                raise

    def _add_slot(self) -> Iterator[int]:
        """Yields the number of a slot that it adds when it is asked for.

        Raises:
            SegmentBusy: there are as many as allowed, or there is no memory for one more.
        """
        there, size = self.slot_numbers(), self._slot_bytes
        if len(there) >= self.bound:
            raise self._leased(f"and it may have no more than {self.bound}. ", "raise max_slots (--max-slots)")
        if spare_memory() < 2 * size:  # leaves memory for others to work with
            raise self._leased(f"and there is no memory for another one of {size:,} bytes. ", "free memory")
        slot = min(set(range(MAX_SLOTS)).difference(there))
        try:
            add_slot(self._dir, slot, slot_header(self.layout), self.layout.nbytes)
        except OSError as exc:
            if not no_room(exc, self.path, size):
                raise from_os_error(exc, self.path) from exc
            raise self._leased(f"and there is no room for another one of {size:,} bytes. ", "make room") from exc
        yield slot

    def _leased(self, why_no_more: str, remedy: str) -> SegmentBusy:
        live, holders = self.word & 0xFF, []
        for r in self.readers():
            if any(slot != live for slot in r.slots):
                held = ", ".join(map(str, self.held_back(r)))
                holders.append(f"{r.process} (pid {r.pid}, version {r.version}{held and f', keeps {held}'})")
        return SegmentBusy(
            f"every spare slot of segment {self.name!r} is leased by readers, {why_no_more}They are: "
            f"{', '.join(holders) or 'unknown'}. Let them refresh, stop them, or {remedy}."
        )

    def _give_back(self) -> None:
        """Removes added slots that nobody uses, but leaves a spare one for the next publish.

        A reader about to lease such a slot finds it gone or locked, or another WORD at R3, and starts over.
        """
        sweep_slot(self._dir)
        with suppress(OSError, SegmentError):
            self.readers()  # removes the records of killed readers
        added = added_slots(self._dir, self.slots)
        if not added:
            return
        spare = 0
        for slot in [*range(self.slots), *added]:
            if slot == self.word & 0xFF:
                continue
            with self._open_slot(slot, os.O_RDWR) as file:
                if not try_lock(file.fileno()):
                    continue
                if spare and slot >= self.slots:
                    os.unlink(slot_name(slot), dir_fd=self._dir)
                    remove_extras(self._dir, slot)
                    self._slot_maps.pop(slot, None)
                else:
                    spare += 1

    @contextmanager
    def slot_with(self, version: int, identity: str) -> Iterator[tuple[SpareSlot | None, Publication | None]]:
        """Yields a locked spare slot that still holds a version whole, and its record; (None, None) if none does."""
        with closing(self._spare_slots(self.slot_numbers())) as spares:
            for spare in spares:
                try:
                    held = Publication.from_header(read_at(spare.fd, METADATA_END, 0))
                except ValueError:  # a version was being staged there
                    continue
                if (held.version, held.identity) == (version, identity):
                    yield spare, held
                    return
        yield None, None

    def _spare_slots(self, slots: Iterable[int]) -> Generator[SpareSlot, None, None]:
        """Yields the slots that are not live and that nobody leases, each locked until the next one or ``close``."""
        for slot in slots:
            if slot == self.word & 0xFF:  # never lock it, not even for a moment
                continue
            file = self._open_slot(slot, os.O_RDWR)
            try:
                if os.fstat(file.fileno()).st_size != self._slot_bytes:  # writing there would end in SIGBUS
                    raise damaged(self.name, f"has a {slot_name(slot)} that is not of {self._slot_bytes:,} bytes")
                if (
                    try_lock(file.fileno())  # P2 pick
                    and self.word & 0xFF != slot  # P3 check
                ):
                    yield SpareSlot(slot, file.fileno(), self._slot_map(slot), self.data_offset)
            finally:
                file.close()  # P6 release

    def put_extras(self, slot: SpareSlot, data: bytes) -> None:
        """Writes the extras of a slot that is being staged.

        Raises:
            OutOfSharedMemory: there is no room.
        """
        try:
            write_extras(self._dir, slot.number, data)
        except OSError as exc:
            if told := no_room(exc, self.path, len(data)):
                raise told from exc
            raise

    def store(self, version: int, slot: int) -> None:
        """P7 and P8: makes this slot live."""
        self.control.store(version << 8 | slot)
        try:
            self._give_back()
        except (OSError, SegmentError):
            pass  # the version is live, and the next publish removes the rest

    def live_weights(self) -> memoryview | None:
        """The live weights, for the publisher, whose lock keeps them live; None before the first version."""
        slot = self.word & 0xFF
        return None if slot >= NO_SLOT else memoryview(self._slot_map(slot))[self.data_offset :]

    def close(self) -> None:
        self.unmap()
        super().close()

    def unmap(self) -> None:
        """Unmaps the publisher's slots; the next access maps them again."""
        self._slot_maps.clear()

    def _slot_map(self, slot: int) -> mmap.mmap:
        if slot not in self._slot_maps:
            self._slot_maps[slot], _ = self.map_pages(slot, write=True)
            populate(self._slot_maps[slot])
        return self._slot_maps[slot]


def _set_aside_if_damaged(name: str, path: Path) -> None:
    """Removes a segment if something outside wsync removed or cut files of it, and logs that."""
    try:
        with closing(WritableSegment(name, path)) as segment:
            if not (how := segment.damage()):
                return
            segment.control.tell_removed()
    except SegmentDamaged as exc:
        how = exc.message.partition(": ")[0]
    except SegmentError:
        return
    _warn(
        "segment %r %s: something outside wsync removed or cut its files; it is made anew. If systemd did this at "
        "a user's last logout, set RemoveIPC=no in logind.conf, or use `loginctl enable-linger`.",
        name,
        how.removeprefix(f"segment {name!r} "),
    )
    with opened(open_dir(path)) as directory:
        set_aside(path, directory)


def _warn_of_disk(base: Path) -> None:
    kind = file_system(base)
    if kind not in ("tmpfs", "ramfs", "hugetlbfs", ""):
        _warn(
            "%s is on a disk (%s): each version is also written to that disk, and a publish may wait for it. Name a "
            "directory in memory, such as one below /dev/shm, with --runtime-dir.",
            base,
            kind,
        )


def remove(name: str, runtime: str | os.PathLike[str] | None = None) -> None:
    """Removes a segment, even a broken one.

    Raises:
        SegmentMissing: there is no segment of this name.
        SegmentBusy: a publisher holds it.
        SegmentUnsafe: it is another user's, or not a directory.
    """
    base = runtime_dir(runtime)
    try:
        with closing(WritableSegment.open(name, runtime)) as segment:
            segment.remove()
    except SegmentUnsafe:
        base_owner(base, write=True)
        shut(open_dir(base / check_name(name)))
        discard(base / name)


def _warn(message: str, *values: object) -> None:
    import logging  # here, because a push with nothing to say does not need it

    logging.getLogger("wsync").warning(message, *values)
