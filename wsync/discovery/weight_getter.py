"""The weight getter: returns the newest weights of a directory.

Calling it returns a TensorDict, as torchrl's and our weight updaters expect of a ``weight_getter``. For publishing, it
returns the opened checkpoint instead, so that bytes go from the file straight into the slot, and torch is not imported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files.parts import led_to, place_at, remote
from ..errors import CheckpointError, IncompleteCheckpoint, NoCheckpoint
from ..fitting.fit import Fit
from ..layout.layout import TORCH_DTYPES, Layout, torch_shape
from ..segment.publication import Publication
from .identity import as_listed, known_again, lasting
from .listing import Older, older_than, scan
from .newest import Candidate, Select, select

if TYPE_CHECKING:
    from tensordict import TensorDict

    from .step_order import StepOrder


_AHEAD = 60.0  # most seconds that a file server's clock may be ahead of ours


class Look(NamedTuple):
    """What one listing of a place offers.

    Attributes:
        newer: candidates that are newer than the live version, newest first.
        late: candidates that count as older, but arrived after the live version went live.
        is_new_run: whether the live one is gone and all others arrived later, so that they count as newer.
        nothing: why the place's pointer, or the settings, leave no candidate at all; else empty.
    """

    newer: list[Candidate]
    late: Sequence[Candidate] = ()
    is_new_run: bool = False
    nothing: str = ""


class CheckpointWeightGetter:
    """Reads the newest complete checkpoint of a directory, or one named file.

    Args:
        checkpoints: a directory in which checkpoints appear, or a ``.safetensors`` file; or the URL of one.
        only_new: whether a call returns None if no checkpoint is newer than that of the last call.
        select: which entries are checkpoints, and which is newest.
        fit: which tensors are taken, and under which names.

    Attributes:
        path: the checkpoint that the last call returned; None before the first.
        step: the producer's own number for that checkpoint; None if it has none.
        memory: the file in which the order by step keeps steps; None keeps them in this process only.

    Example:
        >>> getter = CheckpointWeightGetter("runs/cartpole")
        >>> weights = getter()  # a TensorDict nested as TensorDict.from_module nests it, on the CPU
    """

    def __init__(
        self,
        checkpoints: str | os.PathLike[str],
        *,
        only_new: bool = False,
        select: Select = Select(),  # noqa: B008  (frozen)
        fit: Fit = Fit(),  # noqa: B008
    ) -> None:
        self.checkpoints = place_at(checkpoints)
        self.only_new, self.select, self.fit = only_new, select, fit
        self.memory: Path | None = None
        self._steps: StepOrder | None = None
        self.path: Path | None = None
        self.step: int | None = None
        self._last: Candidate | None = None

    def __call__(self) -> TensorDict | None:
        """Returns the newest weights in new CPU memory, with the file's shapes and dtypes, nested at the names' dots.

        Raises:
            NoCheckpoint, IncompleteCheckpoint: there is no checkpoint yet, or none is complete.
            CheckpointRejected: the newest one is broken, or holds NaN or infinity.
            CheckpointError: it cannot be read, changed while it was read, or does not fit into memory or a TensorDict.
        """
        checkpoint = self.open_newest(self._last if self.only_new else None)
        if checkpoint is None:
            return None
        with checkpoint:
            weights = _to_tensordict(checkpoint, self.fit)
            self._last = _candidate(str(checkpoint.path), checkpoint.identity, checkpoint.step, time.time())
            self.path, self.step = checkpoint.path, checkpoint.step
            return weights

    def open_newest(self, live: Candidate | None = None) -> Checkpoint | None:
        """Opens the newest complete checkpoint for publishing; None if none is newer than the live version.

        Raises:
            NoCheckpoint: nothing is live, and there is no checkpoint; or the place does not exist.
            IncompleteCheckpoint: nothing is live, and no candidate is complete.
            CheckpointError: it cannot be read, or is not a safetensors file.
        """
        failure: CheckpointError | None = None
        for candidate in self.candidates(live):
            try:
                return self.open(candidate, partial(_published_from, candidate, live or self._last))
            except (NoCheckpoint, IncompleteCheckpoint) as exc:
                failure = exc  # being written, or gone: the next newest may be complete
        if live is None:
            raise failure or self.nothing()
        return None

    def candidates(self, live: Candidate | None = None) -> list[Candidate]:
        """The candidates that are newer than the live version, newest first; see ``look``."""
        return self.look(live).newer

    def look(self, live: Candidate | None = None, only: Collection[str] | None = None) -> Look:
        """Lists the place. A checkpoint that is named directly, or by a pointer, counts as newer whatever its age.

        Args:
            live: where the live version came from; None if nothing is live.
            only: the names of the files that may be newer than the live version; None if any may be.

        Raises:
            NoCheckpoint: the place does not exist; or nothing is live, and its pointer names no entry yet.
            CheckpointError: the place cannot be listed.
        """
        live = live and live._replace(name=self._below(str(live.location)))
        older, nothing = self._older(live) if live else None, ""
        needed = {*only, live.name.partition("/")[0]} if only is not None and live and older else None
        try:
            found = known_again(scan(self.checkpoints, self.select, older=older, only=needed), live)
        except NoCheckpoint as exc:
            if live is None or not self.select.pointer:
                raise
            found, nothing = [], str(exc)  # there is no pointer, or it names an entry that is not there yet
        if live and (self.select.pointer or not any(c.name for c in found)):
            is_passed_over = not found and only is None and self.select.is_narrow
            if is_passed_over and live.name and os.path.exists(live.location):
                nothing = str(self.nothing())
            return Look(lasting([c for c in found if c.identity != live.identity]), nothing=nothing)
        if self.select.order == "step":
            all_of = lambda: self._all(live) if older else found  # noqa: E731
            found, live = self._step_order().apply(found, live, all_of, forget=only is None)
        newer = select(found, live, self.select.order)
        if live is None:
            return Look(lasting(newer))
        later, counted = (c for c in found if c.arrived_ns > live.arrived_ns), set(map(id, newer))
        late = [c for c in later if id(c) not in counted and c.identity != live.identity]
        if found and not newer and len(late) == len(found):
            return Look(lasting(select(found, None, self.select.order)), is_new_run=True)
        return Look(lasting(newer), late)

    def _older(self, live: Candidate) -> Older | None:
        """Returns the test for entries that a listing may skip; None if it needs all."""
        if not live.name or remote(self.checkpoints) or (settings := self.select).marker or settings.pointer:
            return None
        if settings.within or settings.file:  # only directories count
            return None
        is_by_step = settings.order == "step" and self._step_order().agrees_with(live)
        return older_than(live, settings.order, self._step_order().named_step_like(live.name) if is_by_step else None)

    def _all(self, live: Candidate | None) -> list[Candidate]:
        return known_again(scan(self.checkpoints, self.select), live)

    def _step_order(self) -> StepOrder:
        if self._steps is None:
            from .step_order import StepOrder

            self._steps = StepOrder(self.step_of, self.select.step, self.memory)
        return self._steps

    def holds(self, checkpoint: str | None) -> bool:
        """Whether the checkpoint at this path is the place itself, or lies in it."""
        return bool(checkpoint and self._below(checkpoint)) or checkpoint == str(led_to(self.checkpoints))

    def _below(self, source: str) -> str:
        """The path of a checkpoint below the place; empty if it lies elsewhere."""
        place = f"{led_to(self.checkpoints)}/"
        return source.removeprefix(place) if source.startswith(place) else ""

    def is_one_checkpoint(self) -> bool:
        """Whether the place is a checkpoint itself, rather than a directory in which they appear."""
        try:
            return [candidate.path for candidate in scan(self.checkpoints, self.select)] == [self.checkpoints]
        except CheckpointError:  # it is gone
            return False

    def step_of(self, candidate: Candidate, metadata: Mapping[str, str] = MappingProxyType({})) -> int | None:
        """A candidate's step: from its metadata, or the first part of its path below the place that has one."""
        from ..checkpoints.step_number import read_step, step_at

        if not candidate.name:
            return step_at(led_to(candidate.path), metadata, self.select.step).number
        steps = (read_step(name, metadata, self.select.step).number for name in candidate.name.split("/"))
        return next((step for step in steps if step is not None), None)

    def open(self, candidate: Candidate, published: Callable[[], Sequence[str]] = tuple) -> Checkpoint:
        """Opens a candidate for publishing, without torch; the caller closes it.

        Args:
            published: returns the identities of what was published from this path before.
        """
        settle, digest, extras = self.select.settle, self.select.digest, self.select.extras
        checkpoint = Checkpoint(candidate.path, settle=settle, digest=digest, published=published, extras=extras)
        checkpoint.identity = as_listed(candidate, checkpoint)
        step = self.step_of(candidate, checkpoint.metadata)
        checkpoint.step = checkpoint.step if step is None else step
        return checkpoint

    def nothing(self) -> NoCheckpoint:
        wanted = [f'names that match "{self.select.pattern}"'] if self.select.pattern != "*" else []
        if self.select.marker:
            wanted.append(f'a marker "{self.select.marker}" that is no older than its checkpoint')
        asked = f" (looked for: {', '.join(wanted)})" if wanted else ""
        from .passed_over import passed_over, pickles_in

        return NoCheckpoint(
            f"there is no complete checkpoint in {self.checkpoints} yet{asked}. "
            f"{passed_over(self.checkpoints, self.select)}It is looked at again at the next pass."
            + pickles_in(self.checkpoints)
        )


