"""The tensors of one checkpoint: a source of bytes, opened once, and a table of what lies where in it.

The format is safetensors (https://github.com/huggingface/safetensors): eight bytes with the header's length, a JSON
header that gives dtype, shape and byte range of each tensor, then the bytes without gaps. A checkpoint is data from
elsewhere: nothing in it is believed before it is checked against the file's real size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..errors import IncompleteCheckpoint
from ..layout.finite import is_finite
from ..layout.layout import TensorEntry
from . import one_save
from .cast import Pair, Piece, pieces
from .digest import digests_of
from .files import changed, identity_of, parts_of, unreadable
from .header import StoredTensor, read_header
from .held import Held
from .plan import CHUNK
from .source import ByteSource, open_source


class TensorTable:
    """The open tensors of a checkpoint, its headers validated; however many files it has, they are one table.

    Attributes:
        path: the file or directory where it was found, absolute.
        parts: what it consists of.
        source: gives its bytes.
        identity: of its files as they were opened.
        tensors: what it holds, by name, in the order of the files.
        metadata: the headers' ``__metadata__``.
        heads: the bytes of each file before its first tensor.
        digests: what the files have to be, where that was asked for.
    """

    piece = CHUNK
    """Bytes of what is converted at once."""

    def __init__(
        self, path: Path, settle: float = 0.0, digest: str = "", published: Callable[[], Sequence[str]] = tuple
    ) -> None:
        """Opens a checkpoint; see ``Checkpoint``."""
        self.path, self.identity = path, ""
        source: ByteSource | None = None
        try:
            self.parts = parts_of(path)
            self.source = source = open_source(self.parts, settle)
            index = [source.index] if source.index else []
            self.identity = identity_of([*index, *source.infos])
            if index:
                one_save.check_files(self.parts, source.infos, index[0], settle, published())
            self.tensors: Mapping[str, StoredTensor] = {}
            self.metadata: dict[str, str] = {}
            self.heads: list[bytes] = []
            self.digests = digests_of(self.parts) if digest else ()
            headers = [self._read_header(number, file) for number, file in enumerate(self.parts.files)]
            one_save.check_steps(self.parts, headers)
            for header in headers:
                self.metadata |= header
        except BaseException as exc:
            if source:
                source.close()
            if isinstance(exc, OSError):
                raise unreadable(path, exc) from exc
            raise

    def _read_header(self, number: int, file: Path) -> Mapping[str, str]:
        """Adds the tensors of one of the files; returns its metadata."""
        size, head = self.source.infos[number].st_size, bytearray()

        def read(nbytes: int, start: int) -> bytes:
            data = self.source.read(number, nbytes, start)
            head[start:] = data
            return data

        tensors, metadata = read_header(read, size, file, number)
        if self.digests or self.source.digests:
            begin = next(iter(tensors.values())).start if tensors else size
            self.heads.append(bytes(head[:begin]))
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

    def hold(self) -> None:
        """Reads all files into memory, if digests were asked for, and compares those: nothing else is read then.

        Raises:
            WrongDigest: the bytes are others than their digest names.
            BeingWritten: the same, and the digest is older than they are.
        """
        if self.digests and not isinstance(self.source, Held):
            self.source = held = Held(self.source)
            for digest, data in zip(self.digests, held.data, strict=True):
                digest.check(hashlib.sha256(data).hexdigest())

    def check_unchanged(self) -> None:
        """Whether the open files are still those whose headers were read, and nobody writes to them by now.

        Raises:
            CheckpointChanged: they are not.
        """
        if not self.source.stands():
            raise changed(self.path)

    def whole(self, tensor: StoredTensor) -> memoryview:
        """All bytes of a tensor."""
        data = self.source.read(tensor.file, tensor.nbytes, tensor.start)
        if len(data) != tensor.nbytes:
            raise changed(self.path)
        return memoryview(data)

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
        every = True
        for piece, result in self.source.converted(list(pieces(pairs, self.piece)), work):
            every = every and result
            if progress:
                progress(piece.becomes)
        return every

    def is_finite(self, tensor: StoredTensor) -> bool:
        """Whether a tensor is finite as it is stored."""
        entry = TensorEntry(tensor.name, tensor.dtype, tensor.shape, 0)
        return self.convert_each([(tensor, entry)], lambda piece, data: is_finite(data, piece.source))
