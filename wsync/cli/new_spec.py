"""``wsync config SPEC --init``: a TOML with every setting and its default, made from the options and dataclasses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..segment.access import Access
from ..settings.spec import _TABLES as TABLES
from ..settings.spec import Spec
from .options import _HELP as HELP

_OWN_TABLE = {"poll": "watch", "max_failures": "watch"}
_EXAMPLES = {"name": "cartpole", "mode": "0600", "group": "policies", "metrics_port": 9464, "max_staleness": 300.0}
"""What stands where there is no default."""


def spec_text(policy: str) -> str:
    """The text of the TOML: each setting is one comment line, below a line that says what it means."""
    lines = [f'policy = "{policy}"', 'checkpoints = "checkpoints"', ""]
    lines += ["# Each setting below shows its default, or an example if it has no default. Remove the # to change it."]
    for title in ("", "watch", *TABLES):
        if title:
            lines += ["", f"[{title}]"]
        lines += [line for name in HELP if _table_of(name) == title for line in _setting(name)]
    lines += ["", "# Arguments for the policy's class or function.", "[policy_kwargs]", ""]
    return "\n".join(lines)


def write_spec(spec: str) -> Path | None:
    """Writes a new TOML; prints it where the spec is an import string.

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
