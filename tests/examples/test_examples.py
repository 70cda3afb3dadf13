"""The examples run as a user runs them."""

from __future__ import annotations

import copy
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from builders import ROOT, write
from processes import DEADLINE, Cli, Spawn
from torch import nn

from wsync.layout.layout import layout_of
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
POLICY = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


@pytest.fixture
def box(runtime: Path, tmp_path: Path) -> Path:
    """The files of CartPole, copied, and their segment, which stands: here torch is already."""
    shutil.copytree(EXAMPLES / "cartpole", tmp_path / "box")
    spec = load_spec(str(tmp_path / "box" / "cartpole.toml"))
    WritableSegment.create(spec.name, layout_of(POLICY), spec=spec.fingerprint()).close()
    return tmp_path / "box"


def test_quickstart_shows_the_return_climb_without_a_restart() -> None:
    """The first command of the README, in a third of its time: a real trainer, watch and policy, which gets better."""
    pytest.importorskip("gymnasium")
    before = set(Path("/dev/shm").glob("wsync-quickstart-*"))
    program = (
        "import sys, quickstart; quickstart.DELAY, quickstart.LEARN, quickstart.EVERY = 1.0, 9.0, 1.0; "
        "sys.exit(quickstart.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=4 * DEADLINE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ versions, .* ms from file to policy", done.stdout)
    assert "\x1b" not in done.stdout
    assert set(Path("/dev/shm").glob("wsync-quickstart-*")) <= before


def test_the_gate_lets_only_a_good_policy_live(box: Path, cli: Cli) -> None:
    """Weights that do not balance the pole are rejected with their return; those that do are published."""
    pytest.importorskip("gymnasium")
    policy = copy.deepcopy(POLICY)
    write(box / "checkpoints" / "step_1.safetensors", policy, 0.0, 1)
    poor = cli("push", "gated.toml", "--json", cwd=box)
    told = json.loads(poor.stdout)
    assert (poor.returncode, told["status"], told["version"]) == (65, "rejected", 0)
    assert re.search(r"mean return \d+ of 5 episodes, and 100 is enough .*gate\.py", told["reason"])
    with torch.no_grad():
        for tensor in policy.parameters():
            tensor.zero_()
        first, second, last = (layer for layer in policy if isinstance(layer, nn.Linear))
        first.weight[0] = torch.tensor([0.0, 0.0, 10.0, 10.0])  # the way that the pole falls
        second.weight[0, 0] = 10.0
        last.weight[:, 0] = torch.tensor([-10.0, 10.0])  # push that way
    write(box / "checkpoints" / "step_2.safetensors", policy, None, 2)
    good = cli("push", "gated.toml", "--json", cwd=box)
    told = json.loads(good.stdout)
    assert (good.returncode, told["status"], told["step"]) == (0, "published", 2), good.stderr


def test_a_server_answers_with_each_version_in_turn(box: Path, cli: Cli, spawn: Spawn) -> None:
    """Forked workers attach, their threads answer, and both follow what is published."""
    write(box / "checkpoints" / "step_1.safetensors", POLICY, 1.0, 1)
    assert cli("push", "cartpole.toml", cwd=box).returncode == 0
    server = spawn("serve.py", "--port", "0", cwd=box)
    assert server.stdout
    said = json.loads(server.stdout.readline())

    def ask() -> int:
        connection = http.client.HTTPConnection("127.0.0.1", said["port"], timeout=DEADLINE)
        with closing(connection):
            connection.request("POST", "/", json.dumps([0.1, 0.2, 0.3, 0.4]))
            answer = json.loads(connection.getresponse().read())
        assert answer["action"] in (0, 1)
        return int(answer["version"])

    try:
        assert {ask() for _ in range(10)} == {1}
        write(box / "checkpoints" / "step_2.safetensors", POLICY, 2.0, 2)
        assert cli("push", "cartpole.toml", cwd=box).returncode == 0
        end = time.monotonic() + DEADLINE
        while {ask() for _ in range(10)} != {2}:
            assert time.monotonic() < end
    finally:
        server.terminate()
    assert server.wait(DEADLINE) == 0
