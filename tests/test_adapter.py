"""PEFT adapters: merged into the base that the spec names, or taken as they are; written by the real PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEADLINE
from torch import nn

import wsync
from wsync.checkpoint import Checkpoint
from wsync.errors import CheckpointError, CheckpointMismatch, MalformedCheckpoint, NonFiniteWeights
from wsync.fitting import Fit
from wsync.layout import layout_of, views
from wsync.spec import Spec
from wsync.syncer import Syncer

peft: Any = pytest.importorskip("peft")


class Net(nn.Module):
    """Two linear layers and an embedding, so that there is something to adapt and something to leave."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, 2)


def trained(**config: Any) -> Any:
    """A PEFT model whose adapter is not zero, as training leaves it."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        Net(), peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["first"], **config})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.normal_()
    return model


def saved(model: Any, folder: Path) -> tuple[Path, Path]:
    """The base as its trainer wrote it, and the adapter as PEFT writes it."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(Net().state_dict(), folder / "base.safetensors")
    model.save_pretrained(folder / "adapter-5")
    return folder / "base.safetensors", folder / "adapter-5"


def staged(adapter: Path, settings: Fit) -> dict[str, torch.Tensor]:
    """What a publish would stage for the bare net."""
    layout = layout_of(Net())
    memory = bytearray(layout.nbytes)
    with Checkpoint(adapter) as checkpoint:
        checkpoint.read_into(memoryview(memory), checkpoint.plan(layout, settings), finite=settings.finite)
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return {e.name: t.clone() for e, t in zip(layout.tensors, views(layout, storage, 0), strict=True)}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["first", "last"], "alpha_pattern": {"last": 8}, "rank_pattern": {"last": 1}},
        {"target_modules": ["embed"]},
        {"modules_to_save": ["last"]},
    ],
    ids=["plain", "rslora", "patterns", "embedding", "a module saved whole"],
)
def test_a_merge_is_what_peft_merges(config: dict[str, Any], tmp_path: Path) -> None:
    """Guards scale, transposition and names against PEFT's own merge_and_unload."""
    model = trained(**config)
    base, adapter = saved(model, tmp_path)
    expected = model.merge_and_unload().state_dict()
    got = staged(adapter, Fit(base=str(base)))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, msg=name)


def test_a_policy_with_adapters_takes_them_as_they_are(tmp_path: Path) -> None:
    """Guards that an adapter whose names the layout has is not merged."""
    model = trained()
    _, adapter = saved(model, tmp_path)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            holder = nn.Module()
            holder.lora_A, holder.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)
            inner = nn.Module()
            inner.first = holder
            self.base_model = nn.Module()
            self.base_model.model = inner

    layout = layout_of(Own())
    memory = bytearray(layout.nbytes)
    with Checkpoint(adapter) as checkpoint:
        checkpoint.read_into(memoryview(memory), checkpoint.plan(layout))


def test_a_merged_adapter_reaches_a_policy(runtime: Path, tmp_path: Path) -> None:
    """Guards the whole way, with the directory as a candidate: base in the spec, adapter in the checkpoints."""
    model = trained()
    base, _ = saved(model, tmp_path)
    expected = model.merge_and_unload().state_dict()["first.weight"]
    policy = Net().eval()
    wsync.SharedMemoryWeightUpdater("net", policy=policy).make_segment()
    runs = tmp_path / "runs"
    runs.mkdir()
    (tmp_path / "adapter-5").rename(runs / "adapter-5")
    spec = Spec("nets:Net", "net", tmp_path, weights=Fit(base=str(base)))
    with Syncer(spec, runs) as syncer:
        syncer._check_layout = lambda *_: None  # type: ignore[method-assign]  # the policy is this test's own class
        outcome = syncer.once()
    assert (outcome.status, outcome.step) == ("published", 5), outcome.reason
    with wsync.attach(policy, "net", timeout=DEADLINE):
        torch.testing.assert_close(policy.first.weight.data, expected)


def test_an_adapter_without_a_base_says_what_is_needed(tmp_path: Path) -> None:
    """Guards the message: the setting that makes it work."""
    _, adapter = saved(trained(), tmp_path)
    with Checkpoint(adapter) as checkpoint, pytest.raises(CheckpointMismatch, match="base ="):
        checkpoint.plan(layout_of(Net()))


def test_a_missing_base_is_no_missing_checkpoint(tmp_path: Path) -> None:
    """Guards that an operator reads of the base, not of an empty directory."""
    _, adapter = saved(trained(), tmp_path)
    with Checkpoint(adapter) as checkpoint, pytest.raises(CheckpointError, match="base of the adapter"):
        checkpoint.plan(layout_of(Net()), Fit(base=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("change", [{"peft_type": "IA3"}, {"use_dora": True}, {"lora_alpha": "much"}, None])
def test_what_cannot_be_merged_is_refused(change: dict[str, Any] | None, tmp_path: Path) -> None:
    """Guards that another kind of adapter, or a broken configuration, is never merged by guess."""
    base, adapter = saved(trained(), tmp_path)
    file = adapter / "adapter_config.json"
    file.write_text("{" if change is None else json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(MalformedCheckpoint, match="adapter_config"):
        staged(adapter, Fit(base=str(base)))


def test_an_adapter_of_another_net_is_refused(tmp_path: Path) -> None:
    """Guards shapes and names: nothing is broadcast, nothing is passed over."""
    base, adapter = saved(trained(), tmp_path)
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.ones(2, 7) if "lora_A" in name else t for name, t in tensors.items()}, file)
    with pytest.raises(CheckpointMismatch, match="have no place"):
        staged(adapter, Fit(base=str(base)))


def test_a_merge_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    """Guards that the sum is checked, not its parts."""
    model = trained()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.fill_(1e30)
    base, adapter = saved(model, tmp_path)
    with pytest.raises(NonFiniteWeights, match="NaN or infinity"):
        staged(adapter, Fit(base=str(base)))
