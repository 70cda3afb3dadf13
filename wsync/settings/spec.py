"""A policy spec: an import string ``package.module:attr``, or a TOML file that holds one and the policy's settings.

A spec is data: reading it imports no code of the user. ``user_code`` loads what the spec names.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..checkpoints.files.extras import ExtraFiles
from ..checkpoints.files.parts import place_at, remote
from ..discovery.newest import Select
from ..errors import SpecError
from ..fitting.fit import Fit
from ..segment.segment_files import BOUND, MAX_SLOTS, SLOTS
from ..system.access import Access, check_name
from .hook_settings import Hooks

REMOTE_POLL = 10.0  # each look lists the store, which costs time and, at most stores, money
MAX_POLL = 86_400.0
MAX_KEEP = 1000


@dataclass(frozen=True, slots=True)
class Metrics:
    """Where figures go: the settings of ``[metrics]``; raises SpecError for an invalid value.

    Attributes:
        port: the port of ``/metrics`` and ``/healthz``; 0 for any free one, None for no server.
        address: the address on which that port listens.
        file: for the node exporter's textfile collector, absolute or relative to the current directory; empty for none.
        max_staleness: a watch is unhealthy if no pass of the last so many seconds found the newest checkpoint live or
            put it live; None for never. A refused checkpoint, a missing source or a loop that hangs makes a watch
            unhealthy, but a trainer that is done does not. Must be above ``poll``, and should be above the time that
            staging takes.
    """

    port: int | None = None
    address: str = "127.0.0.1"
    file: str = ""
    max_staleness: float | None = None

    def __post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port <= 65_535:
            raise SpecError(
                f"metrics.port = {self.port} is not a port (--metrics-port). Give 1 to 65535, or 0 for any free port."
            )
        if self.file and not self.file.endswith(".prom"):
            raise SpecError(
                f"metrics.file = {self.file!r} (--metrics-file): the node exporter reads only names that end in .prom. "
                "Give it such a name."
            )
        if self.max_staleness is not None and not self.max_staleness > 0:
            raise SpecError(f"metrics.max_staleness = {self.max_staleness} is not a valid time. Give seconds above 0.")


TABLES = {"select": Select, "extras": ExtraFiles, "weights": Fit, "hooks": Hooks, "metrics": Metrics}
INTERNAL = ("partial", "mixture", "built", "extras", "listed")  # fields of a table that are not settings
_KINDS: dict[str, type | tuple[type, ...]] = {  # the types of TOML values, by the first word of a field's type
    "str": str,
    "Literal": str,
    "bool": bool,
    "int": int,
    "float": (int, float),
    "tuple": list,
    "Mapping": dict,
}
_WORDS: dict[Any, str] = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    (int, float): "a number",
    (str, int): "a string or a whole number",
    list: "a list",
    dict: "a table",
}
KEYS: dict[str, Any] = {
    "policy": str,
    "policy_kwargs": dict,
    "name": str,
    "checkpoints": str,
    "slots": int,
    "max_slots": int,
    "keep": int,
    "history": int,
    "watch": {"poll": (int, float), "max_failures": int},
    "mode": str,
    "group": (str, int),
} | {
    table: {f.name: _KINDS[re.split(r"\W", str(f.type))[0]] for f in fields(settings) if f.name not in INTERNAL}
    for table, settings in TABLES.items()
}


@dataclass(frozen=True, slots=True)
class Spec:
    """A policy and its settings; raises SpecError, or UsageError, for an invalid value.

    Attributes:
        policy: ``package.module:attr``, which is an ``nn.Module``, or a class or function that returns one; empty if
            only the segment's name is known.
        name: the segment's name.
        directory: where modules are, besides the installed packages: the TOML file's directory, or the current one.
        policy_kwargs: keyword arguments for the class or function.
        checkpoints: where checkpoints appear, as ``place_at`` returns it; None if the spec does not say.
        poll: seconds between two looks without a notification.
        max_failures: how many passes may fail in a row before a watch gives up; -1 for any number.
        slots: how many slots a new segment has.
        max_slots: how many slots a segment may grow to while readers keep older versions.
        keep: how many published versions are copied beside the state, for a rollback.
        history: how many published versions stay on record, and how many other events.
        access: who else may read the segment.
        select: which entries are checkpoints, and which is newest.
        weights: which tensors of a checkpoint are taken, and how they are made to fit.
        hooks: the gate before a publish, and what runs after one.
        metrics: where figures for monitoring go.
        origin: the TOML file's path, or the import string; empty for a spec that was made in memory.
    """

    policy: str
    name: str
    directory: Path
    policy_kwargs: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: Path | None = None
    poll: float = 1.0
    max_failures: int = -1
    slots: int = SLOTS
    max_slots: int = BOUND
    keep: int = 0
    history: int = 100_000  # 30 MB, and as much for other events; at one version a minute in two months
    access: Access = field(default_factory=Access)
    select: Select = field(default_factory=Select)
    weights: Fit = field(default_factory=Fit)
    hooks: Hooks = field(default_factory=Hooks)
    metrics: Metrics = field(default_factory=Metrics)
    origin: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 2 <= self.slots <= MAX_SLOTS:
            raise SpecError(
                f"slots = {self.slots}: a segment has 2 to {MAX_SLOTS} slots. Give such a number; three is a good one."
            )
        if not 2 <= self.max_slots <= MAX_SLOTS:
            raise SpecError(
                f"max_slots = {self.max_slots} (--max-slots): a segment may grow to at most {MAX_SLOTS} slots. Give 2 "
                f"to {MAX_SLOTS}."
            )
        if not 0 <= self.keep <= MAX_KEEP:
            raise SpecError(f"keep = {self.keep} (--keep) is not a number of versions to keep. Give 0 to {MAX_KEEP}.")
        if not max(self.keep, 1) <= self.history < 1 << 32:
            raise SpecError(
                f"history = {self.history} (--history) is not a number of versions to keep on record. Give at least "
                "1, and not less than keep."
            )
        if not 0 < self.poll <= MAX_POLL:
            raise SpecError(
                f"watch.poll = {self.poll} is not a valid time (--poll). Give seconds above 0, a day at most."
            )
        if self.max_failures < -1:
            raise SpecError(
                f"watch.max_failures = {self.max_failures} is not a number of passes (--max-failures). Give 0 or "
                "more, or -1 for any number."
            )

    @property
    def extras(self) -> ExtraFiles:
        """Which files travel with the weights."""
        return self.select.extras

    def fingerprint(self) -> str:
        """Returns a digest that tells whether a segment's layout was read from this policy.

        It covers the import string, its arguments, the globs of ``weights.own``, and the size and times of the module's
        own file if that is beside the spec; not the modules that it imports.
        """
        if not self.policy:
            return ""
        import hashlib

        file_state = _state_of(self._module(self.policy))
        own = [self.weights.own] if self.weights.own else []
        text = json.dumps([self.policy, self.policy_kwargs, str(self.directory), file_state, *own], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def digest(self) -> str:
        """Returns a digest of all that decides whether a checkpoint is refused: the policy, the fit and the gate.

        Of a gate, it covers the size and times of its function's module, as ``fingerprint`` does, or of its scripts:
        the first word of its command, and those that end in .py or .sh. Other words may name files that it writes.
        """
        import hashlib

        gate, extras = self.hooks.gate, (self.extras,) if self.extras.files else ()
        words = [word.strip("'\"") for word in gate.split()]
        scripts = [self.directory / word for word in words if word == words[0] or word.endswith((".py", ".sh"))]
        files = [self._module(gate)] if self.hooks.gate_is_function else scripts
        states = [state for state in map(_state_of, files) if state]
        text = repr((self.fingerprint(), self.weights, gate, self.hooks.gate_timeout, *extras, *states))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _module(self, text: str) -> Path:
        """Returns the file of an import string's module if that is beside the spec."""
        module = self.directory.joinpath(*text.partition(":")[0].split("."))
        return module / "__init__.py" if os.path.isdir(module) else module.with_suffix(".py")


