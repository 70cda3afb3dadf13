"""Groups of boxes, by real torchrun processes on loopback; each box has a runtime and a state directory of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from builders import ROOT, SUPPORT, write
from faulty_proxy import Proxy
from policies import mlp
from processes import DEADLINE, Lines, signal_another_thread
from safetensors.torch import load_file
from web_server import Web, serve

import wsync
from wsync.errors import SegmentError
from wsync.segment.segment import Segment
from wsync.segment.segment_files import WORD_OFFSET, slot_name

pytestmark = pytest.mark.slow

NAME = "nets"
BOX = str(SUPPORT / "fleet_box.py")
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
        self.source = ""  # a URL in their place
        self.agent: subprocess.Popen[str] | None = None
        self.seen: list[tuple[int, int | None]] = []
        self._looked_at: tuple[int, bytes] | None = None
        self.within: tuple[str, ...] = ()  # a command that starts others in a network of their own
        self.lines: Lines

    def start(self, *options: str, program: tuple[str, ...] = (BOX,), settings: str = "", **variables: str) -> Box:
        toml = self.write_spec(settings)
        environment = {**os.environ, **self.variables(), "FLEET_BOX": self.name, "FLEET_PIECE": "64", **variables}
        environment["FLEET_ORDER"] = str(self.order)
        command = [
            *self.within,
            *TORCHRUN,
            *self.fleet.arguments,
            "--rdzv-conf",
            f"last_call_timeout=1,keep_alive_interval=1,is_host={int(self is self.fleet.first)}",
            *options,
            *program,
            "watch",
            str(toml),
            "--log-format",
            "plain",
        ]
        self.agent = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.fleet.base
        )
        self.lines = Lines(self.agent)
        return self

    def write_spec(self, settings: str) -> Path:
        source, toml = self.source or self.checkpoints, self.fleet.base / f"{self.name}.toml"
        toml.write_text(f'policy = "policies:mlp"\nname = "{NAME}"\ncheckpoints = "{source}"\n{settings}')
        return toml

    def read_again(self, settings: str) -> None:
        """Gives its watch other settings, as ``systemctl reload`` does."""
        self.write_spec(settings)
        signal_another_thread(self.worker, signal.SIGHUP)
        self.lines.until("read again")

    def variables(self) -> dict[str, str]:
        return {"WSYNC_RUNTIME_DIR": str(self.runtime), "WSYNC_STATE_DIR": str(self.runtime / ".state")}

    @property
    def worker(self) -> int:
        assert self.agent
        (pid,) = children(self.agent.pid)
        return pid

    @property
    def order(self) -> Path:
        """The file that tells what is to happen to its watch next, and where; gone once it did."""
        return self.fleet.base / f"{self.name}.order"

    def look(self) -> None:
        """Adds what is live to ``seen``, where a WORD was stored since the last look."""
        try:
            with (self.runtime / NAME / "control").open("rb") as control:
                word = os.fstat(control.fileno()).st_ino, os.pread(control.fileno(), 8, WORD_OFFSET)
        except OSError:
            return
        if word != self._looked_at:
            found, self._looked_at = self.live(), word
            if found[0] and [found] != self.seen[-1:]:
                self.seen.append(found)

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
            values = {float(bound) for tensor in live.values() for bound in tensor.aminmax()}
            said = segment.live()
            assert said is None or said.version != lease.version or values == {float(said.step or 0)}
            lease.release()
            return (lease.version, int(values.pop())) if len(values) == 1 else (lease.version, -1)
        finally:
            segment.close()

    def extras(self) -> dict[str, bytes]:
        with wsync.lease(NAME, runtime_dir=self.runtime) as held:
            return dict(held.extras)

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
        self.hidden = 8  # of the policy
        self.step = 0  # of the newest checkpoint, where ``next`` writes them
        (base / "runs").mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.arguments = [
            *("--nnodes", nodes, "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "fleet"),
            *("--rdzv-endpoint", f"127.0.0.1:{port}", "--max-restarts", "100", "--monitor-interval", "0.1"),
        ]
        self.boxes: dict[str, Box] = {}
        self._end = threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()

    def box(self, name: str) -> Box:
        self.boxes[name] = Box(self, name)
        return self.boxes[name]

    @property
    def first(self) -> Box:
        """The box that holds torchrun's store, and, its torchrun being the oldest, has rank 0."""
        return next(iter(self.boxes.values()))

    def publish(self, step: int, mark: float | None = None) -> Path:
        file = self.base / "runs" / f"step_{step}.safetensors"
        return write(file, mlp(self.hidden), step if mark is None else mark, step)

    def next(self, mark: float | None = None) -> int:
        """Writes one more checkpoint; its step."""
        self.step += 1
        self.publish(self.step, mark)
        return self.step

    @property
    def version(self) -> int:
        """That which is live on all boxes."""
        (version,) = {box.seen[-1][0] if box.seen else 0 for box in self.boxes.values()}
        return version

    def until(self, version: int, step: int, *boxes: Box) -> None:
        """Until that is live on all of these boxes."""
        deadline = time.monotonic() + DEADLINE
        for box in boxes or self.boxes.values():
            while box.seen[-1:] != [(version, step)]:
                assert time.monotonic() < deadline, {
                    b.name: (b.seen, b.lines.seen, list(b.lines._queue.queue)) for b in boxes or self.boxes.values()
                }
                self._end.wait(0.02)

    def _look(self) -> None:
        while not self._end.wait(0.005):
            for box in list(self.boxes.values()):
                box.look()

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


