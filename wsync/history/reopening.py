"""Opens a checkpoint that was once published, to publish it again: a copy, or the original if that has not changed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files.extras import MAX_BYTES, ExtraFiles
from ..discovery.identity import is_same
from ..errors import CheckpointError, NoCheckpoint, StateError, UsageError, printable
from ..fitting.fit import Fit
from .copies import copies, is_of, key_of, open_copy
from .pins import Pin
from .state import Event, State

IN_NO_FILE = "kept live values that are in no file"
NO_COPY = "no copy of it was kept (keep = 5 in the TOML, or --keep, keeps the last five)"


def settings_to_json(fit: Fit, extras: ExtraFiles) -> str:
    """The settings, as JSON, with which a checkpoint's file is published again."""
    left_out = {"partial", "built"} if fit.mixture else {"partial", "built", "mixture"}
    named = {field.name: getattr(fit, field.name) for field in fields(fit) if field.name not in left_out}
    table = {name: dict(value) if isinstance(value, Mapping) else value for name, value in named.items()}
    return json.dumps(table | ({"extras": [extras.files, extras.max_bytes]} if extras.files else {}))


def fit_from_json(text: str | None) -> Fit:
    """Reads ``Event.settings``; raises StateError if this version of wsync does not know them."""
    table: dict[str, Any] = json.loads(text) if text else {}
    table.pop("extras", None)
    if "kept" in table:  # the name that an earlier wsync wrote
        table["mixture"] = table.pop("kept")
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    try:
        return Fit(**settings)
    except (TypeError, ValueError, UsageError) as exc:
        raise StateError(
            f"the recorded settings of a version cannot be read ({exc!s:.200}). Roll back to another version."
        ) from exc


def extras_from_json(text: str | None) -> ExtraFiles:
    """Reads from ``Event.settings`` which extras were published; none if the settings do not say."""
    try:
        files, most = json.loads(text or "{}").get("extras", [[], MAX_BYTES])
        return ExtraFiles(tuple(files), most)
    except (TypeError, ValueError, UsageError):
        return ExtraFiles()


def reopen(
    event: Event, found: Mapping[tuple[str, str], Path], state: State, header: str = ""
) -> tuple[Checkpoint, Fit] | None:
    """Opens what an event published, and returns it with its fit; None if it is gone or was changed.

    A version that mixed live values into those of its checkpoint can come only from a copy.

    Args:
        found: see ``copies``.
        state: has the change times that reveal an overwritten file whose modification time was restored.
        header: the digest that its headers must have where inodes say nothing; empty if unknown.
    """
    try:
        fit = fit_from_json(event.settings)
    except StateError:  # of another version of wsync
        return None
    copy = found.get(key_of(event))
    if copy and is_of(copy, event.identity):
        return open_copy(copy, event, fit), Fit(finite=False, mixture=fit.mixture)
    changed_ns = state.changed_ns(event.identity, event.id)
    extras = extras_from_json(event.settings)
    original = None if fit.mixture else open_original(event.checkpoint, event.identity, changed_ns, header, extras)
    if original:
        original.step = event.step  # it may come from a setting and not from the file's name
    return (original, fit) if original else None


def reopen_pinned(state: State, pin: Pin, fit: Fit, extras: ExtraFiles) -> tuple[Checkpoint, Fit]:
    """Opens the pinned checkpoint, from a copy or its file, and returns it with its fit.

    Args:
        fit, extras: for a checkpoint that was never published.

    Raises:
        CheckpointError: there is no copy, and the file is gone or was changed.
        StateError: the history cannot be read.
    """
    found = state.published("identity = ? AND ? IN (0, version)", (pin.identity, pin.version), 1)
    pinned = found[0] if found else None
    if pinned and (again := reopen(pinned, copies(state), state, pin.header)):
        return again
    changed_ns = state.changed_ns(pin.identity, pinned.id) if pinned else 0
    mixed = bool(pinned and pin.version and fit_from_json(pinned.settings).mixture)
    extras = extras_from_json(pinned.settings) if pinned else extras
    checkpoint = None if mixed else open_original(pin.checkpoint, pin.identity, changed_ns, pin.header, extras)
    if checkpoint is None:
        why = IN_NO_FILE if mixed else gone_or_changed(state, pin.checkpoint)
        raise CheckpointError(
            f"{pin.name}, which is pinned, {why}, and {NO_COPY}. "
            f"`wsync unpin {state.name}` goes on with the newest; `wsync rollback {state.name}` goes back to another."
        )
    return checkpoint, fit


def gone_or_changed(state: State, path: str | None) -> str:
    """Why a file cannot be published again, and which command publishes it as it is now."""
    if not path or not os.path.exists(path):
        return "is gone or was changed"
    return f"is gone or was changed (`wsync pin {state.name} {printable(path)}` takes it as it is now)"


def open_original(
    path: str | None, identity: str | None, changed_ns: int, header: str, extras: ExtraFiles
) -> Checkpoint | None:
    """Opens a checkpoint if it still has this identity; None if it is gone or was changed."""
    if not path or not identity:
        return None
    try:
        # In the history, a name that is not UTF-8 has its bytes escaped (see ``state``). The identity is checked below.
        path = re.sub(r"\\u(dc[89a-f][0-9a-f])", lambda byte: chr(int(byte[1], 16)), path)
        checkpoint = Checkpoint(path, extras=extras)
    except (NoCheckpoint, CheckpointError):
        return None
    if is_same(checkpoint, identity, changed_ns, header):
        checkpoint.identity = identity
        return checkpoint
    checkpoint.close()
    return None
