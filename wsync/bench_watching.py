"""A real ``wsync watch``: how soon a new file is in the policy, and what it costs while there is none."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .attaching import attach
from .bench import MIB, Aim, Case, Result, Skip
from .bench_place import BY_HAND, Place, heard
from .bench_policy import make
from .reader import Reader

_SIZE = MIB
_PHASES = [(number + 0.5) / 4 for number in range(4)]  # seconds after a look
_DEADLINE = 30.0  # seconds after which a file that was not noticed fails the case


def watch(place: Place, case: Case) -> Iterator[Result]:
    """How soon a new file is in the policy; then, with nothing more to do, what the same watch costs."""
    place.need(shared=8 * _SIZE, disk=8 * _SIZE)
    theirs = None if place.settings.quick else _polling(place)
    place.save("small/step_0.safetensors", _SIZE, place.settings.tensors)
    spec = place.stand("small", _SIZE, place.settings.tensors)
    ours = place.start("-m", "wsync", "watch", spec, "--log-format", "json")
    with attach(make(_SIZE, place.settings.tensors), "small", timeout=60, runtime_dir=place.runtime) as reader:
        yield from _latency(place, case, reader, theirs)
        yield from _idle(place, case, ours.pid)


def _latency(place: Place, case: Case, reader: Reader, theirs: subprocess.Popen[str] | None) -> Iterator[Result]:
    """From the rename until ``refresh()`` is True, beside a script that looks each second.

    Files are renamed as soon as they are written, as trainers do. The script's files come at moments that are spread
    evenly over its second; ours come in between.
    """
    ours: list[float] = []
    polled: list[float] = []
    if theirs:
        heard(theirs)
    for number, phase in enumerate(random.sample(_PHASES, len(_PHASES)), 1):
        moment = time.monotonic() + phase  # it looked just now
        ours += [_until_refreshed(place, reader, 100 * number + each) for each in range(16)]
        if not theirs:
            break
        time.sleep((moment - time.monotonic()) % 1)
        polled.append(_until_stamped(place, theirs, number))
    if theirs:
        theirs.kill()
    for name, percent, bound in (("", 50, 0.015), ("the same, 99th percentile", 99, 0.040)):
        value, aims = percentile(ours, percent), (Aim("<=", bound, "value"),)
        result = case.result("s", value, name=name, rounds=len(ours), aims=aims)
        if polled:
            other = percentile(polled, percent)
            result = replace(result, beside="a look each second", beside_value=other, ratio=value / other)
        yield result


def _polling(place: Place) -> subprocess.Popen[str]:
    place.save("theirs/step_0.safetensors", _SIZE, place.settings.tensors)
    return place.start("-P", BY_HAND, place.files / "theirs", place.runtime / "by-hand", "--watch")


def _idle(place: Place, case: Case, pid: int) -> Iterator[Result]:
    """Processor time and resident memory of a watch that has published, and now waits."""
    time.sleep(0.2)  # what follows a publish is not idle
    before, began = _on_processor(pid), time.perf_counter()
    time.sleep(1.5 if place.settings.quick else 5.0)
    share = (_on_processor(pid) - before) / (time.perf_counter() - began)
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))
    yield case.result("share", share, name="wsync watch, idle, of a core", aims=(Aim("<=", 0.003, "value"),))
    yield case.result("B", resident, name="wsync watch, resident memory", aims=(Aim("<=", 48 * MIB, "value"),))


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def _until_refreshed(place: Place, reader: Reader, number: int) -> float:
    written = place.save("new.safetensors", _SIZE, place.settings.tensors, settled=False)
    began = time.perf_counter()
    os.replace(written, place.files / "small" / f"step_{number}.safetensors")
    while not reader.refresh():
        if not reader.wait(_DEADLINE):
            raise Skip(f"failed: wsync watch did not publish a new file within {_DEADLINE:g} s")
    return time.perf_counter() - began


def _until_stamped(place: Place, theirs: subprocess.Popen[str], number: int) -> float:
    stamp = place.runtime / "by-hand" / "stamp"
    before = stamp.read_text()
    written = place.save("new.safetensors", _SIZE, place.settings.tensors, settled=False)
    began = time.perf_counter()
    os.replace(written, place.files / "theirs" / f"step_{number}.safetensors")
    while stamp.read_text() == before:
        if theirs.poll() is not None or time.perf_counter() - began > _DEADLINE:
            raise Skip("failed: the script by hand ended")
        time.sleep(0.002)
    return time.perf_counter() - began


def _on_processor(pid: int) -> float:
    """Seconds that a process's threads ran, to the nanosecond where the kernel keeps it."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


CASES = (Case("watch", "file renamed until refresh() is True", watch),)
