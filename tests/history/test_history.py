"""Rollback, pin, rejections that are remembered, log, config: what an operator does from a terminal and from cron."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import time
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
import typer
from builders import NAME, marks, write
from policies import mlp
from processes import DEADLINE, Cli, Spawn
from safetensors.torch import save_file

import wsync
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.cli.commands import command_line
from wsync.cli.history_commands import moment
from wsync.cli.options import VARIABLES
from wsync.cli.output.log import bar
from wsync.discovery.weight_getter import CheckpointWeightGetter
from wsync.errors import LayoutDiffers, NoCheckpoint, SegmentBusy, WsyncError
from wsync.fitting.fit import Fit
from wsync.history import rollback as way_back
from wsync.history.record import Record
from wsync.history.rollback import pin_checkpoint, rollback
from wsync.history.state import State
from wsync.hooks import gate
from wsync.layout.layout import layout_of
from wsync.segment.writable import WritableSegment
from wsync.settings.hook_settings import Hooks
from wsync.settings.spec import Spec, load_spec
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer

pytestmark = pytest.mark.slow

Push = Callable[..., Outcome]


@pytest.fixture
def runs(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def state(runtime: Path) -> Iterator[State]:
    with State(NAME) as opened:
        yield opened


@pytest.fixture
def push(runs: Path, layouts_here: None) -> Push:
    """One pass as cron makes it: a syncer of its own each time."""

    def once(mark: float | None = None, *, spec: Spec | None = None, **options: Any) -> Outcome:
        if mark is not None:
            write(runs / f"step_{mark:g}.safetensors", mlp(), mark, int(mark) if mark == mark else 99)
        with Syncer(spec or load_spec("policies:mlp"), runs, state=State(NAME)) as syncer:
            return syncer.once(**options)

    return once


def live_marks() -> set[float]:
    policy = mlp()
    with wsync.attach(policy, NAME, timeout=DEADLINE):
        return marks(policy)


def test_rollback_puts_the_version_before_live_under_a_new_number(push: Push, runs: Path, state: State) -> None:
    """Guards the way back, its pin, and that going back twice goes on backwards."""
    for mark in (1, 2, 3):
        push(mark)
    live, pin, was = rollback(NAME, runtime=None, state=state)
    assert (live.version, was, live.step) == (4, 2, 2) and live_marks() == {2.0}
    assert pin.checkpoint == str(runs / "step_2.safetensors")
    again = push(9)
    assert (again.status, again.exit_code, again.version, again.pin) == ("pinned", 0, 4, pin.checkpoint)
    live, _, was = rollback(NAME, runtime=None, state=state)
    assert (live.version, was) == (5, 1) and live_marks() == {1.0}
    assert [e.kind for e in state.events()] == ["publish"] * 3 + ["rollback"] * 2


def test_rollback_uses_a_spare_slot_without_the_file(push: Push, runs: Path, state: State) -> None:
    """Guards that a version still whole in shared memory is taken as it is; a trainer's retention cannot take it."""
    for mark in (1, 2, 3):
        push(mark)
    shutil.rmtree(runs)
    live, _, _ = rollback(NAME, runtime=None, state=state)
    assert (live.version, live.step) == (4, 2) and live_marks() == {2.0}


def test_a_slot_that_was_staged_and_refused_is_nothing_to_go_back_to(push: Push, runs: Path, state: State) -> None:
    """Guards against weights that were overwritten by a refused checkpoint going live under an old version's name."""
    for mark in (1, 2):
        push(mark)
    bad = {name: torch.full_like(tensor, float("nan")) for name, tensor in mlp().state_dict().items()}
    for number in range(4):  # each spare slot is staged into
        policy = mlp()
        policy.load_state_dict(bad)
        write(runs / f"step_{10 + number}.safetensors", policy)
        assert push().status == "rejected"
    (runs / "step_1.safetensors").unlink()
    with pytest.raises(WsyncError, match=r"gone or was changed"):
        rollback(NAME, 1, runtime=None, state=state)
    assert live_marks() == {2.0} and state.pin_file.read() is None


def test_rollback_reads_the_file_as_it_was_published(push: Push, runs: Path, state: State) -> None:
    """Guards that the settings of then are used, and that a file that changed since is not."""
    spec = replace(load_spec("policies:mlp"), weights=Fit(prefix="actor."))
    for mark in (1.0, 2.0):
        wrapped = torch.nn.ModuleDict({"actor": mlp()})
        write(runs / f"step_{mark:g}.safetensors", wrapped, mark, int(mark))
        assert push(spec=spec).status == "published"
    WritableSegment.open(NAME).remove()
    push(spec=spec, force=True)
    assert rollback(NAME, 1, runtime=None, state=state)[0].version == 4
    assert live_marks() == {1.0}
    state.pin_file.write(None)
    write(runs / "step_1.safetensors", mlp(), 7.0)
    WritableSegment.open(NAME).remove()
    push(spec=spec)
    with pytest.raises(WsyncError, match="These versions can be put live"):
        rollback(NAME, 1, runtime=None, state=state)


def kept(state: State) -> list[str]:
    """The files among the copies, without the extras, each of which is some copy's."""
    names = sorted(file.name for file in state.copies.iterdir())
    copies = [name for name in names if not name.endswith(".extras")]
    assert {name.replace(".extras", ".safetensors") for name in names} == set(copies)
    return copies


