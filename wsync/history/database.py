"""What outlives a reboot: the history of a segment, its pin, what was rejected, and the last version's number.

One SQLite database a segment, under ``--state-dir``, private to its user, opened only where there is something to
write or to look up: its import alone takes 10 ms of the hundred that a push with nothing to do may take. The pin, which
each pass has to know, is a small file beside it that is replaced whole.

Nothing of this is needed to keep a policy in step: where the state cannot be written the pass goes on, and says so.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import StateError, UsageError
from ..segment.access import check_name
from ..segment.files import parsed

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

    from ..segment.files import Publication

KINDS = ("publish", "reject", "rollback", "pin", "unpin", "gate", "failure")
_PUBLISHED = "kind IN ('publish', 'rollback')"
_KEEP_EVENTS = 100_000  # of what went live, and as many of all else; 30 MB each, at one a minute in two months
_TRIM = 100  # events, of which one looks whether there are too many
_KEEP_REJECTIONS = 1_000
_PATIENCE = 10.0  # seconds that another process may be at work on the database


@dataclass(frozen=True, slots=True)
class Pin:
    """The one checkpoint that stays live.

    Attributes:
        checkpoint: its path.
        identity: of its files when it was pinned.
        version: under which it was live then; 0 where it was not.
        step: the producer's number.
        since: seconds since the epoch.
        reason: who asked for it, in words.
    """

    checkpoint: str
    identity: str
    version: int
    step: int | None
    since: float
    reason: str

    @property
    def name(self) -> str:
        """What is pinned, in words: its path, or the version of weights that came from memory."""
        return self.checkpoint or f"version {self.version}"

    def holds(self, live: Publication) -> bool:
        """Whether this is what is live."""
        return live.identity == self.identity and bool(self.identity or live.version == self.version)

    @classmethod
    def from_json(cls, text: bytes) -> Pin:
        """Raises ValueError where this is no pin."""
        with parsed():
            pin = cls(**json.loads(text))
            kinds = (str, str, int, int | None, int | float, str)
            if not all(isinstance(value, kind) for value, kind in zip(astuple(pin), kinds, strict=True)):
                raise TypeError("a value is of another type")
            return pin


class Event(NamedTuple):
    """One line of the history.

    Attributes:
        at: seconds since the epoch.
        kind: one of ``KINDS``.
        version: that was live afterwards.
        lag: of the slowest reader at that moment, versions.
        settings: of the fit, by which a rollback publishes the file again; JSON.
    """

    id: int
    at: float
    kind: str
    version: int | None = None
    step: int | None = None
    checkpoint: str | None = None
    identity: str | None = None
    bytes: int | None = None
    seconds: float | None = None
    lag: int | None = None
    reason: str | None = None
    settings: str | None = None


_FIELDS = Event._fields[3:]  # without id, at and kind
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, {", ".join(_FIELDS)});
CREATE INDEX IF NOT EXISTS by_kind ON events (kind, version);
CREATE TABLE IF NOT EXISTS rejections (
    identity TEXT NOT NULL, settings TEXT NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (identity, settings));
"""


def _text(value: Any) -> Any:
    """A text as the database takes it: a file name that is no UTF-8 with its odd bytes escaped."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def state_dir(path: str | os.PathLike[str] | None = None) -> Path:
    """``path``, else ``WSYNC_STATE_DIR``, else ``/var/lib/wsync`` for root, else ``$XDG_STATE_HOME/wsync``.

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
                "this user has no home directory in which history and pins could be kept. Name a place with "
                "--state-dir, or WSYNC_STATE_DIR."
            )
        chosen = Path(home) / "wsync"
    return Path(chosen).absolute()


