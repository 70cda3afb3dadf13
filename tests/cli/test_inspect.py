"""`wsync inspect`, and the settings of [select] and [weights] as options."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from builders import SPEC, SUPPORT, raw, write
from others import run_main
from policies import mlp
from processes import Cli
from safetensors.torch import save_file

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.checkpoints.files.local_files import Files
from wsync.cli.output.inspected import inspect
from wsync.fitting.cast import Piece
from wsync.fitting.fit import Fit
from wsync.segment.segment import Segment
from wsync.settings.spec import Spec


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


def test_what_cannot_be_used_is_told_with_its_exit_code(runs: Path, runtime: Path) -> None:
    """65 for one that is broken or does not fit, 66 where there is none, no traceback."""
    for arguments, code in (
        ([str(runs / "step_3.safetensors")], 65),
        ([str(runs / "step_0.safetensors"), "--spec", SPEC], 65),
        ([str(runs / "step_2.safetensors"), "--spec", SPEC], 0),
        ([str(runs / "nowhere")], 66),
    ):
        ended, _, stderr = run_main("inspect", *arguments)
        assert ended == code and "Traceback" not in stderr, (arguments, stderr)


@pytest.mark.parametrize("cut", [None, 3, 100, 64])
def test_a_scan_goes_in_parts(
    cut: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_by: Callable[..., None]
) -> None:
    """Guards bounded memory whatever a file claims, and that every tensor is looked at to its last element."""
    if cut:
        read_by(chunk=8 * cut)
    state = {f"t{n}": torch.ones(n * 7, dtype=dtype) for n, dtype in enumerate([torch.float32, torch.float64] * 9)}
    state |= {"i": torch.full((9,), -1), "e": torch.zeros(0), "s": torch.tensor(1.0)}
    ill = {"t3", "t8", "t17", "s"}
    for name in ill:
        state[name].view(-1)[-1] = float("inf")
    save_file(state, tmp_path / "a.safetensors")
    looked = inspect(tmp_path / "a.safetensors", scan_values=True)
    assert {t["name"] for t in looked["tensors"] if not t["finite"]} == ill


def test_a_scan_of_what_claims_a_terabyte_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a sparse file, which costs its writer nothing."""
    read: list[int] = []

    def each(_: Files, pieces: list[Piece], work: object) -> Iterator[object]:
        read.extend(piece.nbytes for piece in pieces)
        yield from ()

    monkeypatch.setattr(Files, "converted", each)
    path = tmp_path / "a.safetensors"
    raw(path, {"a": {"dtype": "F32", "shape": [1 << 36], "data_offsets": [0, 1 << 38]}})
    os.truncate(path, path.stat().st_size + (1 << 38))
    assert inspect(path, scan_values=True)["complete"] and {*read} == {8 << 20}


def test_what_fits_says_how(tmp_path: Path, runtime: Path) -> None:
    """Guards that casts, what keeps its values and what is left out can be read before anything is published."""
    state = {f"actor.{name}": t.detach().half() for name, t in mlp().state_dict().items() if name != "2.bias"}
    save_file({**state, "critic.weight": torch.zeros(3)}, tmp_path / "step_5.safetensors")
    spec = tmp_path / "a.toml"
    spec.write_text(f'policy = "{SPEC}"\n[weights]\nprefix = "actor."\ncast = true\nstrict = false\n')
    looked = json.loads(run_main("inspect", str(tmp_path / "step_5.safetensors"), "--spec", str(spec), "--json")[1])
    assert looked["fits"] and looked["kept"] == ["2.bias"] and looked["left_out"] == ["critic.weight"]
    assert {"name": "actor.0.bias", "from": "F16", "to": "F32"} in looked["casts"] and looked["base"] is None
    _, shown, _ = run_main("inspect", str(tmp_path / "step_5.safetensors"), "--spec", str(spec))
    assert "3 tensors cast (F16 to F32); 1 tensor of the policy not in it; 1 of its own left out" in shown


def test_checkpoints_in_a_checkpoint_are_told_as_well(tmp_path: Path, cli: Cli) -> None:
    """Guards the output of a trainer that leaves its last weights in the directory of its checkpoints."""
    write(tmp_path / "model.safetensors", mlp(), 1.0)
    for step in (1, 2):
        os.utime(write(tmp_path / f"checkpoint-{step}" / "model.safetensors", mlp(), float(step)), (step, step))
    looked = json.loads(cli("inspect", str(tmp_path), "--json").stdout)
    assert len(looked["tensors"]) == 4
    assert [Path(c["path"]).name for c in looked["candidates"]] == ["checkpoint-2", "checkpoint-1"]
    shown = cli("inspect", str(tmp_path)).stdout
    assert "4 tensors" in shown and "2 other candidates" in shown


