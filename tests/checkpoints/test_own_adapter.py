"""A policy that is a PEFT model takes the adapters that PEFT saves of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import CheckpointMismatch, PartialCheckpoint
from wsync.fitting.fit import Fit
from wsync.layout.layout import layout_of, named_tensors

peft: Any = pytest.importorskip("peft")


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Embedding(5, 8), nn.Linear(8, 2))


def policy(**config: Any) -> Any:
    settings = {"r": 2, "target_modules": ["0", "1"], "modules_to_save": ["2"], **config}
    model = peft.get_peft_model(base(), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.normal_()
    return model.eval()


def staged(path: Path, model: Any, fit: Fit) -> tuple[dict[str, bytes], set[str]]:
    layout = layout_of(model)
    with Checkpoint(path) as checkpoint:
        plan = checkpoint.plan(layout, fit)
        weights = bytearray(layout.nbytes)
        checkpoint.read_into(memoryview(weights), plan)
    parts = {e.name: bytes(weights[e.offset : e.offset + e.nbytes]) for e in layout.tensors}
    return parts, {entry.name for entry in plan.kept}


def expected(model: Any, names: set[str]) -> dict[str, bytes]:
    return {name: t.detach().contiguous().numpy().tobytes() for name, t in named_tensors(model) if name in names}


@pytest.mark.parametrize("config", [{}, {"use_dora": True, "target_modules": ["0"]}], ids=["lora", "dora"])
def test_the_policys_own_adapter_is_taken(config: dict[str, Any], tmp_path: Path) -> None:
    """Guards every kind of tensor that PEFT saves; what is in no adapter keeps its live values."""
    trainer, mine = policy(**config), policy(**config)
    trainer.save_pretrained(tmp_path / "step_1")
    weights, kept = staged(tmp_path / "step_1", mine, Fit())
    own = {name for name in weights if "lora" in name or "modules_to_save" in name}
    assert kept == weights.keys() - own and own
    assert {name: weights[name] for name in own} == expected(trainer, own)


def test_a_base_brings_the_rest(tmp_path: Path) -> None:
    """Guards a policy whose base comes from ``base``, so that nothing need be live before."""
    trainer = policy()
    trainer.save_pretrained(tmp_path / "step_1")
    save_file(base().state_dict(), tmp_path / "base.safetensors")
    weights, kept = staged(tmp_path / "step_1", policy(), Fit(base=str(tmp_path / "base.safetensors"), partial=False))
    assert not kept and weights == expected(trainer, {*weights})


def test_without_a_base_and_live_values_the_message_says_what_is_lacking(tmp_path: Path) -> None:
    """Guards the first push: what the base's weights would be is not known."""
    policy().save_pretrained(tmp_path / "step_1")
    with pytest.raises(PartialCheckpoint, match="missing"):
        staged(tmp_path / "step_1", policy(), Fit(partial=False))


def test_an_adapter_of_another_shape_or_for_other_modules_is_refused(tmp_path: Path) -> None:
    """Guards the message: it says that the policy has adapters, and which tensors differ."""
    policy(r=4).save_pretrained(tmp_path / "step_1")
    with pytest.raises(CheckpointMismatch) as refusal:
        staged(tmp_path / "step_1", policy(), Fit())
    assert any("lora_A" in row.name for row in refusal.value.differences)
    policy(target_modules=["2"], modules_to_save=[]).save_pretrained(tmp_path / "step_2")
    with pytest.raises(CheckpointMismatch, match="own adapters have other tensors"):
        staged(tmp_path / "step_2", policy(), Fit())
