"""What whole commands take: their time and their memory, for the measurements."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence

_RUNNER = """
import os, sys, time
times, kib, codes, null = [], 0, set(), os.open(os.devnull, os.O_WRONLY)
for _ in range(int(sys.argv[1])):
    began = time.perf_counter()
    quiet = [(os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, null, 2)]
    pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ, file_actions=quiet)
    _, status, usage = os.wait4(pid, 0)
    times.append(time.perf_counter() - began)
    kib = max(kib, usage.ru_maxrss)
    codes.add(os.waitstatus_to_exitcode(status))
print(min(times), kib, *codes)
"""


def spent(command: Sequence[str], env: Mapping[str, str], rounds: int) -> tuple[float, float, set[int]]:
    """The least seconds of a command in some rounds, the most MiB of memory, and the exit codes.

    A small process starts it: to the kernel a command has had the memory of the process that it was forked from.
    """
    runner = [sys.executable, "-S", "-c", _RUNNER, str(rounds), *command]
    said = subprocess.run(runner, env=dict(env), stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds, kib, *codes = said.split()
    return float(seconds), float(kib) / 1024, set(map(int, codes))
