"""Real processes on real shared memory, killed at every step and at any moment: what is left is whole, free and tidy.

``TEST_KILLS`` in the environment says how many are killed at random moments; 60 without it.
"""

from __future__ import annotations

import dis
import fcntl
import inspect
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import ROOT, SUPPORT, write
from policies import mlp
from processes import DEADLINE
from steps import Line, code
from victims import HIDDEN, NAME, Child, Server

import wsync
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.layout.layout import layout_of
from wsync.segment import segment as segment_module
from wsync.segment import segment_files
from wsync.segment.publishing import publish
from wsync.segment.segment import segments
from wsync.segment.segment_files import REMOVED
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("TEST_KILLS", "60"))
FILES = {"control", "layout.json", "publisher.lock", "readers", *(f"slot-{n}.safetensors" for n in range(3))}
MAYBE = {"watch.lock", *(f"slot-{n}.extras" for n in range(3))}
LAYOUT = layout_of(mlp(HIDDEN))
POLICY = mlp(HIDDEN)
STORED = [("P7 store", "after"), ("P8 wake", "before"), ("P8 wake", "after")]


def server(modules: str) -> Iterator[Server]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WSYNC_")}
    environ |= {"PYTHONPATH": os.pathsep.join([str(SUPPORT), str(ROOT)]), "PYTHONUNBUFFERED": "1"}
    started = Server(modules, environ | {"OMP_NUM_THREADS": "1"})
    yield started
    started.close()


@pytest.fixture(scope="module")
def light() -> Iterator[Server]:
    """Forks processes that never need torch: the command line."""
    yield from server(
        "wsync.cli.commands wsync.sync.syncer wsync.cli.output.push wsync.cli.output.watch wsync.cli.output.status "
        "rich.console rich.table inotify_simple shutil tempfile"
    )


@pytest.fixture(scope="module")
def heavy() -> Iterator[Server]:
    """Forks processes that do: policies, and a trainer that publishes from memory."""
    yield from server("torch wsync.policy.reader wsync.segment.publishing wsync.layout.weights policies")


