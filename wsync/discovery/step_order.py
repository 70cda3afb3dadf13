"""Finds candidates' steps for the order by step: from their names if these are certain, else from their headers.

A name is certain if the number follows a known word, or is the only one. The header of the newest by name is read, too:
if its step differs from the name's, all headers are read. Steps are cached by identity, in this process and in a file,
so that each state of a checkpoint is opened once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files.parts import remote
from ..checkpoints.step_number import step_by_shape, step_in_name, steps_like
from ..errors import CheckpointError, MalformedCheckpoint
from .newest import Candidate

StepOf = Callable[[Candidate, Mapping[str, str]], int | None]


class StepOrder:
    """Finds candidates' steps, and remembers those that were read from headers.

    Args:
        step_of: returns a candidate's step, given its metadata.
        pattern: ``select.step``; if it is set, names alone decide.
        memory: the file in which steps are kept; None keeps them in this process only.
    """

    def __init__(self, step_of: StepOf, pattern: str, memory: Path | None) -> None:
        self._step_of, self._pattern, self._memory = step_of, pattern, memory
        self._known: dict[str, tuple[str, int | None]] | None = None
        self._is_new = False

    def __len__(self) -> int:
        """The number of steps that are remembered."""
        return len(self._known or {})

    def apply(
        self,
        found: list[Candidate],
        live: Candidate | None,
        all_of: Callable[[], list[Candidate]],
        *,
        forget: bool = True,
    ) -> tuple[list[Candidate], Candidate | None]:
        """Returns the candidates with their steps, and the live one with a step found in the same way.

        Args:
            live: its name is its path below the place; empty if it lies elsewhere.
            all_of: lists all candidates, also those that were skipped because their names give a lower step.
            forget: whether to forget the steps of checkpoints that are not among the candidates.
        """
        steps: dict[int, int | None] = {}
        if self._agree(found, live):
            steps = {id(each): number for each in found if (number := self.named_step(each.name)) is not None}
            if live and live.name and (number := self.named_step(live.name)) is not None:
                live = live._replace(step=number)
        else:
            found = all_of()
        if not self._pattern:
            unread = [each for each in found if id(each) not in steps]
            steps.update(zip(map(id, unread), self._read(unread), strict=True))
        if forget:
            self._forget_others(found)
        self._save()
        return [each._replace(step=steps.get(id(each))) for each in found], live

    def named_step(self, name: str) -> int | None:
        """The step that a name gives for certain, else None."""
        entry = name.partition("/")[0]
        return step_in_name(entry, self._pattern).number if self._pattern else step_by_shape(entry)

    def named_step_like(self, name: str) -> Callable[[str], int | None]:
        """Returns a ``named_step`` that is faster for entries whose names are like this one."""
        return self.named_step if self._pattern else steps_like(name.partition("/")[0])

    def agrees_with(self, live: Candidate) -> bool:
        """Whether the live version's step is the one in its name, or unknown."""
        return bool(self._pattern) or live.step in (None, self.named_step(live.name))

    def _agree(self, found: list[Candidate], live: Candidate | None) -> bool:
        """Whether the metadata of the candidate that is newest by name have the same step, or none."""
        certain = [(n, c) for c in found if (n := self.named_step(c.name)) is not None] if not self._pattern else []
        if not certain:
            return True
        number, newest = max(certain, key=lambda pair: pair[0])
        step = live.step if live and live.identity == newest.identity else self._step(newest)
        return step in (None, number)

    def _read(self, unread: list[Candidate]) -> Iterable[int | None]:
        if not unread or not remote(unread[0].path):
            return map(self._step, unread)
        from ..checkpoints.files.store_objects import AT_ONCE
        from ..stores.prefetch import prefetch

        return (step for _, step in prefetch(unread, self._step, AT_ONCE))  # each step is a request

    def _step(self, candidate: Candidate) -> int | None:
        """The step of one candidate, whose header is read once for each state of its file."""
        known, where, state = self._load(), str(candidate.location), candidate.identity
        if where in known and known[where][0] == state:
            return known[where][1]
        try:
            with Checkpoint(candidate.path) as checkpoint:  # no settling: it is checked before a publish
                step = self._step_of(candidate, checkpoint.metadata)
        except CheckpointError as exc:  # reported when it is published; until then its name decides
            step = self._step_of(candidate, {})
            if not isinstance(exc, MalformedCheckpoint) and not remote(candidate.path):  # an object does not grow
                return step
        known[where], self._is_new = (state, step), True
        return step

    def _forget_others(self, found: list[Candidate]) -> None:
        known = self._known or {}
        if len(known) > len(found):
            listed = {str(candidate.location) for candidate in found}
            self._known = {where: entry for where, entry in known.items() if where in listed}

    def _load(self) -> dict[str, tuple[str, int | None]]:
        if self._known is None:
            self._known = {}
            with suppress(OSError, ValueError, TypeError):  # it only saves time
                text = self._memory.read_text() if self._memory else "{}"
                self._known = {where: (str(state), step) for where, (state, step) in json.loads(text).items()}
        return self._known

    def _save(self) -> None:
        if not self._is_new or not self._memory:
            return
        self._is_new = False
        temporary = self._memory.with_suffix(f".steps.{os.getpid()}.tmp")
        with suppress(OSError):
            self._memory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(self._known, file)
            temporary.replace(self._memory)
