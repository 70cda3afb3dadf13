"""The commands about what was published: log, rollback, promote, pin, unpin, config."""

from __future__ import annotations

import itertools
import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SegmentError, UsageError, printable
from ..text import when
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
    names,
    option,
    read_spec,
    targets,
    versions,
)

if TYPE_CHECKING:
    from ..history.state import Event, State

history = typer.Typer()
_DRAWN = 5000  # events that ``--plot`` draws, if --number is not more
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_LOOK = 0.5  # seconds between two looks of ``--follow``


@history.command(rich_help_panel=LOOK, epilog="Example: wsync log cartpole -n 20 --since 2h")
def log(
    name: NameArgument,
    number: Annotated[
        int, option("--number", "How many of the last events to show.", "-n", shown=True, min=1, max=1_000_000)
    ] = 20,
    since: Annotated[
        str | None, option("--since", "Show events since 30m, 2h or 3d ago, or since a time such as 2026-05-01T12:00.")
    ] = None,
    follow: Annotated[bool, option("--follow", "Also show new events as they come, until stopped.", "-f")] = False,
    plot: Annotated[bool, option("--plot", "Draw steps, versions and rejections over time.")] = False,
    as_json: JsonOption = False,
    state_dir: StateOption = None,
) -> None:
    """Show what was published, rejected, rolled back and pinned, and when; the newest comes last."""
    from ..history.state import State

    if plot and (as_json or follow):
        raise UsageError("--plot draws one picture, and takes no --json or --follow. Leave these out, or --plot.")
    with State(name, state_dir) as state, suppress(KeyboardInterrupt) if follow else nullcontext():
        start = moment(since) if since else 0.0
        if plot:
            from .output.log import print_plot

            print_plot(name, state.events(since=start, limit=max(number, _DRAWN)), time.time())
            return
        last = state.events(limit=1)  # ``--follow`` begins after it, even if --since leaves it out
        events = state.events(since=start, limit=number)
        coming = follow_events(state, (events or last)[-1].id if last else 0) if follow else ()
        if as_json and not follow:
            print(json.dumps({"name": name, "events": [event_json(event) for event in events]}))
        elif as_json:
            for event in itertools.chain(events, coming):
                print(json.dumps(event_json(event)), flush=True)
        else:
            from .output.log import print_log

            print_log(name, events, coming)


@history.command(rich_help_panel=GO_BACK, epilog="Example: wsync rollback cartpole --to 41")
def rollback(
    name: NameArgument,
    to: Annotated[
        int | None,
        option("--to", "The version to go back to. (default: the one before)", min=1, autocompletion=versions),
    ] = None,
    as_json: JsonOption = False,
    runtime_dir: RuntimeOption = None,
    state_dir: StateOption = None,
) -> None:
    """Put an earlier version live again, as a new version, and pin it until `wsync unpin`.

    Its weights were accepted before, so no gate is asked, and no hook runs.
    """
    from ..history.rollback import rollback as go_back
    from ..history.state import State

    with State(name, state_dir) as state:
        live, pin, was = go_back(name, to, runtime=runtime_dir, state=state)
    file = printable(Path(live.checkpoint).name) if live.checkpoint else "weights from memory"
    if as_json:
        data = {"status": "published", "name": name, "version": live.version, "step": live.step}
        print(json.dumps(data | {"checkpoint": live.checkpoint, "from": was, "pin": pin.name}))
    else:
        step = "" if live.step is None else f", step {live.step}"
        print(f"{name}: version {live.version} is version {was} again{step}, {file}; pinned until `wsync unpin {name}`")


@history.command(rich_help_panel=KEEP_IN_STEP, epilog="Example: wsync promote cartpole-canary cartpole.toml")
def promote(
    source: Annotated[str, argument("SOURCE", "The segment whose live version is published.", autocompletion=names)],
    target: Annotated[
        str,
        argument(
            "TARGET",
            "The segment that takes it, or its policy's TOML or package.module:attr.",
            autocompletion=targets,
        ),
    ],
    take_over: TakeOverOption = False,
    as_json: JsonOption = False,
    runtime_dir: RuntimeOption = None,
    state_dir: StateOption = None,
) -> None:
    """Publish what is live in one segment into another, with its step and checkpoint.

    The gate and the hooks are those of TARGET's TOML. If you name a segment, that
    is the TOML that published its live version; a segment that was published from
    memory, or by package.module:attr, has none. To make a segment that does not
    exist yet, name its TOML. A pin of TARGET holds.

    Exit codes: 0 published, or already current; 1 failed, or the layouts differ;
    2 usage; 65 the gate, or the check of the values, rejects it; 66 nothing is
    live in SOURCE; 75 try later: TARGET is busy or pinned, or the gate asks for it.
    """
    from ..sync.outcome import Outcome
    from ..sync.promoting import promote as publish
    from .output.push import tell
    from .terminal import unwind_at

    unwind_at(signal.SIGTERM, signal.SIGHUP)  # so that a gate or hook ends with this process
    try:
        outcome = publish(source, target, take_over=take_over, runtime=runtime_dir, state_dir=state_dir)
    except SegmentError as exc:
        outcome = Outcome("failed", target, reason=str(exc))
    tell(outcome, as_json=as_json)
    raise typer.Exit(outcome.exit_code)


