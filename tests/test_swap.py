"""What moves pages under a policy, at its edges: who is seen to point into a window, and a take that is cut short."""

from __future__ import annotations

import multiprocessing
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEADLINE, Spawn, marks
from policies import mlp
from test_reader import Trainer
from test_reader_lifetime import leased
from torch import nn

import wsync
from wsync import addresses, renewal, swap
from wsync.layout import layout_of, views
from wsync.segment import Segment
from wsync.segment_updater import SharedMemoryWeightUpdater


@pytest.fixture
def trainer(runtime: Path, tmp_path: Path) -> Trainer:
    """A segment for ``mlp`` whose version 1 has the mark 1."""
    trainer = Trainer(mlp, tmp_path)
    trainer.push(1)
    return trainer


class Hollow(nn.Module):
    """A parameter without elements beside one with some."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.weight = nn.Parameter(torch.zeros(5))
        self.eval()


def test_a_backward_pass_over_a_refresh_is_told(runtime: Path, tmp_path: Path) -> None:
    """Guards against gradients of a mixture: a graph saves a parameter as it is, which nothing else shows."""

    def make() -> nn.Module:
        return nn.LayerNorm(4).eval()

    trainer, policy = Trainer(make, tmp_path), make()
    trainer.push(1)
    with wsync.attach(policy, "nets", mode="swap") as reader:
        for mark, kept in ((2, None), (3, policy.state_dict())):  # what is kept has the policy pointed elsewhere
            loss = policy(torch.arange(4.0).requires_grad_()).sum()
            trainer.push(mark)
            assert reader.refresh()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            del kept


def test_a_storage_object_keeps_its_bytes(trainer: Trainer) -> None:
    """Guards a storage that was asked for: torch gives the one object that there is to all who ask, and counts none."""
    policy = mlp()
    weight = policy.get_parameter("0.weight")
    with wsync.attach(policy, "nets", mode="swap") as reader:
        kept, first = weight.untyped_storage(), weight.storage_offset()
        slot = trainer.segment.word & 0xFF
        for mark in range(2, 8):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
        assert torch.empty(0).set_(kept, first, (8,), (1,)).tolist() == [1.0] * 8
        assert leased(trainer.segment) == sorted({slot, trainer.segment.word & 0xFF})
        del kept
        assert leased(trainer.segment) == [trainer.segment.word & 0xFF]


@pytest.mark.parametrize("kind", ["numpy", "asarray"])
def test_an_array_straight_from_a_frozen_parameter_keeps_its_bytes(trainer: Trainer, kind: str) -> None:
    """Guards what torch makes of ``parameter.numpy()`` without a detach: an alias of the storage, which is counted."""
    import numpy

    policy = mlp().requires_grad_(False)
    weight = policy.get_parameter("0.weight")
    with wsync.attach(policy, "nets", mode="swap") as reader:
        kept = weight.numpy() if kind == "numpy" else numpy.asarray(weight)
        for mark in range(2, 8):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
        assert (kept == 1).all()
    assert (kept == 1).all()


def test_a_tensor_without_elements_hides_no_alias(runtime: Path, tmp_path: Path) -> None:
    """Guards the count: a tensor without an address leaves the window unseen, and a kept alias takes its place."""
    trainer = Trainer(Hollow, tmp_path)
    trainer.push(1)
    policy = Hollow()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        policy.empty.data = torch.zeros(0, 3)
        kept = policy.weight.detach()
        trainer.push(2)
        assert reader.refresh() and marks(policy) == {2.0} and (kept == 1).all()


def test_an_alias_made_while_a_slot_is_waited_for_keeps_its_bytes(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards another thread's ``state_dict``, taken while a refresh waits for pages: it was not there at the start."""
    policy = mlp()
    kept: list[tuple[dict[str, torch.Tensor], set[float]]] = []
    real = renewal.Renewal.wait

    def wait(self: renewal.Renewal) -> bool:
        kept.append((policy.state_dict(), marks(policy)))
        return real(self)

    monkeypatch.setattr(renewal.Renewal, "wait", wait)
    with wsync.attach(policy, "nets", mode="swap") as reader:
        for mark in range(2, 6):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
            for state, seen in kept:
                assert {float(value) for tensor in state.values() for value in tensor.flatten()} == seen
            del kept[:-1]
        assert kept


