"""Decides from the boxes' reports what a group must do: pure functions, with the same result on every box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Report:
    """What one box reports at the beginning of a round.

    Attributes:
        version: the live version; 0 if nothing is live.
        identity: identity of the checkpoint that it came from; empty for weights from memory.
        last: the highest version ever published there.
        last_identity: identity of the checkpoint that that version came from.
        ours: whether the live version came from this group, or went live while the box belonged to it.
        pin: name of the pinned checkpoint; empty if nothing is pinned.
        held: whether the pinned checkpoint is live.
        declined: identity of the group's live weights, if the box's gate refused them; else None.
        due: whether rank 0 should look for checkpoints now.
    """

    version: int = 0
    identity: str = ""
    last: int = 0
    last_identity: str = ""
    ours: bool = True
    pin: str = ""
    held: bool = False
    declined: str | None = None
    due: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """What must be done so that all boxes have the same version.

    Attributes:
        provider: rank of the box whose live weights go to others.
        takers: ranks of the boxes that publish them; the provider is one if it needs another number.
        version: the number that they publish them under.
        gated: whether the takers' gates are asked.
    """

    provider: int
    takers: frozenset[int]
    version: int
    gated: bool


def change_of(reports: Sequence[Report]) -> Change | None:
    """What must be done so that all boxes have the same version; None if they have, or those without it refused it.

    The provider is a box whose pin is live, else one whose weights came from the group, else any; of several, the one
    with the highest version, and of those with the same number, the one whose weights most boxes have.
    """

    def rank_of(rank: int) -> tuple[bool, bool, int, int, int]:
        report = reports[rank]
        same = sum((each.version, each.identity) == (report.version, report.identity) for each in reports)
        return report.held, report.ours, report.version, same, -rank

    live = [rank for rank, report in enumerate(reports) if report.version]
    if not live:
        return None
    provider = max(live, key=rank_of)
    top = reports[provider]
    willing = {
        rank for rank, report in enumerate(reports) if report.declined is None or report.declined != top.identity
    }
    same = {
        rank for rank, report in enumerate(reports) if (report.version, report.identity) == (top.version, top.identity)
    }
    behind = willing - same
    if not behind:
        return None
    version = top.version
    lasts = [(reports[rank].last, reports[rank].last_identity) for rank in behind]
    if any(last > version or (last == version and what != top.identity) for last, what in lasts):
        version, behind = max(report.last for report in reports) + 1, willing | {provider}
    return Change(provider, frozenset(behind), version, gated=not top.held)


def leader_of(reports: Sequence[Report]) -> int:
    """The rank that makes the pass: 0, or that of a box whose pin is not live anywhere yet."""
    if any(report.held for report in reports):
        return 0
    return next((rank for rank, report in enumerate(reports) if report.pin), 0)


def holder_of(reports: Sequence[Report]) -> int | None:
    """The rank of a box whose pin is live and so holds the group; None if there is no such box."""
    return next((rank for rank, report in enumerate(reports) if report.held), None)
