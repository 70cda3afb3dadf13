"""One checkpoint: opened once, validated, planned against a layout, read straight into a buffer.

The format is safetensors (https://github.com/huggingface/safetensors): eight bytes with the header's length, a JSON
header that gives dtype, shape and byte range of each tensor, then the bytes without gaps. A checkpoint is data from
elsewhere: nothing in it is believed before it is checked against the file's real size. It is used through one
descriptor, and looked at again when all is read; ``reading`` brings its bytes into the weights.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from ..errors import (
    CheckpointChanged,
    CheckpointError,
    CheckpointMismatch,
    Difference,
    IncompleteCheckpoint,
    NoCheckpoint,
    NonFiniteWeights,
    PartialCheckpoint,
)
from ..layout.filenames import ADAPTER, SINGLE
from ..layout.finite import Region, all_finite, float_regions, is_finite, not_finite
from ..layout.layout import Layout, TensorEntry
from ..system.memory import being_written, kept, read_at, shut
from . import settling
from .cast import Pair, Piece, convert, pieces
from .files import identity, identity_of, parts_of, place_at, remote, unreadable
from .fit import CHUNK, Fit, Plan, Read, fit
from .header import StoredTensor, malformed, read_header
from .reading import Files


class Checkpoint:
    """An open checkpoint, its headers validated; however many files it has, callers see one table of tensors.

    Attributes:
        path: the file or directory where it was found, absolute.
        identity: of its files as they were opened.
        tensors: what it holds, by name, in the order of the files.
        metadata: the headers' ``__metadata__``.
        step: the producer's number: metadata ``step``, else the last integer of the name, or of the name that a link
            leads to, else None.
        size: bytes of its files.
        planned: the last plan.
    """

    _piece = CHUNK  # bytes of what is converted at once

    def __init__(self, path: str | os.PathLike[str], *, settle: float = 0.0) -> None:
        """Opens a checkpoint.

        Args:
            settle: seconds that it must have stood still where nothing else tells that its writer is done; waited for
                here.

        Raises:
            NoCheckpoint: there is none at this path.
            IncompleteCheckpoint: a file is shorter than its header says, or a shard is missing or another write's.
            MalformedCheckpoint: it breaks the format.
            CheckpointError: it cannot be read.
        """
        self.path = place_at(path)
        self._fds: list[int] = []
        self._files = Files((), self._changed)
        self._base: Checkpoint | None = None  # of an adapter that is merged
        self.identity = ""
        self.planned: Plan | None = None
        self.fitted: Fit | None = None
        try:
            self.parts = parts_of(self.path)
            self._open_files(settle)
            self._index = [self.parts.index.stat()] if self.parts.index else []
            self.identity = identity_of([*self._index, *self._infos])
            self.size = sum(info.st_size for info in self._infos)
            self.tensors: Mapping[str, StoredTensor] = {}
            self.metadata: dict[str, str] = {}
            for number, file in enumerate(self.parts.files):
                self._read_header(number, file)
        except OSError as exc:
            self.close()
            raise unreadable(self.path, exc) from exc
        except BaseException as exc:
            if isinstance(exc, CheckpointError):
                exc.identity = self.identity
            self.close()
            raise
        own = self.path.parent.name if self.path.name in (SINGLE, ADAPTER) else self.path.name
        self.step = step_of(own, self.metadata)
        if self.step is None and self._fds:
            self.step = step_of(self._linked_name(), {})

    def _linked_name(self) -> str:
        """The name of what a link, such as ``latest``, led to when it was opened; empty where the path is none."""
        try:
            if not self.path.is_symlink():
                return ""
            real = Path(os.readlink(f"/proc/self/fd/{self._fds[0]}"))
        except OSError:
            return ""
        return (real if self.parts.files[0] == self.path else real.parent).name

    def _open_files(self, settle: float) -> None:
        """Opens the files, and takes down what they are."""
        for file in self.parts.files:
            self._fds.append(_open(file))
        settling.let_files_settle(self.parts, self._fds, settle)
        self._infos = [os.fstat(fd) for fd in self._fds]
        self._files = Files(self._fds, self._changed)

    def _read_header(self, number: int, file: Path) -> None:
        tensors, metadata = read_header(partial(self._at, number), self._infos[number].st_size, file, number)
        self.metadata |= metadata
        if self.parts.names and tensors.keys() != self.parts.names[number]:
            odd = sorted(tensors.keys() ^ self.parts.names[number])
            raise IncompleteCheckpoint(
                f"{file} does not hold the tensors that the index gives it: {odd[0]:.200} is in one of them alone. "
                "Wait for its writer to finish, or write it again."
            )
        self.tensors = {**self.tensors, **tensors} if self.tensors else tensors

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()
        while self._fds:
            shut(self._fds.pop())
        if self._base:
            self._base.close()

    @property
    def layout(self) -> Layout:
        """The checkpoint's own tensors as a layout."""
        return Layout.build({t.name: (t.dtype, t.shape) for t in self.tensors.values()}, {})

    def plan(self, layout: Layout, settings: Fit = Fit()) -> Plan:  # noqa: B008  (frozen)
        """Fits the checkpoint to a layout.

        Raises:
            CheckpointMismatch: tensors do not fit; all of them are listed.
            PartialCheckpoint: a part came, as it may, and there are no live values for the rest to keep.
        """
        try:
            self.planned = fit(self.tensors, layout, settings, self.path)
            return self.planned
        except (CheckpointMismatch, PartialCheckpoint) as exc:
            if not self.parts.is_adapter or (isinstance(exc, PartialCheckpoint) and not settings.base):
                raise
            if not settings.base:
                raise CheckpointMismatch(
                    f"{self.path} is an adapter, and the policy has no adapters. Name the weights that it is merged "
                    'into: base = "…" in [weights].',
                    exc.differences,
                ) from None
        from .adapter import merge, open_base  # few checkpoints are adapters

        self._base = self._base or open_base(settings.base, self.path)
        self.planned = merge(self, self._base, layout, settings)
        return self.planned

    @property
    def kept(self) -> bool:
        """Whether the last plan leaves live values of others beside its own."""
        return bool(self.planned and self.planned.kept)

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
            if plan.merge:
                from .adapter import blaming

                base = plan.merge.base
                with blaming(base.path, self.path):
                    base.read_into(weights, plan.merge.plan, finite=finite, progress=progress)
            for read, finite_too in self._staged(weights, plan.reads, regions):
                clean = clean and finite_too
                if progress:
                    progress(read.nbytes)

            def cast(piece: Piece, data: memoryview) -> bool:
                there = weights[piece.offset : piece.offset + piece.becomes]
                convert(data, piece.source, piece.target, there)
                return all_finite(weights, regions, ((piece.offset, piece.becomes),))

            clean = self.convert_each(plan.casts, cast, progress) and clean
            for twin, entry in plan.twins:
                self._compare(weights, twin, entry)
            if plan.merge:
                clean = plan.merge.add(self, weights, regions, progress) and clean
            self.check_unchanged()  # P5 verify
        except OSError as exc:
            raise unreadable(self.path, exc) from exc
        if not clean:
            raise self._non_finite(weights, plan)

    def is_copy_of(self, path: str, identity: str, step: int | None, fitted: Fit) -> None:
        """Goes by the name of what it is a copy of, and by how that was fitted, where it is recorded."""
        self.path, self.identity, self.step, self.fitted = Path(path), identity, step, fitted

    def check_unchanged(self) -> None:
        """Whether the open file is still the one whose header was read, and nobody has it open for writing by now.

        On tmpfs what is written through a mapping shows in no time; who writes so is seen while the mapping stands.

        Raises:
            CheckpointChanged: it is not.
        """
        for number, fd in enumerate(self._fds):
            if identity(os.fstat(fd)) != identity(self._infos[number]) or being_written(fd):
                raise self._changed()
        if self.parts.is_several:  # files that are replaced one after another are each whole, and together none
            parts = parts_of(self.path)
            if parts != self.parts or any(
                not os.path.samestat(file.stat(), info) for file, info in zip(parts.files, self._infos, strict=True)
            ):
                raise self._changed()
            if parts.index and identity(parts.index.stat()) != identity(self._index[0]):
                raise self._changed()

    def _changed(self) -> CheckpointChanged:
        return CheckpointChanged(
            f"{self.path} changed while it was read; what was read is thrown away. Nothing to do: it is read again "
            "at the next pass. Writers do best to write another name and rename it into place."
        )

    def _staged(
        self, weights: memoryview, reads: Sequence[Read], regions: Sequence[Region]
    ) -> Iterator[tuple[Read, bool]]:
        """Each read once its bytes are in the weights, with whether these regions are finite there."""
        return self._files.staged(weights, reads, regions)

    def whole(self, tensor: StoredTensor) -> memoryview:
        """All bytes of a tensor."""
        data = self._at(tensor.file, tensor.nbytes, tensor.start)
        if len(data) != tensor.nbytes:
            raise self._changed()
        return memoryview(data)

    def _at(self, number: int, nbytes: int, start: int) -> bytes:
        """Bytes of one of the files; fewer where it ends."""
        return read_at(self._fds[number], nbytes, start)

    def convert_each(
        self,
        pairs: Sequence[Pair],
        work: Callable[[Piece, memoryview], bool],
        progress: Callable[[int], None] | None = None,
    ) -> bool:
        """Has work done on the stored bytes of these tensors, piece by piece; returns whether all of it returned True.

        Args:
            work: called with a piece and its bytes, which are good until it returns.
            progress: called with the bytes that each piece becomes.
        """
        every = True
        for piece, result in self._each(list(pieces(pairs, self._piece)), work):
            every = every and result
            if progress:
                progress(piece.becomes)
        return every

    def _each(self, listed: Sequence[Piece], work: Callable[[Piece, memoryview], bool]) -> Iterator[tuple[Piece, bool]]:
        """Each piece with what comes of it, in their order; the work gets it as it is stored, good until it returns."""
        return self._files.converted(listed, work)

    def _compare(self, weights: memoryview, twin: StoredTensor, entry: TensorEntry) -> None:
        def work(piece: Piece, data: memoryview) -> bool:
            there = weights[piece.offset : piece.offset + piece.becomes]
            return convert(data, piece.source, piece.target) == there

        if not self.convert_each([(twin, entry)], work):
            self.check_unchanged()
            raise CheckpointMismatch(
                f"{self.path}: {twin.name} and {entry.name} are one tensor in the policy and two different ones "
                "in the file. Write the checkpoint from a model whose weights are tied.",
                (Difference(twin.name, f"equal to {entry.name}", "different"),),
            )

    def _non_finite(self, weights: memoryview, plan: Plan) -> NonFiniteWeights:
        """Tells what is not finite of all that was read."""
        casts = {pair[1].name: pair for pair in plan.casts}
        read = {entry.name for _, entry in plan.pairs}
        read |= {delta.entry.name for delta in plan.merge.deltas} if plan.merge else set()
        rows = []
        for name in (name for name in not_finite(weights, plan.layout) if name in read):
            if (cast := casts.get(name)) and self.is_finite(cast[0]):
                rows.append(Difference(name, f"within the range of {cast[1].dtype}", f"beyond it, as {cast[0].dtype}"))
            else:
                rows.append(Difference(name, "finite", "NaN or infinity"))
        if any(row.expected == "finite" for row in rows):
            return NonFiniteWeights(
                f"{self.path} holds NaN or infinity in {len(rows)} of its tensors. It is never published; look at the "
                "trainer, which has probably diverged.",
                tuple(rows),
            )
        return NonFiniteWeights(
            f"{self.path} holds values in {len(rows)} of its tensors that are too large for the dtype that they are "
            "cast to. It is never published; give the policy a dtype of a wider range, or look at the trainer.",
            tuple(rows),
        )

    def is_finite(self, tensor: StoredTensor) -> bool:
        """Whether a tensor is finite as it is stored."""
        entry = TensorEntry(tensor.name, tensor.dtype, tensor.shape, 0)
        return self.convert_each([(tensor, entry)], lambda piece, data: is_finite(data, piece.source))


