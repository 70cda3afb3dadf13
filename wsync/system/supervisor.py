"""Runs a command for a gate or hook, and ends it with every process that it started, even in sessions of their own.

This file runs as a program of its own, between wsync and the command, in an isolated Python without site-packages. It
is the subreaper of everything that the command starts (prctl(2)), so that a process that leaves its group or session,
or loses its parent, stays below it and is found. On SIGTERM it sends SIGTERM to all of them, and SIGKILL some seconds
later. wsync sends it SIGTERM when time is up, and the kernel does when wsync ends, even by SIGKILL. If the command ends
by itself, processes that it left in the background go on.

Its exit status is the command's; if a signal ended the command, the same signal ends it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

_LOOK = 0.02  # seconds between two looks at what is left
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class _Ending(Exception):
    """SIGTERM came."""


def main(parent: int, grace: float, command: list[str]) -> None:
    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Ending

    prctl = ctypes.CDLL(None).prctl
    signal.signal(signal.SIGTERM, end)
    try:
        prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            return
        with open("/proc/self/environ", "rb") as file:  # Python adds variables at its start
            variables = dict(pair.partition(b"=")[::2] for pair in file.read().split(b"\0") if pair)
        status = _status(os.posix_spawn(command[0], command, variables, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ]))
    except _Ending:
        _end_all(grace)
        return
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def _status(command: int) -> int:
    """Waits for the command, and reaps orphans meanwhile."""
    while True:
        pid, status = os.wait()
        if pid == command:
            return status


def _end_all(grace: float) -> None:
    """Ends every process below this one: by SIGTERM, and after ``grace`` seconds by SIGKILL."""
    until = time.monotonic() + grace
    number = signal.SIGTERM
    told: set[int] = set()
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # none is left
            return
        if number != signal.SIGKILL and time.monotonic() > until:
            number, told = signal.SIGKILL, set()
        for pid in _below():
            if pid not in told:
                told.add(pid)
                try:
                    os.kill(pid, number)
                except OSError:  # it runs as another user (sudo), or has ended
                    pass
        if time.monotonic() > until + grace:  # no signal reaches the rest
            return
        time.sleep(_LOOK)


def _below() -> list[int]:
    """Every process below this one, parents first: a shell that ends before its child prints nothing about that."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
