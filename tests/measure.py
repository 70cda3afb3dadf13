"""Figures, each beside what one would do otherwise, in one run: ``python tests/measure.py``.

Times jitter, so nothing here is asserted; quote the ratios. Takes about two minutes on two cores.
"""

from __future__ import annotations

import importlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

SIZE = 64 << 20
TENSORS = 200

POLICY = """
import torch
from torch import nn

def make(nbytes, tensors):
    return nn.ParameterList(nn.Parameter(torch.zeros(nbytes // tensors // 4)) for _ in range(tensors)).eval()
"""

BY_HAND = """
import sys
import torch
from safetensors.torch import load_file

weights = load_file(sys.argv[1])
shared = {name: torch.empty_like(tensor).share_memory_() for name, tensor in weights.items()}
for name, tensor in weights.items():
    shared[name].copy_(tensor)
"""


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="wsync-measure-"))
    runtime = Path(tempfile.mkdtemp(prefix="wsync-measure-", dir="/dev/shm"))
    os.environ |= {"WSYNC_RUNTIME_DIR": str(runtime), "WSYNC_STATE_DIR": f"{runtime}/state", "PYTHONPATH": str(folder)}
    sys.path.insert(0, str(folder))
    try:
        (folder / "policy.py").write_text(POLICY)
        (folder / "by_hand.py").write_text(BY_HAND)
        for name, size in (("large", SIZE), ("small", 1 << 20)):
            (folder / f"{name}.toml").write_text(
                f'policy = "policy:make"\ncheckpoints = "{name}"\n'
                f"[policy_kwargs]\nnbytes = {size}\ntensors = {TENSORS}\n"
            )
        processes(folder)
        in_process(folder)
        updaters()
        latency(folder)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(runtime)


def processes(folder: Path) -> None:
    """Whole processes: a push with nothing to do, and one with 64 MiB to do, in a standing segment."""
    file = save(folder / "large" / "step_1.safetensors", SIZE)
    push = [sys.executable, "-m", "wsync", "push", str(folder / "large.toml")]
    subprocess.run(push, check=True, stdout=subprocess.DEVNULL)
    compare(
        "push, nothing to do",
        ("import typer, rich", [sys.executable, "-c", "import typer, rich"]),
        push,
    )
    compare(
        "push, new 64 MiB", ("by hand", [sys.executable, str(folder / "by_hand.py"), str(file)]), [*push, "--force"]
    )


def in_process(folder: Path) -> None:
    """Staging beside a memory copy; refresh beside load_state_dict."""
    import numpy as np

    import wsync
    from wsync.checkpoint import Checkpoint
    from wsync.publisher import publish
    from wsync.segment import Segment

    policies = importlib.import_module("policy")
    segment = Segment.open("large", write=True)
    copied, source = np.zeros(segment.layout.nbytes, np.uint8), np.ones(segment.layout.nbytes, np.uint8)
    with Checkpoint(folder / "large" / "step_1.safetensors") as checkpoint:
        plan = checkpoint.plan(segment.layout)
        with segment.publishing(), segment.spare_slot() as slot, slot.weights as weights:
            copy = median(lambda: np.copyto(copied, source))
            bare = median(lambda: checkpoint.read_into(weights, plan, finite=False))
            checked = median(lambda: checkpoint.read_into(weights, plan))
        say("staging 64 MiB, warm", bare, "memory copy", copy)
        say("  with the finite check", checked, "staging without", bare)

        usual = policies.make(SIZE, TENSORS)
        state = {name: tensor.clone() for name, tensor in usual.state_dict().items()}
        load = median(lambda: usual.load_state_dict(state))
        for mode in ("swap", "copy"):
            policy = policies.make(SIZE, TENSORS)
            with wsync.attach(policy, "large", mode=mode) as reader:
                idle = median(lambda: [reader.refresh() for _ in range(10_000)]) / 10_000
                news = []
                for _ in range(20):
                    with segment.publishing():
                        publish(segment, checkpoint)
                    began = time.perf_counter()
                    reader.refresh()
                    news.append(time.perf_counter() - began)
            say(f"refresh(), new version, {TENSORS} tensors, {mode}", statistics.median(news), "load_state_dict", load)
        print(f"refresh(), nothing new: {idle * 1e9:.0f} ns")
    segment.close()