def test_kept_copies_are_the_way_back_when_all_else_is_gone(push: Push, runs: Path, state: State) -> None:
    """Guards ``--keep``: the last N versions are there after a reboot and with no file of the trainer left."""
    spec = replace(load_spec("policies:mlp"), keep=2)
    for mark in (1, 2, 3, 4):
        push(mark, spec=spec)
    assert kept(state) == ["3.safetensors", "4.safetensors"]
    for file in runs.iterdir():
        file.unlink()
    WritableSegment.open(NAME).remove()
    write(runs / "step_5.safetensors", mlp(), 5.0, 5)
    assert push(spec=spec).version == 5
    (state.copies / "5.safetensors").unlink()
    live, pin, _ = rollback(NAME, 4, runtime=None, state=state)
    assert (live.version, live.step) == (6, 4) and live_marks() == {4.0}
    WritableSegment.open(NAME).remove()  # a reboot: the pinned one comes back, and not the newest
    assert (push(spec=spec).status, push(spec=spec).status) == ("published", "pinned")
    assert live_marks() == {4.0} and pin.identity


def test_a_checkpoint_is_kept_once_however_often_it_is_published(push: Push, runs: Path, state: State) -> None:
    """Guards ``--keep`` against reboots, each of which publishes the same again: N checkpoints, not N versions."""
    spec = replace(load_spec("policies:mlp"), keep=2)
    push(1, spec=spec)
    push(2, spec=spec)
    for version in (3, 4):
        WritableSegment.open(NAME).remove()
        assert push(spec=spec).version == version
    assert kept(state) == ["1.safetensors", "4.safetensors"]
    shutil.rmtree(runs)
    for to in (1, 2, 3):  # by whatever number it was live
        WritableSegment.open(NAME).remove()
        WritableSegment.create(NAME, layout_of(mlp())).close()
        assert rollback(NAME, to, runtime=None, state=state)[0].step == min(to, 2)
        assert live_marks() == {float(min(to, 2))}


def test_copies_of_a_history_that_was_removed_are_no_others(push: Push, runs: Path, state: State) -> None:
    """Guards rollback against weights of another time that had the same number, and --keep against keeping those."""
    spec = replace(load_spec("policies:mlp"), keep=2)
    for mark in (1, 2, 3):
        push(mark, spec=spec)
    for file in (*runs.iterdir(), *state.directory.glob("*.sqlite*")):
        file.unlink()
    for mark in (4, 5):
        WritableSegment.open(NAME).remove()
        push(mark, spec=spec)
    assert kept(state) == ["1.safetensors", "2.safetensors"]
    WritableSegment.open(NAME).remove()
    (state.copies / "1.safetensors").unlink()
    push(6, spec=spec)
    shutil.copy(state.copies / "2.safetensors", state.copies / "1.safetensors")
    (runs / "step_4.safetensors").unlink()
    with pytest.raises(WsyncError, match="gone or was"):
        rollback(NAME, 1, runtime=None, state=state)
    assert rollback(NAME, 2, runtime=None, state=state)[0].step == 5 and live_marks() == {5.0}


def test_what_is_pinned_is_kept(push: Push, runs: Path, state: State) -> None:
    """Guards a pin over a reboot, with ``--keep``, though it is older than the last N and its file is gone since."""
    spec = replace(load_spec("policies:mlp"), keep=2)
    for mark in (1, 2, 3):
        push(mark, spec=spec)
    rollback(NAME, 1, runtime=None, state=state)
    assert push(spec=spec).status == "pinned"
    assert kept(state) == ["3.safetensors", "4.safetensors"]
    shutil.rmtree(runs)
    for version in (5, 6):
        WritableSegment.open(NAME).remove()
        again = push(spec=spec)
        assert (again.status, again.version, live_marks()) == ("published", version, {1.0})


def test_other_settings_make_another_copy(push: Push, runs: Path, state: State) -> None:
    """Guards a kept copy against standing for the same file with other tensors taken from it."""
    spec = replace(load_spec("policies:mlp"), keep=2)
    write(runs / "step_1.safetensors", torch.nn.ModuleDict({"a": mlp(), "b": mlp()}), 1.0, 1)
    for prefix in ("a.", "b."):
        assert push(spec=replace(spec, weights=Fit(prefix=prefix)), force=True).status == "published"
    assert kept(state) == ["1.safetensors", "2.safetensors"]


def mixture() -> tuple[float, float]:
    """Of the live weights, the value of the part that comes alone below, and that of the rest."""
    policy = mlp()
    with wsync.attach(policy, NAME, timeout=DEADLINE):
        (part,), (rest,) = ({*policy.state_dict()[name].flatten().tolist()} for name in ("2.bias", "0.weight"))
        return part, rest


@pytest.fixture
def parts(push: Push, runs: Path) -> Callable[..., Outcome]:
    """Publishes a whole checkpoint of one value, then a part of the value 9, always the same file, beside it."""
    spec = replace(load_spec("policies:mlp"), weights=Fit(strict=False))

    def once(mark: float, keep: int = 0) -> Outcome:
        push(mark, spec=replace(spec, keep=keep))
        part = runs / "part.safetensors"
        if not part.exists():
            save_file({"2.bias": torch.full_like(mlp().state_dict()["2.bias"], 9.0)}, part)
        with Syncer(replace(spec, keep=keep), part, state=State(NAME)) as syncer:
            return syncer.once()

    return once


