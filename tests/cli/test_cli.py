"""The command line as a shell or cron meets it: exit codes, JSON, messages, and what a run costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import NAME, SPEC, mark_of, report, write
from others import run_main
from policies import mlp
from processes import DEADLINE, Cli
from safetensors.torch import save_file
from torch import nn

import wsync
from wsync.fitting.fit import Fit
from wsync.layout.layout import layout_of
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec
from wsync.sync.syncer import Syncer

PUSH_KEYS = {"status", "name", "version", "step", "checkpoint", "bytes", "seconds", "reason"}


def test_first_push_makes_the_segment(program: Cli, runs: Path) -> None:
    """The newest of a directory is published into a segment that the push itself makes: 0, with every key."""
    write(runs / "step_9.safetensors", mlp(), 9.0)
    newest = write(runs / "step_10.safetensors", mlp(), 10.0)
    result = program("push", SPEC, "runs", "--json")
    data = report(result)
    assert result.returncode == 0 and data.keys() >= PUSH_KEYS
    assert (data["status"], data["name"], data["version"], data["step"]) == ("published", NAME, 1, 10)
    assert (data["checkpoint"], data["bytes"], data["reason"]) == (
        str(newest.absolute()),
        layout_of(mlp()).nbytes,
        None,
    )
    assert data["seconds"] > 0
    assert mark_of(Segment.open(NAME)) == {10.0}


def test_push_again_is_current(cli: Cli, live: WritableSegment) -> None:
    """Nothing new is 0 and publishes nothing, by line and by JSON."""
    data, line = report(cli("push", SPEC, "runs", "--json")), cli("push", SPEC, "runs")
    assert data.keys() >= PUSH_KEYS
    assert (data["status"], data["version"], data["step"]) == ("current", 1, 10)
    assert (line.returncode, line.stderr) == (0, "")
    assert "version 1" in line.stdout and "current" in line.stdout
    assert live.version == 1


def test_push_of_the_next_one(cli: Cli, live: WritableSegment, runs: Path) -> None:
    """A newer checkpoint is the next version; the line says version, step and file."""
    write(runs / "step_11.safetensors", mlp(), 2.0)
    result = cli("push", SPEC, "runs")
    assert result.returncode == 0
    assert all(word in result.stdout for word in (NAME, "version 2", "step 11", "step_11.safetensors"))
    assert (live.version, mark_of(live)) == (2, {2.0})


@pytest.mark.parametrize("place", ["runs", "nowhere", "nowhere/step_1.safetensors"])
def test_nothing_there_is_empty(cli: Cli, runs: Path, place: str) -> None:
    """No complete checkpoint yet is 66 and makes no segment."""
    result = cli("push", SPEC, place, "--json")
    assert result.returncode == 66
    assert report(result).items() >= {"status": "empty", "version": 0, "step": None}.items()
    assert place in report(result)["reason"]
    assert Path(os.environ["WSYNC_RUNTIME_DIR"], NAME).exists() is False


@pytest.mark.parametrize("options", [("elsewhere",), ("elsewhere/a.safetensors", "--marker", "STABLE"),
                                     ("elsewhere/a.safetensors", "--marker", "STABLE", "--force")])  # fmt: skip
def test_a_place_with_nothing_for_us_is_empty_whatever_is_live(
    cli: Cli, live: WritableSegment, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """A script that waits for a place's first checkpoint is not told that it is there already: 66."""
    (tmp_path / "elsewhere").mkdir()
    if "--marker" in options:
        write(tmp_path / "elsewhere" / "a.safetensors", mlp(), 5.0)
    result = cli("push", SPEC, *options, "--json")
    assert result.returncode == 66 and report(result)["version"] == live.version == 1


def test_a_place_that_retention_emptied_is_current(cli: Cli, live: WritableSegment, runs: Path) -> None:
    """What came from there is live still, and nothing is newer."""
    for file in runs.iterdir():
        file.unlink()
    result = cli("push", SPEC, "runs", "--json")
    assert result.returncode == 0 and report(result)["status"] == "current"


def test_only_a_half_written_one_is_empty(cli: Cli, segment: WritableSegment, runs: Path) -> None:
    """In a directory, what is incomplete may become whole: 66, not a rejection."""
    path = write(runs / "step_1.safetensors", mlp(), 1.0)
    path.write_bytes(path.read_bytes()[:-4])
    result = cli("push", SPEC, "runs", "--json")
    assert (result.returncode, report(result)["status"]) == (66, "empty")


def test_half_written_newest_gives_the_one_before(cli: Cli, live: WritableSegment, runs: Path) -> None:
    """The newest that is complete goes live while a newer one is still being written."""
    write(runs / "step_11.safetensors", mlp(), 2.0)
    (runs / "step_12.safetensors").write_bytes((runs / "step_11.safetensors").read_bytes()[:100])
    result = cli("push", SPEC, "runs", "--json")
    assert (result.returncode, report(result)["step"], mark_of(live)) == (0, 11, {2.0})


