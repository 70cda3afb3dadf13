"""What the policy is when it is built: it stands for what no trainer saves, and tells which infinities belong there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from processes import DEADLINE
from safetensors.torch import save_file
from torch import nn

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import CheckpointMismatch, NonFiniteWeights, PartialCheckpoint, UsageError
from wsync.fitting.fit import Fit
from wsync.layout.layout import layout_of, named_tensors
from wsync.settings.spec import load_spec
from wsync.sync.syncer import Syncer

INF = float("inf")
POLICY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.register_buffer("low", torch.full((4,), -float("inf")))
        self.register_buffer("mask", torch.triu(torch.full((3, 3), -float("inf")), 1))
        self.register_buffer("position_ids", torch.arange(5))
"""
namespace: dict[str, type[nn.Module]] = {}
exec(POLICY, namespace)
Net = namespace["Net"]
LAYOUT = layout_of(Net())


def built(names: Iterable[str]) -> Mapping[str, bytes]:
    tensors = dict(named_tensors(Net()))
    return {name: tensors[name].detach().contiguous().numpy().tobytes() for name in names}


def state(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**{name: tensor.detach().clone() for name, tensor in Net().state_dict().items()}, **changed}


def staged(tmp_path: Path, tensors: Mapping[str, torch.Tensor], fit: Fit) -> dict[str, bytes]:
    save_file(dict(tensors), tmp_path / "a.safetensors")
    with Checkpoint(tmp_path / "a.safetensors") as checkpoint:
        plan = checkpoint.plan(LAYOUT, fit)
        weights = bytearray(LAYOUT.nbytes)
        checkpoint.read_into(memoryview(weights), plan)
    return {entry.name: bytes(weights[entry.offset : entry.offset + entry.nbytes]) for entry in LAYOUT.tensors}


def test_an_infinity_that_the_policy_has_when_it_is_built_needs_no_setting(tmp_path: Path) -> None:
    """Guards masks and bounds, which are right as they are: a checkpoint with them goes live."""
    assert staged(tmp_path, state(), Fit(built=built))["low"] == torch.full((4,), -INF).numpy().tobytes()
    staged(tmp_path, state(low=torch.tensor([-INF, 1.0, -INF, 2.0])), Fit(built=built))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("low", torch.tensor([-INF, INF, -INF, -INF])),
        ("mask", torch.full((3, 3), -INF)),
        ("low", torch.tensor([-INF, -INF, float("nan"), -INF])),
        ("linear.bias", torch.tensor([0.0, -INF, 0.0])),
    ],
    ids=["the other sign", "elsewhere", "NaN", "a weight"],
)
def test_every_other_infinity_is_refused(name: str, value: torch.Tensor, tmp_path: Path) -> None:
    """Guards against what only looks like the policy's own infinities."""
    with pytest.raises(NonFiniteWeights) as refusal:
        staged(tmp_path, state(**{name: value}), Fit(built=built))
    assert name in {row.name for row in refusal.value.differences}


def test_the_message_names_the_tensors_and_the_setting(tmp_path: Path) -> None:
    """Guards the advice, and that it is true; NaN is refused whatever is set, and advised nothing."""
    with pytest.raises(NonFiniteWeights, match=r'finite_except = \["low", "mask"\] in \[weights\]'):
        staged(tmp_path, state(), Fit())
    staged(tmp_path, state(), Fit(finite_except=("low", "mask")))
    staged(tmp_path, state(), Fit(finite_except=("*",)))
    with pytest.raises(NonFiniteWeights) as refusal:
        staged(tmp_path, state(low=torch.full((4,), float("nan"))), Fit(finite_except=("*",), built=built))
    assert "finite_except" not in refusal.value.message and "diverged" in refusal.value.message
    with pytest.raises(NonFiniteWeights) as refusal:
        staged(tmp_path, state(**{"linear.bias": torch.full((3,), float("nan"))}), Fit(built=built))
    assert [row.name for row in refusal.value.differences] == ["linear.bias"]  # the policy's own infinities are right


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2], ids=str)
def test_infinities_of_every_width_are_told_from_nan(dtype: torch.dtype, tmp_path: Path) -> None:
    """Guards each float dtype that has infinities."""
    for value, good in ((INF, True), (-INF, True), (float("nan"), False)):
        save_file({"a": torch.tensor([1.0, value]).to(dtype)}, tmp_path / "a.safetensors")
        with Checkpoint(tmp_path / "a.safetensors") as checkpoint:
            plan = checkpoint.plan(checkpoint.layout, Fit(finite_except=("a",)))
            weights = memoryview(bytearray(plan.layout.nbytes))
            if good:
                checkpoint.read_into(weights, plan)
            else:
                with pytest.raises(NonFiniteWeights):
                    checkpoint.read_into(weights, plan)


