"""Rolls back: puts an earlier version live again, under a new number, and pins it. Also pins and unpins by hand.

The weights come from the quickest source: a spare slot that still holds them, which only gets a new header; a kept
copy; or the original file, if it has not changed.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import ExitStack, closing
from typing import Any

from ..checkpoints.files.parts import led_to, place_at
from ..discovery.identity import changed_since, is_same
from ..discovery.newest import Select
from ..errors import NoCheckpoint, SegmentBusy, SegmentMissing, StateError, UsageError, printable
from ..segment.publication import Publication, Version
from ..segment.publishing import publish, publish_again
from ..segment.segment import Segment
from ..segment.writable import WritableSegment
from .copies import copied_events, copies, key_of
from .pins import Pin
from .reopening import IN_NO_FILE, NO_COPY, extras_from_json, fit_from_json, gone_or_changed, reopen
from .state import Event, State

_log = logging.getLogger("wsync")
_LOOK = 0.05  # seconds between two tries to take the publisher's lock
_LOOKED_AT = 1_000  # events whose files are looked for, to list what can be put live
_SHOWN = 10


def rollback(
    name: str, to: int | None = None, *, runtime: str | os.PathLike[str] | None, state: State, patience: float = 3.0
) -> tuple[Publication, Pin, int]:
    """Publishes an earlier version again and pins it.

    Args:
        to: the version; None for the newest one before the live version that has other weights.
        patience: seconds to wait for another publisher.

    Returns:
        What is live now, its pin, and the earlier version's number.

    Raises:
        UsageError: the version is not on record; or nothing is live, and no version was named.
        NoCheckpoint: its weights are gone; the message lists the versions that can be put live.
        SegmentMissing: there is no segment.
        SegmentBusy: another publisher is at work, or readers hold every spare slot.
        StateError: the history cannot be read, or the pin cannot be read or written; nothing was published.
    """
    with ExitStack() as stack:
        segment = stack.enter_context(closing(WritableSegment.open(name, runtime)))
        _begin_publishing(segment, stack, patience)
        live = segment.live()
        event = _target(state, live, to)
        before = state.pin_file.read()
        last = live.version if live else state.last()[0]
        why = f"rollback from version {last} to {event.version}"
        pin = Pin(**{**event.which(), "version": last + 1}, since=time.time(), reason=why)
        state.pin_file.write(pin)  # before the publish: a watch must not publish the newest in between
        try:
            publication = _again(segment, last, event, state)
        except BaseException:  # even Ctrl-C: nothing went live, so the earlier pin stays, or a later one
            if state.pin_file.read() == pin:
                state.pin_file.write(before)
            raise
        seconds = round(time.time() - pin.since, 6)
        more = {"bytes": segment.layout.nbytes, "seconds": seconds, "settings": event.settings}
        _note(state, "rollback", pin, **more)
        return publication, pin, event.version


def _begin_publishing(segment: WritableSegment, stack: ExitStack, patience: float) -> None:
    """Takes the publisher's lock; waits up to ``patience`` seconds, because a watch holds the lock while it stages."""
    deadline = time.monotonic() + patience
    while True:
        try:
            stack.enter_context(segment.publishing())
            return
        except SegmentBusy:
            if time.monotonic() > deadline:
                raise
        time.sleep(_LOOK)


def _note(state: State, kind: str, about: Version | None, **more: Any) -> None:
    """Adds an event. A failure is only a warning, because what the operator asked for is already done."""
    try:
        state.record(kind, about, **more)
    except StateError as exc:
        _log.warning("%s", exc)


def _target(state: State, live: Publication | None, to: int | None) -> Event:
    """Finds the version to put live: the named one, or the newest before the live one that has other weights."""
    if to is not None:
        found = state.published("version = ?", (to,), 1)
        missing = f"version {to} of {state.name!r} is not on record."
    elif live is None:
        raise UsageError(f"nothing is live in {state.name!r}. Name the version to put live. {_choices(state)}")
    else:
        origin = state.published("identity = ? AND kind = 'publish'", (live.identity,), 1)
        bound = origin[0].id if origin else sys.maxsize
        found = state.published("id < ? AND identity IS NOT ? AND version < ?", (bound, live.identity, live.version), 1)
        missing = f"no version before the live one of {state.name!r} is on record."
    if not found:
        raise UsageError(f"{missing} {_choices(state)}")
    return found[0]


