"""PEFT adapters: merged into the base that the spec names, or taken as they are; written by the real PEFT."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import raw, shards
from processes import DEADLINE
from torch import nn

import wsync
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.discovery.listing import scan
from wsync.discovery.newest import Select
from wsync.errors import (
    BeingRewritten,
    CheckpointChanged,
    CheckpointError,
    CheckpointMismatch,
    CheckpointRejected,
    IncompleteCheckpoint,
    MalformedCheckpoint,
    NonFiniteWeights,
)
from wsync.fitting.fit import Fit
from wsync.layout.filenames import INDEX
from wsync.layout.layout import Layout, layout_of, views
from wsync.settings import layout_process
from wsync.settings.spec import Spec
from wsync.sync.syncer import Syncer

peft: Any = pytest.importorskip("peft")


class Net(nn.Module):
    """Two linear layers and an embedding, so that there is something to adapt and something to leave."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, 2)


@pytest.fixture(autouse=True)
def policy_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of a spec is that of ``Net``, which no process can import."""

    def layout_of_spec(spec: Spec) -> Layout:
        net = Net()
        if spec.policy_kwargs:
            net.again = net.last
        return layout_of(net)

    monkeypatch.setattr(layout_process, "layout_of_spec", layout_of_spec)


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
        {"target_modules": ["first", "last"], "alpha_pattern": {"^first": 5, "fir.t": 8, "l\\wst|x": 9, "last": 7}},
        {"modules_to_save": ["last"]},
        {"bias": "all"},
        {"target_modules": ["first", "last"], "use_rslora": True, "rank_pattern": {"last": 1}},
    ],
    ids=["plain", "rslora", "patterns", "embedding", "expressions", "a module saved whole", "biases", "root of ranks"],
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
    from safetensors.torch import load_file

    stored = load_file(adapter / "adapter_model.safetensors")
    for entry in layout.tensors:
        got = torch.frombuffer(memory, dtype=torch.float32, count=entry.nbytes // 4, offset=entry.offset)
        assert torch.equal(got.view(entry.shape), stored[entry.name])


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
    spec = Spec("nets:Net", "net", tmp_path, select=Select(settle=0), weights=Fit(base=str(base)))
    with Syncer(spec, runs) as syncer:
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


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"use_qalora": True},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [1, 2]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"lora_bias": True},
        {"trainable_token_indices": {"embed": [1, 2]}},
        {"monteclora_config": {"num_samples": 8}},
        {"target_parameters": ["first.weight", "first.gate"]},
        {"target_parameters": "first.weight"},
        {"lora_alpha": "much"},
        {"lora_alpha": None},
        {"lora_alpha": True},
        {"lora_alpha": 10**400},
        {"lora_alpha": float("inf")},
        {"alpha_pattern": {"first": "much"}},
        {"alpha_pattern": {"first": [1]}},
        {"alpha_pattern": {"(a*)*b": 1}},
        {"alpha_pattern": {"first\\": 1}},
        {"alpha_pattern": {f"module{n}": 1 for n in range(2000)}},
        {"alpha_pattern": [1]},
    ],
    ids=str,
)
def test_what_cannot_be_merged_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """Guards that another kind of adapter, or a broken configuration, is never merged by guess."""
    base, adapter = saved(trained(), tmp_path)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    for strict in (True, False):
        with pytest.raises(MalformedCheckpoint, match="adapter_config"):
            staged(adapter, Fit(base=str(base), strict=strict))


@pytest.mark.parametrize(
    "name",
    [
        "first.lora_B.bias",
        "first.lora_magnitude_vector",
        "embed.token_adapter.trainable_tokens_delta",
        "other.lora_diag",
        "first.lora_A",
    ],
)
def test_a_part_that_is_not_merged_is_never_dropped(name: str, tmp_path: Path) -> None:
    """Guards that strict = false passes over whole modules that the policy lacks, and over no part of an adapter."""
    base, adapter = saved(trained(), tmp_path)
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    elsewhere = {"base_model.model.other.lora_A.weight": torch.ones(2, 4)}
    elsewhere["base_model.model.other.lora_B.weight"] = torch.ones(5, 2)
    tensors = load_file(file) | elsewhere | {"base_model.model.more.weight": torch.ones(1)}
    lax = Fit(base=str(base), strict=False)
    save_file(tensors, file)
    assert not torch.equal(staged(adapter, lax)["first.weight"], Net().state_dict()["first.weight"])
    save_file({**tensors, f"base_model.model.{name}": torch.ones(5)}, file)
    for settings in (lax, Fit(base=str(base), strict=False, include=("*.weight",))):
        with pytest.raises(CheckpointMismatch, match=name):
            staged(adapter, settings)


def test_an_adapter_of_a_module_without_a_weight_is_never_dropped(tmp_path: Path) -> None:
    """Guards the attention of torch, whose one weight has another name, where strict = false takes a part."""
    model = peft.get_peft_model(nn.Sequential(nn.MultiheadAttention(4, 1)), peft.LoraConfig(target_modules=["0"]))
    plain = nn.Sequential(nn.MultiheadAttention(4, 1))
    from safetensors.torch import save_file

    save_file(plain.state_dict(), tmp_path / "base.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    with Checkpoint(tmp_path / "adapter") as checkpoint, pytest.raises(CheckpointMismatch, match=r"0\.weight"):
        checkpoint.plan(layout_of(plain), Fit(base=str(tmp_path / "base.safetensors"), strict=False))


@pytest.mark.parametrize("second", [0.0, 1.0, "adapted", "base layer"])
def test_a_tied_weight_becomes_one(second: float | str, tmp_path: Path) -> None:
    """Guards that two names of one tensor bring it the same: none of two values, and none of two deltas, wins."""
    from safetensors.torch import save_file

    net = Net()
    net.again = net.embed
    base, adapter = saved(trained(), tmp_path)
    weight, root = torch.rand(6, 4), "base_model.model."
    tensors = {f"{root}embed.weight": weight, f"{root}again.weight": weight + (second if second == 1 else 0)}
    halves = {f"{root}embed.lora_embedding_A": torch.ones(1, 6), f"{root}embed.lora_embedding_B": torch.ones(4, 1)}
    if second == "adapted":
        tensors = {f"{root}again.weight": weight, **halves}
    elif second == "base layer":  # as PEFT saves an embedding that is adapted
        tensors = {f"{root}embed.base_layer.weight": weight, **halves}
    save_file(tensors, adapter / "adapter_model.safetensors")
    layout = layout_of(net)
    memory = bytearray(layout.nbytes)
    with Checkpoint(adapter) as checkpoint:
        if second in (1, "adapted"):
            with pytest.raises(CheckpointMismatch, match=r"again\.weight"):
                checkpoint.read_into(memoryview(memory), checkpoint.plan(layout, Fit(base=str(base))))
            return
        checkpoint.read_into(memoryview(memory), checkpoint.plan(layout, Fit(base=str(base))))
    entry = next(entry for entry in layout.tensors if "embed.weight" in entry.names)
    got = torch.frombuffer(memory, dtype=torch.float32, offset=entry.offset, count=24).view(6, 4)
    assert torch.equal(got, weight + (3 if second == "base layer" else 0))


@pytest.mark.parametrize("content", [None, "", "{", '{"peft_type": "LO'])
def test_a_configuration_that_has_still_to_come_refuses_nothing(
    content: str | None, runtime: Path, tmp_path: Path
) -> None:
    """Guards the moment between the two files of an adapter, of which PEFT writes the configuration last."""
    base, adapter = saved(trained(), tmp_path)
    file = adapter / "adapter_config.json"
    whole = file.read_text()
    file.unlink()
    if content is not None:
        file.write_text(content)
    wsync.SharedMemoryWeightUpdater("net", policy=Net()).make_segment()
    spec = Spec("nets:Net", "net", tmp_path, weights=Fit(base=str(base)), select=Select(settle=0.01))
    (tmp_path / "runs").mkdir()
    adapter.rename(tmp_path / "runs" / adapter.name)
    with Syncer(spec, tmp_path / "runs") as syncer:
        assert syncer.once().status == "empty"
        (tmp_path / "runs" / adapter.name / file.name).write_text(whole)
        assert syncer.once().status == "published"


def test_another_configuration_is_another_checkpoint(tmp_path: Path) -> None:
    """Guards that a new alpha beside the same tensors is seen, and one that comes during a read is no mixture."""
    base, adapter = saved(trained(), tmp_path)
    file = adapter / "adapter_config.json"
    with Checkpoint(adapter) as checkpoint:
        plan = checkpoint.plan(layout_of(Net()), Fit(base=str(base)))
        file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 77}))
        with pytest.raises(CheckpointChanged):
            checkpoint.read_into(memoryview(bytearray(plan.layout.nbytes)), plan)
    with Checkpoint(adapter) as again:
        assert again.identity != checkpoint.identity
    assert [c.identity for c in scan(tmp_path) if c.path == adapter] == [again.identity]


def test_an_adapter_is_waited_for_like_shards(tmp_path: Path) -> None:
    """Guards that an adapter whose configuration may still be old is not read in the moment in which it comes."""
    _, adapter = saved(trained(), tmp_path)
    with pytest.raises(IncompleteCheckpoint, match="must not change"):
        Checkpoint(adapter, settle=60)


@pytest.mark.parametrize("name", ["adapter_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_a_small_file_that_is_none_takes_neither_time_nor_memory(kind: str, name: str, tmp_path: Path) -> None:
    """Guards against a pipe that nobody writes, a device without end, and gigabytes beside an adapter or shards."""
    base, adapter = saved(trained(), tmp_path)
    file = adapter / name
    file.unlink(missing_ok=True)
    if name != "adapter_config.json":
        (adapter / "adapter_model.safetensors").unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.touch()
        os.truncate(file, 1 << 40)
    with pytest.raises(MalformedCheckpoint, match=name):
        staged(adapter, Fit(base=str(base)))


def test_a_named_file_of_an_adapter_is_the_adapter(tmp_path: Path) -> None:
    """Guards that who names the file and not its directory gets the same merge."""
    base, adapter = saved(trained(), tmp_path)
    by_file = staged(adapter / "adapter_model.safetensors", Fit(base=str(base)))
    for name, tensor in staged(adapter, Fit(base=str(base))).items():
        assert torch.equal(tensor, by_file[name])


def test_a_named_file_of_an_adapter_is_current_and_changes(runtime: Path, tmp_path: Path) -> None:
    """Guards that it is known again by both its files: published once, and tried again once one of them is mended."""
    base, adapter = saved(trained(), tmp_path)
    config = adapter / "adapter_config.json"
    whole = json.loads(config.read_text())
    wsync.SharedMemoryWeightUpdater("net", policy=Net()).make_segment()
    spec = Spec("nets:Net", "net", tmp_path, weights=Fit(base=str(base)), select=Select(settle=0.01))
    with Syncer(spec, adapter / "adapter_model.safetensors") as syncer:
        for change, found in (({"use_dora": True}, "rejected"), ({}, "published"), ({"lora_alpha": 77}, "published")):
            config.write_text(json.dumps({**whole, **change}))
            while (first := syncer.once()).kind == BeingRewritten.kind:  # the weights may be on their way, too
                pass
            again = "current" if found == "published" else found
            assert [first.status, syncer.once().status] == [found, again]


def test_a_module_saved_whole_is_cast_only_where_that_is_asked_for(tmp_path: Path) -> None:
    """Guards cast = true for an adapter, whose halves are always floats of any kind, and that no other is promised."""
    base, adapter = saved(trained(modules_to_save=["last"]), tmp_path)
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(CheckpointMismatch, match=r"last\.weight"):
        staged(adapter, Fit(base=str(base)))
    with Checkpoint(adapter) as checkpoint:
        plan = checkpoint.plan(layout_of(Net()), Fit(base=str(base), cast=True))
        assert {stored.dtype for stored, _ in plan.conversions} == {"BF16"}
    got = staged(adapter, Fit(base=str(base), cast=True))
    assert torch.equal(got["last.bias"], tensors["base_model.model.last.bias"].float())


@pytest.mark.parametrize("piece", [8, 24, 1 << 20])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "bfloat16"), ("float64", "float64"), ("bfloat16", "float32")]
)
@pytest.mark.parametrize("config", [{}, {"target_modules": ["embed", "first"]}], ids=["linear", "embedding"])
def test_a_merge_is_rounded_once(
    config: dict[str, Any], stored: str, dtype: str, piece: int, tmp_path: Path, read_by: Callable[..., None]
) -> None:
    """Guards that the sum is made of the base as it is stored, whatever the policy's dtype and the pieces of it."""
    from safetensors.torch import save_file

    read_by(chunk=piece)
    model = trained(**config)
    base, adapter = saved(model, tmp_path)
    wide = getattr(torch, stored)
    plain = {name: tensor.to(wide) for name, tensor in Net().state_dict().items()}
    plain["first.weight"] = torch.rand(5, 4, dtype=wide)
    plain["embed.weight"] = torch.rand(6, 4, dtype=wide)
    save_file(plain, base)
    layout = layout_of(Net().to(getattr(torch, dtype)))
    memory, told = bytearray(layout.nbytes), 0

    def count(nbytes: int) -> None:
        nonlocal told
        told += nbytes

    with Checkpoint(adapter) as checkpoint:
        plan = checkpoint.plan(layout, Fit(base=str(base), cast=True))
        checkpoint.read_into(memoryview(memory), plan, progress=count)
    assert told == sum(entry.nbytes for entry in layout.tensors)
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    got = {e.name: t for e, t in zip(layout.tensors, views(layout, storage, 0), strict=True)}
    for name in ("first", "embed"):
        module = getattr(model.base_model.model, name)
        delta = module.get_delta_weight("default") if hasattr(module, "get_delta_weight") else 0
        expected = (plain[f"{name}.weight"].to(torch.promote_types(wide, torch.float32)) + delta).detach()
        torch.testing.assert_close(got[f"{name}.weight"], expected.to(getattr(torch, dtype)), rtol=1e-6, atol=0)


