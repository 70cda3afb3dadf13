"""The settings of a spec and its tables as options.

Each setting is declared once, here and in the dataclass that holds it. A command that takes settings has one parameter,
``settings``: a table of the settings that were given.
"""

from __future__ import annotations

import functools
import inspect
import os
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.models import CommandInfo

from ..errors import UsageError, WsyncError
from ..settings.hook_settings import VARIABLES as OWN_VARIABLES
from ..system.environment import SERVICE

if TYPE_CHECKING:
    from ..settings.spec import Spec

HELP: dict[str, tuple[str, Any, str]] = {
    "name": ("spec", str, "The segment's name. (default: from the spec)"),
    "poll": ("spec", float, "Seconds between two looks when no notification comes. (default: 1; 10 for a URL)"),
    "max_failures": (
        "spec",
        int,
        "How many passes may fail in a row; one more ends the watch with exit code 1. (default: -1, any number)",
    ),
    "slots": ("spec", int, "Number of buffers in a new segment. (default: 3)"),
    "max_slots": ("spec", int, "Most buffers that it may grow to while readers keep older versions. (default: 8)"),
    "keep": ("spec", int, "How many published checkpoints to keep copies of, for a rollback. (default: 0)"),
    "history": (
        "spec",
        int,
        "How many published versions to keep on record; as many other events are kept too. (default: 100000)",
    ),
    "mode": (
        "access",
        str,
        "Mode of the segment's files: 0600 is private, 0640 lets a group read, 0644 lets everybody read. "
        "(default: 0600)",
    ),
    "group": ("access", str, "Name or number of the group that may read; without --mode it means mode 0640."),
    "pattern": ("select", str, "Glob that a checkpoint's name must match. (default: *)"),
    "order": ("select", str, "What makes a checkpoint the newest: mtime, step, name or arrival. (default: mtime)"),
    "marker": ("select", str, "File that the trainer writes last; checkpoints without it are ignored."),
    "settle": ("select", float, "Seconds without a change, if nothing else shows that files are whole. (default: 1)"),
    "within": ("select", str, "Directory in each checkpoint that holds the weights, such as pretrained_model."),
    "file": ("select", str, "File in each checkpoint that holds the weights, such as model_1.safetensors."),
    "pointer": ("select", str, "File in the directory that names the one checkpoint to take, such as latest."),
    "step": ("select", str, "/REGEX/ with a group that finds the step in a checkpoint's name."),
    "digest": ("select", str, "sha256: compare each file with the digest that the trainer leaves beside it."),
    "extras_files": ("extras", list[str], "File or glob beside the weights that travels with them; may be repeated."),
    "extras_max_bytes": ("extras", int, "Most bytes of all these files together. (default: 16777216)"),
    "prefix": ("weights", str, "Take only tensors whose names begin with this, and drop it from their names."),
    "rename": ("weights", list[str], "OLD=NEW, or /REGEX/=NEW; may be repeated."),
    "include": ("weights", list[str], "Glob of tensor names to take; may be repeated."),
    "exclude": ("weights", list[str], "Glob of tensor names to leave out; may be repeated."),
    "own": ("weights", list[str], "Glob of tensors that the policy keeps for itself; may be repeated."),
    "cast": ("weights", bool, "Convert floats to the policy's dtypes."),
    "strict": ("weights", bool, "Require every tensor of the policy, and refuse any other. (default: strict)"),
    "base": ("weights", str, "Checkpoint that a PEFT adapter is merged into."),
    "finite": ("weights", bool, "Refuse NaN and infinity. (default: finite)"),
    "finite_except": ("weights", list[str], "Glob of tensors that may hold infinities; may be repeated."),
    "missing": ("weights", str, "policy: a missing tensor gets the value that it has when the policy is built."),
    "extra_state": (
        "weights",
        str,
        "ignore: accept a policy with state that versions do not change. (default: refuse)",
    ),
    "gate": ("hooks", str, "package.module:function, or a shell command, that must accept the staged weights."),
    "gate_timeout": ("hooks", float, "Seconds the gate may take; after that the checkpoint is rejected. (default: 60)"),
    "exec": ("hooks", str, "Shell command to run after a publish."),
    "exec_timeout": ("hooks", float, "Seconds the command may take. (default: 30)"),
    "exec_backoff": ("hooks", float, "Seconds before the command is tried again. (default: 3)"),
    "webhook": ("hooks", str, "http or https URL to call after a publish."),
    "webhook_method": ("hooks", str, "HTTP method of the call. (default: POST)"),
    "webhook_timeout": ("hooks", float, "Seconds the call may take. (default: 1)"),
    "webhook_backoff": ("hooks", float, "Seconds before the call is tried again. (default: 3)"),
    "webhook_success_status": ("hooks", int, "Status that counts as success; 0 accepts any. (default: 200)"),
    "metrics_port": ("metrics", int, "Port for /metrics and /healthz; 0 takes any free port. (default: no port)"),
    "metrics_address": ("metrics", str, "Address on which that port listens. (default: 127.0.0.1)"),
    "metrics_file": ("metrics", str, "A .prom file to write for the node exporter."),
    "max_staleness": (
        "metrics",
        float,
        "Seconds after which /healthz answers 503, counted from the last look that found the newest checkpoint live or "
        "put it live; a trainer that has finished makes nothing stale. (default: never)",
    ),
}
_ONLY_WATCH = {
    "poll",
    "max_failures",
    "metrics_port",
    "metrics_address",
    "max_staleness",
}  # and config, which shows what a watch has

