"""What ``wsync config`` prints: every setting and where it comes from; and with ``--init``, a TOML with all of them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UsageError, printable
from ...settings.spec import INTERNAL, TABLES, Spec
from ...system.access import Access
from ..options import HELP
from ..terminal import plain_table, stdout_console

_OWN_TABLE = {"poll": "watch", "max_failures": "watch"}
_EXAMPLES = {"name": "cartpole", "mode": "0600", "group": "policies", "metrics_port": 9464, "max_staleness": 300.0}
"""Examples for settings without a default."""


class Setting(NamedTuple):
    """One row of ``wsync config``: ``origin`` is option, variable, TOML or default."""

    name: str
    value: Any
    origin: str


def origins(spec: Spec, text: str, given: Mapping[str, str | None], others: Mapping[str, Any]) -> list[Setting]:
    """Every setting with its origin.

    Args:
        spec: the spec, with the values of options and variables in it.
        text: the spec as it was named: a path or an import string.
        given: for each option by name, ``option`` or ``variable`` if it was given, else None.
        others: settings outside the spec, by the names of their options.
    """
    toml = _toml(text)
    rows: list[Setting] = []

    def add(name: str, value: Any, table: Mapping[str, Any], option: str = "") -> None:
        key = name.rpartition(".")[2]
        rows.append(Setting(name, value, given.get(option or key) or ("TOML" if key in table else "default")))

    for name in ("policy", "name", "checkpoints", "slots", "max_slots", "keep", "history"):
        add(name, getattr(spec, name), toml)
    if not toml:
        rows[0] = rows[0]._replace(origin="argument")
    for name in ("poll", "max_failures"):
        add(f"watch.{name}", getattr(spec, name), toml.get("watch", {}))
    for name, value in others.items():
        add(name, value, {})
    rows += [Setting(f"policy_kwargs.{key}", value, "TOML") for key, value in spec.policy_kwargs.items()]
    for name, value in asdict(spec.access).items():
        add(name, value, toml)
    for table in ("select", "extras", "weights", "hooks", "metrics"):
        for name, value in asdict(getattr(spec, table)).items():
            if name == "webhook" and value:
                value = "(set; may hold a secret)"
            option = f"metrics_{name}" if table == "metrics" and name != "max_staleness" else name
            if name not in INTERNAL:
                add(f"{table}.{name}", value, toml.get(table, {}), option)
    return rows


def _toml(text: str) -> Mapping[str, Any]:
    import tomllib

    if not (text.endswith(".toml") or os.path.isfile(text)):
        return {}
    with open(text, "rb") as file:
        return tomllib.load(file)


def spec_text(policy: str) -> str:
    """The text of a TOML: each setting is one line, commented out, below a line that says what it means."""
    lines = [f'policy = "{policy}"', 'checkpoints = "checkpoints"', ""]
    lines += ["# Each setting below shows its default, or an example if it has no default. Remove the # to change it."]
    for title in ("", "watch", *TABLES):
        if title:
            lines += ["", f"[{title}]"]
        lines += [line for name in HELP if _table_of(name) == title for line in _setting(name)]
    lines += ["", "# Arguments for the policy's class or function.", "[policy_kwargs]", ""]
    return "\n".join(lines)


def write_spec(spec: str) -> Path | None:
    """Writes a new TOML and returns its path; if the spec is an import string, prints it and returns None.

    Raises:
        UsageError: the file exists, or cannot be written.
    """
    if not spec.endswith(".toml"):
        print(spec_text(spec), end="")
        return None
    try:
        with open(spec, "x", encoding="utf-8") as file:
            file.write(spec_text("package.module:attr"))
    except FileExistsError:
        raise UsageError(f"{spec} exists already, and is not overwritten. Name another file, or remove it.") from None
    except OSError as exc:
        raise UsageError(f"{spec} cannot be written ({exc.strerror}). Name a file in a directory of yours.") from exc
    return Path(spec)


def _table_of(name: str) -> str:
    table = HELP[name][0]
    return _OWN_TABLE.get(name, "") if table in ("spec", "access") else table


def _setting(name: str) -> list[str]:
    table, _, text = HELP[name]
    key = name.removeprefix(f"{table}_")
    owner: Any = {"spec": Spec, "access": Access, **TABLES}[table]
    field = next(field for field in dataclasses.fields(owner) if field.name == key)
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    default = _EXAMPLES.get(name, made)
    value = "{}" if default == {} or hasattr(default, "items") else json.dumps(default)
    return [f"# {text.partition(' (default:')[0]}", f"#{key} = {value}"]


def print_config(rows: list[Setting]) -> None:
    lines = plain_table("setting", "value", "from")
    for row in rows:
        lines.add_row(row.name, "" if row.value is None else printable(str(row.value)), row.origin)
    stdout_console().print(lines)