class Storm:
    """One segment, its checkpoints, its processes, and all that was ever seen of its versions."""

    def __init__(self, runtime: Path, light: Server, heavy: Server) -> None:
        self.runtime, self.light, self.heavy = runtime, light, heavy
        Path("runs").mkdir()
        Path("storm.toml").write_text(f'policy = "policies:mlp"\nname = "{NAME}"\n[policy_kwargs]\nhidden = {HIDDEN}\n')
        self.segment = WritableSegment.create(NAME, LAYOUT, spec=load_spec("storm.toml").fingerprint())
        self.children: list[Child] = []
        self.marks: dict[int, float] = {}
        self.last: dict[int, int] = {}
        self.step = 0

    def close(self) -> None:
        for child in self.children:
            child.close()
        self.segment.close()

    def write(self) -> int:
        """The next checkpoint, every weight of it the number of its step; the one before the last is taken away."""
        self.step += 1
        write(Path(f"runs/step_{self.step}.safetensors"), POLICY, float(self.step), self.step)
        Path(f"runs/step_{self.step - 2}.safetensors").unlink(missing_ok=True)
        return self.step

    def start(self, server: Server, role: str, *arguments: Any, trap: list[Any] | None = None) -> Child:
        child = server.start(role, *arguments, trap=trap)
        self.children.append(child)
        return child

    def publisher(self, role: str, trap: list[Any] | None = None) -> Child:
        """Somebody who publishes the newest checkpoint, or the same weights from memory."""
        if role == "tensors":
            return self.start(self.heavy, "tensors", float(self.step), trap=trap)
        options = ["--json"] if role == "push" else ["--poll", "0.1"]
        return self.start(self.light, "wsync", role, "storm.toml", "runs", *options, trap=trap)

    def push(self, code: int = 0) -> dict[str, Any]:
        """What a push says, which ends with this code."""
        child = self.publisher("push")
        said = child.line()
        assert child.ended() == code, said
        self.forget(child)
        told: dict[str, Any] = json.loads(said)
        return told

    def status(self) -> dict[int, int]:
        """The lag of each reader, by its pid."""
        child = self.start(self.light, "wsync", "status", NAME, "--json")
        readers = json.loads(child.line())["readers"]
        assert child.ended() == 0
        self.forget(child)
        return {reader["pid"]: reader["lag"] for reader in readers}

    def reader(self, mode: str, follow: bool = False, trap: list[Any] | None = None, late: Any = None) -> Child:
        return self.start(self.heavy, "act", mode, follow, late, trap=trap)

    def forget(self, child: Child) -> None:
        self.children.remove(child)
        child.close()

    def seen(self, pid: int, line: str) -> int:
        """Takes note of what a reader said: one whole version, its own weights, none older than before; its step."""
        version, step, low, high = line.split()
        assert float(low) == float(high) == float(step), f"torn: {line}"
        assert self.marks.setdefault(int(version), float(low)) == float(low), f"two contents of one version: {line}"
        assert int(version) >= self.last.get(pid, 0), f"back from {self.last.get(pid)}: {line}"
        self.last[pid] = int(version)
        return int(step)

    def look(self, reader: Child) -> int:
        """A reader that is asked refreshes, and says which step it is on."""
        reader.ask()
        return self.seen(reader.pid, reader.line())

    def check(self, *living: Child, still: bool = True) -> None:
        """What is live is whole, no lock is left by the dead, and there are no files but those of the living.

        Args:
            still: the living stand still, so that their leases are what their records say.
        """
        listed = {record.pid: record.slots for record in self.segment.readers()}
        assert set(listed) == {child.pid for child in living}
        assert FILES <= set(os.listdir(self.segment.path)) <= FILES | MAYBE and os.listdir(self.runtime) == [NAME]
        assert len(os.listdir(self.segment.path / "readers")) == len(living)
        leased = {slot for slots in listed.values() for slot in slots} if still else set(range(3))
        assert unlocked(self.segment.path / "publisher.lock", fcntl.LOCK_EX)
        for slot in range(3):
            path = self.segment.path / f"slot-{slot}.safetensors"
            assert unlocked(path, fcntl.LOCK_SH if slot in leased else fcntl.LOCK_EX), f"slot {slot} is locked"
        live = self.segment.live()
        if live:
            assert live.version == self.segment.version and live.step is not None
            low, high = self.range()
            self.seen(0, f"{live.version} {live.step} {low} {high}")
        for child in living:
            assert not [file for file in child.files() if "/runs/" in file]

    def range(self) -> tuple[float, float]:
        """The lowest and the highest weight of what is live."""
        path = self.segment.path / f"slot-{self.segment.word & 0xFF}.safetensors"
        weights = np.fromfile(path, "<f4", LAYOUT.nbytes // 4, offset=self.segment.data_offset)
        return float(weights.min()), float(weights.max())


def unlocked(path: Path, lock: int) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, lock | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


@pytest.fixture
def storm(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, light: Server, heavy: Server
) -> Iterator[Storm]:
    """An empty segment in a place of its own; every process is killed and reaped after the test."""
    monkeypatch.chdir(tmp_path)
    made = Storm(runtime, light, heavy)
    yield made
    made.close()


def used(line: Line) -> set[tuple[str, str]]:
    """Of the three lines that use a slot: by which mode, and at which moment."""
    text = Path(line.file).read_text().split("\n")[line.number - 1]
    if "copy" in text:
        return {("copy", "attach"), ("copy", "refresh")}
    return {("swap", "refresh" if "show" in text else "attach")}


PUBLISHER = [
    (role, line)
    for line in code()
    for role in (("tensors",) if line.file.endswith("publishing.py") else ("push", "watch"))
    if line.step.startswith("P")
]
READER = [
    (mode, moment, line)
    for line in code()
    for mode in ("swap", "copy")
    for moment in ("attach", "refresh")
    if line.step.startswith("R")
    and (line.step != "R4 use" or (mode, moment) in used(line))
    and (line.step, moment, mode) != ("R5 release", "attach", "swap")  # nothing to release yet
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("role", "line"), PUBLISHER, ids=[f"{role}-{line.step}" for role, line in PUBLISHER])
def test_publisher_killed_at_every_step(storm: Storm, role: str, line: Line, when: str) -> None:
    """Killed before its store a publisher has published nothing, after it all; the next one finds all free."""
    storm.write()
    storm.push()
    readers = [storm.reader(mode) for mode in ("swap", "copy")]
    assert [storm.seen(reader.pid, reader.line()) for reader in readers] == [1, 1]
    storm.write()
    victim = storm.publisher(role, [line.file, line.number, when])
    assert victim.ended() == -9, victim.lines()
    stored = (line.step, when) in STORED
    assert storm.segment.version == 1 + stored
    storm.check(*readers)
    assert [storm.look(reader) for reader in readers] == [1 + stored] * 2
    storm.write()
    told = storm.push()
    assert (told["status"], told["version"]) == ("published", 2 + stored)
    assert [storm.look(reader) for reader in readers] == [3, 3]
    storm.check(*readers)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("mode", "moment", "line"), READER, ids=[f"{m}-{t}-{line.step}" for m, t, line in READER])
