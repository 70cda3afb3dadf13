"""Figures of ``wsync bench`` for those who work on wsync: ``python tests/measure/bench.py``.

Staging a GiB, 2,000 tensors of a page each, and a file whose data begins 16 bytes before a page; taking a version of
2,000 tensors. Takes about a minute.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from wsync.bench import cases
from wsync.bench.rows import GIB, MIB, Aim, Row, Settings, compare, timed
from wsync.bench.workspace import Workspace, private_workspace, settle
from wsync.cli.output.bench import box, print_rows

PAGE = 4096


def staging_shifted(workspace: Workspace) -> list[Row]:
    """A file whose data begins 16 bytes before a page, beside one whose data begins elsewhere.

    ``rep movsb``, which read(2) uses, is slow on AMD's cores where the target's address is 8 to 24 bytes beyond the
    source's, modulo 4096.
    """
    file = workspace.save("staging.safetensors", workspace.settings.size, workspace.settings.tensors)
    slow, usual = (cases.Slot(workspace, shifted(file, before)) for before in (16, 1024))
    name, ours, theirs = "staging, data 16 B before a page", timed(slow.stage), timed(usual.stage)
    return [compare(name, ours, "1 KiB", theirs, None, workspace.rounds(20), nbytes=slow.nbytes)]


def shifted(source: Path, before: int) -> Path:
    """Copies a checkpoint, its header padded so that the data begins so many bytes before a page."""
    whole = source.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = whole[8:end] + b" " * ((-end - before) % PAGE)
    target = source.with_name(f"{before}.safetensors")
    target.write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])
    settle(target)
    return target


def main() -> None:
    usual, about, rows = Settings(directory=Path(tempfile.gettempdir())), box(), []
    many = {"loop, p.data = v": Aim("<=", 1.8), "load_file, copy_": Aim(">=", 8.0), "memory copy": None}
    measured: list[tuple[Settings, Callable[[Workspace], list[Row]]]] = [
        (replace(usual, size=GIB), cases.staging),
        (replace(usual, size=2000 * PAGE, tensors=2000), cases.staging),
        (usual, staging_shifted),
        (replace(usual, size=64 * MIB, tensors=2000), cases.refresh),
    ]
    for settings, case in measured:
        with private_workspace(settings) as workspace:
            found = [
                replace(row, name=f"{settings.size / MIB:.0f} MiB in {settings.tensors}: {row.name}")
                for row in case(workspace)
            ]
        rows += [replace(row, aim=many.get(row.beside, row.aim)) if settings.tensors == 2000 else row for row in found]
    print_rows(usual, about, rows)


if __name__ == "__main__":
    main()
