"""An update of a collector's worker by each weight sync scheme, beside one another in one run.

``python tests/measure/scheme.py [MiB [DEVICE]]`` prints medians: of ``update_policy_weights_``, and of that and the
next batch together, since torchrl's schemes wait for the worker in the one and ours takes a version in the other.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from collecting import Still, make_policy
from torchrl.collectors import MultiSyncCollector
from torchrl.weight_update import MultiProcessWeightSyncScheme, SharedMemWeightSyncScheme

from wsync.torchrl import SegmentWeightSyncScheme

LAYERS, TURNS = 20, 15


class Large(nn.Module):
    """So many bytes of weights, of which one layer acts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.act = nn.Linear(2, 1)
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        action: torch.Tensor = self.act(observation)
        return action


def main() -> None:
    torch.set_num_threads(1)
    size, device = [*sys.argv[1:], *("64", "cpu")[len(sys.argv) - 1 :]]
    width = isqrt((int(size) << 20) // LAYERS // 4)
    policy, new = (make_policy(mark, lambda: Large(width)).to(device) for mark in (1.0, 2.0))
    with tempfile.TemporaryDirectory(prefix="wsync-measure-", dir="/dev/shm") as shared:
        os.environ["WSYNC_RUNTIME_DIR"] = shared
        schemes = SegmentWeightSyncScheme("rl"), SharedMemWeightSyncScheme(), MultiProcessWeightSyncScheme()
        collectors = [collector(scheme, policy, device) for scheme in schemes]
        try:
            batches = [iter(each) for each in collectors]
            turns = [
                [measured(*pair, new) for pair in zip(collectors, batches, strict=True)] for _ in range(TURNS + 1)
            ][1:]
        finally:
            for each in collectors:
                each.shutdown()
    for scheme, *rows in zip(schemes, *turns, strict=True):
        update, whole = (statistics.median(column) * 1e3 for column in zip(*rows, strict=True))
        print(f"{type(scheme).__name__:30} update {update:8.2f} ms   with the next batch {whole:8.2f} ms")


def collector(scheme: Any, policy: Any, device: str) -> Any:
    options: dict[str, Any] = {"frames_per_batch": 4, "total_frames": -1, "cat_results": 0, "use_buffers": True}
    options |= {"policy_device": device, "env_device": "cpu", "storing_device": "cpu"} if device != "cpu" else {}
    return MultiSyncCollector([Still], policy, weight_sync_schemes={"policy": scheme}, **options)


def measured(collector: Any, batches: Any, new: Any) -> tuple[float, float]:
    """Seconds of an update, and of that with the next batch."""
    next(batches)
    began = time.perf_counter()
    collector.update_policy_weights_(new)
    updated = time.perf_counter()
    next(batches)
    return updated - began, time.perf_counter() - began


if __name__ == "__main__":
    main()