def test_a_part_is_not_gone_back_to_by_its_file(parts: Callable[..., Outcome], state: State) -> None:
    """Guards against a mixture that never was live; the refusal says which setting would have kept a copy."""
    parts(1)
    assert parts(2).version == 4 and mixture() == (9.0, 2.0)
    parts(3)
    parts(4)
    with pytest.raises(WsyncError, match="kept live values that are in no file, and .*keep = 5") as caught:
        rollback(NAME, 2, runtime=None, state=state)
    assert "\n  3  step 2" in str(caught.value) and "\n  2  " not in str(caught.value)
    assert mixture() == (9.0, 4.0) and state.pin_file.read() is None


def test_a_part_is_gone_back_to_by_its_slot(parts: Callable[..., Outcome], push: Push, state: State) -> None:
    """Guards that what a version kept comes back with it."""
    parts(1)
    push(2)
    assert rollback(NAME, 2, runtime=None, state=state)[0].version == 4 and mixture() == (9.0, 1.0)


def test_each_mixture_of_a_part_is_kept(parts: Callable[..., Outcome], push: Push, state: State) -> None:
    """Guards that copies of one part beside other weights are not taken for each other, over reboots, too."""
    for mark in (1, 2, 3):
        parts(mark, keep=20)
    spec = replace(load_spec("policies:mlp"), keep=20)
    for to, rest in ((2, 1.0), (4, 2.0)):
        rollback(NAME, to, runtime=None, state=state)
        assert mixture() == (9.0, rest)
        for _ in range(2):
            WritableSegment.open(NAME).remove()
            assert push(spec=spec).status == "published" and mixture() == (9.0, rest)
        state.pin_file.write(None)
    rollback(NAME, 2, runtime=None, state=state)
    for copy in state.copies.iterdir():
        copy.unlink()
    WritableSegment.open(NAME).remove()
    lost = push(spec=spec)
    assert lost.status == "failed" and "in no file, and no copy" in (lost.reason or "")


def test_odd_names_are_gone_back_to_and_listed(push: Push, runs: Path, state: State) -> None:
    """Guards a file whose name is no UTF-8, which is on record escaped; and the list against a name of two lines."""
    push(1)
    for number, name in enumerate((b"step_\xff2.safetensors", b"step\n3.safetensors"), 2):
        write(runs / os.fsdecode(name), mlp(), float(number))
        assert push().status == "published"
    WritableSegment.open(NAME).remove()
    assert push(4).version == 4
    with pytest.raises(WsyncError, match=r"\n  3  step 3  .*/step\\n3\.safetensors\n  2  step 2  "):
        rollback(NAME, 9, runtime=None, state=state)
    assert rollback(NAME, 2, runtime=None, state=state)[0].version == 5 and live_marks() == {2.0}


def test_half_a_copy_is_removed_once_nobody_writes_it(push: Push, state: State) -> None:
    """Guards the disk against what a publisher that was killed left behind, as large as the weights."""
    spec = replace(load_spec("policies:mlp"), keep=1)
    state.copies.mkdir(parents=True)
    dead, alive = state.copies / "8.tmp", state.copies / "9.tmp"
    dead.write_bytes(b"half")
    with alive.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        push(1, spec=spec)
    assert kept(state) == ["1.safetensors", "9.tmp"]


def test_rollback_where_nothing_is_live(push: Push, state: State) -> None:
    """Guards the way back after a reboot, where the pinned one is gone: what can be had is told, and can be had."""
    push(1)
    push(2)
    WritableSegment.open(NAME).remove()
    WritableSegment.create(NAME, layout_of(mlp())).close()
    with pytest.raises(WsyncError, match=r"(?s)nothing is live.*These versions can be put live.*  1  step 1"):
        rollback(NAME, runtime=None, state=state)
    live, pin, _ = rollback(NAME, 1, runtime=None, state=state)
    assert (live.version, pin.version, live_marks()) == (3, 3, {1.0})


