"""Figures of a policy on a GPU, each beside what one would do otherwise: ``python tests/measure/gpu.py``.

One run of under five minutes makes all of them and ends with one JSON object. It takes one CUDA device, and of the
packages torch, numpy and safetensors alone (with ``PYTHONPATH=.`` where wsync is not installed); of weights there is
1 GiB, or a fifth of what is free in ``/dev/shm``. Times jitter, so nothing here is asserted; quote the ratios, with
date and device.

``--rehearse`` runs the same lines on the CPU with little weights, to see that they run; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

import wsync
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.layout.layout import layout_of
from wsync.policy import attaching
from wsync.policy.attaching import Staging
from wsync.policy.device import Cuda
from wsync.policy.device_weights import lock_slot
from wsync.segment.publisher import publish
from wsync.segment.writable import WritableSegment

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))  # of the tests' own modules
from devices import LateDevice

TENSORS = 300
MARKS = 4  # checkpoints that a storm goes around
Mode = Literal["swap", "copy"]

STORM = """
import itertools, sys, threading

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import SegmentBusy
from wsync.segment.publisher import publish
from wsync.segment.writable import WritableSegment

ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
segment = WritableSegment.open(sys.argv[1])
for turn, file in enumerate(itertools.cycle(sys.argv[2:])):
    if ended.is_set():
        break
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
    """

    place: torch.device
    device: Cuda
    folder: Path
    nbytes: int
    seconds: float
    rounds: int
    limit: float
    turns: int
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def real(self) -> bool:
        return self.place.type == "cuda"

    def sync(self) -> None:
        if self.real:
            torch.cuda.synchronize(self.place)

    def each_round(self) -> Iterator[int]:
        began = time.perf_counter()
        for number in range(self.rounds):
            if number >= 3 and time.perf_counter() - began > self.limit:
                return
            yield number

    def say(self, name: str, **found: Any) -> None:
        self.figures[name] = {k: round(v, 5) if isinstance(v, float) else v for k, v in found.items()}
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in self.figures[name].items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small: to see that the lines run")
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        sys.exit(
            f"there is no CUDA device here (torch {torch.__version__}): nothing was measured. Run this where there is "
            "one, or see with --rehearse that its lines run."
        )
    folder = Path(tempfile.mkdtemp(prefix="wsync-measure-"))
    runtime = Path(tempfile.mkdtemp(prefix="wsync-measure-", dir="/dev/shm"))
    os.environ["WSYNC_RUNTIME_DIR"] = str(runtime)
    began = time.perf_counter()
    try:
        bench = prepare(folder, rehearse=given.rehearse)
        with standing("large", deep(bench.nbytes), folder, marks=2) as segment:
            bus(bench, segment)
            taking(bench, segment)
            slowdown(bench)
        with standing("small", flat(bench.nbytes // 32), folder, marks=MARKS):
            torn(bench)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(runtime)
    about = {
        "device": torch.cuda.get_device_name(bench.place) if bench.real else "none: a rehearsal",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "bytes": bench.nbytes,
        "tensors": TENSORS,
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps({**about, "figures": bench.figures}))


def prepare(folder: Path, *, rehearse: bool) -> Bench:
    if rehearse:
        late = LateDevice(prompt=True)
        attaching._device_of = lambda policy: late
        return Bench(torch.device("cpu"), late, folder, 4 << 20, 0.2, 3, 0.0, 1)
    place = torch.device("cuda:0")
    nbytes = min(1 << 30, shutil.disk_usage("/dev/shm").free // 5)
    return Bench(place, Cuda(place), folder, nbytes, 6.0, 12, 15.0, 2)


# --- the bus


def bus(bench: Bench, segment: WritableSegment) -> None:
    """The slot's locked pages over the bus, beside the same bytes from a plain page-locked buffer."""
    locked = lock_slot(segment, segment.word & 0xFF, bench.device)
    nbytes = locked.weights.numel()
    plain = torch.empty(nbytes, dtype=torch.uint8, pin_memory=bench.real)
    target = bench.device.empty(nbytes)

    def copy(source: torch.Tensor) -> float:
        bench.sync()
        return timed(lambda: bench.device.send([target], [source], aside=True).synchronize())

    copy(locked.weights)
    copy(plain)
    pairs = [(copy(locked.weights), copy(plain)) for _ in bench.each_round()]
    copy(locked.weights)
    whole = torch.equal(target.cpu(), torch.frombuffer(segment.live_weights(), dtype=torch.uint8))
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    bench.say(
        "bus copy, slot beside plain page-locked buffer",
        slot_GB_per_s=nbytes / ours / 1e9,
        plain_GB_per_s=nbytes / theirs / 1e9,
        ratio=statistics.median(b / a for a, b in pairs),
        wanted=">= 0.95",
        whole=whole,
        page_locked=not locked.refused,
        refused=locked.refused,
    )