def _state_of(file: Path) -> list[int] | None:
    """Returns the size and times of a file, which change with its content; None if it is not there."""
    try:
        info = file.stat()
    except OSError:
        return None
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns] if stat.S_ISREG(info.st_mode) else None


def load_spec(text: str, *, name: str | None = None, checkpoints: str | os.PathLike[str] | None = None) -> Spec:
    """Reads a spec from the path of a TOML file, or from ``package.module:attr``.

    Args:
        name: overrides the segment's name; default: the one in the file, the file's name, or ``package.module.attr``.
        checkpoints: overrides where checkpoints appear.

    Raises:
        SpecError: the text is neither; or the file cannot be read, or has an unknown key or a wrong value.
        UsageError: the name, the place of checkpoints, or a value of a table is not valid.
    """
    if text.endswith(".toml") or os.path.isfile(text):
        path = Path(text).absolute()
        data, directory, own_name, origin = _read_toml(path), path.parent, path.stem, str(path)
    else:
        data, directory, own_name, origin = {"policy": text}, Path.cwd(), text.replace(":", "."), text
    policy = _check_import_string(data["policy"])

    def beside(file: str) -> str:
        return file if not file or "://" in file else str(directory / file)

    tables: dict[str, dict[str, Any]] = {table: data.get(table, {}) for table in TABLES}
    for table, key in (("weights", "base"), ("metrics", "file")):
        if key in tables[table]:
            tables[table][key] = beside(tables[table][key])
    found = checkpoints or beside(data.get("checkpoints", ""))
    place = place_at(found) if found else None
    made: dict[str, Any] = {
        table: TABLES[table](**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
        for table, settings in tables.items()
    }
    made["select"] = replace(made["select"], extras=made.pop("extras"))
    made |= {key: data[key] for key in ("policy_kwargs", "slots", "max_slots", "keep", "history") if key in data}
    made |= ({"poll": REMOTE_POLL} if place and remote(place) else {}) | data.get("watch", {})
    access = Access(data.get("mode"), str(data["group"]) if "group" in data else None)
    own_name = name or data.get("name") or own_name
    return Spec(policy, own_name, directory, checkpoints=place, access=access, origin=origin, **made)


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise SpecError(f"{path} cannot be read ({exc.strerror}). Name a TOML file, or package.module:attr.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SpecError(f"{path} is not TOML: {exc}. Correct it.") from exc
    _check_keys(data, KEYS, path, "")
    if "policy" not in data:
        raise SpecError(f'{path} does not say which policy. Add policy = "package.module:attr".')
    for key in ("name", "checkpoints"):
        if data.get(key) == "":
            raise SpecError(f"{path}: {key} is empty. Give it a value, or leave it out.")
    return data


def _check_import_string(text: str) -> str:
    module, colon, attributes = text.partition(":")
    parts = [*module.split("."), *attributes.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        raise SpecError(
            f"{text!r} does not name a policy. Write package.module:attr (for example train.nets:make_policy), or the "
            "path of a TOML file that exists."
        )
    return text


def _check_keys(data: Mapping[str, Any], known: Mapping[str, Any], path: Path, prefix: str) -> None:
    for key, value in data.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise SpecError(
                f"{path}: unknown key {prefix + key!r}. "
                + (f"Did you mean {prefix + near[0]!r}?" if near else f"The known keys are {', '.join(known)}.")
            )
        kind = known[key]
        if isinstance(kind, dict):
            if not isinstance(value, dict):
                raise SpecError(f"{path}: {key} is a table. Write [{key}] with its settings below.")
            _check_keys(value, kind, path, f"{prefix}{key}.")
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise SpecError(f"{path}: {prefix}{key} = {value!r} is not {_WORDS[kind]}. Correct it.")
        elif isinstance(value, str) and "\0" in value:
            raise SpecError(f"{path}: {prefix}{key} = {value!r} holds a NUL character. Remove it.")
        elif isinstance(value, list | dict) and prefix in ("weights.", "extras."):
            odd = [v for v in (value.values() if isinstance(value, dict) else value) if not isinstance(v, str)]
            if odd:
                raise SpecError(f"{path}: {prefix}{key} holds {odd[0]!r}. Give strings.")
