"""Publishes a policy from a trainer's memory in one line, in a plain loop or from a framework's callback."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import SegmentBusy, UsageError
from .shared_memory import SharedMemoryWeightUpdater

if TYPE_CHECKING:
    import torch

    from ..segment.reader_records import ReaderRecord

_log = logging.getLogger("wsync")


class Publisher:
    """Publishes a policy's weights from memory: ``with wsync.publisher(name, policy) as p: p.push(step)``.

    Args:
        name: of the segment, which is made if there is none.
        policy: an ``nn.Module``, whose parameters and persistent buffers are read at each push, on any device.
        runtime_dir: where segments live; default ``WSYNC_RUNTIME_DIR``, else ``/dev/shm/wsync-<uid>``.
    """

    def __init__(
        self, name: str, policy: torch.nn.Module, *, runtime_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self._policy = policy
        self._updater = SharedMemoryWeightUpdater(name, policy=policy, runtime_dir=runtime_dir)

    def push(self, step: int | None = None, *, extras: Mapping[str, bytes] | None = None) -> int:
        """Publishes the weights as they are now, with the trainer's own number for them; returns the version.

        Args:
            extras: files that travel with them; see ``SharedMemoryWeightUpdater.push_weights``.

        Raises:
            ValueError: a weight is not finite. The live version stays.
            SegmentBusy: another publisher is at work, or readers lease every spare slot.
            SegmentError: the segment cannot be made, or holds another architecture.
        """
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
        """Closes the segment, which stays."""
        self._updater.close()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


publisher = Publisher


class Periodic:
    """The callbacks' common part: a version when training starts, one every so many steps, and one at its end.

    Args:
        name: of the segment.
        every: steps between two versions, as the framework counts them.
        policy: picks what is published out of the framework's model; default all of it.
        runtime_dir: as for ``Publisher``.
        extras: called for each version; returns the files that travel with it, bytes by their names.

    If the segment is busy, a warning is logged, and the next version brings the weights. Other errors end the training.
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