_PANELS = {
    "spec": None,
    "access": "Who else may read the segment",
    "select": "Which checkpoint (the TOML's table select)",
    "extras": "What travels with the weights (the TOML's table extras)",
    "weights": "Which tensors (the TOML's table weights)",
    "hooks": "Before and after a publish (the TOML's table hooks)",
    "metrics": "Figures for monitoring (the TOML's table metrics)",
}


_OTHERS = """
RUNTIME_DIR STATE_DIR JSON FORCE DRY_RUN RETRY LOG_FORMAT SPEC SCAN NUMBER SINCE FOLLOW PLOT TO WATCH MAX_STALENESS
WAIT SIZE TENSORS READERS QUICK ONLY DIR TAKE_OVER QUIET MAX_LAG MAX_LAG_SECONDS INIT
"""
VARIABLES = {*OWN_VARIABLES, *(f"WSYNC_{name.upper()}" for name in (*HELP, *_OTHERS.split()))}
"""Every variable that a command reads, and those that wsync sets itself."""

KEEP_IN_STEP, LOOK, GO_BACK, MEASURE = "Keep in step", "Look", "Go back", "Measure"
"""The panels of ``wsync --help``."""

_VALUES = {
    "order": ["mtime", "step", "name", "arrival"],
    "digest": ["sha256"],
    "missing": ["policy"],
    "extra_state": ["refuse", "ignore"],
}


def names(incomplete: str) -> list[str]:
    """The names of existing segments that begin with this text, for shell completion."""
    from ..segment.segment import segments

    try:
        return [name for name in segments(os.environ.get("WSYNC_RUNTIME_DIR")) if name.startswith(incomplete)]
    except (WsyncError, OSError):  # an error message would break the shell's prompt
        return []


def specs(incomplete: str) -> list[str]:
    """The TOML files and directories whose paths begin with this text, for shell completion."""
    place, _, name = incomplete.rpartition("/")
    try:
        with os.scandir(place or ("/" if incomplete.startswith("/") else ".")) as entries:
            found = [entry for entry in entries if entry.is_dir() or entry.name.endswith(".toml")]
    except OSError:
        return []
    before = f"{place}/" if "/" in incomplete else ""
    shown = [f"{before}{each.name}{'/' * each.is_dir()}" for each in found if each.name.startswith(name)]
    return sorted(each for each in shown if name.startswith(".") or not each.removeprefix(before).startswith("."))


def targets(incomplete: str) -> list[str]:
    """Names and specs that begin with this text, for a segment that may be named by its spec."""
    return names(incomplete) + specs(incomplete)


