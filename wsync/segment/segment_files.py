"""The files of a segment: their formats; makes all of them at once, checks them, and removes leftovers.

A slot is a safetensors file whose header is padded twice: its metadata to a fixed size, so that nothing moves when they
change, and the whole header to whole pages, so that the weights begin on a page.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.files.extras import Extras
from ..errors import SegmentUnsafe, UsageError, parsed
from ..layout.layout import Layout
from ..system.access import Access, open_dir, open_file, opened
from ..system.memory import PAGE, mapping, no_room, read_at, reserve, try_lock, write_at
from .publication import METADATA_END, Publication

MAGIC = b"WSYNC\0\0\1"  # the last byte is the format
WORD_OFFSET, BOUND_OFFSET = 64, 72  # bytes into the control page
NO_SLOT, REMOVED = 0xFE, 0xFF  # in the WORD, instead of a slot's number
MAX_SLOTS = 64
_UNNAMED = "slot.new"  # a slot that is being added
SLOTS, BOUND = 3, 8  # defaults: slots of a new segment, and most slots that it may grow to
MAX_TABLE = 100_000_000  # bytes of a layout.json and of a slot's header; the official reader's bound for headers


class About(NamedTuple):
    """The contents of ``layout.json``, checked; except the layout, which is slow to parse and not always needed."""

    slots: int
    data_offset: int
    spec: str
    table: Any

    @classmethod
    def read(cls, directory: int) -> About:
        """Reads ``layout.json``; raises ValueError if it is not what ``make`` writes."""
        with parsed(), open(open_file("layout.json", os.O_RDONLY, directory), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_TABLE:
                raise ValueError(f"its layout.json has {size:,} bytes, over the bound of {MAX_TABLE:,}")
            data = json.loads(file.read(size))
            slots, data_offset, spec = data["slots"], data["data_offset"], data["spec"]
            if type(slots) is not int or not 2 <= slots <= MAX_SLOTS or not isinstance(spec, str):
                raise ValueError("its layout.json gives an impossible number of slots")
            least, most = METADATA_END, MAX_TABLE + PAGE
            if type(data_offset) is not int or data_offset % PAGE or not least <= data_offset <= most:
                raise ValueError("its layout.json gives an impossible place for the weights")
            return cls(slots, data_offset, spec, data["layout"])

    def layout(self) -> Layout:
        """Parses the layout; raises ValueError if it is not a layout."""
        with parsed():
            layout = Layout.from_json(self.table)
            sizes = [size for entry in layout.tensors for size in entry.shape]
            names = [name for entry in layout.tensors for name in entry.names]
            if not all(isinstance(name, str) for name in names) or not layout.tensors:
                raise TypeError("a name is missing, or is not a text")
            if not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes) or layout.nbytes >= 1 << 63:
                raise ValueError("a size is beyond its bounds")
            return layout


def open_readers(segment: Path) -> int:
    """Opens the directory of a segment's records, whose owner must be the segment's.

    Raises:
        FileNotFoundError: it does not exist.
        SegmentUnsafe: it is not a directory, is another user's, or others may do more than add files of their own.
    """
    return open_dir(segment / "readers", os.stat(segment, follow_symlinks=False).st_uid, sticky=True)


class SpareSlot(NamedTuple):
    """A slot that is being staged: locked, mapped, not live."""

    number: int
    fd: int
    memory: mmap.mmap
    data_offset: int

    @property
    def weights(self) -> memoryview:
        """The slot's weights, writable."""
        return memoryview(self.memory)[self.data_offset :]

    def forget(self) -> None:
        """Clears the record of a version in its header."""
        write_at(self.fd, BLANK, 8)

    def describe(self, publication: Publication) -> None:
        """Writes the record of the version in it into its header."""
        write_at(self.fd, metadata_block(publication.to_metadata()), 8)


def map_control(directory: int, *, write: bool) -> mmap.mmap:
    """Maps the control page of a segment; raises ValueError if it has another format."""
    with opened(open_file("control", os.O_RDWR if write else os.O_RDONLY, directory)) as fd:
        if read_at(fd, len(MAGIC), 0) != MAGIC or os.fstat(fd).st_size != PAGE:
            raise ValueError("its control page is not of this format")
        with mapping(PAGE, fd):
            return mmap.mmap(fd, PAGE, prot=mmap.PROT_READ | (mmap.PROT_WRITE if write else 0))


