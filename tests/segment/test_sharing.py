"""One segment, many at once: leases of old versions, containers' pid namespaces, makers against removers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from builders import NAME, marks, write
from policies import mlp
from processes import DEADLINE, Cli, Spawn

import wsync
from wsync.layout.layout import layout_of

pytestmark = pytest.mark.slow

UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable]


def may_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "-c", ""], capture_output=True, check=False, timeout=DEADLINE).returncode == 0


def test_status_tells_of_a_lease_that_an_old_version_holds(program: Cli, runtime: Path, tmp_path: Path) -> None:
    """Guards the answer to "who keeps a slot back": a kept tensor shows, with its version, until it is gone."""
    for step in (1, 2, 3):
        write(tmp_path / f"step_{step}.safetensors", mlp(), float(step), step)
    assert program("push", "policies:mlp", str(tmp_path / "step_1.safetensors")).returncode == 0
    policy = mlp()
    with wsync.attach(policy, NAME, mode="swap") as reader:
        kept = next(policy.parameters()).detach()
        assert program("push", "policies:mlp", str(tmp_path / "step_2.safetensors")).returncode == 0
        assert reader.refresh()
        (told,) = json.loads(program("status", NAME, "--json").stdout)["readers"]
        assert (told["version"], told["holds"]) == (2, [1]) and told["lease_since"] < told["since"]
        assert ", version 1" in program("status", NAME).stdout
        assert torch.equal(kept, torch.ones_like(kept))
        del kept
        assert program("push", "policies:mlp", str(tmp_path / "step_3.safetensors")).returncode == 0
        assert reader.refresh()
        (told,) = json.loads(program("status", NAME, "--json").stdout)["readers"]
        assert (told["version"], told["holds"]) == (3, [])


@pytest.mark.skipif(not may_unshare(), reason="this user may not make pid namespaces")
def test_pids_of_other_namespaces_mean_nothing(runtime: Path, tmp_path: Path, spawn: Spawn, cli: Cli) -> None:
    """Guards locks that do not hang on pids: reader and publishers are each pid 1 of a namespace of their own."""
    write(tmp_path / "step_1.safetensors", mlp(), 1.0, 1)
    code = (
        "import wsync, policies, builders; p = policies.mlp(); "
        f"r = wsync.attach(p, {NAME!r}, mode='swap', timeout={DEADLINE})\n"
        "while True:\n"
        "    print(r.version, *builders.marks(p), flush=True)\n"
        "    input()\n"
        "    r.refresh()\n"
    )
    push = [*UNSHARE, "-m", "wsync", "push", "policies:mlp", str(tmp_path)]
    assert subprocess.run(push, check=False, timeout=DEADLINE).returncode == 0
    command = ["-c", "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])", *UNSHARE, "-c", code]
    reader = spawn(*command, stdin=subprocess.PIPE)
    assert reader.stdin and reader.stdout
    assert reader.stdout.readline() == "1 1.0\n"
    for step in range(2, 6):  # more than there are slots
        write(tmp_path / f"step_{step}.safetensors", mlp(), float(step), step)
        assert subprocess.run(push, check=False, timeout=DEADLINE).returncode == 0
        if step != 4:  # one version it skips
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == f"{step} {step}.0\n"
    (told,) = json.loads(cli("status", NAME, "--json").stdout)["readers"]
    assert (told["pid"], told["version"]) == (1, 5)
    reader.kill()  # its child goes with it
    reader.wait(DEADLINE)
    deadline = time.monotonic() + DEADLINE
    while json.loads(cli("status", NAME, "--json").stdout)["readers"] and time.monotonic() < deadline:
        pass
    assert json.loads(cli("status", NAME, "--json").stdout)["readers"] == []


def test_makers_and_removers_at_once(runtime: Path, tmp_path: Path, spawn: Spawn, cli: Cli) -> None:
    """Guards against a traceback, a half-made segment or a lock left where pushes and removals meet."""
    write(tmp_path / "step_1.safetensors", mlp(), 1.0, 1)
    code = (
        "import sys; from wsync.segment.writable import WritableSegment, remove; from wsync.errors import WsyncError; "
        "from wsync.layout.layout import Layout; from wsync.checkpoints.checkpoint import Checkpoint; "
        "from wsync.segment.publishing import publish; "
        f"layout = Layout.from_json({layout_of(mlp()).to_json()!r}); print('ready', flush=True); input()\n"
        "for n in range(60):\n"
        "    try:\n"
        "        if sys.argv[1] == 'rm':\n"
        f"            remove({NAME!r})\n"
        "        else:\n"
        f"            s = WritableSegment.create({NAME!r}, layout)\n"
        "            with s.publishing(), Checkpoint(sys.argv[2]) as c:\n"
        "                publish(s, c)\n"
        "            s.close()\n"
        "    except WsyncError:\n"
        "        pass\n"
    )
    sides = [spawn("-c", code, side, str(tmp_path / "step_1.safetensors"), stdin=-1) for side in ("rm", "push") * 2]
    for side in sides:
        assert side.stdout and side.stdout.readline() == "ready\n"
    for side in sides:
        _, complaint = side.communicate("\n", timeout=DEADLINE)
        assert (side.returncode, complaint) == (0, "")
    assert cli("push", "policies:mlp", str(tmp_path)).returncode == 0
    policy = mlp()
    with wsync.attach(policy, NAME, timeout=DEADLINE):
        assert marks(policy) == {1.0}
    assert {p.name for p in runtime.iterdir()} - {"state"} == {NAME}
    assert torch.equal(next(policy.parameters()), torch.ones_like(next(policy.parameters())))
