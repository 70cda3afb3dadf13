"""The SQLite file of a history: written in transactions, set aside if damaged, and readable without write access.

This module imports SQLite, which takes 10 ms, so ``state`` imports it only to read or write something.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from ..system.access import opened

T = TypeVar("T")

PATIENCE = 10.0  # seconds to wait while another process writes to the database
ERRORS = (OSError, ValueError, TypeError, OverflowError, sqlite3.Error)
"""What reading or writing raises; only values that wsync never wrote cause the middle three."""

_NO_DAMAGE = {3, 5, 6, 7, 8, 9, 10, 13, 14, 15, 22, 23}
"""SQLite's codes for errors other than damage: permission, busy, locked, no memory, read-only, interrupted, disk I/O,
full, cannot open, locking protocol, no large files, not authorized (sqlite.org/rescode.html)."""


class Storage:
    """One database file, which the first write makes.

    Args:
        schema: statements that make the tables and indexes that are missing.
        upgrade: a statement that adds what a database of an older wsync lacks; it fails, harmlessly, on others.
        warn: called, when a damaged file was set aside, with a clause that says so.
    """

    def __init__(self, file: Path, schema: str, upgrade: str, warn: Callable[[str], None]) -> None:
        self._file, self._schema, self._upgrade, self._warn = file, schema, upgrade, warn
        self._connection: sqlite3.Connection | None = None
        self._opened: os.stat_result | None = None

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection:
            connection.close()

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Does work that only reads; on a copy if the file cannot be written, because SQLite also writes to read.

        Raises one of ``ERRORS`` if the file cannot be read.
        """
        try:
            return self.write(work)
        except ERRORS as exc:
            with suppress(*ERRORS):
                if self._file.is_file():
                    return self._read_copy(work)
            raise exc

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Does work in a transaction. A damaged file is set aside, and the work is done on a new one.

        Raises one of ``ERRORS`` if the work cannot be done.
        """
        try:
            try:
                return self._transact(work)
            except ERRORS as exc:
                if not _is_damage(exc):
                    raise
                self._set_aside(exc)
            return self._transact(work)
        except BaseException:  # even Ctrl-C: an interrupted connection may be inside a transaction
            self.close()
            raise

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._connection and not self._is_there():
            self.close()
        if self._connection is None:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with opened(os.open(self._file, flags, 0o600)) as fd:
                self._opened = os.fstat(fd)
            if not stat.S_ISREG(self._opened.st_mode):
                raise OSError(f"{self._file} is not a regular file")
            self._connection = sqlite3.connect(self._file, timeout=PATIENCE, check_same_thread=False)
            # While another process does the same, this fails at once as locked; what follows waits.
            with suppress(sqlite3.OperationalError):
                self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.executescript(self._schema)
            with suppress(sqlite3.OperationalError):
                self._connection.execute(self._upgrade)
        with self._connection as database:
            return work(database)

    def _is_there(self) -> bool:
        """Whether the open database is still the file at its path; SQLite would go on with a removed file."""
        try:
            return self._opened is not None and os.path.samestat(os.stat(self._file), self._opened)
        except OSError:
            return False

    def _set_aside(self, why: Exception) -> None:
        """Renames the damaged file, unless another process already did."""
        self.close()
        if self._is_there():
            for end in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.replace(f"{self._file}{end}", f"{self._file}.damaged{end}")
            self._warn(f"is damaged ({why!s:.200}), and was set aside as {self._file}.damaged")

    def _read_copy(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(directory, self._file.name)
            for end in ("", "-wal"):
                if end == "" or os.path.exists(f"{self._file}{end}"):
                    shutil.copyfile(f"{self._file}{end}", f"{copy}{end}")
            with closing(sqlite3.connect(copy)) as database:
                return work(database)


def _is_damage(exc: Exception) -> bool:
    """Whether an error means that the file is damaged: any but those of access and of the disk."""
    return not isinstance(exc, OSError) and getattr(exc, "sqlite_errorcode", 1) & 0xFF not in _NO_DAMAGE
