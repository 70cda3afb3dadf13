"""wsync keeps the weights of a running policy in step with the newest checkpoint on disk.

Importing this package imports neither torch nor tensordict; names that need them are loaded when they are first used.

The rooms, lowest layer first. Each may import only rooms that this list names before it:

    errors, text    the exceptions, their exit codes; numbers and times as people read them
    system          what the kernel gives: memory, locks, sleeping on a word, child processes; who may open what
    layout          what weights are: names, dtypes, offsets; finite; tables of tensors
    fitting         how a checkpoint's tensors become a policy's: header, settings, match, casts, advice
    stores          objects behind a URL
    checkpoints     one checkpoint: its files, whether it is whole, read into a buffer
    segment         shared memory: its files, the protocol, the readers' records, publishing
    discovery       a place of checkpoints: listing, newest, changes, the weight getter
    policy          a policy's process: attach, swap, copy, GPU
    updaters        the weight updaters, and how far their versions have come
    torchrl, stable_baselines3, transformers, lightning
                    what plugs into each of them; needs it, and is imported by its own name
    history         what outlives a reboot: database, pins, refusals, copies, rollback
    settings        the policy spec
    hooks           gates and hooks
    sync            one pass, and when the next is due
    fleet           many boxes as one
    service         a watch, its figures, systemd
    bench           what this box can do
    cli             the command line: what each command takes, and what it prints
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    AttachTimeout,
    CheckpointError,
    CheckpointRejected,
    CopyRefused,
    HalfWritten,
    LayoutDiffers,
    NoCheckpoint,
    RetryLater,
    SegmentBusy,
    SegmentError,
    SpecError,
    Stale,
    SwapRefused,
    UsageError,
    WsyncError,
)

if TYPE_CHECKING:
    from .discovery.weight_getter import CheckpointWeightGetter
    from .policy.attaching import attach
    from .policy.reader import Reader
    from .segment.numpy_reader import Held, follow, lease
    from .system.access import Access
    from .updaters.publisher import Publisher, publisher
    from .updaters.shared_memory import SharedMemoryWeightUpdater
    from .updaters.vanilla import VanillaWeightUpdater, WeightUpdaterBase

__version__ = "0.1.0"

_HOMES = {
    "Access": "system.access",
    "CheckpointWeightGetter": "discovery.weight_getter",
    "Held": "segment.numpy_reader",
    "Publisher": "updaters.publisher",
    "Reader": "policy.reader",
    "SharedMemoryWeightUpdater": "updaters.shared_memory",
    "VanillaWeightUpdater": "updaters.vanilla",
    "WeightUpdaterBase": "updaters.vanilla",
    "attach": "policy.attaching",
    "follow": "segment.numpy_reader",
    "lease": "segment.numpy_reader",
    "publisher": "updaters.publisher",
}

__all__ = [
    "Access",
    "AttachTimeout",
    "CheckpointError",
    "CheckpointRejected",
    "CheckpointWeightGetter",
    "CopyRefused",
    "HalfWritten",
    "Held",
    "LayoutDiffers",
    "NoCheckpoint",
    "Publisher",
    "Reader",
    "RetryLater",
    "SegmentBusy",
    "SegmentError",
    "SharedMemoryWeightUpdater",
    "SpecError",
    "Stale",
    "SwapRefused",
    "UsageError",
    "VanillaWeightUpdater",
    "WeightUpdaterBase",
    "WsyncError",
    "attach",
    "follow",
    "lease",
    "publisher",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
