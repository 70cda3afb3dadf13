"""The tensors of one checkpoint: a source of bytes, opened once, and a table of what lies where in it.

The format is safetensors (https://github.com/huggingface/safetensors): eight bytes with the header's length, a JSON
header that gives dtype, shape and byte range of each tensor, then the bytes without gaps.

What opens and reads is imported when the first checkpoint is opened: a pass with nothing to do opens none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, IncompleteCheckpoint
from .files.extras import ExtraFiles, Extras
from .files.parts import changed, identity_of, led_to, parts_of, place_at, remote, unreadable

if TYPE_CHECKING:
    from ..fitting.cast import Pair, Piece
    from ..fitting.header import StoredTensor
    from .files.digest import Digest
    from .files.source import ByteSource


class TensorTable:
    """The open tensors of a checkpoint, its headers validated; however many files it has, they are one table.

    Attributes:
        path: absolute path of the file or directory, with links resolved.
        parts: what it consists of.
        source: gives its bytes.
        identity: of its files as they were opened.
        changed_ns: newest change time of its files as they were opened; 0 for a copy, or in a store.
        tensors: what it holds, by name, in the order of the files.
        metadata: the headers' ``__metadata__``.
        digests: digests that the files must have, if asked for.
        settle: seconds that it had to stand still; its base has to, too.
        base: the table of the weights that it is merged into, once that is planned; see ``adapter``.
        extras: what travels with the weights, once those are read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        settle: float = 0.0,
        digest: str = "",
        published: Callable[[], Sequence[str]] = tuple,
        extras: ExtraFiles = ExtraFiles(),  # noqa: B008  (frozen)
    ) -> None:
        """Opens a checkpoint.

        Args:
            path: of a file or directory, or a URL.
            settle: seconds without a change, if nothing else shows that its writer is done; waited for here.
            digest: ``"sha256"`` compares its files with the digests that its writer leaves (see ``digest``).
            published: gives the identities of what was published from this path before; called if it has several files.
            extras: which files travel with the weights.

        Raises:
            NoCheckpoint: there is none at this path.
            BeingWritten: its writer is still at work, or was a moment ago.
            IncompleteCheckpoint: a file is shorter than its header says, a shard is missing or from another write, or
                an extra is missing.
            MalformedCheckpoint: it breaks the format, or its extras are too large.
            WrongDigest: the configuration of an adapter does not match its digest.
            CheckpointError: it cannot be read.
        """
        self.path, self.identity, self.settle = led_to(place_at(path)), "", settle
        self.tensors: Mapping[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        self.digests: tuple[Digest, ...] = ()
        self.base: TensorTable | None = None
        self.extras = Extras()
        try:
            self.parts = parts_of(self.path, extras)
            self.source = self._open()
            try:
                self._read(digest, published)
            except BaseException:  # an interrupt must not leave descriptors open, either
                self.source.close()
                raise
        except OSError as exc:
            raise unreadable(self.path, exc) from exc
        except CheckpointError as exc:
            exc.identity = self.identity
            raise
        infos = self.source.infos
        self.changed_ns = 0 if remote(self.path) else max(info.st_ctime_ns for info in infos)

    def _open(self) -> ByteSource:
        if remote(self.path):
            from .files.objects import Objects

            return Objects(self.parts, self.settle)
        from .files.local import Files

        return Files(self.parts, self.settle)

    def _read(self, digest: str, published: Callable[[], Sequence[str]]) -> None:
        """Checks that the files are of one save, and reads their headers."""
        from .files.settling import check_files, check_steps

        self.identity = identity_of(self.source.infos)
        if self.parts.beside:
            check_files(self.parts, self.source.infos, self.settle, published())
        if self.parts.wanted.files:
            from .files.extras_reading import check_extras

            check_extras(self.parts, self.source.infos, self.settle, published())
        self.expect(digest)
        headers = [self._read_header(number, file) for number, file in enumerate(self.parts.files)]
        check_steps(self.parts, headers)
        for header in headers:
            self.metadata |= header

    def expect(self, digest: str) -> None:
        """Finds the digests that the writer left, to compare the files with as they are read.

        Args:
            digest: ``"sha256"``; empty expects nothing.

        Raises:
            BeingWritten: a digest has not come.
            WrongDigest: the configuration of an adapter does not match its digest.
            OSError: one cannot be read.
        """
        from .files.digest import digests_of

        if digest:
            self.digests = digests_of(self.parts)

    def _read_header(self, number: int, file: Path) -> Mapping[str, str]:
        """Adds the tensors of one of the files; returns its metadata."""
        from ..fitting.header import read_header

        def read(nbytes: int, start: int) -> bytes:
            return self.source.read(number, nbytes, start)

        tensors, metadata = read_header(read, self.source.infos[number].st_size, file, number)
        if self.parts.names and tensors.keys() != self.parts.names[number]:
            odd = sorted(tensors.keys() ^ self.parts.names[number])
            raise IncompleteCheckpoint(
                f"{file} does not hold the tensors that the index gives it: {odd[0]:.200} is in only one of the two. "
                "Wait for its writer to finish, or write it again."
            )
        self.tensors = {**self.tensors, **tensors} if self.tensors else tensors
        return metadata

    def close(self) -> None:
        self.source.close()
        if self.base:
            self.base.close()

    def check_unchanged(self) -> None:
        """Checks that the open files are those whose headers were read, and nobody writes to them.

        Raises:
            CheckpointChanged: they are not.
        """
        if not self.source.stands():
            raise changed(self.path)

    def convert_each(
        self,
        pairs: Sequence[Pair],
        work: Callable[[Piece, memoryview], bool],
        progress: Callable[[int], None] | None = None,
    ) -> bool:
        """Applies ``work`` to the stored bytes of these tensors, piece by piece; returns whether all returned True.

        Args:
            work: called with a piece and its bytes, which are good until it returns.
            progress: called with the bytes that each piece becomes.
        """
        from ..fitting import plan
        from ..fitting.cast import pieces

        every = True
        for piece, result in self.source.converted(list(pieces(pairs, plan.READING.chunk)), work):
            every = every and result
            if progress:
                progress(piece.becomes)
        return every
