"""The files that travel with a checkpoint's weights: which they are, and what they hold once they are read.

Normaliser statistics, processor configurations, tokenizers and action bounds belong to one set of weights. They lie
beside it, are read with it under the same checks, and reach a policy in the same version.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UsageError
from ...layout.filenames import SUFFIX, is_file_name

MAX_BYTES = 16 << 20  # default of extras.max_bytes
_MOST_BYTES = 1 << 30  # largest value that it accepts
_STEM = "{stem}"


@dataclass(frozen=True, slots=True)
class ExtraFiles:
    """Which files travel with a checkpoint's weights: the settings of ``[extras]``.

    Attributes:
        files: names or globs of files in the checkpoint's directory, or beside a checkpoint that is a single file. A
            checkpoint is incomplete until each of them has a match. ``{stem}`` stands for the checkpoint's own name
            without ``.safetensors``: ``{stem}.json``.
        max_bytes: most bytes of all extras together.
        listed: the names in each directory, cached for the time of one listing of a place; else None.
    """

    files: tuple[str, ...] = ()
    max_bytes: int = MAX_BYTES
    listed: dict[str, list[str]] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for pattern in self.files:
            *levels, name = pattern.split("/")
            if not all(map(is_file_name, (*levels, name))) or any(map(_is_glob, levels)):
                raise UsageError(
                    f"extras.files holds {pattern!r}, which names no file of a checkpoint. Give names relative to its "
                    "directory, with * and ? in the last part alone."
                )
            if _STEM in pattern and _is_glob(pattern):
                raise UsageError(f"extras.files holds {pattern!r}. Write {_STEM} or wildcards, not both in one name.")
        if not 0 < self.max_bytes <= _MOST_BYTES:
            raise UsageError(f"extras.max_bytes = {self.max_bytes} is not a size. Give 1 to {_MOST_BYTES:,} bytes.")

    def beside(self, path: Path, files: Collection[Path]) -> dict[str, Path]:
        """Finds the extras that exist, by the names under which policies get them.

        Args:
            path: the checkpoint.
            files: the checkpoint's own files, which are never extras.
        """
        found: dict[str, Path] = {}
        directory, stem = next(iter(files)).parent, path.name.removesuffix(SUFFIX)
        for pattern in self.files:
            if not _is_glob(pattern):
                file = directory / pattern.replace(_STEM, stem)
                if file.is_file() if isinstance(file, Path) else file.is_there():
                    found[pattern] = file
                continue
            below, slash, _ = pattern.rpartition("/")
            place = directory / below if below else directory
            for name in fnmatch.filter(self._names(place), pattern[len(below + slash) :]):
                file = place / name
                if not name.startswith(".") and is_file_name(name) and file not in files and file.is_file():
                    found[f"{below}{slash}{name}"] = file
        return dict(sorted(found.items()))

    def matches(self, name: str) -> bool:
        """Whether a file of this name may be an extra of a checkpoint beside it."""
        return any(fnmatch.fnmatchcase(name, pattern.replace(_STEM, "*")) for pattern in self.files)

    def missing(self, found: Collection[str]) -> str:
        """The first pattern that matches none of these names; empty if each matches one."""
        return next((p for p in self.files if p not in found and not (_is_glob(p) and fnmatch.filter(found, p))), "")

    def _names(self, directory: Path) -> list[str]:
        where = str(directory)
        if self.listed is not None and where in self.listed:
            return self.listed[where]
        if isinstance(directory, Path):
            names = os.listdir(directory) if directory.is_dir() else []
        else:
            names = [entry.name for entry in directory.neighbours()]
        if self.listed is not None:
            self.listed[where] = names
        return names


class Extras(NamedTuple):
    """What travels with the weights of a version.

    Attributes:
        files: the bytes of each file, by its name.
        metadata: the checkpoint's ``__metadata__``.
    """

    files: Mapping[str, bytes] = {}
    metadata: Mapping[str, str] = {}

    def to_bytes(self) -> bytes:
        """Encodes them as a safetensors file with one U8 tensor for each file; empty if there is nothing."""
        if not self.files and not self.metadata:
            return b""
        table: dict[str, Any] = {"__metadata__": dict(self.metadata)}
        end = 0
        for name, data in self.files.items():
            end += len(data)
            table[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [end - len(data), end]}
        header = json.dumps(table).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + b"".join(self.files.values())

    @classmethod
    def from_bytes(cls, data: bytes) -> Extras:
        """Decodes what ``to_bytes`` wrote; on any other input it may raise an exception of any kind."""
        if not data:
            return cls()
        start = 8 + int.from_bytes(data[:8], "little")
        table = json.loads(data[8:start])
        metadata = dict(table.pop("__metadata__", {}))
        spans = {name: entry["data_offsets"] for name, entry in table.items()}
        return cls({name: data[start + first : start + end] for name, (first, end) in spans.items()}, metadata)


def checked(extras: Mapping[str, bytes]) -> Extras:
    """Validates extras that a caller gives as bytes, by name.

    Raises:
        UsageError: it is not a mapping, a name is not a relative file name, a value is not bytes, or all together are
            over 1 GiB.
    """
    if not isinstance(extras, Mapping):
        raise UsageError(f"extras is of type {type(extras).__name__}. Give a mapping from names of files to bytes.")
    for name, data in extras.items():
        if not isinstance(name, str) or not all(map(is_file_name, name.split("/"))) or name == "__metadata__":
            raise UsageError(f"extras: {name!r} is not a file's name. Give a relative one, such as preprocessor.json.")
        if not isinstance(data, bytes | bytearray | memoryview):
            raise UsageError(f"extras[{name!r}] is a {type(data).__name__}. Give bytes.")
        if any(other.startswith(f"{name}/") for other in extras):
            raise UsageError(f"extras: {name!r} is a file and the directory of another one. Rename one of them.")
    if (size := sum(map(len, extras.values()))) > _MOST_BYTES:
        raise UsageError(f"extras: {size:,} bytes are more than the {_MOST_BYTES:,} that may travel. Give fewer.")
    return Extras({name: bytes(data) for name, data in extras.items()})


def _is_glob(pattern: str) -> bool:
    return any(mark in pattern for mark in "*?[")
