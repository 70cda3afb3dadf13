"""The state of a segment that survives a reboot: its history, its pin, its rejections and its last version number.

Each segment has an SQLite database under ``--state-dir``, private to its user. It is opened only to write or look up
something: importing SQLite takes 10 of the 100 ms that a push with nothing to do may take. The pin, which every pass
reads, is a small file beside the database.

A policy stays in step without this state: if it cannot be written, the pass says so and goes on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import StateError, UsageError
from ..segment.publication import END_OF_TIME, MAX_VERSION, Version
from ..system.access import check_name
from .pins import PinFile

if TYPE_CHECKING:
    import sqlite3

    from .sqlite_file import Storage

T = TypeVar("T")

KINDS = ("publish", "reject", "rollback", "pin", "unpin", "gate", "failure")
_PUBLISHED = "kind IN ('publish', 'rollback')"
_UNBOUNDED = 1 << 40


@dataclass(frozen=True, slots=True)
class Event(Version):
    """One line of the history.

    Attributes:
        version: the live one afterwards; of a gate, the number that the weights would get; of a pin, what was pinned, 0
            if it was not live.
        at: seconds since the epoch.
        kind: one of ``KINDS``.
        bytes: size of the weights that were published.
        seconds: how long the publish took.
        lag: how many versions the slowest reader was behind.
        settings: the settings of fit and extras, as JSON, with which a rollback publishes the file again.
        changed_ns: newest change time of the checkpoint's files, in ns; 0 or None if unknown.
    """

    id: int
    at: float
    kind: str
    _: KW_ONLY
    bytes: int | None = None
    seconds: float | None = None
    lag: int | None = None
    reason: str | None = None
    settings: str | None = None
    changed_ns: int | None = None

    @property
    def version_then(self) -> int | None:
        """The version to show; None if the event is about a pin of something that was not live."""
        return None if self.kind in ("pin", "unpin") and not self.version else self.version

    @classmethod
    def checked(cls, row: Sequence[Any]) -> Event:
        """Builds an event from a row; raises ValueError or TypeError if ``record`` cannot have written the row."""
        kinds = int, float, str, *_COLUMNS.values()
        if not all(isinstance(value, kind) for value, kind in zip(row, kinds, strict=True)):
            raise TypeError("a value of an event has the wrong type")
        known = {name: value for name, value in zip(_COLUMNS, row[3:], strict=True) if value is not None}
        event = cls(*row[:3], **known)
        if not (0 <= event.at < END_OF_TIME and event.kind in KINDS):
            raise ValueError("an event has an impossible time or an unknown kind")
        if not (0 <= event.version < MAX_VERSION and abs(event.lag or 0) < MAX_VERSION):
            raise ValueError("an event has an impossible version or lag")
        if event.settings is not None and not isinstance(json.loads(event.settings), dict):
            raise TypeError("an event's settings are not a table")
        return event


_COLUMNS = {
    "version": int | None,
    "step": int | None,
    "checkpoint": str | None,
    "identity": str | None,
    "bytes": int | None,
    "seconds": int | float | None,
    "lag": int | None,
    "reason": str | None,
    "settings": str | None,
    "changed_ns": int | None,
}
"""The columns after id, at and kind, with the types of their values."""

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, {", ".join(_COLUMNS)});
DROP INDEX IF EXISTS by_kind;
CREATE INDEX IF NOT EXISTS published_by_version ON events (version) WHERE {_PUBLISHED};
CREATE INDEX IF NOT EXISTS published_by_identity ON events (identity) WHERE {_PUBLISHED};
CREATE INDEX IF NOT EXISTS by_checkpoint ON events (checkpoint);
CREATE TABLE IF NOT EXISTS rejections (
    identity TEXT NOT NULL, settings TEXT NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (identity, settings));
"""
_UPGRADE = "ALTER TABLE events ADD COLUMN changed_ns INTEGER"


def _warn(exc: StateError) -> None:
    import logging  # here, because a push with nothing to say does not need it

    logging.getLogger("wsync").warning("%s", exc)


