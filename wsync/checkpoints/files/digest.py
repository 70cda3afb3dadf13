"""SHA-256 digests of a checkpoint's files, from its writer or its store.

``[select] digest = "sha256"`` asks for them. A file's digest is in ``NAME.sha256`` beside it; for a directory also in
``SHA256SUMS`` inside it or ``DIRECTORY.sha256`` beside it, one line per file. Lines have the format of ``sha256sum``
(GNU coreutils), also with ``--binary`` or ``--tag``; in ``NAME.sha256`` a lone digest without a name is that of NAME.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ...errors import BeingWritten, MalformedCheckpoint, WrongDigest
from ...layout.filenames import MAX_INDEX, SUMS
from .parts import Parts, read_small

_MOST = 10_000_000  # most bytes of a list of digests
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64})(?:[ \t]+\*?(.*))?|SHA256 \((.+)\) = ([0-9a-fA-F]{64})")


class Digest(NamedTuple):
    """The digest that a file must have.

    Attributes:
        file: the checkpoint's file.
        expected: 64 hexadecimal digits in lower case.
        told_by: the list or store that it comes from, for messages.
        older: whether the list was written before the file, and may describe an earlier state of it.
    """

    file: Path
    expected: str
    told_by: str
    older: bool = False

    def check(self, found: str) -> None:
        """Compares the digest with that of the bytes that were read: 64 hexadecimal digits in lower case.

        Raises:
            BeingWritten: they differ, and the digest is older than the file.
            WrongDigest: they differ.
        """
        if found == self.expected:
            return
        says = f"{self.file} has the SHA-256 {found}, and {self.told_by} says {self.expected}"
        if self.older:
            raise BeingWritten(f"{says}, but is older than the file. Wait for its writer to write the new digest.")
        raise WrongDigest(
            f"{says}: its bytes differ from those that were written. Write or copy it again. If the digest was wrong, "
            "correct it, and push once with --retry."
        )


def digests_of(parts: Parts) -> tuple[Digest, ...]:
    """Finds the digests of a checkpoint's weight files, in the order of ``parts.files``.

    Checks an adapter's configuration at once, and an index if a list has its digest.

    Raises:
        BeingWritten: a digest is not there yet.
        WrongDigest: the configuration or the index does not match its digest.
        MalformedCheckpoint: a list of digests is too large, or not a regular file.
        OSError: the system could not read one of these files.
    """
    known: dict[Path, list[tuple[str, str]]] = {}
    found = tuple(_needed(file, _digest(file, known)) for file in parts.files)
    if small := parts.beside:
        digest = _digest(small, known)
        if parts.is_adapter:
            digest = _needed(small, digest)
        if digest:
            digest.check(hashlib.sha256(read_small(small, MAX_INDEX)).hexdigest())
    return found


def digest_of(file: Path) -> Digest:
    """Finds the digest of one file; raises the same errors as ``digests_of``."""
    return _needed(file, _digest(file, {}))


def _needed(file: Path, digest: Digest | None) -> Digest:
    if digest:
        return digest
    raise BeingWritten(
        f"{file} is not complete yet: neither {file.name}.sha256 beside it nor {SUMS} has its digest. Wait for its "
        "writer, or leave out `digest`."
    )


def _digest(file: Path, known: dict[Path, list[tuple[str, str]]]) -> Digest | None:
    """Finds the digest of a file in the first list that has it; adds the lists that it reads to ``known``."""
    own = file.parent / f"{file.name}.sha256"
    for listing in (own, file.parent / SUMS, file.parent.parent / f"{file.parent.name}.sha256"):
        if listing not in known:
            known[listing] = list(_lines(listing))
        lines = known[listing]
        if listing == own and len(lines) == 1 and lines[0][1] in ("", "-"):
            lines = [(lines[0][0], file.name)]
        near = [(_shared(name, file), digest) for digest, name in lines if os.path.basename(name) == file.name]
        if near:
            most = max(shared for shared, _ in near)
            expected = [digest for shared, digest in near if shared == most][-1]  # the last that `>>` appended
            return Digest(file, expected, str(listing), _is_older(listing, file))
    return None


def _lines(listing: Path) -> Iterator[tuple[str, str]]:
    """Yields the digest and name in each line of a list; skips all other lines."""
    try:
        data = read_small(listing, _MOST)
    except FileNotFoundError:
        return
    except ValueError as exc:
        raise MalformedCheckpoint(f"{listing} is not a list of digests ({exc}). Write it again.") from exc
    for line in data.decode(errors="surrogateescape").split("\n"):
        if match := _LINE.fullmatch(line.rstrip("\r")):
            escaped, digest, name, tagged, tagged_digest = match.groups()
            name = name or tagged or ""
            if escaped:
                name = name.replace("\\n", "\n").replace("\\\\", "\\")
            yield (digest or tagged_digest).lower(), name


def _shared(name: str, file: Path) -> int:
    """How many trailing parts a name in a list shares with a path."""
    pairs = zip(reversed(name.split("/")), reversed(str(file).split("/")), strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), name.count("/") + 1)


def _is_older(listing: Path, file: Path) -> bool:
    """Whether a list was written before the file, by modification time or by change time."""
    try:
        ours, theirs = listing.stat(), file.stat()
    except FileNotFoundError:  # the listing of a single named object does not show the list
        return False
    return ours.st_mtime_ns < theirs.st_mtime_ns or ours.st_ctime_ns < theirs.st_ctime_ns
