"""A pin, the one checkpoint that an operator keeps live, and the file that holds it."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import StateError, parsed
from ..segment.publication import Publication, Version
from ..system.access import opened
from ..system.memory import read_at

_MOST = 1_000_000  # bytes that are read of a pin file
_TYPES = {"checkpoint": str | None, "identity": str, "version": int, "step": int | None}
_TYPES |= {"since": int | float, "reason": str, "header": str}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin(Version):
    """The one checkpoint that stays live.

    Attributes:
        version: the checkpoint's version when it was pinned; 0 if it was not live.
        since: when it was pinned, in seconds since the epoch.
        reason: why it was pinned, in words.
        header: the digest of its headers; empty if the checkpoint was not opened to pin it.
    """

    since: float
    reason: str
    header: str = ""

    @property
    def name(self) -> str:
        """What is pinned, in words: the path, or the version if the weights came from memory."""
        return self.checkpoint or f"version {self.version}"

    def holds(self, live: Publication) -> bool:
        """Whether the live weights are the pinned ones."""
        return live.identity == self.identity and bool(self.identity or live.version == self.version)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Pin:
        """Reads a pin; raises ValueError if the text does not hold one."""
        with parsed():
            pin = cls(**json.loads(text))
            if not all(isinstance(getattr(pin, name), kind) for name, kind in _TYPES.items()):
                raise TypeError("a value has the wrong type")
            return pin


class PinFile:
    """The file that holds a segment's pin; each write replaces it as a whole."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def read(self) -> Pin | None:
        """Returns the pin, or None; also None if this user may not enter the directory, and so cannot have set one.

        Raises:
            StateError: the pin cannot be read. Ignoring it would replace what the operator keeps live.
        """
        try:
            with opened(os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as fd:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise ValueError("it is not a regular file")
                return Pin.from_json(read_at(fd, _MOST, 0))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as exc:
            if isinstance(exc, PermissionError) and not os.access(self._path.parent, os.X_OK):
                return None
            raise StateError(
                f"the pin of {self._name!r} in {self._path} cannot be read ({exc}). Make it readable, or remove it "
                f"with `wsync unpin {self._name}`."
            ) from exc

    def write(self, pin: Pin | None) -> None:
        """Replaces the pin; None removes it.

        Raises:
            StateError: the file cannot be written or removed.
        """
        temporary = self._path.with_suffix(f".pin.{os.getpid()}.tmp")
        try:
            if pin is None:
                self._path.unlink(missing_ok=True)
                return
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                    file.write(pin.to_json())
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as exc:
            raise StateError(
                f"the pin of {self._name!r} cannot be written to {self._path} ({exc}). Give this user access or make "
                "room, or name another directory with --state-dir."
            ) from exc