@contextmanager
def fleets() -> Iterator[Callable[[str], Fleet]]:
    """Makes a group with so many boxes in a place of its own; at the end its processes go, and its story is checked."""
    base = Path(tempfile.mkdtemp(prefix="wsync-test-", dir="/dev/shm"))
    started: list[Fleet] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), str(ROOT)]))
        patch.setenv("PYTHONUNBUFFERED", "1")

        def make(nodes: str) -> Fleet:
            started.append(Fleet(base, nodes))
            return started[-1]

        try:
            yield make
        finally:
            for each in started:
                each.close()
            shutil.rmtree(base, ignore_errors=True)
        for each in started:
            each.check()


@pytest.fixture
def fleet(runtime: Path) -> Iterator[Callable[[str], Fleet]]:
    with fleets() as make:
        yield make


@dataclass(frozen=True)
class Pair:
    """A group of two boxes that tests take one after another, whatever is live on them.

    Attributes:
        reads: the box of rank 0.
        hears: the other one.
        settings: of both.
        busy: the file to which each adds a line when it tells that it is at work.
    """

    group: Fleet
    reads: Box
    hears: Box
    settings: str
    busy: Path

    @contextmanager
    def source(self, url: str) -> Iterator[None]:
        """Both watches look at a URL for as long as the block runs."""
        try:
            self._look_at(url)
            yield
        finally:
            self._look_at("")

    def _look_at(self, source: str) -> None:
        for box in (self.hears, self.reads):
            box.source = source
            box.read_again(self.settings)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with fleets() as make:
        group = make("2")
        group.hidden = 600_000
        settings = f"[policy_kwargs]\nhidden = {group.hidden}\n[weights]\ncast = true\n"
        (busy := group.base / "busy").touch()
        for name in "ab":
            group.box(name).start(settings=settings, FLEET_PIECE="100000", FLEET_BUSY=str(busy))
        a, b = group.boxes.values()
        reads, hears = (a, b) if "rank 0" in a.lines.until("nets: rank") else (b, a)
        yield Pair(group, reads, hears, settings, busy)


def test_all_boxes_go_live_together(fleet: Callable[..., Fleet]) -> None:
    """One box reads, all have the version and its extras, one that joins late at once; status shows the group."""
    group = fleet("2:3")
    settings = '[extras]\nfiles = ["{stem}.json"]\n'
    a, b, c = (group.box(name) for name in "abc")
    for box in (a, b):
        box.checkpoints = group.base / f"only-{box.name}"
        box.checkpoints.mkdir()
        box.start(settings=settings)
    line = a.lines.until("nets: rank")
    reader, other = (a, b) if "rank 0 of 2" in line else (b, a)
    other.lines.until("rank 1 of 2")
    (reader.checkpoints / "step_1.json").write_text("[1]")
    write(reader.checkpoints / "step_1.safetensors", mlp(), 1.0, 1)  # which the other box does not have
    group.until(1, 1, a, b)
    assert a.extras() == b.extras() == {"{stem}.json": b"[1]"}
    status = other.status()["group"]
    assert (status["rank"], status["size"], sorted(status["boxes"])) == (1, 2, ["a", "b"])
    c.start(settings=settings)
    group.until(1, 1, c)
    assert c.extras() == {"{stem}.json": b"[1]"}
    for box in (a, b, c):
        box.lines.until("of 3", "a", "b", "c")
    assert len(c.status()["group"]["boxes"]) == 3
    assert c.command("rollback", NAME).returncode == 2  # there is nothing before the first version
    c.lines.until("nets: version 1, step 1")
    assert c.command("rm", NAME).returncode == 0
    c.lines.until("nets: version 1, step 1")
    assert c.agent
    c.agent.send_signal(signal.SIGTERM)
    c.agent.wait(DEADLINE)
    for box in (a, b):
        box.lines.until("of 2")
    assert "group" not in c.status()
    assert not [line for box in (a, b, c) for line in box.lines.seen if "wsync/" in line and "File" in line]


