"""What points a policy at slots, at its edges: who is seen to hold a tensor, and a take that is cut short."""

from __future__ import annotations

import errno
import math
import subprocess
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import marks
from policies import mlp
from processes import DEADLINE, Spawn
from torch import nn
from trainers import Trainer, leased, taken_over

import wsync
from wsync.errors import OutOfSharedMemory
from wsync.policy import swap
from wsync.segment import segment
from wsync.segment.word_and_lease import SlotMemory


@pytest.fixture
def trainer(runtime: Path) -> Trainer:
    """A segment for ``mlp`` whose version 1 has the mark 1."""
    trainer = Trainer(mlp)
    trainer.push(1)
    return trainer


class Hollow(nn.Module):
    """A parameter without elements beside one with some."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.weight = nn.Parameter(torch.zeros(5))
        self.eval()


def test_a_backward_pass_over_a_refresh_is_told(runtime: Path) -> None:
    """Guards against gradients of a mixture: a graph saves a parameter as it is, which nothing else shows."""

    def make() -> nn.Module:
        return nn.LayerNorm(4).eval()

    trainer, policy = Trainer(make), make()
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
        for mark in range(2, 8):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
        assert torch.empty(0).set_(kept, first, (8,), (1,)).tolist() == [1.0] * 8
        taken_over()
        assert torch.empty(0).set_(kept, first, (8,), (1,)).tolist() == [1.0] * 8
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


def test_a_tensor_without_elements_hides_no_alias(runtime: Path) -> None:
    """Guards the count: a tensor without an address leaves the slot unseen, and a kept alias takes its place."""
    trainer = Trainer(Hollow)
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
    real = swap._Slot.end_look

    def wait(self: swap._Slot) -> bool:
        kept.append((policy.state_dict(), marks(policy)))
        return real(self)

    monkeypatch.setattr(swap._Slot, "end_look", wait)
    with wsync.attach(policy, "nets", mode="swap") as reader:
        for mark in range(2, 9):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
            for state, seen in kept:
                assert {float(value) for tensor in state.values() for value in tensor.flatten()} == seen
            del kept[:-1]
        assert kept


def test_an_alias_made_amid_the_pointing_keeps_its_bytes(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a tensor that another thread takes when the first of the policy's tensors have been pointed."""
    kept: list[torch.Tensor] = []
    real = swap._point

    def point(tensor: torch.Tensor, view: torch.Tensor) -> None:
        real(tensor, view)
        kept.append(tensor.detach())

    policy = mlp()
    monkeypatch.setattr(swap, "_point", point)
    reader = wsync.attach(policy, "nets", mode="swap")
    monkeypatch.setattr(swap, "_point", real)
    with reader:
        for mark in range(2, 6):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)} and all((tensor == 1).all() for tensor in kept)