def test_an_adapter_can_bring_the_weight_that_it_adds_to(tmp_path: Path) -> None:
    """Guards an adapted embedding that PEFT saves with its adapter, in another dtype than the base's, and cast."""
    from safetensors.torch import load_file, save_file

    base, adapter = saved(trained(), tmp_path)
    file, own = adapter / "adapter_model.safetensors", torch.rand(5, 4)
    delta = trained().base_model.model.first.get_delta_weight("default").detach()
    for stored, dtype in (("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float64", "float32")):
        brought = own.to(getattr(torch, stored))
        save_file(load_file(file) | {"base_model.model.first.base_layer.weight": brought}, file)
        layout = layout_of(Net().to(getattr(torch, dtype)))
        memory = bytearray(layout.nbytes)
        with Checkpoint(adapter) as checkpoint:
            plan = checkpoint.plan(layout, Fit(base=str(base), cast=True))
            checkpoint.read_into(memoryview(memory), plan)
        storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        got = {e.name: t for e, t in zip(layout.tensors, views(layout, storage, 0), strict=True)}
        expected = (brought.double() + delta.double()).float().to(getattr(torch, dtype))
        torch.testing.assert_close(got["first.weight"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [4096, 1 << 22])
def test_the_rank_of_a_small_weight_is_bounded(rank: int, tmp_path: Path) -> None:
    """Guards the memory of who merges: a sparse file of some bytes can claim any rank for a weight of a few."""
    base, adapter = saved(trained(), tmp_path)
    root, half = "base_model.model.first.lora", rank * 16
    header = {
        f"{root}_A.weight": {"dtype": "F32", "shape": [rank, 4], "data_offsets": [0, half]},
        f"{root}_B.weight": {"dtype": "F32", "shape": [5, rank], "data_offsets": [half, half + rank * 20]},
    }
    raw(adapter / "adapter_model.safetensors", header, b"")
    with (adapter / "adapter_model.safetensors").open("ab") as file:
        file.truncate(file.tell() + rank * 36)
    with Checkpoint(adapter) as checkpoint:
        if rank == 4096:  # more than the weight can have, and yet what PEFT takes
            checkpoint.plan(layout_of(Net()), Fit(base=str(base)))
            return
        with pytest.raises(CheckpointMismatch, match="a rank of"):
            checkpoint.plan(layout_of(Net()), Fit(base=str(base)))


def test_a_module_that_is_left_out_is_not_merged(tmp_path: Path) -> None:
    """Guards exclude for adapters; and that one of which nothing is left is no merge."""
    base, adapter = saved(trained(target_modules=["first", "last"]), tmp_path)
    plain, whole = Net().state_dict(), staged(adapter, Fit(base=str(base)))
    assert plain.keys() == whole.keys()
    adapted = Fit(base=str(base), exclude=("last.weight",), strict=False)
    with Checkpoint(adapter) as checkpoint:
        merge = checkpoint.plan(layout_of(Net()), adapted).merge
        assert merge and [delta.entry.name for delta in merge.deltas] == ["first.weight"]
    with Checkpoint(adapter) as checkpoint, pytest.raises(CheckpointMismatch, match="no place"):
        checkpoint.plan(layout_of(Net()), Fit(base=str(base), exclude=("*.weight",), strict=False))


def test_halves_of_no_rank_are_refused(tmp_path: Path) -> None:
    """Guards against a division by the rank of a hostile adapter."""
    base, adapter = saved(trained(), tmp_path)
    from safetensors.torch import save_file

    root = "base_model.model.first.lora"
    empty = {f"{root}_A.weight": torch.ones(0, 4), f"{root}_B.weight": torch.ones(5, 0)}
    save_file(empty, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointMismatch, match="have no place"):
        staged(adapter, Fit(base=str(base)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, "F4"])
def test_halves_that_are_no_floats_are_refused(dtype: torch.dtype | str, tmp_path: Path) -> None:
    """Guards against a product of what a hostile file says are numbers."""
    base, adapter = saved(trained(), tmp_path)
    from safetensors.torch import save_file

    file, root = adapter / "adapter_model.safetensors", "base_model.model.first.lora"
    if isinstance(dtype, str):
        header = {
            f"{root}_A.weight": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, 4]},
            f"{root}_B.weight": {"dtype": dtype, "shape": [5, 2], "data_offsets": [4, 9]},
        }
        raw(file, header, bytes(9))
    else:
        save_file({f"{root}_A.weight": torch.ones(2, 4, dtype=dtype), f"{root}_B.weight": torch.ones(5, 2)}, file)
    with pytest.raises(CheckpointMismatch, match="have no place"):
        staged(adapter, Fit(base=str(base)))


