"""Choosing: what a pass tries, from what is listed, live, refused and pinned."""

from __future__ import annotations

import pytest

from wsync.discovery.newest import Candidate
from wsync.history.pins import Pin
from wsync.segment.publication import Publication
from wsync.sync.one_pass import Choice, choose

NEW, MIDDLE, OLD = (Candidate(f"/runs/step_{n}.safetensors", f"{n}-10-{n}", n) for n in (3, 2, 1))
LIVE = Publication(version=7, step=1, checkpoint="/runs/step_1.safetensors", identity=OLD.identity, spec="spec")
FROM_MEMORY = Publication(version=7, spec="spec")


def pin(identity: str, version: int = 0) -> Pin:
    checkpoint = "/runs/x.safetensors" if identity else None
    return Pin(checkpoint=checkpoint, identity=identity, version=version, since=0.0, reason="by hand")


@pytest.mark.parametrize(
    ("newer", "live", "refused", "held", "force", "choice"),
    [
        pytest.param((), LIVE, (), None, False, Choice(), id="nothing is newer"),
        pytest.param((), None, (), None, False, Choice(), id="nothing is there"),
        pytest.param((NEW, MIDDLE), LIVE, (), None, False, Choice((NEW, MIDDLE)), id="newest first"),
        pytest.param((NEW, MIDDLE), None, (), None, False, Choice((NEW, MIDDLE)), id="nothing is live"),
        pytest.param(
            (NEW, MIDDLE), LIVE, {NEW.identity}, None, False, Choice((MIDDLE,), NEW), id="the newest was refused"
        ),
        pytest.param((NEW, MIDDLE), LIVE, {MIDDLE.identity}, None, False, Choice((NEW,)), id="an older was refused"),
        pytest.param((NEW,), LIVE, {NEW.identity}, None, False, Choice((), NEW), id="all were refused"),
        pytest.param(
            (NEW,), LIVE, {OLD.identity}, None, False, Choice((NEW,)), id="one that is not listed was refused"
        ),
        pytest.param((NEW, OLD), LIVE, {NEW.identity}, None, True, Choice((NEW, OLD)), id="forced"),
        pytest.param((NEW,), LIVE, (), pin(MIDDLE.identity), True, Choice(pin=pin(MIDDLE.identity)), id="pinned"),
    ],
)
def test_what_a_pass_tries(
    newer: tuple[Candidate, ...],
    live: Publication | None,
    refused: set[str],
    held: Pin | None,
    force: bool,
    choice: Choice,
) -> None:
    """A pin comes first, then --force, then the newest candidates that were not refused."""
    assert choose(newer, live, refused, held, force=force) == choice


def test_a_pin_holds_what_it_names() -> None:
    """By its identity; weights from memory, which have none, by their version."""
    assert pin(OLD.identity).holds(LIVE) and not pin(MIDDLE.identity).holds(LIVE)
    assert pin("", 7).holds(FROM_MEMORY) and not pin("", 6).holds(FROM_MEMORY)
