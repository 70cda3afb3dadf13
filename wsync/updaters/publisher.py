"""Publishes a policy from a trainer's memory, in a plain loop or from a framework's callback."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import SegmentBusy, UsageError
from ..layout.module import check_module
from .shared_memory import SharedMemoryWeightUpdater

if TYPE_CHECKING:
    import torch

    from ..segment.reader_records import ReaderRecord

_log = logging.getLogger("wsync")


class Publisher:
    """Publishes a policy's weights from memory: ``with wsync.publisher(name, policy) as p: p.push(step)``.

    Args:
        name: name of the segment, which is made if it does not exist.
        policy: an ``nn.Module``, on any device, whose parameters and persistent buffers are read at each push.
        runtime_dir: where segments live; default ``WSYNC_RUNTIME_DIR``, else ``/dev/shm/wsync-<uid>``.

    Raises:
        UsageError: the policy is not an ``nn.Module``.
    """

    def __init__(
        self, name: str, policy: torch.nn.Module, *, runtime_dir: str | os.PathLike[str] | None = None
    ) -> None:
        check_module(policy, "a publisher")
        self._policy = policy
        self._updater = SharedMemoryWeightUpdater(name, policy=policy, runtime_dir=runtime_dir)

    def push(self, step: int | None = None, *, extras: Mapping[str, bytes] | None = None) -> int:
        """Publishes the weights as they are now; returns the version. After an error, the live version stays live.

        Args:
            step: the trainer's own number for these weights.
            extras: files that travel with them; see ``SharedMemoryWeightUpdater.push_weights``.

        Raises:
            Exception: as ``SharedMemoryWeightUpdater.push_weights``.
            TypeError: the step is not a whole number.
            ValueError: a shape differs from the segment's, a value is not finite, or the step is beyond 64 bits.
            SpecError: the policy has neither parameters nor persistent buffers.
            SegmentBusy: another publisher is at work, or readers lease every spare slot.
            SegmentError: the segment cannot be made or opened.
        """
        with self._updater._pushing:
            self._updater.step = step
            self._updater.push_weights(self._policy, extras=extras)
            assert self._updater.published
            return self._updater.published.version

    def wait_for_readers(self, version: int | None = None, timeout: float | None = None) -> list[ReaderRecord]:
        """See ``SharedMemoryWeightUpdater.wait_for_readers``."""
        return self._updater.wait_for_readers(version, timeout)

    def oldest_version(self) -> int:
        """See ``SharedMemoryWeightUpdater.oldest_version``."""
        return self._updater.oldest_version()

    def close(self) -> None:
        """Closes the segment, which continues to exist; a later push opens it again."""
        self._updater.close()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


publisher = Publisher


class Periodic:
    """What the callbacks share: publishes when training starts, every so many steps, and at the end.

    If the segment is busy, a warning is logged, and that step's weights are skipped. Other errors end the training.

    Args:
        name: name of the segment.
        every: steps between two versions, as the framework counts them.
        policy: takes the framework's model and returns the module to publish; default the whole model.
        runtime_dir: as for ``Publisher``.
        extras: called for each version; returns the files that travel with it: bytes by file name.
    """

    def __init__(
        self,
        name: str,
        every: int,
        policy: Callable[[Any], torch.nn.Module] | None,
        runtime_dir: str | os.PathLike[str] | None,
        extras: Callable[[], Mapping[str, bytes]] | None = None,
    ) -> None:
        if every < 1:
            raise UsageError(f"every={every} is not a number of steps. Give 1 or more.")
        self._name, self._every, self._policy, self._runtime_dir = name, every, policy, runtime_dir
        self._extras = extras
        self._pushed: int | None = None
        self._due = 0

    def start(self, model: Any, step: int) -> None:
        self._publisher = Publisher(
            self._name, self._policy(model) if self._policy else model, runtime_dir=self._runtime_dir
        )
        self._push(step)

    def at(self, step: int) -> None:
        if step >= self._due:
            self._push(step)

    def end(self, step: int) -> None:
        if step != self._pushed:
            self._push(step)
        self._publisher.close()

    def _push(self, step: int) -> None:
        self._due = step + self._every
        try:
            self._publisher.push(step, extras=self._extras() if self._extras else None)
            self._pushed = step
        except SegmentBusy as exc:
            _log.warning("step %d was not published, and the next version will be newer: %s", step, exc)
