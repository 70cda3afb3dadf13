"""The settings of a benchmark, and its rows: each is a figure and what it is compared with.

A row holds the samples of both sides, taken in turn in one run (A B A B …); its medians and its ratio are computed from
those samples alone. Ratios vary less between runs than times do: quote the ratios.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import UsageError

MIB, GIB = 1 << 20, 1 << 30

Timed = Callable[[], float]
"""Does something once, and returns how many seconds of it count."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure: ``size`` bytes of weights, with checkpoints in ``directory`` and segments in ``runtime``."""

    size: int = 64 * MIB
    tensors: int = 200
    readers: int = 2
    quick: bool = False
    only: tuple[str, ...] = ()
    directory: Path = Path("/tmp")
    runtime: Path = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Aim:
    """The bound that a row should meet: of its ratio if it is compared with something, else of its value."""

    sense: Literal["<=", ">="]
    bound: float


@dataclass(slots=True)
class Row:
    """One figure, and another to compare it with if there is one.

    Attributes:
        unit: unit of the samples: seconds, bytes per second, bytes, or percent of a core.
        samples: one tuple for each round: ours, then the other side's if there is one.
        beside: name of the other side; empty without one.
        skipped: why it could not be measured on this box.
        failed: the error that ended the case.
        case: the name that ``--only`` takes.
        value: median of our samples.
        beside_value: median of the other side's samples.
        ratio: median of the rounds' ratios, ours divided by the other side's.
        met: whether the aim is met; None without an aim or a measurement.
    """

    name: str
    unit: Literal["s", "B/s", "B", "%"] = "s"
    samples: tuple[tuple[float, ...], ...] = ()
    beside: str = ""
    aim: Aim | None = None
    skipped: str = ""
    failed: str = ""
    case: str = ""
    value: float | None = field(init=False, default=None)
    beside_value: float | None = field(init=False, default=None)
    ratio: float | None = field(init=False, default=None)
    met: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not self.samples:
            return
        self.value = figure = statistics.median(sample[0] for sample in self.samples)
        if self.beside:
            self.beside_value = statistics.median(sample[1] for sample in self.samples)
            self.ratio = figure = statistics.median(a / b for a, b in self.samples)
        if self.aim:
            self.met = figure <= self.aim.bound if self.aim.sense == "<=" else figure >= self.aim.bound


class Skip(Exception):
    """A case cannot be measured on this box; the text is the reason."""


def compare(
    name: str, ours: Timed, beside: str, theirs: Timed, aim: Aim | None, rounds: int, *, nbytes: int = 0
) -> Row:
    """Measures both sides in turn: one round to warm up, then ``rounds``, or fewer if 3 seconds have passed.

    Args:
        nbytes: bytes that one call moves, for a row of speeds; 0 for a row of times.
    """
    ours(), theirs()
    samples: list[tuple[float, float]] = []
    deadline = time.perf_counter() + 3
    while not samples or (len(samples) < rounds and time.perf_counter() < deadline):
        samples.append((ours(), theirs()))
    if nbytes:
        return Row(name, "B/s", tuple((nbytes / a, nbytes / b) for a, b in samples), beside, aim)
    return Row(name, "s", tuple(samples), beside, aim)


def timed(work: Callable[[], object], times: int = 1) -> Timed:
    """Returns a function that measures the seconds of one call, as the mean of ``times`` calls in a row."""

    def run() -> float:
        began = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began) / times

    return run


def parse_size(text: str) -> int:
    """Parses ``64MiB``, ``1.5GiB``, ``100MB`` or ``4096`` into bytes.

    Raises:
        UsageError: the text is not a size.
    """
    found = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*(?:([KMGT])(I?))?B?\s*", text.upper())
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " ")) if found else 0
    if not 0 < size < 1 << 50:
        raise UsageError(f"--size {text!r} is not a size. Give bytes as in 64MiB, 1.5GiB or 4096.")
    return size
