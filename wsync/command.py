"""A user's command, kept within bounds: its time, its output, and every process that it starts.

It runs in a session, and so a process group, of its own, without a terminal: Ctrl-C is for wsync, which then ends it.
When its time is up the whole group gets SIGTERM, and what is left of it ``GRACE`` seconds later SIGKILL. A command that
ends by itself is not followed: what it left running in the background may go on, and is not waited for, although it
may hold the pipe of the output. Only the end of the output is kept.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import WsyncError, printable
from .helper import Done

GRACE = 2.0  # seconds between SIGTERM and SIGKILL
LINES, CHARACTERS = 20, 2000  # of output that are kept
_LOOK = 0.05  # seconds between two looks whether it ended, where its output does not tell
_CHUNK = 65_536


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit status; negative the number of the signal that ended it; None where it had to be ended.
        how: the same in words.
        output: the last lines of its stdout and stderr, without control characters but the newlines between them.
    """

    code: int | None
    how: str
    output: str

    def __str__(self) -> str:
        return self.how + self.said

    @property
    def said(self) -> str:
        """The output, to stand behind how it ended; indented, where it is of several lines, so that none of them passes
        for a line of ours.
        """
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
    """Runs a command to its end, or to the end of its time.

    It has a thread of its own: what a signal raises, in the main thread, must not come between a process that was just
    started and the one who ends it.

    Args:
        timeout: seconds.
        directory: where it runs; default the current one.
        stop: ends it early, once set.
        stdin: descriptor of a file that it reads.

    Raises:
        WsyncError: it could not be started.
    """
    over, given_up = Done(), threading.Event()
    results: list[Ended | Exception] = []

    def work() -> None:
        try:
            stops = [event for event in (stop, given_up) if event]
            results.append(_run(arguments, stdin, environment, directory, timeout, stops))
        except Exception as exc:
            results.append(exc)
        finally:
            over.tell()

    try:
        threading.Thread(target=work, daemon=True).start()
        over.wait()
    except BaseException:
        given_up.set()
        over.wait(2 * GRACE + 1)
        raise
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _run(
    arguments: Sequence[str],
    stdin: int,
    environment: Mapping[str, str],
    directory: Path | None,
    timeout: float,
    stops: Sequence[threading.Event],
) -> Ended:
    try:
        process = subprocess.Popen(
            arguments,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=environment,
            start_new_session=True,
        )
    except OSError as exc:
        raise WsyncError(
            f"{arguments[0]} could not be started in {directory or 'the current directory'} ({exc}). See that both are "
            "there, and that the system has room for one more process."
        ) from exc
    with _Output(process) as output:
        try:
            cut = output.follow(time.monotonic() + timeout, stops)
        finally:
            if process.returncode is None:
                _end(process, output)
    if cut:
        return Ended(None, f"took longer than {timeout:g} s" if cut == "late" else "was stopped", output.text())
    code = process.returncode
    how = f"ended with status {code}" if code >= 0 else f"was ended by {_signal_name(-code)}"
    return Ended(code, how, output.text())


class _Output:
    """The pipe of a command's output, of which the end is kept."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        self._process, self._pipe, self._tail, self.ended = process, process.stdout, b"", False
        os.set_blocking(self._pipe.fileno(), False)
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLIN)

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pipe.close()

    def follow(self, deadline: float, stops: Sequence[threading.Event]) -> str:
        """Reads until the command ended (empty), time is up (``late``) or it shall stop (``stopped``)."""
        while self._process.poll() is None:
            if any(stop.is_set() for stop in stops):
                return "stopped"
            if (left := deadline - time.monotonic()) <= 0:
                return "late"
            self.read(min(left, _LOOK))
        for _ in range(16):  # what is still in the pipe; not what others go on writing into it
            if not self.read(0):
                break
        return ""

    def read(self, seconds: float) -> bool:
        """Takes what comes within this time; whether anything came."""
        if self.ended:  # it closed its output; mostly it ends at once
            time.sleep(min(seconds, 0.01))
            return False
        if not self._poll.poll(seconds * 1000):
            return False
        data = os.read(self._pipe.fileno(), _CHUNK)
        self._tail = (self._tail + data)[-4 * CHARACTERS :]
        self.ended = not data
        return bool(data)

    def text(self) -> str:
        return plain(self._tail)


def _end(process: subprocess.Popen[bytes], output: _Output) -> None:
    """Ends a command and all of its group, and reaps it.

    Until it is reaped its number, which is the group's, is no other's.
    """
    until = time.monotonic() + GRACE
    try:
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < until and not (output.ended and _is_dead(process)):
            output.read(_LOOK)
        os.killpg(process.pid, signal.SIGKILL)
    except PermissionError:
        pass  # it runs as another user (sudo), and only that one can end it
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass  # no signal reaches it; it must not hold us up


def _is_dead(process: subprocess.Popen[bytes]) -> bool:
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def plain(data: bytes) -> str:
    """The last lines of an output as they do nothing to a terminal: what does not print is written as its escape."""
    lines = data.decode("utf-8", "replace").strip().splitlines()[-LINES:]
    harmless = (printable(line.expandtabs()) for line in lines)
    return "\n".join(harmless)[-CHARACTERS:]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
