"""Four boxes of one group on loopback, beside four watches that each read the file: ``python tests/measure/fleet.py``.

From the rename of a checkpoint until it is live on the last box. Then, from what a round and a piece cost here, what
groups of other sizes would take on a network of their own. Times jitter: nothing is asserted. Takes about a minute on
two cores; a size in MiB may be given.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

BOXES, TENSORS, ROUNDS = 4, 200, 5
GATHERS = 9  # around the ring for one publish: report, segment, offer, three votes, checksum, copies, what came of it
NETWORK = 10e9 / 8  # bytes a second of a box's link, and of the store's, in what is reckoned

POLICY = """
import torch
from torch import nn

def make(nbytes, tensors):
    return nn.ParameterList(nn.Parameter(torch.zeros(nbytes // tensors // 4)) for _ in range(tensors)).eval()
"""


class Watches:
    """Watches on boxes of their own, each a torchrun of one group or by itself."""

    def __init__(self, base: Path, number: int, *, group: bool) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        torchrun = ["-m", "torch.distributed.run", "--nnodes", str(number), "--nproc-per-node", "1"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-id", "measure", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        self.boxes, self.processes = [base / f"box-{number}-{group}-{each}" for each in range(number)], []
        for box in self.boxes:
            box.mkdir()
            own = {"WSYNC_RUNTIME_DIR": str(box), "WSYNC_STATE_DIR": str(box / ".state")}
            command = [sys.executable, *(torchrun if group else []), "-m", "wsync", "watch", str(base / "policy.toml")]
            self.processes.append(
                subprocess.Popen(command, env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )

    def until_live(self, step: int) -> None:
        from wsync.errors import SegmentError
        from wsync.segment.segment import Segment

        for box in self.boxes:
            while True:
                try:
                    segment = Segment.open("policy", box)
                except SegmentError:
                    threading.Event().wait(0.01)
                    continue
                live = segment.live()
                segment.close()
                if live and live.step == step:
                    break
                threading.Event().wait(0.001)

    def cpu(self) -> float:
        return sum(_cpu(pid) for pid in self._watches())

    def _watches(self) -> list[int]:
        pids = []
        for process in self.processes:
            below = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            pids += [int(pid) for pid in below if b"wsync" in Path(f"/proc/{pid}/cmdline").read_bytes()] or [
                process.pid
            ]
        return pids

    def close(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait()
        for box in self.boxes:
            shutil.rmtree(box)


def measure(base: Path, number: int, nbytes: int, *, group: bool) -> tuple[float, float]:
    """Seconds until the last box is live, and seconds of processor, for one checkpoint: medians."""
    for old in (base / "runs").iterdir():
        old.unlink()
    (base / "policy.toml").write_text(
        f'policy = "policy:make"\ncheckpoints = "runs"\n[policy_kwargs]\nnbytes = {nbytes}\ntensors = {TENSORS}\n'
    )
    place = save(base, 1, nbytes)
    watches = Watches(base, number, group=group)
    try:
        place.rename(base / "runs" / place.name)
        watches.until_live(1)
        rows = []
        for step in range(2, 2 + ROUNDS):
            place = save(base, step, nbytes)
            threading.Event().wait(0.5)
            cpu, began = watches.cpu(), time.perf_counter()
            place.rename(base / "runs" / place.name)
            watches.until_live(step)
            rows.append((time.perf_counter() - began, watches.cpu() - cpu))
            (base / "runs" / place.name).with_name(f"step_{step - 1}.safetensors").unlink()
    finally:
        watches.close()
    seconds, cpu_ = (statistics.median(column) for column in zip(*rows, strict=True))
    return seconds, cpu_


def save(base: Path, step: int, nbytes: int) -> Path:
    import torch
    from safetensors.torch import save_file

    path = base / f"step_{step}.safetensors"
    save_file({str(i): torch.randn(nbytes // TENSORS // 4) for i in range(TENSORS)}, path, {"step": str(step)})
    return path


def main() -> None:
    nbytes = (int(sys.argv[1]) if len(sys.argv) > 1 else 256) << 20
    base = Path(tempfile.mkdtemp(prefix="wsync-measure-", dir="/dev/shm"))
    os.environ |= {"PYTHONPATH": f"{base}:{Path(__file__).parents[2]}", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    try:
        (base / "runs").mkdir()
        (base / "policy.py").write_text(POLICY)
        size = f"{nbytes >> 20} MiB"
        alone = measure(base, BOXES, nbytes, group=False)
        together = measure(base, BOXES, nbytes, group=True)
        one = measure(base, 1, nbytes, group=True)
        small = [measure(base, number, 1 << 20, group=True)[0] for number in (1, BOXES)]
        for what, (seconds, cpu) in (
            (f"{BOXES} boxes, each reads {size}", alone),
            (f"{BOXES} boxes, one reads {size}", together),
            ("a group of 1 box", one),
        ):
            print(f"{what}: {seconds:.2f} s, {cpu:.2f} s of processor")
        reckon((together[1] - one[1]) / (BOXES - 1) / nbytes, max(small[1] - small[0], 0) / (BOXES - 1) / GATHERS)
    finally:
        shutil.rmtree(base)


def reckon(cpu: float, hop: float) -> None:
    """On paper: gloo broadcasts along a binomial tree and gathers around a ring, each box with a link of its own.

    Args:
        cpu: seconds of processor that a further box costs for each byte, on itself and on who sends to it.
        hop: seconds that a further box costs a gathering.
    """
    print(f"a further box: {cpu * 1e9:.2f} s of processor a GB; {hop * 1e3:.2f} ms a gathering, {GATHERS} a publish")
    for boxes in (10, 100, 1000):
        tree = math.ceil(math.log2(boxes)) * 1e9 * max(1 / NETWORK, cpu)
        print(
            f"{boxes:5} boxes, 1 GB, links of 10 Gb/s: {tree + GATHERS * (boxes - 1) * hop:.1f} s and 1 GB from the "
            f"store, beside {boxes * 1e9 / NETWORK:.0f} s and {boxes} GB where each reads"
        )


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
