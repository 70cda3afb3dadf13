"""The weight getter: "this directory" to "the newest weights", nested as TensorDict nests a policy's own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import policies
import pytest
import torch
from builders import raw, shards, write
from processes import DEADLINE
from safetensors.torch import save_file
from tensordict import TensorDict
from torch import nn

from wsync import CheckpointWeightGetter
from wsync.discovery.newest import Select
from wsync.errors import (
    BeingRewritten,
    CheckpointError,
    CheckpointRejected,
    MalformedCheckpoint,
    NoCheckpoint,
    NonFiniteWeights,
)
from wsync.layout.filenames import INDEX


def put(path: Path, mark: float, mtime: int, policy: nn.Module | None = None) -> Path:
    """A checkpoint whose weights all carry a mark, as old as that."""
    write(path, policy or policies.mlp(), mark)
    os.utime(path, (mtime, mtime))
    return path


def leaves(weights: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a TensorDict under its dotted name."""
    assert isinstance(weights, TensorDict)
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in weights.items(True, True):
        assert isinstance(tensor, torch.Tensor)
        tensors[".".join(key) if isinstance(key, tuple) else key] = tensor
    return tensors


def mark_of(weights: Any) -> float:
    (value,) = {float(v) for tensor in leaves(weights).values() for v in tensor.flatten()}
    return value


def mixed() -> nn.Module:
    """Several dtypes at several depths, with a scalar buffer."""
    policy = nn.ModuleDict({"body": policies.mlp(), "norm": nn.BatchNorm1d(3)})
    policy.register_parameter("low", nn.Parameter(torch.randn(7).bfloat16()))
    policy.register_buffer("empty", torch.zeros(0, 3, dtype=torch.float64))
    policy.register_buffer("mask", torch.tensor([True, False]))
    return policy


def test_weights_are_nested_like_those_of_the_module(tmp_path: Path) -> None:
    """Guards the contract with torchrl: keys, dtypes, shapes and values equal TensorDict.from_module's."""
    policy = mixed()
    write(tmp_path / "a.safetensors", policy)
    weights, own = CheckpointWeightGetter(tmp_path)(), TensorDict.from_module(policy)
    assert weights is not None and weights.batch_size == own.batch_size
    assert set(weights.keys(True)) == set(own.keys(True))
    expected = leaves(own)
    for name, tensor in leaves(weights).items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape, name
        assert torch.equal(tensor, expected[name]), name


def test_weights_go_into_a_module(tmp_path: Path) -> None:
    """Guards the use: what the getter gives loads into a fresh policy and makes it the saved one."""
    saved, fresh = mixed(), mixed()
    write(tmp_path / "a.safetensors", saved)
    weights = CheckpointWeightGetter(tmp_path)()
    assert weights is not None
    TensorDict.from_module(fresh).data.update_(weights)
    assert all(torch.equal(t, fresh.state_dict()[name]) for name, t in saved.state_dict().items())


def test_weights_are_a_copy_of_our_own(tmp_path: Path) -> None:
    """Guards that the weights outlive the file and can be written, without a graph behind them."""
    path = put(tmp_path / "a.safetensors", 1.0, 10)
    weights = CheckpointWeightGetter(path)()
    os.truncate(path, 0)
    assert mark_of(weights) == 1.0
    for tensor in leaves(weights).values():
        assert tensor.device.type == "cpu" and not tensor.requires_grad
        tensor.fill_(2.0)
    assert mark_of(weights) == 2.0


def test_the_newest_of_a_directory_is_taken(tmp_path: Path) -> None:
    """Guards the order: the latest modification, not the largest step, at the time of each call."""
    getter = CheckpointWeightGetter(str(tmp_path))
    put(tmp_path / "step_9.safetensors", 9.0, 10)
    put(tmp_path / "step_5.safetensors", 5.0, 20)
    assert mark_of(getter()) == 5.0
    put(tmp_path / "step_1.safetensors", 1.0, 30)
    assert mark_of(getter()) == 1.0
    assert mark_of(getter()) == 1.0


def test_the_getter_tells_what_it_gave(tmp_path: Path) -> None:
    """Guards that a caller can log the step and file of the weights that it just got."""
    getter = CheckpointWeightGetter(tmp_path)
    assert (getter.path, getter.step) == (None, None)
    put(tmp_path / "step_7.safetensors", 1.0, 10)
    getter()
    assert (getter.path, getter.step) == (tmp_path / "step_7.safetensors", 7)


