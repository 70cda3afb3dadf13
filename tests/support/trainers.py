"""A trainer beside a reader in one process, and what can be seen of the policy's memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from wsync.layout.layout import layout_of
from wsync.policy import swap
from wsync.segment.publishing import publish_tensors
from wsync.segment.writable import WritableSegment
from wsync.system import memory


class Trainer:
    """Publishes weights of one policy from memory, each with its mark as the step."""

    def __init__(self, make: Callable[[], nn.Module], name: str = "nets") -> None:
        self.segment = WritableSegment.create(name, layout_of(make()))
        self._make = make

    def push(self, mark: int) -> int:
        weights = {name: torch.full_like(tensor, mark) for name, tensor in self._make().state_dict().items()}
        with self.segment.publishing():
            return publish_tensors(self.segment, weights, step=mark).version


def noncontiguous() -> nn.Module:
    """A parameter that lies transposed in memory."""
    policy = nn.Linear(3, 5).eval()
    policy.weight = nn.Parameter(torch.zeros(3, 5).t())
    return policy


def slot_ranges(segment: WritableSegment, name: str = "slot-") -> list[range]:
    """The addresses at which this process maps slots of a segment, or the one of a name."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"{segment.path}/{name}" in line:
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            found.append(range(begin, end))
    return found


def addresses(policy: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in policy.state_dict().values()]


def taken_over() -> None:
    """Waits until what was kept of older versions is in memory of this process's own."""
    swap._looks.submit(int).result()


def leased(segment: WritableSegment) -> list[int]:
    """The slots that a publisher could not have."""
    found = []
    for slot in segment.slot_numbers():
        fd = os.open(segment.path / f"slot-{slot}.safetensors", os.O_RDWR | os.O_CLOEXEC)
        if not memory.try_lock(fd):
            found.append(slot)
        os.close(fd)
    return found