def test_rollback_waits_a_little_for_a_publisher(push: Push, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards an operator in a hurry against a watch that stages at this moment; one that goes on is named."""
    push(1)
    push(2)
    other = WritableSegment.open(NAME)
    with ExitStack() as held:
        held.enter_context(other.publishing())
        with pytest.raises(SegmentBusy):
            rollback(NAME, runtime=None, state=state, patience=0.0)
        assert state.pin_file.read() is None
        clock = SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=lambda _: held.close())
        monkeypatch.setattr(way_back, "time", clock)
        assert rollback(NAME, runtime=None, state=state, patience=DEADLINE)[0].step == 1
    other.close()


def test_a_pin_holds_against_the_pass_at_hand(push: Push, state: State) -> None:
    """Guards what is pinned while something newer is staged, or its gate takes its time: that does not go live."""
    push(1)
    pin = f"{sys.executable} -m wsync pin {NAME}"
    spec = replace(load_spec("policies:mlp"), hooks=Hooks(gate=pin))
    done = push(2, spec=spec)
    assert (done.status, done.exit_code, done.version) == ("pinned", 0, 1) and live_marks() == {1.0}
    state.pin_file.write(None)
    assert push().version == 2


@pytest.mark.parametrize(
    ("meanwhile", "when"), [("rollback", "reopen"), ("pin", "reopen"), ("unpin", "reopen"), ("pin", "read_into")]
)
def test_a_pin_that_is_changed_meanwhile_does_not_go_live(
    meanwhile: str, when: str, push: Push, runs: Path, state: State, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards an operator's newest word against a pass that still opens what was pinned before it."""
    for mark in (1, 2, 3):
        push(mark)
    pin_checkpoint(NAME, str(runs / "step_1.safetensors"), runtime=None, state=state)
    owner: Any = Record if when == "reopen" else Checkpoint
    real = getattr(owner, when)

    def late(*given: Any, **more: Any) -> Any:
        done = real(*given, **more)
        assert cli(meanwhile, NAME).returncode == 0
        return done

    with monkeypatch.context() as at_hand:
        at_hand.setattr(owner, when, late)
        done = push()
    live = {"rollback": 2.0}.get(meanwhile, 3.0)
    assert (done.status, done.exit_code, live_marks()) == ("busy", 75, {live}), done
    assert done.version == (4 if meanwhile == "rollback" else 3)
    assert "the next pass obeys" in (done.reason or "")
    assert (push().status, live_marks()) == ("current" if meanwhile == "unpin" else "pinned", {live})


def test_a_rollback_that_fails_takes_back_its_own_pin_alone(push: Push, runs: Path, state: State) -> None:
    """Guards what an operator pins while a rollback fails beside it; an earlier pin holds again where nobody did."""
    for mark in (1, 2, 3, 4, 5):
        push(mark)
    (runs / "step_1.safetensors").unlink()
    earlier, _ = pin_checkpoint(NAME, None, runtime=None, state=state)
    with pytest.raises(NoCheckpoint):
        rollback(NAME, 1, runtime=None, state=state)
    assert state.pin_file.read() == earlier
    with unittest.mock.patch.object(way_back, "publish_again") as meanwhile, pytest.raises(NoCheckpoint):
        meanwhile.side_effect = lambda *_: pin_checkpoint(
            NAME, str(runs / "step_2.safetensors"), runtime=None, state=state
        )[2:]
        rollback(NAME, 1, runtime=None, state=state)
    pinned = state.pin_file.read()
    assert pinned and pinned.checkpoint == str(runs / "step_2.safetensors")


def test_versions_go_on_after_the_shared_memory_is_gone(push: Push, runtime: Path, state: State) -> None:
    """Guards against version 1 coming a second time with other weights, after a reboot."""
    push(1)
    push(2)
    shutil.rmtree(runtime / NAME)
    again = push()
    assert (again.status, again.version, again.step) == ("published", 3, 2)


def test_a_watch_outlives_the_deletion_of_its_segment(runs: Path, spawn: Spawn, runtime: Path) -> None:
    """Guards ``rm -rf`` under a watch: it makes the segment anew, versions go on, and an attached reader follows."""
    write(runs / "step_1.safetensors", mlp(), 1.0, 1)
    watch = spawn("-m", "wsync", "watch", "policies:mlp", str(runs), "--log-format", "json", "--poll", "0.2")
    assert watch.stdout
    events = map(json.loads, watch.stdout)
    assert next(e for e in events if e["event"] == "published")["version"] == 1
    policy = mlp()
    with wsync.attach(policy, NAME, timeout=DEADLINE) as reader:
        shutil.rmtree(runtime / NAME)
        assert next(e for e in events if e["event"] == "published")["version"] == 2
        deadline = time.monotonic() + DEADLINE
        while not reader.refresh() and time.monotonic() < deadline:
            reader.wait(0.1)
        assert reader.version == 2


def test_a_running_watch_obeys_a_pin(segment: WritableSegment, runs: Path, spawn: Spawn, cli: Cli) -> None:
    """Guards that rollback holds against a watch, that the watch says so, and that unpin resumes."""
    for step in (1, 2):
        write(runs / f"step_{step}.safetensors", mlp(), float(step), step)
        assert cli("push", "policies:mlp", str(runs)).returncode == 0
    watch = spawn("-m", "wsync", "watch", "policies:mlp", str(runs), "--log-format", "json", "--poll", "0.2")
    assert watch.stdout
    events = map(json.loads, watch.stdout)
    assert next(e for e in events if e["event"] == "current")["version"] == 2
    done = cli("rollback", NAME, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["version"] == 3, done.stderr
    told = next(e for e in events if e["event"] == "pinned")
    assert told["level"] == "info" and "wsync unpin" in told["reason"]
    write(runs / "step_3.safetensors", mlp(), 3.0, 3)
    assert json.loads(cli("status", NAME, "--json").stdout)["pin"] == str(runs / "step_1.safetensors")
    assert cli("unpin", NAME).returncode == 0
    assert next(e for e in events if e["event"] == "published")["step"] == 3


def test_pin_names_a_file_that_the_next_pass_puts_live(push: Push, cli: Cli, runs: Path, state: State) -> None:
    """Guards ``wsync pin NAME CHECKPOINT``, an older file than what is live."""
    push(1)
    push(2)
    done = cli("pin", NAME, str(runs / "step_1.safetensors"))
    assert done.returncode == 0 and "next pass" in done.stdout, done.stderr
    assert push().status == "published" and live_marks() == {1.0}
    assert push(8).status == "pinned"
    assert "no longer pinned" in cli("unpin", NAME).stdout
    assert (push().status, live_marks()) == ("published", {8.0})
    assert cli("pin", "nowhere").returncode == 1
    assert cli("pin", NAME, "absent.safetensors").returncode == 66


def test_a_rejection_is_told_once_and_stays(cli: Cli, segment: WritableSegment, runs: Path) -> None:
    """One 65 for a rejected file, then a note that what is live is current; ``--retry`` tries it again."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    assert cli("push", "policies:mlp", str(runs)).returncode == 0
    write(runs / "step_2.safetensors", mlp(), float("nan"))
    first = cli("push", "policies:mlp", str(runs))
    assert first.returncode == 65 and "NaN" in first.stderr
    second = cli("push", "policies:mlp", str(runs))
    assert (second.returncode, second.stderr) == (0, "")
    assert "version 1, step 1 is current" in second.stdout and "step_2.safetensors again" in second.stdout
    told = json.loads(cli("push", "policies:mlp", str(runs), "--json").stdout)
    assert (told["status"], told["version"], told["step"]) == ("current", 1, 1) and "NaN" in told["reason"]
    assert "NaN" in cli("push", "policies:mlp", str(runs), "--retry").stderr
    relaxed = cli("push", "policies:mlp", str(runs), "--no-finite")
    assert relaxed.returncode == 0, "other settings ask anew"
    write(runs / "step_3.safetensors", mlp(), 3.0)
    assert cli("push", "policies:mlp", str(runs)).returncode == 0


def test_a_history_that_cannot_be_written_is_not_in_the_way(
    cli: Cli, segment: WritableSegment, runs: Path, tmp_path: Path
) -> None:
    """Guards that weights go live where the state directory is broken, and that it is said."""
    (tmp_path / "state").write_bytes(b"")
    write(runs / "step_1.safetensors", mlp(), 1.0)
    done = cli("push", "policies:mlp", str(runs), "--state-dir", str(tmp_path / "state"))
    assert done.returncode == 0 and "--state-dir" in done.stderr and "Traceback" not in done.stderr
    assert live_marks() == {1.0}


def test_log_tells_what_happened(push: Push, cli: Cli, runs: Path, state: State) -> None:
    """Guards the table, its bounds, the JSON, and the picture."""
    push(1)
    push(2)
    write(runs / "step_3.safetensors", mlp(), float("nan"), 3)
    push()
    rollback(NAME, runtime=None, state=state)
    told = json.loads(cli("log", NAME, "--json").stdout)["events"]
    assert [e["kind"] for e in told] == ["publish", "publish", "reject", "rollback"]
    assert told[0]["bytes"] == 232 and told[0]["seconds"] > 0 and "NaN" in told[2]["reason"]
    table = cli("log", NAME, "-n", "2").stdout
    assert [line.split()[2] for line in table.splitlines()[1:]] == ["reject", "rollback"]
    assert json.loads(cli("log", NAME, "--json", "--since", "2030-01-01").stdout)["events"] == []
    plot = cli("log", NAME, "--plot").stdout
    assert "publish time" in plot and "staging speed" in plot and "version lag" in plot
    assert cli("log", NAME, "--since", "soon").returncode == 2
    assert "no history" in cli("log", "other").stdout


@pytest.mark.parametrize("columns", [80, 200])
def test_log_fits_a_terminal(push: Push, cli: Cli, runs: Path, terminal: Cli, columns: int) -> None:
    """Guards against a long reason that pushes the event or its version off the screen, or is cut itself."""
    push(1)
    write(runs / f"{'long_' * 12}2.safetensors", mlp(), float("nan"))
    assert cli("push", "policies:mlp", str(runs)).returncode == 65
    seen = terminal("log", NAME, columns=columns, env={"NO_COLOR": "1"})
    lines = click.unstyle(seen.stdout).splitlines()
    assert max(map(len, lines)) <= columns and "\x1b[3" not in seen.stdout
    assert lines[0].split() == ["time", "event", "version", "step", "took", "checkpoint"]
    assert lines[1].split()[2:4] == ["publish", "1"]
    (at,) = (n for n, line in enumerate(lines) if line.split()[2:4] == ["reject", "1"])
    assert "probably diverged" in " ".join(" ".join(lines[at:]).split())
    assert cli("log", NAME).stdout.splitlines()[2].endswith("diverged.")


def test_a_pinned_copy_is_kept_once_over_reboots(push: Push, runs: Path, state: State) -> None:
    """Guards the other copies: what is put live again from a copy is recorded as what that is a copy of."""
    spec = replace(load_spec("policies:mlp"), keep=2)
    for mark in (1, 2):
        push(mark, spec=spec)
    pin_checkpoint(NAME, None, runtime=None, state=state)
    for file in runs.iterdir():
        file.unlink()
    WritableSegment.open(NAME).remove()
    assert push(spec=spec).status == "published" and live_marks() == {2.0}
    assert len({event.settings for event in state.events(kinds=("publish",))}) == 1
    live, _, was = rollback(NAME, 1, runtime=None, state=state)
    assert (was, live.step) == (1, 1) and live_marks() == {1.0}


def test_a_clock_that_was_set_back_takes_no_new_copy(push: Push, state: State) -> None:
    """Guards what was kept last: copies with times ahead of the clock go before it."""
    spec = replace(load_spec("policies:mlp"), keep=2)
    for mark in (1, 2):
        push(mark, spec=spec)
    for copy in state.copies.iterdir():
        os.utime(copy, (time.time() + 3600,) * 2)
    for mark in (3, 4):
        push(mark, spec=spec)
    assert kept(state) == ["3.safetensors", "4.safetensors"]


def test_what_was_tried_again_with_success_is_taken_after_a_reboot(push: Push, state: State) -> None:
    """Guards a box that starts anew against a refusal that was overcome: it would have nothing live."""
    spec = load_spec("policies:mlp")
    refusing = replace(spec, hooks=replace(spec.hooks, gate="test -e allowed"))
    assert push(1, spec=refusing).status == "rejected"
    Path("allowed").touch()
    assert push(spec=refusing).status == "rejected"
    with Syncer(refusing, "runs", state=State(NAME)) as syncer:
        syncer.record.forget()
        assert syncer.once().status == "published"
    WritableSegment.open(NAME).remove()
    assert push(spec=refusing).status == "published"


def test_the_newest_stays_rejected_beside_half_a_file(push: Push, runs: Path) -> None:
    """Guards cron's exit code: that something older is of no use either makes the newest no better."""
    push(3)
    half = write(runs / "step_4.safetensors", mlp(), 4.0)
    os.truncate(half, half.stat().st_size // 2)
    os.utime(half, (time.time() - 60,) * 2)
    nan = float("nan")
    assert push(nan).status == "rejected"
    again = push()
    assert (again.status, again.known, again.passed_over) == ("rejected", True, ())


def test_the_newest_stays_rejected_where_the_rest_is_gone(push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the same against a trainer's retention, which takes what is older between the listing and the read."""
    nan, gone = float("nan"), NoCheckpoint("retention was faster")
    push(nan)
    write(Path("runs/step_1.safetensors"), mlp(), 1.0)
    os.utime("runs/step_1.safetensors", (time.time() - 60,) * 2)
    monkeypatch.setattr(CheckpointWeightGetter, "open", unittest.mock.Mock(side_effect=gone))
    assert (push().status, push().known) == ("rejected", True)


def test_a_followed_status_ends_as_it_is_asked_to(spawn: Spawn, push: Push) -> None:
    """Guards a terminal: SIGTERM lets the view put the cursor back."""
    push(1)
    following = spawn("-m", "wsync", "status", "--watch")
    assert following.stdout and any(line.startswith(NAME) for line in following.stdout)
    following.terminate()
    assert following.wait(DEADLINE) == 128 + signal.SIGTERM


def test_what_an_operator_put_live_is_refused_no_more(push: Push, runs: Path, state: State) -> None:
    """Guards that a pin, which asks no gate, ends the gate's refusal: after a reboot the gate is asked again."""
    spec = replace(load_spec("policies:mlp"), hooks=Hooks(gate="exit 1"))
    assert push(1, spec=spec).status == "rejected" and state.remembered(spec.digest())
    pin_checkpoint(NAME, str(runs / "step_1.safetensors"), runtime=None, state=state)
    assert push(spec=spec).status == "published" and not state.remembered(spec.digest())


@pytest.mark.parametrize("mark", [2.0, float("nan"), None])
@pytest.mark.parametrize("booted", [False, True])
def test_a_dry_run_opens_what_is_pinned(
    booted: bool, mark: float | None, push: Push, runs: Path, runtime: Path, state: State
) -> None:
    """Guards against a dry run that finds all well where the push fails: the pinned file is gone, or not finite."""
    push(1)
    file = write(runs / "step_2.safetensors", mlp(), mark)
    pin_checkpoint(NAME, str(file), runtime=None, state=state)
    if mark is None:
        file.unlink()
    if booted:
        shutil.rmtree(runtime / NAME)
    spec = replace(load_spec("policies:mlp"), hooks=Hooks(gate="exit 1"))
    tried = push(dry_run=True, spec=spec)
    assert [event.kind for event in state.events()] == ["publish", "pin"]
    done = push(spec=spec)
    expected = {2.0: ("checked", 0, None)}.get(mark or 0.0, (done.status, done.exit_code, done.reason))
    assert (tried.status, tried.exit_code, tried.reason) == expected and tried.pin == done.pin == str(file)
    assert done.status == {2.0: "published", None: "failed"}.get(mark, "rejected")
    assert [event.kind for event in state.events()].count("failure") == (mark != 2.0)
    assert push(dry_run=True).status == ("pinned" if mark == 2.0 else tried.status)


def test_a_failure_is_told_with_what_stays_live(push: Push, state: State) -> None:
    """Guards ``wsync log``: the version beside a failure is the live one; and a dry run that fails is not in it."""
    push(1)
    other = replace(load_spec("policies:mlp"), policy_kwargs={"hidden": 4})
    with pytest.raises(LayoutDiffers):
        push(2, spec=other, dry_run=True)
    assert [event.kind for event in state.events()] == ["publish"]
    with pytest.raises(LayoutDiffers):
        push(2, spec=other)
    assert [(event.kind, event.version) for event in state.events()] == [("publish", 1), ("failure", 1)]


def test_a_pin_that_cannot_go_live_is_told_as_one(push: Push, runs: Path, cli: Cli, state: State) -> None:
    """Guards programs and people: which pin it is, what does not fit, and a failure in the status."""
    push(1)
    bad = runs / "bad.safetensors"
    save_file({"0.weight": torch.zeros(3)}, bad)
    assert cli("pin", NAME, str(bad)).returncode == 0
    told = push()
    assert (told.status, told.version, told.pin, told.checkpoint) == ("rejected", 1, str(bad), str(bad))
    assert told.differences and "┃" not in (told.reason or "")
    push()
    assert [event.kind for event in state.events()].count("failure") == 1


def test_a_gate_that_is_interrupted_has_accepted_nothing(push: Push, state: State, monkeypatch: Any) -> None:
    """Guards the history: what ended a push in the midst of its gate is no word of the gate's."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gate, "ask", interrupted)
    spec = load_spec("policies:mlp")
    with pytest.raises(KeyboardInterrupt):
        push(1, spec=replace(spec, hooks=replace(spec.hooks, gate="true")))
    assert state.events() == []


def test_log_follows_a_history_that_is_begun_anew(push: Push, spawn: Spawn, state: State) -> None:
    """Guards a person at a screen where a broken database was removed, as the messages advise."""
    for mark in (1, 2, 3):
        push(mark)
    following = spawn("-m", "wsync", "log", NAME, "--follow", "--json", "-n", "1")
    assert following.stdout
    assert json.loads(following.stdout.readline())["version"] == 3
    for file in state.directory.glob(f"{NAME}.sqlite*"):
        file.unlink()
    push(4)
    assert json.loads(following.stdout.readline())["version"] == 4


def test_a_broken_history_hides_no_pin_and_undoes_nothing(push: Push, program: Cli, state: State) -> None:
    """What an operator asked for is done, and told so, whether or not its line can be written."""
    for mark in (1, 2):
        push(mark)
    state.close()
    for file in state.directory.glob(f"{NAME}.sqlite*"):
        file.unlink()
    (state.directory / f"{NAME}.sqlite").write_bytes(b"no database" * 1000)
    pinned = program("pin", NAME)
    assert pinned.returncode == 0 and "is pinned" in pinned.stdout and "set aside" in pinned.stderr
    assert json.loads(program("status", NAME, "--json").stdout)["pin"].endswith("step_2.safetensors")
    unpinned = program("unpin", NAME)
    assert unpinned.returncode == 0 and "no longer pinned" in unpinned.stdout and state.pin_file.read() is None


def test_log_follows_only_what_is_asked_for(push: Push, spawn: Spawn, state: State) -> None:
    """Guards ``--since`` with ``--follow``: where nothing is so new, what is older is not told after all."""
    push(1)
    following = spawn("-m", "wsync", "log", NAME, "--follow", "--since", "2030-01-01")
    assert following.stdout and "no history" in following.stdout.readline()
    push(2)
    assert following.stdout.readline().split()[2:4] == ["publish", "2"]


def test_log_draws_or_tells(cli: Cli, runtime: Path) -> None:
    """Guards programs against a picture: ``--plot`` goes with neither ``--json`` nor ``--follow``."""
    for other in ("--json", "--follow"):
        done = cli("log", NAME, "--plot", other)
        assert done.returncode == 2 and "--plot" in done.stderr and not done.stdout


def test_config_tells_where_each_setting_comes_from(cli: Cli, tmp_path: Path, runtime: Path) -> None:
    """Guards the order option, variable, TOML, default, and that no secret of a URL is printed."""
    toml = tmp_path / "nets.toml"
    toml.write_text(
        'policy = "policies:mlp"\n[select]\norder = "step"\npattern = "a*"\n[hooks]\nwebhook = "http://u:secret@h/x"\n'
    )
    env = {**os.environ, "WSYNC_MARKER": "STABLE", "WSYNC_PATTERN": "b*"}
    done = cli("config", str(toml), "--json", "--pattern", "c*", env=env)
    told = json.loads(done.stdout)
    assert told["select.pattern"] == {"value": "c*", "origin": "option"}
    assert told["select.marker"] == {"value": "STABLE", "origin": "variable"}
    assert told["select.order"] == {"value": "step", "origin": "TOML"}
    assert told["select.settle"] == {"value": 1.0, "origin": "default"}
    assert "secret@" not in done.stdout
    assert "select.pattern" in cli("config", str(toml)).stdout


def test_config_shows_what_a_watch_would_have(cli: Cli, tmp_path: Path, runtime: Path) -> None:
    """Guards the values beside their origins: those of a variable or an option, in every table, whatever its name."""
    toml = tmp_path / "nets.toml"
    toml.write_text(
        'policy = "policies:mlp"\nmode = "0640"\nslots = 4\n[policy_kwargs]\n"[/]" = 1\n[watch]\npoll = 2\n'
        "[metrics]\nmax_staleness = 100\n"
    )
    env = {**os.environ, "WSYNC_POLL": "5", "WSYNC_KEEP": "7", "WSYNC_NAME": "other", "WSYNC_MAX_STALENESS": "50"}
    told = json.loads(cli("config", str(toml), "--json", "--slots", "6", "--log-format", "json", env=env).stdout)
    expected = {
        "name": ("other", "variable"),
        "slots": (6, "option"),
        "keep": (7, "variable"),
        "watch.poll": (5.0, "variable"),
        "watch.max_failures": (-1, "default"),
        "mode": ("0640", "TOML"),
        "group": (None, "default"),
        "runtime_dir": (str(runtime), "variable"),
        "log_format": ("json", "option"),
        "metrics.max_staleness": (50.0, "variable"),
    }
    assert {name: (told[name]["value"], told[name]["origin"]) for name in expected} == expected
    done = cli("config", str(toml))
    assert done.returncode == 0 and "policy_kwargs.[/]" in done.stdout
    assert json.loads(cli("config", "policies:mlp", "--json").stdout)["policy"]["origin"] == "argument"


def test_a_misspelt_variable_is_an_error(cli: Cli, runtime: Path) -> None:
    """Guards against a setting that nobody obeys; what wsync itself sets for gates is known."""
    done = cli("status", env={**os.environ, "WSYNC_RUNTIM_DIR": "/tmp"})
    assert done.returncode == 2 and "WSYNC_RUNTIME_DIR" in done.stderr
    known = {"WSYNC_HOOK_STAGED": "/x", "WSYNC_HOOK_STEP": "1", "WSYNC_HOOK_NAME": "/y", "WSYNC_HOOK_VERSION": "2"}
    assert cli("status", env={**os.environ, **known}).returncode == 0


def test_variables_of_a_service_say_nothing(cli: Cli, runs: Path) -> None:
    """Guards against pods that cannot start beside a Kubernetes service named wsync; what is misspelt is still told."""
    service = {
        "WSYNC_SERVICE_HOST": "10.0.0.1",
        "WSYNC_SERVICE_PORT": "9464",
        "WSYNC_SERVICE_PORT_METRICS": "9464",
        "WSYNC_PORT": "tcp://10.0.0.1:9464",
        "WSYNC_PORT_9464_TCP": "tcp://10.0.0.1:9464",
        "WSYNC_PORT_9464_TCP_PROTO": "tcp",
        "WSYNC_PORT_9464_TCP_PORT": "9464",
        "WSYNC_PORT_9464_TCP_ADDR": "10.0.0.1",
        "WSYNC_METRICS_PORT": "tcp://10.0.0.2:9464",  # of a service wsync-metrics
        "WSYNC_METRICS_SERVICE_HOST": "10.0.0.2",
    }
    done = cli("config", "policies:mlp", "--json", env={**os.environ, **service})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics.port"] == {"value": None, "origin": "default"}
    misspelt = {"WSYNC_PORT": "9464", "WSYNC_METRIC_PORT": "9464", "WSYNC_SERVICE": "x", "WSYNC_PORT_TCP": "1"}
    for name, value in misspelt.items():
        done = cli("status", env={**os.environ, name: value})
        assert done.returncode == 2 and name in done.stderr


def test_every_variable_that_a_command_reads_is_known() -> None:
    """Guards the list against an option that is added later."""
    command = typer.main.get_command(command_line())
    read = {
        parameter.envvar
        for each in command.commands.values()  # type: ignore[attr-defined]
        for parameter in each.params
        if parameter.envvar
    }
    assert read <= VARIABLES, read - VARIABLES


def test_status_is_for_monitors_too(push: Push, cli: Cli, runs: Path) -> None:
    """Guards a box without segments, and the last failure in ``status``."""
    push(1)
    nowhere = ("status", "--runtime-dir", str(runs / "none"))
    assert cli(*nowhere).returncode == 0 and cli(*nowhere, "--max-staleness", "3600").returncode == 2
    write(runs / "step_2.safetensors", mlp(), float("nan"), 2)
    push()
    assert "NaN" in json.loads(cli("status", NAME, "--json").stdout)["last_failure"]["reason"]
    assert "last failure" in cli("status").stdout
    push(3)
    assert json.loads(cli("status", NAME, "--json").stdout)["last_failure"] is None


def test_moments_and_bars() -> None:
    """Guards the times that people type, and that a picture never hides its worst value."""
    assert time.time() - moment("2h") == pytest.approx(7200, abs=5)
    assert moment("2026-05-01T12:00+00:00") == 1777636800
    assert [bar(value, 4) for value in (0, 2, 4)] == ["▁", "▅", "█"] and bar(0, 0) == "▁"


def test_help_of_every_command_has_an_example_and_fits_80_columns(cli: Cli, runtime: Path) -> None:
    """Guards what a person reads first."""
    command = typer.main.get_command(command_line())
    for name in command.commands:  # type: ignore[attr-defined]
        done = cli(name, "--help", env={**os.environ, "COLUMNS": "80", "TERMINAL_WIDTH": "80"})
        assert done.returncode == 0 and "Example: wsync" in done.stdout, name
        assert max(len(click.unstyle(line)) for line in done.stdout.splitlines()) <= 80, name


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ro", {"rollback"}),
        ("status pol", {NAME}),
        ("rollback ", {NAME}),
        (f"rollback {NAME} --to ", {"1"}),
        ("push x --order ", {"arrival", "mtime", "step", "name"}),
    ],
)
def test_the_shell_completes(push: Push, cli: Cli, typed: str, offered: set[str]) -> None:
    """Guards that commands, standing segments and values are offered after Tab."""
    push(1)
    words = f"wsync {typed}"
    at = str(len(words.split()) - (not words.endswith(" ")))
    asked = {"_WSYNC_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": at}
    assert set(cli(env=os.environ | asked).stdout.split()) == offered


def test_a_dry_run_leaves_no_memory_of_a_refusal(cli: Cli, segment: WritableSegment, runs: Path) -> None:
    """Guards against a push that says nothing because somebody looked before what it would do."""
    write(runs / "step_1.safetensors", mlp(), float("nan"))
    assert cli("push", "policies:mlp", str(runs), "--dry-run").returncode == 65
    assert json.loads(cli("log", NAME, "--json").stdout)["events"] == []
    assert "NaN" in cli("push", "policies:mlp", str(runs)).stderr


def test_looking_for_an_old_version_never_locks_the_live_slot(push: Push) -> None:
    """Guards against a reader that finds the slot of the WORD locked while a rollback looks around."""
    for mark in (1, 2, 3):
        push(mark)
    segment = WritableSegment.open(NAME)
    with segment.publishing(), segment.slot_with(99, "") as found:
        assert found == (None, None)
    seen = []
    with segment.publishing():
        for spare in segment._spare_slots(segment.slot_numbers()):
            seen.append(spare.number)
            lease = segment.lease()
            assert lease is not None and lease.version == 3
            lease.release()
    assert len(seen) == segment.slots - 1 and segment.word & 0xFF not in seen
    segment.close()


def test_follow_ends_quietly(push: Push, spawn: Spawn) -> None:
    """Guards against a traceback, or a failure's exit code, where a person stops looking with Ctrl-C."""
    push(1)
    for arguments in (["log", NAME, "--follow"], ["status", "--watch"]):
        looking = spawn("-m", "wsync", *arguments)
        assert looking.stdout and looking.stdout.readline()
        looking.send_signal(signal.SIGINT)
        assert looking.wait(DEADLINE) == 0, arguments
        assert looking.stderr and looking.stderr.read() == ""
