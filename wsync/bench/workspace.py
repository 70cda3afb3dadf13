"""Where a case runs: the policy that is measured, two private directories that are removed afterwards, and processes.

``python -m wsync.bench.workspace SOURCE BYTES TENSORS`` is weighed before and after it has the weights of SOURCE.
Processes end with the measurement, also when that is killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import nn

from ..policy.attaching import attach
from ..system.memory import spare_memory
from ..text import size
from .rows import Settings, Skip

COMMAND = """
import ctypes, signal
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
from wsync.cli.commands import main
main()
"""
"""A script that is ``wsync``, and ends when its parent does."""

BY_HAND = """
import os, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
checkpoints, shared = map(Path, sys.argv[1:])
newest = max(checkpoints.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
save_file(load_file(newest), shared / "weights.new")
os.replace(shared / "weights.new", shared / "weights.safetensors")
"""
"""What one writes without wsync: puts the newest file into shared memory, and checks nothing."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Two private directories: ``runtime`` for segments, ``files`` for checkpoints and specs."""

    settings: Settings
    runtime: Path
    files: Path

    def rounds(self, number: int) -> int:
        """So many rounds, or a quarter of them with ``--quick``."""
        return max(number // 4, 2) if self.settings.quick else number

    def need(self, nbytes: int) -> None:
        """Checks that so many bytes are free in shared memory and on the disk, and twice as many of memory.

        Raises:
            Skip: they are not.
        """
        free = min(shutil.disk_usage(self.runtime).free, shutil.disk_usage(self.files).free, spare_memory() // 2)
        if nbytes > free:
            raise Skip(f"takes {size(nbytes)} of memory and of the disk, and {size(free)} are free")

    def save(self, path: str, nbytes: int, tensors: int) -> Path:
        """Writes a checkpoint of float32 vectors with random values from 0 to 1, and settles it."""
        count = max(nbytes // tensors // 4, 1)
        values = np.random.default_rng(0).random(count + 4096, dtype="f4")
        file = self.files / path
        file.parent.mkdir(exist_ok=True)
        save_file({str(i): values[i % 4096 :][:count] for i in range(tensors)}, file)
        settle(file)
        return file

    def write_spec(self, name: str, nbytes: int, tensors: int) -> Path:
        """Writes a spec whose checkpoints lie in a directory of its name."""
        (self.files / name).mkdir(exist_ok=True)
        spec = self.files / f"{name}.toml"
        spec.write_text(
            f'policy = "wsync.bench.workspace:make"\ncheckpoints = "{name}"\n'
            f"[policy_kwargs]\nnbytes = {nbytes}\ntensors = {tensors}\n"
        )
        return spec

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process: the user's own settings of wsync stay out of the measurement.

        Compiled modules are kept, as in an installation: to compile wsync anew takes as long as a push.
        """
        users = {name: value for name, value in os.environ.items() if not name.startswith("WSYNC_")}
        users.pop("PYTHONDONTWRITEBYTECODE", None)
        own = {"WSYNC_RUNTIME_DIR": str(self.runtime), "WSYNC_STATE_DIR": str(self.files / "state")}
        return {**users, **own, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    @contextmanager
    def process(self, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
        """The interpreter, in a session of its own because Ctrl-C is for the measurement alone; killed at the end."""
        with subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment,
            cwd=self.files,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, *arguments: str | Path) -> None:
        """Runs the interpreter to its end.

        Raises:
            RuntimeError: it ended with a failure.
        """
        with self.process(*arguments) as process:
            _, said = process.communicate()
        if process.returncode:
            last = said.strip().rpartition("\n")[2]
            raise RuntimeError(f"{' '.join(map(str, arguments[:3]))} ended with {process.returncode}: {last}")


@contextmanager
def private_workspace(settings: Settings) -> Iterator[Workspace]:
    """A workspace that is removed at the end of the block."""
    with (
        TemporaryDirectory(prefix="wsync-bench-", dir=settings.runtime) as runtime,
        TemporaryDirectory(prefix="wsync-bench-", dir=settings.directory) as files,
    ):
        yield Workspace(settings, Path(runtime), Path(files))


def settle(file: Path) -> None:
    """Has a file on the disk, and dates it long ago, so that nobody waits for its writer."""
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    os.utime(file, (0, 0))


def make(nbytes: int, tensors: int) -> nn.ParameterList:
    """So many float32 vectors, of ``nbytes`` together."""
    count = max(nbytes // tensors // 4, 1)
    return nn.ParameterList(nn.Parameter(torch.zeros(count)) for _ in range(tensors)).eval()


def weigh(source: str, nbytes: str, tensors: str) -> None:
    """Attaches a policy to a segment, or loads a checkpoint into one; goes on when it is told to."""
    input("imported\n")
    policy = make(int(nbytes), int(tensors))
    if source.endswith(".safetensors"):
        policy.load_state_dict(load_file(source))
        input("loaded\n")
    else:
        with attach(policy, source, mode="swap", timeout=60):
            input("attached\n")


if __name__ == "__main__":
    weigh(*sys.argv[1:])
