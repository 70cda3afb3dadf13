"""How the cost of a pass grows: against tensors, bytes, readers, and files in the directory.

Each curve is fitted by a power, seconds = a · n^b, over its upper part, where what is constant no longer hides the
growth: b is 1 where the cost is linear. A curve that bends up shows as more than that. A pass is one look of the syncer
that finds a new checkpoint and publishes it; against files, one that finds nothing new.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

from . import header
from .attaching import attach
from .bench import MIB, Aim, Case, Result, Rounds, Skip, Timed, in_turn, timed
from .bench_place import Place
from .bench_policy import make
from .spec import load_spec
from .syncer import Syncer

_ROUNDS = Rounds(9, warm_up=False)
_LINEAR = Aim("<=", 1.1, "value")  # with room for what jitters
Measure = Callable[[Place, int, ExitStack], Timed]


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """b of the power a · n^b that fits best, by least squares of the logarithms, over the upper part of the curve.

    That is the last three points, or all within a 16th of the largest number where these are more.
    """
    found = sorted(points)
    least = min(found[-1][0] / 16, found[-3:][0][0])
    logs = [(math.log(n), math.log(seconds)) for n, seconds in found if n >= least]
    x, y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    slope: float = sum((a - x) * (b - y) for a, b in logs) / sum((a - x) ** 2 for a, _ in logs)
    return slope


def _curve(numbers: tuple[int, ...], measure: Measure) -> Callable[[Place, Case], Iterator[Result]]:
    def run(place: Place, case: Case) -> Iterator[Result]:
        quick = place.settings.quick
        points: list[tuple[float, float]] = []
        rounds = _ROUNDS.number
        left_out = ""
        for number in numbers[:4] if quick else numbers:
            try:
                with ExitStack() as undo:
                    work = measure(place, number, undo)
                    (column,) = in_turn([work], _ROUNDS.of(place.settings))
            except Skip as exc:  # larger ones will not fit either
                left_out = str(exc)
                break
            finally:
                place.clear()
            points.append((number, min(column)))  # of a pass that nothing disturbed
            rounds = min(rounds, len(column))
        if len(points) < 3:
            raise Skip(left_out)
        last, _ = points[-1]
        name = f"{case.title}, {points[0][0]:,} to {last:,}"
        yield case.result("exponent", exponent(points), name=name, points=tuple(points), aims=(_LINEAR,), rounds=rounds)

    return run


def _publishing(place: Place, nbytes: int, tensors: int, undo: ExitStack) -> Timed:
    """A pass that publishes a new checkpoint, in this process, into a segment that stands."""
    place.need(memory=2 * nbytes, shared=2 * nbytes, disk=nbytes)
    path = place.save("policy/step_1.safetensors", nbytes, tensors)
    spec = load_spec(str(place.stand("policy", nbytes, tensors, slots=2)))
    syncer = undo.enter_context(Syncer(spec, runtime=place.runtime))
    written = 0

    def work() -> float:
        nonlocal written
        written += 1
        os.utime(path, (written, written))
        return timed(lambda: _must(syncer.once().status, "published"))()

    for _ in range(2):  # the first publish into a slot maps it, a fault a page
        work()
    return work


def _must(status: str, wanted: str) -> None:
    if status != wanted:
        raise Skip(f"failed: a pass ended as {status}, and should have been {wanted}")


def _tensors(place: Place, number: int, undo: ExitStack) -> Timed:
    return _publishing(place, 16 * MIB, number, undo)


def _first(place: Place, number: int, undo: ExitStack) -> Timed:
    """The same of a process that was just started, to which segment and header are new."""
    _publishing(place, 16 * MIB, number, undo)
    path = place.files / "policy" / "step_1.safetensors"
    spec = load_spec(str(place.files / "policy.toml"))
    written = 1000

    def work() -> float:
        nonlocal written
        written += 1
        os.utime(path, (written, written))
        header.forget()
        with Syncer(spec, runtime=place.runtime) as syncer:
            return timed(lambda: _must(syncer.once().status, "published"))()

    return work


def _bytes(place: Place, number: int, undo: ExitStack) -> Timed:
    return _publishing(place, number * MIB, place.settings.tensors, undo)


def _readers(place: Place, number: int, undo: ExitStack) -> Timed:
    """Readers of this process, each with a record and a lease of its own, which all take each version."""
    work = _publishing(place, MIB, 16, undo)
    readers = [
        undo.enter_context(attach(make(MIB, 16), "policy", mode="swap", runtime_dir=place.runtime))
        for _ in range(number)
    ]

    def run() -> float:
        taken = work()
        for reader in readers:
            reader.refresh()
        return taken

    return run


def _files(place: Place, number: int, undo: ExitStack) -> Timed:
    """A pass that finds nothing new among so many files, which are older than the live one."""
    _publishing(place, MIB, 16, undo)
    folder = place.files / "policy"
    for old in range(number - 1):
        file = folder / f"old_{old}.safetensors"
        file.touch()
        os.utime(file, (0, 0))
    syncer = undo.enter_context(Syncer(load_spec(str(place.files / "policy.toml")), runtime=place.runtime))
    return timed(lambda: _must(syncer.once().status, "current"))


CASES = (
    Case("growth-tensors", "a pass against tensors", _curve((10, 100, 1000, 5000, 10_000, 20_000), _tensors)),
    Case("growth-first", "a first pass against tensors", _curve((10, 100, 1000, 5000, 10_000, 20_000), _first)),
    Case(
        "growth-bytes",
        "a pass against MiB",
        _curve((1, 4, 16, 64, 256, 1024, 4096, 8192), _bytes),
    ),
    Case("growth-readers", "a pass against readers", _curve((1, 2, 4, 8, 16, 32, 64), _readers)),
    Case("growth-files", "a pass against files", _curve((1, 10, 100, 1000, 3000, 10_000), _files)),
)
