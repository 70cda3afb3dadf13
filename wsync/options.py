"""The settings of ``[select]`` and ``[weights]`` as options of the command line, under the same names.

They are declared once, in the dataclasses that hold them; a command that takes them names one parameter, ``settings``,
which comes as a table of those that were given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .errors import UsageError

_HELP: dict[str, tuple[str, Any, str]] = {
    "pattern": ("select", str, "Glob that a checkpoint's name matches. (default: *)"),
    "order": ("select", str, "Which is newest: mtime, step or name. (default: mtime)"),
    "marker": ("select", str, "A file that the trainer leaves last; without it a checkpoint is none."),
    "settle": ("select", float, "Seconds to stand still where nothing else tells that it is whole. (default: 1)"),
    "prefix": ("weights", str, "Take only tensors whose names begin so, and drop it."),
    "rename": ("weights", list[str], "OLD=NEW, or /REGEX/=NEW; may be given again."),
    "include": ("weights", list[str], "Glob of names to take; may be given again."),
    "exclude": ("weights", list[str], "Glob of names to leave out; may be given again."),
    "cast": ("weights", bool, "Convert floats to the policy's dtypes."),
    "strict": ("weights", bool, "Every tensor must come, and no other. (default: strict)"),
    "base": ("weights", str, "Checkpoint that a PEFT adapter is merged into."),
    "finite": ("weights", bool, "Refuse NaN and infinity. (default: finite)"),
}

_PANELS = {
    "select": "Which checkpoint (the TOML's table select)",
    "weights": "Which tensors (the TOML's table weights)",
}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command, which has a parameter ``settings``, an option for each of them."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for name, p in signature.parameters.items() if name != "settings"]
    options = [_parameter(name, *about) for name, about in _HELP.items()]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        settings: dict[str, dict[str, Any]] = {"select": {}, "weights": {}}
        for name, (table, _, _) in _HELP.items():
            value = given.pop(name)
            if value not in (None, []):
                settings[table][name] = _value(name, value)
        command(**given, settings=settings)

    wrapped.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
    return wrapped


def _parameter(name: str, table: str, kind: Any, text: str) -> inspect.Parameter:
    flag = f"--{name}/--no-{name}" if kind is bool else f"--{name}"
    option = typer.Option(
        flag, envvar=f"WSYNC_{name.upper()}", help=text, show_default=False, rich_help_panel=_PANELS[table]
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _value(name: str, value: Any) -> Any:
    if name != "rename":
        return tuple(value) if isinstance(value, list) else value
    table = {}
    for pair in value:
        old, equals, new = pair.rpartition("=")
        if not equals or not old:
            raise UsageError(f"--rename {pair!r} is no OLD=NEW. Write the old name, =, and the new one.")
        table[old] = new
    return table
