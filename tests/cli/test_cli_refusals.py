"""What the command line refuses: checkpoints that must not go live, and input that makes no sense."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import NAME, SPEC, mark_of, raw, report, write
from others import run_main
from policies import mlp
from processes import Cli
from safetensors.torch import save_file
from torch import nn

from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment


def state(mark: float = 2.0) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, mark) for name, tensor in mlp().state_dict().items()}


def saved(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """A checkpoint of the policy but for one change."""

    def write_changed(path: Path) -> None:
        tensors = state()
        change(tensors)
        save_file(tensors, path)

    return write_changed


def cut(path: Path) -> None:
    save_file(state(), path)
    path.write_bytes(path.read_bytes()[:-1])


def overlong(path: Path) -> None:
    save_file(state(), path)
    path.write_bytes(path.read_bytes() + b"\0")


MISFITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], list[str]]] = {
    "missing": (lambda t: t.pop("2.bias"), ["2.bias", "F32", "[2]", "absent"]),
    "unknown": (lambda t: t.update(extra=torch.ones(3)), ["extra", "absent", "F32", "[3]"]),
    "shape": (lambda t: t.update({"0.bias": torch.ones(9)}), ["0.bias", "F32", "[8]", "F32", "[9]"]),
    "dtype": (lambda t: t.update({"0.bias": torch.ones(8).half()}), ["0.bias", "F32", "[8]", "F16", "[8]"]),
}

BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (saved(lambda t: t["0.weight"][3, 2].fill_(float("nan"))), "0.weight"),
    "infinity": (saved(lambda t: t["2.bias"][0].fill_(float("-inf"))), "2.bias"),
    "truncated": (cut, "incomplete"),
    "empty": (lambda path: path.touch(), "incomplete"),
    "too long": (overlong, "more than"),
    "garbage": (lambda path: path.write_bytes(b"\x10\0\0\0\0\0\0\0" + os.urandom(500)), "not a safetensors file"),
    "pickle": (lambda path: torch.save(state(), path), "safetensors"),
    "header bomb": (lambda path: raw(path, b"{}", length=1 << 62), "bound"),
    "deep header": (lambda path: raw(path, b"[" * 200_000), "not a safetensors file"),
    "huge tensor": (
        lambda path: raw(path, {"a": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}),
        "safetensors",
    ),
    "fifo": (os.mkfifo, "not a regular file"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_misfit_is_rejected_with_a_table(live: WritableSegment, kind: str) -> None:
    """A checkpoint of other tensors is 65, every difference is a row of a table, and what is live stays live."""
    change, row = MISFITS[kind]
    saved(change)(Path("runs/step_11.safetensors"))
    code, out, err = run_main("push", SPEC, "runs")
    assert code == 65 and out == "" and "Traceback" not in err
    rows = [line.split() for line in err.splitlines()]
    assert ["tensor", "expected", "found"] in rows and row in rows, err
    assert "step_11.safetensors" in err and "Version 1 stays live." in err
    assert (live.version, mark_of(live)) == (1, {1.0})


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_checkpoint_is_refused(cli: Cli, live: WritableSegment, kind: str) -> None:
    """What is no whole, finite checkpoint is refused with its reason, and what is live stays live."""
    make, reason = BROKEN[kind]
    make(Path("runs/step_11.safetensors"))
    result = cli("push", SPEC, "runs/step_11.safetensors", "--json")
    data = report(result)
    assert (result.returncode, data["status"], data["version"]) == (65, "rejected", 1)
    assert reason in data["reason"] + json.dumps(data.get("differences")) and "Traceback" not in result.stderr
    assert (live.version, mark_of(live)) == (1, {1.0})


def test_rejection_in_json_carries_the_rows(cli: Cli, live: WritableSegment) -> None:
    """A program gets the table as data: one object for each tensor that differs."""
    write(Path("runs/step_11.safetensors"), mlp(hidden=16), 2.0)
    data = report(cli("push", SPEC, "runs", "--json"))
    assert data["status"] == "rejected" and {d["name"] for d in data["differences"]} == {
        "0.weight",
        "0.bias",
        "2.weight",
    }
    assert all(d.keys() == {"name", "expected", "found"} for d in data["differences"])


def test_good_one_behind_a_bad_one_is_published(cli: Cli, live: WritableSegment, runs: Path) -> None:
    """A rejected newest does not hold back a good one that is newer than what is live."""
    write(runs / "step_11.safetensors", mlp(), 11.0)
    write(runs / "step_12.safetensors", mlp(), float("nan"))
    data = report(cli("push", SPEC, "runs", "--json"))
    assert (data["status"], data["step"], mark_of(live)) == ("published", 11, {11.0})


def test_rejected_first_push_publishes_nothing(runs: Path) -> None:
    """A bad first checkpoint leaves a segment without a version, which no policy takes for weights."""
    write(runs / "step_1.safetensors", mlp(), float("nan"))
    code, out, _ = run_main("push", SPEC, "runs", "--json")
    assert (code, json.loads(out)["version"]) == (65, 0)
    assert Segment.open(NAME).live() is None


USAGE = {
    "no command": "",
    "unknown command": "pull policies:mlp",
    "unknown option": "push policies:mlp runs --fast",
    "no spec": "push",
    "no spec to watch": "watch",
    "spec without a colon": "push policies runs",
    "spec that is a path": "push ./policies.py:mlp runs",
    "no such module": "push no_such_module:make runs",
    "no policy": "push policies:not_a_policy runs",
    "no such TOML": "push missing.toml runs",
    "broken TOML": "push broken.toml runs",
    "unknown key": "push unknown.toml runs",
    "wrong kind": "push kind.toml runs",
    "no checkpoints": "push policies:mlp",
    "one slot": "push policies:mlp runs --slots 1",
    "slots in words": "push policies:mlp runs --slots three",
    "name with a slash": "push policies:mlp runs --name ../x",
    "empty name": "push policies:mlp runs --name=.",
    "status of a path": "status ../x",
    "rm of nothing": "rm",
    "rm of a path": "rm a/b",
    "log format": "watch policies:mlp runs --log-format xml",
    "poll of nothing": "watch policies:mlp runs --poll 0",
    "poll that is not a number": "watch policies:mlp runs --poll nan",
    "wait that is not a number": "push policies:mlp runs --wait nan",
    "unset variable for a place": "inspect ''",
    "unset variable for a checkpoint": "push policies:mlp ''",
    "bound on a screen": "status --watch --max-lag 1",
}


@pytest.mark.parametrize("kind", USAGE)
def test_wrong_input_is_two(runs: Path, runtime: Path, kind: str) -> None:
    """Input that makes no sense is 2 with a message for people: no traceback, nothing on stdout, nothing made."""
    Path("broken.toml").write_text("policy = \n")
    Path("unknown.toml").write_text('policy = "policies:mlp"\npolcy_kwargs = 3\n')
    Path("kind.toml").write_text('policy = "policies:mlp"\nslots = "three"\n')
    write(runs / "step_1.safetensors", mlp(), 1.0)
    code, out, err = run_main(*shlex.split(USAGE[kind]))
    assert code == 2, out + err
    assert "Traceback" not in err
    if kind == "no command":
        assert "Usage" in out + err
    else:
        assert err and out == ""
    assert list(runtime.iterdir()) == []


def test_messages_suggest_what_was_meant(program: Cli, runs: Path) -> None:
    """A near miss is answered with the word that was probably meant, also of what a process of its own looked for."""
    Path("unknown.toml").write_text('policy = "policies:mlp"\npolcy_kwargs = 3\n')
    assert "policy_kwargs" in program("push", "unknown.toml", "runs").stderr
    write(runs / "step_1.safetensors", mlp(), 1.0)
    result = program("push", "policies:mpl", "runs")
    assert result.returncode == 2 and "'mlp'" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "place",
    [
        "file",
        "link",
        "/proc/wsync-test",
    ],
)
def test_impossible_runtime_directory_is_no_traceback(runs: Path, place: str) -> None:
    """Where no segment can be made the message says so: 1 for what lies there, and what to do."""
    Path("file").touch()
    Path("link").symlink_to("runs")
    write(runs / "step_1.safetensors", mlp(), 1.0)
    code, _, err = run_main("push", SPEC, "runs", "--runtime-dir", place)
    assert code == 1 and "Traceback" not in err
    assert "--runtime-dir" in err


def test_users_own_error_is_told_with_its_line(program: Cli, runs: Path) -> None:
    """When the policy's own code fails, its error and line are shown, without our stack."""
    Path("own.py").write_text("import torch\n\ndef make():\n    return torch.nn.Linear(1, 2) + no_such_name\n")
    write(runs / "step_1.safetensors", nn.Linear(1, 2), 1.0)
    result = program("push", "own:make", "runs")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "NameError" in result.stderr and "own.py:4" in result.stderr