def test_other_publisher_is_busy(cli: Cli, live: WritableSegment, runs: Path) -> None:
    """A segment that another publisher holds is 75, and the reason names it."""
    write(runs / "step_11.safetensors", mlp(), 2.0)
    with live.publishing():
        result = cli("push", SPEC, "runs", "--json")
    assert (result.returncode, report(result)["status"], report(result)["version"]) == (75, "busy", 1)
    assert f"pid {os.getpid()}" in report(result)["reason"]


def test_leased_spare_slots_are_busy(cli: Cli, live: WritableSegment, runs: Path) -> None:
    """Where readers lease every slot that there may be, a push is 75 and names them; what is live stays."""
    readers = []
    for step in (11, 12):
        readers.append(wsync.attach(mlp(), NAME, mode="swap"))
        write(runs / f"step_{step}.safetensors", mlp(), float(step))
        assert Syncer(load_spec(SPEC), runs).once().status == "published"
    write(runs / "step_13.safetensors", mlp(), 13.0)
    result = cli("push", SPEC, "runs", "--max-slots", "3")
    assert result.returncode == 75 and result.stdout == ""
    assert f"pid {os.getpid()}, version 1" in result.stderr and "--max-slots" in result.stderr
    assert mark_of(live) == {12.0}
    for reader in readers:
        reader.close()
    assert cli("push", SPEC, "runs").returncode == 0


def test_failure_is_one(cli: Cli, live: WritableSegment) -> None:
    """A segment that cannot be used is 1, a JSON object says why, and nothing is a traceback."""
    (live.path / "control").write_bytes(b"")
    result = cli("push", SPEC, "runs", "--json")
    assert result.returncode == 1 and report(result)["status"] == "failed"
    assert "wsync rm" in report(result)["reason"] and "Traceback" not in result.stderr


def test_failure_has_the_fields_of_any_push(cli: Cli, live: WritableSegment, runtime: Path) -> None:
    """The object of a failed push names the segment, and the version that stays live where that can be told."""
    state = Path(os.environ["WSYNC_STATE_DIR"])
    state.mkdir(exist_ok=True)
    (state / f"{NAME}.pin").write_bytes(b"{")
    data = report(cli("push", SPEC, "runs", "--json"))
    assert data.keys() >= PUSH_KEYS and (data["status"], data["name"], data["version"]) == ("failed", NAME, 1)
    (live.path / "control").write_bytes(b"")
    assert report(cli("push", SPEC, "runs", "--json"))["version"] == 0


def test_named_older_file_is_published(cli: Cli, live: WritableSegment, runs: Path) -> None:
    """A file that is named is what the operator wants, whatever its age; the directory then has nothing newer."""
    old = write(runs / "step_3.safetensors", mlp(), 3.0)
    os.utime(old, ns=(0, 0))
    assert report(cli("push", SPEC, "runs", "--json"))["status"] == "current"
    result = cli("push", SPEC, str(old), "--json")
    data = report(result)
    assert (result.returncode, data["status"], data["version"], data["step"]) == (0, "published", 2, 3)
    assert mark_of(live) == {3.0}
    assert report(cli("push", SPEC, str(old), "--json"))["status"] == "current"


def test_force_publishes_again(cli: Cli, live: WritableSegment) -> None:
    """What is live already gets a new version only by --force, or by its variable."""
    assert report(cli("push", SPEC, "runs", "--force", "--json"))["version"] == 2
    environment = {**os.environ, "WSYNC_FORCE": "1"}
    assert report(cli("push", SPEC, "runs", "--json", env=environment))["version"] == 3
    assert (live.version, mark_of(live)) == (3, {1.0})


def test_dry_run_makes_nothing(runs: Path, runtime: Path) -> None:
    """A rehearsal without a segment checks the checkpoint and leaves shared memory as it was."""
    write(runs / "step_10.safetensors", mlp(), 1.0)
    code, out, _ = run_main("push", SPEC, "runs", "--dry-run")
    assert code == 0 and "would be published" in out
    assert list(runtime.iterdir()) == []


def test_dry_run_publishes_nothing(cli: Cli, live: WritableSegment, runs: Path) -> None:
    """A rehearsal beside a live version says what would come, refuses what would be refused, and changes neither."""
    write(runs / "step_11.safetensors", mlp(), 2.0)
    before = [(live.path / f"slot-{slot}.safetensors").read_bytes() for slot in range(3)]
    data = report(cli("push", SPEC, "runs", "--json", env={**os.environ, "WSYNC_DRY_RUN": "1"}))
    assert (data["status"], data["version"], data["step"]) == ("checked", 1, 11)
    write(runs / "step_12.safetensors", mlp(), float("inf"))
    code, out, _ = run_main("push", SPEC, "runs/step_12.safetensors", "--dry-run", "--json")
    assert (code, json.loads(out)["status"]) == (65, "rejected")
    assert [(live.path / f"slot-{slot}.safetensors").read_bytes() for slot in range(3)] == before


