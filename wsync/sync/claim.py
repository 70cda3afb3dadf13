"""Says whose versions a spec may replace: its own, and those without an owner.

Two specs of one name share a segment without knowing it (``runA/policy.toml`` and ``runB/policy.toml``), and each would
undo what the other publishes. So a version carries its owner, the spec, and the owner's place of checkpoints.
"""

from __future__ import annotations

import os

from ..errors import UsageError
from ..places.weight_getter import CheckpointWeightGetter
from ..segment.files import Publication


class Claim:
    """What one spec may replace.

    Args:
        name: of the segment.
        owner: the spec; empty makes no claim, and heeds none.

    Attributes:
        take_over: the next publish may replace another owner's version.
        one_shot: a single push, which may name a checkpoint from elsewhere.
    """

    def __init__(self, name: str, owner: str) -> None:
        self._name, self._owner, self._place = name, owner, ""
        self._getter: CheckpointWeightGetter | None = None
        self._own = False
        self.take_over, self.one_shot = False, True

    def follow(self, getter: CheckpointWeightGetter, *, own: bool) -> None:
        """Its checkpoints come from there.

        Args:
            own: the spec itself says so, and not its caller: then the spec may name another place than it once did.
        """
        self._getter, self._place, self._own = getter, str(getter.checkpoints), own

    def is_foreign(self, live: Publication | None) -> bool:
        """Whether what is live is another owner's, so that nothing here is older or newer than it."""
        if live is None or not live.owner or not self._owner:
            return False
        if not _same(live.owner, self._owner):
            return True
        return bool(live.place) and not self._own and not _same(live.place, self._place) and not self._is_named()

    def origin(self, live: Publication | None) -> tuple[str, str]:
        """Owner and place to record with the version that comes after what is live.

        Raises:
            UsageError: what is live is another owner's.
        """
        if live and self.is_foreign(live) and not self.take_over:
            raise UsageError(
                f"version {live.version} of segment {self._name!r} came from {live.owner} (checkpoints in "
                f"{live.place or 'no directory'}), and this is {self._owner} (checkpoints in {self._place}). "
                "Give this one another --name, or take the segment over for good with --take-over."
            )
        if not self._is_named():
            return self._owner, self._place
        ours = live and _same(live.owner, self._owner)
        return self._owner, live.place if live and ours else ""  # one checkpoint changes nobody's place

    def _is_named(self) -> bool:
        """Whether this is a push of one checkpoint, and not of a place where they appear."""
        return self.one_shot and self._getter is not None and self._getter.is_one_checkpoint()


def _same(one: str, other: str) -> bool:
    return one == other or (os.path.isabs(one) and os.path.realpath(one) == os.path.realpath(other))