def slot_name(slot: int) -> str:
    return f"slot-{slot}.safetensors"


def extras_name(slot: int) -> str:
    return f"slot-{slot}.extras"


def write_extras(directory: int, slot: int, data: bytes) -> None:
    """Replaces the extras of a slot that nobody else uses; whoever may read the slot may read them."""
    remove_extras(directory, slot)
    if data:
        like = os.stat(slot_name(slot), dir_fd=directory)
        with opened(open_file(extras_name(slot), os.O_RDWR | os.O_CREAT | os.O_EXCL, directory)) as fd:
            write_at(fd, data, 0)
            os.fchown(fd, -1, like.st_gid)
            os.fchmod(fd, stat.S_IMODE(like.st_mode))


def remove_extras(directory: int, slot: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(extras_name(slot), dir_fd=directory)


def read_extras_file(fd: int, size: int) -> Extras:
    """Reads an open extras file.

    Raises:
        ValueError: it is not of ``size`` bytes, or holds something else.
    """
    data = read_at(fd, size + 1, 0)
    if len(data) != size:
        raise ValueError(f"is not of {size:,} bytes")
    with parsed():
        return Extras.from_bytes(data)


def extras_damage(directory: int, slot: int, size: int) -> str:
    """As ``damage``, for the extras file of a live slot, which should have ``size`` bytes."""
    try:
        there = os.stat(extras_name(slot), dir_fd=directory, follow_symlinks=False).st_size
    except FileNotFoundError:
        return f"has no {extras_name(slot)}"
    return "" if there == size else f"has a {extras_name(slot)} that was cut"


def damage(directory: int, slots: int) -> str:
    """What something outside wsync did to the files of a segment, as the end of a sentence; empty if all is well.

    Finds files that are gone or were cut; a file of another kind is refused when it is opened.
    """
    sizes, names = {}, [slot_name(slot) for slot in range(slots)]
    for name in ("control", "layout.json", "publisher.lock", "readers", *names):
        try:
            info = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return f"has no {name}"
        if stat.S_ISREG(info.st_mode):
            sizes[name] = info.st_size
    whole = max((sizes[name] for name in names if name in sizes), default=0)
    wanted = {"control": PAGE, "publisher.lock": PAGE, **dict.fromkeys(names, whole)}
    cut = [name for name, size in sizes.items() if size != wanted.get(name, size)]
    return f"has a {cut[0]} that was cut" if cut else ""


def set_aside(path: Path, directory: int) -> None:
    """Removes a damaged segment, which is open as ``directory``, unless another process does, or already did."""
    if not try_lock(directory):
        return
    with suppress(FileNotFoundError):
        if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(directory)):
            discard(path)


def added_slots(directory: int, slots: int) -> list[int]:
    """The numbers of the slots that were added to a segment, sorted."""
    names = set(os.listdir(directory))
    return [slot for slot in range(slots, MAX_SLOTS) if slot_name(slot) in names]


