"""The end of things on a policy process's side: close, kept aliases, a removed segment, a fork, inference mode."""

from __future__ import annotations

import fcntl
import itertools
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import marks
from policies import mlp, normed
from processes import DEADLINE, Spawn
from torch import nn
from trainers import Trainer, addresses, leased, slot_ranges, taken_over

import wsync
from wsync.errors import AttachTimeout, SwapRefused, UsageError
from wsync.layout.layout import layout_of
from wsync.policy import reader as reading
from wsync.policy import segment_search, swap
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.system import memory


@pytest.fixture
def trainer(trainer: Trainer) -> Trainer:
    """A segment for ``mlp`` whose version 1 has the mark 1."""
    trainer.push(1)
    return trainer


def test_close_gives_own_memory(trainer: Trainer) -> None:
    """After close the policy has the same values in memory of its own, and no lease or mapping is left."""
    policy = mlp()
    reader = wsync.attach(policy, "nets", mode="swap")
    parameters = list(policy.parameters())
    assert leased(trainer.segment) == [trainer.segment.word & 0xFF]
    trainer.segment.unmap()
    reader.close()
    assert leased(trainer.segment) == [] and slot_ranges(trainer.segment) == []
    assert trainer.segment.readers() == []
    for mark in range(2, 8):
        trainer.push(mark)
    assert marks(policy) == {1.0}
    assert all(a is b and a.is_leaf for a, b in zip(parameters, policy.parameters(), strict=True))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1)
    assert marks(policy) == {2.0}


def test_closed_reader_refuses(trainer: Trainer) -> None:
    """After close, also by the context manager, refresh and wait say so; closing again does nothing."""
    with wsync.attach(mlp(), "nets") as reader:
        assert "version 1" in repr(reader)
    reader.close()
    assert "closed" in repr(reader)
    with pytest.raises(UsageError, match="closed"):
        reader.refresh()
    with pytest.raises(UsageError, match="closed"):
        reader.wait(0)


@pytest.mark.parametrize("under_way", [None, False, True], ids=["cpu", "gpu", "gpu with a copy under way"])
def test_close_in_another_thread_ends_a_wait(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, under_way: bool | None
) -> None:
    """Guards a thread that follows, which ended with a traceback when the program closed the reader."""
    if under_way is not None:
        request.getfixturevalue("device")
    asleep, said = threading.Event(), list[bool]()

    def sleep_on(*where: Any) -> None:
        asleep.set()
        memory.sleep_on(*where)

    monkeypatch.setattr(reading, "sleep_on", sleep_on)
    with wsync.attach(mlp(), "nets") as reader:
        if under_way:
            trainer.push(2)
            assert not reader.refresh()
        thread = threading.Thread(target=lambda: said.append(reader.wait()), daemon=True)
        thread.start()
        assert asleep.wait(DEADLINE)
    thread.join(DEADLINE)
    assert said == [False]


def test_a_close_that_fails_lets_go_of_the_segment(trainer: Trainer) -> None:
    """Guards the record and the mapping where a policy cannot be given memory of its own any more."""
    reader = wsync.attach(mlp(), "nets", mode="swap")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(reader, "_give_own", lambda: (_ for _ in ()).throw(MemoryError))
        reader.close()
    assert trainer.segment.readers() == [] and "closed" in repr(reader)


def test_error_in_the_block_closes(trainer: Trainer) -> None:
    """The context manager closes when the policy's own code fails."""
    with pytest.raises(ZeroDivisionError), wsync.attach(mlp(), "nets", mode="swap"):
        raise ZeroDivisionError
    assert leased(trainer.segment) == [] and trainer.segment.readers() == []


def test_policy_is_attached_again(trainer: Trainer) -> None:
    """A policy that was closed can be attached anew, in the other mode too."""
    policy = mlp()
    for mark, mode in ((2, "swap"), (3, "copy"), (4, "swap")):
        trainer.push(mark)
        with wsync.attach(policy, "nets", mode=mode) as reader:  # type: ignore[arg-type]
            assert (reader.mode, marks(policy)) == (mode, {float(mark)})