def _published_from(candidate: Candidate, live: Candidate | None) -> list[str]:
    return [live.identity] if live and live.location == str(led_to(candidate.path)) else []


def live_candidate(live: Publication | None) -> Candidate | None:
    """The origin of the live version, as a candidate to compare with; None if it came from memory."""
    if live is None or not live.checkpoint:
        return None
    return _candidate(live.checkpoint, live.identity, live.step, live.published_at)


def _candidate(source: str, identity: str, step: int | None, taken: float) -> Candidate:
    written = int(identity.rpartition("-")[2])
    if written > (taken + _AHEAD) * 1e9:  # a time in the future would make every later file older
        written = int(taken * 1e9)
    return Candidate(source, identity, written, step, arrived_ns=int(taken * 1e9))


def _to_tensordict(checkpoint: Checkpoint, settings: Fit) -> TensorDict:
    import torch
    from tensordict import TensorDict

    named = ((settings.name(stored), tensor) for stored, tensor in checkpoint.tensors.items())
    layout = Layout.build({name: (tensor.dtype, tensor.shape) for name, tensor in named if name is not None}, {})
    try:
        memory = torch.empty(layout.nbytes, dtype=torch.uint8)
    except RuntimeError as exc:  # from torch, if the system refuses the memory
        raise CheckpointError(
            f"{checkpoint.path} holds {layout.nbytes:,} bytes of weights, and this process cannot get that much "
            "memory. Take fewer of its tensors (include, exclude), or raise the limit of this process."
        ) from exc
    plan = checkpoint.plan(layout, replace(settings, strict=False))
    checkpoint.read_into(memoryview(memory.numpy().data), plan, finite=settings.finite)
    tensors: dict[str, torch.Tensor] = {}
    for entry in layout.tensors:
        if entry.dtype not in TORCH_DTYPES or any(size >= 1 << 63 for size in entry.shape):
            raise CheckpointError(
                f"{checkpoint.path}: {entry.name} is {entry.describe()}, and torch has no such tensors. Convert it."
            )
        part = memory[entry.offset : entry.offset + entry.nbytes]
        tensors[entry.name] = part.view(getattr(torch, TORCH_DTYPES[entry.dtype])).view(torch_shape(entry))
    try:
        nested: TensorDict = TensorDict(tensors).unflatten_keys(".")
    except (KeyError, ValueError) as exc:
        parent = next(name for name in tensors if any(other.startswith(f"{name}.") for other in tensors))
        raise CheckpointError(
            f"{checkpoint.path}: {parent!r} is a tensor and also the parent of another one, which a TensorDict cannot "
            "hold. Rename one of them where the checkpoint is written."
        ) from exc
    return nested