def test_a_file_that_retention_removed_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the race with a trainer that removes what was just listed."""
    put(tmp_path / "step_1.safetensors", 1.0, 10)
    gone = put(tmp_path / "step_2.safetensors", 2.0, 20)
    getter = CheckpointWeightGetter(tmp_path)
    listed = getter.candidates()
    gone.unlink()
    monkeypatch.setattr(getter, "candidates", lambda live: listed)
    assert mark_of(getter()) == 1.0


@pytest.mark.parametrize("content", [None, b"", b"\x40\0\0\0\0\0\0\0{"])
def test_no_complete_checkpoint_is_told(content: bytes | None, tmp_path: Path) -> None:
    """Guards that nothing, and nothing whole, is exit code 66: wait, not fail."""
    if content is not None:
        (tmp_path / "step_1.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        CheckpointWeightGetter(tmp_path)()
    assert caught.value.exit_code == NoCheckpoint.exit_code
    assert str(tmp_path) in str(caught.value)


def test_a_broken_newest_is_not_passed_over(tmp_path: Path) -> None:
    """Guards that a rejected checkpoint is told, not hidden behind an older one that is whole."""
    put(tmp_path / "step_1.safetensors", 1.0, 10)
    raw(tmp_path / "step_2.safetensors", b"garbage")
    with pytest.raises(MalformedCheckpoint, match="step_2"):
        CheckpointWeightGetter(tmp_path)()


def test_nan_is_rejected(tmp_path: Path) -> None:
    """Guards that the getter hands out no weights of a diverged trainer."""
    put(tmp_path / "step_1.safetensors", float("nan"), 10)
    with pytest.raises(CheckpointRejected) as caught:
        CheckpointWeightGetter(tmp_path)()
    assert isinstance(caught.value, NonFiniteWeights)


@pytest.mark.slow
@pytest.mark.parametrize("only_new", [False, True])
def test_half_a_save_over_what_was_given_is_not_given(only_new: bool, tmp_path: Path) -> None:
    """Guards a directory that is saved over while it is followed: its shards are never of two saves."""
    place = shards(tmp_path / "latest", policies.mlp(), 1.0)
    os.utime(place / INDEX, (1e9, 1e9))  # the index first: by its times alone, half a save is whole
    getter = CheckpointWeightGetter(place, only_new=only_new)
    assert mark_of(getter()) == 1.0
    name = "model-00001-of-00002.safetensors"
    os.replace(shards(tmp_path / "new", policies.mlp(), 2.0) / name, place / name)
    with pytest.raises(BeingRewritten) if not only_new else nullcontext():
        assert getter() is None


def test_only_new_gives_each_checkpoint_once(tmp_path: Path) -> None:
    """Guards that the second call on the same file gives None, and one on another file, or its next state, does not."""
    getter = CheckpointWeightGetter(tmp_path, only_new=True)
    put(tmp_path / "step_1.safetensors", 1.0, 10)
    assert mark_of(getter()) == 1.0
    assert getter() is None
    assert getter() is None
    put(tmp_path / "step_2.safetensors", 2.0, 20)
    assert mark_of(getter()) == 2.0
    assert getter() is None
    put(tmp_path / "step_2.safetensors", 3.0, 30)
    assert mark_of(getter()) == 3.0


@pytest.mark.parametrize("order", ["mtime", "step", "name"])
def test_only_new_never_goes_back(order: Any, tmp_path: Path) -> None:
    """Guards that where the last one given was removed, or is written anew, the one before it is not given again."""
    getter = CheckpointWeightGetter(tmp_path, only_new=True, select=Select(order=order))
    put(tmp_path / "step_1.safetensors", 1.0, 10)
    newest = put(tmp_path / "step_2.safetensors", 2.0, 20)
    assert mark_of(getter()) == 2.0
    os.truncate(newest, newest.stat().st_size - 1)
    assert getter() is None
    newest.unlink()
    assert getter() is None and (getter.path, getter.step) == (newest, 2)
    put(tmp_path / "step_3.safetensors", 3.0, 30)
    assert mark_of(getter()) == 3.0


def test_only_new_counts_what_was_given_not_what_failed(tmp_path: Path) -> None:
    """Guards that a checkpoint that could not be read is tried again by the next call."""
    getter = CheckpointWeightGetter(tmp_path, only_new=True)
    put(tmp_path / "step_1.safetensors", float("nan"), 10)
    for _ in range(2):
        with pytest.raises(NonFiniteWeights):
            getter()


def odd_names(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(1) for name in names}


@pytest.mark.parametrize("names", [("batch_size", "keys.data"), ("",), ("a..b", "a.c")])
def test_odd_names_are_kept(names: tuple[str, ...], tmp_path: Path) -> None:
    """Guards that names that mean something to TensorDict, or are empty, are only names."""
    save_file(odd_names(*names), tmp_path / "a.safetensors")
    assert leaves(CheckpointWeightGetter(tmp_path)()).keys() == set(names)


@pytest.mark.parametrize("parent", [torch.float64, torch.int8])
@pytest.mark.parametrize("names", [("a", "a.b"), ("a.b", "a.b.c.d")])
def test_names_that_cannot_be_nested_are_refused(names: tuple[str, ...], parent: torch.dtype, tmp_path: Path) -> None:
    """Guards that "a" beside "a.b" is an error of the checkpoint, never one of tensors."""
    state = {**odd_names(*names), names[0]: torch.ones(1, dtype=parent)}  # wider comes first in the file
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError):
        CheckpointWeightGetter(tmp_path)()


def header(dtype: str, shape: list[int], nbytes: int) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}


def test_a_dtype_without_tensors_is_refused(tmp_path: Path) -> None:
    """Guards that a dtype that the format has and torch has not is a CheckpointError that names tensor and dtype."""
    raw(tmp_path / "a.safetensors", header("F6_E2M3", [4], 3), bytes(3))
    with pytest.raises(CheckpointError, match="a is F6_E2M3"):
        CheckpointWeightGetter(tmp_path)()


@pytest.mark.parametrize("shape", [[2**62, 8, 0], [2**63, 0]])
def test_a_shape_that_torch_cannot_hold_is_refused(shape: list[int], tmp_path: Path) -> None:
    """Guards that numbers of a header reach torch only where they fit."""
    raw(tmp_path / "a.safetensors", header("F32", shape, 0))
    with pytest.raises(CheckpointError):
        CheckpointWeightGetter(tmp_path)()


def test_weights_that_memory_cannot_hold_are_told_as_such(tmp_path: Path) -> None:
    """Guards that a sparse file of terabytes ends in an error of ours, which names it."""
    header = {"w": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}
    path = raw(tmp_path / "x.safetensors", header)
    os.truncate(path, path.stat().st_size + (1 << 40))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 39, hard))
    try:
        with pytest.raises(CheckpointError, match=r"x\.safetensors holds 1,099,511,627,776 bytes"):
            CheckpointWeightGetter(path)()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_file_without_tensors_gives_an_empty_tensordict(tmp_path: Path) -> None:
    """Guards the smallest valid file."""
    raw(tmp_path / "a.safetensors", {})
    assert leaves(CheckpointWeightGetter(tmp_path)()) == {}


Run = Callable[[str], list[str]]


@pytest.fixture
def imported_after(runtime: Path) -> Run:
    """Which of the heavy packages a fresh interpreter has imported after some code."""

    def run(code: str) -> list[str]:
        heavy = "('torch', 'tensordict', 'numpy', 'safetensors', 'rich', 'typer', 'inotify_simple')"
        code = f"{code}\nimport sys; print(*(name for name in {heavy} if name in sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return run


@pytest.mark.parametrize(
    "code", ["import wsync", "from wsync import CheckpointWeightGetter", "import wsync; dir(wsync)"]
)
def test_importing_wsync_is_cheap(code: str, imported_after: Run) -> None:
    """Guards that a cron job that has nothing to do pays for no torch, tensordict or numpy."""
    assert imported_after(code) == []


def test_opening_a_checkpoint_is_cheap(imported_after: Run, tmp_path: Path) -> None:
    """Guards that choosing, opening and reading the newest checkpoint, all that publishing does, needs no torch."""
    put(tmp_path / "step_1.safetensors", 1.0, 10)
    code = f"""
from wsync import CheckpointWeightGetter
getter = CheckpointWeightGetter({str(tmp_path)!r})
checkpoint = getter.open(getter.candidates()[0])
assert checkpoint.step == 1
weights = memoryview(bytearray(checkpoint.layout.nbytes))
checkpoint.read_into(weights, checkpoint.plan(checkpoint.layout))
"""
    assert imported_after(code) == ["numpy"]
