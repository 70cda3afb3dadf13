"""Whether a push was made beside a watch that will undo it."""

from __future__ import annotations

from ..errors import CheckpointError
from ..history.outcome import Outcome
from ..places.weight_getter import CheckpointWeightGetter, place_of
from ..segment.watching import watch_of
from .syncer import Syncer


def undone_by(syncer: Syncer, outcome: Outcome) -> str:
    """Says which watch replaces what was just published, and how to keep it; empty where none does."""
    segment = syncer.updater.opened
    watch = watch_of(segment) if segment and outcome.status == "published" else None
    if not segment or not watch or outcome.pin:
        return ""
    live = segment.live()
    if live and live.version == outcome.version:
        try:
            if not CheckpointWeightGetter(watch.place, select=syncer.spec.select).candidates(place_of(live)):
                return ""
        except CheckpointError:  # nobody can tell what the watch will find
            pass
    return (
        f"{watch} keeps this segment in step, and will replace version {outcome.version} in one of its next passes. "
        f"`wsync pin {outcome.name}` keeps the live version, `wsync rollback {outcome.name} --to {outcome.version}` "
        "what was just published."
    )
