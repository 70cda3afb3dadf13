"""``wsync.torchrl.SegmentWeightSyncScheme`` for torchrl's collectors; importing this module imports torchrl.

The sender publishes a version. A collector takes the newest version at the start of each batch, between two steps, so
that all frames of a batch come from one version, and labels them with it. Sender and receivers share only the segment:
there is no queue, acknowledgement or thread, and nobody waits for a receiver that is killed or stopped.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torchrl.collectors import Collector
from torchrl.weight_update import WeightSyncScheme

from .errors import UsageError
from .layout.layout import Layout, layout_of, named_modules, named_tensors, scratch_of
from .policy.attaching import attach
from .policy.reader import Reader
from .updaters.shared_memory import SharedMemoryWeightUpdater
from .updaters.vanilla import VanillaWeightUpdater


class SegmentWeightSyncScheme(WeightSyncScheme):  # type: ignore[misc]
    """Synchronizes one model of torchrl's collectors through a segment.

    A collector that gets it in ``weight_sync_schemes`` is the sender: it publishes its policy when it starts, and again
    at each ``update_policy_weights_``. Its workers receive, and so does every other process that attaches to the
    segment, with ``wsync.attach`` or with a scheme of its own (``init_on_receiver``, ``connect``, ``receive``). If
    another process publishes, give a multi-process collector ``policy_factory=`` and no policy, so that it has nothing
    to send; and give a ``Collector`` its scheme with ``register_scheme_receiver``.

    Policies keep their own tensors (``mode="copy"``). A collector's policy version, also in the labels of its batches,
    is the segment's version. ``worker_ids`` is ignored, because every receiver takes the newest version.

    Args:
        name: name of the segment.
        timeout: seconds that a receiver waits for the first version; None waits for ever.
        runtime_dir: where segments live; default ``WSYNC_RUNTIME_DIR``, else ``/dev/shm/wsync-<uid>``.
    """

    def __init__(
        self, name: str, *, timeout: float | None = 60.0, runtime_dir: str | os.PathLike[str] | None = None
    ) -> None:
        super().__init__()
        self.name, self.timeout, self.runtime_dir = name, timeout, runtime_dir
        self._source: Any = None  # what ``send()`` sends without weights
        self._layout: Layout | None = None
        self._unsaved: dict[str, torch.Tensor] = {}
        self._sender: SharedMemoryWeightUpdater | None = None
        self._own: VanillaWeightUpdater | None = None  # for the policy that a sending collector acts with itself
        self._reader: Reader | None = None
        self._followed: nn.Module | None = None

    def __getstate__(self) -> dict[str, Any]:
        here = ("_source", "_sender", "_own", "_reader", "_followed")
        return {**super().__getstate__(), **dict.fromkeys(here)}

    @property
    def version(self) -> int:
        """The version that this side sent or took last; 0 before the first."""
        if self._reader is not None:
            return self._reader.version
        return self._sender.published.version if self._sender and self._sender.published else 0

    @property
    def context(self) -> Any:
        """The collector; None if there is none, or it is gone."""
        return None if self._context_ref is None else self._context_ref()

    @context.setter
    def context(self, collector: Any) -> None:
        self._context_ref = None if collector is None else weakref.ref(collector)
        if isinstance(collector, Collector):
            collector.pre_collect_hook = partial(self._before_batch, collector.pre_collect_hook)

    def send(self, weights: Any = None, worker_ids: int | list[int] | None = None) -> None:
        """Publishes weights as the next version; the receivers take it before they act again.

        Args:
            weights: a module, a TensorDict or a dict of tensors; None sends the collector's policy.
            worker_ids: ignored.

        Raises:
            RuntimeError: ``connect`` was not called on this sender.
            UsageError: no weights are given, and the collector has no policy.
            KeyError, ValueError, TypeError: the weights do not fit, or are not finite. The live version stays.
            SegmentBusy: another publisher is at work, or readers lease every spare slot.
        """
        if self._sender is None or not self.synchronized_on_sender:
            raise RuntimeError(f"the sender of {self.name!r} is not connected. Call init_on_sender and connect first.")
        weights = self._source if weights is None else weights
        if weights is None:
            raise UsageError(f"there is nothing to send to {self.name!r}: the collector has no policy. Give weights.")
        self._sender.push_weights(weights)
        if self._own is None:
            self._label()
        elif weights is not self._source:
            self._own.push_weights(weights)

    def receive(self, timeout: float | None = None) -> Any:
        """Takes the newest version if there is a newer one; call it between steps.

        Args:
            timeout: seconds to wait for a newer version; None does not wait.

        Returns:
            The model's weights, as a TensorDict, if it has a new version; else None.

        Raises:
            RuntimeError: ``connect`` was not called on this receiver.
        """
        if self._reader is None:
            raise RuntimeError(f"the receiver of {self.name!r} is not connected. Call init_on_receiver and connect.")
        if self.model is not self._followed:  # a worker's collector acts with a copy of the policy on another device
            self._follow()
            return self.weights
        if timeout is not None:
            self._reader.wait(timeout)
        return self.weights if self._reader.refresh(wait=True) else None

    def create_transport(self, **kwargs: Any) -> Any:
        raise NotImplementedError("the segment is the transport of this scheme. Call send and receive instead.")

    def shutdown(self) -> None:
        """Closes the segment, which continues to exist; safe to call again."""
        for held in (self._sender, self._reader):
            if held is not None:
                held.close()
        super().shutdown()

    def _init_on_sender_impl(
        self, *, model_id: str | None = None, context: Any = None, model: Any = None, weights: Any = None, **_: Any
    ) -> None:
        self.model_id = model_id
        if context is not None:
            self.context = context
            try:
                model = context.get_model(model_id)
            except ValueError:  # a collector with policy_factory= alone has none
                pass
            if isinstance(context, Collector):
                self._own = VanillaWeightUpdater.from_policy(model)
        elif model is None and weights is None:
            raise UsageError(f"the sender of {self.name!r} got nothing to send. Give model=, weights= or context=.")
        self._source = weights if model is None else model
        if model is not None:
            self._layout = layout_of(model)
            scratch = scratch_of(model)
            self._unsaved = {
                name: table[leaf].cpu() for name, (table, leaf) in _places(model).items() if name in scratch
            }
        self._sender = SharedMemoryWeightUpdater(self.name, policy=model, runtime_dir=self.runtime_dir)

    def _setup_connection_and_weights_on_sender_impl(
        self, *, worker_idx: int | None = None, weights: Any = None
    ) -> None:
        if weights is not None or self._source is not None:
            self.send(weights)
            self._label()

    def _init_on_receiver_impl(
        self, *, model_id: str, context: Any = None, model: Any = None, worker_idx: int | None = None, **_: Any
    ) -> None:
        self.model_id, self.worker_idx = model_id, worker_idx
        if context is not None:
            self.context = context
            model = context.get_model(model_id)
        self.model = model

    def _setup_connection_and_weights_on_receiver_impl(self, *, worker_idx: int | None = None) -> None:
        self._follow()
        self._label()

    def _follow(self) -> None:
        """Attaches the current model, instead of the one that was attached before."""
        if self._reader is not None:
            self._reader.close()
        self._followed = self.model
        if self._layout is not None:
            _give_memory(self._followed, self._layout, self._unsaved)
        self._reader = attach(
            self._followed, self.name, mode="copy", timeout=self.timeout, runtime_dir=self.runtime_dir
        )

    def _before_batch(self, hook: Callable[[], object] | None) -> None:
        if hook is not None:
            hook()
        if self._reader is not None:
            self.receive()
        self._label()

    def _label(self) -> None:
        """Has a collector that counts policy versions label its frames with the segment's version."""
        tracker: Any = getattr(self.context, "policy_version_tracker", None)
        if self.model_id == "policy" and isinstance(getattr(tracker, "version", None), int):  # not a UUID
            tracker.version = self.version


def _places(policy: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Each tensor's table in its module (parameters or buffers) and its key there, by the tensor's name."""
    return {
        prefix + leaf: (table, leaf)
        for prefix, owner in named_modules(policy)
        for table in (owner._parameters, owner._buffers)
        for leaf, tensor in table.items()
        if tensor is not None
    }


def _give_memory(policy: nn.Module, layout: Layout, unsaved: Mapping[str, torch.Tensor]) -> None:
    """Gives memory to a policy that torchrl sent to a worker, on the meta device.

    It ties the tensors that came untied, and restores non-persistent buffers, whose values are in no segment.
    """
    if not any(tensor.is_meta for _, tensor in named_tensors(policy)):
        return
    places = _places(policy)
    for entry in layout.tensors:
        table, leaf = places[entry.name]
        made = torch.empty_like(table[leaf], device="cpu")
        if isinstance(table[leaf], nn.Parameter):
            made = nn.Parameter(made, requires_grad=table[leaf].requires_grad)
        for name in entry.names:
            table, leaf = places[name]
            table[leaf] = made
    for name, buffer in unsaved.items():
        table, leaf = places[name]
        table[leaf] = buffer.clone()
