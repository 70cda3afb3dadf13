"""One figure beside one other, and the settings under which it was taken.

A row holds the samples of both sides, taken in turn in one run (A B A B …); its medians and its ratio are computed from
those samples alone. Times jitter, ratios less: quote the ratios.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UsageError

MIB, GIB = 1 << 20, 1 << 30
SHARED_MEMORY = Path("/dev/shm")

Timed = Callable[[], float]
"""Does something once; returns the seconds that count."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        size: bytes of the policy's weights.
        tensors: number of tensors that share them.
        readers: processes that attach, and as many that load the file themselves.
        quick: fewer rounds, and nothing that takes a GiB.
        only: names of cases, or their beginnings; empty takes all.
        directory: where checkpoints are written.
        runtime: where segments are made.
    """

    size: int = 64 * MIB
    tensors: int = 200
    readers: int = 2
    quick: bool = False
    only: tuple[str, ...] = ()
    directory: Path = Path("/tmp")
    runtime: Path = SHARED_MEMORY


@dataclass(frozen=True, slots=True)
class Aim:
    """What a figure should be: the ratio where there is another side, else the value, in the row's unit."""

    sense: Literal["<=", ">="]
    bound: float


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, beside one other where there is something to compare it with.

    Attributes:
        name: what was measured.
        unit: of the samples: seconds, bytes a second, bytes, or percent of a core.
        samples: of each round, ours and the other side's; ours alone where there is no other side.
        beside: the other side.
        aim: what the figure should be.
        skipped: why it could not be measured on this box.
        failed: the error that ended the case.
        case: the name that ``--only`` takes.
    """

    name: str
    unit: Literal["s", "B/s", "B", "%"] = "s"
    samples: tuple[tuple[float, ...], ...] = ()
    beside: str = ""
    aim: Aim | None = None
    skipped: str = ""
    failed: str = ""
    case: str = ""

    @property
    def value(self) -> float | None:
        """The median of our samples."""
        return statistics.median(sample[0] for sample in self.samples) if self.samples else None

    @property
    def beside_value(self) -> float | None:
        """The median of the other side's samples."""
        return statistics.median(sample[1] for sample in self.samples) if self.samples and self.beside else None

    @property
    def ratio(self) -> float | None:
        """The median of the rounds' ratios, ours by the other: less is better of times, more is better of speeds."""
        return statistics.median(a / b for a, b in self.samples) if self.samples and self.beside else None

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None where there is no aim, or nothing was measured."""
        figure = self.ratio if self.beside else self.value
        if self.aim is None or figure is None:
            return None
        return figure <= self.aim.bound if self.aim.sense == "<=" else figure >= self.aim.bound


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
