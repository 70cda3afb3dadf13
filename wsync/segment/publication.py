"""What is live: the record of a version, as the header of its slot holds it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from ..system.memory import PAGE

METADATA_END = 2 * PAGE  # of a slot: its header's metadata is padded to here
MAX_VERSION = 1 << 56  # the WORD has no room for more
_MOST_OF_AN_OWNER = 1500  # characters; longer ones are left out, so that there is room for the longest source
MAX_EXTRAS = 1 << 31  # bytes of the file beside a slot: the most that settings allow, and metadata
END_OF_TIME = 253_402_300_800.0  # the year 10000, which datetime cannot print


@contextmanager
def parsed() -> Iterator[None]:
    """Turns each error of reading wrong data into a ValueError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as exc:
        raise ValueError(f"{type(exc).__name__}: {exc!s:.100}") from exc


@dataclass(frozen=True, slots=True)
class Publication:
    """What the header of a slot says about the version in it.

    Attributes:
        version: the segment's counter.
        step: the producer's number, if it gave one.
        source: path of the checkpoint; empty for weights that came from memory.
        identity: the file's identity when it was read (see ``parts.identity``).
        published_at: seconds since the epoch.
        spec: fingerprint of the policy spec that it was published for.
        owner: that spec: the TOML's path, or the import string; empty for weights that came from memory.
        place: where the owner's checkpoints appear; empty if it has no place of its own.
        changed_ns: when the system last changed a file of the checkpoint before it was read; 0 if unknown.
        extras: bytes of the file beside the slot with what travels with the weights; 0 if there is none.
    """

    version: int
    step: int | None
    source: str
    identity: str
    published_at: float
    spec: str
    owner: str = ""
    place: str = ""
    changed_ns: int = 0
    extras: int = 0

    def to_metadata(self) -> dict[str, str]:
        told = {key: "" if value is None else str(value) for key, value in asdict(self).items()}
        return told if len(self.owner) + len(self.place) < _MOST_OF_AN_OWNER else told | {"owner": "", "place": ""}

    @classmethod
    def from_header(cls, header: bytes) -> Publication:
        """From the first ``METADATA_END`` bytes of a slot.

        Raises:
            ValueError: they do not describe a version.
        """
        with parsed():
            data = json.loads(header[8:].rstrip() + b"}")["__metadata__"]
            texts = {key: data[key] for key in ("source", "identity", "spec")}
            texts |= {key: data.get(key, "") for key in ("owner", "place")}
            found = cls(
                version=int(data["version"]),
                step=int(data["step"]) if data["step"] else None,
                published_at=float(data["published_at"]),
                changed_ns=int(data.get("changed_ns", 0)),
                extras=int(data.get("extras", 0)),
                **texts,
            )
            if not all(isinstance(text, str) for text in texts.values()):
                raise TypeError("a field is not a string")
            if not (0 <= found.version < MAX_VERSION and 0 <= found.published_at < END_OF_TIME):
                raise ValueError("a number is beyond its bounds")
            if not 0 <= found.extras <= MAX_EXTRAS:
                raise ValueError("its extras are beyond their bounds")
            return found