def test_a_gate_of_one_box_refuses_for_all(pair: Pair) -> None:
    """What one box's gate does not want is live nowhere, each box says who was against it, and the next one goes on."""
    group, boxes = pair.group, (pair.reads, pair.hears)
    good = group.next()
    group.until(group.version + 1, good)
    version, refused = group.version, pair.hears.command("log", NAME, "--json").stdout.count('"reject"')
    gate = f"test $WSYNC_HOOK_STEP != {good + 1} || {{ echo too weak; false; }}"
    pair.hears.read_again(f"{pair.settings}[hooks]\ngate = '{gate}'\n")
    weak = group.next()
    for box in boxes:
        line = box.lines.until("rejected")
        assert f"{pair.hears.name}: " in line and "too weak" in line and f"Version {version} stays live" in line
    nan = group.next(float("nan"))
    for box in boxes:
        box.lines.until("rejected", "NaN")
    pair.hears.read_again(pair.settings)
    group.until(version + 1, group.next())
    assert not {weak, nan} & group.steps_ever_live()
    assert pair.hears.command("log", NAME, "--json").stdout.count('"reject"') == refused + 2


DEATHS = (
    ("agree", "worker", "b"),
    ("store", "worker", "b"),
    ("agree", "agent", "b"),
    ("stage", "worker", "a"),  # who reads
    ("stored", "worker", "a"),
)


def test_a_box_that_is_killed_costs_one_retry(fleet: Callable[..., Fleet]) -> None:
    """Killed at any step, with its torchrun or without: the others go on, and it comes back to what they have."""
    group = fleet("1:2")
    a, b = group.box("a").start(), group.box("b").start()
    a.lines.until("rank 0 of 2")
    for version, (step, how, victim) in enumerate(DEATHS, 1):
        order = group.boxes[victim].order
        order.write_text(f"{step} {how}")
        group.publish(version)
        if how == "agent":
            assert b.agent
            b.agent.wait(DEADLINE)
            group.until(version, version, a)
            b.end()
            b.start()
        group.until(version, version)
        assert not order.exists()
        a.lines.until("rank 0 of 2")
    group.publish(len(DEATHS) + 1)
    group.until(len(DEATHS) + 1, len(DEATHS) + 1)


def test_a_box_that_hangs_holds_nobody_for_long(fleet: Callable[..., Fleet]) -> None:
    """A stopped watch is given up after the bound; the others say so in one line, and go on without it."""
    group = fleet("1:2")
    a, b = (group.box(name).start(FLEET_TIMEOUT="4") for name in "ab")
    a.lines.until("rank 0 of 2")
    hung = b.worker
    b.order.write_text("agree stop")
    group.publish(1)
    line = a.lines.until("wsync: the group of 2 boxes")
    assert "torchrun forms the group again" in line
    assert not a.seen  # b was not asked to its end
    os.kill(hung, signal.SIGCONT)
    group.until(1, 1)
    assert not [line for box in (a, b) for line in box.lines.seen if "/wsync/" in line]


def test_a_rollback_on_one_box_goes_to_all(pair: Pair) -> None:
    """What an operator does on any box holds on all, whoever reads, until it is taken back there."""
    group, reads, hears = pair.group, pair.reads, pair.hears
    version = group.version
    first = group.next()
    group.until(version + 1, first)
    second = group.next()
    group.until(version + 2, second)
    assert hears.command("rollback", NAME).returncode == 0
    group.until(version + 3, first)
    third = group.next()
    line = reads.lines.until("pinned")
    assert hears.name in line and "unpin" in line
    assert hears.command("unpin", NAME).returncode == 0
    group.until(version + 4, third)
    assert reads.command("pin", NAME, str(group.base / "runs" / f"step_{second}.safetensors")).returncode == 0
    group.until(version + 5, second)
    assert reads.command("unpin", NAME).returncode == 0
    group.until(version + 6, third)


