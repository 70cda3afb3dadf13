"""Chooses what a pass tries: a pure function of the listing, the live version, the rejections and the pin."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from ..history.pins import Pin
from ..places.candidates import Candidate
from ..segment.files import Publication


class Choice(NamedTuple):
    """What a pass tries.

    Attributes:
        todo: candidates, newest first; the first one that can be published goes live.
        refused: the newest candidate, if it was refused before and is not tried again.
        pin: the pin that holds; no candidate is tried.
        late: what counts as older than what is live, and yet arrived after that.
        is_new_run: what is live is gone, and all that is there arrived after it.
    """

    todo: tuple[Candidate, ...] = ()
    refused: Candidate | None = None
    pin: Pin | None = None
    late: tuple[Candidate, ...] = ()
    is_new_run: bool = False


def choose(
    newer: Sequence[Candidate],
    live: Publication | None,
    refusals: Collection[str],
    pin: Pin | None,
    *,
    passed: Collection[str] = (),
    force: bool = False,
) -> Choice:
    """Chooses what a pass tries; nothing if what is live stays live.

    Args:
        newer: the candidates that are newer than what is live, newest first.
        refusals: identities of checkpoints that were refused before.
        passed: identities of those that are passed over without a word while something is live: each was told once.
        pin: the pin that holds; it comes before everything else.
        force: try refused candidates again.
    """
    if pin:
        return Choice(pin=pin)
    if force:
        return Choice(tuple(newer))
    todo = tuple(candidate for candidate in newer if candidate.identity not in refusals)
    first = next((candidate for candidate in newer if not live or candidate.identity not in passed), None)
    return Choice(todo, first if first and first.identity in refusals else None)
