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
_PREFIXES = ["", "K", "M", "G", "T"]

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
        runtime: where segments are made; one that is not there yet stands for the part of ``/dev/shm`` above it.

    Raises:
        UsageError: a directory is missing, or there are more tensors than numbers.
    """

    size: int = 64 * MIB
    tensors: int = 200
    readers: int = 2
    quick: bool = False
    only: tuple[str, ...] = ()
    directory: Path = Path("/tmp")
    runtime: Path = SHARED_MEMORY

    def __post_init__(self) -> None:
        if self.size < 4 * self.tensors:
            raise UsageError(
                f"--size {self.size}: {self.tensors} tensors take at least four bytes each. Give {4 * self.tensors} or "
                "more, or fewer --tensors."
            )
        runtime = self.runtime.absolute()  # processes run in another directory
        while not runtime.is_dir() and runtime.is_relative_to(SHARED_MEMORY):
            runtime = runtime.parent
        object.__setattr__(self, "runtime", runtime)
        object.__setattr__(self, "directory", self.directory.absolute())
        for path, option in ((self.runtime, "--runtime-dir"), (self.directory, "--dir")):
            if not path.is_dir():
                raise UsageError(f"{path} is not a directory. Name an existing one with {option}.")


@dataclass(frozen=True, slots=True)
class Aim:
    """What a figure should be: the ratio where there is another side, else the value, in the row's unit."""

    sense: Literal["<=", ">="]
    bound: float

    def met_by(self, figure: float) -> bool:
        return figure <= self.bound if self.sense == "<=" else figure >= self.bound


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
        return self.aim.met_by(figure) if self.aim and figure is not None else None


class Skip(Exception):
    """A case cannot be measured on this box; the text is the reason."""


def pairs(ours: Timed, theirs: Timed, rounds: int, seconds: float = 3.0) -> tuple[tuple[float, ...], ...]:
    """Runs both sides in turn, after one round that does not count; returns the seconds of each round.

    Args:
        rounds: how many, at least one.
        seconds: no further round begins after so long.
    """
    ours(), theirs()
    taken = []
    deadline = time.perf_counter() + seconds
    for _ in range(rounds):
        taken.append((ours(), theirs()))
        if time.perf_counter() > deadline:
            break
    return tuple(taken)


def compare(
    name: str,
    ours: Timed,
    beside: str,
    theirs: Timed,
    aim: Aim | None,
    rounds: int,
    *,
    seconds: float = 3.0,
    nbytes: int = 0,
) -> Row:
    """A row of pairs; of speeds where the bytes that a round moves are given, else of times."""
    samples = pairs(ours, theirs, rounds, seconds)
    if not nbytes:
        return Row(name, "s", samples, beside, aim)
    return Row(name, "B/s", tuple((nbytes / a, nbytes / b) for a, b in samples), beside, aim)


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
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*(?:([KMGT]?)(I?)B?)\s*", text.upper())
    size = 0
    if found and (found[2] or not found[3]):
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** _PREFIXES.index(found[2]))
    if not 0 < size < 1 << 50:
        raise UsageError(f"--size {text!r} is not a size. Give bytes as in 64MiB, 1.5GiB or 4096.")
    return size
