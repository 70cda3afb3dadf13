"""The command ``wsync bench``: what this box can do."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .options import JsonOption

bench_command = typer.Typer()
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _end(number: int, _: object) -> None:
    """Unwinds the measurement, which removes all that it made; further signals do not disturb that."""
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


@bench_command.command(epilog="Example: wsync bench --size 256MiB --tensors 500")
def bench(
    size: Annotated[str, typer.Option("--size", envvar="WSYNC_SIZE", help="Of the weights.")] = "64MiB",
    tensors: Annotated[
        int, typer.Option("--tensors", envvar="WSYNC_TENSORS", min=1, help="Number of tensors that share them.")
    ] = 200,
    readers: Annotated[
        int, typer.Option("--readers", envvar="WSYNC_READERS", min=1, max=64, help="Processes that attach.")
    ] = 2,
    quick: Annotated[bool, typer.Option("--quick", envvar="WSYNC_QUICK", help="Fewer rounds, no GiB.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", envvar="WSYNC_ONLY", help="A case, or how names begin; may be given again."),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            envvar="WSYNC_DIR",
            help="Where checkpoints are written: a disk. (default: the temporary directory)",
            show_default=False,
            exists=True,
            file_okay=False,
            resolve_path=True,
        ),
    ] = None,
    as_json: JsonOption = False,
    runtime_dir: Annotated[
        Path | None,
        typer.Option(
            "--runtime-dir",
            envvar="WSYNC_RUNTIME_DIR",
            help="Where segments are made meanwhile: shared memory. (default: /dev/shm)",
            show_default=False,
            resolve_path=True,
        ),
    ] = None,
) -> None:
    """What this box can do, beside the machine's limit and the usual ways; takes a minute or two.

    Everything is measured in private directories, which are removed. Leave the box alone meanwhile. Ratios are wsync by
    the other: of times less is better, of speeds more. Exits with 0 whatever the figures are, with 1 where a case
    failed.
    """
    from ..bench.rows import SHARED_MEMORY, Settings, parse_size

    nbytes, runtime = parse_size(size), runtime_dir or SHARED_MEMORY
    if nbytes < 4 * tensors:
        raise UsageError(
            f"--size {size}: each tensor takes four bytes or more. Give {4 * tensors}, or fewer --tensors."
        )
    while not runtime.is_dir() and runtime.is_relative_to(SHARED_MEMORY):  # where nothing was published yet
        runtime = runtime.parent
    if not runtime.is_dir():
        raise UsageError(f"{runtime} is not a directory. Name an existing one with --runtime-dir.")
    import tempfile

    temporary = directory or Path(tempfile.gettempdir())
    settings = Settings(nbytes, tensors, readers, quick, tuple(only or ()), temporary, runtime)
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup(1)
            signal.signal(number, _end)
    try:
        from ..bench import cases
        from . import bench_view as view

        names, about = cases.chosen(settings.only), view.box()
        say = (lambda name: print(f"measuring: {name}", file=sys.stderr)) if sys.stderr.isatty() else (lambda _: None)
        rows = cases.run(settings, names, say)
    except KeyboardInterrupt:
        print("wsync: stopped; what was measured is thrown away, and nothing is left behind.", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(view.as_json(settings, about, rows)))
    else:
        view.print_rows(settings, about, rows)
    if any(row.failed for row in rows):
        raise typer.Exit(1)