def open_checkpoint(path: str | os.PathLike[str], *, settle: float = 0.0) -> Checkpoint:
    """The checkpoint at a path or URL, opened; see ``Checkpoint``."""
    place = place_at(path)
    if remote(place) is None:
        return Checkpoint(place, settle=settle)
    from .remote import RemoteCheckpoint

    return RemoteCheckpoint(place, settle=settle)


def step_of(name: str, metadata: Mapping[str, str]) -> int | None:
    """A checkpoint's step: its metadata's ``step``, else the last integer of its name, else None."""
    import re

    stated = metadata.get("step", "").strip()
    if re.fullmatch(r"-?\d{1,19}", stated) and abs(int(stated)) < 1 << 63:
        return int(stated)
    numbers = re.findall(r"\d+", name.removesuffix(".safetensors"))
    if not numbers:
        return None
    number = int(numbers[-1])  # a time in nanoseconds has 19 digits
    return number if number < 1 << 63 else int(numbers[-1][-18:])


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as exc:
        raise NoCheckpoint(f"there is no {path}. Name a checkpoint that exists.") from exc
    except OSError as exc:
        if exc.errno == errno.ENXIO:  # a socket
            raise malformed(path, "it is not a regular file") from exc
        raise unreadable(path, exc) from exc
    with kept(fd):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise malformed(path, "it is not a regular file")
    return fd
