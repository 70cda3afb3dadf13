"""Files of a segment that something outside wsync removed or cut, and what a process without descriptors sees."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import marks
from policies import mlp
from processes import Cli
from torch import nn

import wsync
from wsync.errors import SegmentDamaged, SegmentError, UsageError
from wsync.policy import segment_search
from wsync.policy.reader import Mode, Reader
from wsync.segment import writable
from wsync.segment.reader_records import Registration
from wsync.segment.segment import Segment
from wsync.segment.segment_files import set_aside
from wsync.segment.writable import WritableSegment
from wsync.system.access import open_dir
from wsync.updaters.shared_memory import SharedMemoryWeightUpdater

PARTS = ["control", "layout.json", "publisher.lock", "readers", "slot-0", "slot-1", "everything", "the directory"]


class Loop:
    """A trainer that pushes from memory."""

    def __init__(self) -> None:
        self.policy: nn.Module = mlp()
        self.standing = SharedMemoryWeightUpdater("nets", policy=self.policy)

    def push(self, mark: float) -> None:
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.fill_(mark)
        self.standing.push_weights(self.policy)


@pytest.fixture
def loop(runtime: Path) -> Iterator[Loop]:
    made = Loop()
    yield made
    made.standing.close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader looks at the directory at each call, not once a second."""
    monkeypatch.setattr(segment_search.Lookout, "seconds", 0.0)
    monkeypatch.setattr(segment_search.Search, "seconds", 0.0)


def remove(path: Path, part: str) -> None:
    for each in sorted(path.iterdir()):
        if part in ("everything", "the directory") or each.name.startswith(part):
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    if part == "the directory":
        path.rmdir()


def until_taken(reader: Reader, mark: float, policy: nn.Module) -> None:
    for _ in range(3):
        reader.refresh()
    assert marks(policy) == {mark}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("again", [False, True], ids=["the same publisher", "another one"])
def test_a_gutted_segment_is_made_anew(
    loop: Loop, runtime: Path, caplog: pytest.LogCaptureFixture, part: str, again: bool
) -> None:
    """RemoveIPC, a cleaner of temporary files, ``rm`` of parts: the next push works, and readers follow, told once."""
    loop.push(1.0)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader, caplog.at_level(logging.WARNING, "wsync"):
        remove(runtime / "nets", part)
        assert [reader.refresh() for _ in range(3)] == [False] * 3 and marks(policy) == {1.0}
        assert len(caplog.records) == 1 and "the policy keeps version 1" in caplog.text
        publisher = Loop() if again else loop
        publisher.push(2.0)
        until_taken(reader, 2.0, policy)
        assert ("RemoveIPC=no" in caplog.text) == (part != "the directory")
        publisher.push(3.0)
        until_taken(reader, 3.0, policy)
        publisher.standing.close()
    assert len(caplog.records) == (1 if part == "the directory" else 2) and os.listdir(runtime) == ["nets"]


@pytest.mark.parametrize(("mode", "slot"), [("swap", 1), ("swap", 2), ("copy", 0), ("copy", 1), ("copy", 2)])
@pytest.mark.parametrize("size", [0, 5000])
def test_a_slot_that_was_cut_ends_nobody(loop: Loop, runtime: Path, mode: Mode, slot: int, size: int) -> None:
    """Guards against SIGBUS but in a policy that lies on the slot: who publishes, or takes, looks at sizes before."""
    policy = mlp()
    loop.push(1.0)
    with wsync.attach(policy, "nets", mode=mode) as reader:
        loop.push(2.0)  # in slot 1
        os.truncate(runtime / "nets" / f"slot-{slot}.safetensors", size)
        assert reader.refresh() == (slot != 1) and marks(policy) == {1.0 if slot == 1 else 2.0}
        loop.push(3.0)
        until_taken(reader, 3.0, policy)


