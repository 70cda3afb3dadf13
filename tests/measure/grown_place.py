"""What a place that has grown costs: ``python tests/measure/grown_place.py``.

Among 10,000 and 100,000 checkpoints in a directory: a push with nothing new, beside ``ls -U`` and a push beside one
file; what an idle watch takes of a core; and how soon a new file is live. Among 5,000 objects of an S3 server on the
loopback, which needs moto: the requests of the same. Times jitter: nothing is asserted. Takes about three minutes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from wsync.bench.rows import Settings
from wsync.bench.workspace import Workspace, private_workspace
from wsync.errors import SegmentError
from wsync.segment.segment import Segment

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from spent import spent

ROUNDS, IDLE = 5, 20.0  # seconds that an idle watch is looked at
NAME, NBYTES, TENSORS = "policy", 64, 2
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def data_of(step: int) -> bytes:
    """A checkpoint of the policy."""
    return save({str(i): torch.full((NBYTES // TENSORS // 4,), float(step)) for i in range(TENSORS)})


def least(workspace: Workspace, command: list[str]) -> str:
    """The least seconds of a whole process in some rounds, and its MiB of memory."""
    seconds, mib, codes = spent(command, workspace.environment, ROUNDS)
    assert codes == {0}, command
    return f"{seconds:5.2f} s {mib:4.0f} MiB"


def push(workspace: Workspace, order: str) -> list[str]:
    return wsync("push", workspace, "--order", order)


def wsync(command: str, workspace: Workspace, *options: str) -> list[str]:
    return [sys.executable, "-m", "wsync", command, str(workspace.files / f"{NAME}.toml"), *options]


def watched(workspace: Workspace, add: Callable[[int], None], first: int, poll: float) -> None:
    """Prints what an idle watch takes of a core, and how long a new checkpoint takes until it is live."""
    with subprocess.Popen(
        wsync("watch", workspace, "--poll", str(poll)), env=workspace.environment, stdout=subprocess.PIPE, text=True
    ) as watch:
        try:
            assert watch.stdout
            watch.stdout.readline()
            add(first)
            until_live(workspace, first)
            time.sleep(3 * poll)
            before = ticks(watch.pid)
            time.sleep(IDLE)
            percent = (ticks(watch.pid) - before) / os.sysconf("SC_CLK_TCK") / IDLE * 100
            times = []
            for step in range(first + 1, first + 1 + ROUNDS):
                began = time.perf_counter()
                add(step)
                until_live(workspace, step)
                times.append((time.perf_counter() - began) * 1e3)
                time.sleep(2 * poll)
        finally:
            watch.terminate()
    print(f"  idle watch {percent:.2f} % of a core; new file live after {statistics.median(times):.1f} ms, ", end="")
    print(f"at most {max(times):.1f} ms", flush=True)


def ticks(pid: int) -> int:
    """The processor time of a process: utime and stime, proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def until_live(workspace: Workspace, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            live = Segment.open(NAME, workspace.runtime).live()
        except SegmentError:
            live = None
        if live and live.step == step:
            return
        time.sleep(0.0005)
    raise TimeoutError(f"step {step} is not live")


def files(number: int) -> None:
    """A directory of so many checkpoints; the newest is live."""
    with private_workspace(Settings()) as workspace:
        workspace.write_spec(NAME, NBYTES, TENSORS)
        runs = workspace.files / NAME

        def add(step: int) -> None:
            file = runs / f".step_{step}.tmp"
            file.write_bytes(data_of(step))
            file.rename(runs / f"step_{step}.safetensors")

        add(1)
        subprocess.run(push(workspace, "mtime"), env=workspace.environment, stdout=subprocess.DEVNULL, check=True)
        print(f"{number:,} files\n  push beside 1    {least(workspace, push(workspace, 'mtime'))}", flush=True)
        data = data_of(0)
        for step in range(2, number):
            (runs / f"step_{step}.safetensors").write_bytes(data)
        add(number)
        subprocess.run(push(workspace, "mtime"), env=workspace.environment, stdout=subprocess.DEVNULL, check=True)
        print(f"  ls -U            {least(workspace, ['ls', '-U', str(runs)])}", flush=True)
        print(f"  python           {least(workspace, [sys.executable, '-c', 'import typer, rich'])}", flush=True)
        for order in ("mtime", "step", "arrival"):
            print(f"  push by {order:<8} {least(workspace, push(workspace, order))}", flush=True)
        watched(workspace, add, number + 1, poll=1.0)


def objects(number: int) -> None:
    """A bucket of so many checkpoints; the newest is live."""
    from object_stores import BUCKET, SECRET, Bucket

    with (
        private_workspace(Settings()) as workspace,
        subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as server,
    ):
        assert server.stdin and server.stdout
        bucket = Bucket(int(server.stdout.readline()))
        own = {"AWS_ENDPOINT_URL": bucket.proxy.url, "AWS_ACCESS_KEY_ID": "testing", "AWS_REGION": "us-east-1"}
        os.environ |= own | {"AWS_SECRET_ACCESS_KEY": SECRET}
        made = urllib.request.Request(f"http://127.0.0.1:{bucket.port}/{BUCKET}", method="PUT")
        urllib.request.urlopen(made).close()
        workspace.write_spec(NAME, NBYTES, TENSORS)
        spec = workspace.files / f"{NAME}.toml"
        spec.write_text(spec.read_text().replace(f'"{NAME}"', f'"s3://{BUCKET}/run"'))

        def add(step: int) -> None:
            bucket.put(f"run/step_{step:05}.safetensors", data_of(step))

        for step in range(1, number + 1):
            add(step)
        subprocess.run(push(workspace, "step"), env=workspace.environment, stdout=subprocess.DEVNULL, check=True)
        print(f"{number:,} objects", flush=True)
        for order in ("step", "mtime"):
            before = len(bucket.proxy.requests)
            took = least(workspace, push(workspace, order))
            requests = (len(bucket.proxy.requests) - before) / ROUNDS
            print(f"  push by {order:<8} {took}, {requests:g} requests", flush=True)
        with subprocess.Popen(
            wsync("watch", workspace, "--poll", "10", "--order", "step"),
            env=workspace.environment,
            stdout=subprocess.DEVNULL,
        ) as watch:
            time.sleep(5)
            before, requests = ticks(watch.pid), len(bucket.proxy.requests)
            time.sleep(3 * IDLE)
            percent = (ticks(watch.pid) - before) / os.sysconf("SC_CLK_TCK") / (3 * IDLE) * 100
            passes = 3 * IDLE / 10
            requests = (len(bucket.proxy.requests) - requests) / passes
            watch.terminate()
        print(f"  idle watch, poll = 10: {percent:.2f} % of a core, {requests:g} requests a pass")
        server.stdin.close()
        server.terminate()


if __name__ == "__main__":
    for number in (10_000, 100_000):
        files(number)
    objects(5_000)
