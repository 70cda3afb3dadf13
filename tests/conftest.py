"""What the tests share: a private runtime directory, checkpoints that carry a mark, and processes that are reaped."""

from __future__ import annotations

import compileall
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders import ROOT, SUPPORT
from policies import mlp
from processes import DEADLINE, Cli, Spawn

from wsync.checkpoints.files import local_files as staging
from wsync.fitting import plan as fitting
from wsync.layout.layout import layout_of
from wsync.segment.writable import WritableSegment
from wsync.settings import layout_process
from wsync.settings.spec import load_spec

if TYPE_CHECKING:
    from object_stores import Bucket

compileall.compile_dir(ROOT / "wsync", quiet=2)  # else all that is started does, under PYTHONDONTWRITEBYTECODE
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, which ignores it, hands that on
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as does nohup(1)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private runtime directory in real shared memory, gone after the test."""
    path = Path(tempfile.mkdtemp(prefix="wsync-test-", dir="/dev/shm"))
    for name in [name for name in os.environ if name.startswith("WSYNC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WSYNC_RUNTIME_DIR", str(path))
    state = path.with_name(f"{path.name}-state")
    monkeypatch.setenv("WSYNC_STATE_DIR", str(state))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), str(ROOT)]))
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    monkeypatch.setenv("COLUMNS", "100")
    yield path
    shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(state, ignore_errors=True)


@pytest.fixture
def read_by(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has checkpoints read by other sizes, the fields of ``plan.Reading``."""
    return lambda **sizes: monkeypatch.setattr(fitting, "READING", fitting.READING._replace(**sizes))


@pytest.fixture(params=["cached", "cold"])
def in_pieces(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, read_by: Callable[..., None]
) -> Callable[[int], None]:
    """Has files come in pieces of so many bytes: from the page cache, or past it by two threads."""

    def of(nbytes: int) -> None:
        read_by(chunk=nbytes, buffer=max(nbytes // 16, 1) * 8)
        if request.param == "cold":
            read_by(large=1, worth_threads=1)
            monkeypatch.setattr(staging, "_is_cached", lambda fd, at: False)

    return of


@pytest.fixture
def runs(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory of checkpoints, relative to the current directory of all processes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return Path("runs")


@pytest.fixture
def layouts_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy is asked in this process, where torch is already, and not in one of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(layout_process, "ask_policy", lambda spec, question, *more: question(spec, *more))


@pytest.fixture
def segment(runs: Path) -> Iterator[WritableSegment]:
    """The standing segment of ``policies:mlp``, with nothing in it."""
    made = WritableSegment.create("policies.mlp", layout_of(mlp()), spec=load_spec("policies:mlp").fingerprint())
    yield made
    made.close()


@pytest.fixture
def spawn(runtime: Path) -> Iterator[Spawn]:
    """Starts a process with piped text streams; all are killed and reaped after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str, **options: Any) -> subprocess.Popen[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        process: subprocess.Popen[str] = subprocess.Popen([sys.executable, *command], **options)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
    for process in started:
        process.communicate()


@pytest.fixture
def program(runtime: Path) -> Cli:
    """Runs the command line to its end, in a process of its own."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "wsync", *arguments], capture_output=True, text=True, timeout=DEADLINE, **options
        )

    return run


@pytest.fixture
def cli(runtime: Path) -> Cli:
    """Runs the command line in a process forked from this one, which has all imported that it may want."""
    from others import run_forked

    return run_forked


@pytest.fixture
def terminal(runtime: Path) -> Cli:
    """Runs the command line to its end on a terminal of so many columns; what is seen there is its stdout."""

    def run(*arguments: str, columns: int = 80, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
        known |= {"TERM": "xterm", **(env or {})}
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, columns))
        command = [sys.executable, "-m", "wsync", *arguments]
        with os.fdopen(ours, "rb", 0) as screen:
            with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=known) as process:
                os.close(theirs)
                seen = bytearray()
                while select.select([screen], [], [], DEADLINE)[0]:
                    try:
                        seen += screen.read(1 << 16)
                    except OSError:  # EIO: nobody has the other end any more
                        break
                else:
                    process.kill()
                    pytest.fail("it hangs")
            return subprocess.CompletedProcess(command, process.returncode, seen.decode().replace("\r\n", "\n"), "")

    return run


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Makes a named pipe and opens its reading end, so that writers may come and go and none of them waits."""
    opened: list[int] = []

    def make(name: str) -> int:
        os.mkfifo(tmp_path / name)
        opened.append(os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK))
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)


@pytest.fixture(scope="session")
def moto() -> Iterator[int]:
    """The port of an S3 server that lives as long as the tests of this worker; it ends when its stdin does."""
    pytest.importorskip("moto.server")
    pytest.importorskip("obstore")
    program = (
        "import sys; from moto.server import ThreadedMotoServer as Server; "
        "server = Server('127.0.0.1', 0, verbose=False); server.start(); "
        "print(server.get_host_and_port()[1], flush=True); sys.stdin.read(); server.stop()"
    )
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as server,
    ):
        assert server.stdin and server.stdout
        try:
            yield int(server.stdout.readline())
        finally:
            server.stdin.close()
            try:
                server.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                server.kill()


@pytest.fixture
def bucket(moto: int, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """An empty bucket, and an environment in which wsync finds it behind a proxy."""
    import urllib.request

    for path in ("/moto-api/reset", "/bucket"):
        method = "POST" if "reset" in path else "PUT"
        with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{moto}{path}", method=method)):
            pass
    from object_stores import SECRET, Bucket

    made = Bucket(moto)
    environment = {
        "AWS_ENDPOINT_URL": made.proxy.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield made
    made.proxy.close()
