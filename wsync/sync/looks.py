"""The checks that a pass repeats under the publisher's lock, because it may have begun minutes ago."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import RetryLater
from ..history.outcome import Outcome
from ..segment.publisher import Gate, Staged
from .choosing import Choice
from .passes import Pass

if TYPE_CHECKING:
    from .box import Box


@dataclass(frozen=True, slots=True)
class Look:
    """The looks of one publish.

    Attributes:
        before: called before a byte is staged, with what is live by now; an outcome from it ends the pass.
        staged: called when the weights are staged and checked; what it raises leaves them unpublished.
    """

    before: Callable[[Pass], Outcome | None] | None = None
    staged: Gate | None = None


NO_LOOK = Look()
"""For a pin: the operator has decided, and no gate is asked."""


def second_look(box: Box, this: Pass, identity: str, choose: Callable[[Pass], Choice]) -> Look:
    """The looks before the newest checkpoint goes live.

    Args:
        this: the pass as it began.
        identity: of the checkpoint.
        choose: chooses once more.
    """

    def before(now: Pass) -> Outcome | None:
        if now.live == this.live:
            return None
        choice = choose(now)  # another publisher was faster, maybe with this very checkpoint
        if choice.pin:
            return now.pinned(choice.pin)
        return None if identity in {each.identity for each in choice.todo} else now.standing("current")

    def staged(weights: Staged) -> None:
        if box.spec.hooks.gate:
            box.ask_gate(weights)
        if pin := box.record.pin():
            raise RetryLater(
                f"{weights.checkpoint}: {pin.name} was pinned meanwhile. You need not do anything: the pin holds."
            )

    return Look(before, staged)
