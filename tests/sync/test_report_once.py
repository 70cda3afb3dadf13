"""What is said once: of what nobody finishes, of what is no policy of ours, and of what is older by its clock."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import NAME, SPEC, mark_of, write
from policies import mlp
from processes import Cli
from safetensors.torch import save_file

from wsync.cli.output.push import outcome_json, tell
from wsync.cli.output.watch import WatchLog
from wsync.discovery.newest import Select
from wsync.history.state import State
from wsync.segment.reader_records import Registration
from wsync.segment.segment import Segment
from wsync.service.metrics import Figures
from wsync.settings.spec import Spec
from wsync.sync.claim import Watching, WatchLock
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer

HOURS = 7200.0

Push = Callable[..., Outcome]


@pytest.fixture
def push(segment: Segment, runs: Path, layouts_here: None) -> Push:
    """One pass as cron makes it: a syncer of its own each time."""

    def once(order: Any = "mtime", digest: str = "", **options: Any) -> Outcome:
        spec = Spec(SPEC, NAME, Path.cwd(), select=Select(order=order, digest=digest))
        with Syncer(spec, runs, state=State(NAME)) as syncer:
            return syncer.once(**options)

    return once


def cut(path: Path) -> Path:
    """Leaves half of a checkpoint."""
    path.write_bytes(path.read_bytes()[:-20])
    return path


def old(path: Path, seconds: float = HOURS) -> Path:
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_what_is_on_its_way_leaves_the_live_one_current(push: Push, runs: Path) -> None:
    """Guards a newer checkpoint that is still being written: that is no failure, and `newer` says what it is."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    push()
    cut(write(runs / "step_2.safetensors", mlp(), 2.0))
    outcome = push()
    assert (outcome.status, outcome.exit_code) == ("current", 0)
    assert outcome_json(outcome)["newer"] == str(runs.absolute() / "step_2.safetensors")
    assert "step_2.safetensors" in (outcome.reason or "")


def test_half_a_checkpoint_alone_is_none_yet(push: Push, runs: Path, hours_later: Callable[[], None]) -> None:
    """Guards that without a live version nothing is current, however old the half is."""
    cut(write(runs / "step_2.safetensors", mlp(), 2.0))
    hours_later()
    assert [push().status for _ in range(2)] == ["empty", "empty"]


def test_a_checkpoint_that_nobody_finishes_is_told_once(
    push: Push, runs: Path, segment: Segment, hours_later: Callable[[], None]
) -> None:
    """Guards a monitor against exit 66 for days: 65 once, in log and figures as well, and 0 from then on."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    push()
    path = cut(write(runs / "step_2.safetensors", mlp(), 2.0))
    assert push().exit_code == 0
    hours_later()
    told = push()
    assert (told.status, told.exit_code, told.version) == ("rejected", 65, 1)
    assert "Nothing has written to it for a long time" in (told.reason or "")
    assert [(push().status, push().exit_code) for _ in range(2)] == [("current", 0)] * 2
    with State(NAME) as state:
        assert [event.checkpoint for event in state.events(kinds=("reject",))] == [str(path.absolute())]
    figures = Figures(NAME)
    figures.tell(told)
    assert figures.registry.get_sample_value("wsync_rejected_total", {"name": NAME, "reason": "incomplete"}) == 1
    write(path, mlp(), 3.0)
    assert push().status == "published" and mark_of(segment) == {3.0}


@pytest.mark.parametrize("lacks", ["the end of a download", "a digest"])
def test_what_never_comes_is_told_once(
    lacks: str, push: Push, runs: Path, segment: Segment, hours_later: Callable[[], None]
) -> None:
    """Guards a download that was given up, and a trainer that leaves no digest: 65 once, though all bytes are there."""

    def digest(path: Path) -> None:
        path.with_name(f"{path.name}.sha256").write_text(sha256(path.read_bytes()).hexdigest())

    digest(old(write(runs / "step_1.safetensors", mlp(), 1.0), 2 * HOURS))
    push(digest="sha256")
    path = old(write(runs / "step_2.safetensors", mlp(), 2.0))  # a copy with its original's time, which came just now
    control = path.with_name(f"{path.name}.aria2")
    if lacks == "the end of a download":
        digest(path)
        control.touch()
    assert push(digest="sha256").status == "current"
    hours_later()
    if lacks == "a digest":
        with path.open("r+b"):
            assert push(digest="sha256").status == "current"  # somebody has it open, and may go on
    assert push(digest="sha256").exit_code == 65
    assert [push(digest="sha256").exit_code for _ in range(2)] == [0, 0]
    digest(path)
    control.unlink(missing_ok=True)
    assert push(digest="sha256").status == "published" and mark_of(segment) == {2.0}


def test_another_models_file_is_told_once(push: Push, runs: Path, segment: Segment) -> None:
    """Guards an optimizer or a normaliser beside the policies: the newest policy stays current, and newer ones come."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    push()
    save_file({"mean": torch.zeros(3)}, runs / "normaliser.safetensors")
    told = push()
    assert (told.status, told.kind) == ("rejected", "foreign")
    assert [push().exit_code for _ in range(2)] == [0, 0]
    write(runs / "step_2.safetensors", mlp(), 2.0)
    old(runs / "step_2.safetensors", -5)
    assert push().status == "published" and mark_of(segment) == {2.0}


