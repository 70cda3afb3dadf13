"""Processes that a test starts: what they say, with a deadline, and signals to them."""

from __future__ import annotations

import ctypes
import os
import platform
import select
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue

import pytest

DEADLINE = 60.0  # seconds that anything awaited may take on a busy machine; nothing waits that long when it works

_TGKILL = {"x86_64": 234, "aarch64": 131}.get(platform.machine())

Spawn = Callable[..., "subprocess.Popen[str]"]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


class Lines:
    """What a process says, line by line, each awaited with a deadline."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.seen: list[str] = []
        self._queue: Queue[str] = Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))

    def next(self) -> str:
        try:
            line = self._queue.get(timeout=DEADLINE)
        except Empty:
            pytest.fail("nothing more was said after\n" + "\n".join(self.seen))
        self.seen.append(line)
        return line

    def until(self, *words: str) -> str:
        """The next line that has all these words."""
        line = self.next()
        while not all(word in line for word in words):
            line = self.next()
        return line

    def rest(self) -> list[str]:
        """What is left to read, once the process has ended."""
        self.process.wait(DEADLINE)
        self._thread.join(DEADLINE)
        left = list(self._queue.queue)
        self.seen += left
        return left


def signal_another_thread(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a thread of the process that is not its main one, as the kernel may choose."""
    if _TGKILL is None:
        pytest.skip(f"the number of tgkill(2) on {platform.machine()} is not known here")
    others = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir() if task.name != str(pid)]
    assert any(ctypes.CDLL(None).syscall(_TGKILL, pid, tid, number) == 0 for tid in others)


def heard(fd: int) -> bytes:
    """The next word of those who hold a pipe's other end; empty when the last of them is gone."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while poll.poll(DEADLINE * 1000):
        try:
            return os.read(fd, 1000)
        except BlockingIOError:  # one was gone, and another one came
            pass
    pytest.fail("nothing was heard, and somebody still holds the pipe")
