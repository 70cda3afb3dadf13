"""Every dtype that safetensors writes, and integers of another width."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.checkpoints.files.parts import unreadable
from wsync.discovery.weight_getter import CheckpointWeightGetter
from wsync.errors import CheckpointMismatch
from wsync.fitting.fit import Fit
from wsync.layout.layout import Layout, layout_of_tensors, views


def staged(file: Path, layout: Layout, fit: Fit) -> bytes:
    with Checkpoint(file) as checkpoint:
        weights = bytearray(layout.nbytes)
        checkpoint.read_into(memoryview(weights), checkpoint.plan(layout, fit))
    return bytes(weights)


@pytest.mark.parametrize("name", ["float8_e8m0fnu", "float4_e2m1fn_x2"])
def test_small_floats_reach_a_policy(name: str, tmp_path: Path) -> None:
    """Guards the dtypes of quantised weights: the layout of a policy that has them is that of its checkpoint."""
    tensor = torch.arange(24, dtype=torch.uint8).reshape(4, 6).view(getattr(torch, name))
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    layout = layout_of_tensors([("a", tensor)])
    weights = bytearray(staged(tmp_path / "a.safetensors", layout, Fit()))
    (view,) = views(layout, torch.frombuffer(weights, dtype=torch.uint8).untyped_storage(), 0)
    assert (view.dtype, view.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(view.view(torch.uint8), tensor.view(torch.uint8))
    given: Any = CheckpointWeightGetter(tmp_path / "a.safetensors")()
    assert torch.equal(given["a"].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    ("source", "target", "values", "fits"),
    [
        (torch.int32, torch.int64, [-5, 0, 2**31 - 1], True),
        (torch.int64, torch.int32, [-(2**31), 7], True),
        (torch.int64, torch.int32, [2**31], False),
        (torch.int64, torch.uint8, [-1], False),
        (torch.uint8, torch.int64, [255], True),
        (torch.int64, torch.int32, [], True),
    ],
)
def test_integers_are_cast_where_they_stay_what_they_are(
    source: torch.dtype, target: torch.dtype, values: list[int], fits: bool, tmp_path: Path
) -> None:
    """Guards counters that another version of a trainer saves in another width, and every value of them."""
    save_file({"a": torch.tensor(values, dtype=source)}, tmp_path / "a.safetensors")
    wanted = torch.tensor(values if fits else [0], dtype=target)
    layout = layout_of_tensors([("a", wanted)])
    with pytest.raises(CheckpointMismatch, match="cast = true"):
        staged(tmp_path / "a.safetensors", layout, Fit())
    if fits:
        assert staged(tmp_path / "a.safetensors", layout, Fit(cast=True)) == wanted.numpy().tobytes()
    else:
        with pytest.raises(CheckpointMismatch, match="integers that the policy's dtype cannot hold"):
            staged(tmp_path / "a.safetensors", layout, Fit(cast=True))


def test_no_float_becomes_an_integer(tmp_path: Path) -> None:
    """Guards against a counter that is read from a float, and the reverse."""
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointMismatch):
        staged(tmp_path / "a.safetensors", layout_of_tensors([("a", torch.ones(2, dtype=torch.int64))]), Fit(cast=True))


def test_a_private_file_of_another_user_is_told_with_its_cause(tmp_path: Path) -> None:
    """Guards whoever meets safetensors 0.8, which makes every file private."""
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2)}, file)
    file.chmod(0o600)
    told = str(unreadable(file, PermissionError(13, os.strerror(13), str(file))))
    assert "mode 0600" in told and "only their owner can read" in told and "os.chmod(path, 0o644)" in told
    file.chmod(0o640)
    assert "only their owner" not in str(unreadable(file, PermissionError(13, os.strerror(13), str(file))))