def test_a_policy_that_does_not_fit_is_told_each_time(push: Push, runs: Path) -> None:
    """Guards that only what is no policy at all is passed over: of other shapes it stays 65."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    push()
    write(runs / "step_2.safetensors", mlp(hidden=5))
    assert [push().exit_code for _ in range(2)] == [65, 65]


def test_another_model_alone_stays_refused(push: Push, runs: Path) -> None:
    """Guards a wrong spec: where nothing is live, the refusal is told each time."""
    save_file({"mean": torch.zeros(3)}, runs / "normaliser.safetensors")
    assert [push().exit_code for _ in range(2)] == [65, 65]


@pytest.mark.parametrize("order", ["mtime", "step"])
def test_what_arrives_later_and_counts_as_older_is_told_once(
    order: str, push: Push, runs: Path, segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a copy that keeps an old time, and a trainer that goes on at a lower step; `arrival` takes it."""
    write(runs / "step_500.safetensors", mlp(), 1.0)
    push(order)
    made = old(write(tmp_path / "made.safetensors", mlp(), 2.0))
    shutil.copy2(made, runs / ("step_900.safetensors" if order == "mtime" else "step_100.safetensors"))
    outcome = push(order)
    assert (outcome.status, outcome.exit_code) == ("current", 0)
    assert 'order = "arrival"' in (outcome.warning or "")
    tell(outcome, as_json=False)
    assert "--order arrival" in capsys.readouterr().err
    assert push(order).warning is None
    assert push("arrival").status == "published" and mark_of(segment) == {2.0}


def test_no_warning_takes_the_place_of_another(push: Push, runs: Path, cli: Cli) -> None:
    """Guards what is said only once beside readers that are late, and beside a watch that will undo a push."""
    write(runs / "step_2.safetensors", mlp(), 1.0)
    push()
    with closing(Segment.open(NAME)) as segment, closing(Registration(segment.path, "copy", 0)):
        old(write(runs / "step_1.safetensors", mlp(), 2.0))
        done = cli("push", SPEC, str(runs), "--wait", "0.05", "--json")
        warning = json.loads(done.stdout)["warning"]
        assert done.returncode == 75 and "arrived after" in warning and "did not take version 1" in warning
        for file in runs.iterdir():
            file.unlink()
        old(write(runs / "step_3.safetensors", mlp(), 3.0))
        write(runs.parent / "other" / "step_4.safetensors", mlp(), 4.0)
        with closing(WatchLock(Watching(os.getpid(), SPEC, str(runs.parent / "other")))) as lock:
            lock.hold(segment)
            told = cli("push", SPEC, str(runs), "--wait", "0.05").stderr
    words = ["new run", "will replace version 2", "did not take version 2"]
    assert [word for word in words if word in told] == words, told


def test_cron_is_told_of_a_refusal_beside_a_lasting_warning(push: Push, runs: Path, cli: Cli) -> None:
    """Guards `push --quiet` against a refusal that a late reader's warning hides; a dry run takes no mail away."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    push()
    quiet = ("push", SPEC, str(runs), "--quiet", "--wait", "0.05")
    with closing(Segment.open(NAME)) as segment, closing(Registration(segment.path, "copy", 0)):
        assert ["did not take" in cli(*quiet).stderr for _ in range(2)] == [True, False]
        write(runs / "step_2.safetensors", mlp(), 2.0)
        write(runs / "step_3.safetensors", mlp(), float("nan"))
        assert "NaN" in cli(*quiet).stderr
        assert cli(*quiet).returncode == 75  # version 2 is current, and the reader has not taken it
        write(runs / "step_4.safetensors", mlp(), 4.0)
        assert [cli(*quiet).stderr for _ in range(2)] == ["", ""]
    write(runs / "step_5.safetensors", mlp(), float("nan"))
    assert ["NaN" in cli(*quiet, *dry).stderr for dry in (["--dry-run"], [], [])] == [True, True, False]


def test_what_lay_there_before_is_not_told(push: Push, runs: Path) -> None:
    """Guards against a warning about each older checkpoint of a run."""
    for step in (1, 2, 3):
        write(runs / f"step_{step}.safetensors", mlp(), float(step))
    assert push().warning is None and push().warning is None


def test_where_all_is_newer_by_arrival_it_is_a_new_run(push: Push, runs: Path, segment: Segment) -> None:
    """Guards a run that begins anew in an emptied directory, at a lower step: it is taken, and said so."""
    write(runs / "step_500.safetensors", mlp(), 1.0)
    push("step")
    (runs / "step_500.safetensors").unlink()
    assert push("step").status == "current"  # retention alone makes no new run
    write(runs / "step_5.safetensors", mlp(), 2.0)
    outcome = push("step")
    assert (outcome.status, outcome.step, mark_of(segment)) == ("published", 5, {2.0})
    assert "new run" in (outcome.warning or "")
    assert push("step").status == "current"


def test_retention_of_the_live_one_is_no_new_run(push: Push, runs: Path) -> None:
    """Guards that older checkpoints which lay there before do not go live when the live one is removed."""
    write(runs / "step_4.safetensors", mlp(), 4.0)
    old(write(runs / "step_3.safetensors", mlp(), 3.0))
    push()
    (runs / "step_4.safetensors").unlink()
    assert push().status == "current"


def test_a_watch_says_it_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards that the log of a watch has the warning of a pass that leaves all as it is."""
    log = WatchLog(NAME, Path("runs"), "json", lambda: None)
    for warning in (None, "late", None):
        log.tell(Outcome("current", NAME, version=1, warning=warning))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines].count("late") == 1


def test_a_watch_says_why_again_if_that_changed(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards an operator who edits a gate: the log has each new answer about the same checkpoint, once."""
    log = WatchLog(NAME, Path("runs"), "json", lambda: None)
    for reason in ("no", "no", "not found", "not found"):
        log.tell(Outcome("rejected", NAME, version=1, identity="1-2-3", reason=reason))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["reason"] for line in lines] == ["no", "not found"]