def test_reader_killed_at_every_step(storm: Storm, mode: str, moment: str, line: Line, when: str) -> None:
    """A reader that dies leaves no lease and no record, and the others and the publisher never notice."""
    storm.write()
    storm.push()
    other = storm.reader("swap")
    assert storm.seen(other.pid, other.line()) == 1
    trap = [line.file, line.number, when]
    if moment == "attach":
        victim = storm.reader(mode, trap=trap)
        assert victim.line() == ""
    else:
        victim = storm.reader(mode, late=trap)
        assert storm.seen(victim.pid, victim.line()) == 1
        storm.write()
        storm.push()
        victim.ask()
    assert victim.ended() == -9
    storm.check(other)
    used = set()
    for _ in range(3):
        storm.write()
        assert storm.push()["status"] == "published"
        used.add(storm.segment.word & 0xFF)
        assert storm.look(other) == storm.step
    assert len(used) >= 2
    storm.check(other)


@pytest.mark.parametrize("when", ["before", "after"])
def test_publisher_killed_at_its_extras(storm: Storm, when: str) -> None:
    """Killed anywhere from their first byte to the store: what is live stays whole, and what is left harms nobody."""

    def publish(mark: int, trap: list[Any] | None = None) -> int:
        child = storm.start(storm.heavy, "tensors", float(mark), {"mark": str(mark)}, trap=trap)
        code = child.ended()
        storm.forget(child)
        return code

    def live() -> tuple[int | None, dict[str, bytes]]:
        with wsync.lease(NAME) as held:
            return held.step, dict(held.extras)

    assert [publish(mark) for mark in (1, 2, 3)] == [0, 0, 0]  # each slot was used
    write = segment_files.write_extras
    first = write.__code__.co_firstlineno
    lines = sorted({line for _, line in dis.findlinestarts(write.__code__) if line and line > first})
    (store,) = (line for line in code() if line.step == "P7 store")
    places = [(segment_files.__file__, line) for line in lines] + ([(store.file, store.number)] * (when == "before"))
    mark = 3
    for file, number in places:
        assert publish(mark + 1, [file, number, when]) == -9, (file, number)
        assert live() == (mark, {"mark": str(mark).encode()}), (file, number)
        mark += 1
        assert publish(mark) == 0 and live() == (mark, {"mark": str(mark).encode()})
    left = set(os.listdir(storm.segment.path)) - FILES
    assert left <= {f"slot-{number}.extras" for number in range(3)}


