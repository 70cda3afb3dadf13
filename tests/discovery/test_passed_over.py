"""What the message says where nothing in a place counts: what was passed over, why, and the setting that finds it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import NAME, SPEC, mark_of, shards, write
from policies import mlp
from processes import Cli
from safetensors.torch import save_file

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.cli.output.push_quiet import News
from wsync.cli.output.watch import WatchLog
from wsync.discovery.newest import Select
from wsync.discovery.weight_getter import CheckpointWeightGetter
from wsync.errors import CheckpointError, CheckpointMismatch, ForeignCheckpoint
from wsync.fitting.fit import Fit
from wsync.layout.layout import layout_of
from wsync.segment.segment import Segment
from wsync.settings.spec import Spec
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer


def message(place: Path, select: Select = Select()) -> str:  # noqa: B008  (frozen)
    getter = CheckpointWeightGetter(place, select=select)
    assert getter.candidates() == []
    return str(getter.nothing())


def lerobot(root: Path) -> None:
    for step in (100, 200):
        write(root / f"{step:06d}/pretrained_model/model.safetensors", mlp(), float(step))
        (root / f"{step:06d}/training_state").mkdir()
        save_file({"state/0": torch.zeros(2)}, root / f"{step:06d}/training_state/optimizer_state.safetensors")
    (root / "last").symlink_to("000200")


def actor(root: Path) -> None:
    write(root / "step_5/policy/actor/model.safetensors", mlp())


def odd(root: Path) -> None:
    write(root / "step_5/nets/actor.safetensors", mlp())
    save_file({"state/0": torch.zeros(2)}, root / "step_5/optimizer.safetensors")


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lerobot, 'within = "pretrained_model" in [select] (--within pretrained_model)'),
        (actor, 'within = "policy/actor" in [select] (--within policy/actor)'),
        (odd, 'within = "nets" and file = "actor.safetensors" in [select] (--within nets --file actor.safetensors)'),
    ],
)
def test_weights_that_lie_deeper_are_found_with_a_setting(
    make: Callable[[Path], None], advice: str, tmp_path: Path
) -> None:
    """Guards the way out for someone whose trainer lays its checkpoints out in directories of their own."""
    make(tmp_path)
    assert f"The weights are found with {advice}" in message(tmp_path)
    assert f"The weights are found with {advice}" in message(tmp_path, Select(within="wrong"))


def test_the_advised_option_works(tmp_path: Path, cli: Cli, segment: Segment) -> None:
    """Guards the same from a terminal: 66 with the advice, then 0 with the option."""
    lerobot(tmp_path / "checkpoints")
    first = cli("push", SPEC, "checkpoints")
    assert first.returncode == 66 and "--within pretrained_model" in first.stderr
    done = cli("push", SPEC, "checkpoints", "--within", "pretrained_model")
    assert done.returncode == 0 and "step 200" in done.stdout and mark_of(segment) == {200.0}, done.stderr
    assert cli("status", NAME).stdout.count("000200/pretrained_model") == 1


def test_a_place_that_is_one_level_too_high_is_told(tmp_path: Path) -> None:
    """Guards the one who names the directory above the checkpoints."""
    write(tmp_path / "checkpoints/step_5.safetensors", mlp())
    assert f"There are checkpoints in {tmp_path / 'checkpoints'}: name that directory." in message(tmp_path)


def test_what_was_passed_over_is_listed_with_the_reason(tmp_path: Path) -> None:
    """Guards against a bare "no complete checkpoint yet" where files lie before one's eyes."""
    write(tmp_path / "a.safetensors.tmp", mlp())
    (shards(tmp_path / "b", mlp()) / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "c.pt").touch()
    said = message(tmp_path)
    assert "a.safetensors.tmp (a temporary name)" in said and "c.pt (its name does not end in .safetensors)" in said
    assert "b (" in said and "model-00002-of-00002.safetensors, is not there" in said


@pytest.mark.parametrize(
    ("select", "why"),
    [
        (Select(pattern="x*"), "its name does not match 'x*'"),
        (Select(marker="DONE"), "it has no marker 'DONE', or only an older one"),
        (Select(within="pretrained_model"), "a file, and select.within and select.file look in directories"),
    ],
)
def test_a_setting_that_passes_all_over_is_named(select: Select, why: str, tmp_path: Path) -> None:
    """Guards a setting that finds nothing."""
    write(tmp_path / "step_5.safetensors", mlp())
    assert f"Passed over: step_5.safetensors ({why})" in message(tmp_path, select)


