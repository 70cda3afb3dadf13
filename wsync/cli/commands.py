"""The command line, and the commands push, watch, status, inspect and rm."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
from contextlib import ExitStack, closing, nullcontext
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..errors import UsageError, WsyncError, harmless, on_one_line, printable, remedy
from .options import (
    GO_BACK,
    KEEP_IN_STEP,
    LOOK,
    JsonOption,
    LogFormatOption,
    NameArgument,
    RuntimeOption,
    SpecArgument,
    StateOption,
    TakeOverOption,
    argument,
    check_format,
    check_variables,
    names,
    option,
    read_spec,
    with_settings,
)

if TYPE_CHECKING:
    from ..segment.segment import Segment
    from ..sync.outcome import Outcome
    from ..sync.syncer import Syncer

app = typer.Typer(
    name="wsync",
    help="Keeps the weights of a running policy in step with the newest checkpoint on disk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(rich_help_panel=KEEP_IN_STEP, epilog="Example: wsync push cartpole.toml checkpoints/")
def push(
    *,
    spec: SpecArgument,
    checkpoint: Annotated[
        str | None,
        argument("[CHECKPOINT]", "A file, a directory (its newest is taken), or a URL. (default: from the spec)"),
    ] = None,
    force: Annotated[bool, option("--force", "Publish the checkpoint again even if it is live.")] = False,
    dry_run: Annotated[bool, option("--dry-run", "Check everything except the gate; publish nothing.")] = False,
    retry: Annotated[bool, option("--retry", "Try rejected checkpoints again.")] = False,
    take_over: TakeOverOption = False,
    wait: Annotated[
        float | None,
        option("--wait", "Wait up to this many seconds until all readers have it; exit with 75 if some do not."),
    ] = None,
    quiet: Annotated[bool, option("--quiet", "For cron: report each problem once, and nothing else.", "-q")] = False,
    as_json: JsonOption = False,
    runtime_dir: RuntimeOption = None,
    state_dir: StateOption = None,
    settings: dict[str, dict[str, Any]],
) -> None:
    """Run one pass: put the newest complete checkpoint, or the one you name, into shared memory.

    Exit codes: 0 published, or already current; 1 failed; 2 usage; 65 the
    checkpoint is rejected; 66 there is no complete checkpoint yet; 75 try later.
    A rejection is reported once, with 65. Later pushes print a note and exit with
    0, because the live version stays live; if nothing is live, they exit with 65.
    """
    # Long, but a third of it declares options; the rest is one sequence that shares what it has opened.
    from ..history.state import State
    from ..sync.outcome import Outcome
    from ..sync.syncer import Syncer
    from .output.push import tell
    from .terminal import complain, unwind_at

    if wait is not None and math.isnan(wait):
        raise UsageError("--wait nan is not a number of seconds. Give one.")
    news = None
    if quiet and not dry_run:
        from .output.push_quiet import News

        news = News(spec, state_dir)
    try:
        loaded = read_spec(spec, settings)
    except WsyncError as exc:
        if news and not news.has(exc):
            raise typer.Exit(exc.exit_code) from None
        raise
    unwind_at(signal.SIGTERM, signal.SIGHUP)  # so that a gate or hook ends with this process
    figures = None
    if loaded.metrics.file and not dry_run:
        from ..service.metrics import RunFigures

        figures = RunFigures(loaded.name, loaded.metrics.file, runtime_dir)

    def report(kind: str, ok: bool, message: str) -> None:
        if not ok:  # a failure of a hook is only a warning, because the weights are live
            print(f"wsync: warning: {message}", file=sys.stderr)  # the message is escaped already
        if figures:
            figures.hook(kind, ok)

    event: Outcome | WsyncError
    late = ""
    try:
        state = State(loaded.name, state_dir, loaded.history)
        with Syncer(loaded, checkpoint, runtime=runtime_dir, state=state, take_over=take_over) as syncer:
            syncer.box.report, syncer.record.complain = report, complain
            if retry:
                syncer.record.forget()
            event = _pass(syncer, force=force, dry_run=dry_run)
            if wait is not None and event.told_before().status in ("published", "current", "pinned"):
                late = _wait(syncer.standing.opened, event.version, wait)
    except WsyncError as exc:
        event = exc
    if figures:
        try:
            figures.write(event)
        except WsyncError as exc:  # the exit code stays the push's
            complain(exc)
    if not isinstance(event, WsyncError):
        event = event.told_before().warned(late)
    if news and not news.has(event):
        raise typer.Exit(75 if late else event.exit_code)
    if isinstance(event, WsyncError):
        if as_json and not isinstance(event, UsageError):
            failed = Outcome("failed", loaded.name, version=_live(loaded.name, runtime_dir), reason=str(event))
            tell(failed, as_json=True)
        raise event
    tell(event, as_json=as_json, quiet=quiet)
    raise typer.Exit(75 if late else event.exit_code)


@app.command(rich_help_panel=KEEP_IN_STEP, epilog="Example: wsync watch cartpole.toml checkpoints/")
def watch(
    *,
    spec: SpecArgument,
    checkpoints: Annotated[
        str | None,
        argument(
            "[CHECKPOINTS]",
            "Directory or URL where checkpoints appear; it need not exist yet. (default: from the spec)",
        ),
    ] = None,
    take_over: TakeOverOption = False,
    log_format: LogFormatOption = None,
    runtime_dir: RuntimeOption = None,
    state_dir: StateOption = None,
    settings: dict[str, dict[str, Any]],
) -> None:
    """Keep a policy's weights in step until stopped: publish each new checkpoint, log each version.

    Exit codes: 0 stopped by a signal; 1 more passes failed in a row than --max-
    failures; 2 usage.

    SIGHUP makes it read the TOML again. Under systemd, use Type=notify: the unit
    is ready when the first version is live. If torchrun starts one watch on each
    box, they form a group: one reads, and all boxes go live together.
    """
    from ..service.service import Service
    from .output.watch import WatchLog, default_format

    check_format(log_format)
    toml = spec if os.path.isfile(spec) else None
    load = lambda: read_spec(spec, settings, checkpoints)  # noqa: E731
    service = Service(load, toml, checkpoints, runtime_dir, state_dir, take_over=take_over)
    loaded, place = service.spec, service.syncer.getter.checkpoints
    form: Any = log_format or default_format()
    log = WatchLog(loaded.name, place, form, lambda: service.syncer.standing.opened, service.notifier.status)
    with ExitStack() as stack:
        monitor = None
        if loaded.metrics.file or loaded.metrics.port is not None:
            from ..service.metrics_endpoint import Monitor

            complain = lambda exc: log.note("error", "metrics", str(exc))  # noqa: E731
            monitor = stack.enter_context(closing(Monitor(loaded.name, loaded.metrics, runtime_dir, complain)))
        stack.enter_context(log)
        if monitor and monitor.endpoint:
            log.note("info", "metrics", f"figures on {monitor.endpoint.url}, health on /healthz")
        stopped = service.run(log, monitor)
    raise typer.Exit(0 if stopped else 1)


@app.command(rich_help_panel=LOOK, epilog="Example: wsync status cartpole --json")
def status(
    name: Annotated[str | None, argument("[NAME]", "A segment. (default: all)", autocompletion=names)] = None,
    watch: Annotated[bool, option("--watch", "Refresh in place until stopped.")] = False,
    max_staleness: Annotated[
        float | None,
        option("--max-staleness", "Print one line for a monitor: how many seconds old a live version may be."),
    ] = None,
    max_lag: Annotated[int | None, option("--max-lag", "Likewise: how many versions a reader may be behind.")] = None,
    max_lag_seconds: Annotated[
        float | None, option("--max-lag-seconds", "Likewise: how many seconds a reader may be behind.")
    ] = None,
    as_json: JsonOption = False,
    runtime_dir: RuntimeOption = None,
    state_dir: StateOption = None,
) -> None:
    """Show what is live, how old it is, what is pinned, and which version each reader is on.

    Exit codes: 0; 1 a segment is unusable. With one of the three bounds, the
    codes of Nagios: 0 all is well; 1 something is beyond its bound; 2 nothing is
    live, or a segment is unusable.
    """
    from .output.status import Bounds, follow, show

    bounds = Bounds(max_staleness, max_lag, max_lag_seconds)
    bounds.check()
    if watch and as_json:
        raise UsageError("--watch draws on a terminal, and --json is for programs. Give one of them.")
    if watch and bounds != Bounds():
        raise UsageError("--watch draws on a terminal, and a bound prints one line for a monitor. Give one of them.")
    if watch:
        follow(name, runtime_dir, state_dir)
    else:
        raise typer.Exit(show(name, runtime_dir, state_dir, bounds, as_json=as_json))


@app.command(rich_help_panel=LOOK, epilog="Example: wsync inspect checkpoints/ --spec cartpole.toml")
def inspect(
    *,
    path: Annotated[str, argument("PATH", "A checkpoint, a directory of checkpoints, or a URL.")],
    spec: Annotated[str | None, option("--spec", "Also show whether it fits this policy.")] = None,
    scan: Annotated[bool, option("--scan", "Read every tensor, and show which ones are not finite.")] = False,
    as_json: JsonOption = False,
    settings: dict[str, dict[str, Any]],
) -> None:
    """Show what a checkpoint holds and whether it is complete and fits; or list a directory's checkpoints."""
    from ..checkpoints.files.extras import ExtraFiles
    from ..discovery.newest import Select
    from .output.inspected import inspect as look
    from .output.inspected import print_inspection

    policy = read_spec(spec, settings) if spec else None
    select = policy.select if policy else Select(**settings["select"], extras=ExtraFiles(**settings["extras"]))
    looked = look(path, spec=policy, settings=select, scan_values=scan)
    if as_json:
        print(json.dumps(looked))
    else:
        print_inspection(looked)
    bad = looked.get("complete") is False or looked.get("fits") is False
    raise typer.Exit((1 if looked["kind"] == "failed" else 65) if bad else 0)


