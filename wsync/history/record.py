"""What one syncer reads from the history and adds to it: pin, rejections, events.

A history that cannot be written is reported once, and the syncer goes on without it. Only an unreadable pin stops a
pass: going on would replace the version that the operator holds.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.extras import MAX_BYTES, ExtraFiles, Extras
from ..checkpoints.fit import Fit
from ..errors import CheckpointError, NoCheckpoint, SegmentError, StateError, UsageError, WsyncError, printable
from ..places.identity import is_same
from ..segment.access import opened
from ..system.memory import try_lock
from .database import State

if TYPE_CHECKING:
    from ..segment.publishing import Staged
    from ..segment.segment import Segment
    from ..segment.segment_files import Publication
    from .database import Event
    from .outcome import Outcome
    from .pins import Pin

P = ParamSpec("P")
T = TypeVar("T")

_PASSED, _LATE, _HALF = "+passed", "+late", "+half"  # added to the settings under which a refusal is remembered
IN_NO_FILE = "kept live values that are in no file"
_EXTRAS = ".extras"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
NO_COPY = "no copy of it was kept (keep = 5 in the TOML, or --keep, keeps the last five)"


class Record:
    """A syncer's view of the state.

    Args:
        state: None remembers refusals in this process, and nothing else.
        settings: gives a text that differs between sets of settings; a refusal holds only under the same ones.

    Attributes:
        complain: called with why the history cannot be written, once for each reason.
    """

    def __init__(self, state: State | None, settings: Callable[[], str]) -> None:
        self.complain: Callable[[StateError], None] | None = None
        self._state, self._settings_of = state, settings
        if state:
            state.warn = lambda exc: self.complain(exc) if self.complain else None
        self._refused: dict[str, str] = {}
        self._passed: set[str] = set()
        self._halves: dict[str, str] = {}
        self._fresh: set[str] = set()
        self._loaded = False
        self._told: int | None = None
        self._complaint = self._failure = ""

    def close(self) -> None:
        if self._state:
            self._state.close()

    @cached_property
    def _settings(self) -> str:
        return self._settings_of()  # when first needed: a pass with nothing new does not need it

    @property
    def directory(self) -> Path | None:
        """The directory of the state."""
        return self._state.directory if self._state else None

    def pin(self) -> Pin | None:
        """The pin that holds.

        Raises:
            StateError: it cannot be read.
        """
        return self._state.pin() if self._state else None

    def last_published(self) -> tuple[int, str]:
        """See ``State.last``: a segment that is made anew continues from that version."""
        return self._try(State.last) or (0, "")

    def published_from(self, checkpoint: str) -> list[str]:
        """The identity under which a path was published last; empty if it never was."""
        return self._try(State.published_from, checkpoint) or []

    # --- refusals

    def forget(self) -> None:
        """Forgets all refusals, so that refused checkpoints count as new."""
        self._refused, self._passed, self._halves, self._loaded = {}, set(), {}, True

    def refusals(self, listed: Iterable[str]) -> dict[str, str]:
        """Which of ``listed`` were refused: the reason by identity."""
        wanted = set(listed)
        if wanted and not self._loaded:
            self._loaded = True
            self._refused |= self._try(State.rejections, self._settings) or {}
            self._passed |= (self._try(State.rejections, f"{self._settings}{_PASSED}") or {}).keys()
            self._halves |= self._try(State.rejections, _HALF) or {}
        if wanted:
            self._refused = {state: why for state, why in self._refused.items() if state in wanted}
            self._halves = {state: why for state, why in self._halves.items() if state in wanted}
        return self._refused

    def reason(self, identity: str) -> str:
        """Why a checkpoint of the last listing was refused."""
        return self._refused[identity]

    def is_fresh(self, identity: str) -> bool:
        """Whether it was refused in this process, and not in an earlier one."""
        return identity in self._fresh

    def refuse(self, identity: str, reason: str, outcome: Outcome) -> None:
        self._refused[identity] = reason
        self._fresh = {*self._fresh & self._refused.keys(), identity}
        self._try(State.reject, identity, self._settings, reason)
        self._try(State.record, "reject", **{**outcome._asdict(), "bytes": None})

    @property
    def passed(self) -> frozenset[str]:
        """The checkpoints of the last listing that were reported once, and are skipped since."""
        return frozenset(self._passed)

    def pass_over(self, identity: str, reason: str, outcome: Outcome) -> None:
        """Remembers that it was reported; it stays refused or incomplete."""
        self._passed.add(identity)
        self._try(State.reject, identity, f"{self._settings}{_PASSED}", reason)
        if identity not in self._refused:
            self._try(State.record, "reject", **{**outcome._asdict(), "bytes": None})

    def half(self, identity: str) -> str:
        """Why an object of the last listing was found incomplete; empty if it was not."""
        return self._halves.get(identity, "")

    def found_half(self, identity: str, why: str) -> None:
        """Remembers that an object is incomplete; it cannot grow, so this holds under any settings."""
        if self._halves.get(identity) != why:
            self._halves[identity] = why
            self._try(State.reject, identity, _HALF, why)

    def touched(self, live: Publication, checkpoint: Checkpoint) -> None:
        """Remembers that a checkpoint has the bytes of what is live, so that it is neither tried again nor reported."""
        identity, why = checkpoint.identity, f"it has the bytes of version {live.version}"
        self._try(State.touched, live.version, checkpoint.changed_ns)
        self._refused[identity] = why
        self._passed.add(identity)
        for settings in (self._settings, f"{self._settings}{_PASSED}"):
            self._try(State.reject, identity, settings, why)

    def told_until(self) -> int:
        """When the last checkpoint arrived that was reported as older than what is live, ns since the epoch."""
        if self._told is None:
            self._told = max(map(int, (self._try(State.rejections, _LATE) or {}).values()), default=0)
        return self._told

    def told_of(self, arrived_ns: int) -> None:
        self._told = arrived_ns
        self._try(State.reject, "", _LATE, str(arrived_ns))

    # --- events

    def published(self, outcome: Outcome, lag: int, fit: Fit, changed_ns: int, extras: ExtraFiles) -> None:
        settings = settings_to_json(fit, extras)
        fields = {**outcome._asdict(), "lag": lag, "settings": settings, "changed_ns": changed_ns}
        self._try(State.record, "publish", accepted=self._settings, **fields)

    def gate(self, result: str, staged: Staged) -> None:
        self._try(State.record, "gate", **staged._asdict(), reason=result)

    def failed(self, version: int, reason: str) -> None:
        """Records a failure; one that is repeated in a row is one event."""
        if reason == self._failure:
            return
        self._failure = reason
        last = self._try(State.events, limit=1)
        if not last or (last[-1].kind, last[-1].reason) != ("failure", reason):
            self._try(State.record, "failure", version=version, reason=reason)

    def worked(self) -> None:
        self._failure = ""

    def _try(self, action: Callable[Concatenate[State, P], T], *args: P.args, **more: P.kwargs) -> T | None:
        """Applies an action to the state; None without a state, or if the action fails."""
        try:
            return action(self._state, *args, **more) if self._state else None
        except StateError as exc:
            if str(exc) != self._complaint and self.complain:
                self.complain(exc)
            self._complaint = str(exc)
            return None

    # --- what was published before

    def keep(self, segment: Segment, number: int) -> None:
        """Keeps a copy of what is live, and of the last ``number`` checkpoints in all."""
        state = self._state
        if state and number > 0:
            self._try(keep, segment, number)

    def reopen(self, pin: Pin, fit: Fit, extras: ExtraFiles) -> tuple[Checkpoint, Fit]:
        """The pinned checkpoint, from a kept copy or its file.

        Args:
            fit, extras: of a checkpoint that was never published.

        Raises:
            CheckpointError: neither exists any more.
        """
        assert self._state
        found = self._state.published("identity = ? AND ? IN (0, version)", (pin.identity, pin.version), 1)
        pinned = found[0] if found else None
        if pinned and (again := reopen(pinned, copies(self._state), self._state, pin.header)):
            return again
        changed_ns = self._state.changed_ns(pin.identity, pinned.id) if pinned else 0
        mixed = bool(pinned and pin.version and fit_from_json(pinned.settings).kept)
        extras = extras_from_json(pinned.settings) if pinned else extras
        checkpoint = None if mixed else _same(pin.checkpoint, pin.identity, changed_ns, pin.header, extras)
        if checkpoint is None:
            why = IN_NO_FILE if mixed else gone_or_changed(self._state, pin.checkpoint)
            raise CheckpointError(
                f"{pin.name}, which is pinned, {why}, and {NO_COPY}. "
                f"`wsync unpin {self._state.name}` goes on with the newest; `wsync rollback` lists what is still there."
            )
        return checkpoint, fit


def settings_to_json(fit: Fit, extras: ExtraFiles) -> str:
    """The settings by which a checkpoint's file is published again."""
    left_out = {"partial", "built"} if fit.kept else {"partial", "built", "kept"}
    named = {field.name: getattr(fit, field.name) for field in fields(fit) if field.name not in left_out}
    table = {name: dict(value) if isinstance(value, Mapping) else value for name, value in named.items()}
    return json.dumps(table | ({"extras": [extras.files, extras.max_bytes]} if extras.files else {}))


