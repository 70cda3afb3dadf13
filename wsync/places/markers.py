"""Markers: the files that a trainer writes last, which say that a checkpoint is whole."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..checkpoints.files import remote, written
from ..layout.filenames import SINGLE, SUFFIX


def markers_of(name: str, marker: str) -> tuple[str, ...]:
    """The marker's possible names beside a file: one of them says that the file is whole."""
    dotted = marker if marker.startswith(".") else f".{marker}"
    own = f"{name}{dotted}", f"{name.removesuffix(SUFFIX)}{dotted}"
    return (*own, marker) if name == SINGLE else own


def is_marked(mtime_ns: int, markers: Iterable[Path]) -> bool:
    """Whether one of these markers is there and no older than the checkpoint: an older one is of an earlier save."""
    infos = map(_look, markers)
    return any(written(info) >= mtime_ns for info in infos if info)


def _look(file: Path) -> os.stat_result | None:
    """Looks at a file, or at an object of a store; None where there is none."""
    if away := remote(file):
        stored = away.now()
        return stored.stat(str(away.store)) if stored else None
    try:
        return file.lstat()
    except OSError:
        return None
