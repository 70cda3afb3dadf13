"""What this box can do, measured on the real path beside the machine's limit and beside the usual ways.

A case measures one thing and gives results, each of them one figure beside one other; what it cannot measure here is a
result, too, with the reason. Both figures come from the same run, in turn (A B A B …), so that a box that is busy for a
moment is busy for both: the ratio is the median of the ratios of neighbours, and the spread says how far those lie
apart. Times jitter, ratios less: quote the ratios.
"""

from __future__ import annotations

import re
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import UsageError

if TYPE_CHECKING:
    from .bench_place import Place

MIB, GIB = 1 << 20, 1 << 30
MAX_TENSORS, MAX_READERS = 100_000, 64
_UNITS = {
    "": 1,
    "K": 1000,
    "M": 1000**2,
    "G": 1000**3,
    "T": 1000**4,
    "KI": 1 << 10,
    "MI": MIB,
    "GI": GIB,
    "TI": 1 << 40,
}

Timed = Callable[[], float]
"""Does something once; returns the seconds that count."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        size: bytes of the policy's weights.
        tensors: among which they are divided.
        readers: processes that attach, and as many that load the file themselves.
        quick: fewer rounds, and nothing that takes a GiB.
        only: names of cases, or their beginnings; empty takes all.
        growth: the curves of growth in place of the table.
        directory: where checkpoints are written; default the temporary directory.
        runtime: where segments live; default ``/dev/shm``.

    Raises:
        UsageError: a number is beyond its bounds.
    """

    size: int = 64 * MIB
    tensors: int = 200
    readers: int = 2
    quick: bool = False
    only: tuple[str, ...] = ()
    growth: bool = False
    directory: Path | None = None
    runtime: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.tensors <= MAX_TENSORS:
            raise UsageError(f"--tensors {self.tensors}: give a number from 1 to {MAX_TENSORS:,}.")
        if not 1 <= self.readers <= MAX_READERS:
            raise UsageError(f"--readers {self.readers}: give a number from 1 to {MAX_READERS}.")
        if self.size < 4 * self.tensors:
            raise UsageError(
                f"--size {self.size}: {self.tensors} tensors take four bytes each at least. Give {4 * self.tensors} or "
                "more, or fewer --tensors."
            )


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often a comparison is made.

    Attributes:
        number: of rounds, at most.
        seconds: that they may take together; one is always made.
        warm_up: a round before them that does not count.
    """

    number: int = 12
    seconds: float = 3.0
    warm_up: bool = True

    def of(self, settings: Settings) -> Rounds:
        """The same, or fewer where it is to be quick."""
        return replace(self, number=max(self.number // 4, 2), seconds=self.seconds / 4) if settings.quick else self


@dataclass(frozen=True, slots=True)
class Aim:
    """What a figure should be: the ``ratio`` to the other one, or the ``value`` itself, in the result's unit."""

    sense: Literal["<=", ">="]
    bound: float
    of: Literal["ratio", "value"] = "ratio"

    def met_by(self, figure: float) -> bool:
        return figure <= self.bound if self.sense == "<=" else figure >= self.bound


@dataclass(frozen=True, slots=True)
class Result:
    """One figure beside one other.

    Attributes:
        case: whose it is, the name that ``--only`` takes.
        name: what was measured.
        unit: of both values: ``s``, ``B/s``, ``B``, ``share`` of a core, ``exponent``, or what is counted.
        value: ours; None where it was not measured.
        beside: what the other one is.
        beside_value: of the other one.
        ratio: ours by the other one, in the unit: of times less is better, of speeds more.
        spread: half the distance of the quartiles of that ratio, as a share of it.
        rounds: of which these are the medians.
        aims: what the figure should be.
        skipped: why it was not measured; empty where it was.
        points: a curve of ``(number, seconds)``.
    """

    case: str
    name: str
    unit: str = "s"
    value: float | None = None
    beside: str = ""
    beside_value: float | None = None
    ratio: float | None = None
    spread: float | None = None
    rounds: int = 0
    aims: tuple[Aim, ...] = ()
    skipped: str = ""
    points: tuple[tuple[float, float], ...] = ()

    @property
    def met(self) -> bool | None:
        """Whether the aims are; None where there is none, or nothing was measured."""
        figures = [(aim, self.ratio if aim.of == "ratio" else self.value) for aim in self.aims]
        if not figures or any(figure is None for _, figure in figures):
            return None
        return all(aim.met_by(figure) for aim, figure in figures if figure is not None)

    @property
    def failed(self) -> bool:
        """Whether it was not measured, and should have been."""
        return self.skipped.startswith("failed:")