def test_killed_at_any_moment(storm: Storm) -> None:
    """Whoever of publishers, watches and readers is killed whenever: no weights are torn, lost, or of two versions."""
    chance = random.Random(20_240_607)
    storm.write()
    took = {}
    for role in ("push", "watch"):
        began = time.monotonic()
        first = storm.publisher(role)
        while "version" not in first.line():
            pass
        took[role] = time.monotonic() - began
        first.close()
        storm.children.remove(first)
        storm.write()
    survivors = [storm.reader(mode, follow=True) for mode in ("swap", "copy")]
    prey = {mode: storm.reader(mode, follow=True) for mode in ("swap", "copy")}
    for reader in (*survivors, *prey.values()):
        storm.seen(reader.pid, reader.line())
    moments = 0
    for _ in range(KILLS):
        storm.write()
        who = chance.choice(["push", "push", "watch", "swap", "copy"])
        role = who if who in took else "push"
        publisher = storm.publisher(role)
        victim = publisher if who == role else prey[who]
        moments += publisher.quiet(chance.uniform(0, took[role]))  # else it was done before its moment came
        for line in victim.lines() if victim is not publisher else []:
            storm.seen(victim.pid, line)
        victim.kill()
        assert victim.ended() == -9 or victim is publisher
        assert role == "watch" or publisher.ended() in (0, -9)
        storm.forget(victim)
        if victim is not publisher:
            storm.forget(publisher)
            prey[who] = storm.reader(who, follow=True)
            storm.seen(prey[who].pid, prey[who].line())
        storm.check(*survivors, *prey.values(), still=False)
        assert storm.push()["status"] in ("published", "current", "busy")
        for reader in (*survivors, *prey.values()):
            for line in reader.lines():
                storm.seen(reader.pid, line)
    assert moments > KILLS // 3
    storm.write()
    storm.push()
    for reader in (*survivors, *prey.values()):
        while storm.seen(reader.pid, reader.line()) != storm.step:
            pass
        assert not [file for file in reader.files() if "/runs/" in file]
    storm.check(*survivors, *prey.values(), still=False)
    assert storm.segment.version == max(storm.marks) and len(storm.marks) > KILLS // 2


def places(storm: Storm, role: str, *arguments: Any, functions: list[tuple[Any, str]]) -> list[tuple[str, int, int]]:
    """The lines of these functions that run in this role: file, line, and the first and the last time."""
    wanted = [[module.__file__, name] for module, name in functions]
    child = storm.start(storm.light, "lines", role, arguments, wanted)
    counted = json.loads(child.line())
    assert child.ended() == 0
    storm.forget(child)
    return [(file, line, times) for file, line, count in counted for times in sorted({1, count})]


def test_maker_killed_at_every_line(storm: Storm) -> None:
    """Killed anywhere a maker leaves a whole segment or none, and the next maker sweeps away what it left."""
    functions = [(segment_files, name) for name in ("make", "_claim", "sweep")]
    functions += [(segment_module, "Segment.create")]
    storm.segment.remove()
    arguments = (NAME, LAYOUT.to_json())
    lines = places(storm, "create", *arguments, functions=functions)
    WritableSegment.open(NAME).remove()
    assert len(lines) > 30
    for file, line, times in lines:
        for when in ("before", "after"):
            where = f"{Path(file).name}:{line} {when}, time {times}"
            victim = storm.start(storm.light, "create", *arguments, trap=[file, line, when, times])
            assert victim.ended() == -9, where
            storm.forget(victim)
            assert segments() in ([], [NAME]), where
            segment = WritableSegment.create(NAME, LAYOUT)
            assert os.listdir(storm.runtime) == [NAME], where
            assert set(os.listdir(segment.path)) - {"watch.lock"} == FILES, where
            segment.remove()
            segment.close()
            assert os.listdir(storm.runtime) == [], where


