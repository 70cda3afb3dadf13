"""The command ``wsync bench``: what this box can do."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import UsageError
from .options import JsonOption

bench_command = typer.Typer()
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _end(number: int, _: object) -> None:
    """Ends what was started, and then this: the first signal does, and none of the next comes in between."""
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


@bench_command.command(epilog="Example: wsync bench --size 64MiB --plot bench.svg")
def bench(
    size: Annotated[str, typer.Option("--size", envvar="WSYNC_SIZE", help="Of the weights.")] = "64MiB",
    tensors: Annotated[
        int, typer.Option("--tensors", envvar="WSYNC_TENSORS", help="Among which they are divided.")
    ] = 200,
    readers: Annotated[int, typer.Option("--readers", envvar="WSYNC_READERS", help="Processes that attach.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", envvar="WSYNC_QUICK", help="Fewer rounds, no GiB.")] = False,
    growth: Annotated[
        bool, typer.Option("--growth", envvar="WSYNC_GROWTH", help="How a pass grows, in place of the table.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", envvar="WSYNC_ONLY", help="A case, or how names begin; may be given again."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", envvar="WSYNC_BENCH_PLOT", help="Also draw an SVG.", show_default=False)
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            envvar="WSYNC_DIR",
            help="Where checkpoints are written: a disk. (default: the temporary directory)",
            show_default=False,
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
        ),
    ] = None,
) -> None:
    """What this box can do, beside the machine's limit and the usual ways; takes a minute or two.

    Everything is measured in private directories, which are removed, and against nothing that runs. Leave the box alone
    meanwhile. Ratios are wsync by the other: of times less is better, of speeds more. Exits with 0 whatever they are,
    with 1 where a case failed.
    """
    from .bench import Settings, chosen, parse_size, run, uninterrupted
    from .bench_view import as_json as view_json
    from .bench_view import box, headline, print_results

    settings = Settings(parse_size(size), tensors, readers, quick, tuple(only or ()), growth, directory, runtime_dir)
    if plot and (plot.is_dir() or not plot.absolute().parent.is_dir()):
        why = "it is a directory" if plot.is_dir() else "its directory is not there"
        raise UsageError(f"{plot} cannot be written: {why}. Name another file with --plot.")
    about = box()
    say = (lambda title: print(f"measuring: {title}", file=sys.stderr)) if sys.stderr.isatty() else (lambda _: None)
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as of nohup(1)
            signal.signal(number, _end)
    try:
        with uninterrupted():
            wanted = chosen(settings)
        results = list(run(wanted, settings, say))
    except KeyboardInterrupt:
        print("wsync: stopped; what was measured is thrown away, and nothing is left behind.", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(view_json(settings, about, results)))
    else:
        print_results(headline(settings, about), results)
    if plot:
        from .bench_svg import write_svg

        write_svg(plot, headline(settings, about), results)
    if any(result.failed for result in results):
        raise typer.Exit(1)
