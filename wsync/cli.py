"""The command line: parse, one library call, show, exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .errors import UsageError, WsyncError
from .options import with_settings

if TYPE_CHECKING:
    from .spec import Spec

app = typer.Typer(
    name="wsync",
    help="Keeps the weights of a running policy in step with the newest checkpoint on disk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SpecArgument = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="package.module:attr of the policy, or a TOML file.",
        show_default=False,
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option(
        "--name",
        envvar="WSYNC_NAME",
        help="The segment's name. (default: from the spec)",
        show_default=False,
    ),
]
RuntimeOption = Annotated[
    Path | None,
    typer.Option(
        "--runtime-dir",
        envvar="WSYNC_RUNTIME_DIR",
        help="Where segments live. (default: /dev/shm/wsync-<uid>)",
        show_default=False,
    ),
]
SlotsOption = Annotated[
    int | None,
    typer.Option(
        "--slots",
        envvar="WSYNC_SLOTS",
        help="Buffers of a segment that is made. (default: 3)",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", envvar="WSYNC_JSON", help="Print one JSON object.")]


@app.command(epilog="Example: wsync push cartpole.toml checkpoints/")
@with_settings
def push(
    *,
    spec: SpecArgument,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CHECKPOINT]",
            help="A file, or a directory: its newest one. (default: from the spec)",
            show_default=False,
        ),
    ] = None,
    name: NameOption = None,
    force: Annotated[bool, typer.Option("--force", envvar="WSYNC_FORCE", help="Publish again what is live.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", envvar="WSYNC_DRY_RUN", help="Check everything, publish nothing."),
    ] = False,
    slots: SlotsOption = None,
    as_json: JsonOption = False,
    runtime_dir: RuntimeOption = None,
    settings: dict[str, dict[str, Any]],
) -> None:
    """One pass: put the newest complete checkpoint, or the one named, into shared memory.

    Exit codes: 0 published, or already current; 1 failed; 2 usage; 65 the checkpoint is rejected; 66 there is no
    complete checkpoint yet; 75 try later.
    """
    from .console import complain, differences_text, outcome_json, outcome_line
    from .syncer import Syncer

    loaded = _spec(spec, name, settings, slots=slots)
    try:
        with Syncer(loaded, checkpoint, runtime=runtime_dir) as syncer:
            outcome = syncer.once(force=force, dry_run=dry_run)
    except WsyncError as exc:
        if as_json and not isinstance(exc, UsageError):
            _print_json({"status": "failed", "name": loaded.name, "reason": str(exc)})
        complain(exc)
        raise typer.Exit(exc.exit_code) from exc
    for refused in outcome.passed_over:
        print(outcome_line(refused), differences_text(refused.differences), sep="\n", file=sys.stderr)
    if as_json:
        _print_json(outcome_json(outcome))
    else:
        print(outcome_line(outcome), file=sys.stderr if outcome.exit_code else sys.stdout)
        if outcome.differences:
            print(differences_text(outcome.differences), file=sys.stderr)
    raise typer.Exit(outcome.exit_code)


@app.command(epilog="Example: wsync watch cartpole.toml checkpoints/")
@with_settings
def watch(
    *,
    spec: SpecArgument,
    checkpoints: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CHECKPOINTS]",
            help="Where checkpoints appear; may not be there yet. (default: from the spec)",
            show_default=False,
        ),
    ] = None,
    name: NameOption = None,
    poll: Annotated[
        float | None,
        typer.Option(
            "--poll",
            envvar="WSYNC_POLL",
            help="Seconds between looks that nothing asked for. (default: 1)",
            show_default=False,
        ),
    ] = None,
    slots: SlotsOption = None,
    log_format: Annotated[
        str | None,
        typer.Option(
            "--log-format",
            envvar="WSYNC_LOG_FORMAT",
            metavar="rich|plain|json",
            help="(default: rich on a terminal, plain elsewhere)",
            show_default=False,
        ),
    ] = None,
    runtime_dir: RuntimeOption = None,
    settings: dict[str, dict[str, Any]],
) -> None:
    """Keep a policy's weights in step until stopped: publish each new checkpoint, log each version."""
    from .console import WatchLog, default_format
    from .syncer import Syncer

    if log_format not in (None, "rich", "plain", "json"):
        raise UsageError(f"--log-format {log_format!r} is none of rich, plain and json. Use one of them.")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    loaded = _spec(spec, name, settings, slots=slots, poll=poll)
    with Syncer(loaded, checkpoints, runtime=runtime_dir) as syncer:
        form: Any = log_format or default_format()
        with WatchLog(loaded.name, syncer.getter.checkpoints, form, lambda: syncer.segment) as log:
            syncer.progress = log.progress
            syncer.run(stop, log.tell)


