"""Where a case runs: two private directories that are removed afterwards, and processes that end with it.

Segments lie in shared memory, checkpoints in the temporary directory or the one that is named. Every process gets a
session of its own, so that Ctrl-C reaches the measurement alone, which ends them.
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
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from ..console import size
from ..layout import layout_of
from ..segment import Segment
from ..spec import load_spec
from .processes import make
from .rows import MIB, Settings, Skip

_ROOM = 64 * MIB  # left to others


@dataclass(frozen=True, slots=True)
class Place:
    """Two private directories: ``runtime`` for segments, ``files`` for checkpoints and specs."""

    settings: Settings
    runtime: Path
    files: Path

    def rounds(self, number: int) -> int:
        """So many rounds, or a quarter of them with ``--quick``."""
        return max(number // 4, 2) if self.settings.quick else number

    def need(self, *, shared: int, disk: int, memory: int = 0) -> None:
        """Checks that so many bytes are free: of shared memory, of the checkpoints' disk, and of other memory.

        Raises:
            Skip: they are not.
        """
        for wanted, free, what in (
            (shared, shutil.disk_usage(self.runtime).free, f"room in {self.runtime.parent}"),
            (disk, shutil.disk_usage(self.files).free, f"room in {self.files.parent}"),
            (shared + memory, free_memory(), "memory"),
        ):
            if wanted + _ROOM > free:
                raise Skip(f"takes {size(wanted)} of {what}, and {size(free)} are free")

    def save(self, path: str, nbytes: int, tensors: int, *, settled: bool = True) -> Path:
        """Writes a checkpoint of float32 vectors with random values from 0 to 1.

        Args:
            path: below ``files``.
            settled: it lies on the disk and is old; else it has just been written.
        """
        count = max(nbytes // tensors // 4, 1)
        values = np.random.default_rng(0).random(count + 4096, dtype="f4")
        file = self.files / path
        file.parent.mkdir(exist_ok=True)
        save_file({str(i): values[i % 4096 :][:count] for i in range(tensors)}, file)
        if settled:
            settle(file)
        return file

    def standing(self, name: str, nbytes: int, tensors: int) -> Path:
        """Writes a spec whose checkpoints lie in a directory of its name, and makes its segment."""
        (self.files / name).mkdir(exist_ok=True)
        spec = self.files / f"{name}.toml"
        spec.write_text(
            f'policy = "wsync.bench.processes:make"\ncheckpoints = "{name}"\n'
            f"[policy_kwargs]\nnbytes = {nbytes}\ntensors = {tensors}\n"
        )
        with torch.device("meta"):  # the layout alone is needed
            layout = layout_of(make(nbytes, tensors))
        Segment.create(name, layout, self.runtime, spec=load_spec(str(spec)).fingerprint).close()
        return spec

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process: the user's own settings of wsync stay out of the measurement.

        Compiled modules are kept, as in an installation: to compile wsync anew takes as long as a push.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WSYNC_")}
        kept.pop("PYTHONDONTWRITEBYTECODE", None)
        package = str(Path(__file__).parents[2])
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join(filter(None, [package, kept.get("PYTHONPATH")])),
            "WSYNC_RUNTIME_DIR": str(self.runtime),
            "WSYNC_STATE_DIR": str(self.files / "state"),
        }

    @property
    def _options(self) -> dict[str, Any]:
        return {"env": self.environment, "cwd": self.files, "text": True, "start_new_session": True}

    def run(self, *arguments: str | Path) -> None:
        """Runs the interpreter to its end.

        Raises:
            RuntimeError: it ended with a failure.
        """
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        done = subprocess.run([sys.executable, *arguments], **pipes, **self._options)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise RuntimeError(f"{' '.join(map(str, arguments[:3]))} ended with {done.returncode}: {said}")

    @contextmanager
    def role(self, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
        """One of the processes of ``processes``, which is killed at the end of the block."""
        command = [sys.executable, "-m", "wsync.bench.processes", *map(str, arguments)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **pipes, **self._options) as process:
            try:
                yield process
            finally:
                process.kill()


@contextmanager
def private_place(settings: Settings) -> Iterator[Place]:
    """A place that is removed at the end of the block."""
    with (
        TemporaryDirectory(prefix="wsync-bench-", dir=settings.runtime) as runtime,
        TemporaryDirectory(prefix="wsync-bench-", dir=settings.directory) as files,
    ):
        yield Place(settings, Path(runtime), Path(files))


def settle(file: Path) -> None:
    """Has a file on the disk, and dates it long ago, so that nobody waits for its writer."""
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    os.utime(file, (0, 0))


def heard(process: subprocess.Popen[str]) -> str:
    """The next line that a process says.

    Raises:
        RuntimeError: it ended.
    """
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a process of the measurement ended")
    return line.strip()


def tell(process: subprocess.Popen[str]) -> None:
    """Has a process go on to its next stage, and waits until it is there."""
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()
    heard(process)


def free_memory() -> int:
    """Bytes that processes of this box, or of its memory cgroup, can still have."""
    text = Path("/proc/meminfo").read_text()
    free = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = {key: int(value) for key, value in map(str.split, (group / "memory.stat").read_text().splitlines())}
        return min(free, limit - used["anon"] - used["shmem"])
    except (OSError, ValueError, KeyError):  # no cgroup of the second version, or no limit
        return free
