"""Which checkpoint is the newest by its step, and what `inspect` says of the number that it read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wsync.cli.inspection import inspect
from wsync.cli.tables import print_inspection
from wsync.places.candidates import Select
from wsync.places.weight_getter import CheckpointWeightGetter


def save(path: Path, value: float, **metadata: str) -> Path:
    save_file({"weight": torch.full((2,), value)}, path, metadata=metadata or None)
    return path


def newest(place: Path, pattern: str = "") -> tuple[str, int | None]:
    """Name and step of the checkpoint that goes live first."""
    checkpoint = CheckpointWeightGetter(place, select=Select(order="step", step=pattern)).open_newest()
    assert checkpoint is not None
    with checkpoint:
        return checkpoint.path.name, checkpoint.step


@pytest.mark.parametrize(
    ("older", "newer", "step"),
    [
        ("ckpt-500-loss0.25", "ckpt-1000-loss0.09", 1000),
        ("policy_step_500_seed_2", "policy_step_1000_seed_1", 1000),
        ("epoch=9-step=500-v2", "epoch=3-step=1000", 1000),
        ("rl_model_9000_steps", "rl_model_10000_steps", 10000),
    ],
)
def test_the_larger_step_is_newer(older: str, newer: str, step: int, tmp_path: Path) -> None:
    """Guards the order by step against the other numbers that trainers write into a name."""
    save(tmp_path / f"{newer}.safetensors", 2.0)
    save(tmp_path / f"{older}.safetensors", 1.0)
    assert newest(tmp_path) == (f"{newer}.safetensors", step)


def test_a_pattern_finds_the_step(tmp_path: Path) -> None:
    """Guards `select.step`, for names that say it in no known way; the step that goes live is the same one."""
    save(tmp_path / "a20_step_1.safetensors", 2.0, step="3")
    save(tmp_path / "a10_step_2.safetensors", 1.0, step="4")
    assert newest(tmp_path, "/a([0-9]+)_/") == ("a20_step_1.safetensors", 20)


def test_inspect_tells_which_number_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards that a name with several numbers is told with the setting that takes another one."""
    path = save(tmp_path / "ckpt-500-loss0.25.safetensors", 1.0)
    looked = inspect(path)
    assert (looked["step"], looked["step_from"], looked["other_numbers"]) == (500, "name, 'ckpt-500'", ["0", "25"])
    print_inspection(looked)
    print_inspection(inspect(tmp_path))
    said = capsys.readouterr().out
    assert "step 500 is from the name, 'ckpt-500', which also holds 0, 25: select.step would take another" in said
    assert "complete; step from the name, 'ckpt-500', which also holds 0, 25" in said