def test_commands_say_what_happened(loop: Loop, runtime: Path, cli: Cli) -> None:
    """``status`` names the file that is gone and the way out; ``rm`` removes what is left."""
    loop.push(1.0)
    (runtime / "nets" / "control").unlink()
    shown = cli("status", "nets")
    assert shown.returncode == 1 and "has no control" in shown.stderr and "RemoveIPC" in shown.stderr
    assert cli("rm", "nets").returncode == 0 and os.listdir(runtime) == []


def test_only_the_damaged_segment_is_set_aside(loop: Loop, runtime: Path) -> None:
    """Of two publishers that saw the damage the late one must not remove what the other made anew."""
    loop.push(1.0)
    directory = open_dir(runtime / "nets")
    (runtime / "nets" / "slot-0.safetensors").unlink()
    loop.push(2.0)
    set_aside(runtime / "nets", directory)
    os.close(directory)
    assert Segment.open("nets").version == 2 and os.listdir(runtime) == ["nets"]


def test_an_attach_makes_a_gutted_segment_anew(loop: Loop, runtime: Path) -> None:
    """A policy that starts after the damage waits for a version, as where there was no segment."""
    loop.push(1.0)
    (runtime / "nets" / "layout.json").unlink()
    with pytest.raises(wsync.AttachTimeout):
        wsync.attach(mlp(), "nets", timeout=0)
    assert os.listdir(runtime) == []


def test_a_runtime_directory_on_a_disk_is_told(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, where a segment is made there; nothing is said of memory."""
    layout = wsync.layout.layout.layout_of(mlp())
    with caplog.at_level(logging.WARNING, "wsync"):
        WritableSegment.create("a", layout).close()
        assert not caplog.records
        monkeypatch.setattr(writable, "file_system", lambda base: "ext4")
        for _ in range(2):
            WritableSegment.create("b", layout).close()
    assert len(caplog.records) == 1 and "ext4" in caplog.text and str(runtime) in caplog.text


@pytest.mark.parametrize("send", [pickle.dumps, copy.deepcopy])
def test_a_reader_is_not_sent(loop: Loop, send: object) -> None:
    """A Reader that is handed to a spawned process, alone or in a policy, says what to send instead."""
    loop.push(1.0)
    with wsync.attach(mlp(), "nets") as reader, pytest.raises(UsageError, match="attach it there"):
        send(reader)  # type: ignore[operator]


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_process_without_descriptors_is_told_so(loop: Loop, mode: Mode) -> None:
    """EMFILE is an error of ours, from ``refresh`` and from ``attach``, and the next call goes on."""
    loop.push(1.0)
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        loop.push(2.0)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        taken: list[int] = []
        try:
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            with pytest.raises(SegmentError, match="Too many open files"):
                reader.refresh()
            for name in ("nets", "other"):
                with pytest.raises(SegmentError, match="Too many open files"):
                    wsync.attach(mlp(), name, timeout=0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
        assert marks(policy) == {1.0} and reader.refresh() and marks(policy) == {2.0}


def killed_readers(path: Path, number: int) -> None:
    for _ in range(number):
        if not (child := os.fork()):
            Registration(path, "swap")
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)


def test_records_of_killed_readers_go(loop: Loop, runtime: Path) -> None:
    """61 stayed after 60 forks: the next publish removes them, and so does the next reader."""
    loop.push(1.0)
    place = runtime / "nets" / "readers"
    killed_readers(place.parent, 5)
    assert len(os.listdir(place)) in (1, 5)
    loop.push(2.0)
    assert os.listdir(place) == []
    killed_readers(place.parent, 1)
    with wsync.attach(mlp(), "nets"):
        assert len(os.listdir(place)) == 1


def test_damage_is_an_error_of_its_own(loop: Loop, runtime: Path) -> None:
    """A library user can tell a segment that was damaged from one that is not his."""
    loop.push(1.0)
    (runtime / "nets" / "control").unlink()
    with pytest.raises(SegmentDamaged):
        Segment.open("nets")
