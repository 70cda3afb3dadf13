"""One figure beside one other, and the settings under which it was taken.

A row holds the samples of both sides, taken in turn in one run (A B A B …); its medians and its ratio are computed from
those samples alone. Times jitter, ratios less: quote the ratios.
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
"""Does something once; returns the seconds that count."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked for: ``size`` is bytes of weights, ``directory`` is for checkpoints, ``runtime`` for segments."""

    size: int = 64 * MIB
    tensors: int = 200
    readers: int = 2
    quick: bool = False
    only: tuple[str, ...] = ()
    directory: Path = Path("/tmp")
    runtime: Path = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Aim:
    """What a figure should be: the ratio where there is another side, else the value, in the row's unit."""

    sense: Literal["<=", ">="]
    bound: float


@dataclass(slots=True)
class Row:
    """One figure, beside one other where there is something to compare it with.

    Attributes:
        unit: of the samples: seconds, bytes a second, bytes, or percent of a core.
        samples: of each round: ours, and the other side's if there is one.
        skipped: why it could not be measured on this box.
        failed: the error that ended the case.
        case: the name that ``--only`` takes.
        value: the median of our samples.
        beside_value: the median of the other side's.
        ratio: the median of the rounds' ratios, ours by the other: of times less is better, of speeds more.
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
    """Runs both sides in turn, after one round that does not count; at least one round, and no more after 3 seconds.

    Args:
        nbytes: what a round moves, for a row of speeds; else it is one of times.
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
    """Measures the seconds of one call, as the mean of so many in a row."""

    def run() -> float:
        began = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began) / times

    return run


def parse_size(text: str) -> int:
    """Bytes of ``64MiB``, ``1.5GiB``, ``100MB``, ``4096``.

    Raises:
        UsageError: the text is not a size.
    """
    found = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*(?:([KMGT])(I?))?B?\s*", text.upper())
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " ")) if found else 0
    if not 0 < size < 1 << 50:
        raise UsageError(f"--size {text!r} is not a size. Give bytes as in 64MiB, 1.5GiB or 4096.")
    return size
