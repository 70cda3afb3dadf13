"""Which checkpoint is the newest by its step, and what `inspect` says of the number that it read."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from wsync.cli.output.inspected import inspect, print_inspection
from wsync.discovery.listing import scan
from wsync.discovery.newest import Candidate, Select
from wsync.discovery.weight_getter import CheckpointWeightGetter


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


def count_opens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of a place whose headers are read from now on."""
    opened: list[str] = []
    real = os.open

    def counting(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if str(path).endswith(".safetensors"):
            opened.append(Path(path).name)
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", counting)
    return opened


def look(place: Path, memory: Path | None = None, live: Candidate | None = None) -> list[Candidate]:
    """One look as a push of its own makes it."""
    getter = CheckpointWeightGetter(place, select=Select(order="step"))
    getter.memory = memory
    return getter.candidates(live)


def live_at(place: Path, name: str, step: int) -> Candidate:
    (same,) = (candidate for candidate in scan(place) if candidate.name == name)
    return Candidate(same.location, same.identity, same.mtime_ns, step, arrived_ns=time.time_ns())


@pytest.mark.parametrize("name", ["step_{}", "PPO_{}", "ckpt-{}-loss0.25", "{:06d}"])
def test_names_that_tell_the_step_are_not_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the price of a push among thousands: the newest by name is live, and no header is read."""
    for step in range(1, 2001):
        os.close(os.open(tmp_path / f"{name.format(step)}.safetensors", os.O_CREAT | os.O_WRONLY))
    newest = f"{name.format(3000)}.safetensors"
    save(tmp_path / newest, 1.0, step="3000")
    live = live_at(tmp_path, newest, 3000)
    opened = count_opens(monkeypatch)
    assert look(tmp_path, None, live) == [] and opened == []
    save(tmp_path / f"{name.format(3001)}.safetensors", 1.0)
    assert [c.step for c in look(tmp_path, None, live)] == [3001]
    assert opened == [f"{name.format(3001)}.safetensors"]


def test_a_look_at_some_files_forgets_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a watch that is told of one file: the steps that it read from the headers of others stay remembered."""
    for number in range(10):
        save(tmp_path / f"run_{number}_of_{number}.safetensors", 1.0, step=str(number))
    save(tmp_path / "step_100.safetensors", 1.0)
    live = live_at(tmp_path, "step_100.safetensors", 100)
    getter = CheckpointWeightGetter(tmp_path, select=Select(order="step"))
    assert getter.candidates(live) == []
    opened = count_opens(monkeypatch)
    assert getter.look(live, {"run_1_of_1.safetensors"}).newer == []
    assert getter.candidates(live) == [] and opened == []


def test_headers_are_read_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards names that count something else than the metadata do: these order, and a later push opens what is new."""
    place, memory = tmp_path / "runs", tmp_path / "state" / "a.steps"
    place.mkdir()
    for epoch, step in ((1, 30), (2, 10), (3, 20)):
        save(place / f"epoch_{epoch}.safetensors", 1.0, step=str(step))
    opened = count_opens(monkeypatch)
    assert [c.step for c in look(place, memory)] == [30, 20, 10] and len(opened) == 3
    assert [c.step for c in look(place, memory)] == [30, 20, 10] and len(opened) == 3
    save(place / "epoch_2.safetensors", 1.0, step="99")
    save(place / "best.safetensors", 1.0, step="50")
    opened.clear()
    assert [c.step for c in look(place, memory)] == [99, 50, 30, 20]
    assert sorted(opened) == ["best.safetensors", "epoch_2.safetensors"]
    memory.write_text("{broken")
    assert [c.step for c in look(place, memory)] == [99, 50, 30, 20]


def test_only_names_that_tell_no_step_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a place where the one without a number, or with two of them, is the newest by its metadata."""
    for step in range(1, 100):
        save(tmp_path / f"step_{step}.safetensors", 1.0, step=str(step))
    save(tmp_path / "best.safetensors", 1.0, step="120")
    save(tmp_path / "a1b200.safetensors", 1.0, step="110")
    opened = count_opens(monkeypatch)
    assert [c.name for c in look(tmp_path)][:3] == ["best.safetensors", "a1b200.safetensors", "step_99.safetensors"]
    assert sorted(opened) == ["a1b200.safetensors", "best.safetensors", "step_99.safetensors"]


def test_a_live_one_that_is_gone_counts_as_its_name_did(tmp_path: Path) -> None:
    """Guards retention: what is older by its name does not go live again when the live file is removed."""
    for step in (1, 2, 3):
        save(tmp_path / f"step_{step}.safetensors", 1.0)
    live = live_at(tmp_path, "step_3.safetensors", 3)
    (tmp_path / "step_3.safetensors").unlink()
    assert look(tmp_path, None, live) == []
    save(tmp_path / "step_4.safetensors", 1.0)
    assert [c.step for c in look(tmp_path, None, live)] == [4]
