"""Runs a user's command within bounds: of time, of output, and of the processes that it starts.

The command gets a session, and so a process group, of its own and no terminal, so that Ctrl-C reaches wsync alone,
which then ends the command. When its time is up the whole group gets SIGTERM, and ``GRACE`` seconds later SIGKILL. A
command that ends by itself is not followed: what it left in the background goes on and is not waited for, although it
may hold the pipe of the output. Only the end of the output is kept.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .errors import WsyncError, printable

GRACE = 2.0  # seconds between SIGTERM and SIGKILL
LINES, CHARACTERS = 20, 2000  # of output that are kept
_SIGNALS = {number.value: number.name for number in signal.Signals}
_LOOK = 0.05  # seconds between two looks whether the command ended or is to stop


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit status; minus the signal's number where a signal ended it; None where we ended it.
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
        """The output, to be appended to a message. Several lines are indented, so that none looks like one of ours."""
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
    """Runs a command until it ends, its time is up, or it is to stop. An exception, as of Ctrl-C, ends it, too.

    It is started and ended in a thread of its own: what a signal raises in the main thread within ``Popen`` would lose
    a process that is running already.

    Args:
        timeout: seconds.
        directory: where it runs; default the current one.
        stop: ends it early, once set.
        stdin: descriptor of a file that it reads.

    Raises:
        WsyncError: it could not be started.
    """

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            arguments,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=environment,
            start_new_session=True,
        )

    given_up = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            ended = pool.submit(_follow, start, timeout, [event for event in (stop, given_up) if event])
            while not wait([ended], _LOOK).done:
                pass
            return ended.result()
        except OSError as exc:
            raise WsyncError(
                f"{arguments[0]} could not be started in {directory or 'the current directory'} ({exc}). See that both "
                "are there, and that the system has room for one more process."
            ) from exc
        finally:
            given_up.set()


def _follow(start: Callable[[], subprocess.Popen[bytes]], timeout: float, stops: Sequence[threading.Event]) -> Ended:
    process, deadline, how = start(), time.monotonic() + timeout, ""
    assert process.stdout
    with process.stdout as pipe:
        output = _Tail(pipe)
        while not how and process.poll() is None:
            if any(stop.is_set() for stop in stops):
                how = "was stopped"
            elif (left := deadline - time.monotonic()) <= 0:
                how = f"took longer than {timeout:g} s"
            else:
                output.read(min(left, _LOOK))
        if how:
            _end(process, output)
            return Ended(None, how, plain(output.data))
        output.read(0)  # all that a pipe holds; not what background processes go on writing
    code = process.returncode
    how = f"ended with status {code}" if code >= 0 else f"was ended by {_SIGNALS.get(-code, f'signal {-code}')}"
    return Ended(code, how, plain(output.data))


class _Tail:
    """The end of what came through a pipe."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._fd, self.data, self.closed = pipe.fileno(), b"", False
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def read(self, seconds: float) -> None:
        """Takes what comes first within this time."""
        if self.closed:
            time.sleep(min(seconds, 0.01))  # a command that closes its output mostly ends at once
        elif self._poll.poll(seconds * 1000):
            data = os.read(self._fd, 65_536)
            self.data = (self.data + data)[-4 * CHARACTERS :]
            self.closed = not data


def _end(process: subprocess.Popen[bytes], output: _Tail) -> None:
    """Ends a command and all of its group, and reaps it last: until then the group's number belongs to no other."""
    until = time.monotonic() + GRACE
    try:
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < until:
            output.read(_LOOK)
            dead = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if dead and output.closed:
                break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(GRACE)
    except (PermissionError, subprocess.TimeoutExpired):
        pass  # it runs as another user (sudo), or no signal reaches it: it must not hold us up


def plain(data: bytes) -> str:
    """The last lines of an output, safe for a terminal: characters that do not print are escaped."""
    lines = data.decode("utf-8", "replace").strip().splitlines()[-LINES:]
    harmless = (printable(line.expandtabs()) for line in lines)
    return "\n".join(harmless)[-CHARACTERS:]