@app.command(epilog="Example: wsync status cartpole --json")
def status(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A segment. (default: all)", show_default=False),
    ] = None,
    as_json: JsonOption = False,
    runtime_dir: RuntimeOption = None,
) -> None:
    """What is live where, how old it is, and which version each reader is on."""
    from .console import complain, segment_json
    from .errors import SegmentError
    from .segment import Segment, segments
    from .tables import print_status

    opened, broken = [], 0
    for each in [name] if name else segments(runtime_dir):
        try:
            opened.append(Segment.open(each, runtime_dir))
        except SegmentError as exc:  # one that is unusable, or was just removed, must not hide the others
            if name:
                raise
            complain(exc)
            broken = exc.exit_code
    if not as_json:
        print_status(opened)
    elif name:
        _print_json(segment_json(opened[0]))
    else:
        _print_json({"segments": [segment_json(segment) for segment in opened]})
    raise typer.Exit(broken)


@app.command(epilog="Example: wsync inspect checkpoints/ --spec cartpole.toml")
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A checkpoint, or a directory of them.", show_default=False)
    ],
    spec: Annotated[
        str | None,
        typer.Option("--spec", envvar="WSYNC_SPEC", help="Tell whether it fits this policy.", show_default=False),
    ] = None,
    scan: Annotated[
        bool, typer.Option("--scan", envvar="WSYNC_SCAN", help="Read all: tell what is not finite.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """What is in a checkpoint, whether it is complete and fits; or what a directory holds to choose from."""
    from .inspect import inspect as look
    from .spec import load_spec
    from .tables import print_inspection

    looked = look(path.absolute(), spec=load_spec(spec) if spec else None, scan_values=scan)
    if as_json:
        _print_json(looked)
    else:
        print_inspection(looked)
    bad = looked.get("complete") is False or looked.get("fits") is False
    raise typer.Exit(65 if bad else 0)


@app.command(epilog="Example: wsync rm cartpole")
def rm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A segment.", show_default=False)],
    runtime_dir: RuntimeOption = None,
) -> None:
    """Remove a segment; policies that are attached keep the weights they have."""
    from .segment import remove

    remove(name, runtime_dir)
    print(f"{name}: removed")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"wsync {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _spec(text: str, name: str | None, settings: dict[str, dict[str, Any]], **given: object) -> Spec:
    """The spec with what the options say instead."""
    from dataclasses import replace

    from .spec import load_spec

    spec = load_spec(text, name=name)
    tables = {table: replace(getattr(spec, table), **changed) for table, changed in settings.items() if changed}
    return replace(spec, **tables, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data))


def main() -> None:
    """Runs the command line; an error of ours is one message and an exit code, never a traceback.

    Ends without tearing the interpreter down, which would take a sixth of the time of a push with nothing to do; all
    that we hold is closed by then, or ours only through the kernel.
    """
    if sys.platform != "linux":
        print(
            f"wsync: this is {sys.platform}, and wsync needs Linux (flock, futex, tmpfs). Run it on the Linux box that "
            "runs the policy.",
            file=sys.stderr,
        )
        sys.exit(2)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # starting its threads takes longer than our use of it
    code: object = 0
    try:
        app()
    except WsyncError as exc:
        print(f"wsync: {exc}", file=sys.stderr)
        code = exc.exit_code
    except SystemExit as exc:
        code = exc.code
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = code or 1
    os._exit(code if isinstance(code, int) else int(code is not None))
