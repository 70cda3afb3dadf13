"""The files of a segment: their form, making them all at once, and sweeping away what killed makers left.

A slot is a safetensors file whose header is padded twice: its metadata to a fixed size, so that describing another
version moves nothing, and the whole to a page, so that the weights begin on one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import UsageError
from .layout import Layout
from .memory import PAGE, free_bytes, open_file, open_private_dir, reserve, try_lock

FORMAT = 1
MAGIC = b"WSYNC\0\0" + bytes([FORMAT])
WORD_OFFSET = 64  # bytes into the control page
NO_SLOT, REMOVED = 0xFE, 0xFF  # in the WORD, in the place of a slot's number
METADATA_END = 2 * PAGE  # of a slot: its header's metadata is padded to here


@dataclass(frozen=True, slots=True)
class Publication:
    """What the header of a slot says of the version in it.

    Attributes:
        version: the segment's counter.
        step: the producer's number, where it gave one.
        source: path of the checkpoint; empty for weights that came from memory.
        identity: the file's identity when it was read (see ``checkpoint.identity``).
        published_at: seconds since the epoch.
        spec: fingerprint of the policy spec that it was published for.
    """

    version: int
    step: int | None
    source: str
    identity: str
    published_at: float
    spec: str

    def to_metadata(self) -> dict[str, str]:
        return {key: "" if value is None else str(value) for key, value in asdict(self).items()}

    @classmethod
    def from_header(cls, header: bytes) -> Publication:
        """From the first ``METADATA_END`` bytes of a slot."""
        data = json.loads(header[8:].rstrip() + b"}")["__metadata__"]
        return cls(
            version=int(data["version"]),
            step=int(data["step"]) if data["step"] else None,
            source=data["source"],
            identity=data["identity"],
            published_at=float(data["published_at"]),
            spec=data["spec"],
        )


def slot_name(slot: int) -> str:
    return f"slot-{slot}.safetensors"


def metadata_block(metadata: Mapping[str, str]) -> bytes:
    """The part of a slot's header from byte 8 to ``METADATA_END``."""
    # A file name that is no UTF-8 is recorded with its odd bytes escaped; it is shown, and never opened by this record.
    table = {key: value.encode("utf-8", "backslashreplace").decode() for key, value in metadata.items()}
    block = b'{"__metadata__":' + json.dumps(table, ensure_ascii=False).encode()
    if len(block) > METADATA_END - 8:
        raise UsageError("the path of the checkpoint is too long to be recorded. Use a shorter one.")
    return block.ljust(METADATA_END - 8)


def slot_header(layout: Layout) -> bytes:
    """A safetensors header without metadata that ends on a page, so that the weights begin on one."""
    table = "".join(
        f',{json.dumps(e.name)}:{{"dtype":"{e.dtype}","shape":{list(e.shape)},'
        f'"data_offsets":[{e.offset},{e.offset + e.nbytes}]}}'
        for e in layout.tensors
    )
    header = metadata_block({}) + table.encode() + b"}"
    header = header.ljust(-(-(len(header) + 8) // PAGE) * PAGE - 8)
    return len(header).to_bytes(8, "little") + header


def make(path: Path, layout: Layout, slots: int, spec: str) -> None:
    """Makes the segment under another name and renames it: it is there whole or not at all.

    Raises:
        OutOfSharedMemory: there is no room; nothing is left behind.
    """
    import shutil

    header = slot_header(layout)
    about = {
        "format": FORMAT,
        "slots": slots,
        "data_offset": len(header),
        "spec": spec,
        "digest": layout.digest,
        "layout": layout.to_json(),
    }
    files = [("control", _control_page(), PAGE), ("layout.json", json.dumps(about).encode(), 0)]
    files += [(slot_name(slot), header, len(header) + layout.nbytes) for slot in range(slots)]
    wanted = sum(max(size, len(content)) for _, content, size in files)
    free = free_bytes(path.parent)
    temporary, directory, lock = _claim(path.parent)
    try:
        os.mkdir("readers", 0o700, dir_fd=directory)
        for name, content, size in files:
            fd = open_file(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, directory)
            try:
                reserve(fd, max(size, len(content)), wanted=wanted, free=free, where=path.parent)
                os.pwrite(fd, content, 0)
            finally:
                os.close(fd)
        os.rename(temporary, path)
    except BaseException as exc:
        shutil.rmtree(temporary, ignore_errors=True)
        if not (isinstance(exc, OSError) and path.exists()):  # else another maker was first
            raise
    finally:
        os.close(lock)
        os.close(directory)


def discard(path: Path) -> None:
    """Removes a segment's directory: first its name, then what is in it, so that nobody opens half of it."""
    import shutil

    doomed = path.with_name(f".removed-{path.name}-{os.getpid()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(base: Path) -> None:
    """Removes what makers and removers that were killed left behind: their lock is free."""
    import shutil

    for path in (*base.glob(".new-*"), *base.glob(".removed-*")):
        try:
            lock = os.open(path / "publisher.lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # it is only being made, or it is gone
        try:
            if try_lock(lock):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _claim(base: Path) -> tuple[Path, int, int]:
    """A new hidden directory whose lock is held, so that nobody sweeps it away as a dead maker's."""
    import tempfile

    while True:
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=base))
        directory = open_private_dir(temporary)
        lock = open_file("publisher.lock", os.O_RDWR | os.O_CREAT, directory)
        if try_lock(lock) and os.fstat(lock).st_nlink:
            return temporary, directory, lock
        os.close(lock)
        os.close(directory)


def _control_page() -> bytes:
    page = bytearray(PAGE)
    page[: len(MAGIC)] = MAGIC
    page[WORD_OFFSET : WORD_OFFSET + 8] = NO_SLOT.to_bytes(8, "little")
    return bytes(page)
