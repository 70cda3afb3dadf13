"""What ``wsync inspect`` prints: whether a checkpoint, or each in a directory, is complete and fits; what it holds."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.files.extras_reading import read_extras
from ...checkpoints.files.parts import parts_of, place_at, unreadable
from ...checkpoints.staging import check_digests
from ...checkpoints.step_number import step_at
from ...discovery.listing import inside, scan
from ...discovery.newest import Candidate, Select, select
from ...errors import CheckpointError, NoCheckpoint, harmless, on_one_line, printable
from ...fitting.cast import Piece
from ...layout.finite import is_finite
from ...layout.layout import TensorEntry
from ...settings import layout_process
from ...settings.spec import Spec
from ...text import count, size
from ..terminal import plain_table, stdout_console

if TYPE_CHECKING:
    from rich.console import Console

Fits = Callable[[Checkpoint], dict[str, Any]]


def inspect(
    path: str | os.PathLike[str], *, spec: Spec | None = None, settings: Select | None = None, scan_values: bool = False
) -> dict[str, Any]:
    """Describes a checkpoint, or the candidates of a directory; an error of one of them is described, not raised.

    Args:
        spec: the policy to check them against; None for none.
        settings: which entries are checkpoints; default the spec's.
        scan_values: whether to read every tensor, to see whether it is finite, and the extras, and to compare digests
            if the settings ask for that.

    Returns:
        ``{"path", "candidates": […]}`` for a directory of checkpoints, newest first; else ``{"path", "complete",
        "reason", "kind", "step", "step_from", "other_numbers", "bytes", "files", "extras", "metadata",
        "tensors"}``, with ``"fits"`` if a spec is given, and ``"candidates"`` if the directory has other checkpoints.

        ``step_from`` says where the step was read, and ``other_numbers`` are the other numbers in the name. Each tensor
        has ``name``, ``dtype``, ``shape``, ``bytes``, ``file`` and, with ``scan_values``, ``finite``. A checkpoint that
        fits has ``casts`` (each ``name``, ``from``, ``to``), ``kept`` (tensors of the policy that keep their live
        values), ``left_out`` (tensors of the checkpoint that are not used) and ``base`` (what an adapter is merged
        into). ``kind`` is the reason in one word, such as ``incomplete``, ``malformed`` or ``failed``.

    Raises:
        NoCheckpoint: there is nothing at the path.
        CheckpointError: a directory cannot be listed.
    """
    fits, path = _fitter(spec) if spec else None, place_at(path)
    settings = settings or (spec.select if spec else Select())
    try:
        if not path.is_dir():
            return _look(path, settings, fits, scan_values)
        own = inside(path, settings)
        parts_of(own)
    except NoCheckpoint:
        return {"path": str(path), "candidates": _verdicts(scan(path, settings, everything=True), settings, fits)}
    except OSError as exc:
        raise unreadable(path, exc) from exc
    except CheckpointError:
        pass  # reported below, when it is opened
    looked = _look(own, settings, fits, scan_values)
    try:
        others = [candidate for candidate in scan(path, settings, everything=True) if candidate.path != own]
    except CheckpointError:
        others = []
    return {**looked, "candidates": _verdicts(others, settings, fits)} if others else looked


def _verdicts(found: list[Candidate], settings: Select, fits: Fits | None) -> list[dict[str, Any]]:
    shown = ("path", "complete", "step", "step_from", "other_numbers", "bytes", "reason", "kind", "fits")
    verdicts = []
    for candidate in select(found, order=settings.order):
        try:
            looked = _look(candidate.path, settings, fits, False)
        except NoCheckpoint:
            continue  # retention was faster
        verdicts.append({key: looked[key] for key in shown if key in looked})
    return verdicts


def _look(path: Path, settings: Select, fits: Fits | None, scan_values: bool) -> dict[str, Any]:
    try:
        checkpoint = Checkpoint(path, digest=settings.digest, extras=settings.extras)
        with checkpoint:
            broken = _not_finite(checkpoint) if scan_values else None
            if scan_values:
                check_digests(checkpoint)
                if checkpoint.parts.extras:
                    read_extras(checkpoint.source, {}, digests=bool(checkpoint.digests))
            return _described(path, checkpoint, settings, broken) | (fits(checkpoint) if fits else {})
    except NoCheckpoint:
        raise
    except CheckpointError as exc:
        about = {
            "complete": False,
            "reason": on_one_line(str(exc), str(path)),
            "kind": exc.kind,
            "step": None,
            "bytes": None,
        }
        return {"path": str(path), **about}


def _described(path: Path, checkpoint: Checkpoint, settings: Select, broken: set[str] | None) -> dict[str, Any]:
    step = step_at(checkpoint.path, checkpoint.metadata, settings.step)
    return {
        "path": str(path),
        "complete": True,
        "reason": None,
        "kind": None,
        "step": step.number,
        "step_from": step.source or None,
        "other_numbers": list(step.others),
        "bytes": checkpoint.size,
        "files": [file.name for file in checkpoint.parts.files],
        "extras": sorted(checkpoint.parts.extras),
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


def _fitter(spec: Spec) -> Fits:
    """Returns a function that says whether and how a checkpoint fits the policy; reads the policy's layout once."""
    layout, settings = layout_process.layout_of_spec(spec), spec.weights

    def fits(checkpoint: Checkpoint) -> dict[str, Any]:
        try:
            plan = checkpoint.plan(layout, settings)
        except CheckpointError as exc:
            reason = on_one_line(exc.message, str(checkpoint.path))
            return {"fits": False, "reason": reason, "differences": [asdict(row) for row in exc.differences]}
        taken = {stored.name for stored, _ in (*plan.pairs, *plan.twins)}
        left = [] if plan.merge else [name for name in checkpoint.tensors if name not in taken]
        return {
            "fits": True,
            "casts": [{"name": t.name, "from": t.dtype, "to": entry.dtype} for t, entry in plan.conversions],
            "kept": [entry.name for entry in plan.kept],
            "left_out": left,
            "base": settings.base if plan.merge else None,
        }

    return fits