@app.command(rich_help_panel=GO_BACK, epilog="Example: wsync rm cartpole")
def rm(
    name: NameArgument,
    runtime_dir: RuntimeOption = None,
) -> None:
    """Remove a segment; policies that are attached keep the weights they have."""
    from ..segment.writable import remove

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


def _pass(syncer: Syncer, *, force: bool, dry_run: bool) -> Outcome:
    """Makes one pass; shows a progress bar on a terminal while weights come from a store."""
    from ..checkpoints.files.parts import remote
    from ..sync.claim import undone_by
    from .output.push import transfer_bar

    shown = remote(syncer.getter.checkpoints) and sys.stderr.isatty()
    with transfer_bar() if shown else nullcontext() as syncer.box.progress:
        outcome = syncer.once(force=force, dry_run=dry_run)
    return outcome.warned(undone_by(syncer.standing.opened, outcome, syncer.spec.select))


def _wait(segment: Segment | None, version: int, seconds: float) -> str:
    """Waits until all readers have a version; returns a text that names those without it, or an empty one."""
    from ..updaters.reader_progress import behind, wait_for_readers

    late = wait_for_readers(segment, version, seconds) if segment else []
    return behind(late, version) if late else ""


def _live(name: str, runtime: Path | None) -> int:
    """The version that a failed push left live; 0 if that cannot be read either."""
    from ..segment.segment import Segment

    try:
        with closing(Segment.open(name, runtime)) as segment:
            return segment.version
    except (WsyncError, OSError, MemoryError):
        return 0


