"""A policy whose memory other processes have, too: they see each version, and never go on with an older one."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from builders import marks
from policies import Counting, mlp
from processes import DEADLINE
from torch import nn
from trainers import Trainer, addresses

import wsync
from wsync.errors import SwapRefused, UsageError
from wsync.policy.tensors import shared


def all_shared(policy: nn.Module, path: Path) -> None:
    policy.share_memory()


def one_shared(policy: nn.Module, path: Path) -> None:
    policy.get_submodule("2").share_memory()


def sent_through_a_queue(policy: nn.Module, path: Path) -> None:
    sent = mp.get_context("spawn").SimpleQueue()
    sent.put(policy.state_dict())
    sent.get()


def in_a_mapped_file(policy: nn.Module, path: Path) -> None:
    policy.get_parameter("2.bias").data = torch.from_file(str(path / "bias"), shared=True, size=2)


def in_a_memmap(policy: nn.Module, path: Path) -> None:
    memory = np.memmap(path / "bias", np.float32, "w+", shape=(2,))
    policy.get_parameter("2.bias").data = torch.from_numpy(memory)


def for_children(policy: nn.Module, path: Path) -> None:
    policy.get_parameter("2.bias").data = torch.frombuffer(mmap.mmap(-1, 8), dtype=torch.float32)


SHARES = [all_shared, one_shared, sent_through_a_queue, in_a_mapped_file, in_a_memmap, for_children]
Share = Callable[[nn.Module, Path], None]


@pytest.mark.parametrize("share", SHARES)
def test_auto_copies_where_others_have_the_memory(trainer: Trainer, share: Share, tmp_path: Path) -> None:
    """Guards those who share the memory of a policy, or of a part: they would keep the weights that they have."""
    trainer.push(1)
    policy = mlp()
    share(policy, tmp_path)
    before = addresses(policy)
    with wsync.attach(policy, "nets") as reader:
        assert reader.mode == "copy"
        trainer.push(2)
        assert reader.refresh() and marks(policy) == {2.0}
        assert addresses(policy) == before


@pytest.mark.parametrize("share", SHARES)
def test_an_explicit_swap_is_refused(trainer: Trainer, share: Share, tmp_path: Path) -> None:
    """Guards the same where swap is asked for: the reason is told, and the policy stays as it was."""
    policy = mlp()
    share(policy, tmp_path)
    before = addresses(policy)
    with pytest.raises(SwapRefused, match=r'\.bias lies in memory that other processes share.*mode="copy"|weight lies'):
        wsync.attach(policy, "nets", mode="swap")
    assert addresses(policy) == before


def test_a_shared_buffer_counts(runtime: Path) -> None:
    """Guards buffers, which are weights, too."""
    policy = nn.BatchNorm1d(3).eval()
    Trainer(lambda: nn.BatchNorm1d(3)).push(1)
    torch.Tensor.share_memory_(policy.get_buffer("running_mean"))  # type: ignore[no-untyped-call]
    with wsync.attach(policy, "nets") as reader:
        assert reader.mode == "copy"


@pytest.mark.parametrize("share", SHARES)
def test_what_is_shared_later_is_told(trainer: Trainer, share: Share, tmp_path: Path) -> None:
    """Guards a policy that is shared after it was attached: each refresh says so, and attaching again copies."""
    trainer.push(1)
    policy = mlp()
    reader = wsync.attach(policy, "nets", mode="swap")
    for mark in (2, 3, 4, 5):  # each slot is known by now
        trainer.push(mark)
        assert reader.refresh()
    share(policy, tmp_path)
    theirs, values = addresses(policy), policy.get_parameter("0.weight").tolist()
    trainer.push(6)
    for _ in range(3):
        with pytest.raises(UsageError, match="bias is .* in memory that other processes share|weight is .* share"):
            reader.refresh()
    assert policy.get_parameter("0.weight").tolist() == values and reader.version == 5
    reader.close()
    assert policy.get_parameter("2.bias").data_ptr() in theirs  # what others have stays theirs
    with wsync.attach(policy, "nets") as again:
        assert again.mode == "copy" and marks(policy) == {6.0}
    assert trainer.segment.readers() == []


def test_what_is_shared_later_is_filled_by_copies(trainer: Trainer) -> None:
    """Guards mode copy, where nothing stands in the way of sharing at any time."""
    trainer.push(1)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="copy") as reader:
        policy.share_memory()
        trainer.push(2)
        assert reader.refresh() and marks(policy) == {2.0} and shared(policy.named_parameters())


def act(policy: nn.Module, go: Any, said: Any) -> None:
    """A worker of ``torch.multiprocessing``: what it acts on, each time that it is asked."""
    while go.get():
        said.put([policy.get_parameter(name).flatten()[0].item() for name in ("0.weight", "2.bias")])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_act_on_the_version_that_the_reader_has(trainer: Trainer, method: str) -> None:
    """Guards actors that share the policy of the process that attached it."""
    trainer.push(1)
    policy = mlp().share_memory()
    context: Any = mp.get_context(method)
    go, said = context.SimpleQueue(), context.SimpleQueue()
    worker = context.Process(target=act, args=(policy, go, said), daemon=True)
    worker.start()
    try:
        with wsync.attach(policy, "nets") as reader:
            for mark in (1, 2, 3):
                go.put(True)
                assert said.get() == [float(mark)] * 2 and reader.version == mark
                trainer.push(mark + 1)
                assert reader.refresh()
    finally:
        go.put(False)
        worker.join(DEADLINE)
        worker.kill()


def test_memory_that_may_only_be_read_is_pointed_away_from(trainer: Trainer, tmp_path: Path) -> None:
    """Guards against a copy that would end the process: such a policy is swapped, or refused."""
    trainer.push(1)
    np.zeros(2, np.float32).tofile(tmp_path / "bias")
    policy = mlp()
    memory = np.memmap(tmp_path / "bias", np.float32, "r", shape=(2,))
    with pytest.warns(UserWarning, match="not writable"):
        policy.get_parameter("2.bias").data = torch.from_numpy(memory)
    with pytest.raises(UsageError, match=r"2\.bias lies in read-only memory"):
        wsync.attach(policy, "nets", mode="copy")
    with wsync.attach(policy, "nets") as reader:
        assert reader.mode == "swap" and marks(policy) == {1.0}


def test_a_policy_that_writes_and_shares_is_copied_into(runtime: Path) -> None:
    """Guards the other reasons for a copy beside this one."""
    Trainer(Counting).push(1)
    with wsync.attach(Counting().share_memory(), "nets") as reader:
        assert reader.mode == "copy"
