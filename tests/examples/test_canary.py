"""The canary example: what is better is promoted, what is worse is rolled back, and the page shows what is said."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT
from processes import DEADLINE

EXAMPLE = ROOT / "examples" / "canary"


def plain(text: str) -> list[str]:
    """Output without how long things took."""
    return [" ".join(line.split()) for line in re.sub(r"\b[\d.]+ (ms|s)\b", "T", text).splitlines()]


@pytest.mark.slow
def test_the_page_shows_what_is_said(runtime: Path, tmp_path: Path) -> None:
    """A promote that two readers follow, and a rollback that the canary follows, by the returns of real episodes."""
    pytest.importorskip("gymnasium")
    place, programs = tmp_path / "canary", tmp_path / "bin"
    shutil.copytree(EXAMPLE, place)
    programs.mkdir()
    for name, module in (("wsync", "-m wsync "), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
        (programs / name).chmod(0o755)
    (console,) = re.findall(r"^```console\n(.*?)```$", (EXAMPLE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line[2:] for line in console.splitlines() if line.startswith("$ ")]
    script = "\n".join(f"cat <<'END'\n$ {line}\nEND\n{line}" for line in lines)
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=3 * DEADLINE,
    )  # fmt: skip
    assert plain(done.stdout) == plain(console)