class Skip(Exception):
    """A case cannot be measured on this box; the text is the reason, and begins with ``failed:`` where it should."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What ours is compared with; without ``work`` it cannot be measured here, for the reason ``skipped``."""

    name: str
    work: Timed | None
    aims: tuple[Aim, ...] = ()
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is measured: a name for ``--only``, what it is in words, and how."""

    name: str
    title: str
    run: Callable[[Place, Case], Iterable[Result]]

    def compare(
        self,
        place: Place,
        ours: Timed,
        *besides: Beside,
        nbytes: int = 0,
        rounds: Rounds = Rounds(),
    ) -> Iterator[Result]:
        """Ours and the others in turn, one result each.

        Args:
            nbytes: that ours moves; the figures are then speeds.
        """
        works = [ours, *(beside.work for beside in besides if beside.work)]
        columns = in_turn(works, rounds.of(place.settings))
        figures = [[nbytes / taken for taken in column] if nbytes else column for column in columns]
        others = iter(figures[1:])
        for beside in besides:
            if beside.work is None:
                yield self.result("", beside=beside.name, aims=beside.aims, skipped=beside.skipped)
                continue
            yield self.beside(figures[0], next(others), beside, "B/s" if nbytes else "s")

    def beside(self, ours: list[float], other: list[float], beside: Beside, unit: str) -> Result:
        """The result of figures that were taken in turn."""
        ratios = sorted(a / b for a, b in zip(ours, other, strict=True))
        ratio = statistics.median(ratios)
        return self.result(
            unit,
            statistics.median(ours),
            beside=beside.name,
            beside_value=statistics.median(other),
            ratio=ratio,
            spread=(ratios[3 * len(ratios) // 4] - ratios[len(ratios) // 4]) / 2 / ratio if len(ratios) > 3 else None,
            rounds=len(ratios),
            aims=beside.aims,
        )

    def result(self, unit: str, value: float | None = None, *, name: str = "", **more: object) -> Result:
        return Result(self.name, name or self.title, unit, value, **more)  # type: ignore[arg-type]


def in_turn(works: list[Timed], rounds: Rounds) -> list[list[float]]:
    """What each takes in each round, A B C A B C …"""
    if rounds.warm_up:
        for work in works:
            work()
    deadline = time.perf_counter() + rounds.seconds
    columns: list[list[float]] = [[] for _ in works]
    for _ in range(rounds.number):
        for column, work in zip(columns, works, strict=True):
            column.append(work())
        if time.perf_counter() > deadline:
            break
    return columns


def timed(work: Callable[[], object], times: int = 1) -> Timed:
    """The seconds that a call takes, of so many calls in a row."""

    def run() -> float:
        began = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began) / times

    return run


def parse_size(text: str) -> int:
    """Bytes of ``64MiB``, ``1.5GiB``, ``100MB``, ``4096``.

    Raises:
        UsageError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?I?)B?\s*", text.upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if not 0 < size < 1 << 50:
        raise UsageError(f"--size {text!r} is no size. Give bytes as in 64MiB, 1.5GiB or 4096.")
    return size


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals wait meanwhile: what one raises in a library's import, that may turn into another error, or into none."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def cases() -> tuple[Case, ...]:
    """All cases of the table, in its order."""
    from . import bench_memory, bench_processes, bench_reading, bench_staging, bench_watching

    return (
        *bench_processes.CASES,
        *bench_staging.CASES,
        *bench_memory.CASES,
        *bench_reading.CASES,
        *bench_watching.CASES,
    )


def chosen(settings: Settings) -> tuple[Case, ...]:
    """The cases that the settings ask for; all that they need is imported then.

    Raises:
        UsageError: there is none of such a name.
    """
    from .bench_growth import CASES

    known = CASES if settings.growth else cases()
    for name in settings.only:
        if not any(case.name.startswith(name) for case in known):
            names = ", ".join(case.name for case in known)
            raise UsageError(f"--only {name!r}: no case is named so. There are {names}.")
    return tuple(case for case in known if not settings.only or case.name.startswith(settings.only))


def run(wanted: Iterable[Case], settings: Settings, say: Callable[[str], None] = lambda _: None) -> Iterator[Result]:
    """Measures case by case, in places of their own that are removed afterwards, also on an interrupt.

    Args:
        wanted: see ``chosen``.
        say: called with a case's title before it is measured.

    Raises:
        UsageError: a setting cannot be used.
        OutOfSharedMemory: there is no room for the least of them.
    """
    from .bench_place import Place

    with Place(settings) as place:
        for case in wanted:
            say(case.title)
            try:
                yield from case.run(place, case)
            except Skip as exc:
                yield case.result("", skipped=str(exc))
            except Exception as exc:  # one case's trouble is not the others', whatever a library raises
                reason = (str(exc) or type(exc).__name__).splitlines()[0]
                yield case.result("", skipped=f"failed: {reason}")
            finally:
                place.clear()