def test_a_base_that_cannot_be_used_does_not_refuse_the_adapter(tmp_path: Path) -> None:
    """Guards that a broken base, and one that is an adapter itself, are told as such and tried again."""
    _, adapter = saved(trained(), tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"garbage, and more of it")
    for base in (tmp_path / "broken.safetensors", adapter):
        with Checkpoint(adapter) as checkpoint, pytest.raises(CheckpointError, match="base of the adapter") as caught:
            checkpoint.plan(layout_of(Net()), Fit(base=str(base)))
        assert not isinstance(caught.value, CheckpointRejected)


def test_a_base_of_two_saves_is_waited_for(tmp_path: Path) -> None:
    """Guards a sharded base that is saved over: an adapter is not merged into files of two saves."""
    _, adapter = saved(trained(), tmp_path)
    base = shards(tmp_path / "base", Net(), 1.0)
    for at, name in enumerate(("model-00002-of-00002.safetensors", INDEX, "model-00001-of-00002.safetensors")):
        os.utime(base / name, (1e9 + at, 1e9 + at))  # the index amid its shards
    two_saves = pytest.raises(CheckpointError, match="base of the adapter .* may hold files of two saves")
    with Checkpoint(adapter, settle=0.2) as checkpoint, two_saves:
        checkpoint.plan(layout_of(Net()), Fit(base=str(base)))
    with Checkpoint(adapter, settle=0.0) as checkpoint:
        checkpoint.plan(layout_of(Net()), Fit(base=str(base)))