# --- what a version takes


def taking(bench: Bench, segment: WritableSegment) -> None:
    """Both refresh() calls of a version, until the stream is done with them, beside load_state_dict from the CPU."""
    theirs = loading(bench)
    ways: list[tuple[Mode, Staging]] = [("swap", "device"), ("copy", "device"), ("copy", "none")]
    for mode, staging in ways:
        policy = deep(bench.nbytes).to(bench.place)
        with wsync.attach(policy, "large", mode=mode, staging=staging) as reader:
            times = [version(bench, segment, reader, number) for number in bench.each_round()]
        notice, take, arrival = (statistics.median(column) for column in zip(*times, strict=True))
        bench.say(
            f"a version from the policy's stream, {mode}" + ("" if staging == "device" else ", no staging"),
            notice_ms=notice * 1e3,
            take_ms=take * 1e3,
            to_arrival_ms=arrival * 1e3,
            load_state_dict_ms=theirs * 1e3,
            ratio=statistics.median(n + t for n, t, _ in times) / theirs,
            wanted="<= 0.05" if staging == "device" else "none",
        )


def version(bench: Bench, segment: WritableSegment, reader: wsync.Reader, turn: int) -> tuple[float, float, float]:
    """Publishes one; seconds of the refresh that notices it, of the one that takes it, and of all with the bus."""
    put(segment, bench.folder / f"large-{turn % 2}.safetensors")
    bench.sync()
    began = time.perf_counter()
    if reader.refresh():  # without staging the bus is waited for here
        bench.sync()
        noticed = landed = time.perf_counter()
    else:
        noticed = time.perf_counter()
        reader.wait(60)
        landed = time.perf_counter()
        assert reader.refresh()
        bench.sync()
    ended = time.perf_counter()
    return noticed - began, ended - landed, ended - began


def loading(bench: Bench) -> float:
    policy = deep(bench.nbytes)
    state = {name: torch.ones_like(tensor) for name, tensor in policy.state_dict().items()}
    policy.to(bench.place)

    def load() -> None:
        policy.load_state_dict(state)
        bench.sync()

    return statistics.median(timed(load) for _ in bench.each_round())


# --- the steps meanwhile


def slowdown(bench: Bench) -> None:
    """Steps while versions arrive as fast as one process publishes them, beside steps while none does; in turn."""
    modes: list[Mode] = ["copy", "swap"]
    for mode in modes:
        policy = deep(bench.nbytes).to(bench.place)
        observation = torch.randn(32, width(bench.nbytes), device=bench.place)
        quiet: list[float] = []
        busy: list[float] = []
        versions = 0
        with wsync.attach(policy, "large", mode=mode) as reader, torch.no_grad():
            steps(bench, reader, policy, observation)  # warm
            for _ in range(bench.turns):
                quiet += steps(bench, reader, policy, observation)
                before = reader.version
                with storm("large", bench.folder):
                    busy += steps(bench, reader, policy, observation)
                versions += reader.version - before
                reader.refresh(wait=True)  # what came last
        bench.say(
            f"a step while versions arrive, {mode}",
            versions=versions,
            quiet_p50_ms=at(quiet, 0.5) * 1e3,
            busy_p50_ms=at(busy, 0.5) * 1e3,
            quiet_p99_ms=at(quiet, 0.99) * 1e3,
            busy_p99_ms=at(busy, 0.99) * 1e3,
            busy_max_ms=max(busy) * 1e3,
            ratio_p50=at(busy, 0.5) / at(quiet, 0.5),
            ratio=at(busy, 0.99) / at(quiet, 0.99),
            wanted="<= 1.2",
        )


