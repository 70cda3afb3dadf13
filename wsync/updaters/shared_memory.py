"""The weight updater whose one worker is a segment.

Torch is imported only to push tensors: a checkpoint goes from its file into the slot without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint import Checkpoint
from ..discovery.weight_getter import CheckpointWeightGetter, live_candidate
from ..fitting.fit import Fit
from ..layout.layout import Layout, layout_of, layout_of_tensors, named_tensors, scratch_of
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
    """Publishes weights into a segment, which is its one worker: every attached policy on the box follows.

    ``push_weights()`` with a ``CheckpointWeightGetter`` reads the newest checkpoint straight into shared memory;
    ``push_weights(policy)`` publishes a trainer's weights from memory, with no file at all. The post hooks run only
    when a version was published.

    Args:
        name: of the segment.
        weight_getter: gives the weights of a push without any; None from it publishes nothing.
        policy: gives the layout of a new segment, with its tied weights; without it, the pushed weights do. It also
            says which buffers do not persist, and so are not pushed: a TensorDict has those too, and does not say.
        layout: the same, for callers that know the layout without the policy.
        slots: buffers of a segment that is made.
        max_slots: how many it may grow to while readers keep older versions.
        strict: every tensor must come; otherwise missing ones keep their live values.
        finite: refuse NaN and infinity, unless ``policy`` has the same infinity when the updater is made.
        extra_state: ``"ignore"`` pushes a module whose ``state_dict()`` holds what no segment can, and says so once.
        runtime_dir: where segments live; default ``WSYNC_RUNTIME_DIR``, else ``/dev/shm/wsync-<uid>``.

    Attributes:
        step: the producer's number that the next weights from memory are published with; a checkpoint brings its own.
        spec: fingerprint of the policy spec that versions are recorded with.
        access: who else may read the segment; a push also gives them access to a standing one.
        extras: the files that weights from memory are published with: bytes by their names; see ``push_weights``.
        gate: called with the staged weights (a ``publishing.Staged``) before they go live; its errors are raised.
        last_version: the highest ever published under this name; a segment that is made anew continues from it.
        published: the last version that this updater published; None before.
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
            version: default what is live.
            timeout: seconds; None waits for ever.

        Returns:
            The readers that do not have it when time is up, each with ``pid``, ``process``, ``version`` and ``since``.
        """
        from ..segment.reader_progress import wait_for_readers

        segment = self.segment
        return wait_for_readers(segment, segment.version if version is None else version, timeout) if segment else []

    def oldest_version(self) -> int:
        """The oldest version that a living reader acts on or keeps; without readers the live one, 0 before the first.

        A trainer may delete or reuse what belongs to older ones.
        """
        from ..segment.reader_progress import oldest_version

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
        before = self.extras
        try:
            self.extras = before if extras is None else extras
            super().push_weights(policy_or_weights, worker_ids)
        finally:
            self.extras = before

    def _get_server_weights(self) -> Any:
        maps = type(self)._maybe_map_weights is not SharedMemoryWeightUpdater._maybe_map_weights
        if maps or not isinstance(self.weight_getter, CheckpointWeightGetter):  # who maps gets tensors to map
            return None if self.weight_getter is None else self.weight_getter()
        live = self.segment.live() if self.segment else None
        return self.weight_getter.open_newest(live_candidate(live))

    def _maybe_map_weights(self, server_weights: Any) -> Any:
        """Turns a module into the table of its parameters and persistent buffers, which a segment holds."""
        self._news = False  # also after a push that failed
        if self._check_extra_state(server_weights):
            return dict(named_tensors(server_weights))
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
        """The getter's settings, made laxer or stricter by the updater's own ``strict`` and ``finite``."""
        fit = self.weight_getter.fit if isinstance(self.weight_getter, CheckpointWeightGetter) else Fit()
        return replace(fit, strict=fit.strict and self.strict, finite=fit.finite and self.finite)

    def _call_post_hooks(self) -> None:
        news, self._news = self._news, False
        if news:
            WeightUpdaterBase._call_post_hooks(self)


def _infinities_of(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The policy's masks and bounds as they are now: later values may have diverged."""
    from ..layout.weights import with_infinities

    return with_infinities(named_tensors(policy))
