"""The history for people and programs: events as JSON, times that people type, figures as a line, settings' origins."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from typing import Any

from .access import Access
from .console import when
from .errors import UsageError
from .hooks import Hooks
from .metrics import Metrics
from .spec import Spec
from .state import Event, State

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_BARS = "▁▂▃▄▅▆▇█"
_LOOK = 0.5  # seconds between two looks of ``--follow``
_TOP = ("policy", "name", "checkpoints", "slots", "keep", "poll", "max_failures")
_IN_WATCH = ("poll", "max_failures")
_SECRET = ("webhook",)


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
        raise UsageError(f"--since {text!r} is no time. Write 30m, 2h, 3d, or 2026-05-01T12:00.") from exc


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


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as one line of bars from 0 to the largest; where there are more than fit, a bar is the worst of some."""
    if not values:
        return ""
    step = max(1, -(-len(values) // max(width, 1)))
    shown = [max(values[at : at + step]) for at in range(0, len(values), step)]
    most = max(shown)
    return "".join(_BARS[round(value / most * (len(_BARS) - 1))] if most > 0 else _BARS[0] for value in shown)


@dataclass(frozen=True, slots=True)
class Setting:
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
    rows = []
    for name in _TOP:
        table = toml.get("watch", {}) if name in _IN_WATCH else toml
        where = given.get(name) or ("TOML" if name in table else "default")
        if name == "policy" and not table:
            where = "argument"
        rows.append(Setting(f"watch.{name}" if name in _IN_WATCH else name, getattr(spec, name), where))
    rows += [Setting(name, value, given.get(name) or "default") for name, value in others.items()]
    for key, value in spec.policy_kwargs.items():
        rows.append(Setting(f"policy_kwargs.{key}", value, "TOML"))
    for field in fields(spec):
        table = getattr(spec, field.name)
        if not is_dataclass(table):
            continue
        top = isinstance(table, Access)  # whose settings stand in no table of the TOML
        for setting in fields(table):
            name = setting.name
            option = f"metrics_{name}" if isinstance(table, Metrics) and name != "max_staleness" else name
            where = given.get(option) or ("TOML" if name in (toml if top else toml.get(field.name, {})) else "default")
            value = getattr(table, name)
            if isinstance(table, Hooks) and name in _SECRET and value:
                value = "(set; may hold a secret)"
            if name not in ("partial", "kept"):
                rows.append(Setting(name if top else f"{field.name}.{name}", value, where))
    return rows


def _toml(text: str) -> Mapping[str, Any]:
    import tomllib

    if not (text.endswith(".toml") or os.path.isfile(text)):
        return {}
    with open(text, "rb") as file:
        return tomllib.load(file)