@pytest.mark.parametrize("before", [True, False], ids=["before pointing", "after pointing"])
def test_an_interrupted_take_mixes_no_versions(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    """Guards Ctrl-C on either side of the pointing: the take is finished, and each later version comes whole."""
    policy = mlp()
    real = deque

    def interrupt(*arguments: Any) -> None:
        monkeypatch.setattr(swap, "deque", real)
        if not before:
            real(*arguments)
        raise KeyboardInterrupt

    with wsync.attach(policy, "nets", mode="swap") as reader:
        for first in (2, 8):  # with new mappings, and with those that were used before
            trainer.push(first)
            monkeypatch.setattr(swap, "deque", interrupt)
            with pytest.raises(KeyboardInterrupt):
                reader.refresh()
            assert (marks(policy), reader.step) == ({float(first)}, first)
            trainer.push(first + 1)
            assert marks(policy) == {float(first)}
            for mark in range(first + 1, first + 6):
                if mark > first + 1:
                    trainer.push(mark)
                assert reader.refresh() and marks(policy) == {float(mark)}
                assert leased(trainer.segment) == [trainer.segment.word & 0xFF]
    assert leased(trainer.segment) == []


@pytest.mark.parametrize("frozen", ["parameter", "buffer"])
@pytest.mark.parametrize("into", ["torch", "numpy"])
def test_what_was_exported_from_a_frozen_tensor_keeps_its_bytes(
    runtime: Path, tmp_path: Path, frozen: str, into: str
) -> None:
    """Guards arrays that hold the tensor itself and not its memory, also of versions that come while they are held."""
    import numpy

    def make() -> nn.Module:
        return mlp().requires_grad_(False) if frozen == "parameter" else nn.BatchNorm1d(3).eval()

    name = "0.weight" if frozen == "parameter" else "running_mean"
    export: Any = torch.utils.dlpack.from_dlpack if into == "torch" else numpy.from_dlpack
    trainer, policy = Trainer(make), make()
    trainer.push(1)
    tensor = dict(policy.named_parameters()) | dict(policy.named_buffers())
    kept: list[tuple[Any, float]] = []
    with wsync.attach(policy, "nets", mode="swap") as reader:
        for mark in range(2, 9):
            kept = [*kept[-1:], (export(tensor[name]), float(policy.state_dict()[name].flatten()[0]))]
            trainer.push(mark)
            assert reader.refresh() and all((array == value).all() for array, value in kept)
            assert marks(policy) == ({float(mark)} if frozen == "parameter" else marks(policy))
            assert len(leased(trainer.segment)) <= 3
        del kept[:]
        assert leased(trainer.segment) == [trainer.segment.word & 0xFF]
        array, value = export(tensor[name]), float(policy.state_dict()[name].flatten()[0])
    for mark in range(9, 15):
        trainer.push(mark)
    taken_over()
    assert (array == value).all() and leased(trainer.segment) == []


@pytest.mark.parametrize("frozen", [False, True])
def test_a_graph_that_lives_on_at_every_refresh_starves_nobody(trainer: Trainer, frozen: bool) -> None:
    """Guards slots that the last action of a policy would hold for ever: there is one at each refresh."""
    policy = mlp()
    policy.get_parameter("2.weight").requires_grad_(not frozen)
    with wsync.attach(policy, "nets", mode="swap") as reader:
        action = policy(torch.ones(4))
        for mark in range(2, 12):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
            assert len(leased(trainer.segment)) <= 2
            with torch.no_grad():
                assert policy(torch.zeros(4)).tolist() == pytest.approx([mark * 8 * math.tanh(mark) + mark] * 2)
            action = policy(torch.ones(4))
            assert leased(trainer.segment) == [trainer.segment.word & 0xFF]
        assert action.requires_grad


def test_a_frozen_tensor_with_a_weak_reference_is_refreshed(trainer: Trainer) -> None:
    """Guards a policy that would be stuck: a tensor to which C++ has a weak reference cannot be given another body."""
    policy = mlp()
    weight = policy.get_parameter("2.weight").requires_grad_(False)
    weak = torch._C._WeakTensorRef(weight)  # type: ignore[attr-defined]
    with wsync.attach(policy, "nets", mode="swap") as reader:
        for mark in range(2, 8):
            action = policy(torch.ones(4))
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                action.sum().backward()
    assert not weak.expired()


def test_a_frozen_tensor_that_is_held_keeps_what_it_is(trainer: Trainer) -> None:
    """Guards a parameter that somebody's array holds: it is the same object, with its gradient and its form."""
    policy = mlp()
    weight = policy.get_parameter("0.weight")
    weight.grad = torch.ones(8, 4)
    weight.requires_grad_(False)
    with wsync.attach(policy, "nets", mode="swap") as reader:
        kept = torch.utils.dlpack.from_dlpack(weight)
        trainer.push(2)
        assert reader.refresh() and policy.get_parameter("0.weight") is weight and isinstance(weight, nn.Parameter)
        assert weight.grad is not None and weight.grad.eq(1).all() and not weight.requires_grad and weight.is_leaf
        assert weight.requires_grad_().requires_grad and kept.eq(1).all()


def test_without_a_thread_every_promise_holds(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a refresh that waits for ever for a thread that the system refused."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(swap, "_looks", ThreadPoolExecutor(1))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        for mark in range(2, 9):
            with torch.no_grad():
                next(policy.parameters()).fill_(-1)
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}


def test_a_look_that_failed_is_tried_again(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a slot that would be refused for ever after, or waited for, since its pages could once not be dropped."""

    def refuse(*_: Any) -> bool:
        raise MemoryError

    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        with monkeypatch.context() as patched:
            patched.setattr(swap, "renew", refuse)
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


def test_a_slot_that_cannot_be_mapped_leaves_the_version(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may have no more memory keeps its weights, is told so, and goes on when it may."""

    def refuse(*_: Any, **__: Any) -> SlotMemory:
        raise OSError(errno.ENOMEM, "refused")

    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        live = trainer.segment.word & 0xFF
        trainer.push(2)
        with monkeypatch.context() as patched:
            patched.setattr(segment, "SlotMemory", refuse)
            with pytest.raises(OutOfSharedMemory, match="ulimit -v"):
                reader.refresh()
        assert marks(policy) == {1.0} and leased(trainer.segment) == [live]
        for mark in range(2, 8):
            if mark > 2:
                trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}


@pytest.mark.slow
def test_a_process_that_locks_its_memory_takes_versions(trainer: Trainer, spawn: Spawn) -> None:
    """Guards a control loop that calls mlockall(2): pages of its own can be dropped all the same."""
    code = """
import ctypes, sys, wsync
from builders import marks
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