def imported(stderr: str) -> set[str]:
    """The modules that a process and its children imported, told by the interpreter."""
    found = {line.rpartition("|")[2].strip() for line in stderr.splitlines() if line.startswith("import time:")}
    assert "json" in found
    return found


def test_nothing_to_do_imports_little(program: Cli, live: WritableSegment) -> None:
    """A cron job that finds nothing new imports no torch, and not what only staging or drawing takes."""
    result = program("push", SPEC, "runs", env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert "current" in result.stdout
    heavy = {"torch", "tensordict", "numpy", "inotify_simple", "rich.console", "safetensors", "policies", "_hashlib"}
    assert not imported(result.stderr) & heavy


def test_publishing_imports_no_torch(program: Cli, live: WritableSegment, runs: Path) -> None:
    """A new checkpoint goes into a standing segment without torch and without the user's code."""
    write(runs / "step_11.safetensors", mlp(), 2.0)
    result = program("push", SPEC, "runs", env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert "version 2" in result.stdout
    assert not imported(result.stderr) & {
        "torch",
        "tensordict",
        "inotify_simple",
        "rich.console",
        "safetensors",
        "policies",
    }


@pytest.mark.parametrize("noticed", ["by its file", "by the checkpoint"])
def test_changed_policy_is_told_from_a_wrong_checkpoint(runs: Path, noticed: str) -> None:
    """When the policy's code changed since its segment was made, the segment is named as stale, not the checkpoint."""
    Path("net.py").write_text("from torch import nn\nmake = lambda: nn.Linear(6, 2)\n")
    spec = "of another net.py" if noticed == "by its file" else load_spec("net:make").fingerprint()
    segment = WritableSegment.create("net.make", layout_of(nn.Linear(4, 2)), spec=spec)
    write(runs / "step_11.safetensors", nn.Linear(6, 2), 1.0)
    code, _, err = run_main("push", "net:make", "runs/step_11.safetensors")
    assert code == 1 and "Traceback" not in err
    assert "wsync rm net.make" in err
    assert "F32 [2, 6]" in err and "F32 [2, 4]" in err
    assert segment.version == 0


def test_status_without_segments(cli: Cli, runs: Path, runtime: Path) -> None:
    """Nothing at all is no error: an empty list."""
    result = cli("status")
    assert (result.returncode, result.stdout, result.stderr) == (0, "no segments\n", "")
    assert report(cli("status", "--json", "--runtime-dir", str(runtime / "nowhere"))) == {"segments": []}


def test_status_shows_readers_and_their_lag(program: Cli, live: WritableSegment, runs: Path) -> None:
    """Each reader is there with its pid, its version and how many versions it lags."""
    with wsync.attach(mlp(), NAME, mode="swap"), wsync.attach(mlp(), NAME, mode="copy") as fresh:
        for step in (11, 12):
            write(runs / f"step_{step}.safetensors", mlp(), float(step))
            Syncer(load_spec(SPEC), runs).once()
        fresh.refresh()
        data, text = report(program("status", NAME, "--json")), program("status", NAME).stdout
        everything = report(program("status", env={**os.environ, "WSYNC_JSON": "1"}))
    assert data.keys() >= {"name", "version", "step", "checkpoint", "published_at", "pin", "last_failure", "readers"}
    assert (data["name"], data["version"], data["step"]) == (NAME, 3, 12)
    assert data["checkpoint"].endswith("runs/step_12.safetensors")
    readers = {r["mode"]: r for r in data["readers"]}
    assert all(r.keys() >= {"pid", "version", "lag", "since"} and r["pid"] == os.getpid() for r in data["readers"])
    assert {mode: (r["version"], r["lag"]) for mode, r in readers.items()} == {"swap": (1, 2), "copy": (3, 0)}
    assert [segment["name"] for segment in everything["segments"]] == [NAME]
    assert all(word in text for word in (NAME, "version 3", "step 12", "step_12.safetensors", "lag", "swap", "copy"))
    rows = [line.split() for line in text.splitlines() if str(os.getpid()) in line.split()]
    assert sorted(row[row.index(str(os.getpid())) + 1 :][:2] for row in rows) == [["1", "2"], ["3", "0"]]


def test_status_before_the_first_version(cli: Cli, runs: Path) -> None:
    """A segment that a policy made and nobody published into is shown as that."""
    WritableSegment.create("nets", layout_of(mlp()))
    data = report(cli("status", "nets", "--json"))
    assert (data["version"], data["step"], data["checkpoint"], data["readers"]) == (0, None, None, [])
    assert "no version yet" in cli("status").stdout


def test_rm_removes(cli: Cli, live: WritableSegment, runtime: Path) -> None:
    """rm removes the segment, says so, and a policy that is attached keeps its weights."""
    with wsync.attach(mlp(), NAME, mode="copy") as reader:
        result = cli("rm", NAME)
        assert (result.returncode, result.stderr) == (0, "") and NAME in result.stdout
        assert list(runtime.iterdir()) == []
        assert reader.refresh() is False and reader.version == 1
    result = cli("rm", NAME)
    assert result.returncode == 1 and NAME in result.stderr


def test_rm_removes_what_is_broken(cli: Cli, live: WritableSegment, runtime: Path) -> None:
    """The way out that the message names, rm, works for a segment that cannot be read."""
    (live.path / "layout.json").write_text("{}")
    assert "wsync rm" in cli("push", SPEC, "runs").stderr
    assert cli("rm", NAME).returncode == 0
    assert list(runtime.iterdir()) == []


def test_status_shows_the_others_beside_a_broken_one(cli: Cli, live: WritableSegment) -> None:
    """A segment that cannot be read is named, and the others are still shown."""
    (WritableSegment.create("broken", layout_of(mlp())).path / "layout.json").unlink()
    result = cli("status")
    assert NAME in result.stdout and "version 1" in result.stdout
    assert "broken" in result.stdout + result.stderr and "Traceback" not in result.stderr


def test_variables_stand_for_options(cli: Cli, runs: Path, runtime: Path) -> None:
    """Name, slots, JSON and the runtime directory come from WSYNC_ variables where no option says otherwise."""
    write(runs / "step_10.safetensors", mlp(), 1.0)
    place = runtime / "other"
    variables = {"NAME": "actor", "SLOTS": "4", "JSON": "1", "RUNTIME_DIR": str(place)}
    environment = {**os.environ, **{f"WSYNC_{key}": value for key, value in variables.items()}}
    assert report(cli("push", SPEC, "runs", env=environment))["name"] == "actor"
    assert (Segment.open("actor", place).slots, Segment.open("actor", place).version) == (4, 1)
    assert report(cli("push", SPEC, "elsewhere", "--name", "critic", env=environment))["name"] == "critic"


def test_version_and_module(program: Cli, runs: Path) -> None:
    """`python -m wsync --version` answers in one line, without torch."""
    result = program("--version", env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert (result.returncode, result.stdout) == (0, f"wsync {wsync.__version__}\n")
    assert not imported(result.stderr) & {"torch", "numpy", "rich.console"}


def test_help_lists_the_commands(cli: Cli, runs: Path) -> None:
    """The bare help names every command."""
    result = cli("-h")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("push", "watch", "status", "rm", "bench"))


def test_toml_spec(runs: Path) -> None:
    """A TOML file gives policy, arguments, name and checkpoints, relative to itself; its own name is the default."""
    Path("sub").mkdir()
    Path("sub/actor.toml").write_text('policy = "policies:mlp"\ncheckpoints = "../runs"\n[policy_kwargs]\nhidden = 3\n')
    write(runs / "step_10.safetensors", mlp(hidden=3), 1.0)
    data = json.loads(run_main("push", "sub/actor.toml", "--json")[1])
    assert (data["status"], data["name"]) == ("published", "actor")
    assert Segment.open("actor").layout == layout_of(mlp(hidden=3))


def test_another_system_is_told_in_words() -> None:
    """Where there is no flock, futex or tmpfs, one line says so, before anything that is missing there is imported."""
    code = "import sys; sys.platform = 'darwin'; from wsync.cli.commands import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE)
    assert (
        done.returncode == 2 and "Linux" in done.stderr and "darwin" in done.stderr and "Traceback" not in done.stderr
    )


def test_each_cast_is_told_once(runtime: Path, tmp_path: Path) -> None:
    """Guards against floats that change their precision in silence, and against a line at every version."""
    half = {name: tensor.to(torch.float16) for name, tensor in mlp().state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    code, _, err = run_main("push", "policies:mlp", str(tmp_path / "half.safetensors"), "--cast", "--name", "nets")
    assert code == 0, err
    assert [line.partition(" F32: ")[0] for line in err.splitlines()] == ["nets: 4 tensors are cast from F16 to"]
    with Syncer(replace(load_spec("policies:mlp", name="nets"), weights=Fit(cast=True)), tmp_path) as syncer:
        first = syncer.once(force=True)
        second = syncer.once(force=True)
    assert first.status == second.status == "published"
    assert len(first.casts) == 1 and second.casts == ()
