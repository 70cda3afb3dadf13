"""A pin: the one checkpoint that an operator keeps live."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from ..errors import parsed
from ..segment.publication import Publication, Version

_TYPES = {"checkpoint": str | None, "identity": str, "version": int, "step": int | None}
_TYPES |= {"since": int | float, "reason": str, "header": str}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin(Version):
    """The one checkpoint that stays live; its version is 0 if it was not live when it was pinned.

    Attributes:
        since: seconds since the epoch.
        reason: who asked for it, in words.
        header: the digest of its headers, if it was opened to be pinned; otherwise empty.
    """

    since: float
    reason: str
    header: str = ""

    @property
    def name(self) -> str:
        """What is pinned, in words: its path, or its version if the weights came from memory."""
        return self.checkpoint or f"version {self.version}"

    def holds(self, live: Publication) -> bool:
        """Whether this is what is live."""
        return live.identity == self.identity and bool(self.identity or live.version == self.version)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Pin:
        """Reads a pin; raises ValueError if the text does not hold one."""
        with parsed():
            pin = cls(**json.loads(text))
            if not all(isinstance(getattr(pin, name), kind) for name, kind in _TYPES.items()):
                raise TypeError("a value is of another type")
            return pin