def _text(value: Any) -> Any:
    """Escapes the bytes of a file name that are not UTF-8, which SQLite refuses; other values stay as they are."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def state_dir(path: str | os.PathLike[str] | None = None) -> Path:
    """Returns ``path``, else ``WSYNC_STATE_DIR``, else ``/var/lib/wsync`` for root, else ``$XDG_STATE_HOME/wsync``.

    Raises:
        UsageError: none of these is set, and this user has no home directory.
    """
    chosen = path or os.environ.get("WSYNC_STATE_DIR")
    if not chosen:
        if os.geteuid() == 0:
            return Path("/var/lib/wsync")
        home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
        if home.startswith("~"):
            raise UsageError(
                "this user has no home directory for history and pins. Name a directory with "
                "--state-dir, or WSYNC_STATE_DIR."
            )
        chosen = Path(home) / "wsync"
    return Path(chosen).absolute()


class State:
    """Stores one segment's history, pin and rejections on disk; raises StateError.

    Args:
        name: of the segment.
        directory: see ``state_dir``.
        bound: how many publishes stay on record, and how many other events; default all.

    Attributes:
        pin_file: the segment's pin.
        warn: called when a damaged history was set aside; logs by default.
        trim: old events are deleted once in so many events.
        most_remembered: how many texts stay on record.

    Raises:
        UsageError: the name is not valid, or ``state_dir`` finds no directory.
    """

    def __init__(self, name: str, directory: str | os.PathLike[str] | None = None, bound: int = _UNBOUNDED) -> None:
        self.name, self._bound = check_name(name), bound
        self.trim, self.most_remembered = 100, 1_000
        self.directory = state_dir(directory)
        self.pin_file = PinFile(self.directory / f"{name}.pin", name)
        self._file = self.directory / f"{name}.sqlite"
        self._storage: Storage | None = None
        self.warn: Callable[[StateError], None] = _warn

    def __enter__(self) -> State:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._storage:
            self._storage.close()

    @property
    def copies(self) -> Path:
        """The directory of the copies of published weights."""
        return self.directory / f"{self.name}.kept"

    # --- the history

    def record(self, kind: str, about: Version | None = None, /, *, accepted: str | None = None, **more: Any) -> None:
        """Adds an event.

        Args:
            about: what the event is about, such as a pin or an outcome; the event takes every field that both have.
            accepted: the scope in which the text about this checkpoint, why it was rejected, is removed.
            more: fields of the event, which override those of ``about``.
        """
        found = {name: more.get(name) if name in more else getattr(about, name, None) for name in _COLUMNS}
        row = {name: _text(value) for name, value in found.items() if value is not None}
        marks = ", ".join("?" * (len(row) + 2))
        values = time.time(), kind, *row.values()

        def add(database: sqlite3.Connection) -> None:
            insert = f"INSERT INTO events ({', '.join(['at', 'kind', *row])}) VALUES ({marks})"
            added = database.execute(insert, values).lastrowid or 0
            if not added % self.trim:  # repeated failures must not push out what a rollback needs
                database.execute(f"DELETE FROM events WHERE id <= ? AND NOT {_PUBLISHED}", (added - self._bound,))
                last = f"SELECT id FROM events WHERE {_PUBLISHED} ORDER BY id DESC LIMIT 1 OFFSET ?"
                database.execute(f"DELETE FROM events WHERE {_PUBLISHED} AND id <= ({last})", (self._bound,))
            if accepted is not None:
                database.execute(
                    "DELETE FROM rejections WHERE identity = ? AND settings = ?", (found["identity"], accepted)
                )

        self._write(add)

    def events(
        self, *, kinds: Iterable[str] = (), since: float = 0.0, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """Returns the last ``limit`` events, oldest first.

        Args:
            kinds: only events of these kinds; empty for all.
            since: only events from this time on, in seconds since the epoch.
            after: only events with a higher id than this.
        """
        wanted = tuple(kinds) or KINDS
        condition = f"at >= ? AND id > ? AND kind IN ({', '.join('?' * len(wanted))})"
        return self._select(condition, (since, after, *wanted), -1 if limit is None else limit)[::-1]

    def published(self, condition: str = "TRUE", values: Sequence[object] = (), limit: int = -1) -> list[Event]:
        """Returns publishes and rollbacks, newest first.

        Args:
            condition: SQL about the columns of an event; ``version`` and ``identity`` have indexes.
            values: one for each ``?`` in the condition.
            limit: how many events at most; -1 for all.
        """
        return self._select(f"{_PUBLISHED} AND {condition}", values, limit)

    def _select(self, condition: str, values: Sequence[object], limit: int) -> list[Event]:
        """Returns the events that meet a condition, newest first."""
        query = f"SELECT id, at, kind, {', '.join(_COLUMNS)} FROM events WHERE {condition} ORDER BY id DESC LIMIT ?"
        found = self._read(lambda database: [Event.checked(row) for row in database.execute(query, (*values, limit))])
        return found or []

    def last(self) -> tuple[int, str]:
        """Returns the highest version ever published under this name, or 0, and the identity of its checkpoint."""
        found = self.published(f"version = (SELECT max(version) FROM events WHERE {_PUBLISHED})", limit=1)
        return (found[0].version, found[0].identity) if found else (0, "")

    def published_from(self, checkpoint: str) -> list[str]:
        """Returns the identity with which a path was last published; an empty list if it never was."""
        found = self._select("kind = 'publish' AND checkpoint = ?", (_text(checkpoint),), 1)
        return [event.identity for event in found]

    def changed_ns(self, identity: str, until: int = sys.maxsize) -> int:
        """Returns ``changed_ns`` of the last publish of this identity; 0 if that is not on record.

        Args:
            until: events with a higher id are ignored.
        """
        found = self.published("identity = ? AND changed_ns > 0 AND id <= ?", (identity, until), 1)
        return found[0].changed_ns or 0 if found else 0

    def touched(self, version: int, changed_ns: int) -> None:
        """Records a later change time of a version's files, whose bytes are still the same."""
        values = changed_ns, version
        change = f"UPDATE events SET changed_ns = ? WHERE {_PUBLISHED} AND version = ?"
        self._write(lambda database: database.execute(change, values))

    # --- texts about checkpoints, such as why one was rejected

    def remember(self, scope: str, identity: str, text: str) -> None:
        """Remembers a text about a checkpoint; it replaces an earlier one of the same scope.

        Args:
            scope: where the text holds, such as the digest of the settings under which the checkpoint was rejected.
        """
        values = identity, scope, _text(text), time.time()

        def add(database: sqlite3.Connection) -> None:
            database.execute("REPLACE INTO rejections VALUES (?, ?, ?, ?)", values)
            database.execute(
                "DELETE FROM rejections WHERE at < (SELECT at FROM rejections ORDER BY at DESC LIMIT 1 OFFSET ?)",
                (self.most_remembered,),
            )

        self._write(add)

    def remembered(self, scope: str) -> Mapping[str, str]:
        """Returns the texts of a scope, by identity."""

        def look(database: sqlite3.Connection) -> dict[str, str]:
            rows = database.execute("SELECT identity, reason FROM rejections WHERE settings = ?", (scope,)).fetchall()
            if not all(isinstance(text, str) for row in rows for text in row):
                raise TypeError("a rejection is not text")
            return dict(rows)

        return self._read(look) or {}

    # --- the files

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Runs the work on the database, and returns its result; None if there is no database."""
        try:
            there = self._file.exists()
        except OSError as exc:  # this user may not enter the directory
            raise self._failed(exc) from exc
        return self._do(lambda storage: storage.read(work)) if there else None

    def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs the work in a transaction on the database, which is made if it is missing."""
        return self._do(lambda storage: storage.write(work))

    def _do(self, work: Callable[[Storage], T]) -> T:
        try:
            from .sqlite_file import ERRORS, Storage
        except (ImportError, OSError) as exc:  # Python lacks SQLite, or memory or descriptors ran out
            raise self._failed(exc) from exc
        try:
            self._storage = self._storage or Storage(self._file, _SCHEMA, _UPGRADE, self._tell_damage)
            return work(self._storage)
        except ERRORS as exc:
            raise self._failed(exc) from exc

    def _tell_damage(self, what: str) -> None:
        self.warn(StateError(f"the history of {self.name!r} {what}. A new one begins. Check the disk."))

    def _failed(self, exc: Exception) -> StateError:
        return StateError(
            f"the history of {self.name!r} in {self.directory} cannot be kept ({exc}). Give this user access or make "
            "room, or name another directory with --state-dir; a broken database can be removed."
        )