@history.command(rich_help_panel=GO_BACK, epilog="Example: wsync pin cartpole checkpoints/step_500.safetensors")
def pin(
    name: NameArgument,
    checkpoint: Annotated[
        str | None, argument("[CHECKPOINT]", "A file or a URL. (default: the live checkpoint)")
    ] = None,
    runtime_dir: RuntimeOption = None,
    state_dir: StateOption = None,
) -> None:
    """Keep one checkpoint live, whatever arrives; a running watch and cron obey from their next pass on.

    You chose this checkpoint yourself: its values are checked, but no gate is
    asked.
    """
    from ..history.rollback import pin_checkpoint
    from ..history.state import State

    with State(name, state_dir) as state:
        pinned, live = pin_checkpoint(name, checkpoint, runtime=runtime_dir, state=state)
    soon = "" if live else "; the next pass of a watch or push puts it live"
    print(f"{name}: {printable(pinned.name)} is pinned until `wsync unpin {name}`{soon}")


@history.command(rich_help_panel=GO_BACK, epilog="Example: wsync unpin cartpole")
def unpin(name: NameArgument, state_dir: StateOption = None) -> None:
    """Remove the pin: the next pass goes on with the newest checkpoint."""
    from ..history.rollback import unpin as let_go
    from ..history.state import State

    with State(name, state_dir) as state:
        before = let_go(state)
    print(f"{name}: {printable(before.name)} is no longer pinned" if before else f"{name}: nothing is pinned")


@history.command(rich_help_panel=LOOK, epilog="Example: wsync config cartpole.toml")
def config(
    context: typer.Context,
    spec: SpecArgument,
    *,
    log_format: LogFormatOption = None,
    init: Annotated[bool, option("--init", "Write SPEC as a new TOML with every setting and its default.")] = False,
    as_json: JsonOption = False,
    runtime_dir: RuntimeOption = None,
    state_dir: StateOption = None,
    settings: dict[str, dict[str, Any]],
) -> None:
    """Show every setting and where it comes from: option, variable, TOML or default."""
    from ..history.state import state_dir as state_directory
    from ..system.memory import runtime_dir as runtime_directory
    from .output.config import origins, print_config, write_spec
    from .output.watch import default_format

    if init:
        if made := write_spec(spec):
            print(f"{made}: written; now name your policy in it")
        return
    check_format(log_format)
    loaded = read_spec(spec, settings)
    words = {"COMMANDLINE": "option", "ENVIRONMENT": "variable"}
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name: words.get(source.name) if source else None for name, source in sources.items()}
    others = {
        "runtime_dir": runtime_directory(runtime_dir),
        "state_dir": state_directory(state_dir),
        "log_format": log_format or default_format(),
    }
    rows = origins(loaded, spec, given, others)
    if as_json:
        print(json.dumps({name: {"value": value, "origin": origin} for name, value, origin in rows}, default=str))
    else:
        print_config(rows)


def event_json(event: Event) -> dict[str, Any]:
    """An event as a JSON object; fields that do not apply are None."""
    data = {name: value for name, value in asdict(event).items() if name not in ("id", "settings", "changed_ns")}
    return {**data, "at": when(event.at), "version": event.version_then, "identity": event.identity or None}


def moment(text: str) -> float:
    """Parses ``2h`` (ago), or a date and time, which is local if it names no zone; returns seconds since the epoch.

    Raises:
        UsageError: it is neither.
    """
    ago = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if ago:
        return time.time() - float(ago[1]) * _UNITS[ago[2]]
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except (ValueError, OverflowError) as exc:
        raise UsageError(f"--since {text!r} is not a time. Write 30m, 2h, 3d, or 2026-05-01T12:00.") from exc


def follow_events(state: State, after: int) -> Iterator[Event]:
    """Yields the events after one as they come, for ever; if the history was begun anew, all of its events."""
    while True:
        last = state.events(limit=1)
        if not last or last[-1].id < after:
            after = 0
        for event in state.events(after=after):
            after = event.id
            yield event
        time.sleep(_LOOK)