def fit_from_json(text: str | None) -> Fit:
    """Reads the settings of an event; raises StateError if this wsync does not know them."""
    table: dict[str, Any] = json.loads(text) if text else {}
    table.pop("extras", None)
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    try:
        return Fit(**settings)
    except (TypeError, ValueError, UsageError) as exc:
        raise StateError(
            f"the settings of a version on record cannot be read ({exc!s:.200}). Go back to another one."
        ) from exc


def extras_from_json(text: str | None) -> ExtraFiles:
    """Which extras were published with a checkpoint; none where the settings do not tell."""
    try:
        files, most = json.loads(text or "{}").get("extras", [[], MAX_BYTES])
        return ExtraFiles(tuple(files), most)
    except (TypeError, ValueError, UsageError):
        return ExtraFiles()


def keep(state: State, segment: Segment, number: int) -> None:
    """Copies the live slot, a safetensors file in the policy's own layout, into the state; removes old copies.

    A checkpoint that was published again, as after a reboot, is kept once: its copy goes by the new version.

    Raises:
        StateError: there is no room, or no access.
    """
    try:
        lease, publication = segment.lease(), segment.live()
        extras = segment.extras(publication, lease.slot).to_bytes() if lease and publication else b""
    except (OSError, SegmentError) as exc:
        raise StateError(f"the live version of {segment.name!r} cannot be read, and is not kept: {exc}") from exc
    if lease is None or publication is None or lease.version != publication.version:  # another publisher keeps its own
        return
    target = copy_path(state, publication.version)
    if _holds(target, publication.identity):
        return
    temporary = target.with_suffix(".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _sweep(target.parent)
        this = state.published("version = ?", (publication.version,), 1)
        same = copies(state).get(what(this[0])) if this else None
        if same and _holds(same, publication.identity):
            with suppress(FileNotFoundError):
                same.with_suffix(_EXTRAS).replace(target.with_suffix(_EXTRAS))
            same.replace(target)
            return
        if extras:
            with open(os.open(target.with_suffix(_EXTRAS), _NEW, 0o600), "wb") as copy:
                copy.write(extras)
        with open(os.open(temporary, _NEW, 0o600), "wb") as copy:
            try_lock(copy.fileno())  # a sweeper sees that it is being written
            os.lseek(lease.fileno(), 0, os.SEEK_SET)
            with open(lease.fileno(), "rb", closefd=False) as slot:
                shutil.copyfileobj(slot, copy, 8 << 20)
            temporary.replace(target)
        # Not by their numbers, which begin again if the history was removed.
        order = {event.version: event.id for event in copied_events(state)} | {publication.version: math.inf}
        for version in sorted(copied_versions(state), key=lambda version: order.get(version, -1))[:-number]:
            for end in (".safetensors", _EXTRAS):
                copy_path(state, version).with_suffix(end).unlink(missing_ok=True)
    except OSError as exc:
        with suppress(OSError):
            temporary.unlink()
        raise StateError(
            f"version {publication.version} of {state.name!r} could not be kept in {state.copies} ({exc.strerror}). "
            "Make room, lower --keep, or name another place with --state-dir."
        ) from exc
    finally:
        lease.release()


def _holds(copy: Path, identity: str) -> bool:
    """Whether a kept copy is there, and its metadata name this checkpoint."""
    try:
        with Checkpoint(copy) as checkpoint:
            told, extras = checkpoint.metadata, copy.with_suffix(_EXTRAS)
            size = extras.stat().st_size if told.get("extras", "0") != "0" else 0
            return told.get("identity") == identity and told.get("extras", "0") == str(size)
    except (OSError, WsyncError):
        return False


def _extras_of(copy: Path, checkpoint: Checkpoint) -> Extras:
    """What travels with the weights of a kept copy."""
    if checkpoint.metadata.get("extras", "0") == "0":
        return Extras()
    return Extras.from_bytes(copy.with_suffix(_EXTRAS).read_bytes())


def _sweep(copies: Path) -> None:
    """Removes half-written copies that killed processes left behind: their lock is free."""
    for path in copies.glob("*.tmp"):
        with opened(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
            if try_lock(fd):
                path.unlink(missing_ok=True)


def what(event: Event) -> tuple[str, str]:
    """What an event published: the file, and how it was fitted."""
    return event.identity or "", event.settings or ""


def copied_events(state: State) -> list[Event]:
    """The events of the versions that have a copy, oldest first."""
    versions = copied_versions(state)
    return state.published(f"version IN ({', '.join('?' * len(versions))})", versions)[::-1] if versions else []


def copies(state: State) -> dict[tuple[str, str], Path]:
    """The kept copies, by what they are of."""
    return {what(event): copy_path(state, event.version or 0) for event in copied_events(state) if event.identity}


def copy_path(state: State, version: int) -> Path:
    return state.copies / f"{version}.safetensors"


def copied_versions(state: State) -> list[int]:
    """The versions that have a copy, lowest first."""
    return sorted(int(path.stem) for path in state.copies.glob("*.safetensors") if path.stem.isdigit())


def reopen(
    event: Event, found: Mapping[tuple[str, str], Path], state: State, header: str = ""
) -> tuple[Checkpoint, Fit] | None:
    """Opens what was once published, to publish it again, with its fit; None if it is gone or was changed.

    Weights that kept live values beside those of their checkpoint can come only from a copy.

    Args:
        found: the ``copies``.
        state: shows whether the file was overwritten since, with its times restored.
        header: the digest that its headers must have, if inodes say nothing; empty if unknown.
    """
    try:
        fit = fit_from_json(event.settings)
    except StateError:  # another wsync's
        return None
    copy = found.get(what(event))
    if copy and _holds(copy, event.identity or ""):
        checkpoint = Checkpoint(copy)
        own = _extras_of(copy, checkpoint)
        checkpoint.is_copy_of(event.checkpoint or "", event.identity or "", event.step, fit, own)
        return checkpoint, Fit(finite=False, kept=fit.kept)
    changed_ns = state.changed_ns(event.identity or "", event.id)
    extras = extras_from_json(event.settings)
    original = None if fit.kept else _same(event.checkpoint, event.identity, changed_ns, header, extras)
    if original:
        original.step = event.step  # a setting may have found it, and not only the name
    return (original, fit) if original else None


def gone_or_changed(state: State, path: str | None) -> str:
    """Why a file cannot be published again, and how to publish it all the same."""
    if not path or not os.path.exists(path):
        return "is gone or was changed"
    return f"is gone or was changed (`wsync pin {state.name} {printable(path)}` takes it as it is now)"


def _same(
    path: str | None, identity: str | None, changed_ns: int, header: str, extras: ExtraFiles
) -> Checkpoint | None:
    if not path or not identity:
        return None
    try:
        # A name that is not UTF-8 is on record with odd bytes escaped; a file of another identity is not taken.
        path = re.sub(r"\\u(dc[89a-f][0-9a-f])", lambda byte: chr(int(byte[1], 16)), path)
        checkpoint = Checkpoint(path, extras=extras)
    except (NoCheckpoint, CheckpointError):
        return None
    if is_same(checkpoint, identity, changed_ns, header):
        checkpoint.identity = identity
        return checkpoint
    checkpoint.close()
    return None