def versions(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The versions on record of the segment that the command line names, newest first."""
    from ..history.state import State

    # While --to lacks its value, the parser stops before it assigns the arguments, and leaves them in the context.
    name = context.params.get("name") or next(iter(context.args), "")
    try:
        with State(name, context.params.get("state_dir")) as state:
            events = state.events(kinds=("publish", "rollback"), limit=50)
    except (WsyncError, OSError):
        return []
    found = {str(e.version): f"step {e.step}, {os.path.basename(e.checkpoint or 'memory')}" for e in reversed(events)}
    return [(version, text) for version, text in found.items() if version.startswith(incomplete)]


def option(flag: str, text: str, *short: str, shown: bool = False, **more: Any) -> Any:
    """Declares an option and its environment variable, which is ``WSYNC_`` and the option's name.

    Args:
        flag: the option, such as ``--dry-run`` or ``--cast/--no-cast``.
        short: other names, such as ``-n``.
        shown: whether the help shows its default.
        more: further arguments of ``typer.Option``.
    """
    variable = f"WSYNC_{flag.split('/')[0].lstrip('-').replace('-', '_').upper()}"
    return typer.Option(flag, *short, envvar=variable, help=text, show_default=shown, **more)


def argument(metavar: str, text: str, **more: Any) -> Any:
    return typer.Argument(metavar=metavar, help=text, show_default=False, **more)


SpecArgument = Annotated[
    str, argument("SPEC", "package.module:attr of the policy, or a TOML file.", autocompletion=specs)
]
NameArgument = Annotated[str, argument("NAME", "A segment.", autocompletion=names)]
LogFormatOption = Annotated[
    str | None,
    option("--log-format", "(default: rich on a terminal, plain elsewhere)", metavar="rich|plain|json"),
]
RuntimeOption = Annotated[Path | None, option("--runtime-dir", "Where segments live. (default: /dev/shm/wsync-<uid>)")]
StateOption = Annotated[
    Path | None,
    option(
        "--state-dir",
        "Where history and pins are kept. (default: $XDG_STATE_HOME/wsync; /var/lib/wsync for root)",
        readable=False,  # otherwise typer ends the command if it may not read this directory; wsync only reports it
    ),
]
TakeOverOption = Annotated[
    bool, option("--take-over", "Replace what another spec, or this spec with another directory, published.")
]
JsonOption = Annotated[bool, option("--json", "Print one JSON object.")]


def with_settings(command: CommandInfo) -> CommandInfo:
    """Gives a command whose function has a parameter ``settings`` one option for each setting.

    This takes a millisecond per command, so it is done only for the commands that a command line has.
    """
    function = command.callback
    if function is None or "settings" not in function.__annotations__:
        return command
    if function.__name__ == "inspect":
        taken = {name: about for name, about in HELP.items() if about[0] in ("select", "extras")}
    else:
        is_full = function.__name__ in ("watch", "config")
        taken = {name: about for name, about in HELP.items() if is_full or name not in _ONLY_WATCH}

    @functools.wraps(function)
    def wrapped(**given: Any) -> None:
        settings: dict[str, dict[str, Any]] = {table: {} for table in _PANELS}
        for name, (table, _, _) in taken.items():
            value = given.pop(name)
            if value not in (None, []):
                settings[table][name.removeprefix(f"{table}_")] = _value(name, value)
        function(**given, settings=settings)

    signature = inspect.signature(function, eval_str=True)
    own = [p for name, p in signature.parameters.items() if name != "settings"]
    parameters = [*own, *(_parameter(name, *about) for name, about in taken.items())]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    command = copy(command)
    command.callback = wrapped
    return command


def read_spec(text: str, settings: dict[str, dict[str, Any]], checkpoints: str | None = None) -> Spec:
    """Loads the spec and replaces the settings that options give."""
    from dataclasses import replace

    from ..settings.spec import load_spec

    tables = dict(settings)
    own = dict(tables.pop("spec"))
    spec = load_spec(text, name=own.pop("name", None), checkpoints=checkpoints)
    if extras := tables.pop("extras"):
        tables["select"] = {**tables["select"], "extras": replace(spec.extras, **extras)}
    return replace(spec, **own, **{table: replace(getattr(spec, table), **given) for table, given in tables.items()})


def _parameter(name: str, table: str, kind: Any, text: str) -> inspect.Parameter:
    words = name.replace("_", "-")
    flag = f"--{words}/--no-{words}" if kind is bool else f"--{words}"
    values = (lambda: _VALUES[name]) if name in _VALUES else None
    declared = option(flag, text, rich_help_panel=_PANELS[table], autocompletion=values)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, declared]
    )


def _value(name: str, value: Any) -> Any:
    if name != "rename":
        return tuple(value) if isinstance(value, list) else value
    table = {}
    for pair in value:
        old, equals, new = pair.rpartition("=")
        if not equals or not old:
            raise UsageError(f"--rename {pair!r} is not OLD=NEW. Write the old name, =, and the new name.")
        table[old] = new
    return table


def check_format(log_format: str | None) -> None:
    if log_format not in (None, "rich", "plain", "json"):
        raise UsageError(f"--log-format {log_format!r} is unknown. Use rich, plain or json.")


def check_variables() -> None:
    """Refuses a ``WSYNC_`` variable that nothing reads: a misspelt one would otherwise be ignored silently.

    Removes the variables of a Kubernetes service from the environment, because one of them may happen to have the name
    of a setting (``WSYNC_METRICS_PORT``, of a service ``wsync-metrics``).

    Raises:
        UsageError: there is such a variable; the message names the most similar known one.
    """
    for name in [name for name, value in os.environ.items() if SERVICE.match(f"{name}={value}")]:
        del os.environ[name]
    unknown = sorted(name for name in os.environ if name.startswith("WSYNC_") and name not in VARIABLES)
    if unknown:
        import difflib

        near = difflib.get_close_matches(unknown[0], VARIABLES, 1)
        advice = f"Did you mean {near[0]}?" if near else "Unset it; `wsync config SPEC` lists the settings."
        raise UsageError(f"wsync does not know the variable {unknown[0]}. {advice}")
