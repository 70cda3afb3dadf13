"""Where a measurement runs: directories and processes of its own, which are gone afterwards.

Segments lie in shared memory, checkpoints in the temporary directory or the one that is named. A run that was killed
outright leaves them; the next run finds their lock free and removes them. Every process that is started gets a session
of its own, so that an interrupt reaches the measurement alone, which ends them all; what goes on until it is ended is
killed with the measurement.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

from .bench import MIB, Settings, Skip, Timed, timed
from .console import size
from .errors import UsageError
from .memory import TMPFS, file_system, free_bytes, no_room, shut, try_lock

BY_HAND = Path(__file__).with_name("bench_by_hand.py")
_PREFIX = "wsync-bench-"
_ROOM = 64 * MIB  # that is left to others
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Place:
    """Two private directories, and what is started and written there.

    Attributes:
        settings: what is measured.
        runtime: where segments live.
        files: where checkpoints are written, and TOML files.
        started: the processes of the case at hand, in the order in which they were started.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._locks: list[int] = []
        self.started: list[subprocess.Popen[str]] = []
        self._made: list[Path] = []
        try:
            self.runtime = self._make(_shared_memory(settings.runtime or Path("/dev/shm")), "--runtime-dir")
            self.files = self._make(settings.directory or Path(tempfile.gettempdir()), "--dir")
        except BaseException:
            self.close()
            raise

    def _make(self, base: Path, option: str) -> Path:
        base = base.absolute()  # processes run elsewhere
        if not base.is_dir():
            raise UsageError(f"{base} is no directory. Name one that is there with {option}.")
        for left in base.glob(f"{_PREFIX}*"):
            _sweep(left)
        try:
            while True:
                made = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
                self._locks.append(os.open(made, os.O_RDONLY | os.O_CLOEXEC))
                if try_lock(self._locks[-1]) and os.fstat(self._locks[-1]).st_nlink:
                    self._made.append(made)
                    return made  # else another run took it for one that was left
        except OSError as exc:
            raise no_room(exc, base) or UsageError(
                f"{base} cannot be written to ({exc.strerror}). Name another directory with {option}."
            ) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.end()
        for made in self._made:
            shutil.rmtree(made, ignore_errors=True)
        while self._locks:
            shut(self._locks.pop())

    def clear(self) -> None:
        """Ends what a case started, and removes what it wrote."""
        self.end()
        for made in self._made:
            for path in made.iterdir():
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    # --- room

    def need(self, *, memory: float = 0, shared: float = 0, disk: float = 0) -> None:
        """What a case will take, in bytes: of this process's memory, of segments, of checkpoints.

        Raises:
            Skip: this box has not so much.
        """
        for wanted, free, what in (
            (memory + shared, free_memory(), "memory"),
            (shared, free_bytes(self.runtime), f"room in {self.runtime.parent}"),
            (disk, free_bytes(self.files), f"room in {self.files.parent}"),
        ):
            if wanted and wanted + _ROOM > free:
                raise Skip(f"takes {size(wanted)} of {what}, and {size(free)} are free")

    # --- checkpoints and specs

    def save(self, path: str, nbytes: int, tensors: int, *, settled: bool = True) -> Path:
        """Writes a checkpoint of random floats below one, which do not compress.

        Args:
            settled: it is on the disk, and was long ago; else just written.
        """
        import numpy as np
        from safetensors.numpy import save_file

        count = max(nbytes // tensors // 4, 1)
        base = np.random.default_rng(0).random(count + 4096, dtype="f4")
        file = self.files / path
        file.parent.mkdir(exist_ok=True)
        save_file({str(i): base[i % 4096 :][:count] for i in range(tensors)}, file)
        if settled:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                shut(fd)
            os.utime(file, (0, 0))
        return file

    def spec(self, name: str, nbytes: int, tensors: int) -> Path:
        """A TOML file for a policy of so many bytes, whose checkpoints lie in a directory of its name."""
        (self.files / name).mkdir(exist_ok=True)
        file = self.files / f"{name}.toml"
        file.write_text(
            f'policy = "wsync.bench_policy:make"\ncheckpoints = "{name}"\n'
            f"[policy_kwargs]\nnbytes = {nbytes}\ntensors = {tensors}\n"
        )
        return file

    def stand(self, name: str, nbytes: int, tensors: int, *, slots: int = 3) -> Path:
        """The same, with its segment standing, so that what publishes first need not build the policy."""
        import torch

        from .bench_policy import make
        from .layout import layout_of
        from .segment import Segment
        from .spec import load_spec

        file = self.spec(name, nbytes, tensors)
        with torch.device("meta"):  # its layout is wanted, and of 8 GiB the weights would be all of them once more
            layout = layout_of(make(nbytes, tensors))
        fingerprint = load_spec(str(file)).fingerprint
        Segment.create(name, layout, self.runtime, slots=slots, spec=fingerprint).close()
        return file

    # --- processes

    @property
    def environment(self) -> dict[str, str]:
        """Of every process: wsync's own settings are ours, whatever the user's are.

        Compiled modules are kept, as an installation has them: to compile wsync anew takes as long as a push.
        """
        package = str(Path(__file__).parent.parent)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WSYNC_")}
        kept.pop("PYTHONDONTWRITEBYTECODE", None)
        paths = [package, *filter(None, [kept.get("PYTHONPATH")])]
        ours = {"WSYNC_RUNTIME_DIR": str(self.runtime), "WSYNC_STATE_DIR": str(self.files / "state")}
        return {**kept, **ours, "PYTHONPATH": os.pathsep.join(paths)}

    def whole(self, *arguments: str | Path) -> Timed:
        """A run of the interpreter from its start to its end.

        Raises:
            Skip: when run, it ended with a failure.
        """
        return timed(lambda: self.run(*arguments))

    def run(self, *arguments: str | Path) -> None:
        done = subprocess.run([sys.executable, *arguments], **self._options(stderr=subprocess.PIPE))
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise Skip(f"failed: {' '.join(map(str, arguments[:3]))} ended with {done.returncode}: {said}")

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Starts the interpreter, with pipes; it is ended with the case."""
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        prctl = ctypes.CDLL(None).prctl
        pipes["preexec_fn"] = lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        process = subprocess.Popen([sys.executable, *map(str, arguments)], **self._options(**pipes))
        self.started.append(process)
        return process

    def _options(self, **more: Any) -> dict[str, Any]:
        common = {"env": self.environment, "text": True, "start_new_session": True, "cwd": self.files}
        return {**common, "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **more}

    def end(self) -> None:
        """Ends the processes that are still there."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        while self.started:
            with self.started.pop() as process:
                process.wait()


def _shared_memory(runtime: Path) -> Path:
    """A runtime directory, or the one above where it would be made; on a box on which nothing was published yet."""
    above = runtime.absolute().parent
    if runtime.exists() or not above.is_dir():
        return runtime
    fd = os.open(above, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return above if file_system(fd) == TMPFS else runtime
    finally:
        shut(fd)


def heard(process: subprocess.Popen[str]) -> str:
    """The next line that a process says.

    Raises:
        Skip: it ended.
    """
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise Skip(f"failed: {' '.join(map(str, process.args[1:4]))} ended")  # type: ignore[index]
    return line.strip()


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


def _sweep(left: Path) -> None:
    """Removes the directory of a run that was killed: its lock is free."""
    try:
        fd = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if os.fstat(fd).st_uid == os.getuid() and try_lock(fd):
            shutil.rmtree(left, ignore_errors=True)
    finally:
        shut(fd)