class State:
    """The record of one segment.

    Args:
        name: of the segment.
        directory: default ``state_dir()``.

    Raises:
        UsageError: that is no name.
    """

    def __init__(self, name: str, directory: str | os.PathLike[str] | None = None) -> None:
        self.name = check_name(name)
        self.directory = state_dir(directory)
        self._pin_file = self.directory / f"{name}.pin"
        self._file = self.directory / f"{name}.sqlite"
        self._connection: sqlite3.Connection | None = None
        self._opened: os.stat_result | None = None

    def __enter__(self) -> State:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection:
            connection.close()

    @property
    def kept(self) -> Path:
        """Where copies of published weights lie."""
        return self.directory / f"{self.name}.kept"

    # --- the pin

    def pin(self) -> Pin | None:
        """The pin that holds, or None.

        Raises:
            StateError: it cannot be read; taking it for none would let go what the operator holds.
        """
        try:
            return Pin.from_json(self._pin_file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as exc:
            raise StateError(
                f"the pin of {self.name!r} in {self._pin_file} cannot be read ({exc}). Mend its access, or remove it "
                f"with `wsync unpin {self.name}`."
            ) from exc

    def set_pin(self, pin: Pin | None) -> None:
        """Replaces the pin; None lets go.

        Raises:
            StateError: it cannot be written.
        """
        try:
            if pin is None:
                self._pin_file.unlink(missing_ok=True)
                return
            self._make()
            temporary = self._pin_file.with_suffix(f".pin.{os.getpid()}.tmp")
            try:
                with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                    json.dump(asdict(pin), file)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self._pin_file)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as exc:
            raise self._failed(exc) from exc

    # --- the history

    def record(self, kind: str, /, *, accepted: str | None = None, **fields: Any) -> None:
        """Adds an event.

        Args:
            fields: those of an ``Event``; what else a record of the same has is passed over.
            accepted: under these settings this checkpoint is rejected no more.

        Raises:
            StateError: it cannot be written.
        """
        columns = [name for name in _FIELDS if fields.get(name) is not None]
        marks = ", ".join("?" * (len(columns) + 2))
        with self._database() as database:
            added = database.execute(
                f"INSERT INTO events ({', '.join(['at', 'kind', *columns])}) VALUES ({marks})",
                (time.time(), kind, *(_text(fields[name]) for name in columns)),
            ).lastrowid
            assert added
            if not added % _TRIM:  # what fails again and again pushes nothing out that a rollback needs
                database.execute(f"DELETE FROM events WHERE id <= ? AND NOT {_PUBLISHED}", (added - _KEEP_EVENTS,))
                last = f"SELECT id FROM events WHERE {_PUBLISHED} ORDER BY id DESC LIMIT 1 OFFSET ?"
                database.execute(f"DELETE FROM events WHERE {_PUBLISHED} AND id <= ({last})", (_KEEP_EVENTS,))
            if accepted is not None:
                database.execute(
                    "DELETE FROM rejections WHERE identity = ? AND settings = ?", (fields.get("identity"), accepted)
                )

    def events(
        self, *, kinds: Iterable[str] = (), since: float = 0.0, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """The history, oldest first; the last ``limit`` of it.

        Args:
            kinds: only these; empty takes all.
            since: only what came later, seconds since the epoch.
            after: only what came after the event of this id.
        """
        if not self._file.exists():
            return []
        wanted = tuple(kinds) or KINDS
        query = (
            f"SELECT id, at, kind, {', '.join(_FIELDS)} FROM events WHERE at >= ? AND id > ? "
            f"AND kind IN ({', '.join('?' * len(wanted))}) ORDER BY id DESC LIMIT ?"
        )
        with self._database() as database:
            rows = database.execute(query, (since, after, *wanted, -1 if limit is None else limit)).fetchall()
        return [Event(*row) for row in reversed(rows)]

    def last(self) -> tuple[int, str]:
        """The highest version ever published under this name, 0 before the first, and its checkpoint's identity."""
        if not self._file.exists():
            return 0, ""
        with self._database() as database:
            row = database.execute(f"SELECT max(version), identity FROM events WHERE {_PUBLISHED}").fetchone()
        return row[0] or 0, row[1] or ""

    # --- what was rejected

    def reject(self, identity: str, settings: str, reason: str) -> None:
        """Remembers a rejection, as long as neither the file nor the settings change."""
        with self._database() as database:
            database.execute(
                "REPLACE INTO rejections VALUES (?, ?, ?, ?)", (identity, settings, _text(reason), time.time())
            )
            database.execute(
                "DELETE FROM rejections WHERE at < (SELECT at FROM rejections ORDER BY at DESC LIMIT 1 OFFSET ?)",
                (_KEEP_REJECTIONS,),
            )

    def rejections(self, settings: str) -> Mapping[str, str]:
        """Identity to reason of what was rejected under these settings."""
        if not self._file.exists():
            return {}
        with self._database() as database:
            rows = database.execute("SELECT identity, reason FROM rejections WHERE settings = ?", (settings,))
            return dict(rows.fetchall())

    # --- the files

    def _make(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A transaction on the database, which is made where there is none."""
        try:
            import sqlite3
        except ImportError as exc:  # a Python without it, or no memory left to load it
            raise self._failed(exc) from exc
        try:
            if self._connection and not self._is_there():
                self.close()
            if self._connection is None:
                self._make()
                fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                self._opened = os.fstat(fd)
                os.close(fd)
                self._connection = sqlite3.connect(self._file, timeout=_PATIENCE, check_same_thread=False)
                # Where another process just makes it so, SQLite says at once that it is locked, and all below waits.
                with suppress(sqlite3.OperationalError):
                    self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = NORMAL")
                self._connection.executescript(_SCHEMA)
            with self._connection as database:
                yield database
        except (OSError, sqlite3.Error) as exc:
            self.close()
            raise self._failed(exc) from exc

    def _is_there(self) -> bool:
        """Whether the open database is still the file of that name: SQLite goes on with one that was removed."""
        try:
            return self._opened is not None and os.path.samestat(os.stat(self._file), self._opened)
        except OSError:
            return False

    def _failed(self, exc: Exception) -> StateError:
        return StateError(
            f"the history of {self.name!r} in {self.directory} cannot be kept ({exc}). Mend its access or make room, "
            "or name another place with --state-dir; a broken database can be removed."
        )
