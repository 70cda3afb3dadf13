"""What one syncer reads from the history and adds to it: pin, rejections, events.

A history that cannot be written is reported once, and the syncer goes on without it. Only a pin that cannot be read
stops a pass: going on would replace what the operator keeps live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files.extras import ExtraFiles
from ..errors import StateError
from ..fitting.fit import Fit
from .state import State

if TYPE_CHECKING:
    from ..segment.publication import Publication, Version
    from ..segment.publishing import Staged
    from ..segment.segment import Segment
    from .pins import Pin

P = ParamSpec("P")
T = TypeVar("T")

_PASSED, _SAME = "+passed", "+same"  # scopes of ``State.remember`` that follow a digest
_LATE, _INCOMPLETE = "+late", "+half"  # scopes that hold under any settings


class Record:
    """Caches and updates a ``State`` during passes; reports each failure once and goes on without it.

    Args:
        state: None to remember refusals in this process only, and nothing else.
        settings: returns a digest of the settings; a refusal holds as long as that is the same.

    Attributes:
        complain: called when the history cannot be read or written; not again for the same error in a row.
    """

    def __init__(self, state: State | None, settings: Callable[[], str]) -> None:
        self.complain: Callable[[StateError], None] | None = None
        self._state, self._settings_of = state, settings
        if state:
            state.warn = lambda exc: self.complain(exc) if self.complain else None
        self._settings = ""  # under which the rest was refused; empty before the first listing with something newer
        self._refused: dict[str, str] = {}
        self._passed: set[str] = set()
        self._same: dict[str, str] = {}  # by identity, the version that has the same bytes
        self._incomplete: dict[str, str] = {}
        self._fresh: set[str] = set()
        self._late: int | None = None
        self._complaint = self._failure = ""

    def close(self) -> None:
        if self._state:
            self._state.close()

    @property
    def directory(self) -> Path | None:
        """The directory of the state."""
        return self._state.directory if self._state else None

    def pin(self) -> Pin | None:
        """Returns the pin, or None.

        Raises:
            StateError: the pin cannot be read.
        """
        return self._state.pin_file.read() if self._state else None

    def last_published(self) -> tuple[int, str]:
        """See ``State.last``; a segment that is made again goes on from this version."""
        return self._try(State.last) or (0, "")

    def published_from(self, checkpoint: str) -> list[str]:
        """See ``State.published_from``."""
        return self._try(State.published_from, checkpoint) or []

    # --- refusals

    def forget(self) -> None:
        """Forgets all refusals, so that refused checkpoints count as new."""
        self._settings = self._settings_of()
        self._refused, self._passed, self._incomplete = {}, set(), {}

    def is_outdated(self) -> bool:
        """Returns whether the settings are others than those under which the last listing was refused."""
        return self._settings not in ("", self._settings_of())

    def refusals(self, listed: Iterable[str]) -> dict[str, str]:
        """Returns which of ``listed`` were refused: the reason by identity."""
        wanted = set(listed)
        if wanted and (settings := self._settings_of()) != self._settings:  # at first, or after code was edited
            self._settings = settings
            self._refused = dict(self._try(State.remembered, settings) or {})
            self._passed = set(self._try(State.remembered, f"{settings}{_PASSED}") or {})
            self._same = dict(self._try(State.remembered, f"{settings}{_SAME}") or {})
            self._incomplete |= self._try(State.remembered, _INCOMPLETE) or {}
        if wanted:
            self._refused = {identity: why for identity, why in self._refused.items() if identity in wanted}
            self._incomplete = {identity: why for identity, why in self._incomplete.items() if identity in wanted}
        return self._refused

    def reason(self, identity: str) -> str:
        """Why a checkpoint of the last listing was refused."""
        return self._refused[identity]

    def is_fresh(self, identity: str) -> bool:
        """Whether a checkpoint was refused in this process, and not in an earlier one."""
        return identity in self._fresh

    def refuse(self, identity: str, reason: str, refused: Version) -> None:
        """Remembers why a checkpoint is refused, and records that."""
        self._refused[identity] = reason
        self._fresh = {*self._fresh & self._refused.keys(), identity}
        self._try(State.remember, self._settings, identity, reason)
        self._try(State.record, "reject", refused, bytes=None)

    @property
    def passed(self) -> frozenset[str]:
        """Identities of checkpoints that were reported once and are skipped since then."""
        return frozenset(self._passed)

    def pass_over(self, identity: str, reason: str, refused: Version) -> None:
        """Remembers that a refused or incomplete checkpoint was reported, so that later passes skip it."""
        self._passed.add(identity)
        self._try(State.remember, f"{self._settings}{_PASSED}", identity, reason)
        if identity not in self._refused:
            self._try(State.record, "reject", refused, bytes=None)

    def incomplete(self, identity: str) -> str:
        """Why an object of the last listing is incomplete; empty if it is not known to be."""
        return self._incomplete.get(identity, "")

    def found_incomplete(self, identity: str, why: str) -> None:
        """Remembers under any settings that an object is incomplete, because an object never grows."""
        if self._incomplete.get(identity) != why:
            self._incomplete[identity] = why
            self._try(State.remember, _INCOMPLETE, identity, why)

    def touched(self, live: Publication, checkpoint: Checkpoint) -> None:
        """Remembers that a checkpoint has the bytes of the live version: it is not tried while that is live."""
        self._try(State.touched, live.version, checkpoint.changed_ns)
        self._same[checkpoint.identity] = str(live.version)
        self._try(State.remember, f"{self._settings}{_SAME}", checkpoint.identity, str(live.version))

    def was_touched(self, identity: str, live: Publication | None) -> bool:
        """Returns whether a checkpoint of the last listing has the bytes of the live version."""
        return live is not None and self._same.get(identity) == str(live.version)

    def late_until(self) -> int:
        """When the latest checkpoint arrived that was reported as older than the live one, in ns; 0 if none was."""
        if self._late is None:
            self._late = max(map(int, (self._try(State.remembered, _LATE) or {}).values()), default=0)
        return self._late

    def reported_late(self, arrived_ns: int) -> None:
        """Remembers what ``late_until`` returns."""
        self._late = arrived_ns
        self._try(State.remember, _LATE, "", str(arrived_ns))

    # --- events

    def published(self, live: Version, lag: int, fit: Fit, changed_ns: int, extras: ExtraFiles) -> None:
        from .reopening import settings_to_json

        settings = settings_to_json(fit, extras)
        more = {"lag": lag, "settings": settings, "changed_ns": changed_ns}
        self._try(State.record, "publish", live, accepted=self._settings or self._settings_of(), **more)

    def gate(self, result: str, staged: Staged) -> None:
        self._try(State.record, "gate", staged, reason=result)

    def failed(self, version: int, reason: str) -> None:
        """Records a failure, but not again if it repeats the last event."""
        if reason == self._failure:
            return
        self._failure = reason
        last = self._try(State.events, limit=1)
        if not last or (last[-1].kind, last[-1].reason) != ("failure", reason):
            self._try(State.record, "failure", version=version, reason=reason)

    def worked(self) -> None:
        self._failure = ""

    def _try(self, action: Callable[Concatenate[State, P], T], *args: P.args, **more: P.kwargs) -> T | None:
        """Applies an action to the state and returns its result; None without a state, or if the action fails."""
        try:
            return action(self._state, *args, **more) if self._state else None
        except StateError as exc:
            if str(exc) != self._complaint and self.complain:
                self.complain(exc)
            self._complaint = str(exc)
            return None

    # --- what was published before

    def keep(self, segment: Segment, number: int) -> None:
        """Copies the live version, unless ``number`` is 0; only the last ``number`` copies stay."""
        if self._state and number > 0:
            from .copies import keep

            self._try(keep, segment, number)

    def reopen(self, pin: Pin, fit: Fit, extras: ExtraFiles) -> tuple[Checkpoint, Fit]:
        """See ``reopening.reopen_pinned``."""
        from .reopening import reopen_pinned

        assert self._state
        return reopen_pinned(self._state, pin, fit, extras)