def _not_finite(checkpoint: Checkpoint) -> set[str]:
    """The names of the tensors that hold NaN or infinity; reads in pieces, because tensors may be huge."""
    tensors = list(checkpoint.tensors.values())
    starts = [(tensor.file, tensor.start) for tensor in tensors]
    broken: set[str] = set()

    def look(piece: Piece, data: memoryview) -> bool:
        if not is_finite(data, piece.source):
            broken.add(tensors[bisect_right(starts, (piece.file, piece.start)) - 1].name)
        return True

    try:
        checkpoint.convert_each([(each, TensorEntry(each.name, each.dtype, each.shape, 0)) for each in tensors], look)
        checkpoint.check_unchanged()
    except OSError as exc:
        raise unreadable(checkpoint.path, exc) from exc
    return broken


def print_inspection(looked: dict[str, Any]) -> None:
    console = stdout_console()
    if "complete" in looked:
        _print_checkpoint(console, looked)
    if "candidates" in looked:
        _print_candidates(console, looked)


def _print_candidates(console: Console, looked: dict[str, Any]) -> None:
    from rich.text import Text

    found = looked["candidates"]
    others = "other " if "complete" in looked else ""
    title = f"{printable(looked['path'])}: {count(len(found), f'{others}candidate')}, newest first"
    console.print(title, soft_wrap=True)
    rows = plain_table("checkpoint", "step", "size", "verdict")
    for each in found:
        good = each["complete"] and each.get("fits", True)
        verdict = ("fits" if "fits" in each else "complete") if good else each["reason"].split("\n")[0]
        verdict += f"; step from the {_origin(each)}" if each.get("other_numbers") else ""
        step = "" if each["step"] is None else str(each["step"])
        weight = "" if each["bytes"] is None else size(each["bytes"])
        below = each["path"].removeprefix(f"{looked['path'].rstrip('/')}/")
        name = below if below != each["path"] else Path(below).name
        rows.add_row(printable(name), step, weight, Text(printable(verdict), "" if good else "red"))
    console.print(rows)


def _origin(looked: dict[str, Any]) -> str:
    """Says where the step was read, and which other numbers a setting could take instead."""
    others = ", ".join(looked["other_numbers"])
    more = f", which also holds {others}: select.step would take another" if others else ""
    return printable(f"{looked['step_from']}{more}")


def _print_checkpoint(console: Console, looked: dict[str, Any]) -> None:
    from rich.text import Text

    if not looked["complete"]:
        console.print(harmless(looked["reason"]), style="red", soft_wrap=True)
        return
    step = "" if looked["step"] is None else f", step {looked['step']}"
    files = "" if len(looked["files"]) == 1 else f" in {len(looked['files'])} files"
    tensors = looked["tensors"]
    title = f"{printable(looked['path'])}: {count(len(tensors), 'tensor')}, {size(looked['bytes'])}{files}{step}"
    console.print(title, soft_wrap=True)
    if looked["step_from"]:
        console.print(f"step {looked['step']} is from the {_origin(looked)}", soft_wrap=True)
    if extras := looked["extras"]:
        console.print(printable(f"extras: {', '.join(extras)}"), soft_wrap=True)
    for key, value in looked["metadata"].items():
        console.print(f"  {printable(key)} = {printable(value)}", soft_wrap=True)
    if "fits" in looked:
        verdict = _how_it_fits(looked) if looked["fits"] else printable(looked["reason"])
        console.print(verdict, style="green" if looked["fits"] else "red", soft_wrap=True)
    rows = plain_table("tensor")
    for column in ("dtype", "shape", "bytes"):
        rows.add_column(column, justify="right" if column == "bytes" else "left", no_wrap=True)
    scanned = any("finite" in tensor for tensor in tensors)
    if scanned:
        rows.add_column("finite")
    for tensor in tensors:
        cells = printable(tensor["name"]), tensor["dtype"], str(tensor["shape"]), f"{tensor['bytes']:,}"
        finite = [Text("yes") if tensor["finite"] else Text("NO", "red")] if scanned else []
        rows.add_row(*cells, *finite)
    console.print(rows)


def _how_it_fits(looked: dict[str, Any]) -> str:
    parts = [f"merged into {looked['base']}"] if looked["base"] else []
    if casts := looked["casts"]:
        kinds = sorted({f"{cast['from']} to {cast['to']}" for cast in casts})
        parts.append(f"{count(len(casts), 'tensor')} cast ({', '.join(kinds)})")
    if kept := looked["kept"]:
        parts.append(f"{count(len(kept), 'tensor')} of the policy not in it")
    if left := looked["left_out"]:
        parts.append(f"{len(left):,} of its own left out")
    return printable("; ".join(["fits the policy", *parts]))