ALIASES: dict[str, Callable[[nn.Module], Any]] = {
    "detach": lambda policy: policy.get_parameter("0.weight").detach(),
    "data": lambda policy: policy.get_parameter("0.weight").data,
    "state_dict": lambda policy: policy.state_dict()["0.weight"],
    "numpy": lambda policy: policy.get_parameter("0.weight").detach().numpy(),
    "slice": lambda policy: policy.get_parameter("0.weight").detach()[2:, 1],
    "storage": lambda policy: torch.empty(0).set_(policy.get_parameter("0.weight").untyped_storage(), 2048, (8,), (1,)),
}


@pytest.mark.parametrize("kind", ALIASES)
def test_kept_alias_keeps_its_bytes(trainer: Trainer, kind: str) -> None:
    """A tensor that the user kept of one version keeps its bytes, and for one more version its slot."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        alias = ALIASES[kind](policy)
        kept = trainer.segment.word & 0xFF
        before = alias.copy() if kind == "numpy" else alias.clone()
        for mark in range(2, 12):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
            taken_over()
            live = trainer.segment.word & 0xFF
            assert leased(trainer.segment) == (sorted({kept, live}) if mark == 2 else [live])
        assert (alias == before).all()
        del alias
        for mark in range(12, 18):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}


def test_alias_outlives_close_and_removal(trainer: Trainer) -> None:
    """A kept tensor is good after the reader is closed and the segment is gone."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap"):
        alias = policy.get_parameter("0.weight").detach()
    taken_over()
    assert leased(trainer.segment) == []
    for mark in range(2, 6):
        trainer.push(mark)
    trainer.segment.remove()
    assert (alias == 1.0).all() and addresses(policy)[0] != alias.data_ptr()