def add_slot(directory: int, slot: int, header: bytes, nbytes: int) -> None:
    """Adds a slot to a segment, with the mode of the others; it exists whole or not at all.

    Args:
        header: header of an empty slot.
        nbytes: size of the weights.

    Raises:
        OSError: there is no room, or a system call failed; nothing is left behind.
    """
    like = os.stat(slot_name(0), dir_fd=directory)
    sweep_slot(directory)
    try:
        with opened(open_file(_UNNAMED, os.O_RDWR | os.O_CREAT | os.O_EXCL, directory)) as fd:
            reserve(fd, len(header) + nbytes)
            write_at(fd, header, 0)
            os.fchown(fd, -1, like.st_gid)
            os.fchmod(fd, stat.S_IMODE(like.st_mode))
            os.rename(_UNNAMED, slot_name(slot), src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        sweep_slot(directory)
        raise


def sweep_slot(directory: int) -> None:
    """Removes the unfinished slot of a publisher that was killed while it added one."""
    with suppress(FileNotFoundError):
        os.unlink(_UNNAMED, dir_fd=directory)


def metadata_block(metadata: Mapping[str, str]) -> bytes:
    """The part of a slot's header from byte 8 to ``METADATA_END``."""
    # Bytes of a file name that are not UTF-8 are escaped: the name here is only shown, and never opened.
    table = {key: value.encode("utf-8", "backslashreplace").decode() for key, value in metadata.items()}
    block = b'{"__metadata__":' + json.dumps(table, ensure_ascii=False).encode()
    if len(block) > METADATA_END - 8:
        raise UsageError("the path of the checkpoint is too long for the slot's header. Use a shorter path.")
    return block.ljust(METADATA_END - 8)


BLANK = metadata_block({})
"""The metadata of a slot that is empty or being staged."""


def slot_header(layout: Layout) -> bytes:
    """A safetensors header without metadata that ends on a page, so that the weights begin on one."""
    table = {
        e.name: {"dtype": e.dtype, "shape": e.shape, "data_offsets": (e.offset, e.offset + e.nbytes)}
        for e in layout.tensors
    }
    header = BLANK + b"," + json.dumps(table).encode().removeprefix(b"{")
    header = header.ljust(-(-(len(header) + 8) // PAGE) * PAGE - 8)
    return len(header).to_bytes(8, "little") + header


def make(path: Path, layout: Layout, slots: int, spec: str, access: Access) -> None:
    """Makes the segment under another name and renames it, so that it exists whole or not at all.

    Raises:
        OutOfSharedMemory: there is no room; nothing is left behind.
        UsageError: this user is not in the group that ``access`` names.
    """
    header = slot_header(layout)
    about = {"slots": slots, "data_offset": len(header), "spec": spec, "layout": layout.to_json()}
    files = [
        ("publisher.lock", b"", PAGE),
        ("control", MAGIC.ljust(WORD_OFFSET, b"\0") + NO_SLOT.to_bytes(8, "little"), PAGE),
        ("layout.json", json.dumps(about).encode(), 0),
        *((slot_name(slot), header, len(header) + layout.nbytes) for slot in range(slots)),
    ]
    wanted = PAGE + sum(max(size, len(content)) for _, content, size in files)
    try:
        with ExitStack() as stack:
            temporary, directory = _claim(path.parent, stack)
            os.mkdir("readers", 0o700, dir_fd=directory)
            for name, content, size in files:
                with opened(open_file(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, directory)) as fd:
                    reserve(fd, max(size, len(content)))
                    write_at(fd, content, 0)
            if access.given:
                share(directory, range(slots), access)
            os.rename(temporary, path)
    except OSError as exc:
        if told := no_room(exc, path.parent, wanted, len(files) + 2):
            raise told from exc
        if not os.path.lexists(path):  # otherwise another process made it first
            raise


def share(directory: int, slots: Iterable[int], access: Access) -> None:
    """Gives the files of a segment their group and mode; the directory comes last, to show that all are done."""
    there = set(os.listdir(directory))
    extras = [name for name in map(extras_name, slots) if name in there]
    for name in ("control", "layout.json", *map(slot_name, slots), *extras):
        with opened(open_file(name, os.O_RDONLY, directory)) as fd:
            access.grant(fd, access.bits)
    with opened(open_dir("readers", dir_fd=directory, sticky=True)) as readers:
        access.grant(readers, access.readers_bits)
    access.grant(directory, access.directory_bits)


def discard(path: Path) -> None:
    """Removes a segment's directory; renames it first, so that nobody opens half of it."""
    import shutil

    doomed = path.with_name(f".removed-{os.getpid()}-{os.urandom(4).hex()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # the next sweep removes the rest


def sweep(base: Path) -> None:
    """Removes what processes left that were killed while they made or removed a segment; living ones lock theirs."""
    import shutil

    for path in (*base.glob(".new-*"), *base.glob(".removed-*")):
        try:
            directory = open_dir(path)
        except (OSError, SegmentUnsafe):
            continue
        with opened(directory):
            if try_lock(directory):
                shutil.rmtree(path, ignore_errors=True)


def _claim(base: Path, stack: ExitStack) -> tuple[Path, int]:
    """Makes and locks a hidden directory, which ``sweep`` then leaves alone; the stack removes it."""
    import shutil
    import tempfile

    while True:
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=base))
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        try:
            directory = stack.enter_context(opened(open_dir(temporary)))
        except FileNotFoundError:  # ``sweep`` in another process was faster
            continue
        if try_lock(directory) and os.fstat(directory).st_nlink:
            return temporary, directory
