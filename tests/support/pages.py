"""Runs what a page shows in a console block."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from processes import DEADLINE


def run_console(console: str, place: Path) -> str:
    """The commands of a block, in a directory, with this interpreter's wsync and python; the block as it comes out."""
    programs = place.with_name(f"{place.name}-bin")
    programs.mkdir()
    for name, module in (("wsync", "-m wsync "), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
        (programs / name).chmod(0o755)
    lines = [line[2:] for line in console.splitlines() if line.startswith("$ ")]
    script = "\n".join(f"cat <<'END'\n$ {line}\nEND\n{line}" for line in lines)
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=3 * DEADLINE,
    )  # fmt: skip
    return done.stdout
