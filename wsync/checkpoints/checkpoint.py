"""One checkpoint as callers hold it: opened once, planned against a layout, read straight into a buffer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointMismatch, PartialCheckpoint
from ..fitting.fit import Fit
from ..layout.layout import Layout
from .files.extras import Extras
from .tensor_table import TensorTable

if TYPE_CHECKING:
    from ..fitting.plan import Plan


class Checkpoint(TensorTable):
    """An open checkpoint, and the last plan that was made for it; takes the arguments of ``TensorTable``.

    Attributes:
        planned: the last plan; None before the first.
        fitted: for a kept copy, the settings that the original was fitted with; else None.
    """

    planned: Plan | None = None
    fitted: Fit | None = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @cached_property
    def step(self) -> int | None:
        """The producer's own number for it, which callers may set; None if it has none. See ``step_number``."""
        from .step_number import step_at

        return step_at(self.path, self.metadata).number

    @property
    def size(self) -> int:
        """Size of its weight files, in bytes."""
        return sum(info.st_size for info in self.source.infos[: len(self.parts.files)])

    @property
    def header(self) -> str:
        """SHA-256, in hexadecimal, of the metadata and of where each tensor lies."""
        from hashlib import sha256  # takes 4 ms, and a pass with nothing to do does not need it

        return sha256(repr((list(self.tensors.values()), self.metadata)).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def layout(self) -> Layout:
        """The checkpoint's own tensors as a layout."""
        return Layout.build({t.name: (t.dtype, t.shape) for t in self.tensors.values()}, {})

    def plan(self, layout: Layout, settings: Fit = Fit()) -> Plan:  # noqa: B008  (frozen)
        """Plans how the tensors reach a layout, and keeps the plan in ``planned``.

        Raises:
            CheckpointMismatch: some tensors do not fit; the error lists all of them.
            PartialCheckpoint: some tensors are missing, as allowed, but there are no live values to keep for them.
            CheckpointError: an adapter or its base cannot be used; see ``adapter.plan_adapter``.
        """
        from ..fitting.plan import plan_of

        try:
            self.planned = plan_of(self.tensors, layout, settings, self.path)
        except (CheckpointMismatch, PartialCheckpoint) as exc:
            if self.parts.is_adapter:
                from .adapter import plan_adapter  # few checkpoints are adapters

                self.planned = plan_adapter(self, layout, settings, exc)
            elif isinstance(exc, CheckpointMismatch):
                from .siblings import with_siblings

                raise with_siblings(exc, self.parts, layout, settings) from None
            else:
                raise
        return self.planned

    @property
    def mixed(self) -> bool:
        """Whether the last plan leaves some tensors at their live values."""
        return bool(self.planned and self.planned.kept)

    def read_into(
        self,
        weights: memoryview,
        plan: Plan,
        *,
        finite: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Reads the extras into ``extras`` and the planned tensors into ``weights``, and checks both.

        Args:
            weights: writable, at least ``plan.layout.nbytes`` bytes.
            finite: whether to refuse NaN and infinity.
            progress: called after each read with the number of bytes that it filled.

        Raises:
            NonFiniteWeights: some tensors hold NaN or infinity; the error lists them.
            CheckpointMismatch: two copies of a tied tensor differ, or an integer is too large for the policy's dtype.
            IncompleteCheckpoint, MalformedCheckpoint: an extra is cut off or broken.
            WrongDigest: the bytes of a file do not match its digest.
            BeingWritten: the same, but the digest is older than the file.
            UnusableBase: the base of an adapter holds NaN or infinity.
            CheckpointChanged: a file changed, or was cut, while it was read.
            CheckpointError: the system could not read a file.
            UsageError: the plan needs the values of a built policy, and the settings name none.
        """
        from . import adapter_merging, staging

        if not self.fitted:  # a kept copy already has the extras of its original
            self.extras = Extras({}, self.metadata)
        if self.parts.extras:
            from .files.extras_reading import read_extras

            self.extras = read_extras(self.source, self.metadata, digests=bool(self.digests))
        if plan.merge and self.base:
            adapter_merging.read_into(self, self.base, weights, plan, finite=finite, progress=progress)
        else:
            staging.read_into(self, weights, plan, finite=finite, progress=progress)

    def is_copy_of(self, path: str, identity: str, step: int | None, fitted: Fit, extras: Extras) -> None:
        """Makes a kept copy report the path, identity, step, settings and extras of its original."""
        self.path, self.identity, self.step, self.fitted = Path(path), identity, step, fitted
        self.changed_ns, self.extras = 0, extras
