"""Runs a user's command, and limits its time, its output and the processes that it starts.

The command gets its own session and no terminal, so Ctrl-C reaches only wsync, which then ends the command. Between the
two runs a small process (``system.supervisor``). When time is up, or wsync has ended, it ends the command and all that
the command started: with SIGTERM, and ``GRACE`` seconds later with SIGKILL. If the command ends by itself, its
background processes go on. wsync does not wait for them; a thread reads the output until they close its pipe. Only the
end of the output is kept.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import WsyncError, printable
from ..system import supervisor

GRACE = 2.0  # seconds between SIGTERM and SIGKILL
LINES, CHARACTERS = 20, 2000  # how much of the output is kept
_SIGNALS = {number.value: number.name for number in signal.Signals}
_LOOK = 0.05  # seconds between two checks whether the command ended or must stop


@contextmanager
def unpacked(extras: Mapping[str, bytes]) -> Iterator[str]:
    """Yields a directory that holds these files until the block ends; an empty string without files.

    Raises:
        OSError: the files cannot be written.
    """
    if not extras:
        yield ""
        return
    with tempfile.TemporaryDirectory(prefix="wsync-extras-") as directory:
        for name, data in extras.items():
            file = Path(directory, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        yield directory


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit status; minus the signal's number if a signal ended it; None if wsync ended it.
        how: the same in words.
        output: the last lines of its stdout and stderr, with control characters escaped.
    """

    code: int | None
    how: str
    output: str

    def __str__(self) -> str:
        return self.how + self.said

    @property
    def said(self) -> str:
        """The output, to be appended to a message. Several lines are indented, so that none looks like wsync's own."""
        lines = self.output.split("\n")
        if len(lines) > 1:
            return "\n  ".join([":", *lines]) + "\n"
        return f": {lines[0]}" if self.output else ", without a word"


def run(
    arguments: Sequence[str],
    *,
    timeout: float,
    environment: Mapping[str, str],
    directory: Path | None = None,
    stop: threading.Event | None = None,
    stdin: int = subprocess.DEVNULL,
) -> Ended:
    """Runs a command until it ends, its time is up, or ``stop`` is set. An exception such as Ctrl-C ends it, too.

    Another thread starts and ends the command: if a signal handler raised inside ``Popen``, a process that already runs
    would be lost.

    Args:
        timeout: seconds.
        environment: all variables of the command.
        directory: where the command runs; default the current one.
        stop: ends the command once it is set.
        stdin: file descriptor that becomes its stdin.

    Raises:
        WsyncError: the command could not be started.
    """
    given_up = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            stops = [event for event in (stop, given_up) if event]
            ended = pool.submit(_run, arguments, timeout, stops, env=environment, cwd=directory, stdin=stdin)
            while not wait([ended], _LOOK).done:
                pass
            return ended.result()
        except OSError as exc:
            raise WsyncError(
                f"{arguments[0]} could not be started in {directory or 'the current directory'} ({exc}). Check that "
                "both exist, and that the system has room for one more process."
            ) from exc
        finally:
            given_up.set()


def _run(arguments: Sequence[str], timeout: float, stops: Sequence[threading.Event], **more: Any) -> Ended:
    between = [sys.executable, "-I", "-S", supervisor.__file__, str(os.getpid()), str(GRACE)]
    process = subprocess.Popen(
        [*between, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **more
    )
    deadline, how, output = time.monotonic() + timeout, "", bytearray()
    reader = threading.Thread(target=_read, args=(process.stdout, output), name="wsync-output", daemon=True)
    reader.start()
    while not how:
        try:
            process.wait(max(0.0, min(_LOOK, deadline - time.monotonic())))
            break
        except subprocess.TimeoutExpired:
            if any(stop.is_set() for stop in stops):
                how = "was stopped"
            elif time.monotonic() >= deadline:
                how = f"took longer than {timeout:g} s"
    if how:
        _end(process)
        reader.join(_LOOK)
        return Ended(None, how, plain(output))
    reader.join(_LOOK)  # takes what is in the pipe, but not what background processes write later
    code = process.returncode
    how = f"ended with status {code}" if code >= 0 else f"was ended by {_SIGNALS.get(-code, f'signal {-code}')}"
    return Ended(code, how, plain(output))


def _read(pipe: IO[bytes], output: bytearray) -> None:
    """Reads a pipe until nobody holds it open any more, and keeps the end of the output."""
    with pipe:
        while data := os.read(pipe.fileno(), 65_536):
            output[:] = (output + data)[-4 * CHARACTERS :]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a command with all that it started."""
    try:
        process.terminate()
        process.wait(3 * GRACE)
    except (PermissionError, subprocess.TimeoutExpired):
        pass  # a process of another user (sudo), or one that hangs in the kernel, must not hold wsync up


def plain(data: bytes | bytearray) -> str:
    """Returns the last lines of an output, safe for a terminal: characters that do not print are escaped."""
    lines = data.decode("utf-8", "replace").strip().splitlines()[-LINES:]
    harmless = (printable(line.expandtabs()) for line in lines)
    return "\n".join(harmless)[-CHARACTERS:]
