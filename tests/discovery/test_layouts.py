"""Where in a place the weights lie: deeper in a checkpoint, in one file of several, behind links and pointers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from builders import NAME, SPEC, mark_of, shards, write
from policies import mlp
from safetensors.torch import save_file

from wsync.discovery.listing import scan
from wsync.discovery.newest import Select
from wsync.discovery.weight_getter import CheckpointWeightGetter
from wsync.errors import MalformedCheckpoint, NoCheckpoint, UsageError
from wsync.history.rollback import rollback
from wsync.history.state import State
from wsync.segment.segment import Segment
from wsync.settings.spec import Spec
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer


def push(place: Path, select: Select = Select()) -> Outcome:  # noqa: B008  (frozen)
    """One pass as cron makes it."""
    with Syncer(Spec(SPEC, NAME, Path.cwd(), select=select), place, state=State(NAME)) as syncer:
        return syncer.once()


def names(place: Path, select: Select) -> list[str]:
    """What may go live there, newest first, below the place."""
    found = CheckpointWeightGetter(place, select=select).candidates()
    return [str(candidate.path.relative_to(place)) for candidate in found]


def lerobot(root: Path, step: int, mark: float) -> None:
    """A checkpoint of LeRobot: weights and optimizer in directories of their own, and a link to the last one."""
    write(root / f"{step:06d}/pretrained_model/model.safetensors", mlp(), mark)
    (root / f"{step:06d}/training_state").mkdir()
    save_file({"state/0": torch.zeros(2)}, root / f"{step:06d}/training_state/optimizer_state.safetensors")
    point(root / "last", f"{step:06d}")


def point(link: Path, to: str) -> None:
    """Moves a link in one step."""
    link.with_name("next").symlink_to(to)
    link.with_name("next").rename(link)


@pytest.mark.parametrize("order", ["mtime", "step", "name"])
def test_weights_within_a_checkpoint_go_live(order: str, tmp_path: Path, segment: Segment) -> None:
    """Guards LeRobot's layout: the step is of the level that has it, and neither links nor the optimizer are taken."""
    select = Select(order=order, within="pretrained_model")  # type: ignore[arg-type]
    for step in (500, 1000):
        lerobot(tmp_path, step, float(step))
        outcome = push(tmp_path, select)
        assert (outcome.status, outcome.step) == ("published", step)
        assert outcome.checkpoint == str(tmp_path / f"{step:06d}/pretrained_model")
        assert mark_of(segment) == {float(step)} and push(tmp_path, select).status == "current"
    assert names(tmp_path, select) == ["001000/pretrained_model", "000500/pretrained_model"]
    (tmp_path / "001000/pretrained_model/model.safetensors").unlink()
    assert push(tmp_path, select).status == "current"  # what is older stays older when the live one is gone


def test_a_checkpoint_may_lie_two_levels_deeper(tmp_path: Path) -> None:
    """Guards a setting of several levels, and entries that do not have them."""
    write(tmp_path / "step_5/policy/actor/model.safetensors", mlp())
    write(tmp_path / "step_6/policy/critic/model.safetensors", mlp())
    write(tmp_path / "step_7.safetensors", mlp())
    assert names(tmp_path, Select(within="policy/actor")) == ["step_5/policy/actor"]
    assert [c.path for c in scan(tmp_path / "step_5", Select(within="policy/actor"))] == [
        tmp_path / "step_5/policy/actor"
    ]


@pytest.mark.parametrize("within", ["..", "a/../b", "/a", "a//b", "a/b/c/d", "a/"])
def test_within_is_below_a_checkpoint(within: str) -> None:
    """Guards the setting against what names no directory below."""
    with pytest.raises(UsageError, match="within"):
        Select(within=within)


def test_through_a_link_all_is_of_what_it_led_to(tmp_path: Path, segment: Segment) -> None:
    """Guards step, record and rollback where a trainer moves a link: `last/pretrained_model` is named each time."""
    named = tmp_path / "last/pretrained_model"
    for step in (500, 1000, 1500, 2000, 2500):
        lerobot(tmp_path, step, float(step))
        outcome = push(named)
        assert (outcome.status, outcome.step) == ("published", step)
        assert outcome.checkpoint == str(tmp_path / f"{step:06d}/pretrained_model")
    with State(NAME) as state:
        back, _, was = rollback(NAME, 1, runtime=None, state=state)
    assert (was, back.step, back.checkpoint) == (1, 500, str(tmp_path / "000500/pretrained_model"))
    assert mark_of(segment) == {500.0}


def test_a_place_behind_a_link_is_another_place_when_that_moves(tmp_path: Path, segment: Segment) -> None:
    """Guards a new run behind a link such as `current`: its first checkpoint goes live, on record as that run's."""
    write(tmp_path / "run_1/step_900.safetensors", mlp(), 1.0)
    write(tmp_path / "run_2/step_5.safetensors", mlp(), 2.0)
    point(tmp_path / "current", "run_1")
    assert push(tmp_path / "current", Select(order="step")).checkpoint == str(tmp_path / "run_1/step_900.safetensors")
    point(tmp_path / "current", "run_2")
    outcome = push(tmp_path / "current", Select(order="step"))
    assert (outcome.status, outcome.step, mark_of(segment)) == ("published", 5, {2.0})


