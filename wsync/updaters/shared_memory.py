"""The weight updater that publishes into a segment.

Torch is imported only to push tensors: a checkpoint goes from its file into the slot without torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint import Checkpoint
from ..discovery.weight_getter import CheckpointWeightGetter, live_candidate
from ..errors import SpecError
from ..fitting.fit import Fit
from ..layout.layout import NO_TENSORS, Layout, layout_of, layout_of_tensors, named_tensors, scratch_of
from ..segment.publication import Publication
from ..segment.publishing import Gate, publish, publish_tensors
from ..segment.segment_files import BOUND, SLOTS
from ..segment.standing import StandingSegment
from .vanilla import WeightUpdaterBase

if TYPE_CHECKING:
    import torch

    from ..layout.weights import Weights
    from ..segment.reader_records import ReaderRecord


class SharedMemoryWeightUpdater(StandingSegment, WeightUpdaterBase):
    """Publishes weights into a segment, which is its only worker; every policy that is attached to it follows.

    ``push_weights()`` with a ``CheckpointWeightGetter`` reads the newest checkpoint straight into shared memory;
    ``push_weights(policy)`` publishes a trainer's weights from memory, without a file. The post hooks run only after a
    version was published.

    Args:
        name: name of the segment, which is made if it does not exist.
        weight_getter: called by ``push_weights()`` for the weights; if it returns None, nothing is published.
        policy: has the layout, with ties, for a new segment; without it, the pushed weights define the layout. Buffers
            that do not persist in it are not pushed; in a TensorDict they cannot be told from others.
        layout: returns the layout for a new segment, for callers that know it without the policy.
        slots: slots of a new segment, each a full buffer of weights.
        max_slots: most slots that it may grow to while readers keep older versions.
        strict: whether every push must have every tensor; if False, missing tensors keep their live values.
        finite: whether to refuse NaN and infinity, except an infinity that ``policy`` has when the updater is made.
        extra_state: ``"ignore"`` logs the names of ``state_dict()`` entries that no segment holds; else SpecError.
        runtime_dir: where segments live; default ``WSYNC_RUNTIME_DIR``, else ``/dev/shm/wsync-<uid>``.

    Attributes:
        step: the producer's number to publish the next weights from memory with; a checkpoint has its own.
        spec: fingerprint of the policy spec, recorded with each version.
        access: who else may read the segment; a push also changes an existing segment.
        extras: the files to publish with weights from memory: bytes by file name; see ``push_weights``.
        gate: called with the staged weights (a ``publishing.Staged``) before they go live; its errors are raised.
        last_version: the highest version ever published under this name; a segment that is made anew counts on from it.
        published: the record of the version that this updater published last; None before.
    """

    def __init__(
        self,
        name: str,
        *,
        weight_getter: Callable[[], Any] | None = None,
        policy: torch.nn.Module | None = None,
        layout: Callable[[], Layout] | None = None,
        slots: int = SLOTS,
        max_slots: int = BOUND,
        strict: bool = True,
        finite: bool = True,
        extra_state: str = "refuse",
        runtime_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        known = layout if policy is None else partial(layout_of, policy)
        StandingSegment.__init__(self, name, known, slots, max_slots, runtime_dir)
        self.weight_getter, self.strict, self.finite, self.extra_state = weight_getter, strict, finite, extra_state
        self.step: int | None = None
        self.extras: Mapping[str, bytes] = {}
        self.gate: Gate | None = None
        self.published: Publication | None = None
        self._policy = policy
        self._infinities = _infinities_of(policy) if policy is not None and finite else {}
        self._news = False

    def __getstate__(self) -> dict[str, Any]:
        return {**WeightUpdaterBase.__getstate__(self), "_segment": None}

    def wait_for_readers(self, version: int | None = None, timeout: float | None = None) -> list[ReaderRecord]:
        """Waits until every living reader has a version, or a newer one.

        Args:
            version: the version to wait for; default the live one.
            timeout: seconds; None waits for ever.

        Returns:
            The readers without it when the time is up, each with ``pid``, ``process``, ``version`` and ``since``.

        Raises:
            UsageError: the timeout is not a number.
        """
        from .reader_progress import wait_for_readers

        segment = self.segment
        return wait_for_readers(segment, segment.version if version is None else version, timeout) if segment else []

    def oldest_version(self) -> int:
        """The oldest version that a living reader uses or keeps; without readers the live one, 0 before the first.

        A trainer may delete or reuse what belongs to older versions.
        """
        from .reader_progress import oldest_version

        return oldest_version(self.segment) if self.segment else 0

    def push_weights(
        self,
        policy_or_weights: Weights | Checkpoint | None = None,
        worker_ids: int | torch.device | Iterable[int | torch.device] | None = None,
        *,
        extras: Mapping[str, bytes] | None = None,
    ) -> None:
        """See ``WeightUpdaterBase.push_weights``.

        Args:
            extras: files that travel with weights from memory, in the same version: bytes by names such as
                ``"preprocessor.json"``. A policy finds them in ``reader.extras``. Default ``self.extras``.

        Raises:
            UsageError: a name is not a file's name, or a value is not bytes.
        """
        with self._pushing:
            before = self.extras
            try:
                self.extras = before if extras is None else extras
                super().push_weights(policy_or_weights, worker_ids)
            finally:
                self.extras = before

    def _get_server_weights(self) -> Any:
        maps = type(self)._maybe_map_weights is not SharedMemoryWeightUpdater._maybe_map_weights
        if maps or not isinstance(self.weight_getter, CheckpointWeightGetter):  # a subclass maps tensors
            return None if self.weight_getter is None else self.weight_getter()
        live = self.segment.live() if self.segment else None
        return self.weight_getter.open_newest(live_candidate(live))

    def _maybe_map_weights(self, server_weights: Any) -> Any:
        """Turns a module into a dict of its parameters and persistent buffers, which a segment holds.

        Raises:
            SpecError: the module has none; or as ``WeightUpdaterBase``.
        """
        self._news = False  # also after a push that failed
        if self._check_extra_state(server_weights):
            if tensors := dict(named_tensors(server_weights)):
                return tensors
            raise SpecError(NO_TENSORS)
        return WeightUpdaterBase._maybe_map_weights(self, server_weights)

    def _sync_weights_with_worker(self, *, worker_id: int | torch.device | None = None, server_weights: Any) -> None:
        if server_weights is None:
            return
        if isinstance(server_weights, Checkpoint):
            segment = self.make_segment()
            with segment.publishing():
                publication = publish(
                    segment,
                    server_weights,
                    fit=self._fit(),
                    spec=self.spec,
                    gate=self.gate,
                    last_version=self.last_version,
                )
        else:
            from ..layout.tensor_names import seen_through
            from ..layout.weights import dotted, flatten

            tensors = {dotted(path): tensor for path, tensor in flatten(server_weights).items()}
            scratch = scratch_of(self._policy) if self._policy is not None else set()
            for name in scratch & tensors.keys() | seen_through(tensors, scratch).keys():
                del tensors[name]
            if not tensors:
                return
            segment = self.make_segment(lambda: layout_of_tensors(tensors.items()))
            with segment.publishing():
                publication = publish_tensors(
                    segment,
                    tensors,
                    strict=self.strict,
                    finite=self.finite,
                    infinities=self._infinities,
                    step=self.step,
                    spec=self.spec,
                    gate=self.gate,
                    last_version=self.last_version,
                    extras=self.extras,
                )
        self.published, self.last_version, self._news = publication, publication.version, True

    def _fit(self) -> Fit:
        """The getter's settings; ``strict`` and ``finite`` are off if either the getter or the updater says so."""
        fit = self.weight_getter.fit if isinstance(self.weight_getter, CheckpointWeightGetter) else Fit()
        return replace(fit, strict=fit.strict and self.strict, finite=fit.finite and self.finite)

    def _call_post_hooks(self) -> None:
        news, self._news = self._news, False
        if news:
            WeightUpdaterBase._call_post_hooks(self)


def _infinities_of(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Clones of the policy's tensors with infinities, as masks have; a later infinity may come from divergence."""
    from ..layout.weights import with_infinities

    return with_infinities(named_tensors(policy))
