"""A pointer: a file of a place, such as DeepSpeed's ``latest``, that names the one checkpoint to take."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoints.files.parts import read_small, remote
from ..errors import MalformedCheckpoint, NoCheckpoint
from ..layout.filenames import is_file_name

_MAX_POINTER = 4096  # bytes


def pointed(place: Path, pointer: str) -> str:
    """The name of the entry that a pointer file in a place names.

    A pointer is a link to an entry of the place, or a file that holds the entry's name, as DeepSpeed's ``latest`` does,
    its path, or a number, as Megatron's does for ``iter_0000500``. It cannot lead out of the place.

    Raises:
        NoCheckpoint: there is no such pointer yet, it is empty, or the entry that it names does not exist.
        MalformedCheckpoint: it does not hold text, or names something outside the place.
    """
    file = place / pointer
    try:
        if not remote(place) and file.is_dir():
            text = os.path.realpath(file)
        else:
            text = read_small(file, _MAX_POINTER).decode().strip()
    except FileNotFoundError as exc:
        raise NoCheckpoint(f"there is no pointer {file} yet. It is looked at again at the next pass.") from exc
    except ValueError as exc:
        raise MalformedCheckpoint(f"{file} is not a pointer: it does not hold a name. Correct select.pointer.") from exc
    real = place if remote(place) else Path(os.path.realpath(place))
    named = text.rstrip("/").removeprefix(f"{real}/").removeprefix(f"{place}/").removeprefix("./")
    names = (f"iter_{int(named):07d}", named) if named.isdecimal() and len(named) < 20 else (named,)
    if not named:
        raise NoCheckpoint(f"the pointer {file} is empty. It is looked at again at the next pass.")
    if not is_file_name(named):
        raise MalformedCheckpoint(
            f"{file} names {text!a:.100}, which is not an entry of {place}. Write the name of one."
        )
    found = next((name for name in names if (place / name).exists()), "")
    if not found:
        raise NoCheckpoint(f"{file} names {named}, which is not there yet. It is looked at again at the next pass.")
    if not remote(place) and os.path.dirname(os.path.realpath(place / found)) != str(real):
        raise MalformedCheckpoint(f"{file} names {named}, a link that leads out of {place}. Name an entry of it.")
    return found
