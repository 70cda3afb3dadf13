"""The page on trainers: its example learns for real beside two attached players, and its lines run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from builders import ROOT
from policies import mlp
from processes import DEADLINE, Spawn

from wsync.segment.segment import Segment

EXAMPLE = ROOT / "examples" / "stable_baselines3"
BLOCKS = re.findall(r"^```(.*)\n((?s:.*?))^```$", (EXAMPLE / "README.md").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_two_players_follow_what_stable_baselines3_learns(runtime: Path, spawn: Spawn) -> None:
    """The console's commands: both players play the policy of the last step, and return more than with the first."""
    pytest.importorskip("stable_baselines3")
    (console,) = [text for language, text in BLOCKS if language == "console"]
    commands = [shlex.split(line.partition(">")[0].strip("$ &")) for line in console.splitlines()]
    processes = [spawn(*command[1:], cwd=EXAMPLE) for command in commands]
    for process, command in zip(processes, commands, strict=True):
        out, err = process.communicate(timeout=4 * DEADLINE)
        assert process.returncode == 0, err
        if command[1] == "player.py":
            lines = re.findall(r"^version +(\d+)   step +(\d+)   return +(\d+)$", out, re.MULTILINE)
            first, *_, last = [tuple(map(int, line)) for line in lines]
            assert first[0] < last[0] and last[1] >= int(command[2]) and max(first[2], 99) < last[2]


def test_the_lines_of_a_loop_publish(runtime: Path) -> None:
    """The page's plain loop, with a policy: three versions, with their steps."""
    (loop,) = [text for language, text in BLOCKS if language == "python" and "publisher" in text]
    exec(loop, {"policy": mlp()})
    live = Segment.open("cartpole").live()
    assert live and (live.version, live.step) == (3, 2)
