"""Looks for another file in a checkpoint's directory that fits the policy, to name it in the error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError, CheckpointMismatch
from ..fitting.advice import HOPELESS, Tensors
from ..fitting.fit import Fit
from ..fitting.match import match
from ..layout.filenames import INDEX_SUFFIX, SUFFIX
from ..layout.layout import Layout
from .files.parts import Parts, remote
from .step_number import is_fixed
from .tensor_table import TensorTable

_MOST = 16  # most files that are tried


def with_siblings(exc: CheckpointMismatch, parts: Parts, layout: Layout, settings: Fit) -> CheckpointMismatch:
    """Replaces the advice in a mismatch if another file in the directory fits, or some hold parts of the policy."""
    before, hopeless, _ = exc.message.partition(HOPELESS)
    path = parts.path
    if not hopeless or remote(path) or not (path.is_dir() or is_fixed(path.name)):
        return exc
    directory = path if path.is_dir() else path.parent
    advice = _file_that_fits(directory, parts, layout, settings) or _parts_of_a_model(directory, layout)
    return CheckpointMismatch(f"{before}{advice}", exc.differences) if advice else exc


def _file_that_fits(directory: Path, parts: Parts, layout: Layout, settings: Fit) -> str:
    own = {*parts.files, parts.beside}
    files = sorted(
        file for suffix in (SUFFIX, INDEX_SUFFIX) for file in directory.glob(f"*{suffix}") if file not in own
    )
    for file in files[:_MOST]:
        name = file.name.replace(INDEX_SUFFIX, SUFFIX)
        if _fits(file, layout, settings):
            return f'{file.name} beside it fits: set file = "{name}" in [select] (--file {name}).'
    return ""


def _fits(file: Path, layout: Layout, settings: Fit) -> bool:
    for tensors in _tensors(file):
        found = match(tensors, layout, replace(settings, partial=False))
        return not found.rows and not found.kept
    return False


def _parts_of_a_model(directory: Path, layout: Layout) -> str:
    """The advice if a file one level below holds a part of the policy, as sentence-transformers writes; else empty."""
    wanted = {name for entry in layout.tensors for name in entry.names}
    for file in sorted(directory.glob(f"*/*{SUFFIX}"))[:_MOST]:
        for tensors in _tensors(file):
            if tensors and all(any(name.endswith(f".{stored}") for name in wanted) for stored in tensors):
                below = file.relative_to(directory)
                return (
                    f"{below} holds {len(tensors)} of the policy's tensors under other names: the model is written in "
                    "parts, and wsync never puts parts together. Write its state_dict() whole, with safetensors' "
                    "save_file."
                )
    return ""


def _tensors(file: Path) -> Iterator[Tensors]:
    """Yields the tensors of a file; nothing if it cannot be read."""
    try:
        table = TensorTable(file)
    except CheckpointError:
        return
    table.close()
    yield table.tensors
