"""wsync keeps the weights of a running policy in step with the newest checkpoint on disk.

Importing this package imports neither torch nor tensordict; what may need them is loaded when it is first used.

The rooms, from the ground up; what a room imports when it is imported stands before it:

    ground          errors layout memory prefetch access notify transfer
    checkpoints     header parts store_client store hub casting finite fitting staging advice adapter checkpoint
                    remote source changes
    segments        segment_files registry segment badge
    writing side    publisher weights weight_getter updaters segment_updater
    policy's side   attached swap copying reader device device_weights device_reader attaching
    the past        outcome state record rollback
    settings        hooks metrics spec
    what people see console history tables status inspect
    gates, hooks    command gate hook_runner
    one pass        schedule syncer
    many boxes      convergence group delivery fleet
    a watch         figures endpoint monitor service
    measuring       bench
    command line    options cli_bench cli_history cli
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    AttachTimeout,
    CheckpointError,
    CheckpointRejected,
    LayoutDiffers,
    NoCheckpoint,
    RetryLater,
    SegmentError,
    SpecError,
    SwapRefused,
    UsageError,
    WsyncError,
)

if TYPE_CHECKING:
    from .access import Access
    from .attaching import attach
    from .reader import Reader
    from .segment_updater import SharedMemoryWeightUpdater
    from .updaters import VanillaWeightUpdater, WeightUpdaterBase
    from .weight_getter import CheckpointWeightGetter

__version__ = "0.1.0"

_HOMES = {
    "Access": "access",
    "CheckpointWeightGetter": "weight_getter",
    "Reader": "reader",
    "SharedMemoryWeightUpdater": "segment_updater",
    "VanillaWeightUpdater": "updaters",
    "WeightUpdaterBase": "updaters",
    "attach": "attaching",
}

__all__ = [
    "Access",
    "AttachTimeout",
    "CheckpointError",
    "CheckpointRejected",
    "CheckpointWeightGetter",
    "LayoutDiffers",
    "NoCheckpoint",
    "Reader",
    "RetryLater",
    "SegmentError",
    "SharedMemoryWeightUpdater",
    "SpecError",
    "SwapRefused",
    "UsageError",
    "VanillaWeightUpdater",
    "WeightUpdaterBase",
    "WsyncError",
    "attach",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
