"""How the cost of a pass grows with tensors, bytes, and files in the directory: ``python tests/measure/growth.py``.

Each curve is a power, seconds = a · n^b, fitted to its upper part, where what is constant no longer hides the growth: b
is 1 where the cost is linear. Takes about a minute.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from wsync.bench.rows import MIB, Settings
from wsync.bench.workspace import Workspace, private_workspace
from wsync.settings.spec import load_spec
from wsync.sync.syncer import Syncer

ROUNDS = 5
Pass = Callable[[], str]


@contextmanager
def publishing(workspace: Workspace, nbytes: int, tensors: int) -> Iterator[Pass]:
    """A pass that finds a new checkpoint and publishes it, each slot having had one."""
    spec, file = (
        workspace.write_spec("policy", nbytes, tensors),
        workspace.save("policy/step_1.safetensors", nbytes, tensors),
    )
    times = iter(range(1, 1000))
    with Syncer(load_spec(str(spec)), runtime=workspace.runtime) as syncer:

        def run() -> str:
            os.utime(file, (number := next(times), number))
            return syncer.once().status

        for _ in range(3):
            run()
        yield run


@contextmanager
def among_files(workspace: Workspace, number: int) -> Iterator[Pass]:
    """A pass that finds nothing new among so many files."""
    with publishing(workspace, MIB, 16):
        for old in range(number - 1):
            file = workspace.files / "policy" / f"old_{old}.safetensors"
            file.touch()
            os.utime(file, (0, 0))
        with Syncer(load_spec(str(workspace.files / "policy.toml")), runtime=workspace.runtime) as syncer:
            yield lambda: syncer.once().status


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """b of the power that fits the last three points best, by least squares of the logarithms."""
    logs = [(math.log(number), math.log(seconds)) for number, seconds in points[-3:]]
    x, y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return float(sum((a - x) * (b - y) for a, b in logs) / sum((a - x) ** 2 for a, _ in logs))


def main() -> None:
    curves: list[tuple[str, tuple[int, ...], Callable[[Workspace, int], AbstractContextManager[Pass]]]] = [
        ("tensors", (100, 1000, 5000, 20_000), lambda workspace, n: publishing(workspace, 16 * MIB, n)),
        ("MiB", (16, 64, 256, 1024), lambda workspace, n: publishing(workspace, n * MIB, 200)),
        ("files", (10, 100, 1000, 10_000), among_files),
    ]
    for name, numbers, measure in curves:
        points = []
        for number in numbers:
            settings = Settings(directory=Path(tempfile.gettempdir()))
            with private_workspace(settings) as workspace, measure(workspace, number) as run:
                points.append((number, min(seconds(run) for _ in range(ROUNDS))))
        figures = ", ".join(f"{number:,}: {taken * 1e3:.2f} ms" for number, taken in points)
        print(f"a pass against {name} grows as n^{exponent(points):.2f} ({figures})", flush=True)


def seconds(run: Pass) -> float:
    began = time.perf_counter()
    status = run()
    taken = time.perf_counter() - began
    assert status in ("published", "current"), status
    return taken


if __name__ == "__main__":
    main()