def test_remover_killed_at_every_line(storm: Storm) -> None:
    """Killed anywhere a remover leaves a segment that works as before or none, and the next maker sweeps the rest."""
    functions = [(segment_module, name) for name in ("remove", "Segment.remove")]
    functions += [(segment_files, "discard"), (shutil, "rmtree"), (shutil, "_rmtree_safe_fd")]
    lines = places(storm, "remove", NAME, functions=functions)
    assert len(lines) > 10 and os.listdir(storm.runtime) == []
    path = write(Path("runs/step_1.safetensors"), POLICY, 1.0)
    for file, line, times in lines:
        for when in ("before", "after"):
            where = f"{Path(file).name}:{line} {when}, time {times}"
            segment = WritableSegment.create(NAME, LAYOUT)
            assert os.listdir(storm.runtime) == [NAME], where
            with segment.publishing(), Checkpoint(path) as checkpoint:
                version = publish(segment, checkpoint).version
            victim = storm.start(storm.light, "remove", NAME, trap=[file, line, when, times])
            assert victim.ended() == -9, where
            storm.forget(victim)
            if segment.is_current():
                assert set(os.listdir(segment.path)) - {"watch.lock"} == FILES, where
                with segment.publishing(), Checkpoint(path) as checkpoint:
                    assert publish(segment, checkpoint).version == version + 1, where
            segment.close()
    WritableSegment.create(NAME, LAYOUT).close()
    assert os.listdir(storm.runtime) == [NAME]


def test_remover_killed_before_anything_is_gone(storm: Storm, caplog: pytest.LogCaptureFixture) -> None:
    """Readers that were told of a removal that never came are told it once, and follow the next version."""
    storm.write()
    storm.push()
    policy = mlp(HIDDEN)
    with wsync.attach(policy, NAME, mode="swap") as reader:
        first = next(line for line in inspect.getsourcelines(segment_files.discard)[0] if "os.rename(" in line)
        number = Path(segment_files.__file__).read_text().split("\n").index(first.rstrip()) + 1
        victim = storm.start(storm.light, "remove", NAME, trap=[segment_files.__file__, number, "before"])
        assert victim.ended() == -9
        assert storm.segment.word & 0xFF == REMOVED
        for _ in range(30):  # some of them look for another segment
            assert not reader.refresh() and not reader.wait(0.01)
        assert len(caplog.records) == 1
        assert (reader.version, storm.push()["version"]) == (1, 2)
        assert reader.wait(DEADLINE) and reader.refresh()
        assert reader.version == 2


def test_stopped_reader_holds_up_nobody(storm: Storm) -> None:
    """Others go on past a reader that stands still; at the bound of slots it is busy, and names them."""
    spec = Path("storm.toml")
    spec.write_text(f"max_slots = 3\n{spec.read_text()}")
    storm.write()
    storm.push()
    stopped, other, third = (storm.reader("swap") for _ in range(3))
    for reader in (stopped, other, third):
        storm.seen(reader.pid, reader.line())
    stopped.stop()
    for _ in range(3):
        storm.write()
        assert storm.push()["status"] == "published"
        assert [storm.look(reader) for reader in (other, third)] == [storm.step] * 2
    assert storm.status() == {stopped.pid: 3, other.pid: 0, third.pid: 0}
    storm.write()
    assert storm.push()["version"] == 5  # the third stays on version 4: now each slot is somebody's
    assert storm.look(other) == 5
    for _ in range(3):
        storm.write()
        told = storm.push(75)
        assert (told["status"], told["version"]) == ("busy", 5)
        assert f"pid {stopped.pid}" in told["reason"] and f"pid {third.pid}" in told["reason"]
        assert f"pid {other.pid}" not in told["reason"]
    assert storm.status() == {stopped.pid: 4, other.pid: 0, third.pid: 1}
    assert (storm.look(other), storm.segment.version) == (5, 5)
    stopped.go_on()
    assert storm.look(stopped) == 5
    told = storm.push()
    assert (told["status"], told["version"], told["step"]) == ("published", 6, 8)  # 6 and 7 never went live
    assert [storm.look(reader) for reader in (stopped, other, third)] == [8, 8, 8]
    storm.check(stopped, other, third)
