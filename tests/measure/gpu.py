"""Figures of a policy on a GPU, each beside what one would do otherwise: ``python tests/measure/gpu.py``.

One run of under eight minutes runs the tests that need a GPU, then takes all figures, and ends with one JSON object. It
takes one CUDA device, and of the packages torch, numpy and safetensors alone (with ``PYTHONPATH=.`` where wsync is not
installed); where pytest, torchrl or fastsafetensors is missing, its part is left out and named. Of weights there is 1
GiB, or a fifth of what is free in ``/dev/shm``. Times jitter, so nothing here is asserted; quote the ratios, with date
and device.

``--rehearse`` runs the same lines on the CPU with little weights, to see that they run; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import wsync
from wsync.policy import attaching
from wsync.policy.attaching import Staging
from wsync.policy.gpu.cuda import Cuda
from wsync.policy.gpu.transfer import lock_slot
from wsync.segment.writable import WritableSegment

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))  # of the tests' own modules
from devices import LateDevice
from gpu_bench import TENSORS, Bench, at, deep, flat, put, standing, storm, timed, width
from gpu_peers import from_a_file, run_tests, schemes

MARKS = 4  # checkpoints that a storm goes around
RATE = 10.0  # versions a second, beside which steps are timed
Mode = Literal["swap", "copy"]


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
        bench.part(run_tests, bench)
        with standing("large", deep(bench.nbytes), folder, marks=2) as segment:
            bench.part(bus, bench, segment)
            bench.part(taking, bench, segment)
            bench.part(slowdown, bench)
        with standing("small", flat(bench.nbytes // 32), folder, marks=MARKS):
            bench.part(torn, bench)
        bench.part(compiled, bench)
        for nbytes in bench.sizes:
            bench.part(arrival, bench, nbytes)
        bench.part(from_a_file, bench)
        bench.part(schemes, bench)
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
        return Bench(torch.device("cpu"), late, folder, 4 << 20, 0.2, 3, 0.0, 1, (1 << 20, 1 << 60))
    place = torch.device("cuda:0")
    nbytes = min(1 << 30, shutil.disk_usage("/dev/shm").free // 5)
    return Bench(place, Cuda(place), folder, nbytes, 6.0, 12, 15.0, 2, (64 << 20, 1 << 30, 10 << 30))


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
        page_locked=not locked.hindrance,
        refused=locked.hindrance,
    )


# --- what a version takes


def taking(bench: Bench, segment: WritableSegment) -> None:
    """Both refresh() calls of a version, until the stream is done with them, beside load_state_dict from the CPU."""
    theirs = loading(bench)
    ways: list[tuple[Mode, Staging]] = [("swap", "device"), ("copy", "device"), ("copy", "none")]
    for mode, staging in ways:
        policy = deep(bench.nbytes).to(bench.place)
        before, most = bench.memory()
        with wsync.attach(policy, "large", mode=mode, staging=staging) as reader:
            times = [version(bench, segment, reader, number) for number in bench.each_round()]
            held, most = bench.memory()
        notice, take, arrival = (statistics.median(column) for column in zip(*times, strict=True))
        bench.say(
            f"a version from the policy's stream, {mode}" + ("" if staging == "device" else ", no staging"),
            notice_ms=notice * 1e3,
            take_ms=take * 1e3,
            to_arrival_ms=arrival * 1e3,
            load_state_dict_ms=theirs * 1e3,
            ratio=statistics.median(n + t for n, t, _ in times) / theirs,
            wanted="<= 0.05" if staging == "device" else "none",
            device_memory_held=(held - before) / bench.nbytes,  # in sizes of the weights, beside the policy's own
            device_memory_at_most=(most - before) / bench.nbytes,
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
    """Steps while versions arrive at ``RATE`` a second, beside steps while none does; in turn."""
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
                with storm("large", bench.folder, RATE):
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
            ratio_p99=at(busy, 0.99) / at(quiet, 0.99),
            wanted="<= 1.05 and <= 1.2",
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


# --- compiled code


def compiled(bench: Bench) -> None:
    """A policy compiled before it is attached, with the CUDA graphs of ``reduce-overhead``: each version is seen."""
    policy = deep(bench.nbytes // 64).to(bench.place)
    observation = torch.ones(1, width(bench.nbytes // 64), device=bench.place)
    how = {"mode": "reduce-overhead"} if bench.real else {"backend": "eager"}
    step = torch.compile(policy, **how)  # type: ignore[call-overload]
    wrong = 0
    with standing("net", deep(bench.nbytes // 64), bench.folder, marks=2) as segment, torch.no_grad():
        for _ in range(3):
            step(observation)
        with wsync.attach(policy, "net", mode="copy") as reader:
            for turn in range(8):
                put(segment, bench.folder / f"net-{turn % 2}.safetensors")
                reader.refresh(wait=True)
                wrong += not torch.equal(step(observation).clone(), policy(observation))
            quiet = [timed(lambda: (reader.refresh(), step(observation).sum().item())) for _ in range(200)]
    bench.say("compiled, mode copy", wrong=wrong, wanted=0, step_p50_ms=at(quiet, 0.5) * 1e3)


# --- from a publish to a policy


def arrival(bench: Bench, nbytes: int) -> None:
    """Seconds from a publish, which is one store, until the policy on the device has all of that version."""
    name = f"arrival of {nbytes >> 20:,} MiB"
    room = min(shutil.disk_usage("/dev/shm").free // 2, shutil.disk_usage(bench.folder).free)
    if nbytes * 1.2 > room:
        bench.say(name, left_out=f"there is room for {room >> 20:,} MiB")
        return
    policy = deep(nbytes)
    with standing("arrival", policy, bench.folder, marks=1, slots=2) as segment:
        policy.to(bench.place)
        times = []
        with wsync.attach(policy, "arrival", mode="copy") as reader:
            for _ in bench.each_round():
                began = time.perf_counter()
                put(segment, bench.folder / "arrival-0.safetensors")
                stored = time.perf_counter()
                while not reader.refresh():
                    reader.wait(60)
                bench.sync()
                times.append((stored - began, time.perf_counter() - stored))
    staged, had = (statistics.median(column) for column in zip(*times, strict=True))
    bench.say(name, publish_ms=staged * 1e3, arrival_ms=had * 1e3, GB_per_s=nbytes / had / 1e9)


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


if __name__ == "__main__":
    main()
