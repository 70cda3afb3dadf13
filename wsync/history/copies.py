"""Copies of published versions, kept beside the state so that a rollback or a reboot does not need the original."""

from __future__ import annotations

import math
import os
import shutil
from contextlib import suppress
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files.extras import Extras
from ..errors import SegmentError, StateError, WsyncError
from ..fitting.fit import Fit
from ..segment.segment import Segment
from ..segment.segment_files import read_extras_file
from ..segment.word_and_lease import Lease
from ..system.access import opened
from ..system.memory import try_lock
from .state import Event, State

_EXTRAS = ".extras"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW


def keep(state: State, segment: Segment, number: int) -> None:
    """Copies the live slot, a safetensors file in the policy's own layout, and removes the oldest copies.

    If a checkpoint is published again, as after a reboot, its copy is renamed to the new version.

    Args:
        number: how many copies stay.

    Raises:
        StateError: the slot cannot be read, or the copy cannot be written.
    """
    try:
        lease, publication = segment.lease(), segment.live()
        if not lease or not publication or lease.version != publication.version:  # its publisher copies that one
            return
        extras = segment.extras(publication, lease.slot).to_bytes()
    except (OSError, SegmentError) as exc:
        raise StateError(f"the live version of {segment.name!r} cannot be read, so it was not copied: {exc}") from exc
    target = copy_path(state, publication.version)
    if is_of(target, publication.identity):
        return
    temporary = target.with_suffix(".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _sweep(target.parent)
        this = state.published("version = ?", (publication.version,), 1)
        same = copies(state).get(key_of(this[0])) if this else None
        if same and is_of(same, publication.identity):
            with suppress(FileNotFoundError):
                same.with_suffix(_EXTRAS).replace(target.with_suffix(_EXTRAS))
            same.replace(target)
            return
        _write(target, temporary, lease, extras)
        # Oldest first by event: version numbers begin again if the history was removed.
        order = {event.version: event.id for event in copied_events(state)} | {publication.version: math.inf}
        for version in sorted(copied_versions(state), key=lambda version: order.get(version, -1))[:-number]:
            for end in (".safetensors", _EXTRAS):
                copy_path(state, version).with_suffix(end).unlink(missing_ok=True)
    except OSError as exc:
        with suppress(OSError):
            temporary.unlink()
        raise StateError(
            f"version {publication.version} of {state.name!r} could not be copied to {state.copies} ({exc.strerror}). "
            "Make room, lower --keep, or name another directory with --state-dir."
        ) from exc
    finally:
        lease.release()


def _write(target: Path, temporary: Path, lease: Lease, extras: bytes) -> None:
    """Writes the extras and then a copy of a leased slot, so that no copy is ever without its extras."""
    if extras:
        with open(os.open(target.with_suffix(_EXTRAS), _NEW, 0o600), "wb") as copy:
            copy.write(extras)
    with open(os.open(temporary, _NEW, 0o600), "wb") as copy:
        try_lock(copy.fileno())  # ``_sweep`` leaves a locked file alone
        os.lseek(lease.fileno(), 0, os.SEEK_SET)
        with open(lease.fileno(), "rb", closefd=False) as slot:
            shutil.copyfileobj(slot, copy, 8 << 20)
        temporary.replace(target)


def is_of(copy: Path, identity: str) -> bool:
    """Whether there is a copy, and its metadata names this checkpoint."""
    try:
        with Checkpoint(copy) as checkpoint:
            _extras_of(copy, checkpoint)
            return checkpoint.metadata.get("identity") == identity
    except (OSError, WsyncError, ValueError):
        return False


def open_copy(copy: Path, event: Event, fitted: Fit) -> Checkpoint:
    """Opens a copy, which reports the path, identity and step of the original."""
    checkpoint = Checkpoint(copy)
    extras = _extras_of(copy, checkpoint)
    checkpoint.is_copy_of(event.checkpoint or "", event.identity, event.step, fitted, extras)
    return checkpoint


def _extras_of(copy: Path, checkpoint: Checkpoint) -> Extras:
    """Reads the extras of a copy; raises OSError or ValueError if they are gone or damaged."""
    size = int(checkpoint.metadata.get("extras", "0"))
    if not size:
        return Extras()
    with open(copy.with_suffix(_EXTRAS), "rb") as file:
        return read_extras_file(file.fileno(), size)


def _sweep(copies: Path) -> None:
    """Removes unfinished copies of killed processes, which nobody locks."""
    for path in copies.glob("*.tmp"):
        with opened(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
            if try_lock(fd):
                path.unlink(missing_ok=True)


def key_of(event: Event) -> tuple[str, str]:
    """What the event published: the identity of the checkpoint, and the settings as JSON."""
    return event.identity, event.settings or ""


def copied_events(state: State) -> list[Event]:
    """Returns the events of the versions that have a copy, oldest first."""
    versions = copied_versions(state)
    return state.published(f"version IN ({', '.join('?' * len(versions))})", versions)[::-1] if versions else []


def copies(state: State) -> dict[tuple[str, str], Path]:
    """Returns the paths of the copies, by the ``key_of`` their events."""
    return {key_of(event): copy_path(state, event.version) for event in copied_events(state) if event.identity}


def copy_path(state: State, version: int) -> Path:
    return state.copies / f"{version}.safetensors"


def copied_versions(state: State) -> list[int]:
    """Returns the versions that have a copy, lowest first."""
    return sorted(int(path.stem) for path in state.copies.glob("*.safetensors") if path.stem.isdigit())
