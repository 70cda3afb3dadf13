"""The record of a live version: which weights, under which number; and its form in the header of a slot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import parsed
from ..system.memory import PAGE

METADATA_END = 2 * PAGE  # bytes into a slot: its header's metadata is padded up to here
MAX_VERSION = 1 << 56  # the WORD has no room for more
_MOST_OF_AN_OWNER = 1500  # characters; longer ones are left out, so that there is room for the longest source
MAX_EXTRAS = 1 << 31  # bytes of a slot's extras file: room for the most that settings allow, and metadata
END_OF_TIME = 253_402_300_800.0  # the year 10000, which datetime cannot print


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """Which weights a record is about; the records of a publish, a pin and an event add their own fields.

    Attributes:
        version: the segment's counter; 0 before the first publish.
        step: the producer's number for the weights; None if it gave none.
        checkpoint: the path of the checkpoint; None for weights that came from memory.
        identity: of the checkpoint's files when they were read (see ``parts.identity``); empty for weights from memory.
    """

    version: int = 0
    step: int | None = None
    checkpoint: str | None = None
    identity: str = ""

    def which(self) -> dict[str, Any]:
        """These four fields, for another record about the same weights."""
        return {field.name: getattr(self, field.name) for field in fields(Version)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication(Version):
    """What the header of a slot says about the version in it.

    Attributes:
        published_at: seconds since the epoch.
        spec: fingerprint of the policy spec that it was published for.
        owner: that spec: the TOML's path, or the import string; empty for weights that came from memory.
        place: where the owner's checkpoints appear; empty if it has no place of its own.
        changed_ns: newest change time of the checkpoint's files before they were read, in ns; 0 if unknown.
        extras: size in bytes of the extras file beside the slot; 0 if there is no such file.
    """

    published_at: float = 0.0
    spec: str = ""
    owner: str = ""
    place: str = ""
    changed_ns: int = 0
    extras: int = 0

    def to_metadata(self) -> dict[str, str]:
        told = {key: "" if value is None else str(value) for key, value in asdict(self).items()}
        told["source"] = told.pop("checkpoint")
        return told if len(self.owner) + len(self.place) < _MOST_OF_AN_OWNER else told | {"owner": "", "place": ""}

    @classmethod
    def from_header(cls, header: bytes) -> Publication:
        """Reads the first ``METADATA_END`` bytes of a slot.

        Raises:
            ValueError: they do not describe a version.
        """
        with parsed():
            data = json.loads(header[8:].rstrip() + b"}")["__metadata__"]
            texts = {key: data[key] for key in ("identity", "spec")}
            texts |= {key: data.get(key, "") for key in ("owner", "place")}
            found = cls(
                checkpoint=data["source"] or None,
                version=int(data["version"]),
                step=int(data["step"]) if data["step"] else None,
                published_at=float(data["published_at"]),
                changed_ns=int(data.get("changed_ns", 0)),
                extras=int(data.get("extras", 0)),
                **texts,
            )
            if not all(isinstance(text, str) for text in (data["source"], *texts.values())):
                raise TypeError("a field is not a string")
            if not (0 <= found.version < MAX_VERSION and 0 <= found.published_at < END_OF_TIME):
                raise ValueError("a number is beyond its bounds")
            if not 0 <= found.extras <= MAX_EXTRAS:
                raise ValueError("its extras are beyond their bounds")
            return found
