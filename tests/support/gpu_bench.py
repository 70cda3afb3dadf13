"""What the figures of a policy on a GPU are taken with: where and how long, policies, checkpoints, publishers."""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.layout.layout import layout_of
from wsync.policy.gpu.cuda import Cuda
from wsync.segment.publishing import publish
from wsync.segment.writable import WritableSegment

TENSORS = 300
STORM = """
import itertools, sys, threading, time

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import SegmentBusy
from wsync.segment.publishing import publish
from wsync.segment.writable import WritableSegment

ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
segment, pause = WritableSegment.open(sys.argv[1]), float(sys.argv[2])
due = time.monotonic()
for turn, file in enumerate(itertools.cycle(sys.argv[3:])):
    if ended.wait(max(0.0, due - time.monotonic())):
        break
    due += pause
    try:
        with segment.publishing(), Checkpoint(file) as checkpoint:
            publish(segment, checkpoint)
    except SegmentBusy:  # all spare slots are leased: the reader is on its way
        pass
    if turn == 0:
        print("publishing", flush=True)
"""


@dataclass
class Bench:
    """Where, how large and how long; and what was found.

    Attributes:
        nbytes: of the weights, about.
        seconds: that a phase of steps or of a storm takes.
        rounds: of what is timed one by one, at most.
        limit: seconds after which no further round of it begins; three there are in any case.
        turns: of steps with and without a storm.
        sizes: in bytes, whose way from a publish to the policy is timed.
    """

    place: torch.device
    device: Cuda
    folder: Path
    nbytes: int
    seconds: float
    rounds: int
    limit: float
    turns: int
    sizes: tuple[int, ...]
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def real(self) -> bool:
        return self.place.type == "cuda"

    def sync(self) -> None:
        if self.real:
            torch.cuda.synchronize(self.place)

    def part(self, work: Callable[..., None], *arguments: object) -> None:
        """Runs a part; on a device its failure is a finding, and the other parts go on."""
        if not self.real:
            work(*arguments)
            return
        try:
            work(*arguments)
        except Exception as exc:  # whatever it is: what follows is worth having all the same
            self.say(work.__name__, failed=f"{type(exc).__name__}: {exc}")
            traceback.print_exc()

    def memory(self) -> tuple[int, int]:
        """Bytes that tensors take on the device now, and at most since the last call."""
        if not self.real:
            return 0, 0
        self.sync()
        now = torch.cuda.memory_allocated(self.place), torch.cuda.max_memory_allocated(self.place)
        torch.cuda.reset_peak_memory_stats(self.place)
        return now

    def each_round(self) -> Iterator[int]:
        began = time.perf_counter()
        for number in range(self.rounds):
            if number >= 3 and time.perf_counter() - began > self.limit:
                return
            yield number

    def say(self, name: str, **found: Any) -> None:
        self.figures[name] = {k: round(v, 5) if isinstance(v, float) else v for k, v in found.items()}
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in self.figures[name].items()), flush=True)


def deep(nbytes: int) -> nn.Sequential:
    """So many tensors as layers, half of them biases."""
    layers = (nn.Linear(width(nbytes), width(nbytes), device="meta") for _ in range(TENSORS // 2))
    return nn.Sequential(*layers).to_empty(device="cpu").eval()


def width(nbytes: int) -> int:
    return int((nbytes / (TENSORS // 2) / 4) ** 0.5)


def flat(nbytes: int) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.zeros(nbytes // TENSORS // 4)) for _ in range(TENSORS)).eval()


@contextmanager
def standing(name: str, policy: nn.Module, folder: Path, marks: int, slots: int = 3) -> Iterator[WritableSegment]:
    """A segment with a first version, and checkpoints to publish, all weights of each its mark, which is its step."""
    for mark in range(marks):
        state = {key: torch.full_like(tensor, mark + 1.0) for key, tensor in policy.state_dict().items()}
        save_file(state, folder / f"{name}-{mark}.safetensors", metadata={"step": str(mark + 1)})
    segment = WritableSegment.create(name, layout_of(policy), slots=slots)
    try:
        put(segment, folder / f"{name}-0.safetensors")
        yield segment
    finally:
        segment.remove()
        segment.close()
        for file in folder.glob(f"{name}-*"):
            file.unlink()


def put(segment: WritableSegment, file: Path) -> None:
    with segment.publishing(), Checkpoint(file) as checkpoint:
        publish(segment, checkpoint)


@contextmanager
def storm(name: str, folder: Path, rate: float = 0.0) -> Iterator[None]:
    """A process that publishes so many versions a second, or as many as it can; it is at work when the block begins."""
    pause = str(1 / rate if rate else 0)
    command = [sys.executable, "-c", STORM, name, pause, *map(str, sorted(folder.glob(f"{name}-*")))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "publishing\n"
            yield
        finally:
            process.communicate("")  # its end of input ends it


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def at(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * share))]
