"""What a long history costs: ``python tests/measure/history.py``.

Fills a history with 100,000 publishes of files that are gone, and times whole commands, each in a process of its own,
beside the same with an empty history: a push of a new checkpoint with keep = 1, a push while a pin holds, and a
rollback to a version that is gone. Takes about half a minute.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

from wsync.bench.rows import MIB, Settings
from wsync.bench.workspace import Workspace, private_workspace
from wsync.history.state import State

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from spent import spent

NUMBER = 100_000
ROUNDS = 3
WSYNC = [sys.executable, "-m", "wsync"]


def fill(state: Path, name: str, number: int) -> None:
    """Makes a history of so many publishes of files that are gone."""
    rows = (
        (float(at), "publish", at, at, f"/gone/step_{at}.safetensors", f"{at}-1-1", "{}") for at in range(1, number + 1)
    )
    with State(name, state) as made:
        made.record("pin")
    with sqlite3.connect(state / f"{name}.sqlite") as database:
        database.executemany(
            "INSERT INTO events (at, kind, version, step, checkpoint, identity, settings) VALUES (?, ?, ?, ?, ?, ?, ?)",
            rows,
        )


def measure(workspace: Workspace, number: int) -> None:
    spec, state = workspace.write_spec("policy", MIB, 16), workspace.files / "state"
    os.environ |= {"WSYNC_RUNTIME_DIR": str(workspace.runtime), "WSYNC_STATE_DIR": str(state), "WSYNC_KEEP": "1"}
    file = workspace.save("policy/step_1.safetensors", MIB, 16)
    words = [str(spec), str(file)]
    name = spec.stem
    fill(state, name, number)
    subprocess.run([*WSYNC, "push", *words], capture_output=True, check=True)
    for label, more in (
        ("push", ["push", *words, "--force"]),
        ("rollback", ["rollback", name, "--to", "2"]),
        ("pin", ["pin", name]),
        ("pinned", ["push", *words]),
    ):
        seconds, mib, _ = spent([*WSYNC, *more], os.environ, ROUNDS)
        print(f"{number:>9,}  {label:<10}{seconds * 1000:8.0f} ms{mib:8.0f} MiB")


if __name__ == "__main__":
    for number in (0, NUMBER):
        with private_workspace(Settings()) as workspace:
            measure(workspace, number)