def test_a_pin_on_any_box_holds_against_the_offer_at_hand(pair: Pair) -> None:
    """What an operator pins on one box while something newer is on its way stays live on all of them."""
    group = pair.group
    version, live = group.version + 1, group.next()
    group.until(version, live)
    for box, at in ((pair.hears, "offer"), (pair.hears, "agree"), (pair.reads, "agree")):
        box.order.write_text(f"{at} wsync pin {NAME}")
        newer = group.next()
        pair.hears.lines.until(f"step_{live}.safetensors is pinned on {box.name}")
        assert group.version == version and not box.order.exists()
        assert box.command("unpin", NAME).returncode == 0
        version, live = version + 1, newer
        group.until(version, live)


def test_bytes_that_came_wrong_are_thrown_away(pair: Pair) -> None:
    """What is not what was sent goes live nowhere, the box where it came wrong is named, and it is sent again."""
    group, version = pair.group, pair.group.version
    pair.hears.order.write_text("came garbled")
    step = group.next()
    assert f"{pair.hears.name}: " in pair.reads.lines.until("differ from the bytes sent")
    group.until(version + 1, step)


def test_a_push_by_hand_in_between_goes_first(pair: Pair) -> None:
    """What goes live on one box while a checkpoint is on its way takes its number, on all boxes, and first."""
    group, version = pair.group, pair.group.version
    (group.base / "own").mkdir()
    own = write(group.base / "own" / "step_1000.safetensors", mlp(group.hidden), 1000, 1000)
    pair.hears.order.write_text(f"offer wsync push {group.base / pair.hears.name}.toml {own}")
    group.until(version + 2, group.next())
    assert all((version + 1, 1000) in box.seen for box in group.boxes.values())


def test_weights_of_a_stranger_give_way(fleet: Callable[..., Fleet]) -> None:
    """A box that comes with numbers and weights of its own gets the group's, under a number that is new to all."""
    group = fleet("1:2")
    a, b = group.box("a").start(), group.box("b")
    group.publish(5)
    group.until(1, 5, a)
    (group.base / "own").mkdir()
    own = [write(group.base / "own" / f"step_{step}.safetensors", mlp(), step, step) for step in (1, 2, 3)]
    for file in own:
        assert b.command("push", "policies:mlp", str(file), "--name", NAME).returncode == 0
    b.seen.clear()  # until it joins, its numbers are its own
    b.start()
    group.until(4, 5)
    b.lines.until("version 4, step 5")
    group.publish(6)
    group.until(5, 6)


def test_a_joining_box_asks_its_own_gate(fleet: Callable[..., Fleet]) -> None:
    """Where the group's live weights do not pass a joining box's gate it stays without, and the group goes on."""
    group = fleet("1:2")
    a = group.box("a").start()
    group.publish(1)
    group.until(1, 1, a)
    b = group.box("b").start(settings="[hooks]\ngate = 'test \"$WSYNC_HOOK_STEP\" != 1 || { echo not here; false; }'\n")
    line = b.lines.until("refused")
    assert "b: " in line and "not here" in line
    group.publish(2)
    group.until(2, 2)
    assert [step for _, step in b.seen] == [2]


def test_another_policy_on_one_box_is_told(fleet: Callable[..., Fleet]) -> None:
    """A box whose spec is of other tensors is named, and nothing goes live anywhere."""
    group = fleet("2")
    a = group.box("a").start()
    b = group.box("b").start(settings="[policy_kwargs]\nhidden = 9\n")
    group.publish(1)
    for box in (a, b):
        line = box.lines.until("keeps another policy")
        assert "a" in line and "b" in line
    assert not group.steps_ever_live()


def test_a_cast_is_sent_when_it_is_whole(pair: Pair) -> None:
    """Guards against pieces that go before they are filled: a cast comes in pieces of its own."""
    group, version = pair.group, pair.group.version
    group.step += 1
    file = group.base / "runs" / f"step_{group.step}.safetensors"
    write(file, mlp(group.hidden).double(), group.step, group.step)
    group.until(version + 1, group.step)


def test_the_source_is_read_once(pair: Pair) -> None:
    """All that the watches of a group read from files for one checkpoint is its bytes, once."""
    group = pair.group
    first = group.next()
    group.until(group.version + 1, first)
    before = [read_by(box.worker) for box in (pair.reads, pair.hears)]
    second = group.next()
    group.until(group.version + 1, second)
    reads, hears = (read_by(box.worker) - was for box, was in zip((pair.reads, pair.hears), before, strict=True))
    size = (group.base / "runs" / f"step_{second}.safetensors").stat().st_size
    assert size < reads < 1.1 * size and hears < 0.1 * size


