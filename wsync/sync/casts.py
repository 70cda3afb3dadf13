"""Reports each dtype conversion once, and each missing tensor that got the policy's own value."""

from __future__ import annotations

from ..checkpoints.checkpoint import Checkpoint


class Casts:
    """What was told."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def new(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """A line for what is new in the plan of a checkpoint, and the same for several tensors."""
        groups: dict[str, list[str]] = {}
        if plan := checkpoint.planned:
            said = [(stored.name, f"cast from {stored.dtype} to {entry.dtype}") for stored, entry in plan.conversions]
            said += [
                (entry.name, "missing from the checkpoint, with the values of the policy when it is built")
                for entry in plan.built
            ]
            for name, words in said:
                if (name, words) not in self._told:
                    self._told.add((name, words))
                    groups.setdefault(words, []).append(name)
        return tuple(
            f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {words}: "
            + ", ".join(names[:5])
            + (", …" if len(names) > 5 else "")
            for words, names in groups.items()
        )