def updaters() -> None:
    """A push into a policy of 200 tensors in this process, beside torchrl's own class."""
    try:
        from torchrl.collectors.weight_update import VanillaWeightUpdater as Theirs
    except ImportError:
        print("VanillaWeightUpdater: torchrl is not installed, so there is nothing beside it")
        return
    import torch
    from tensordict import TensorDict

    import wsync

    def policy() -> torch.nn.Module:
        layers = [torch.nn.Linear(64, 64) for _ in range(TENSORS // 2)]
        return torch.nn.Sequential(*layers).requires_grad_(False)  # theirs cannot push into trainable parameters

    weights = TensorDict.from_module(policy())
    ours, theirs = wsync.VanillaWeightUpdater.from_policy(policy()), Theirs.from_policy(policy())
    say(
        f"VanillaWeightUpdater.push_weights, {TENSORS} tensors",
        median(lambda: ours.push_weights(weights), 100),
        "torchrl's",
        median(lambda: theirs.push_weights(weights), 100),
    )


def latency(folder: Path) -> None:
    """From os.replace until refresh() is True, under a watch; then what the watch costs when idle."""
    import wsync

    policies = importlib.import_module("policy")
    command = [sys.executable, "-m", "wsync", "watch", str(folder / "small.toml"), "--log-format", "json"]
    save(folder / "small" / "step_0.safetensors", 1 << 20)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as watch:
        try:
            times = []
            with wsync.attach(policies.make(1 << 20, TENSORS), "small", timeout=60) as reader:
                for step in range(1, 60):
                    save(folder / "hidden" / "x.safetensors", 1 << 20)
                    threading.Event().wait(0.05)  # between checkpoints, as a trainer's work would be
                    began = time.perf_counter()
                    os.replace(folder / "hidden" / "x.safetensors", folder / "small" / f"step_{step}.safetensors")
                    while not reader.refresh():
                        reader.wait(10)
                    times.append(time.perf_counter() - began)
            times.sort()
            print(f"os.replace to refresh(), 1 MiB: median {times[29] * 1e3:.1f} ms, worst {times[-1] * 1e3:.1f} ms")
            before, began = cpu(watch.pid), time.perf_counter()
            threading.Event().wait(10)
            share = (cpu(watch.pid) - before) / (time.perf_counter() - began)
            status = Path(f"/proc/{watch.pid}/status").read_text()
            resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
            print(f"watch, idle: {share:.2%} of a core, {resident / 1024:.0f} MiB resident")
        finally:
            watch.terminate()


def save(path: Path, nbytes: int) -> Path:
    import torch
    from safetensors.torch import save_file

    path.parent.mkdir(exist_ok=True)
    save_file({str(i): torch.randn(nbytes // TENSORS // 4) for i in range(TENSORS)}, path)
    return path


def compare(what: str, other: tuple[str, list[str]], command: list[str]) -> None:
    """Two commands in turn, as whole processes; the median of the ratios of neighbours."""

    def run(arguments: list[str]) -> float:
        began = time.perf_counter()
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    pairs = [(run(command), run(other[1])) for _ in range(8)][1:]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{what}: {ours * 1e3:.0f} ms; {other[0]}: {theirs * 1e3:.0f} ms; {ratio:.2f} times")


def median(work: Callable[[], object], times: int = 15) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def say(what: str, ours: float, other: str, theirs: float) -> None:
    print(f"{what}: {ours * 1e6:,.1f} us; {other}: {theirs * 1e6:,.1f} us; {ours / theirs:.4f} times")


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
