"""A policy's step while a publisher stages without a pause, beside the same step while it is stopped.

``python tests/measure/step.py [MiB]`` prints the 99th percentiles of ``refresh()`` and a forward pass together, in turn
in one run. On two cores the ratio says whether staging leaves the policy's core alone.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from math import isqrt
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import wsync
from wsync.layout.layout import layout_of
from wsync.segment.writable import WritableSegment

LAYERS, SECONDS, TURNS = 100, 1.0, 8

PUBLISHER = """
import sys
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import SegmentBusy
from wsync.segment.publishing import publish
from wsync.segment.writable import WritableSegment

segment = WritableSegment.open("policy", sys.argv[1])
while True:
    try:
        with segment.publishing(), Checkpoint(sys.argv[2]) as checkpoint:
            publish(segment, checkpoint)
    except SegmentBusy:  # the reader is late
        continue
"""


def main() -> None:
    nbytes = (int(sys.argv[1]) if len(sys.argv) > 1 else 64) << 20
    width = isqrt(nbytes // LAYERS // 4)
    policy = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS))).eval()
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(prefix="wsync-measure-", dir="/dev/shm") as shared,
        tempfile.TemporaryDirectory(prefix="wsync-measure-") as disk,
    ):
        file = Path(disk, "step.safetensors")
        save_file(policy.state_dict(), file)
        os.utime(file, (0, 0))
        WritableSegment.create("policy", layout_of(policy), shared).close()
        command = [sys.executable, "-c", PUBLISHER, shared, str(file)]
        with subprocess.Popen(command) as publisher:
            try:
                with wsync.attach(policy, "policy", mode="swap", timeout=60, runtime_dir=shared) as reader:
                    pairs = [measured(publisher, reader, policy, width) for _ in range(TURNS)]
            finally:
                publisher.kill()
    busy, alone = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"99th percentile of a step: {busy * 1e3:.2f} ms beside {alone * 1e3:.2f} ms alone, ratio {ratio:.2f}")


def measured(publisher: subprocess.Popen[bytes], reader: wsync.Reader, policy: nn.Module, width: int) -> list[float]:
    """Seconds of a step beside the publisher, and alone."""
    busy = steps(reader, policy, width)
    publisher.send_signal(signal.SIGSTOP)
    try:
        return [busy, steps(reader, policy, width)]
    finally:
        publisher.send_signal(signal.SIGCONT)


def steps(reader: wsync.Reader, policy: nn.Module, width: int) -> float:
    observation, taken = torch.zeros(width), []
    end = time.perf_counter() + SECONDS
    with torch.inference_mode():
        while (began := time.perf_counter()) < end:
            reader.refresh()
            policy(observation)
            taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) * 99 // 100]


if __name__ == "__main__":
    main()
