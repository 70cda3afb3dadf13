"""What a case runs in: two private directories that are removed afterwards, processes, and the policy to measure.

``python -m wsync.bench.workspace SOURCE BYTES TENSORS`` is a process whose memory is measured before and after it gets
the weights of SOURCE. Processes end with the measurement, even if that is killed.
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
"""A script that does what ``wsync`` does, and is killed when its parent ends."""

BY_HAND = """
import os, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
checkpoints, shared = map(Path, sys.argv[1:])
newest = max(checkpoints.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
save_file(load_file(newest), shared / "weights.new")
os.replace(shared / "weights.new", shared / "weights.safetensors")
"""
"""What one would write without wsync: puts the newest file into shared memory, and checks nothing."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Two private directories: ``runtime`` for segments, ``files`` for checkpoints and specs."""

    settings: Settings
    runtime: Path
    files: Path

    def rounds(self, number: int) -> int:
        """``number`` rounds, or a quarter of them with ``--quick``, but at least two."""
        return max(number // 4, 2) if self.settings.quick else number

    def need(self, nbytes: int) -> None:
        """Checks that ``nbytes`` are free in shared memory and on the disk, and twice as many in main memory.

        Raises:
            Skip: they are not.
        """
        free = min(shutil.disk_usage(self.runtime).free, shutil.disk_usage(self.files).free, spare_memory() // 2)
        if nbytes > free:
            raise Skip(f"needs {size(nbytes)} of memory and of the disk, and {size(free)} are free")

    def save(self, path: str, nbytes: int, tensors: int) -> Path:
        """Writes a checkpoint of ``tensors`` float32 vectors with random values from 0 to 1; see ``settle``."""
        count = max(nbytes // tensors // 4, 1)
        values = np.random.default_rng(0).random(count + 4096, dtype="f4")
        file = self.files / path
        file.parent.mkdir(exist_ok=True)
        save_file({str(i): values[i % 4096 :][:count] for i in range(tensors)}, file)
        settle(file)
        return file

    def write_spec(self, name: str, nbytes: int, tensors: int) -> Path:
        """Writes a spec whose checkpoints lie in the directory ``name``."""
        (self.files / name).mkdir(exist_ok=True)
        spec = self.files / f"{name}.toml"
        spec.write_text(
            f'policy = "wsync.bench.workspace:make"\ncheckpoints = "{name}"\n'
            f"[policy_kwargs]\nnbytes = {nbytes}\ntensors = {tensors}\n"
        )
        return spec

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process, without the user's own settings of wsync.

        Python may keep compiled modules, as in an installation: to compile wsync anew takes as long as a push.
        """
        users = {name: value for name, value in os.environ.items() if not name.startswith("WSYNC_")}
        users.pop("PYTHONDONTWRITEBYTECODE", None)
        own = {"WSYNC_RUNTIME_DIR": str(self.runtime), "WSYNC_STATE_DIR": str(self.files / "state")}
        return {**users, **own, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    @contextmanager
    def process(self, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
        """Starts the interpreter in a session of its own, which Ctrl-C does not reach; kills it at the end."""
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
            RuntimeError: its exit status was not 0.
        """
        with self.process(*arguments) as process:
            _, said = process.communicate()
        if process.returncode:
            last = said.strip().rpartition("\n")[2]
            raise RuntimeError(f"{' '.join(map(str, arguments[:3]))} ended with {process.returncode}: {last}")


@contextmanager
def private_workspace(settings: Settings) -> Iterator[Workspace]:
    with (
        TemporaryDirectory(prefix="wsync-bench-", dir=settings.runtime) as runtime,
        TemporaryDirectory(prefix="wsync-bench-", dir=settings.directory) as files,
    ):
        yield Workspace(settings, Path(runtime), Path(files))


def settle(file: Path) -> None:
    """Flushes a file to the disk, and dates it long ago, so that nobody waits for its writer."""
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    os.utime(file, (0, 0))


def make(nbytes: int, tensors: int) -> nn.ParameterList:
    """A policy of ``tensors`` float32 vectors of one length, ``nbytes`` in total."""
    count = max(nbytes // tensors // 4, 1)
    return nn.ParameterList(nn.Parameter(torch.zeros(count)) for _ in range(tensors)).eval()


def weigh(source: str, nbytes: str, tensors: str) -> None:
    """Attaches a policy to a segment, or loads a checkpoint into it; waits for a line on stdin before and after."""
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
