"""One checkpoint as callers hold it: opened once, planned against a layout, read straight into a buffer.

Its tensors are a ``TensorTable``. An adapter is merged from outside: its table and that of its base are two. What opens
and reads is imported when the first checkpoint is opened: a pass with nothing to do opens none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointMismatch, PartialCheckpoint
from ..layout.layout import Layout
from .files import led_to, place_at, remote
from .fit import Fit

if TYPE_CHECKING:
    from .header import StoredTensor
    from .plan import Plan
    from .table import TensorTable


class Checkpoint:
    """An open checkpoint, its headers validated; however many files it has, callers see one table of tensors.

    Attributes:
        table: its tensors, and where their bytes come from.
        path: the file or directory where it was found, absolute, and through a link where that led.
        identity: of its files as they were opened.
        changed_ns: when the system last changed one of its files, as they were opened; 0 of a copy, or in a store.
        step: the producer's number, None where it has none; see ``steps``.
        size: bytes of its files.
        planned: the last plan.
        fitted: how it was fitted when it was copied, where it is a copy.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        settle: float = 0.0,
        digest: str = "",
        published: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """Opens a checkpoint.

        Args:
            path: of a file or directory, or a URL.
            settle: seconds that it must have stood still where nothing else tells that its writer is done; waited for
                here.
            digest: ``"sha256"`` compares its files with the digests that its writer leaves (see ``digest``).
            published: gives the identities of what was published from this path before; called where it has several
                files.

        Raises:
            NoCheckpoint: there is none at this path.
            BeingWritten: its writer is still at work, or was a moment ago.
            IncompleteCheckpoint: a file is shorter than its header says, or a shard is missing or another write's.
            MalformedCheckpoint: it breaks the format.
            WrongDigest: the configuration of an adapter is another than its digest names.
            CheckpointError: it cannot be read.
        """
        from .steps import step_at
        from .table import TensorTable

        self.table = table = TensorTable(led_to(place_at(path)), settle, digest, published)
        self.path, self.identity = table.path, table.identity
        self.size = sum(info.st_size for info in table.source.infos)
        infos = [*table.source.infos, *([table.source.index] if table.source.index else [])]
        self.changed_ns = 0 if remote(self.path) else max(info.st_ctime_ns for info in infos)
        self.planned: Plan | None = None
        self.fitted: Fit | None = None
        self._base: TensorTable | None = None  # of an adapter that is merged
        self.step = step_at(self.path, table.metadata).number

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.table.close()
        if self._base:
            self._base.close()

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """What it holds, by name, in the order of the files."""
        return self.table.tensors

    @property
    def metadata(self) -> Mapping[str, str]:
        """The headers' ``__metadata__``."""
        return self.table.metadata

    @property
    def layout(self) -> Layout:
        """The checkpoint's own tensors as a layout."""
        return Layout.build({t.name: (t.dtype, t.shape) for t in self.tensors.values()}, {})

    def plan(self, layout: Layout, settings: Fit = Fit()) -> Plan:  # noqa: B008  (frozen)
        """Fits the checkpoint to a layout.

        Raises:
            CheckpointMismatch: tensors do not fit; all of them are listed.
            PartialCheckpoint: a part came, as it may, and there are no live values for the rest to keep.
        """
        self.planned = self._plan(layout, settings)
        return self.planned

    def _plan(self, layout: Layout, settings: Fit) -> Plan:
        from .plan import plan_of

        try:
            return plan_of(self.tensors, layout, settings, self.path)
        except (CheckpointMismatch, PartialCheckpoint) as exc:
            if not self.table.parts.is_adapter:
                if isinstance(exc, CheckpointMismatch):
                    from . import siblings

                    raise siblings.named(exc, self.table.parts, layout, settings) from None
                raise
            return self._plan_adapter(layout, settings, exc)

    def _plan_adapter(self, layout: Layout, settings: Fit, exc: CheckpointMismatch | PartialCheckpoint) -> Plan:
        """The plan of an adapter: for the policy's own adapter, where it has one that fits, else merged into a base.

        Args:
            exc: why it does not fit as it is.
        """
        from . import adapter, own_adapter  # few checkpoints are adapters

        own = own_adapter.named_by_policy(self.tensors, layout)
        if own is None and not settings.base:
            has = own_adapter.has_adapters(layout)
            policy = "the policy's own adapters have other tensors" if has else "the policy has no adapters"
            raise CheckpointMismatch(
                f"{self.path} is an adapter, and {policy}. Name the weights that it is merged "
                'into: base = "…" in [weights].',
                exc.differences,
            ) from None
        if settings.base:
            self._base = self._base or adapter.open_base(settings.base, self.path)
        if own is not None:
            return own_adapter.plan_own(own, self._base.tensors if self._base else None, layout, settings, self.path)
        assert self._base
        return adapter.plan_of(self.table, self._base, layout, settings)

    @property
    def kept(self) -> bool:
        """Whether the last plan leaves live values of others beside its own."""
        return bool(self.planned and self.planned.kept)

    def read_into(
        self,
        weights: memoryview,
        plan: Plan,
        *,
        finite: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Reads the planned bytes into ``weights``, checks them, and checks that the file stood still meanwhile.

        Args:
            weights: writable, at least ``plan.layout.nbytes`` bytes.
            finite: refuse NaN and infinity.
            progress: called with the number of bytes of each read.

        Raises:
            NonFiniteWeights: the tensors that hold NaN or infinity are listed.
            CheckpointMismatch: two copies of a tied tensor differ.
            WrongDigest: the bytes that were read are others than their digest names.
            BeingWritten: the same, and the digest is older than they are.
            CheckpointChanged: the file changed, or was cut, while it was read.
            CheckpointError: the system could not read it.
        """
        if plan.merge and self._base:
            from . import merging

            merging.read_into(self.table, self._base, weights, plan, finite=finite, progress=progress)
        else:
            from . import staging

            staging.read_into(self.table, weights, plan, finite=finite, progress=progress)

    def is_copy_of(self, path: str, identity: str, step: int | None, fitted: Fit) -> None:
        """Reports the path, identity and step of the original, and how that was fitted."""
        self.path, self.identity, self.step, self.fitted = Path(path), identity, step, fitted
        self.changed_ns = 0


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    settle: float = 0.0,
    digest: str = "",
    published: Callable[[], Sequence[str]] = tuple,
) -> Checkpoint:
    """The checkpoint at a path or URL, opened; see ``Checkpoint``."""
    return Checkpoint(path, settle=settle, digest=digest, published=published)