def test_options_say_where_the_weights_lie(tmp_path: Path) -> None:
    """Guards `--within`, `--file` and the rest of [select], for a directory of checkpoints and for one of them."""
    for step in (1, 2):
        write(tmp_path / f"step_{step}" / "policy" / "model.safetensors", torch.nn.Linear(4, 1))
        write(tmp_path / f"step_{step}" / "policy" / "model_1.safetensors", mlp())
    options = ("--within", "policy", "--file", "model_1.safetensors", "--json")
    looked = json.loads(run_main("inspect", str(tmp_path), *options)[1])
    assert [(Path(c["path"]).name, c["complete"], c["step"]) for c in looked["candidates"]] == [
        ("model_1.safetensors", True, 2),
        ("model_1.safetensors", True, 1),
    ]
    shown = run_main("inspect", str(tmp_path), *options[:-1])[1]
    assert "step_2/policy/model_1.safetensors" in shown and "step_1/policy/model_1.safetensors" in shown
    for place in ("step_1", "step_1/policy"):
        looked = json.loads(run_main("inspect", str(tmp_path / place), *options[2 * place.count("/") :])[1])
        assert looked["files"] == ["model_1.safetensors"] and len(looked["tensors"]) == 4
    looked = json.loads(run_main("inspect", str(tmp_path), "--spec", SPEC, *options, "--pattern", "step_1")[1])
    assert [c["fits"] for c in looked["candidates"]] == [True]
    assert run_main("inspect", str(tmp_path), "--within", "..")[0] == 2


def test_a_candidate_that_is_removed_meanwhile_is_passed_over(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a look at a directory while the trainer's retention is at work there."""

    def opened(path: Path, **_: object) -> Checkpoint:
        if path.name == "step_2.safetensors":
            path.unlink()
        return Checkpoint(path)

    monkeypatch.setattr("wsync.cli.output.inspected.Checkpoint", opened)
    looked = inspect(runs)
    assert [Path(c["path"]).stem for c in looked["candidates"]] == ["step_3", "step_1", "step_0"]


def test_an_adapter_without_its_base_does_not_fit(tmp_path: Path, layouts_here: None) -> None:
    """Guards that what is missing beside a checkpoint is told as its verdict, and ends no look."""
    lora = {f"base_model.model.0.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    (tmp_path / "adapter").mkdir()
    save_file(lora, tmp_path / "adapter" / "adapter_model.safetensors")
    spec = Spec(SPEC, "a", SUPPORT, weights=Fit(base=str(tmp_path / "nowhere")))
    looked = inspect(tmp_path / "adapter", spec=spec)
    assert looked["complete"] and not looked["fits"] and "base of the adapter" in looked["reason"]


def test_names_of_a_file_do_not_move_the_cursor(tmp_path: Path, runtime: Path) -> None:
    """Guards the terminal against what a hostile file calls its tensors, its metadata and itself."""
    path = tmp_path / "a\x1b[2J.safetensors"
    save_file({"w\x1b[31m": torch.ones(1)}, path, metadata={"k\x1b[1m": "v\x1b[1m\x07"})
    raw(tmp_path / "b\x1b[2J.safetensors", b"garbage")
    broken = tmp_path / "b\x1b[2J.safetensors"
    for command, *more in (
        ("inspect",),
        ("push", SPEC, "--retry"),
        ("push", SPEC, "--retry", "--marker", "a\x1b[1m"),
        ("inspect", "--spec", SPEC),
    ):
        for place in (path, tmp_path, broken, tmp_path / "\x1b[2J"):
            _, out, err = run_main(command, *more, str(place))
            assert "\x1b" not in out + err and "\\x1b" in out + err, (command, place)


def test_the_advice_of_a_refusal_works_as_options(tmp_path: Path, cli: Cli, runtime: Path) -> None:
    """A wrapped, half-precision checkpoint with a critic beside and a head below: what is advised works as it is."""
    state = {f"actor.{name}": torch.ones_like(t, dtype=torch.float16) for name, t in mlp().state_dict().items()}
    state |= {name.replace(".", "._orig_mod.", 2): state.pop(name) for name in [*state]}
    others = {"critic.weight": torch.zeros(3), "actor._orig_mod.v head.w": torch.zeros(1)}
    save_file({**state, **others}, tmp_path / "step_5.safetensors")
    code, _, stderr = run_main("push", SPEC, str(tmp_path))
    assert code == 65
    assert 'prefix = "actor.' in stderr and "cast = true" in stderr
    advised = re.search("As options: `(.*)`[.]", stderr)
    assert advised and "exclude" in advised[1], stderr
    done = cli("push", SPEC, str(tmp_path), *shlex.split(advised[1]))
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


def test_variables_and_the_toml_set_the_same(tmp_path: Path, runtime: Path) -> None:
    """Option before variable before TOML."""
    spec = tmp_path / "nets.toml"
    spec.write_text(f'policy = "{SPEC}"\ncheckpoints = "runs"\n[select]\norder = "name"\n')
    for step, age in ((9, 2), (10, 1)):
        os.utime(write(tmp_path / "runs" / f"step_{step}.safetensors", mlp(), float(step)), (age, age))

    def newest(*arguments: str, **variables: str) -> int:
        with mock.patch.dict(os.environ, variables):
            _, out, _ = run_main("push", str(spec), "--dry-run", "--json", *arguments)
        step: int = json.loads(out)["step"]
        return step

    assert newest() == 10
    assert newest(WSYNC_ORDER="mtime") == 9
    assert newest("--order", "step", WSYNC_ORDER="mtime") == 10
