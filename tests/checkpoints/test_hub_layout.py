"""Checkpoints in the hub's layout, which transformers 5 writes whatever its modules are called: renamed, and fused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import CheckpointMismatch
from wsync.fitting.fit import Fit
from wsync.layout.layout import Layout, layout_of_tensors

Tensors = Mapping[str, torch.Tensor]


def vlm(text: str, vision: str, head: str = "lm_head.weight") -> dict[str, torch.Tensor]:
    """A language model of two layers and a vision tower of one, under these names."""
    table = {f"{text}layers.{n}.mlp.up.weight": torch.full((4, 3), float(n + 1)) for n in range(2)}
    table |= {f"{text}layers.{n}.norm.weight": torch.full((3,), n + 10.0) for n in range(2)}
    table |= {f"{vision}blocks.0.mlp.up.weight": torch.full((4, 2), 5.0), f"{vision}norm.weight": torch.full((2,), 6.0)}
    return {**table, f"{text}embed.weight": torch.full((7, 3), 8.0), head: torch.full((7, 3), 9.0)}


def moe(experts: str, dtype: torch.dtype = torch.float32, number: int = 3) -> dict[str, torch.Tensor]:
    """Experts one by one, as the hub has them: 5 wide, 4 hidden."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (5, 4), "up_proj": (5, 4), "down_proj": (4, 5)}
    return {
        f"{experts}{n}.{part}.weight": torch.rand(shape, generator=generator).to(dtype)
        for n in range(number)
        for part, shape in shapes.items()
    }


def fused(experts: str, one_by_one: Tensors, number: int = 3) -> dict[str, torch.Tensor]:
    """The same as modules hold them."""

    def part(n: int, name: str) -> torch.Tensor:
        return one_by_one[f"{experts}{n}.{name}.weight"]

    up = torch.stack([torch.cat([part(n, "gate_proj"), part(n, "up_proj")]) for n in range(number)])
    down = torch.stack([part(n, "down_proj") for n in range(number)])
    return {f"{experts}gate_up_proj": up, f"{experts}down_proj": down}


def staged(tmp_path: Path, tensors: Tensors, wanted: Tensors, fit: Fit = Fit(), digest: str = "") -> Any:  # noqa: B008
    save_file(dict(tensors), tmp_path / "a.safetensors")
    digested = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    (tmp_path / "a.safetensors.sha256").write_text(digested)
    layout: Layout = layout_of_tensors(wanted.items())
    with Checkpoint(tmp_path / "a.safetensors", digest=digest) as checkpoint:
        weights = bytearray(layout.nbytes)
        checkpoint.read_into(memoryview(weights), checkpoint.plan(layout, fit))
    memory = torch.frombuffer(weights, dtype=torch.uint8)
    return {
        e.name: memory[e.offset : e.offset + e.nbytes].view(wanted[e.name].dtype).view(e.shape) for e in layout.tensors
    }


def same(found: Tensors, wanted: Tensors) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


