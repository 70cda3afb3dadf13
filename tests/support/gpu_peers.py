"""What stands beside wsync's own figures on a GPU: the tests, loading a file by other means, torchrl's schemes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench, deep, put, standing, timed
from safetensors.torch import load_file

import wsync

TESTS = Path(__file__).resolve().parents[1]
LIMIT = 240.0  # seconds that a part of its own may take


def run_tests(bench: Bench) -> None:
    """All tests that take a GPU, as pytest ends them."""
    if not bench.real:
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "policy" / "test_gpu.py")]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=LIMIT)
    print(done.stdout[-4000:], done.stderr[-1000:], sep="\n", flush=True)
    bench.say("tests", ended_with=done.returncode, said=(done.stdout.strip().splitlines() or [""])[-1])


def from_a_file(bench: Bench) -> None:
    """From a checkpoint in the page cache to a policy on the device: each way, in turn, and medians."""
    with standing("file", deep(bench.nbytes), bench.folder, marks=1) as segment:
        file = bench.folder / "file-0.safetensors"
        policy = deep(bench.nbytes).to(bench.place)

        def load() -> None:
            policy.load_state_dict(load_file(file, device=str(bench.place)))
            bench.sync()

        ways = {"load_file and load_state_dict": load}
        if bench.real and importlib.util.find_spec("fastsafetensors"):
            ways["fastsafetensors"] = lambda: fast(bench, file, policy)
        ours = deep(bench.nbytes).to(bench.place)
        with wsync.attach(ours, "file", mode="copy") as reader:

            def sync() -> None:
                put(segment, file)
                while not reader.refresh():
                    reader.wait(60)
                bench.sync()

            ways["wsync: publish and take"] = sync
            rounds = [[timed(way) for way in ways.values()] for _ in bench.each_round()]
    medians = [statistics.median(column) * 1e3 for column in zip(*rounds, strict=True)]
    bench.say("from a file", **{f"{name} ms": figure for name, figure in zip(ways, medians, strict=True)})


def fast(bench: Bench, file: Path, policy: torch.nn.Module) -> None:
    fastsafe_open: Any = importlib.import_module("fastsafetensors").fastsafe_open

    with fastsafe_open(filenames=[str(file)], device=str(bench.place), nogds=True) as opened:
        policy.load_state_dict({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118  (no mapping)
    bench.sync()


def schemes(bench: Bench) -> None:
    """An update of a collector's worker on the device by each weight sync scheme of torchrl and by ours."""
    if not bench.real or not importlib.util.find_spec("torchrl"):
        bench.say("schemes", left_out="torchrl is not installed" if bench.real else "it has a script of its own")
        return
    command = [sys.executable, str(TESTS / "measure" / "scheme.py"), "64", str(bench.place)]
    env = {name: value for name, value in os.environ.items() if name != "WSYNC_RUNTIME_DIR"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=env)
    found = dict(re.findall(r"(\w+) +update +([0-9.]+) ms", done.stdout))
    bench.say("schemes", ended_with=done.returncode, MiB=64, **found)
    if done.returncode:
        print(done.stderr[-2000:], flush=True)
