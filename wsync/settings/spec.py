"""Which policy, and its settings: an import string ``package.module:attr``, or a TOML file that holds one.

This is the only place that runs a user's code, and it does so only when the layout is really needed: reading the
settings imports nothing. What the user's code prints goes to stderr, because stdout carries our own output.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.files import place_at, remote
from ..checkpoints.fit import Fit
from ..errors import SpecError, WsyncError
from ..layout.layout import Layout, layout_of
from ..places.candidates import Select
from ..segment.access import Access, check_name
from ..segment.files import MAX_SLOTS, SLOTS
from .hooks import Hooks
from .metrics import Metrics

if TYPE_CHECKING:
    import torch

POLL = 1.0
REMOTE_POLL = 10.0  # each look lists the store, which costs time and, at most stores, money
MAX_POLL = 86_400.0
MAX_FAILURES = -1
MAX_KEEP = 1000

_TABLES = {"select": Select, "weights": Fit, "hooks": Hooks, "metrics": Metrics}
_INTERNAL = ("partial", "kept")  # fields of a table that are no settings
_KINDS: dict[str, type | tuple[type, ...]] = {  # what TOML has for a field's type
    "str": str,
    "Literal": str,
    "bool": bool,
    "int": int,
    "float": (int, float),
    "tuple": list,
    "Mapping": dict,
}
_KEYS: dict[str, Any] = {
    "policy": str,
    "policy_kwargs": dict,
    "name": str,
    "checkpoints": str,
    "slots": int,
    "keep": int,
    "watch": {"poll": (int, float), "max_failures": int},
    "mode": str,
    "group": (str, int),
} | {
    table: {f.name: _KINDS[re.split(r"\W", str(f.type))[0]] for f in fields(settings) if f.name not in _INTERNAL}
    for table, settings in _TABLES.items()
}


@dataclass(frozen=True, slots=True)
class Spec:
    """A policy and its settings.

    Attributes:
        policy: ``package.module:attr``, the attr a callable or class that gives an ``nn.Module``, or a module instance.
        name: of the segment; default the TOML's own name, or ``package.module.attr``.
        directory: what is importable beside the installed packages: the TOML's directory, or the current one.
        policy_kwargs: what the callable is called with.
        checkpoints: where checkpoints appear, absolute, or what stands for a URL; None where the spec names none.
        poll: seconds between two looks that no notification asked for.
        max_failures: passes that may fail in a row before a watch gives up; -1 is any number.
        slots: buffers of a segment that is made.
        keep: published versions of which a copy is kept beside the state, for a rollback.
        access: who else may read the segment.
        select: which entries are checkpoints, and which is newest.
        weights: which tensors of a checkpoint are taken, and how they fit.
        hooks: the gate before a publish, and what runs after one.
        metrics: where figures for monitoring go.
    """

    policy: str
    name: str
    directory: Path
    policy_kwargs: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: Path | None = None
    poll: float = POLL
    max_failures: int = MAX_FAILURES
    slots: int = SLOTS
    keep: int = 0
    access: Access = field(default_factory=Access)
    select: Select = field(default_factory=Select)
    weights: Fit = field(default_factory=Fit)
    hooks: Hooks = field(default_factory=Hooks)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 2 <= self.slots <= MAX_SLOTS:
            raise SpecError(f"slots = {self.slots}: a segment has 2 to {MAX_SLOTS} slots. Two work, three are better.")
        if not 0 <= self.keep <= MAX_KEEP:
            raise SpecError(f"keep = {self.keep} (--keep): give the number of versions to keep, {MAX_KEEP} at most.")
        if not 0 < self.poll <= MAX_POLL:
            raise SpecError(f"watch.poll = {self.poll} is no time (--poll). Give seconds above 0, a day at most.")
        if self.max_failures < -1:
            raise SpecError(
                f"watch.max_failures = {self.max_failures} is no number (--max-failures). Give 0 or more, or "
                "-1 for any number."
            )

    @property
    def fingerprint(self) -> str:
        """Tells whether the layout of a standing segment was read from this very policy.

        Covers the import string, its arguments, and the state of the module's own file where it is found beside
        the spec; the modules that it imports are beyond it.
        """
        import hashlib

        place = self.directory.joinpath(*self.policy.partition(":")[0].split("."))
        try:
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            info = file.stat()
            state: object = [info.st_ino, info.st_size, info.st_mtime_ns]
        except OSError:
            state = None
        text = json.dumps([self.policy, self.policy_kwargs, str(self.directory), state], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def digest(self) -> str:
        """Tells whether a checkpoint that was refused would be refused again: the policy, the fit and the gate."""
        import hashlib

        text = repr((self.fingerprint, self.weights, self.hooks.gate, self.hooks.gate_timeout))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def layout(self) -> Layout:
        """The policy's layout, read in a process of its own.

        Raises:
            SpecError: the policy cannot be imported or built, or is none.
            WsyncError: that process was ended, or torch cannot be loaded.
        """
        import subprocess

        from ..system import child

        answer: Layout | WsyncError | None
        answer, ended = child.ask(
            Spec.read_layout, self, run=lambda words, link: subprocess.run(words, stdin=link, stdout=2, check=False)
        )
        if isinstance(answer, WsyncError):
            raise answer
        if answer is None:
            kind = SpecError if ended.returncode >= 0 else WsyncError  # ended from outside, or for want of memory
            raise kind(
                f"the process that read the layout of {self.policy} ended with status {ended.returncode} and no "
                "answer. Import the policy in a Python of your own to see why; where memory is limited (`ulimit -v`), "
                "raise the limit."
            )
        return answer

    def read_layout(self) -> Layout:
        """The policy's layout, read in this process.

        The module is built on the meta device where it allows that, which costs no memory.

        Raises:
            SpecError: the policy cannot be imported or built, or is none.
            WsyncError: torch cannot be loaded.
        """
        with self._user_code():
            import torch

            target = self._import(self.policy)  # not under the meta device: what a module makes at import stays real
            try:
                with torch.device("meta"):
                    return layout_of(self._make(target))
            except SpecError:
                return layout_of(self._make(target))

    def build(self) -> torch.nn.Module:
        """The policy itself.

        Raises:
            SpecError: it cannot be imported or built, or is no ``nn.Module``.
            WsyncError: torch cannot be loaded.
        """
        with self._user_code():
            return self._make(self._import(self.policy))

    def _make(self, target: Any) -> torch.nn.Module:
        import torch

        if isinstance(target, torch.nn.Module):
            if self.policy_kwargs:
                raise SpecError(
                    f"{self.policy} is a module already, so policy_kwargs would do nothing. Name its class or a "
                    "function that makes it, or remove [policy_kwargs]."
                )
            return target
        if not callable(target):
            raise SpecError(
                f"{self.policy} is a {type(target).__name__}, not a policy. Name an nn.Module, its class, or a "
                "function that returns one."
            )
        try:
            policy = target(**self.policy_kwargs)
        except (Exception, SystemExit) as exc:
            raise SpecError(
                f"{self.policy} failed when it was called with {dict(self.policy_kwargs)}: {origin(exc)}. Mend "
                "it, or its [policy_kwargs]."
            ) from exc
        if not isinstance(policy, torch.nn.Module):
            raise SpecError(
                f"{self.policy} returned a {type(policy).__name__}, not an nn.Module. Return the policy itself."
            )
        return policy

    def find(self, text: str) -> Any:
        """What an import string names, beside the policy or among the installed packages.

        Raises:
            SpecError: it cannot be imported.
            WsyncError: torch, which it will need, cannot be loaded.
        """
        with self._user_code():
            return self._import(text)

    def _import(self, text: str) -> Any:
        module_name, _, attributes = text.partition(":")
        try:
            target: Any = importlib.import_module(module_name)
        except (Exception, SystemExit) as exc:
            missing = exc.name if isinstance(exc, ModuleNotFoundError) else None
            if missing and (module_name == missing or module_name.startswith(f"{missing}.")):
                raise SpecError(
                    f"there is no module {module_name!r} (no {missing!r}) in {self.directory} or among the "
                    "installed packages. Check the spelling, or run wsync from the directory that holds it."
                ) from None
            raise SpecError(
                f"module {module_name!r} is there, but its own import failed: {origin(exc)}. Correct it, or install "
                "what it needs."
            ) from exc
        for attribute in attributes.split("."):
            try:
                target = getattr(target, attribute)
            except (Exception, SystemExit) as exc:
                if not isinstance(exc, AttributeError):
                    raise SpecError(
                        f"{text} is there, but looking it up failed: {origin(exc)}. Mend it first."
                    ) from exc
                near = difflib.get_close_matches(attribute, dir(target), 1)
                raise SpecError(
                    f"module {module_name!r} has no attribute {attributes!r}. "
                    + (f"Did you mean {near[0]!r}?" if near else "Check the spelling after the colon.")
                ) from None
        return target

    @contextlib.contextmanager
    def _user_code(self) -> Iterator[None]:
        """Runs code of the user's beside the spec, with what it prints on stderr.

        Raises:
            WsyncError: torch cannot be loaded, which is not the policy's fault.
        """
        try:
            import torch  # noqa: F401
        except (ImportError, OSError, MemoryError) as exc:
            raise WsyncError(
                f"torch cannot be loaded ({exc or type(exc).__name__}). Where this process's memory is limited "
                "(`ulimit -v`; LimitAS= of its systemd unit), raise the limit; else install torch anew."
            ) from exc
        directory = str(self.directory)
        if directory not in sys.path:
            sys.path.insert(0, directory)
        with contextlib.redirect_stdout(sys.stderr):
            yield


def load_spec(text: str, *, name: str | None = None, checkpoints: str | os.PathLike[str] | None = None) -> Spec:
    """Reads a spec: a path of a TOML file, or ``package.module:attr``.

    Args:
        name: overrides the segment's name.
        checkpoints: overrides where checkpoints appear.

    Raises:
        SpecError: neither; or the TOML is broken, has an unknown key, or a value of a wrong kind.
    """
    if text.endswith(".toml") or os.path.isfile(text):
        path = Path(text).absolute()
        data, directory, own_name = _read_toml(path), path.parent, path.stem
    else:
        data, directory, own_name = {"policy": text}, Path.cwd(), text.replace(":", ".")
    policy = _check_import_string(data["policy"])

    def beside(file: str) -> str:
        return file if not file or "://" in file else str(directory / file)

    tables: dict[str, dict[str, Any]] = {table: data.get(table, {}) for table in _TABLES}
    for table, key in (("weights", "base"), ("metrics", "file")):
        if key in tables[table]:
            tables[table][key] = beside(tables[table][key])
    found = checkpoints or beside(data.get("checkpoints", ""))
    place, watch = place_at(found) if found else None, data.get("watch", {})
    made: dict[str, Any] = {
        table: _TABLES[table](**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
        for table, settings in tables.items()
    }
    return Spec(
        policy=policy,
        name=name or data.get("name") or own_name,
        directory=directory,
        policy_kwargs=data.get("policy_kwargs", {}),
        checkpoints=place,
        poll=float(watch.get("poll", REMOTE_POLL if place and remote(place) else POLL)),
        max_failures=watch.get("max_failures", MAX_FAILURES),
        slots=data.get("slots", SLOTS),
        keep=data.get("keep", 0),
        access=Access(data.get("mode"), str(data["group"]) if "group" in data else None),
        **made,
    )


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise SpecError(f"{path} cannot be read ({exc.strerror}). Name a TOML file, or package.module:attr.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SpecError(f"{path} is not TOML: {exc}. Mend it there.") from exc
    _check_keys(data, _KEYS, path, "")
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
            f"{text!r} names no policy. Write package.module:attr (for example train.nets:make_policy), or the path "
            "of a TOML file that is there."
        )
    return text


def _check_keys(data: Mapping[str, Any], known: Mapping[str, Any], path: Path, prefix: str) -> None:
    for key, value in data.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise SpecError(
                f"{path}: unknown key {prefix + key!r}. "
                + (f"Did you mean {prefix + near[0]!r}?" if near else f"Known are {', '.join(known)}.")
            )
        kind = known[key]
        if isinstance(kind, dict):
            if not isinstance(value, dict):
                raise SpecError(f"{path}: {key} is a table. Write [{key}] with its settings below.")
            _check_keys(value, kind, path, f"{prefix}{key}.")
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise SpecError(f"{path}: {prefix}{key} = {value!r} is a {type(value).__name__}. Give a {wanted}.")
        elif isinstance(value, str) and "\0" in value:
            raise SpecError(f"{path}: {prefix}{key} = {value!r} holds a NUL character. Remove it.")
        elif isinstance(value, list | dict) and prefix == "weights.":
            odd = [v for v in (value.values() if isinstance(value, dict) else value) if not isinstance(v, str)]
            if odd:
                raise SpecError(f"{path}: {prefix}{key} holds {odd[0]!r}. Give strings.")


def origin(exc: BaseException) -> str:
    """The error and the user's line that it came from."""
    import traceback

    frames = traceback.extract_tb(exc.__traceback__)
    own = [f for f in frames if not f.filename.startswith("<frozen") and f.filename != __file__]
    last = next((f for f in reversed(own) if f"{os.sep}importlib{os.sep}" not in f.filename), None)
    where = f" ({last.filename}:{last.lineno})" if last else ""
    return f"{type(exc).__name__}: {exc}{where}"