def test_links_that_lead_nowhere_are_passed_over(tmp_path: Path) -> None:
    """Guards a place in which a link loops or is broken: they are named, and hide nothing else."""
    (tmp_path / "a.safetensors").symlink_to("a.safetensors")
    (tmp_path / "b.safetensors").symlink_to("gone")
    told = message(tmp_path)
    assert "a.safetensors (Too many levels of symbolic links), b.safetensors (No such file" in told
    with pytest.raises(CheckpointError, match=r"/a\.safetensors cannot be listed \(Too many levels"):
        CheckpointWeightGetter(tmp_path / "a.safetensors").candidates()


@pytest.mark.parametrize(
    "select", [Select(pattern="stpe_*"), Select(within="pretraned_model"), Select(file="x.safetensors")]
)
def test_a_setting_that_passes_all_over_is_told_while_something_is_live(
    select: Select, segment: Segment, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a misspelt setting, by which nothing would go live any more without a word: said to cron, and in a log."""

    def push(select: Select = Select()) -> Outcome:  # noqa: B008  (frozen)
        with Syncer(Spec(SPEC, NAME, Path.cwd(), select=select), runs) as syncer:
            return syncer.once()

    write(runs / "step_1/model.safetensors", mlp(), 1.0)
    published = push()
    assert published.status == "published"
    write(runs / "step_2/model.safetensors", mlp(), 2.0)
    told, news = push(select), News(SPEC, None)
    assert (told.status, told.exit_code) == ("current", 0)
    assert "there is no complete checkpoint in" in (told.reason or "") and "step_2 (" in (told.reason or "")
    assert [news.has(told), news.has(told)] == [True, False]
    with WatchLog(NAME, runs, "json", lambda: None) as log:
        for event in (published, replace(published, status="current"), told, told):
            log.tell(event)
    logged = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert logged == ["watch", "published", "current", "stop"]
    shutil.rmtree(runs / "step_1")
    assert push(select).reason is None  # that was retention


def test_an_empty_place_has_nothing_to_tell(tmp_path: Path) -> None:
    """Guards the short message of a run that has not begun."""
    (tmp_path / ".cache").mkdir()
    assert message(tmp_path).endswith("yet. It is looked at again at the next pass.")


def mismatch(path: Path) -> CheckpointMismatch:
    with Checkpoint(path) as checkpoint, pytest.raises(CheckpointMismatch) as caught:
        checkpoint.plan(layout_of(mlp()), Fit())
    return caught.value


def test_the_file_that_fits_is_named(tmp_path: Path) -> None:
    """Guards accelerate's second model: the advice tries the files beside the first one."""
    write(tmp_path / "step_1/model.safetensors", torch.nn.Linear(3, 3))
    save_file({"m": torch.zeros(1)}, tmp_path / "step_1/optimizer.safetensors")
    write(tmp_path / "step_1/model_1.safetensors", mlp())
    refused = mismatch(tmp_path / "step_1")
    assert 'set file = "model_1.safetensors" in [select] (--file model_1.safetensors)' in str(refused)
    assert not isinstance(refused, ForeignCheckpoint)


def test_other_checkpoints_are_no_siblings(tmp_path: Path) -> None:
    """Guards against an advice to take an older checkpoint for a file of the same one."""
    write(tmp_path / "step_1.safetensors", mlp())
    write(tmp_path / "step_2.safetensors", torch.nn.Linear(3, 3))
    assert "step_1" not in str(mismatch(tmp_path / "step_2.safetensors"))


def test_a_model_in_parts_is_told(tmp_path: Path) -> None:
    """Guards sentence-transformers' layout: weights of one policy in several checkpoints are never put together."""
    first, second = mlp()[0], mlp()[2]
    write(tmp_path / "model.safetensors", torch.nn.ModuleDict({"0": first}))
    write(tmp_path / "2_Dense/model.safetensors", second)
    assert "2_Dense/model.safetensors holds 2 of the policy's tensors under other names" in str(mismatch(tmp_path))