def test_removed_segment_leaves_the_weights(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    """A removal is said once, the policy keeps acting, and a segment that comes back is taken up from its version 1."""
    trainer.push(2)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader, caplog.at_level(logging.WARNING, "wsync"):
        trainer.segment.remove()
        assert [reader.refresh() for _ in range(5)] == [False] * 5
        assert reader.wait(0.25) is False  # longer than the time between two looks
        assert reader.refresh() is False
        assert (reader.version, marks(policy)) == (2, {2.0})
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "'nets' was removed" in caplog.text and "2" in caplog.text
        again = Trainer(mlp)
        again.push(9)
        assert reader.wait(DEADLINE) is True
        assert reader.refresh() is True
        assert (reader.version, reader.step, marks(policy)) == (1, 9, {9.0})
        assert [r.pid for r in again.segment.readers()] == [os.getpid()]
        again.push(10)
        assert reader.refresh() is True and marks(policy) == {10.0}
    assert leased(again.segment) == [] and again.segment.readers() == []


def test_same_version_of_a_new_segment_is_new(trainer: Trainer) -> None:
    """Version 1 of a segment that was made anew is not taken for version 1 of the old one."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode="copy") as reader:
        trainer.segment.remove()
        Trainer(mlp).push(7)
        assert reader.wait(DEADLINE) and reader.refresh()
        assert (reader.version, reader.step, marks(policy)) == (1, 7, {7.0})


def test_removal_by_hand_is_noticed_by_a_waiting_reader(trainer: Trainer) -> None:
    """A directory that was deleted without the WORD's farewell is noticed while waiting."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode="copy") as reader:
        trainer.segment.path.rename(trainer.segment.path.with_name("elsewhere"))
        Trainer(mlp).push(8)
        assert reader.wait(DEADLINE) and reader.refresh() and marks(policy) == {8.0}


def test_new_segment_of_another_layout_is_left_alone(trainer: Trainer) -> None:
    """A segment that comes back with another architecture is not read; the policy keeps what it has."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        trainer.segment.remove()
        other = Trainer(lambda: mlp(hidden=16))
        other.push(2)
        assert reader.wait(0.15) is False
        assert reader.refresh() is False and marks(policy) == {1.0}
        assert other.segment.readers() == []


def test_fork_shares_the_lease(trainer: Trainer, spawn: Spawn) -> None:
    """A forked child is listed on its own, and neither its close nor its exit frees what the parent still uses."""
    script = (
        "import os, sys, wsync\n"
        "from builders import marks\n"
        "from policies import mlp\n"
        "from trainers import leased\n"
        "from wsync.segment.segment import Segment; from wsync.segment.writable import WritableSegment\n"
        "policy = mlp()\n"
        "reader = wsync.attach(policy, 'nets', mode='swap')\n"
        "segment = Segment.open('nets')\n"
        "for ending in ('close', 'exit'):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        assert {r.pid for r in segment.readers()} == {os.getpid(), os.getppid()}\n"
        "        assert marks(policy) == {1.0} and reader.refresh() is False\n"
        "        if ending == 'close': reader.close()\n"
        "        os._exit(7)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
        "    assert [r.pid for r in segment.readers()] == [os.getpid()]\n"
        "    assert leased(segment) == [segment.word & 0xFF], leased(segment)\n"
        "reader.close()\n"
        "assert leased(segment) == []\n"
        "print('done')\n"
    )
    out, err = spawn("-c", script).communicate(timeout=DEADLINE)
    assert out == "done\n", err


@pytest.mark.parametrize("mode", ["auto", "copy"])
def test_inference_mode_throughout(trainer: Trainer, mode: reading.Mode) -> None:
    """A policy that was built, attached and refreshed in inference mode is kept in step."""
    with torch.inference_mode():
        policy = mlp()
        with wsync.attach(policy, "nets", mode=mode) as reader:
            trainer.push(2)
            assert reader.refresh() and marks(policy) == {2.0}
            assert policy(torch.ones(4)).is_inference()
        assert marks(policy) == {2.0}


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_refresh_in_inference_mode_keeps_parameters_trainable(trainer: Trainer, mode: reading.Mode) -> None:
    """A step that refreshes in inference mode leaves parameters that autograd still takes outside of it."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        with torch.inference_mode():
            for mark in range(2, 5):
                trainer.push(mark)
                assert reader.refresh()
        policy(torch.ones(4)).sum().backward()
        assert all(parameter.grad is not None for parameter in policy.parameters())
        with torch.inference_mode():
            reader.close()
    policy(torch.ones(4)).sum().backward()
    assert all(parameter.add(1).requires_grad for parameter in policy.parameters())


@pytest.mark.parametrize("mode", ["auto", "copy"])
def test_policy_built_in_inference_mode_is_refreshed_outside(trainer: Trainer, mode: reading.Mode) -> None:
    """Where the weights were made in inference mode, a refresh need not be."""
    with torch.inference_mode():
        policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        trainer.push(2)
        assert reader.refresh() and marks(policy) == {2.0}


def test_swap_of_inference_tensors_is_refused(trainer: Trainer) -> None:
    """Tensors made in inference mode cannot be pointed elsewhere without losing what they are."""
    with torch.inference_mode():
        policy = mlp()
    with pytest.raises(SwapRefused, match="inference mode"):
        wsync.attach(policy, "nets", mode="swap")


def test_gradients_and_grad_flags_stay(trainer: Trainer) -> None:
    """A swap changes values, not which parameters want gradients nor what an optimizer holds of them."""
    policy = mlp()
    frozen = policy.get_parameter("0.weight").requires_grad_(False)
    with wsync.attach(policy, "nets", mode="swap") as reader:
        trainer.push(2)
        reader.refresh()
        assert policy.get_parameter("0.weight") is frozen
        assert [p.requires_grad for p in policy.parameters()] == [False, True, True, True]
    assert layout_of(policy).digest == trainer.segment.layout.digest


def test_two_readers_of_one_process(trainer: Trainer) -> None:
    """Readers of one process lease on their own: one that lags keeps its version whole, and both are listed."""
    first, second = mlp(), mlp()
    with wsync.attach(first, "nets", mode="swap") as a, wsync.attach(second, "nets", mode="swap") as b:
        for mark in range(2, 8):
            trainer.push(mark)
            assert a.refresh() and marks(first) == {float(mark)}
        assert marks(second) == {1.0}
        assert sorted(r.version for r in trainer.segment.readers()) == [1, 7]
        assert b.refresh() and marks(second) == {7.0}
    assert leased(trainer.segment) == []


def test_a_slot_that_a_stranger_locks_does_not_hold_an_attach_beyond_its_timeout(trainer: Trainer) -> None:
    """A live slot that cannot be leased ends in the timeout, not in a loop without end."""
    with open(trainer.segment.path / "slot-0.safetensors", "rb") as stranger:
        fcntl.flock(stranger, fcntl.LOCK_EX)
        with pytest.raises(AttachTimeout):
            wsync.attach(mlp(), "nets", timeout=0.2)


def test_a_kept_alias_is_named_with_its_reader(trainer: Trainer) -> None:
    """Who holds a slot only through a tensor that outlived its version is listed with that slot."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        kept = policy.get_parameter("0.weight").detach()
        trainer.push(2)
        assert reader.refresh()
        (record,) = trainer.segment.readers()
        assert len(record.slots) == 2
        del kept
        trainer.push(3)
        assert reader.refresh()
        (record,) = trainer.segment.readers()
        assert len(record.slots) == 1


def test_a_policy_that_writes_in_place_harms_nobody(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against SIGSEGV, against another reader seeing the write, and against a trace of it in a later version."""
    policy, other = mlp(), mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader, wsync.attach(other, "nets", mode="swap") as beside:
        assert reader.mode == beside.mode == "swap"
        for mark in range(2, 9):  # each slot several times
            with torch.no_grad():
                next(policy.parameters()).fill_(-1)
                list(policy.parameters())[-1].data.numpy()[0] = float("nan")
            assert marks(other) == {float(mark - 1)}
            trainer.push(mark)
            assert reader.refresh() and beside.refresh()
            assert marks(policy) == marks(other) == {float(mark)}
    assert [r.levelname for r in caplog.records if "in place" in r.message] == ["WARNING"]


def test_what_was_written_through_a_kept_alias_is_gone_too(trainer: Trainer) -> None:
    """Guards a slot that the policy left long ago, whose view was cleared then, and that an alias wrote to since."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        for mark in range(2, 20, 2):
            kept = next(policy.parameters()).data
            trainer.push(mark)
            assert reader.refresh()
            kept.fill_(-1)
            del kept
            for later in (mark, mark + 1):
                trainer.push(later)
                assert reader.refresh()
                assert marks(policy) == {float(later)}


def test_a_forked_child_waits_for_no_thread_of_its_parent(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a child that hangs where a slot comes back whose pages only the parent's thread was to drop."""
    busy, policy = threading.Event(), mlp()

    monkeypatch.setattr(swap, "renew", lambda *_: busy.wait(DEADLINE))
    fork = multiprocessing.get_context("fork")
    with wsync.attach(policy, "nets", mode="swap") as reader:
        next(policy.parameters()).data.fill_(-1)
        trainer.push(2)
        assert reader.refresh()

        def follow(line: Connection) -> None:
            monkeypatch.setattr(swap, "renew", memory.renew)  # of its own thread
            for _ in range(6):
                line.recv()
                assert reader.refresh()
                line.send(marks(policy))

        here, there = fork.Pipe()
        child = fork.Process(target=follow, args=(there,))
        child.start()
        try:
            for mark in range(3, 9):  # one of them where the first was, and others where the child was
                trainer.push(mark)
                here.send("go")
                assert here.poll(DEADLINE / 2) and here.recv() == {float(mark)}
            child.join(DEADLINE)
            assert child.exitcode == 0
        finally:
            child.kill()
            busy.set()


@pytest.mark.slow
def test_a_policy_that_attached_keeps_no_second_copy(trainer: Trainer, spawn: Spawn) -> None:
    """Guards what readers share: the memory of the weights that a policy was made with is the system's again."""
    code = """
import sys, torch, wsync
from torch import nn
from wsync.updaters.shared_memory import SharedMemoryWeightUpdater

def own():
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return int(fields["Pss_Anon"].split()[0]) * 1024

def policy():
    return nn.ParameterList(nn.Parameter(torch.zeros(1 << 14)) for _ in range(400)).eval()

updater = SharedMemoryWeightUpdater("many", policy=policy())
updater.push_weights(dict(policy().state_dict()))
mine = policy()
before = own()
reader = wsync.attach(mine, "many", mode="swap", timeout=30)
print(before - own())
"""
    process = spawn("-c", code)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    assert int(out) > 400 * (1 << 16) / 2  # of 400 tensors of 64 KiB each


def test_own_pages_are_dropped_where_the_system_hides_them(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a trace of a write where the page tables cannot be read."""
    real = os.open

    def open_but_pagemap(path: Any, *arguments: Any, **options: Any) -> int:
        if path == "/proc/self/pagemap":
            raise OSError(25, "refused")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_but_pagemap)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        for mark in range(2, 9):
            with torch.no_grad():
                next(policy.parameters()).fill_(-1)
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}


def test_weights_that_were_given_other_memory_are_taken_back(trainer: Trainer) -> None:
    """Guards noise that is laid over the weights: as many tensors left the slot as aliases came, and both are seen."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        for mark in range(2, 9):
            kept = [parameter.data for parameter in policy.parameters()]
            for parameter in policy.parameters():
                parameter.data = parameter.data + 0.5
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
            assert all((tensor == mark - 1).all() for tensor in kept)


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_policy_of_another_dtype_is_refused_whole(trainer: Trainer, mode: reading.Mode) -> None:
    """Guards against a mixture of versions, and against values that were rounded, where one of its tensors changed."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        last = policy.get_submodule("2").half()
        trainer.push(2)
        with pytest.raises(UsageError, match=r"torch.float16 \[\d+, 8\] on cpu"):
            reader.refresh()
        assert marks(policy) == {1.0} and reader.version == 1
        last.float()
        assert reader.refresh() and marks(policy) == {2.0} and reader.version == 2


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_parameters_that_were_replaced_are_told_of(trainer: Trainer, mode: reading.Mode) -> None:
    """Guards a policy that was left with the weights it was given, while what nobody uses any more is kept in step."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        policy.load_state_dict({name: tensor.clone() for name, tensor in policy.state_dict().items()}, assign=True)
        trainer.push(2)
        for _ in range(2):
            with pytest.raises(UsageError, match="0.weight is another tensor.*attach again"):
                reader.refresh()
        assert marks(policy) == {1.0}


def put_another_layer(policy: nn.Sequential) -> None:
    policy[2] = nn.Linear(8, 2)


def put_a_layer_without_parameters(policy: nn.Sequential) -> None:  # as torch's quantize_dynamic(inplace=True) does
    policy[2] = nn.Identity()


def add_a_layer(policy: nn.Sequential) -> None:
    policy.append(nn.Linear(2, 2))


def add_a_parameter(policy: nn.Sequential) -> None:
    policy[0].register_parameter("scale", nn.Parameter(torch.ones(())))


@pytest.mark.parametrize("mode", ["swap", "copy"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (put_another_layer, "2.weight is another tensor"),
        (put_a_layer_without_parameters, "2.weight .* now gone"),
        (add_a_layer, "3.weight is another tensor"),
        (add_a_parameter, "0.scale is another tensor"),
    ],
)
def test_modules_that_were_replaced_are_told_of(
    trainer: Trainer, mode: reading.Mode, change: Callable[[nn.Sequential], None], named: str
) -> None:
    """Guards against versions that reach a part of the policy alone, while another part is old for ever."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        trainer.push(2)
        change(policy)
        before = [tensor.tolist() for tensor in policy.parameters()]
        for _ in range(2):
            with pytest.raises(UsageError, match=f"{named}.*attach again"):
                reader.refresh()
        assert reader.version == 1 and [tensor.tolist() for tensor in policy.parameters()] == before


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def wrap(policy: nn.Sequential) -> None:  # as torch.compile does
    policy[2] = nn.Sequential(policy[2])


def parametrize(policy: nn.Sequential) -> None:
    nn.utils.parametrize.register_parametrization(policy[0], "weight", Doubled())


def put_another_activation(policy: nn.Sequential) -> None:
    policy[1] = nn.ReLU()


def add_what_has_no_weights(policy: nn.Sequential) -> None:
    policy[0].add_module("observer", nn.Identity())
    policy[0].register_buffer("seen", torch.zeros(()), persistent=False)


@pytest.mark.parametrize("mode", ["swap", "copy"])
@pytest.mark.parametrize("change", [wrap, parametrize, put_another_activation, add_what_has_no_weights])
def test_modules_that_hold_the_same_tensors_are_the_same_policy(
    trainer: Trainer, mode: reading.Mode, change: Callable[[nn.Sequential], None]
) -> None:
    """Guards against a false alarm: where every tensor is still there, and none is new, each gets its version."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        change(policy)
        for mark in (2, 3, 4):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
        policy[2] = nn.Linear(8, 2)
        trainer.push(5)
        with pytest.raises(UsageError, match="2.weight is another tensor"):
            reader.refresh()


def test_a_slot_is_mapped_once(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts what makes a swap cost the same for any size: a slot is mapped anew only if a tensor of it was kept."""
    mapped: list[int] = []
    real = WritableSegment.map_slot

    def count(segment: WritableSegment, slot: int) -> Any:
        mapped.append(slot)
        return real(segment, slot)

    monkeypatch.setattr(Segment, "map_slot", count)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        for mark in range(2, 8):
            trainer.push(mark)
            assert reader.refresh()
        before, kept = len(mapped), next(policy.parameters()).detach()
        assert before == len(set(mapped)) <= 3
        trainer.push(8)
        assert reader.refresh()
        del kept
        for mark in range(9, 15):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
        assert len(mapped) == before + 1


def test_a_reshaped_tensor_has_its_shape_again(trainer: Trainer) -> None:
    """What somebody made of a tensor's form alone is gone with the next version."""
    policy = mlp()
    weight = policy.get_parameter("0.weight")
    with wsync.attach(policy, "nets", mode="swap") as reader:
        weight.data = weight.data.view(-1)
        trainer.push(2)
        assert reader.refresh() and weight.shape == (8, 4) and marks(policy) == {2.0}


def test_training_mode_after_attach_does_not_end_the_process(runtime: Path) -> None:
    """Guards against a batch norm, put into training mode after a swap, writing to memory that it must not."""
    trainer = Trainer(normed)
    trainer.push(1)
    policy = normed()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        policy.train()
        policy(torch.randn(5, 4))
        policy.eval()
        for mark in range(2, 8):
            trainer.push(mark)
            assert reader.refresh()
            assert marks(policy) == {float(mark)}


def test_refresh_notices_a_segment_that_was_deleted_by_hand(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a reader that plays on for ever with memory that no publisher writes any more."""
    policy = mlp()
    with wsync.attach(policy, "nets") as reader:
        shutil.rmtree(trainer.segment.path)
        deadline = time.monotonic() + DEADLINE
        while not caplog.records and time.monotonic() < deadline:
            assert not reader.refresh()
        assert [r.levelname for r in caplog.records] == ["WARNING"] and marks(policy) == {1.0}
        trainer.segment.close()
        trainer.segment = WritableSegment.create("nets", layout_of(mlp()))
        trainer.push(5)
        while not reader.refresh() and time.monotonic() < deadline:
            pass
        assert marks(policy) == {5.0}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("cut", [False, True], ids=["deleted", "its live slot cut"])
def test_a_version_that_was_lost_by_hand_is_not_waited_for(
    trainer: Trainer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, gpu: bool, cut: bool
) -> None:
    """Guards ``while reader.wait(): reader.refresh()``, which took a whole core, and a refresh that found nothing."""
    monkeypatch.setattr(segment_search.Search, "seconds", 0.0)
    policy = mlp()
    if gpu:
        request.getfixturevalue("device")
    with wsync.attach(policy, "nets") as reader:
        trainer.push(2)
        live = trainer.segment.path / f"slot-{trainer.segment.word & 0xFF}.safetensors"
        os.truncate(live, 100) if cut else shutil.rmtree(trainer.segment.path)
        assert not reader.wait(0.05) and not reader.refresh() and marks(policy) == {1.0}
        trainer.segment.close()
        trainer.segment = WritableSegment.create("nets", layout_of(mlp()))
        trainer.push(5)
        assert reader.refresh(wait=True) and marks(policy) == {5.0}


def test_a_slow_policy_notices_a_segment_that_was_deleted_by_hand(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a policy that steps now and then: what takes a fast one a second must not take it many minutes."""
    clock = itertools.count(step=10)
    monkeypatch.setattr(segment_search, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with wsync.attach(mlp(), "nets") as reader:
        assert not any(reader.refresh() for _ in range(100))
        shutil.rmtree(trainer.segment.path)
        trainer.segment.close()
        trainer.segment = WritableSegment.create("nets", layout_of(mlp()))
        trainer.push(5)
        assert reader.refresh() and reader.step == 5
