"""Groups of boxes, by real torchrun processes on loopback; each box has a runtime and a state directory of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, TESTS, Lines, write
from policies import mlp
from safetensors.torch import load_file

from wsync.errors import SegmentError
from wsync.segment import Segment
from wsync.segment_files import slot_name

NAME = "nets"
BOX = str(TESTS / "fleet_box.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def children(pid: int) -> list[int]:
    try:
        return [
            int(each)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for each in (task / "children").read_text().split()
        ]
    except OSError:
        return []


class Box:
    """One box: its directories, and the torchrun that keeps its watch."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.fleet, self.name = fleet, name
        self.runtime = fleet.base / name
        self.runtime.mkdir()
        self.checkpoints = fleet.base / "runs"
        self.agent: subprocess.Popen[str] | None = None
        self.seen: list[tuple[int, int | None]] = []
        self.lines: Lines

    def start(self, *options: str, program: tuple[str, ...] = (BOX,), settings: str = "", **variables: str) -> Box:
        toml = self.fleet.base / f"{self.name}.toml"
        toml.write_text(f'policy = "policies:mlp"\nname = "{NAME}"\ncheckpoints = "{self.checkpoints}"\n{settings}')
        environment = {**os.environ, **self.variables(), "FLEET_BOX": self.name, "FLEET_PIECE": "64", **variables}
        command = [*TORCHRUN, *self.fleet.arguments, *options, *program, "watch", str(toml), "--log-format", "plain"]
        self.agent = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.fleet.base
        )
        self.lines = Lines(self.agent)
        return self

    def variables(self) -> dict[str, str]:
        return {"WSYNC_RUNTIME_DIR": str(self.runtime), "WSYNC_STATE_DIR": str(self.runtime / ".state")}

    @property
    def worker(self) -> int:
        assert self.agent
        (pid,) = children(self.agent.pid)
        return pid

    def live(self) -> tuple[int, int | None]:
        """The live version and its step; every weight in it is its step."""
        try:
            segment = Segment.open(NAME, self.runtime)
        except SegmentError:
            return 0, None
        try:
            lease = segment.lease()
            if lease is None:
                return 0, None
            live = load_file(self.runtime / NAME / slot_name(lease.slot))
            values = {float(value) for tensor in live.values() for value in tensor.flatten().unique()}
            said = segment.live()
            assert said is None or said.version != lease.version or values == {float(said.step or 0)}
            lease.release()
            return (lease.version, int(values.pop())) if len(values) == 1 else (lease.version, -1)
        finally:
            segment.close()

    def status(self) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "wsync", "status", NAME, "--json"],
            env={**os.environ, **self.variables()},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        return dict(json.loads(done.stdout))

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "wsync", *arguments],
            env={**os.environ, **self.variables()},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )

    def end(self) -> None:
        if self.agent is None:
            return
        for pid in children(self.agent.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.agent.kill()
        self.agent.wait()
        self.lines.rest()
        assert self.agent.stdout
        self.agent.stdout.close()
        self.agent = None


class Fleet:
    """Boxes of one group, and a look at what is live on each, again and again until the end."""

    def __init__(self, base: Path, nodes: str) -> None:
        self.base = base
        (base / "runs").mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.arguments = [
            *("--nnodes", nodes, "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "fleet"),
            *("--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", "last_call_timeout=1"),
            *("--max-restarts", "100", "--monitor-interval", "0.1"),
        ]
        self.boxes: dict[str, Box] = {}
        self._end = threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()

    def box(self, name: str) -> Box:
        self.boxes[name] = Box(self, name)
        return self.boxes[name]

    def publish(self, step: int, mark: float | None = None) -> Path:
        return write(self.base / "runs" / f"step_{step}.safetensors", mlp(), step if mark is None else mark, step)

    def until(self, version: int, step: int, *boxes: Box) -> None:
        """Until that is live on all of these boxes."""
        deadline = time.monotonic() + DEADLINE
        for box in boxes or self.boxes.values():
            while box.seen[-1:] != [(version, step)]:
                assert time.monotonic() < deadline, {
                    b.name: (b.seen, b.lines.seen, list(b.lines._queue.queue)) for b in self.boxes.values()
                }
                self._end.wait(0.02)

    def _look(self) -> None:
        while not self._end.wait(0.005):
            for box in list(self.boxes.values()):
                found = box.live()
                if found[0] and found != (box.seen or [None])[-1]:
                    box.seen.append(found)

    def close(self) -> None:
        self._end.set()
        self._watch.join()
        for box in self.boxes.values():
            box.end()

    def story(self) -> str:
        lines = []
        for box in self.boxes.values():
            lines += [f"--- {box.name}: {box.seen}", *box.lines.seen, "...", *list(box.lines._queue.queue)]
        return "\n".join(lines)

    def steps_ever_live(self) -> set[int | None]:
        return {step for box in self.boxes.values() for _, step in box.seen}

    def check(self) -> None:
        """One number is one checkpoint on all boxes, and each box's numbers only grow."""
        steps: dict[int, set[int | None]] = {}
        for box in self.boxes.values():
            versions = [version for version, _ in box.seen]
            assert versions == sorted(set(versions)), (box.name, box.seen)
            for version, step in box.seen:
                steps.setdefault(version, set()).add(step)
        assert all(len(found) == 1 for found in steps.values()), steps


@pytest.fixture
def fleet(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fleet]]:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    started: list[Fleet] = []
    base = runtime.with_name(f"{runtime.name}-boxes")

    def make(nodes: str) -> Fleet:
        base.mkdir()
        started.append(Fleet(base, nodes))
        return started[-1]

    yield make
    for each in started:
        each.close()
        each.check()
    shutil.rmtree(base, ignore_errors=True)


def test_all_boxes_go_live_together(fleet: Callable[..., Fleet]) -> None:
    """One box reads, all have the version, one that joins late at once; status shows the group while it lives."""
    group = fleet("2:3")
    a, b, c = (group.box(name) for name in "abc")
    for box in (a, b):
        box.checkpoints = group.base / f"only-{box.name}"
        box.checkpoints.mkdir()
        box.start()
    line = a.lines.until("nets: rank")
    reader, other = (a, b) if "rank 0 of 2" in line else (b, a)
    other.lines.until("rank 1 of 2")
    write(reader.checkpoints / "step_1.safetensors", mlp(), 1.0, 1)  # which the other box does not have
    group.until(1, 1, a, b)
    status = other.status()["group"]
    assert (status["rank"], status["size"], sorted(status["boxes"])) == (1, 2, ["a", "b"])
    c.start()
    group.until(1, 1, c)
    for box in (a, b, c):
        box.lines.until("of 3", "a", "b", "c")
    assert len(c.status()["group"]["boxes"]) == 3
    assert c.command("rollback", NAME).returncode == 2  # there is nothing before the first version
    assert c.agent
    c.agent.send_signal(signal.SIGTERM)
    c.agent.wait(DEADLINE)
    for box in (a, b):
        box.lines.until("of 2")
    assert "group" not in c.status()
    assert not [line for box in (a, b, c) for line in box.lines.seen if "wsync/" in line and "File" in line]


def test_a_gate_of_one_box_refuses_for_all(fleet: Callable[..., Fleet]) -> None:
    """What one box's gate does not want is live nowhere, each box says who was against it, and the next one goes on."""
    group = fleet("2")
    a = group.box("a").start()
    b = group.box("b").start(settings="[hooks]\ngate = 'test \"$WSYNC_STEP\" != 2 || { echo too weak; false; }'\n")
    group.publish(1)
    group.until(1, 1)
    group.publish(2)
    for box in (a, b):
        line = box.lines.until("rejected")
        assert "b: " in line and "too weak" in line and "version 1 stays live" in line
    group.publish(3, float("nan"))
    for box in (a, b):
        box.lines.until("rejected", "NaN")
    group.publish(4)
    group.until(2, 4)
    assert group.steps_ever_live() == {1, 4}
    assert b.command("log", NAME, "--json").stdout.count('"reject"') == 2


@pytest.mark.parametrize("step", ["stage", "agree", "counted", "store", "stored"])
@pytest.mark.parametrize("how", ["worker", "agent"])
def test_a_box_that_is_killed_costs_one_retry(fleet: Callable[..., Fleet], step: str, how: str) -> None:
    """Killed at any step, with its torchrun or without: the others go on, and it comes back to what they have."""
    group = fleet("1:2")
    died = group.base / "died"
    a = group.box("a").start()
    a.lines.until("rank 0 of 1")  # it holds torchrun's store
    b = group.box("b").start(FLEET_DIE=f"{step} {how} {died}")
    b.lines.until("rank")
    a.lines.until("of 2")
    group.publish(1)
    if how == "agent":
        assert b.agent
        b.agent.wait(DEADLINE)
        group.until(1, 1, a)
        b.lines.rest()
        assert b.agent.stdout
        b.agent.stdout.close()
        b.start(FLEET_DIE=f"{step} {how} {died}")
    group.until(1, 1)
    assert died.exists()
    group.publish(2)
    group.until(2, 2)
