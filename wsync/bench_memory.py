"""What is paid besides time: memory of many readers, calls and allocations of a pass; and what two other ways take.

Neither of these is built. To compare bytes that may not have changed takes twice the time of staging them (64 MiB, 2
cores): it reads two rows where a copy reads one, and no copy is saved that goes past the caches anyway. A file that is
linked has to be looked at for its check all the same, by one thread in the time that two take to stage it; and whoever
has it open for writing goes on writing to what is live.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from .bench import MIB, Aim, Beside, Case, Result, Rounds, Skip, timed
from .bench_place import Place, heard
from .bench_staging import slot_for
from .finite import all_finite
from .fitting import CHUNK
from .mapped import Mapped
from .memory import address_of

_AROUND = 1 << 16  # bytes of a file that is mapped which one fault brings (fault_around_bytes)
_OVERHEAD = 8 * MIB  # of one process, for mapping and swapping


def proportional(place: Place, case: Case) -> Iterator[Result]:
    """How much the proportional set sizes of all readers grow by attaching, beside that of processes that load.

    What a process has before it attaches (the interpreter, torch) is left out on both sides.
    """
    size, tensors, readers = place.settings.size, place.settings.tensors, place.settings.readers
    place.need(memory=readers * (size + 300 * MIB), shared=3 * size, disk=size)
    spec = place.stand("policy", size, tensors)
    file = place.save("policy/step_1.safetensors", size, tensors)
    place.run("-m", "wsync", "push", spec)
    attached = _growth(place, readers, "reader", "policy", str(size), str(tensors))
    loaded = _growth(place, readers, "loader", str(file), str(size), str(tensors))
    yield case.result(
        "B",
        attached,
        name=f"{readers} readers, proportional set size",
        beside=f"{readers} that load the file",
        beside_value=loaded,
        ratio=attached / loaded,
        rounds=1,
        aims=(Aim("<=", 1.05 * size + readers * _OVERHEAD, "value"),),
    )


def _growth(place: Place, number: int, *role: str) -> float:
    """Bytes by which so many processes grow when they take the weights."""
    processes = [place.start("-m", "wsync.bench_policy", *role) for _ in range(number)]
    _all_say(processes)
    before = sum(map(_proportional_set, processes))
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    _all_say(processes)
    grown = sum(map(_proportional_set, processes)) - before
    place.end()
    return float(grown)


def _all_say(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        heard(process)


def _proportional_set(process: subprocess.Popen[str]) -> int:
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def counts(place: Place, case: Case) -> Iterator[Result]:
    """Counts do not jitter: what one staged file takes, into a slot that was staged into before."""
    size = place.settings.size
    with slot_for(place, size, place.settings.tensors) as slot:
        slot.stage(finite=True)  # so that what is imported late is there
        asked = _counters()
        before = _counters()
        slot.stage(finite=True)
        taken = [now - then - (then - first) for first, then, now in zip(asked, before, _counters(), strict=True)]
        tracemalloc.start()  # asking took some itself
        try:
            slot.stage(finite=True)
            allocated = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        file = slot.path.stat().st_size
    for name, value, unit, bound in (
        ("staging, read calls", taken[0], "calls", -(-size // CHUNK) + 8),
        ("staging, bytes by read calls", taken[1], "B", file + CHUNK // 128),  # none twice
        ("staging, page faults", max(taken[2], 0), "faults", 256 + size // _AROUND),  # none of the slot's own
        ("staging, most allocated", allocated, "B", MIB),
    ):
        yield case.result(unit, value, name=name, aims=(Aim("<=", bound, "value"),))


def _counters() -> tuple[int, int, int]:
    """Read calls, bytes that they gave, and page faults of this process."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["syscr"]), int(lines["rchar"]), resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def unchanged(place: Place, case: Case) -> Iterator[Result]:
    """A file that holds what the slot holds already: to stage it again, or to compare it with the slot."""
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    with slot_for(place, place.settings.size, place.settings.tensors) as slot:
        slot.stage()
        held = address_of(slot.weights)

        def same(at: int, data: memoryview) -> bool:
            return not compare(address_of(data), held + at, len(data))

        look = Beside("comparing it", timed(lambda: _each_chunk(slot.path, slot.layout.nbytes, same)))
        yield from case.compare(place, timed(slot.stage), look, rounds=Rounds(20))


def by_reference(place: Place, case: Case) -> Iterator[Result]:
    """A file that lies in shared memory already: to stage and check it, or to link it, and check it where it is."""
    place.need(shared=4 * place.settings.size)
    with slot_for(place, place.settings.size, place.settings.tensors) as slot:
        here, taken = place.runtime / "here.safetensors", place.runtime / "taken.safetensors"
        shutil.copyfile(slot.path, here)
        os.utime(here, (0, 0))
        slot = replace(slot, path=here)
        regions = ((0, CHUNK, "F32"),)

        def finite(_: int, data: memoryview) -> bool:
            return all_finite(data, regions, ((0, len(data)),))

        def link() -> None:
            os.link(here, taken)
            _each_chunk(taken, slot.layout.nbytes, finite)
            taken.unlink()

        stage = timed(partial(slot.stage, finite=True))
        yield from case.compare(place, stage, Beside("linking it", timed(link)), rounds=Rounds(20))


def _each_chunk(path: Path, nbytes: int, good: Callable[[int, memoryview], bool]) -> None:
    """Looks at the last ``nbytes`` of a file piece by piece, where they are or, as the case may be, read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        start, parts = os.fstat(fd).st_size - nbytes, Mapped(fd)
        for at in range(0, nbytes, CHUNK):
            size = min(CHUNK, nbytes - at)
            with parts.part(start + at, size) as data:
                if not good(at, memoryview(os.pread(fd, size, start + at)) if data is None else data):
                    raise Skip(f"failed: {path.name} is not what was written there")
    finally:
        os.close(fd)


CASES = (
    Case("readers", "readers, proportional set size", proportional),
    Case("counts", "staging, read calls and memory", counts),
    Case("unchanged", "staging unchanged bytes", unchanged),
    Case("by-reference", "staging and checking a file on tmpfs", by_reference),
)