def _again(segment: WritableSegment, last: int, event: Event, state: State) -> Publication:
    """Puts the version of an event live as the one after ``last``: from a spare slot, a copy or the original file."""
    if publication := publish_again(segment, event.version, event.identity, last):
        return publication
    if again := reopen(event, copies(state), state):
        checkpoint, fit = again
        with checkpoint:
            live = segment.live()
            spec = (live.spec if live else "") or segment.spec
            owner = (live.owner, live.place) if live else ("", "")
            return publish(segment, checkpoint, fit=fit, spec=spec, last_version=last, origin=owner)
    mixed = fit_from_json(event.settings).mixture
    origin = f"came from {event.checkpoint or 'memory'}, which {gone_or_changed(state, event.checkpoint)}"
    why = IN_NO_FILE if mixed else origin
    raise NoCheckpoint(f"version {event.version} of {state.name!r} {why}, and {NO_COPY}. {_choices(state)}")


def _choices(state: State) -> str:
    """Lists the versions that can be put live, newest first."""
    found, seen, lines = copies(state), set(), []
    events = {event.id: event for event in (*state.published(limit=_LOOKED_AT), *copied_events(state))}
    for event in sorted(events.values(), key=lambda event: event.id, reverse=True):
        if not event.version or event.version in seen:
            continue
        seen.add(event.version)
        again = reopen(event, found, state)
        if again:
            where = "kept copy" if key_of(event) in found else event.checkpoint
            again[0].close()
            lines.append(f"  {event.version}  step {event.step}  {printable(where or '')}")
        if len(lines) == _SHOWN:
            break
    if lines:
        return "These versions can be put live (--to):\n" + "\n".join(lines)
    if len(events) < _LOOKED_AT:
        return "No other version can be put live any more."
    return f"None of the last {_LOOKED_AT:,} versions can be put live any more; name an older one with --to."


def pin_checkpoint(
    name: str, checkpoint: str | None, *, runtime: str | os.PathLike[str] | None, state: State
) -> tuple[Pin, bool]:
    """Pins what is live, or a checkpoint; returns the pin, and whether what it names is live already.

    Raises:
        UsageError: nothing is live, and no checkpoint was named.
        SegmentMissing: there is no segment, and no checkpoint was named.
        CheckpointError: the checkpoint cannot be opened, or is being written.
        StateError: the history cannot be read, or the pin cannot be written.
    """
    from ..checkpoints.checkpoint import Checkpoint

    live = None
    try:
        with closing(Segment.open(name, runtime)) as segment:
            live = segment.live()
    except SegmentMissing:
        if checkpoint is None:
            raise
    if checkpoint is None:
        if live is None:
            raise UsageError(f"nothing is live in {name!r} yet. Name the checkpoint to pin.")
        pin = Pin(**live.which(), since=time.time(), reason="by hand")
    else:
        where = str(led_to(place_at(checkpoint)))
        published = [*state.published_from(where), *([live.identity] if live and live.checkpoint == where else [])]
        last = state.published(limit=1)
        extras = extras_from_json(last[0].settings if last else None)
        with Checkpoint(checkpoint, settle=Select().settle, published=lambda: published, extras=extras) as opened:
            path, known = str(opened.path), state.changed_ns(live.identity) if live else 0
            about_live = live and (live.identity == opened.identity or live.checkpoint == path)
            if live and about_live and is_same(opened, live.identity, live.changed_ns or known):
                about = {**live.which(), "checkpoint": path}
            else:
                as_before = state.changed_ns(opened.identity) in (0, opened.changed_ns)
                identity = opened.identity if as_before else changed_since(opened.changed_ns, opened.identity)
                about = {"step": opened.step, "checkpoint": path, "identity": identity}
            pin = Pin(**about, since=time.time(), reason="by hand", header=opened.header)
    state.pin_file.write(pin)
    _note(state, "pin", pin, version=pin.version or None, reason=None)
    return pin, live is not None and live.identity == pin.identity


def unpin(state: State) -> Pin | None:
    """Removes the pin and returns it; None if there was none, or it could not be read.

    Raises:
        StateError: the pin cannot be removed.
    """
    try:
        pin = state.pin_file.read()
    except StateError:
        pin = None
    state.pin_file.write(None)
    if pin:
        _note(state, "unpin", None, version=pin.version or None, checkpoint=pin.checkpoint)
    return pin
