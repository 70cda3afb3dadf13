"""What is in a checkpoint, whether it is complete and fits a policy; or what a directory holds to choose from."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, open_checkpoint
from .errors import CheckpointError, NoCheckpoint, WithDifferences
from .finite import not_finite
from .parts import parts_of, place_at
from .source import Candidate, Select, scan, select
from .spec import Spec

Fits = Callable[[Checkpoint], dict[str, Any]]


def inspect(path: str | os.PathLike[str], *, spec: Spec | None = None, scan_values: bool = False) -> dict[str, Any]:
    """Looks at a checkpoint, or at the candidates of a directory; never raises for what is wrong with one of them.

    Args:
        spec: tells whether it fits this policy, and how.
        scan_values: reads every tensor to tell whether it is finite.

    Returns:
        ``{"path", "candidates": […]}`` for a directory of checkpoints, newest first; else ``{"path", "complete",
        "reason", "step", "bytes", "files", "metadata", "tensors"}``, and ``"fits"`` with a spec. Each tensor has
        ``name``, ``dtype``, ``shape``, ``bytes``, ``file`` and, where it was read, ``finite``.

    Raises:
        NoCheckpoint: there is nothing at the path.
    """
    fits, path = _fitter(spec) if spec else None, place_at(path)
    if path.is_dir():
        try:
            parts_of(path)
        except NoCheckpoint:
            settings = spec.select if spec else Select()
            found = select(scan(path, settings), order=settings.order)
            return {"path": str(path), "candidates": [_verdict(candidate, fits) for candidate in found]}
        except CheckpointError:
            pass  # told below, where it is opened
    return _look(path, fits, scan_values)


def _verdict(candidate: Candidate, fits: Fits | None) -> dict[str, Any]:
    looked = _look(candidate.path, fits, False)
    return {key: looked.get(key) for key in ("path", "complete", "step", "bytes", "reason", "fits") if key in looked}


def _look(path: Path, fits: Fits | None, scan_values: bool) -> dict[str, Any]:
    try:
        checkpoint = open_checkpoint(path)
    except NoCheckpoint:
        raise
    except CheckpointError as exc:
        return {"path": str(path), "complete": False, "reason": str(exc), "step": None, "bytes": None}
    with checkpoint:
        broken = set(_not_finite(checkpoint)) if scan_values else None
        looked: dict[str, Any] = {
            "path": str(path),
            "complete": True,
            "reason": None,
            "step": checkpoint.step,
            "bytes": checkpoint.size,
            "files": [file.name for file in checkpoint.parts.files],
            "metadata": checkpoint.metadata,
            "tensors": [
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "bytes": tensor.nbytes,
                    "file": checkpoint.parts.files[tensor.file].name,
                    **({} if broken is None else {"finite": tensor.name not in broken}),
                }
                for tensor in checkpoint.tensors.values()
            ],
        }
        if fits:
            looked |= fits(checkpoint)
    return looked


def _fitter(spec: Spec) -> Fits:
    """Tells of checkpoints whether they fit the policy, whose layout is read once."""
    layout = spec.layout()

    def fits(checkpoint: Checkpoint) -> dict[str, Any]:
        try:
            checkpoint.plan(layout, spec.weights)
        except WithDifferences as exc:
            return {"fits": False, "reason": exc.message, "differences": [asdict(row) for row in exc.differences]}
        return {"fits": True}

    return fits


def _not_finite(checkpoint: Checkpoint) -> list[str]:
    layout = checkpoint.layout
    weights = memoryview(bytearray(layout.nbytes))
    checkpoint.read_into(weights, checkpoint.plan(layout), finite=False)
    return not_finite(weights, layout)