def test_an_adapter_survives_its_deletion_once_it_is_open(tmp_path: Path) -> None:
    """Guards that its configuration, too, is what was there when it was opened."""
    base, adapter = saved(trained(), tmp_path)
    layout, settings = layout_of(Net()), Fit(base=str(base))
    expected = staged(adapter, settings)
    memory = bytearray(layout.nbytes)
    with Checkpoint(adapter) as checkpoint:
        shutil.rmtree(adapter)
        checkpoint.read_into(memoryview(memory), checkpoint.plan(layout, settings))
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    for entry, tensor in zip(layout.tensors, views(layout, storage, 0), strict=True):
        assert torch.equal(tensor, expected[entry.name])


@pytest.mark.parametrize("fault", ["shape", "names", "NaN", "NaN elsewhere", "NaN, cast", "tied apart", "lacks"])
def test_a_fault_of_the_base_is_not_the_adapters(fault: str, runtime: Path, tmp_path: Path) -> None:
    """Guards that a base that does not fit, or is not finite, is named itself, and that its mend is enough."""
    from safetensors.torch import save_file

    base, adapter = saved(trained(), tmp_path)
    net = Net()
    if fault == "tied apart":
        net.again = net.last
    right = {name: tensor.double() if "cast" in fault else tensor for name, tensor in net.state_dict().items()}
    wrong = {name: tensor.clone() for name, tensor in right.items()}
    if fault == "shape":
        wrong["first.weight"] = torch.ones(5, 3)
    elif fault == "names":
        wrong = {f"model.{name}": tensor for name, tensor in wrong.items()}
    elif fault == "tied apart":
        wrong["again.weight"] += 1
    elif fault == "lacks":
        del wrong["first.weight"]
    else:
        wrong["last.weight" if "elsewhere" in fault else "first.weight"][0, 0] = float("nan")
    save_file(wrong, base)
    wsync.SharedMemoryWeightUpdater("net", policy=net).make_segment()
    fit = Fit(base=str(base), cast="cast" in fault, strict=fault != "lacks")
    (tmp_path / "runs").mkdir()
    if fault == "lacks":
        save_file(right, tmp_path / "runs" / "step_1.safetensors")
    tied = {"tied": True} if fault == "tied apart" else {}
    select = Select(order="step", settle=0.01)
    spec = Spec("nets:Net", "net", tmp_path, tied, weights=fit, select=select)
    with Syncer(spec, tmp_path / "runs") as syncer:
        before = syncer.once().version if fault == "lacks" else 0
        adapter.rename(tmp_path / "runs" / adapter.name)
        for _ in range(2):
            outcome = syncer.once()
            assert (outcome.status, outcome.version) == ("failed", before)
            assert f"base of the adapter {tmp_path / 'runs' / adapter.name}" in (outcome.reason or "")
            assert str(base) in (outcome.reason or "") and outcome.differences
        save_file({name: tensor.clone() for name, tensor in right.items()}, base)
        outcome = syncer.once()
        assert (outcome.status, outcome.step) == ("published", 5), outcome.reason


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
    with pytest.raises(NonFiniteWeights, match=r"adapter-5 holds NaN or infinity"):
        staged(adapter, Fit(base=str(base)))
