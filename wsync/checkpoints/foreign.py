"""Files that are not safetensors but what ``torch.save`` or a pickle leaves: told by their first bytes, never opened.

Loading a pickle can run any code, so wsync reads none. What it can do is say so, and how to write safetensors instead.
"""

from __future__ import annotations

import os
import stat
from itertools import islice
from pathlib import Path
from typing import cast

from ..errors import WsyncError, printable
from ..system.memory import read_at
from .files import remote

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".zip", ".pkl", ".pickle", ".tar")
_PROTOCOLS = range(2, 6)  # of pickles that begin with 0x80
_LOOKED_AT = 20  # files, and directories, at most
_ENTRIES = 10_000  # of one directory
_FIRST = 9  # bytes


def kind_of(head: bytes) -> str:
    """What a file is that begins so; empty for a safetensors file, and for what is not known.

    The ninth byte of a safetensors file is the brace that begins its header, whatever the eight of its length are.
    """
    if head[8:9] == b"{":
        return ""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "a zip archive, as torch.save and stable-baselines3 write it, with a pickle in it"
    if head[:1] == b"\x80" and head[1:2] and head[1] in _PROTOCOLS:
        return "a pickle"
    return ""


def instead(name: str) -> str:
    """The line of code that writes safetensors in place of a file of this name."""
    stem, suffix = os.path.splitext(name)
    policy = "model.policy" if suffix == ".zip" else "policy"
    return f'safetensors.torch.save_file({policy}.state_dict(), "{stem}.safetensors")'


def found_in(place: Path) -> str:
    """Names such files in a directory or one level below, in a sentence; returns an empty text if there are none."""
    try:
        files = _files(place)
    except (OSError, WsyncError):  # it was listed a moment ago; this only explains
        return ""
    found = [(file, kind) for file in files if (kind := kind_of(_first(file)))]
    if not found:
        return ""
    file, kind = found[0]
    name, more = str(file).removeprefix(f"{place}/"), len(found) - 1
    others = f", and {more} more like it" if more else ""
    return (
        f" There is {printable(name):.100}, {kind}{others}: wsync never opens those, since loading one can run any "
        f"code. Let the trainer write safetensors: {printable(instead(file.name)):.200}"
    )


def _files(place: Path) -> list[Path]:
    """A few files of a directory, and of those directly below it, whose names end like such files."""
    files: list[Path] = []
    directories = [place]
    for number, directory in enumerate(directories):
        for entry in entries_of(directory):
            if entry.name.lower().endswith(SUFFIXES):
                files.append(entry)
            elif not number and len(directories) <= _LOOKED_AT and entry.is_dir():
                directories.append(entry)
            if len(files) == _LOOKED_AT:
                return files
    return files


def entries_of(directory: Path) -> list[Path]:
    if away := remote(directory):
        return [cast(Path, entry) for entry in away.entries()]
    with os.scandir(directory) as entries:
        return [Path(entry.path) for entry in islice(entries, _ENTRIES)]


def _first(file: Path) -> bytes:
    """The first bytes of a file; nothing of what is not a regular one, or cannot be read."""
    try:
        if away := remote(file):
            stored = away.stored()
            data = bytearray(min(stored.size, _FIRST)) if stored else bytearray()
            if stored and data:
                from ..stores.store import into

                away.store.read(stored, 0, len(data), into(data))
            return bytes(data)
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, WsyncError):
        return b""
    try:
        return read_at(fd, _FIRST, 0) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    except OSError:
        return b""
    finally:
        os.close(fd)
