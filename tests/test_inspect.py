"""`wsync inspect`, and the settings of [select] and [weights] as options."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import Cli, write
from policies import mlp
from safetensors.torch import save_file

from wsync.segment import Segment

SPEC = "policies:mlp"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two good checkpoints, a half one that is newer, and one of another architecture."""
    for step in (1, 2):
        os.utime(write(tmp_path / f"step_{step}.safetensors", mlp(), float(step), step), (step, step))
    half = write(tmp_path / "step_3.safetensors", mlp(), 3.0)
    os.truncate(half, half.stat().st_size - 1)
    os.utime(half, (3, 3))
    os.utime(write(tmp_path / "step_0.safetensors", mlp(hidden=3), 0.0), (0.5, 0.5))
    return tmp_path


def test_a_directory_is_its_candidates_in_order_with_verdicts(runs: Path, cli: Cli) -> None:
    """Newest first; what is half written, or does not fit the policy, says so."""
    looked = json.loads(cli("inspect", str(runs), "--spec", SPEC, "--json").stdout)
    verdicts = [(Path(c["path"]).name, c["complete"], c.get("fits")) for c in looked["candidates"]]
    assert verdicts == [
        ("step_3.safetensors", False, None),
        ("step_2.safetensors", True, True),
        ("step_1.safetensors", True, True),
        ("step_0.safetensors", True, False),
    ]
    shown = cli("inspect", str(runs)).stdout
    assert "incomplete" in shown and shown.index("step_3") < shown.index("step_1")


def test_a_checkpoint_is_its_tensors(runs: Path, cli: Cli) -> None:
    """Names, dtypes, shapes, bytes, metadata and step, as JSON and for people."""
    file = runs / "step_2.safetensors"
    looked = json.loads(cli("inspect", str(file), "--json").stdout)
    assert (looked["complete"], looked["step"], looked["metadata"]) == (True, 2, {"step": "2"})
    row = {"name": "0.weight", "dtype": "F32", "shape": [8, 4], "bytes": 128, "file": file.name}
    assert row in looked["tensors"] and looked["bytes"] == file.stat().st_size
    shown = cli("inspect", str(file)).stdout
    assert "0.weight" in shown and "[8, 4]" in shown and "step 2" in shown


def test_scan_tells_what_is_not_finite(tmp_path: Path, cli: Cli) -> None:
    """Only with --scan are the values read."""
    save_file({"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")])}, tmp_path / "a.safetensors")
    plain = json.loads(cli("inspect", str(tmp_path / "a.safetensors"), "--json").stdout)
    assert all("finite" not in tensor for tensor in plain["tensors"])
    scanned = json.loads(cli("inspect", str(tmp_path / "a.safetensors"), "--scan", "--json").stdout)
    assert {t["name"]: t["finite"] for t in scanned["tensors"]} == {"good": True, "bad": False}


def test_what_cannot_be_used_is_told_with_its_exit_code(runs: Path, cli: Cli) -> None:
    """65 for one that is broken or does not fit, 66 where there is none, no traceback."""
    for arguments, code in (
        ([str(runs / "step_3.safetensors")], 65),
        ([str(runs / "step_0.safetensors"), "--spec", SPEC], 65),
        ([str(runs / "step_2.safetensors"), "--spec", SPEC], 0),
        ([str(runs / "nowhere")], 66),
    ):
        done = cli("inspect", *arguments)
        assert done.returncode == code and "Traceback" not in done.stderr, (arguments, done.stderr)


def test_the_advice_of_a_refusal_works_as_options(tmp_path: Path, cli: Cli, runtime: Path) -> None:
    """A wrapped, half-precision checkpoint with a critic beside it: the message names the settings, and they work."""
    state = {f"actor.{name}": torch.ones_like(t, dtype=torch.float16) for name, t in mlp().state_dict().items()}
    save_file({**state, "critic.weight": torch.zeros(3)}, tmp_path / "step_5.safetensors")
    refused = cli("push", SPEC, str(tmp_path))
    assert refused.returncode == 65
    assert 'prefix = "actor."' in refused.stderr and "cast = true" in refused.stderr
    done = cli("push", SPEC, str(tmp_path), "--prefix", "actor.", "--cast")
    assert done.returncode == 0, done.stderr
    assert Segment.open("policies.mlp").version == 1


@pytest.mark.parametrize(
    "arguments",
    [["--order", "size"], ["--settle", "-1"], ["--marker", "a/b"], ["--rename", "nothing"], ["--rename", "/(/=x"]],
)
def test_wrong_settings_are_usage_errors(arguments: list[str], tmp_path: Path, cli: Cli) -> None:
    """Each is told in words, with exit code 2."""
    done = cli("push", SPEC, str(tmp_path), *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr and arguments[0].lstrip("-") in done.stderr


def test_variables_and_the_toml_set_the_same(tmp_path: Path, cli: Cli, runtime: Path) -> None:
    """Option before variable before TOML."""
    spec = tmp_path / "nets.toml"
    spec.write_text(f'policy = "{SPEC}"\ncheckpoints = "runs"\n[select]\norder = "name"\n')
    for step, age in ((9, 2), (10, 1)):
        os.utime(write(tmp_path / "runs" / f"step_{step}.safetensors", mlp(), float(step)), (age, age))

    def newest(*arguments: str, **variables: str) -> int:
        done = cli("push", str(spec), "--dry-run", "--json", *arguments, env={**os.environ, **variables})
        step: int = json.loads(done.stdout)["step"]
        return step

    assert newest() == 10
    assert newest(WSYNC_ORDER="mtime") == 9
    assert newest("--order", "step", WSYNC_ORDER="mtime") == 10