def test_one_file_of_several_is_taken(tmp_path: Path, segment: Segment) -> None:
    """Guards accelerate's second model: its file goes live with the step of its directory, and can be gone back to."""
    select = Select(file="model_1.safetensors")
    for step in (1, 2, 3, 4, 5):
        write(tmp_path / f"step_{step}/model.safetensors", torch.nn.Linear(4, 1))
        write(tmp_path / f"step_{step}/model_1.safetensors", mlp(), float(step))
        outcome = push(tmp_path, select)
        assert (outcome.status, outcome.step, mark_of(segment)) == ("published", step, {float(step)})
    with State(NAME) as state:
        assert rollback(NAME, 1, runtime=None, state=state)[0].step == 1
    assert mark_of(segment) == {1.0}
    assert [c.path.name for c in scan(tmp_path / "step_3", select)] == ["model_1.safetensors"]


def test_a_sharded_file_of_any_stem_is_taken(tmp_path: Path, segment: Segment) -> None:
    """Guards the setting where that file comes in shards with an index."""
    shards(tmp_path / "step_4", mlp(), 4.0)
    (tmp_path / "step_4/model.safetensors.index.json").rename(tmp_path / "step_4/net.safetensors.index.json")
    os.utime(tmp_path / "step_4", (1, 1))
    outcome = push(tmp_path, Select(file="net.safetensors"))
    assert (outcome.status, outcome.step, mark_of(segment)) == ("published", 4, {4.0})


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "open_clip_model"])
@pytest.mark.parametrize("form", ["whole", "shards"])
def test_known_stems_need_no_setting(stem: str, form: str, tmp_path: Path) -> None:
    """Guards what diffusers and OpenCLIP write, as an entry of a place and as the place itself."""
    path = tmp_path / "checkpoint-3"
    if form == "shards":
        shards(path, mlp())
        (path / "model.safetensors.index.json").rename(path / f"{stem}.safetensors.index.json")
    else:
        write(path / f"{stem}.safetensors", mlp())
    for place in (tmp_path, path):
        checkpoint = CheckpointWeightGetter(place, select=Select(settle=0)).open_newest()
        assert checkpoint is not None
        with checkpoint:
            assert (checkpoint.path, checkpoint.step, len(checkpoint.tensors)) == (path, 3, 4)


def test_a_directory_that_is_a_checkpoint_offers_what_it_is(tmp_path: Path, segment: Segment) -> None:
    """Guards processors and parts beside the weights: newer as they are, they are not the policy."""
    write(tmp_path / "model.safetensors", mlp(), 1.0)
    write(tmp_path / "policy_preprocessor_step_5_normalizer_processor.safetensors", torch.nn.Linear(2, 2))
    write(tmp_path / "2_Dense/model.safetensors", torch.nn.Linear(2, 2))
    assert [push(tmp_path).status for _ in range(2)] == ["published", "current"]
    write(tmp_path / "checkpoint-5/model.safetensors", mlp(), 5.0)
    assert push(tmp_path).status == "current"
    assert push(tmp_path, Select(pattern="checkpoint-*")).step == 5 and mark_of(segment) == {5.0}


@pytest.mark.parametrize("text", ["global_step2", "global_step2\n", "{place}/global_step2/", "./global_step2"])
def test_a_pointer_names_the_one_to_take(text: str, tmp_path: Path, segment: Segment) -> None:
    """Guards DeepSpeed's `latest`: what it names goes live, an older one as well, and nothing else."""
    for step in (1, 2, 3):
        write(tmp_path / f"global_step{step}/model.safetensors", mlp(), float(step))
    select = Select(pointer="latest")
    assert push(tmp_path, select).status == "empty"
    (tmp_path / "latest").write_text("global_step3")
    assert push(tmp_path, select).step == 3
    (tmp_path / "latest").write_text(text.format(place=tmp_path))
    assert push(tmp_path, select).step == 2 and mark_of(segment) == {2.0}
    (tmp_path / "latest").write_text("global_step4")
    waits = push(tmp_path, select)
    assert waits.status == "current" and "names global_step4, which is not there yet" in (waits.reason or "")
    write(tmp_path / "global_step4/model.safetensors", mlp(), 4.0)
    assert push(tmp_path, select).step == 4


def test_a_pointer_may_be_megatrons_number_or_a_link(tmp_path: Path) -> None:
    """Guards `latest_checkpointed_iteration.txt`, whose 500 is the directory iter_0000500, and a link as pointer."""
    write(tmp_path / "iter_0000500/mp/model.safetensors", mlp())
    write(tmp_path / "iter_0001000/mp/model.safetensors", mlp())
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("500")
    (tmp_path / "last").symlink_to("iter_0000500")
    for pointer in ("latest_checkpointed_iteration.txt", "last"):
        assert names(tmp_path, Select(pointer=pointer, within="mp")) == ["iter_0000500/mp"]


@pytest.mark.parametrize("text", ["../other", "/etc", "..", ".", "a/b", "\x00", "x" * 300])
def test_a_pointer_never_leads_out_of_the_place(text: str, tmp_path: Path) -> None:
    """Guards against a pointer's content, which is data from elsewhere."""
    write(tmp_path / "other/model.safetensors", mlp())
    (tmp_path / "place").mkdir()
    (tmp_path / "place/latest").write_text(text)
    with pytest.raises(MalformedCheckpoint, match="not an entry of"):
        scan(tmp_path / "place", Select(pointer="latest"))
    (tmp_path / "place/out").symlink_to("../other")
    (tmp_path / "place/latest").write_text("out")
    with pytest.raises(MalformedCheckpoint, match="leads out of"):
        scan(tmp_path / "place", Select(pointer="latest"))


@pytest.mark.parametrize("content", [b"", b"\n", b"step_9"])
def test_a_pointer_to_nothing_is_waited_for(content: bytes, tmp_path: Path) -> None:
    """Guards the moment between a pointer and what it names."""
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(NoCheckpoint, match="looked at again"):
        scan(tmp_path, Select(pointer="latest"))