def test_ranges_of_a_store_are_sent_when_they_are_whole(pair: Pair) -> None:
    """Guards against pieces that go before they are filled: ranges overtake each other."""
    pytest.importorskip("obstore")
    group, version = pair.group, pair.group.version
    with pair.source(f"file://{group.base / 'runs'}"):
        for more in (1, 2):
            group.until(version + more, group.next())


def test_a_store_that_takes_long_breaks_no_group(pair: Pair) -> None:
    """However long the store takes to answer a look or a read, the box that reads tells the others that it lives."""
    pytest.importorskip("obstore")
    group, version, busy = pair.group, pair.group.version, pair.busy
    (group.base / "web").mkdir()
    write(group.base / "web" / "other.safetensors", mlp(group.hidden), 2000, 2000)
    with serve(Web(group.base / "web")) as web:
        proxy = Proxy(web.port)
        slow: list[int] = []

        def before() -> None:
            told = len(busy.read_text().splitlines())
            while not proxy.closed.wait(0.1) and len(busy.read_text().splitlines()) < told + 2:
                pass
            slow.append(told)

        for range_ in ("bytes=0-0", "bytes=(?!0-)"):  # of a look, and of a read
            proxy.arm(range_, before=before, times=1)
        try:
            with pair.source(f"{proxy.url}/other.safetensors"):
                group.until(version + 1, 2000)
        finally:
            proxy.close()
    assert len(slow) == 2


@pytest.fixture
def networks() -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Two network namespaces with one link between them; of each its name and its address."""
    ends = [(f"wsync-{os.getpid()}-{end}", f"10.231.77.{number}") for number, end in enumerate("ab", 1)]

    def ip(*arguments: str) -> bool:
        return subprocess.run(["ip", *arguments], capture_output=True, timeout=DEADLINE).returncode == 0

    if os.geteuid() or not shutil.which("ip") or not ip("netns", "add", ends[0][0]):
        pytest.skip("network namespaces need root and iproute2")
    try:
        (a, _), (b, _) = ends
        assert ip("netns", "add", b)
        assert ip("link", "add", "box", "netns", a, "type", "veth", "peer", "name", "box", "netns", b)
        for name, address in ends:
            assert ip("-n", name, "address", "add", f"{address}/24", "dev", "box")
            assert ip("-n", name, "link", "set", "lo", "up") and ip("-n", name, "link", "set", "box", "up")
        yield ends[0], ends[1]
    finally:
        for name, _ in ends:
            ip("netns", "del", name)


def test_a_box_that_is_cut_off_comes_back(
    fleet: Callable[..., Fleet], networks: tuple[tuple[str, str], tuple[str, str]]
) -> None:
    """A cut link ends a group within its bound; the others go on, the one cut off keeps what it had, and catches up."""
    group = fleet("1:2")
    at = group.arguments.index("--rdzv-endpoint") + 1
    group.arguments[at] = f"{networks[0][1]}:29400"
    a, b = group.box("a"), group.box("b")
    for box, (name, address) in zip((a, b), networks, strict=True):
        box.within = ("ip", "netns", "exec", name)
        place = ("--local-addr", address)
        box.start(*place, FLEET_TIMEOUT="4", GLOO_SOCKET_IFNAME="box")
        box.lines.until("nets: rank")
    a.lines.until("of 2")
    group.publish(1)
    group.until(1, 1)
    cut = ["ip", "-n", networks[1][0], "link", "set", "box"]
    subprocess.run([*cut, "down"], check=True, timeout=DEADLINE)
    group.publish(2)
    group.until(2, 2, a)
    assert b.seen == [(1, 1)]
    subprocess.run([*cut, "up"], check=True, timeout=DEADLINE)
    b.end()  # its torchrun may have given up, and is started again as systemd does
    b.start(*place, GLOO_SOCKET_IFNAME="box")
    group.until(2, 2)


def read_by(pid: int) -> int:
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def test_a_watch_of_one_box_knows_of_no_group(runtime: Path) -> None:
    """Without torchrun neither a watch nor status loads any of this."""
    code = """
import sys
import wsync.service.service, wsync.cli.output.status, wsync.cli.commands
service = wsync.service.service.Service(lambda: wsync.settings.spec.load_spec("policies:mlp"), None, "runs")
assert type(service.syncer).__name__ == "Syncer"
heavy = {"torch", "wsync.fleet.group", "wsync.fleet.fleet", "wsync.fleet.delivery"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE)
    assert done.stdout == "[]\n", done.stderr
