"""Tells of each conversion of a dtype once."""

from __future__ import annotations

from ..checkpoints.checkpoint import Checkpoint


class Casts:
    """The conversions that were told of."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str, str]] = set()

    def new(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """A line for the new conversions of a planned checkpoint between the same two dtypes."""
        groups: dict[str, list[str]] = {}
        for stored, entry in checkpoint.planned.conversions if checkpoint.planned else ():
            if (cast := (stored.name, stored.dtype, entry.dtype)) not in self._told:
                self._told.add(cast)
                groups.setdefault(f"{stored.dtype} to {entry.dtype}", []).append(stored.name)
        return tuple(
            f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} cast from {dtypes}: "
            + ", ".join(names[:5])
            + (", …" if len(names) > 5 else "")
            for dtypes, names in groups.items()
        )
