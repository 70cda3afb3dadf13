"""What is measured: each case is a function that gets a place of its own and returns its rows.

Staging is timed from the path on (open, validate, plan, read), into a file in shared memory such as a slot is. The
policies attach as any other does.
"""

from __future__ import annotations

import itertools
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.fit import Fit
from ..errors import UsageError
from ..policy.attaching import attach
from ..policy.reader import Mode, Reader
from ..text import size as shown
from ..updaters.shared_memory import SharedMemoryWeightUpdater
from .place import Place, private_place, settle
from .processes import make
from .rows import GIB, MIB, Aim, Row, Settings, Skip, Timed, compare, timed

BY_HAND = Path(__file__).with_name("by_hand.py")
_PAGE = 4096
_CALLS = 10_000  # of refresh() in one sample, which is a mean
_READER_OVERHEAD = 8 * MIB  # of a process that maps a segment
_DEADLINE = 30.0  # seconds until a file that was not noticed fails the case


def push(place: Place) -> list[Row]:
    """A push with nothing to do, then one of a checkpoint that is new, beside a script of thirty lines."""
    size, tensors = place.settings.size, place.settings.tensors
    place.need(5 * size)
    spec = place.write_spec("policy", size, tensors)
    file = place.save("policy/step_1.safetensors", size, tensors)
    (place.runtime / "by-hand").mkdir()
    ours = timed(partial(place.run, "-m", "wsync", "push", spec))
    script = timed(partial(place.run, "-P", BY_HAND, file.parent, place.runtime / "by-hand"))
    imports = timed(partial(place.run, "-c", "import typer, rich"))
    times = itertools.count(1)

    def renewed(work: Timed) -> float:
        os.utime(file, ns=(0, next(times) * 10**9))  # new, and old enough that nobody waits for its writer
        return work()

    idle, few = "wsync push, nothing to do", 1 if place.settings.quick else 3
    new, our_new, script_new = f"wsync push, new {shown(size)}", partial(renewed, ours), partial(renewed, script)
    return [
        compare(idle, ours, "import typer, rich", imports, Aim("<=", 1.45), place.rounds(12)),
        compare(idle, ours, "script, load_file", script, Aim("<=", 1 / 25), few),
        compare(new, our_new, "script, load_file", script_new, Aim("<=", 1 / 15), few),
    ]


# --- staging


