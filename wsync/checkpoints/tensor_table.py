"""Opens the files of one checkpoint, and indexes the tensors in them: dtype, shape and place of each.

The format is safetensors (https://github.com/huggingface/safetensors): the header's length in eight bytes, a JSON
header that gives the dtype, shape and byte range of each tensor, then the tensors' bytes without gaps.

The modules that open and read files are imported with the first checkpoint: a pass with nothing to do opens none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, IncompleteCheckpoint
from .files.extras import ExtraFiles, Extras
from .files.parts import changed_while_read, identity_of, led_to, parts_of, place_at, remote, unreadable

if TYPE_CHECKING:
    from ..fitting.cast import Pair, Piece
    from ..fitting.header import StoredTensor
    from .files.digest import Digest
    from .files.source import ByteSource


class TensorTable:
    """The tensors of an open checkpoint, with validated headers; several files form one table.

    Attributes:
        path: absolute path of the file or directory, with links resolved.
        parts: the files of the checkpoint.
        source: reads their bytes.
        identity: identity of the files when they were opened; see ``parts.identity_of``.
        changed_ns: newest change time of the files when they were opened, in ns; 0 for a kept copy or in a store.
        tensors: where each tensor lies, by name, in the order of the files.
        metadata: the ``__metadata__`` of all headers together.
        digests: the digest that each weight file must have; empty unless asked for.
        settle: seconds that the files had to stay unchanged; the files of ``base`` have to as well.
        base: the weights that an adapter is merged into; None until ``adapter.plan_adapter`` opens them.
        extras: the files and metadata that travel with the weights; empty until the weights are read.
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
            path: a file or directory, or a URL.
            settle: seconds without a change, needed if nothing else shows that the writer is done; waits if few remain.
            digest: ``"sha256"`` compares the files with the digests that their writer leaves (see ``digest``).
            published: returns the identities of what was published from this path; called if there are several files.
            extras: which files travel with the weights.

        Raises:
            NoCheckpoint: there is none at this path.
            BeingWritten: its writer is still at work, or was a moment ago.
            IncompleteCheckpoint: a file is shorter than its header says, a shard is missing or from another write, or
                an extra is missing.
            MalformedCheckpoint: a file breaks the format, or the extras are too large.
            WrongDigest: an adapter's configuration, or an index, does not match its digest.
            CheckpointChanged: a file was replaced while they were opened.
            CheckpointError: a file cannot be read.
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
            from .files.store_objects import Objects

            return Objects(self.parts, self.settle)
        from .files.local_files import Files

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
        """Looks up the digests that the writer left; the files are compared with them as they are read.

        Args:
            digest: ``"sha256"``; empty expects nothing.

        Raises:
            BeingWritten: a digest is not there yet.
            WrongDigest: an adapter's configuration, or an index, does not match its digest.
            MalformedCheckpoint: a list of digests is too large, or not a regular file.
            OSError: a list of digests cannot be read.
        """
        from .files.digest import digests_of

        if digest:
            self.digests = digests_of(self.parts)

    def _read_header(self, number: int, file: Path) -> Mapping[str, str]:
        """Adds the tensors of one file; returns its metadata."""
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
        """Checks that the files are as they were opened, and that nobody has one of them open for writing.

        Raises:
            CheckpointChanged: one of them changed, or is open for writing.
        """
        if not self.source.stands():
            raise changed_while_read(self.path)

    def convert_each(
        self,
        pairs: Sequence[Pair],
        work: Callable[[Piece, memoryview], bool],
        progress: Callable[[int], None] | None = None,
    ) -> bool:
        """Applies ``work`` to the stored bytes of these tensors, piece by piece; returns whether all calls gave True.

        Args:
            work: called with a piece and its bytes, which are valid until it returns.
            progress: called after each piece with the number of bytes that it takes in the weights.
        """
        from ..fitting import plan
        from ..fitting.cast import pieces

        every = True
        with closing(self.source.converted(list(pieces(pairs, plan.READING.chunk)), work)) as converted:
            for piece, result in converted:
                every = every and result
                if progress:
                    progress(piece.becomes)
        return every
