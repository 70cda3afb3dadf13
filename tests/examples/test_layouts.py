"""The rows of examples/layouts: each made by the real writer where it is installed, and taken with its settings."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ROOT, write
from policies import mlp
from safetensors.torch import save_file

from wsync.checkpoints.files.extras import ExtraFiles
from wsync.discovery.newest import Select
from wsync.discovery.weight_getter import CheckpointWeightGetter

TABLE = (ROOT / "examples" / "layouts" / "README.md").read_text()


def trainer(place: Path, **settings: Any) -> None:
    """Two saves of the Trainer of Hugging Face, in its own directories."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8)
    for step in (500, 1000):
        transformers.GPT2LMHeadModel(config).save_pretrained(place / f"checkpoint-{step}", **settings)


def accelerate(place: Path) -> None:
    acc = pytest.importorskip("accelerate").Accelerator(cpu=True)
    acc.prepare(torch.nn.Linear(4, 1), torch.nn.Linear(4, 2))
    for step in (500, 1000):
        acc.save_state(place / f"step_{step}")


def diffusers(place: Path, within: str = "", **settings: Any) -> None:
    """Two saves of a model of diffusers, where its training scripts have them."""
    made = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    unet = made.UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=2, add_attention=False, **blocks)
    for step in (500, 1000):
        unet.save_pretrained(place / f"checkpoint-{step}" / within, **settings)


def peft(place: Path) -> None:
    made = pytest.importorskip("peft")
    model = made.get_peft_model(mlp(), made.LoraConfig(target_modules=["0"], r=2))
    for step in (500, 1000):
        model.save_pretrained(place / f"checkpoint-{step}")


def consolidated(place: Path) -> None:
    """What the Hugging Face writer of torch.distributed.checkpoint leaves when it puts its shards together."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.hf_storage")
    from torch.distributed.checkpoint.state_dict_saver import save

    for step in (500, 1000):
        state = {name: tensor.detach().clone() for name, tensor in mlp().state_dict().items()}
        path = str(place / f"step_{step}")
        names = dict.fromkeys(state, 1)
        writer = checkpoint.HuggingFaceStorageWriter(path=path, fqn_to_index_mapping=names, save_distributed=False)
        save(state, storage_writer=writer, no_dist=True)


def by_hand(name: str, **more: str) -> Callable[[Path], None]:
    """The same files as the writer leaves them; ``more`` is what lies beside them."""

    def make(place: Path) -> None:
        for step in (500, 1000):
            write(place / name.format(step=step), mlp())
        for file, text in more.items():
            (place / file.replace("__", ".")).write_text(text)

    return make


def lerobot(place: Path) -> None:
    by_hand("{step:06d}/pretrained_model/model.safetensors")(place)
    for step in (500, 1000):
        model = place / f"{step:06d}/pretrained_model"
        for name in ("config", "train_config", "policy_preprocessor", "policy_postprocessor"):
            (model / f"{name}.json").write_text("{}")
        for name in ("policy_preprocessor_step_3_normalizer", "policy_postprocessor_step_0_unnormalizer"):
            save_file({"action.mean": torch.full((2,), float(step))}, model / f"{name}_processor.safetensors")
    (place / "001000/training_state").mkdir()
    save_file({"state/0": torch.zeros(2)}, place / "001000/training_state/optimizer_state.safetensors")
    (place / "last").symlink_to("001000")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process saves
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (by_hand("step_{step}.safetensors"), {}),
        (by_hand("step_{step}/model.safetensors"), {}),
        (trainer, {}),
        (lambda place: trainer(place, max_shard_size="2KB"), {}),
        (peft, {}),
        (accelerate, {}),
        (accelerate, {"file": "model_1.safetensors"}),
        (lerobot, {"within": "pretrained_model"}),
        (diffusers, {}),
        (lambda place: diffusers(place, max_shard_size="5KB"), {}),
        (lambda place: diffusers(place, "unet"), {"within": "unet"}),
        (by_hand("global_step{step}/model.safetensors", latest="global_step1000"), {"pointer": "latest"}),
        (
            by_hand("iter_{step:07d}/model.safetensors", latest_checkpointed_iteration__txt="1000\n"),
            {"pointer": "latest_checkpointed_iteration.txt"},
        ),
        (consolidated, {}),
        (by_hand("ckpt-{step}-loss0.25.safetensors"), {"order": "step"}),
        (by_hand("a{step}_b3.safetensors"), {"order": "step", "step": "/a([0-9]+)_/"}),
    ],
)
def test_each_layout_is_taken_with_its_row(
    make: Callable[[Path], None], settings: dict[str, Any], tmp_path: Path
) -> None:
    """Guards the table: what a trainer writes is found with these settings, the newest first, with its step."""
    make(tmp_path)
    checkpoint = CheckpointWeightGetter(tmp_path, select=Select(settle=0.0, **settings)).open_newest()
    assert checkpoint is not None
    with checkpoint:
        assert checkpoint.step == 1000 and checkpoint.tensors
    for name, value in settings.items():
        assert f"{name} = {json.dumps(value)}" in TABLE


def test_the_files_beside_the_weights_of_lerobot_travel(tmp_path: Path) -> None:
    """Guards the shown TOML: the processors of a checkpoint are its extras, and nothing else in the directory is."""
    lerobot(tmp_path)
    (shown,) = re.findall(r"^```toml\n((?s:.*?))^```$", TABLE, re.MULTILINE)
    settings = tomllib.loads(shown)
    select = Select(settle=0.0, **settings["select"], extras=ExtraFiles(tuple(settings["extras"]["files"])))
    checkpoint = CheckpointWeightGetter(tmp_path, select=select).open_newest()
    assert checkpoint is not None
    with checkpoint:
        checkpoint.read_into(memoryview(bytearray(checkpoint.layout.nbytes)), checkpoint.plan(checkpoint.layout))
        assert checkpoint.step == 1000 and sorted(checkpoint.extras.files) == [
            "policy_postprocessor.json",
            "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
            "policy_preprocessor.json",
            "policy_preprocessor_step_3_normalizer_processor.safetensors",
        ]


def test_the_table_names_no_other_setting() -> None:
    """Guards against a row that no test tries."""
    tried = {"file", "files", "within", "pointer", "order", "step", "pattern"}
    assert set(re.findall(r"`(?:\[select\] )?([a-z]+) = ", TABLE)) <= tried