class Slot:
    """A checkpoint on the disk and in the page cache, and memory for its weights such as a slot is."""

    def __init__(self, place: Place, path: Path) -> None:
        self.path = path
        with open_checkpoint(path) as checkpoint:
            self.layout = checkpoint.layout
        self.nbytes = self.layout.nbytes
        with open(place.runtime / path.name, "w+b") as file:
            os.posix_fallocate(file.fileno(), 0, self.nbytes)
            self.weights = memoryview(mmap.mmap(file.fileno(), self.nbytes))
        self.targets = {
            entry.name: torch.frombuffer(self.weights[entry.offset :][: entry.nbytes], dtype=torch.float32)
            for entry in self.layout.tensors
        }

    def stage(self, *, finite: bool = False) -> None:
        with open_checkpoint(self.path) as checkpoint:
            checkpoint.read_into(self.weights, checkpoint.plan(self.layout, Fit()), finite=finite)

    def memory_copy(self) -> Timed:
        """A copy of as many bytes from memory, by one thread."""
        return timed(partial(np.copyto, np.frombuffer(self.weights, "u1"), np.ones(self.nbytes, "u1")))

    def load_and_copy(self) -> None:
        """The usual way to the same bytes, with as many threads as staging has."""
        before = torch.get_num_threads()
        torch.set_num_threads(min(max(len(os.sched_getaffinity(0)) // 4, 1), 8))
        for name, tensor in load_file(self.path).items():
            self.targets[name].copy_(tensor)
        torch.set_num_threads(before)


def _slot(place: Place, nbytes: int, tensors: int) -> Slot:
    place.need(2 * nbytes)
    return Slot(place, place.save("staging.safetensors", nbytes, tensors))


def staging(place: Place) -> list[Row]:
    return _warm(place, place.settings.size, place.settings.tensors, Aim(">=", 0.85), Aim(">=", 1.0))


def staging_large(place: Place) -> list[Row]:
    if place.settings.quick:
        raise Skip("--quick leaves out what takes a GiB")
    return _warm(place, max(place.settings.size, GIB), place.settings.tensors, Aim(">=", 0.85), Aim(">=", 1.0))


def staging_many(place: Place) -> list[Row]:
    return _warm(place, 2000 * 4096, 2000, None, Aim(">=", 8.0))


def _warm(place: Place, nbytes: int, tensors: int, copy: Aim | None, load: Aim) -> list[Row]:
    slot = _slot(place, nbytes, tensors)
    name, ours, rounds = f"staging {shown(slot.nbytes)} in {tensors:,}, warm", timed(slot.stage), place.rounds(20)
    return [
        compare(name, ours, "memory copy", slot.memory_copy(), copy, rounds, nbytes=slot.nbytes),
        compare(name, ours, "load_file, copy_", timed(slot.load_and_copy), load, rounds, nbytes=slot.nbytes),
    ]


def finite(place: Place) -> list[Row]:
    """What it costs to look for NaN and infinity on the way."""
    slot = _slot(place, place.settings.size, place.settings.tensors)
    ours, theirs = timed(partial(slot.stage, finite=True)), timed(slot.stage)
    return [compare("staging, finite check", ours, "without it", theirs, Aim("<=", 1.4), place.rounds(20))]


def staging_shifted(place: Place) -> list[Row]:
    """The worst of files whose data begins 8, 16 or 24 bytes before a page, beside one whose data begins elsewhere.

    ``rep movsb``, which read(2) uses, is slow on AMD's cores where the target's address is 8 to 24 bytes beyond the
    source's, modulo 4096.
    """
    size, tensors = place.settings.size, place.settings.tensors
    place.need(5 * size)
    file = place.save("staging.safetensors", size, tensors)
    usual, *slow = (Slot(place, _shifted(file, before)) for before in (1024, 8, 16, 24))
    name, theirs, rounds = "staging, data 8 to 24 B before a page", timed(usual.stage), place.rounds(12)
    rows = [compare(name, timed(slot.stage), "1 KiB", theirs, None, rounds, nbytes=usual.nbytes) for slot in slow]
    return [min(rows, key=lambda row: row.ratio or 0.0)]


def _shifted(source: Path, before: int) -> Path:
    """Copies a checkpoint, its header padded so that the data begins so many bytes before a page."""
    whole = source.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = whole[8:end] + b" " * ((-end - before) % _PAGE)
    target = source.with_name(f"{before}.safetensors")
    target.write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])
    settle(target)
    return target


def staging_cold(place: Place) -> list[Row]:
    """A file that the page cache does not hold, beside a read past the page cache."""
    size = place.settings.size if place.settings.quick else max(place.settings.size, GIB)
    slot = _slot(place, size, place.settings.tensors)
    dd = ["dd", f"if={slot.path}", "of=/dev/null", "iflag=direct", "bs=8M"]
    read_directly = partial(subprocess.run, dd, check=True, capture_output=True, start_new_session=True)

    def dropped(work: Callable[[], object]) -> float:
        drop_cache(slot.path)
        return timed(work)()

    try:
        dropped(read_directly)
    except (OSError, subprocess.CalledProcessError) as exc:
        raise Skip("dd cannot read directly there; name a disk with --dir") from exc
    name, ours, theirs = f"staging {shown(size)}, cold", partial(dropped, slot.stage), partial(dropped, read_directly)
    return [compare(name, ours, "dd iflag=direct", theirs, Aim(">=", 0.9), place.rounds(8), nbytes=slot.nbytes)]


def drop_cache(path: Path) -> None:
    """Takes a file that is on the disk out of the page cache.

    Raises:
        Skip: it stays there, as on tmpfs, or the system does not tell.
    """
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file.fileno(), [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT)
        except BlockingIOError:
            return
        except OSError:  # the file system does not tell
            pass
    raise Skip(f"the page cache of {path.parent} cannot be dropped; name a disk with --dir")


# --- policies in this process


@contextmanager
def _attached(
    place: Place, nbytes: int, tensors: int, mode: Mode, policies: int = 1
) -> Iterator[tuple[Callable[[], object], list[Reader]]]:
    """What publishes a version, and policies that have taken one from each slot."""
    state = {name: torch.rand_like(tensor) for name, tensor in make(nbytes, tensors).state_dict().items()}
    updater = SharedMemoryWeightUpdater("policy", runtime_dir=place.runtime)
    publish = partial(updater.push_weights, state)
    publish()
    with ExitStack() as stack:
        stack.callback(updater.close)
        attached = partial(attach, name="policy", mode=mode, runtime_dir=place.runtime)
        readers = [stack.enter_context(attached(make(nbytes, tensors))) for _ in range(policies)]
        for _ in range(6):
            publish()
            for reader in readers:
                _take(reader)
        yield publish, readers


def _take(reader: Reader) -> None:
    if not reader.refresh():
        raise RuntimeError("refresh() did not take the version that was published")


def refresh_idle(place: Place) -> list[Row]:
    """Beside the least that a look can cost: a method call that loads eight bytes."""

    class Word:
        def __init__(self) -> None:
            self._words = memoryview(mmap.mmap(-1, _PAGE)).cast("Q")

        def load(self) -> int:
            return self._words[0]

    with _attached(place, MIB, 16, "swap") as (_, (reader,)):
        ours, theirs = timed(reader.refresh, _CALLS), timed(Word().load, _CALLS)
        return [compare("refresh(), nothing new", ours, "loading 8 bytes", theirs, Aim("<=", 2.0), place.rounds(40))]


def refresh(place: Place) -> list[Row]:
    return _swap(place, place.settings.tensors, Aim("<=", 4.0))


def refresh_many(place: Place) -> list[Row]:
    return _swap(place, 2000, Aim("<=", 1.8))


def _swap(place: Place, tensors: int, aim: Aim) -> list[Row]:
    """Beside a loop that points parameters at other tensors, and beside ``load_state_dict``.

    All are warm: another policy has just done the same.
    """
    nbytes = max(place.settings.size, 4 * tensors)
    place.need(5 * nbytes)
    usual = [make(nbytes, tensors) for _ in range(2)]
    views = itertools.cycle([[torch.empty_like(tensor) for tensor in usual[0].parameters()] for _ in range(2)])

    def point(parameters: list[torch.nn.Parameter], others: list[torch.Tensor]) -> None:
        for parameter, view in zip(parameters, others, strict=True):
            parameter.data = view

    def loop() -> float:
        first, second = (partial(point, list(policy.parameters()), next(views)) for policy in usual)
        first()
        return timed(second)()

    def load() -> float:
        state = usual[0].state_dict()
        usual[1].load_state_dict(state)
        return timed(partial(usual[1].load_state_dict, state))()

    with _attached(place, nbytes, tensors, "swap", policies=2) as (publish, (other, reader)):

        def ours() -> float:
            publish()
            _take(other)
            return timed(partial(_take, reader))()

        name = f"refresh() in swap, {tensors:,} tensors"
        return [
            compare(name, ours, "loop, p.data = v", loop, aim, place.rounds(20)),
            compare(name, ours, "load_state_dict", load, Aim("<=", 0.1), place.rounds(8)),
        ]


def refresh_copy(place: Place) -> list[Row]:
    place.need(5 * place.settings.size)
    with _attached(place, place.settings.size, place.settings.tensors, "copy") as (publish, (reader,)):
        nbytes = sum(parameter.nbytes for parameter in make(place.settings.size, place.settings.tensors).parameters())
        source, target = np.ones(nbytes, "u1"), np.zeros(nbytes, "u1")

        def ours() -> float:
            publish()
            return timed(partial(_take, reader))()

        name, theirs = f"refresh() in copy, {shown(nbytes)}", timed(partial(np.copyto, target, source))
        return [compare(name, ours, "memory copy", theirs, Aim(">=", 0.85), place.rounds(20), nbytes=nbytes)]


# --- a watch, and many readers


def watch(place: Place) -> list[Row]:
    """How soon a running ``wsync watch`` has a new file in the policy, then what it costs while nothing is new."""
    tensors, nbytes = place.settings.tensors, max(MIB, 4 * place.settings.tensors)
    place.save("small/step_0.safetensors", nbytes, tensors)
    spec = place.write_spec("small", nbytes, tensors)
    taken = []
    with (
        place.process("-m", "wsync.bench.processes", "watch", spec) as process,
        attach(make(nbytes, tensors), "small", timeout=60, runtime_dir=place.runtime) as reader,
    ):
        for number in range(1, place.rounds(48) + 1):
            written = place.save("new.safetensors", nbytes, tensors, settled=False)
            began = time.perf_counter()
            written.rename(place.files / "small" / f"step_{number}.safetensors")
            while not reader.refresh():
                if not reader.wait(_DEADLINE):
                    raise RuntimeError(f"wsync watch did not publish a new file within {_DEADLINE:g} s")
            taken.append((time.perf_counter() - began,))
        percent = _percent_of_a_core(process.pid, 1.5 if place.settings.quick else 5.0)
    return [
        Row("new file until refresh() is True", "s", tuple(taken), aim=Aim("<=", 0.015)),
        Row(f"the slowest of {len(taken)}", "s", (max(taken),), aim=Aim("<=", 0.04)),
        Row("wsync watch, idle, of a core", "%", ((percent,),), aim=Aim("<=", 0.3)),
    ]


def _percent_of_a_core(pid: int, seconds: float) -> float:
    def on_processor() -> float:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    time.sleep(0.3)  # the end of a publish is not idle
    before, began = on_processor(), time.perf_counter()
    time.sleep(seconds)
    return 100 * (on_processor() - before) / (time.perf_counter() - began)


def readers(place: Place) -> list[Row]:
    """How much the proportional set sizes of processes grow by attaching, beside as many that load the file.

    The interpreter and torch, which each process has before, are left out on both sides.
    """
    size, tensors, number = place.settings.size, place.settings.tensors, place.settings.readers
    place.need((3 + number) * size)
    spec = place.write_spec("policy", size, tensors)
    file = place.save("policy/step_1.safetensors", size, tensors)
    place.run("-m", "wsync", "push", spec)
    samples = _growth(place, "policy"), _growth(place, str(file))
    aim = Aim("<=", round(1.05 / number + _READER_OVERHEAD / size, 2))
    return [Row(f"memory of {number} readers", "B", (samples,), f"{number} with load_file", aim)]


def _growth(place: Place, source: str) -> float:
    """By how many bytes the processes grow together between their imports and having the weights."""
    role = ("-m", "wsync.bench.processes", "weigh", source, str(place.settings.size), str(place.settings.tensors))
    with ExitStack() as stack:
        processes = [stack.enter_context(place.process(*role)) for _ in range(place.settings.readers)]
        sizes = []
        for _ in ("imported", "attached or loaded"):
            for process in processes:
                assert process.stdout
                if not process.stdout.readline():
                    raise RuntimeError("a process of the measurement ended")
            sizes.append(sum(map(_proportional_set, processes)))
            for process in processes:
                assert process.stdin
                process.stdin.write("\n")
                process.stdin.flush()
        return float(sizes[1] - sizes[0])


def _proportional_set(process: subprocess.Popen[str]) -> int:
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


# --- all of them

CASES: dict[str, Callable[[Place], list[Row]]] = {
    "push": push,
    "staging": staging,
    "staging-large": staging_large,
    "staging-many": staging_many,
    "staging-shifted": staging_shifted,
    "staging-cold": staging_cold,
    "finite": finite,
    "refresh-idle": refresh_idle,
    "refresh": refresh,
    "refresh-many": refresh_many,
    "refresh-copy": refresh_copy,
    "watch": watch,
    "readers": readers,
}


def chosen(only: tuple[str, ...]) -> list[str]:
    """The names of the cases that begin with one of these; all where there are none.

    Raises:
        UsageError: no case is named so.
    """
    for name in only:
        if not any(case.startswith(name) for case in CASES):
            raise UsageError(f"--only {name!r}: there is no such case. There are {', '.join(CASES)}.")
    return [case for case in CASES if not only or case.startswith(only)]


def run(settings: Settings, names: Iterable[str]) -> list[Row]:
    """Measures case by case; one that cannot be measured, or fails, is one row with the reason."""
    rows = []
    for name in names:
        if sys.stderr.isatty():
            print(f"measuring: {name}", file=sys.stderr)
        try:
            with private_place(settings) as place:
                rows += [replace(row, case=name) for row in CASES[name](place)]
        except Skip as exc:
            rows.append(Row(name, skipped=str(exc), case=name))
        except Exception as exc:  # whatever a library raises, the other cases are measured
            rows.append(Row(name, failed=(str(exc) or type(exc).__name__).splitlines()[0], case=name))
    return rows
