"""The command ``wsync bench``, which measures what this box can do."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .options import MEASURE, JsonOption, option

bench_command = typer.Typer()


@bench_command.command(rich_help_panel=MEASURE, epilog="Example: wsync bench --size 256MiB --tensors 500")
def bench(
    size: Annotated[str, option("--size", "Size of the weights.", shown=True)] = "64MiB",
    tensors: Annotated[int, option("--tensors", "Number of tensors that make up this size.", shown=True, min=1)] = 200,
    readers: Annotated[int, option("--readers", "Number of processes that attach.", shown=True, min=1, max=64)] = 2,
    quick: Annotated[bool, option("--quick", "Run fewer rounds, and read no GiB from the disk.")] = False,
    only: Annotated[
        list[str] | None, option("--only", "A case, or the beginning of case names; may be repeated.")
    ] = None,
    directory: Annotated[
        Path | None,
        option(
            "--dir",
            "Directory on a disk, for checkpoints. (default: the temporary directory)",
            exists=True,
            file_okay=False,
            resolve_path=True,
        ),
    ] = None,
    as_json: JsonOption = False,
    runtime_dir: Annotated[
        Path,
        option("--runtime-dir", "Directory in shared memory, for segments.", shown=True, resolve_path=True),
    ] = Path("/dev/shm"),
) -> None:
    """Measure wsync on this box, and the machine's limits and the usual ways; takes a minute or two.

    Measures in private directories and removes them afterwards. Leave the box
    alone meanwhile. A ratio is wsync's figure divided by the other: for times,
    less is better; for speeds, more is better. Exits with 0 whatever the figures
    are, and with 1 if a case failed.
    """
    # Long because it declares its options; what it does is check them, run the cases and print the rows.
    from ..bench.rows import Settings, parse_size
    from .terminal import unwind_at

    nbytes = parse_size(size)
    if nbytes < 4 * tensors:
        raise UsageError(
            f"--size {size} is too small: each of {tensors} tensors takes four bytes or more. Give {4 * tensors} or "
            "more, or fewer --tensors."
        )
    import tempfile

    while not runtime_dir.is_dir() and runtime_dir.is_relative_to("/dev/shm"):  # where nothing was published yet
        runtime_dir = runtime_dir.parent
    if not runtime_dir.is_dir():
        raise UsageError(f"{runtime_dir} is not a directory. Name an existing one with --runtime-dir.")
    files = directory or Path(tempfile.gettempdir())
    settings = Settings(nbytes, tensors, readers, quick, tuple(only or ()), files, runtime_dir)
    unwind_at(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        from ..bench import cases
        from .output import bench as view

        chosen, about = cases.chosen(settings.only), view.box()
        rows = cases.run(settings, chosen)
    except SystemExit:
        print("wsync: stopped; the figures are thrown away, and nothing is left behind. Run it again.", file=sys.stderr)
        raise
    if as_json:
        print(json.dumps(view.as_json(settings, about, rows), default=str))
    else:
        view.print_rows(settings, about, rows)
    if any(row.failed for row in rows):
        raise typer.Exit(1)
