"""One checkpoint: opened once, validated, planned against a layout, read straight into a buffer.

The format is safetensors (https://github.com/huggingface/safetensors): eight bytes with the header's length, a JSON
header that gives dtype, shape and byte range of each tensor, then the bytes without gaps. A checkpoint is data from
elsewhere: nothing in it is believed before it is checked against the file's real size. It is read through one
descriptor and never mapped, because a mapped file that is truncated kills its reader.

A pass over a 64 MiB file of the layout's own order takes one read for the header and one for each ``CHUNK``; the
finite check runs on each chunk while it is still in the processor's cache.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import (
    CheckpointChanged,
    CheckpointError,
    CheckpointMismatch,
    Difference,
    NoCheckpoint,
    NonFiniteWeights,
)
from .finite import all_finite, float_regions, not_finite
from .header import StoredTensor, malformed, read_header
from .layout import Layout, TensorEntry, describe

CHUNK = 8 << 20  # bytes of one read: few enough calls, and still in the third cache for the finite check
_TICK = 0.01  # seconds: no coarser than a file system's clock ticks
_MAX_BUFFERS = 512  # of one preadv; Linux takes 1024


@dataclass(frozen=True, slots=True)
class Read:
    """One system call: ``nbytes`` from ``start`` of the file into slices ``(offset, nbytes)`` of the weights."""

    start: int
    nbytes: int
    slices: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a checkpoint's bytes reach a layout.

    Attributes:
        reads: the reads, in the file's order.
        twins: further copies of a tied tensor, which must equal the one that is read.
    """

    layout: Layout
    reads: tuple[Read, ...]
    twins: tuple[tuple[StoredTensor, TensorEntry], ...]


def identity(info: os.stat_result) -> str:
    """Tells one state of a file from every other: device, inode, size in bytes, modification time in ns."""
    return f"{info.st_dev}-{info.st_ino}-{info.st_size}-{info.st_mtime_ns}"