def test_what_the_users_code_prints_is_not_our_output(program: Cli, runs: Path) -> None:
    """stdout carries one JSON object, whatever the policy's module prints."""
    Path("chatty.py").write_text(
        "from torch import nn\nprint('hello')\n\ndef make():\n    print('x')\n    return nn.Linear(1, 2)\n"
    )
    write(runs / "step_1.safetensors", nn.Linear(1, 2), 1.0)
    assert report(program("push", "chatty:make", "runs", "--json"))["status"] == "published"


def test_closed_outputs_are_no_error(cli: Cli, live: WritableSegment) -> None:
    """Guards a service that starts its children without stdout and stderr."""
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(["/bin/sh", "-c", f"{sys.executable} -m wsync status {closed}"], capture_output=True)
        assert done.returncode == 0 and not done.stderr, done.stderr.decode()


def test_no_word_of_a_file_moves_the_terminal(runtime: Path, tmp_path: Path) -> None:
    """Guards every line that is printed: names of files, tensors and metadata are others', and may hold escapes."""
    place = tmp_path / "[/x]"  # also no markup of rich's
    place.mkdir(parents=True)
    odd, bad = place / "\x1b[31mgood\n.safetensors", place / "\x1b[31mbad.safetensors"
    save_file(mlp().state_dict(), odd, metadata={"note\x1b[32m": "\x1b]0;title\x07", "step": "1"})
    os.utime(odd, (1, 1))
    save_file({"\x1b[33mbody": torch.zeros(1)}, bad)
    for arguments in (
        ("push", "policies:mlp", str(odd)),
        ("push", "policies:mlp", str(place), "--force"),
        ("push", "policies:mlp", str(place / "\x1b[31mnone")),
        ("pin", "policies.mlp", str(odd)),
        ("status",),
        ("log", "policies.mlp"),
        ("unpin", "policies.mlp"),
        ("inspect", str(place)),
        ("inspect", str(odd)),
        ("inspect", str(bad), "--spec", "policies:mlp"),
        ("rollback", "policies.mlp", "--to", "1"),
    ):
        _, out, err = run_main(*arguments)
        said = out + err
        assert said and "\x1b" not in said and "\x07" not in said and "Traceback" not in said, arguments
