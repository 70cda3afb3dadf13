"""Which number of a checkpoint's name and metadata is its step."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from wsync.checkpoints.step_number import names_a_step, read_step, step_at, step_by_shape, step_in_name, steps_like
from wsync.errors import UsageError


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("ckpt-500-loss0.25", 500),
        ("ckpt-1000-loss0.09", 1000),
        ("policy_step_500_seed_1", 500),
        ("epoch=3-step=500-v1", 500),
        ("epoch=3-step=500-v1.ckpt", 500),
        ("step_500_reward_25.123", 500),
        ("rl_model_10000_steps", 10000),
        ("checkpoint_000010", 10),
        ("iter_0000500", 500),
        ("PPO_123", 123),
        ("global_step500", 500),
        ("global_step_500_rank_3", 500),
        ("Step-500", 500),
        ("checkpoint-epoch3-step500", 500),
        ("ckpt_epoch_3", 3),
        ("epoch=03-val_loss=0.25", 3),
        ("iteration_40_seed_7", 40),
        ("step_10k", 10_000),
        ("ckpt_2M_best", 2_000_000),
        ("step_1.5M", 1_500_000),
        ("ckpt_1e3", 1_000),
        ("env_2.5e6_steps", 2_500_000),
        ("step_500e3", 500),
        ("step_1.5", 1),
        ("step_1e99", 1),
        ("500-loss0.25", 500),
        ("500-v1", 500),
        ("000100", 100),
        ("criterion_3_5", 5),
        ("run3_model5", 5),
        ("step_500model_2", 500),
        ("0.25", 25),
        ("latest", None),
        ("step", None),
    ],
)
def test_the_number_after_a_known_word_is_the_step(name: str, step: int | None) -> None:
    """Guards the order by step: of several numbers, the one after step, iter, checkpoint or epoch counts."""
    assert step_in_name(f"{name}.safetensors").number == step_in_name(name).number == step
    told = step_by_shape(f"{name}.safetensors")
    assert told == (step if step_in_name(name).certain else None)
    numbers = map(str, itertools.count(3))
    other = re.sub(r"\d+", lambda _: next(numbers), f"{name}.safetensors")
    assert steps_like(f"{name}.safetensors")(other) == step_by_shape(other)
    assert steps_like("step_9.safetensors")(f"{name}.safetensors") == told


@pytest.mark.parametrize(
    ("metadata", "step"),
    [
        ({"step": "7"}, 7),
        ({"global_step": "7"}, 7),
        ({"global_step": "8", "step": "7"}, 7),
        ({"step": "500.0"}, 500),
        ({"step": " -3. "}, -3),
        ({"step": "500.5"}, 12),
        ({"step": "soon", "global_step": "9"}, 9),
        ({"step": str(1 << 63)}, 12),
    ],
)
def test_metadata_come_before_the_name(metadata: dict[str, str], step: int) -> None:
    """Guards the producer's own number, as a whole number or as the float that it was."""
    assert read_step("ckpt_12", metadata).number == step


def test_a_pattern_comes_before_all() -> None:
    """Guards `select.step`: its group is the step, and where it does not match there is no step."""
    assert read_step("a17_step_4", {"step": "9"}, "/a([0-9]+)/").number == 17
    assert read_step("b17_step_4", {"step": "9"}, "/a([0-9]+)/").number is None
    assert read_step("step=1_000_000", {}, "/step=([0-9_]+)/").number == 1_000_000
    assert read_step("run-x", {}, "/run-(.)/").number is None
    assert read_step("b5", {}, "/a([0-9]+)|b([0-9]+)/").number == 5


@pytest.mark.parametrize("pattern", ["step_(.*)", "/step_[0-9]+/", "/step_([0-9]+/", "//"])
def test_a_pattern_without_a_group_is_refused(pattern: str) -> None:
    """Guards the message about a pattern that can give no number."""
    with pytest.raises(UsageError, match="select.step"):
        step_in_name("step_5", pattern)


def test_what_was_not_taken_is_known() -> None:
    """Guards what `inspect` says of a name with several numbers."""
    step = step_in_name("ckpt-500-loss0.25")
    assert (step.source, step.others, step.certain) == ("name, 'ckpt-500'", ("0", "25"), True)
    assert not step_in_name("a1b2").certain and step_in_name("PPO_123").certain


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("runs/000100/pretrained_model", 100),
        ("runs/000100/pretrained_model/model.safetensors", 100),
        ("out/checkpoint-1/unet/diffusion_pytorch_model.safetensors", 1),
        ("out/step_5/policy/actor", 5),
        ("out/step_5/model_1.safetensors", 5),
        ("out/model_1.safetensors", 1),
        ("run_7/final", None),
        ("run_7/model.safetensors", 7),
        ("iter_3/PPO_123.safetensors", 123),
        ("step_5/a/b/c", None),
    ],
)
def test_the_step_is_of_the_level_that_has_it(path: str, step: int | None) -> None:
    """Guards layouts that keep the weights in a directory of a fixed name, below one named after the step."""
    assert step_at(Path("/", path), {}).number == step


def test_directories_that_are_named_after_a_step() -> None:
    """Guards which directories above a checkpoint count."""
    assert all(map(names_a_step, ["000100", "checkpoint-500", "global_step5"]))
    assert not any(map(names_a_step, ["run_7", "pretrained_model", "2_Dense", "step_5_seed_1"]))