def command_line(name: str = "") -> typer.Typer:
    """The command line with only the named command if it is in this module, and with all commands otherwise.

    Importing and building the others takes milliseconds, and a push with nothing to do does not need them.
    """
    command_line = copy(app)
    commands = [command for command in app.registered_commands if getattr(command.callback, "__name__", "") == name]
    if not commands:
        from .bench_command import bench_command
        from .history_commands import history

        commands = [each for group in (app, history, bench_command) for each in group.registered_commands]
    command_line.registered_commands = [with_settings(command) for command in commands]
    return command_line


def main() -> None:
    """Runs the command line. An error of wsync becomes one message and an exit code, never a traceback.

    Exits without Python's clean-up, which would take a sixth of the time of a push with nothing to do. By then
    everything is closed, or the kernel releases it with the process.
    """
    if sys.platform != "linux":
        print(
            f"wsync: this system is {sys.platform}, but wsync needs Linux (flock, futex, tmpfs). Run it on the Linux "
            "machine that runs the policy.",
            file=sys.stderr,
        )
        sys.exit(2)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # starting its threads takes longer than their work here
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (a closed stream wants no output)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's odd name must not end a watch
    message = ""
    code: object = 0
    try:
        check_variables()
        command_line(*sys.argv[1:2])(prog_name="wsync")
    except WsyncError as exc:
        message, code = harmless(on_one_line(str(exc), *sys.argv[1:])), exc.exit_code
    except OSError as exc:
        message, code = f"OS error: {printable(str(exc))}. {remedy(exc)}, then run it again.", 1
    except MemoryError:
        message, code = "this process has no memory left. Raise its limit (`ulimit -v`) and try again.", 1
    except SystemExit as exc:
        code = exc.code
    if message:
        print(f"wsync: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = code or 1
    os._exit(code if isinstance(code, int) else int(code is not None))