class Checkpoint:
    """An open checkpoint, its header validated.

    Attributes:
        path: where it was found, absolute.
        identity: of the file as it was opened.
        tensors: what it holds, by name, in the order of the file.
        metadata: the header's ``__metadata__``.
        step: the producer's number: metadata ``step``, else the last integer of the name, else None.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a checkpoint.

        Raises:
            NoCheckpoint: there is no such file.
            IncompleteCheckpoint: it is shorter than its header says, or still empty.
            MalformedCheckpoint: it breaks the format.
            CheckpointError: it cannot be read.
        """
        self.path = Path(path).absolute()
        self._fd = _open(self.path)
        try:
            self._let_tick_pass()
            info = os.fstat(self._fd)
            self.identity, self.size = identity(info), info.st_size
            self.tensors, self.metadata = read_header(self._fd, info.st_size, self.path)
        except OSError as exc:
            os.close(self._fd)
            raise _unreadable(self.path, exc) from exc
        except BaseException:
            os.close(self._fd)
            raise
        self.step = step_of(self.path.name, self.metadata)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def layout(self) -> Layout:
        """The checkpoint's own tensors as a layout."""
        return Layout.build({t.name: (t.dtype, t.shape) for t in self.tensors.values()}, {})

    def plan(self, layout: Layout) -> Plan:
        """Fits the checkpoint to a layout.

        Raises:
            CheckpointMismatch: a tensor is missing, unknown, or of another dtype or shape; all of them are listed.
        """
        wanted = {name: entry for entry in layout.tensors for name in entry.names}
        rows = [
            Difference(name, "absent", describe(t.dtype, t.shape))
            for name, t in self.tensors.items()
            if name not in wanted
        ]
        chosen: list[tuple[StoredTensor, TensorEntry]] = []
        twins: list[tuple[StoredTensor, TensorEntry]] = []
        for entry in layout.tensors:
            stored = [self.tensors[name] for name in entry.names if name in self.tensors]
            rows += [
                Difference(t.name, entry.describe(), describe(t.dtype, t.shape))
                for t in stored
                if (t.dtype, t.shape) != (entry.dtype, entry.shape)
            ]
            if stored:
                chosen.append((stored[0], entry))
                twins += [(t, entry) for t in stored[1:]]
            else:
                rows.append(Difference(entry.name, entry.describe(), "absent"))
        if rows:
            raise CheckpointMismatch(
                f"{self.path} does not fit the policy: {len(rows)} of its tensors differ. It stays refused until it "
                "changes; write checkpoints of this policy's own state_dict, or name the spec that fits.",
                tuple(sorted(rows, key=lambda row: row.name)),
            )
        return Plan(layout, _reads(chosen), tuple(twins))

    def read_into(
        self,
        weights: memoryview,
        plan: Plan,
        *,
        finite: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Reads the planned bytes into ``weights``, checks them, and checks that the file stood still meanwhile.

        Args:
            weights: writable, at least ``plan.layout.nbytes`` bytes.
            finite: refuse NaN and infinity.
            progress: called with the number of bytes of each read.

        Raises:
            NonFiniteWeights: the tensors that hold NaN or infinity are listed.
            CheckpointMismatch: two copies of a tied tensor differ.
            CheckpointChanged: the file changed, or was cut, while it was read.
            CheckpointError: the system could not read it.
        """
        regions = float_regions(plan.layout) if finite else ()
        clean = True
        try:
            for read in plan.reads:
                self._read(weights, read)
                clean = clean and all_finite(weights, regions, read.slices)
                if progress:
                    progress(read.nbytes)
            for twin, entry in plan.twins:
                self._compare(weights, twin, entry)
            self.check_unchanged()
        except OSError as exc:
            raise _unreadable(self.path, exc) from exc
        if not clean:
            raise self._non_finite(weights, plan.layout)

    def check_unchanged(self) -> None:
        """Whether the open file is still the one whose header was read.

        Raises:
            CheckpointChanged: it is not.
        """
        if identity(os.fstat(self._fd)) != self.identity:
            raise self._changed()

    def _changed(self) -> CheckpointChanged:
        return CheckpointChanged(
            f"{self.path} changed while it was read; what was read is thrown away. Nothing to do: it is read again "
            "at the next pass. Writers do best to write another name and rename it into place."
        )

    def _let_tick_pass(self) -> None:
        """Waits until a further write would show in the file's modification time.

        A file system's clock may stand still for some milliseconds: of a write in the same tick as the last one before
        the file was opened, nothing would be seen.
        """
        age = time.time() - os.fstat(self._fd).st_mtime
        if 0 <= age < _TICK:
            time.sleep(_TICK - age)

    def _read(self, weights: memoryview, read: Read) -> None:
        buffers = [weights[offset : offset + nbytes] for offset, nbytes in read.slices]
        start, missing = read.start, read.nbytes
        while missing:
            got = os.preadv(self._fd, buffers, start)
            if not got:
                raise self._changed()
            start, missing = start + got, missing - got
            while got and missing:
                if got >= len(buffers[0]):
                    got -= len(buffers.pop(0))
                else:
                    buffers[0], got = buffers[0][got:], 0

    def _compare(self, weights: memoryview, twin: StoredTensor, entry: TensorEntry) -> None:
        for at in range(0, twin.nbytes, CHUNK):
            size = min(CHUNK, twin.nbytes - at)
            piece = os.pread(self._fd, size, twin.start + at)
            if len(piece) != size:
                raise self._changed()
            if piece != weights[entry.offset + at : entry.offset + at + size]:
                raise CheckpointMismatch(
                    f"{self.path}: {twin.name} and {entry.name} are one tensor in the policy and two different ones "
                    "in the file. Write the checkpoint from a model whose weights are tied.",
                    (Difference(twin.name, f"equal to {entry.name}", "different"),),
                )

    def _non_finite(self, weights: memoryview, layout: Layout) -> NonFiniteWeights:
        rows = [Difference(name, "finite", "NaN or infinity") for name in not_finite(weights, layout)]
        return NonFiniteWeights(
            f"{self.path} holds NaN or infinity in {len(rows)} of its tensors. It is never published; look at the "
            "trainer, which has probably diverged.",
            tuple(rows),
        )


def step_of(name: str, metadata: Mapping[str, str]) -> int | None:
    """A checkpoint's step: its metadata's ``step``, else the last integer of its name, else None."""
    import re

    stated = metadata.get("step", "").strip()
    if re.fullmatch(r"-?\d{1,18}", stated):
        return int(stated)
    numbers = re.findall(r"\d+", name.removesuffix(".safetensors"))
    return int(numbers[-1][-18:]) if numbers else None


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as exc:
        raise NoCheckpoint(f"there is no {path}. Name a checkpoint that exists.") from exc
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise malformed(path, "it is not a regular file")
    return fd


def _unreadable(path: Path, exc: OSError) -> CheckpointError:
    reason = os.strerror(exc.errno) if exc.errno else str(exc)
    if exc.errno in (errno.EACCES, errno.EPERM):
        try:
            info = path.stat()
        except OSError:
            return CheckpointError(
                f"{path} cannot be reached by uid {os.geteuid()} ({reason}). Give it access to the directories above."
            )
        try:
            owner = pwd.getpwuid(info.st_uid).pw_name
        except KeyError:
            owner = str(info.st_uid)
        return CheckpointError(
            f"{path} belongs to {owner} with mode {stat.S_IMODE(info.st_mode):04o} and cannot be read by uid "
            f"{os.geteuid()} ({reason}). Let the trainer make it readable, or run wsync as its owner."
        )
    return CheckpointError(f"{path} cannot be read ({reason}). It is tried again at the next pass.")


def _reads(chosen: Iterable[tuple[StoredTensor, TensorEntry]]) -> tuple[Read, ...]:
    """Reads of at most ``CHUNK`` bytes that follow the file, each filling as many tensors as lie in it in a row."""
    reads: list[Read] = []
    slices: list[tuple[int, int]] = []
    start = end = 0

    def flush() -> None:
        if slices:
            reads.append(Read(start, end - start, tuple(slices)))
            slices.clear()

    for stored, entry in sorted(chosen, key=lambda pair: pair[0].start):
        at = 0
        while at < stored.nbytes:
            here = stored.start + at
            room = CHUNK - (end - start) & ~7  # so that no element is split
            if here != end or not room or len(slices) >= _MAX_BUFFERS:
                flush()
                start = end = here
                room = CHUNK
            size = min(stored.nbytes - at, room)
            if slices and sum(slices[-1]) == entry.offset + at:
                slices[-1] = (slices[-1][0], slices[-1][1] + size)
            else:
                slices.append((entry.offset + at, size))
            end, at = here + size, at + size
    flush()
    return tuple(reads)