NAMES = {
    "Qwen2.5-VL": (vlm("model.", "visual."), vlm("model.language_model.", "model.visual.")),
    "LLaVA": (
        vlm("language_model.model.", "vision_tower.", "language_model.lm_head.weight"),
        vlm("model.language_model.", "model.vision_tower."),
    ),
    "a module within layers": (
        {f"model.layers.{n}.block_sparse_moe.gate.weight": torch.full((2, 3), float(n)) for n in range(3)},
        {f"model.layers.{n}.mlp.gate.weight": torch.full((2, 3), float(n)) for n in range(3)},
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_the_advice_finds_renames(case: str, tmp_path: Path) -> None:
    """Guards names that differ in their beginnings or within layers, and that what is advised makes all fit."""
    given, wanted = NAMES[case]
    with pytest.raises(CheckpointMismatch, match="fit with the setting rename") as refusal:
        staged(tmp_path, given, wanted)
    options = re.findall(r"--rename=([^ ']*)=([^ '`]*)", refusal.value.message)
    found = staged(tmp_path, given, wanted, Fit(rename=dict(options)))
    assert same(found, wanted)


def test_names_that_could_be_several_are_not_guessed(tmp_path: Path) -> None:
    """Guards against weights in each other's places: two of one shape whose names say nothing."""
    given = {"a.x.weight": torch.ones(2), "b.y.weight": torch.zeros(2)}
    wanted = {"c.u.weight": torch.ones(2), "d.v.weight": torch.zeros(2)}
    with pytest.raises(CheckpointMismatch) as refusal:
        staged(tmp_path, given, wanted)
    assert "rename" not in refusal.value.message


@pytest.mark.parametrize("digest", ["", "sha256"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_fused(dtype: torch.dtype, digest: str, tmp_path: Path) -> None:
    """Guards each expert's place, with and without a cast, and with a digest, which reads in another order."""
    at = "model.layers.0.mlp.experts."
    more = {"model.norm.weight": torch.ones(4)}
    given, wanted = moe(at, dtype), fused(at, moe(at, dtype))
    wanted = {name: tensor.float() for name, tensor in wanted.items()}
    found = staged(tmp_path, given | more, wanted | more, Fit(cast=dtype != torch.float32), digest)
    assert same(found, wanted | more)


def test_the_names_of_mixtral_are_renamed_and_fused(tmp_path: Path) -> None:
    """Guards both together: w1, w3 and w2 under a module that has another name in the policy."""
    short = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    at, other = "model.layers.0.mlp.experts.", "model.layers.0.block_sparse_moe.experts."
    given = {
        re.sub(r"(gate|up|down)_proj", lambda m: short[m[0]], name.replace(at, other)): tensor
        for name, tensor in moe(at).items()
    }
    given["model.layers.0.block_sparse_moe.gate.weight"] = torch.ones(3, 4)
    wanted = {**fused(at, moe(at)), "model.layers.0.mlp.gate.weight": torch.ones(3, 4)}
    with pytest.raises(CheckpointMismatch, match="fit with the setting rename"):
        staged(tmp_path, given, wanted)
    rename = {r"/\.block_sparse_moe\./": ".mlp."}
    assert same(staged(tmp_path, given, wanted, Fit(rename=rename)), wanted)


@pytest.mark.parametrize("fault", ["an expert is missing", "another width", "more experts"])
def test_experts_that_do_not_fill_the_fused_tensor_are_refused(fault: str, tmp_path: Path) -> None:
    """Guards against a fused tensor of which a part is what was in the slot before."""
    at = "experts."
    given, wanted = moe(at), fused(at, moe(at))
    if fault == "an expert is missing":
        del given["experts.1.up_proj.weight"]
    elif fault == "another width":
        given["experts.1.up_proj.weight"] = torch.ones(6, 4)
    else:
        given |= {name.replace(".0.", ".3."): tensor.clone() for name, tensor in given.items() if ".0." in name}
    with pytest.raises(CheckpointMismatch):
        staged(tmp_path, given, wanted)


def test_a_lora_adapter_is_merged_into_a_base_in_the_hubs_layout(tmp_path: Path) -> None:
    """Guards an adapter of the attention beside experts that the base holds one by one."""
    at = "experts."
    save_file({**moe(at), "q.weight": torch.zeros(4, 4)}, tmp_path / "base.safetensors")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    halves = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
    save_file(
        {f"base_model.model.q.lora_{half}.weight": tensor for half, tensor in halves.items()},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2}')
    wanted = {**fused(at, moe(at)), "q.weight": torch.full((4, 4), 2.0)}
    layout = layout_of_tensors(wanted.items())
    with Checkpoint(adapter) as checkpoint:
        weights = bytearray(layout.nbytes)
        plan = checkpoint.plan(layout, Fit(base=str(tmp_path / "base.safetensors")))
        checkpoint.read_into(memoryview(weights), plan)
    memory = torch.frombuffer(weights, dtype=torch.float32)
    parts = {e.name: memory[e.offset // 4 : (e.offset + e.nbytes) // 4].view(e.shape) for e in layout.tensors}
    assert same(parts, wanted)


@pytest.mark.parametrize(
    ("module", "rename", "expected"),
    [
        ("text.q", {r"/^([aq])\./": r"text.\1."}, {"text.a": 0.0, "text.q": 2.0}),
        ("text.a", {r"/^([aq])\./": r"text.\1."}, {"text.a": 2.0, "text.q": 0.0}),
        ("a", {"/^a/": "c", "/^q/": "a", "/^c/": "q"}, {"a": 0.0, "q": 2.0}),
    ],
)
def test_the_renames_of_a_base_spoil_no_name_of_an_adapter(
    module: str, rename: dict[str, str], expected: dict[str, float], tmp_path: Path
) -> None:
    """Guards an adapter of a base in the hub's layout: PEFT saves the modules' names, which may need no rename."""
    save_file({f"{each[-1]}.weight": torch.zeros(4, 4) for each in expected}, tmp_path / "base.safetensors")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    halves = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
    save_file(
        {f"base_model.model.{module}.lora_{half}.weight": tensor for half, tensor in halves.items()},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2}')
    wanted = {f"{name}.weight": torch.full((4, 4), value) for name, value in expected.items()}
    assert taken(adapter, wanted, Fit(base=str(tmp_path / "base.safetensors"), rename=rename))


TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ONE = {"num_experts_per_tok": 1}
RANKS = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
SIGHT = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "depth": 1, "out_hidden_size": 32}
CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP |= {"image_size": 28, "patch_size": 14, "projection_dim": 32}
LLAVA = {
    "text_config": {"model_type": "llama", **TEXT},
    "vision_config": {"model_type": "clip_vision_model", **CLIP},
    "image_token_index": 63,
}
REAL: dict[str, tuple[str, dict[str, Any], str]] = {
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {**TEXT, **ONE, "moe_intermediate_size": 16, "num_experts": 2, "head_dim": 16},
        "fits",
    ),
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config",
        {**TEXT, **ONE, **RANKS, "moe_intermediate_size": 16, "n_routed_experts": 2, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1},
        "fits",
    ),
    "MixtralForCausalLM": ("MixtralConfig", {**TEXT, **ONE, "num_local_experts": 2}, "renamed"),
    "Qwen2_5_VLForConditionalGeneration": (
        "Qwen2_5_VLConfig",
        {"text_config": {**TEXT, **ROPE}, "vision_config": {**SIGHT, "fullatt_block_indexes": [0], "window_size": 112}},
        "renamed",
    ),
    "LlavaForConditionalGeneration": ("LlavaConfig", LLAVA, "renamed"),
    "LlavaNextForConditionalGeneration": (
        "LlavaNextConfig",
        {**LLAVA, "image_grid_pinpoints": [[28, 28]]},
        "renamed",
    ),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", {**TEXT, **ONE, "num_local_experts": 2}, "written otherwise"),
}


def taken(path: Path, wanted: Tensors, fit: Fit) -> bool:
    """Whether the weights of this checkpoint are these; raises where it does not fit."""
    layout = layout_of_tensors(wanted.items())
    weights = bytearray(layout.nbytes)
    with Checkpoint(path) as checkpoint:
        checkpoint.read_into(memoryview(weights), checkpoint.plan(layout, fit))
    memory = torch.frombuffer(weights, dtype=torch.uint8)
    return all(
        torch.allclose(
            memory[e.offset : e.offset + e.nbytes].view(wanted[e.name].dtype).view(e.shape), wanted[e.name], atol=1e-4
        )
        for e in layout.tensors
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
@pytest.mark.filterwarnings("ignore")  # of the libraries that write
def test_what_transformers_and_peft_write_goes_live(name: str, tmp_path: Path) -> None:
    """Guards the real writers: what save_pretrained writes fits as it is or as the message says, and a LoRA on it."""
    transformers: Any = pytest.importorskip("transformers")
    peft: Any = pytest.importorskip("peft")
    config, settings, outcome = REAL[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    base = tmp_path / "base"
    model.save_pretrained(base)
    wanted = {each: tensor.detach() for each, tensor in model.state_dict().items()}
    fit = Fit()
    if outcome != "fits":
        with pytest.raises(CheckpointMismatch) as refusal:
            taken(base, wanted, fit)
        options = re.findall(r"--rename=([^ ']*)=([^ '`]*)", refusal.value.message)
        assert bool(options) == (outcome == "renamed"), refusal.value.message
        fit = Fit(rename=dict(options))
        if not options:
            assert "save_pretrained(..., save_original_format=False)" in refusal.value.message
            model.save_pretrained(base, save_original_format=False)
    assert taken(base, wanted, fit)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"])).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = {each: tensor.detach() for each, tensor in adapted.merge_and_unload().state_dict().items()}
    assert taken(tmp_path / "adapter", merged, replace(fit, base=str(base)))
    assert not taken(base, merged, fit)