@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupt_amid_a_move_mixes_no_versions(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Guards Ctrl-C between two moves: what is shown stays leased, and each later version comes as it is."""
    policy = mlp()
    calls: list[tuple[int, ...]] = []

    def interrupt(*arguments: int) -> None:
        addresses.move(*arguments)
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt

    with wsync.attach(policy, "nets", mode="swap") as reader:
        trainer.push(2)
        monkeypatch.setattr(swap, "move", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reader.refresh()
        shown = marks(policy)
        trainer.push(3)
        assert shown == marks(policy) == {float(call)}
        for mark in range(3, 12):
            if mark > 3:
                trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
            assert leased(trainer.segment) == [trainer.segment.word & 0xFF]
    assert leased(trainer.segment) == []


def test_an_interrupt_after_pointing_leaves_the_slot_leased(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards Ctrl-C once the tensors point into a new window: its slot is not written under them."""
    policy = mlp()
    real = swap._addresses

    def interrupt(tensors: list[torch.Tensor]) -> Any:
        monkeypatch.setattr(swap, "_addresses", real)
        raise KeyboardInterrupt

    with wsync.attach(policy, "nets", mode="swap") as reader:
        kept = next(policy.parameters()).detach()
        trainer.push(2)
        monkeypatch.setattr(swap, "_addresses", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reader.refresh()
        assert marks(policy) == {2.0} and (kept == 1).all() and leased(trainer.segment) == [0, 1]
        trainer.push(3)
        assert marks(policy) == {2.0} and (kept == 1).all()
        del kept
        for mark in range(3, 9):
            if mark > 3:
                trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
            assert leased(trainer.segment) == [trainer.segment.word & 0xFF]


def test_a_child_forked_amid_a_move_takes_whole_versions(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a fork by another thread once a refresh moved pages: the child cannot know which slot it was left with."""
    policy = mlp()
    moves: list[tuple[int, ...]] = []
    children: list[Any] = []
    here, there = multiprocessing.Pipe()

    def follow() -> None:
        for mark in range(3, 9):
            there.recv()
            there.send(reader.refresh() and marks(policy) == {float(mark)})

    def fork() -> None:
        child = multiprocessing.get_context("fork").Process(target=follow)
        child.start()
        children.append(child)

    def forking(*arguments: int) -> None:
        addresses.move(*arguments)
        moves.append(arguments)
        if len(moves) == 2:
            thread = threading.Thread(target=fork)
            thread.start()
            thread.join(DEADLINE)

    with wsync.attach(policy, "nets", mode="swap") as reader:
        monkeypatch.setattr(swap, "move", forking)
        trainer.push(2)
        assert reader.refresh() and marks(policy) == {2.0}
        try:
            for mark in range(3, 9):
                trainer.push(mark)
                here.send("go")
                assert here.poll(DEADLINE) and here.recv()
                assert reader.refresh() and marks(policy) == {float(mark)}
            children[0].join(DEADLINE)
            assert children[0].exitcode == 0
        finally:
            children[0].kill()
            children[0].join()
    assert leased(trainer.segment) == []


def test_without_a_thread_every_promise_holds(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a refresh that waits for ever for a thread that the system refused."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(renewal, "_queue", None)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        for mark in range(2, 9):
            with torch.no_grad():
                next(policy.parameters()).fill_(-1)
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}


def test_a_renewal_that_failed_is_tried_anew(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a slot that would be refused for ever after, or waited for, since its pages could once not be dropped."""

    def refuse(*arguments: int) -> bool:
        raise MemoryError

    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        with monkeypatch.context() as patched:
            patched.setattr(renewal, "renew", refuse)
            trainer.push(2)
            assert reader.refresh()
            trainer.push(3)
            with pytest.raises(MemoryError):
                reader.refresh()
        assert marks(policy) == {2.0} and reader.version == 2
        for mark in range(3, 9):
            if mark > 3:
                trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}


def ended_well(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    return out


def test_a_limit_that_was_lowered_costs_no_addresses(trainer: Trainer, spawn: Spawn) -> None:
    """Guards addresses that mremap(2) frees before it looks at the limit, and that others would come to lie at."""
    code = """
import resource, wsync
from conftest import marks
from policies import mlp
from test_reader import slot_ranges
from wsync.errors import OutOfSharedMemory
from wsync.segment import Segment

policy = mlp()
reader = wsync.attach(policy, "nets", mode="swap")
segment = Segment.open("nets")
print("ready", flush=True)
input()
assert reader.refresh()
before = slot_ranges(segment)
print("ready", flush=True)
input()
resource.setrlimit(resource.RLIMIT_AS, (1 << 20, -1))
try:
    reader.refresh()
    print("taken")
except OutOfSharedMemory as exc:
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print("ulimit -v" in str(exc), slot_ranges(segment) == before, marks(policy))
print(reader.refresh(), marks(policy))
"""
    process = spawn("-c", code, stdin=subprocess.PIPE)
    assert process.stdin and process.stdout
    for mark in (2, 3):
        assert process.stdout.readline() == "ready\n", ended_well(process)
        trainer.push(mark)
        process.stdin.write("go\n")
        process.stdin.flush()
    assert ended_well(process) == "True True {2.0}\nTrue {3.0}\n"


def test_a_process_that_locks_its_memory_takes_versions(trainer: Trainer, spawn: Spawn) -> None:
    """Guards a control loop that calls mlockall(2): pages of its own can be dropped all the same."""
    code = """
import ctypes, sys, wsync
from conftest import marks
from policies import mlp

policy = mlp()
reader = wsync.attach(policy, "nets", mode="swap")
if ctypes.CDLL(None).mlockall(1):
    sys.exit("not permitted")
for mark in range(2, 9):
    print("ready", flush=True)
    input()
    assert reader.refresh() and marks(policy) == {float(mark)}
"""
    process = spawn("-c", code, stdin=subprocess.PIPE)
    assert process.stdin and process.stdout
    for mark in range(2, 9):
        if not process.stdout.readline():
            _, err = process.communicate(timeout=DEADLINE)
            if "not permitted" in err:
                pytest.skip("this user may not lock so much memory")
            pytest.fail(err)
        trainer.push(mark)
        process.stdin.write("go\n")
        process.stdin.flush()
    ended_well(process)


def test_an_alias_that_was_there_when_the_policy_was_pointed_is_counted(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a tensor that another thread took amid the pointing: it is no use of the policy's own."""
    kept: list[torch.Tensor] = []

    def taken(*arguments: Any) -> list[torch.Tensor]:
        tensors = views(*arguments)
        kept.append(tensors[0].detach())
        return tensors

    policy = mlp()
    with monkeypatch.context() as patched:
        patched.setattr(swap, "views", taken)
        reader = wsync.attach(policy, "nets", mode="swap")
    with reader:
        trainer.push(2)
        assert reader.refresh() and marks(policy) == {2.0} and (kept[0] == 1).all()


def test_a_segment_of_many_slots_takes_the_addresses_of_few(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a process under `ulimit -v`: slots that were never live, the last of most segments, cost it nothing."""
    Segment.create("many", layout_of(mlp()), slots=64).close()
    updater = SharedMemoryWeightUpdater("many", policy=mlp())
    updater.push_weights(mlp().state_dict())
    reserved: list[int] = []

    def reserve(nbytes: int) -> addresses.Stretch:
        reserved.append(nbytes)
        return addresses.Stretch(nbytes)

    monkeypatch.setattr(swap, "Stretch", reserve)
    policy = mlp()
    with wsync.attach(policy, "many", mode="swap") as reader:
        for _ in range(5):
            updater.push_weights(mlp().state_dict())
            assert reader.refresh()
        assert sum(reserved) <= 4 * addresses.SPAN
