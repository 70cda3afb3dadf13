"""The drill of examples/operations: each of its lines is run, and says what the page says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT
from pages import run_console
from processes import DEADLINE, Cli

PAGE = (ROOT / "examples" / "operations" / "README.md").read_text()


def plain(text: str, place: Path) -> list[str]:
    """Output without what differs from run to run: paths, sizes, times and the room that is free."""
    text = text.replace(str(place), "/opt/policy")
    text = re.sub(r"in /var/lib/policies|in /\S+-state", "in STATE", text)
    text = re.sub(r"/dev/shm/\S+ has", "/dev/shm has", text)
    text = re.sub(r"[\d,.]+ (bytes|of|free|wanted|are free)", r"N \1", text)
    text = re.sub(r"\b[\d.]+ (ms|s|min \d+ s)\b", "T", text)
    text = re.sub(r"_age=\d+s", "_age=T", text)
    return [line.rstrip() for line in re.sub(r" +", " ", text).splitlines()]


@pytest.mark.slow
def test_the_drill_says_what_the_page_says(runtime: Path, tmp_path: Path) -> None:
    """NaN, another architecture, no room, a killed watch and a rollback: the messages, exit codes and versions."""
    drill = re.search(r"## Break it on purpose\n.*?```console\n(.*?)```", PAGE, re.DOTALL)
    assert drill
    place = tmp_path / "policy"
    place.mkdir()
    for file in ("cartpole/policy.py", "cartpole/cartpole.toml", "operations/break.py"):
        shutil.copy(ROOT / "examples" / file, place)
    assert plain(run_console(drill[1], place), place) == plain(drill[1], place)


@pytest.mark.slow
def test_a_full_shared_memory_stops_only_what_is_new(runtime: Path, tmp_path: Path, cli: Cli) -> None:
    """On a small tmpfs that is full, a new segment has no room, and a standing one still takes versions."""
    for file in ("cartpole/policy.py", "cartpole/cartpole.toml", "operations/break.py"):
        shutil.copy(ROOT / "examples" / file, tmp_path)
    place = runtime / "small"
    place.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "wsync-test", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting takes root")
    try:
        subprocess.run([sys.executable, "break.py", "good", "1"], cwd=tmp_path, check=True, timeout=DEADLINE)
        at = ("--runtime-dir", str(place))
        assert cli("push", "cartpole.toml", *at, cwd=tmp_path).returncode == 0
        with pytest.raises(OSError, match="No space left"), open(place / "filling", "wb", buffering=0) as filling:
            while True:
                filling.write(bytes(4096))
        refused = cli("push", "cartpole.toml", "--name", "other", *at, cwd=tmp_path)
        assert refused.returncode == 1 and "has no room" in refused.stderr and "--runtime-dir" in refused.stderr
        subprocess.run([sys.executable, "break.py", "good", "2"], cwd=tmp_path, check=True, timeout=DEADLINE)
        pushed = cli("push", "cartpole.toml", *at, cwd=tmp_path)
        assert pushed.returncode == 0 and "version 2, step 2" in pushed.stdout
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
