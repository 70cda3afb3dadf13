"""The history for people and programs: events as JSON, times that people type, and where each setting comes from."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any, NamedTuple

from ..errors import UsageError
from ..history.database import Event, State
from ..settings.spec import Spec
from ..text import when

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_BARS = "▁▂▃▄▅▆▇█"
_LOOK = 0.5  # seconds between two looks of ``--follow``


def event_json(event: Event) -> dict[str, Any]:
    """One event; the fields that do not apply are None."""
    data = {name: value for name, value in event._asdict().items() if name not in ("id", "settings")}
    return {**data, "at": when(event.at)}


def moment(text: str) -> float:
    """Seconds since the epoch of ``2h`` (ago), or of a date and time, local where it names no zone.

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
    """Events as they come, until interrupted; all of a history that was begun anew."""
    while True:
        last = state.events(limit=1)
        if not last or last[-1].id < after:
            after = 0
        for event in state.events(after=after):
            after = event.id
            yield event
        time.sleep(_LOOK)


def bar(value: float, most: float) -> str:
    """A value between 0 and the greatest one as a block of that height."""
    return _BARS[round(value / most * (len(_BARS) - 1))] if most > 0 else _BARS[0]


class Setting(NamedTuple):
    """One row of ``wsync config``: ``origin`` is option, variable, TOML or default."""

    name: str
    value: Any
    origin: str


def origins(spec: Spec, text: str, given: Mapping[str, str | None], others: Mapping[str, Any]) -> list[Setting]:
    """Every setting with its origin.

    Args:
        spec: with what options and variables say in it.
        text: the spec as it was named.
        given: options by name, with where they came from.
        others: what is no part of the spec, by the names of its options.
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
    for table in ("select", "weights", "hooks", "metrics"):
        for name, value in asdict(getattr(spec, table)).items():
            if name == "webhook" and value:
                value = "(set; may hold a secret)"
            option = f"metrics_{name}" if table == "metrics" and name != "max_staleness" else name
            if name not in ("partial", "kept", "built"):
                add(f"{table}.{name}", value, toml.get(table, {}), option)
    return rows


def _toml(text: str) -> Mapping[str, Any]:
    import tomllib

    if not (text.endswith(".toml") or os.path.isfile(text)):
        return {}
    with open(text, "rb") as file:
        return tomllib.load(file)