def steps(bench: Bench, reader: wsync.Reader, policy: nn.Module, observation: torch.Tensor) -> list[float]:
    def step() -> None:
        reader.refresh()
        policy(observation).sum().item()

    taken = []
    end = time.perf_counter() + bench.seconds
    while time.perf_counter() < end:
        taken.append(timed(step))
    return taken


# --- torn steps


def torn(bench: Bench) -> None:
    """Steps that look at all weights, queued far ahead of the device, under a storm: each sees the version told."""
    ways: list[tuple[Mode, Staging, bool]] = [
        ("swap", "device", False),
        ("copy", "device", False),
        ("copy", "device", True),
        ("copy", "none", True),
    ]
    for mode, staging, graphed in ways:
        if graphed and not bench.real:
            continue
        policy = flat(bench.nbytes // 32).to(bench.place)
        look = captured(policy) if graphed else partial(extremes, policy)  # captured before it is attached
        looks = bad = 0
        with wsync.attach(policy, "small", mode=mode, staging=staging) as reader, storm("small", bench.folder):
            first = reader.version
            end = time.perf_counter() + bench.seconds * 1.5
            while time.perf_counter() < end:
                seen = []
                for _ in range(50):
                    reader.refresh()
                    seen.append((reader.step, look()))
                bad += sum(set(found.flatten().tolist()) != {float(mark or 0)} for mark, found in seen)
                looks += len(seen)
            versions = reader.version - first
        bench.say(
            f"torn steps, {mode}" + ("" if staging == "device" else ", no staging") + (", CUDA graph" * graphed),
            steps=looks,
            versions=versions,
            torn=bad,
            wanted=0,
        )


def extremes(policy: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([torch.stack(tuple(p.aminmax())) for p in policy.parameters()])


def captured(policy: nn.Module) -> Callable[[], torch.Tensor]:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what capturing wants: a warm-up on a stream of its own
        for _ in range(3):
            extremes(policy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = extremes(policy)

    def replay() -> torch.Tensor:
        graph.replay()
        return out.clone()

    return replay


# --- policies, checkpoints, publishers


def deep(nbytes: int) -> nn.Sequential:
    """So many tensors as layers, half of them biases."""
    layers = (nn.Linear(width(nbytes), width(nbytes), device="meta") for _ in range(TENSORS // 2))
    return nn.Sequential(*layers).to_empty(device="cpu").eval()


def width(nbytes: int) -> int:
    return int((nbytes / (TENSORS // 2) / 4) ** 0.5)


def flat(nbytes: int) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.zeros(nbytes // TENSORS // 4)) for _ in range(TENSORS)).eval()


@contextmanager
def standing(name: str, policy: nn.Module, folder: Path, marks: int) -> Iterator[WritableSegment]:
    """A segment with a first version, and checkpoints to publish, all weights of each its mark, which is its step."""
    for mark in range(marks):
        state = {key: torch.full_like(tensor, mark + 1.0) for key, tensor in policy.state_dict().items()}
        save_file(state, folder / f"{name}-{mark}.safetensors", metadata={"step": str(mark + 1)})
    segment = WritableSegment.create(name, layout_of(policy))
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
def storm(name: str, folder: Path) -> Iterator[None]:
    """A process that publishes as fast as it can; it is at work when the block begins."""
    command = [sys.executable, "-c", STORM, name, *map(str, sorted(folder.glob(f"{name}-*")))]
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


if __name__ == "__main__":
    main()
