"""The examples run as a user runs them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEADLINE, TESTS, Cli, Spawn

EXAMPLES = TESTS.parent / "examples"


def test_quickstart_shows_the_return_climb_without_a_restart() -> None:
    """The first command of the README: a real trainer, watch and policy; versions arrive and the policy gets better."""
    pytest.importorskip("gymnasium")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py")], capture_output=True, text=True, timeout=4 * DEADLINE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ versions, .* ms from file to policy", done.stdout)
    assert "\x1b" not in done.stdout
    assert not list(Path("/dev/shm").glob("wsync-quickstart-*"))


def test_the_cartpole_files_work_when_copied(tmp_path: Path, cli: Cli, spawn: Spawn) -> None:
    """The trainer writes checkpoints that a push takes, and the policy process plays on them."""
    pytest.importorskip("gymnasium")
    box = tmp_path / "box"
    shutil.copytree(EXAMPLES / "cartpole", box)
    trainer = spawn("train.py", "checkpoints", "--seconds", "2", "--every", "1", cwd=box)
    assert trainer.wait(DEADLINE) == 0
    pushed = cli("push", "cartpole.toml", "--json", cwd=box)
    assert json.loads(pushed.stdout)["status"] == "published", pushed.stderr
    player = spawn("play.py", "--episodes", "2", cwd=box)
    out, err = player.communicate(timeout=DEADLINE)
    assert player.returncode == 0, err
    assert [json.loads(line) for line in out.splitlines() if '"return"' in line]


def test_the_policy_process_ends_cleanly_on_a_signal(tmp_path: Path, cli: Cli, spawn: Spawn) -> None:
    """SIGTERM ends the example's policy process with status 0, and its reader is gone."""
    pytest.importorskip("gymnasium")
    box = tmp_path / "box"
    shutil.copytree(EXAMPLES / "cartpole", box)
    trainer = spawn("train.py", "checkpoints", "--seconds", "1", "--every", "1", cwd=box)
    assert trainer.wait(DEADLINE) == 0
    assert cli("push", "cartpole.toml", cwd=box).returncode == 0
    player = spawn("play.py", cwd=box)
    assert player.stdout is not None
    player.stdout.readline()
    player.send_signal(signal.SIGTERM)
    assert player.wait(DEADLINE) == 0
    assert json.loads(cli("status", "cartpole", "--json", cwd=box).stdout)["readers"] == []
