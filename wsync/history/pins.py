"""A pin: the one checkpoint that an operator keeps live."""

from __future__ import annotations

import json
from typing import NamedTuple

from ..segment.publication import Publication, parsed


class Pin(NamedTuple):
    """The one checkpoint that stays live.

    Attributes:
        checkpoint: its path.
        identity: of its files when it was pinned.
        version: its version when it was pinned; 0 if it was not live.
        step: the producer's number.
        since: seconds since the epoch.
        reason: who asked for it, in words.
        header: the digest of its headers, if it was opened to be pinned; otherwise empty.
    """

    checkpoint: str
    identity: str
    version: int
    step: int | None
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

    @classmethod
    def from_json(cls, text: bytes) -> Pin:
        """Reads a pin; raises ValueError if the text does not hold one."""
        with parsed():
            pin = cls(**json.loads(text))
            kinds = (str, str, int, int | None, int | float, str, str)
            if not all(isinstance(value, kind) for value, kind in zip(pin, kinds, strict=True)):
                raise TypeError("a value is of another type")
            return pin