RARE = ("norm.num_batches_tracked", "position_ids")


def without(*names: str, **changed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state(**changed).items() if name not in names}


@pytest.mark.parametrize("strict", [True, False])
def test_what_does_not_come_is_as_the_policy_is_built(strict: bool, tmp_path: Path) -> None:
    """Guards counters and constants that no trainer saves, with and without a strict fit, and the weights that come."""
    given = without(*RARE, **{"linear.bias": torch.full((3,), 7.0)})
    weights = staged(tmp_path, given, Fit(missing="policy", strict=strict, partial=False, built=built))
    assert weights["position_ids"] == torch.arange(5).numpy().tobytes()
    assert weights["linear.bias"] == torch.full((3,), 7.0).numpy().tobytes()


def test_the_advice_names_the_setting_for_what_is_rarely_saved(tmp_path: Path) -> None:
    """Guards the way out where nothing would ever go live, beside other settings, and never for a trained weight."""
    with pytest.raises(CheckpointMismatch, match='fit with the setting missing = "policy" in .*--missing=policy'):
        staged(tmp_path, without(*RARE), Fit())
    prefixed = {f"learner.{name}": tensor for name, tensor in without(*RARE).items()}
    with pytest.raises(CheckpointMismatch, match='prefix = "learner." and missing = "policy"'):
        staged(tmp_path, prefixed, Fit())
    with pytest.raises(CheckpointMismatch) as refusal:
        staged(tmp_path, without("linear.weight", *RARE), Fit())
    assert "missing" not in refusal.value.message
    with pytest.raises(PartialCheckpoint, match="--missing policy"):
        staged(tmp_path, without(*RARE), Fit(strict=False, partial=False))


def test_a_checkpoint_of_nothing_is_not_the_policy_as_it_is_built(tmp_path: Path) -> None:
    """Guards against a file that shares no name with the policy: the setting would make a policy of nothing of it."""
    with pytest.raises(CheckpointMismatch):
        staged(tmp_path, {"other": torch.ones(1)}, Fit(missing="policy", strict=False, built=built))
    with pytest.raises(UsageError, match="missing = 'zero'"):
        Fit(missing="zero")
    with pytest.raises(UsageError, match="wsync push SPEC"):
        staged(tmp_path, without(*RARE), Fit(missing="policy"))


@pytest.mark.slow
def test_a_pass_asks_the_policy_in_a_process_of_its_own(runtime: Path, tmp_path: Path) -> None:
    """Guards both settings from end to end: said once, and torch stays out of the process that publishes."""
    (tmp_path / "nets.py").write_text(POLICY)
    (tmp_path / "a.toml").write_text('policy = "nets:Net"\ncheckpoints = "runs"\n[weights]\nmissing = "policy"\n')
    (tmp_path / "runs").mkdir()
    save_file(without(*RARE), tmp_path / "runs" / "step_1.safetensors")
    program = (
        "import sys; from safetensors.numpy import load_file, save_file; from wsync.settings.spec import load_spec; "
        "from wsync.sync.syncer import Syncer; from wsync.settings import layout_process; "
        "s = Syncer(load_spec('a.toml')); first = s.once(); "
        "save_file(load_file('runs/step_1.safetensors'), 'runs/step_2.safetensors'); second = s.once(); "
        "print(first.status, second.status, len(first.casts), len(second.casts), *first.casts, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.stdout.startswith("published published 1 0 "), done.stdout + done.stderr
    assert "2 tensors are missing from the checkpoint, with the values of the policy when it is built: " in done.stdout
    assert done.stdout.strip().endswith("False")


@pytest.mark.slow
def test_a_dry_run_knows_the_policy_too(runtime: Path, tmp_path: Path, layouts_here: None) -> None:
    """Guards a rehearsal against a refusal that the pass itself would not make."""
    (tmp_path / "nets.py").write_text(POLICY)
    (tmp_path / "a.toml").write_text('policy = "nets:Net"\ncheckpoints = "runs"\n')
    (tmp_path / "runs").mkdir()
    save_file(state(), tmp_path / "runs" / "step_1.safetensors")
    with Syncer(load_spec(str(tmp_path / "a.toml"))) as syncer:
        assert syncer.once(dry_run=True).status == "checked"
