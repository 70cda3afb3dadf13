"""What is measured: each case is a function that gets a place of its own and returns its rows.

Staging is timed from the path on (open, validate, plan, read), into a file in shared memory such as a slot is. The
policies attach as any other does, and what they take is published by a process of its own.
"""

from __future__ import annotations

import itertools
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ..attaching import attach
from ..checkpoint import open_checkpoint
from ..console import size as shown
from ..errors import UsageError
from ..fitting import Fit
from ..layout import layout_of
from ..reader import Mode, Reader
from ..segment import Segment
from .place import Place, heard, private_place, settle, tell
from .processes import make
from .rows import GIB, MIB, Aim, Row, Settings, Skip, Timed, compare, timed

BY_HAND = Path(__file__).with_name("by_hand.py")
_PAGE = 4096
_CALLS = 10_000  # of refresh() in one sample, which is a mean
_READER_OVERHEAD = 8 * MIB  # of a process that maps a segment
_DEADLINE = 30.0  # seconds until a file that was not noticed fails the case


# --- whole processes, as a shell or cron starts them


def push(place: Place) -> list[Row]:
    """A push with nothing to do, then one of a checkpoint that is new, beside a script of thirty lines."""
    size, tensors = place.settings.size, place.settings.tensors
    place.need(shared=5 * size, disk=size, memory=size)
    spec = place.standing("policy", size, tensors)
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
        compare(idle, ours, "script, load_file", script, Aim("<=", 0.1), few),
        compare(new, our_new, "script, load_file", script_new, Aim("<=", 0.1), few),
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
        source, target = np.ones(self.nbytes, "u1"), np.frombuffer(self.weights, "u1")
        return timed(partial(np.copyto, target, source))

    def load_and_copy(self) -> None:
        """The usual way to the same bytes, with as many threads as staging has."""
        before = torch.get_num_threads()
        torch.set_num_threads(min(max(len(os.sched_getaffinity(0)) // 4, 1), 8))
        for name, tensor in load_file(self.path).items():
            self.targets[name].copy_(tensor)
        torch.set_num_threads(before)


def _slot(place: Place, nbytes: int, tensors: int) -> Slot:
    place.need(shared=nbytes, disk=nbytes, memory=2 * nbytes)
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
    """A file whose data begins 16 bytes before a page, beside one whose data begins elsewhere.

    ``rep movsb``, which read(2) uses, is slow on AMD's cores where the target's address is 8 to 24 bytes beyond the
    source's, modulo 4096.
    """
    size, tensors = place.settings.size, place.settings.tensors
    place.need(shared=2 * size, disk=3 * size, memory=2 * size)
    file = place.save("staging.safetensors", size, tensors)
    slow, usual = (Slot(place, _shifted(file, before)) for before in (16, 1024))
    ours, theirs, rounds = timed(slow.stage), timed(usual.stage), place.rounds(20)
    return [compare("staging, data 16 B before a page", ours, "1 KiB", theirs, None, rounds, nbytes=slow.nbytes)]


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
    slot = _slot(
        place, place.settings.size if place.settings.quick else max(place.settings.size, GIB), place.settings.tensors
    )
    dd = ["dd", f"if={slot.path}", "of=/dev/null", "iflag=direct", "bs=8M"]
    read_directly = partial(subprocess.run, dd, check=True, capture_output=True, start_new_session=True)

    def dropped(work: Callable[[], object]) -> float:
        drop_cache(slot.path)
        return timed(work)()

    try:
        dropped(read_directly)
    except (OSError, subprocess.CalledProcessError) as exc:
        raise Skip("dd cannot read directly there; name a disk with --dir") from exc
    name, ours, theirs = (
        f"staging {shown(slot.nbytes)}, cold",
        partial(dropped, slot.stage),
        partial(dropped, read_directly),
    )
    aim, rounds = Aim(">=", 0.9), place.rounds(8)
    return [compare(name, ours, "dd iflag=direct", theirs, aim, rounds, seconds=10, nbytes=slot.nbytes)]


def drop_cache(path: Path) -> None:
    """Takes a file that is on the disk out of the page cache.

    Raises:
        Skip: it stays there, as on tmpfs, or the system does not tell.
    """
    with open(path, "rb", buffering=0) as file:
        for _ in range(20):  # pages in use at that moment, also by the system itself, stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not any(_is_cached(file.fileno(), path.stat().st_size * part // 16) for part in range(16)):
                return
            time.sleep(0.05)
    raise Skip(f"the page cache of {path.parent} cannot be dropped; name a disk with --dir")


def _is_cached(fd: int, offset: int) -> bool:
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError as exc:
        raise Skip("the file system does not tell what is cached; name another with --dir") from exc


# --- a policy process

AfterPublish = Callable[[Callable[[], object]], Timed]
"""Times some work right after another process published a version."""


@contextmanager
def _attached(
    place: Place, nbytes: int, tensors: int, mode: Mode = "swap"
) -> Iterator[tuple[Reader, Segment, AfterPublish]]:
    """A policy that is attached, and has taken a version from each slot."""
    place.need(shared=3 * nbytes, disk=nbytes, memory=4 * nbytes)
    path, policy = place.save("policy.safetensors", nbytes, tensors), make(nbytes, tensors)
    segment = Segment.create("policy", layout_of(policy), place.runtime)
    try:
        with place.role("publisher", "policy", path) as publisher:
            heard(publisher)

            def after_publish(work: Callable[[], object]) -> Timed:
                def run() -> float:
                    tell(publisher)
                    return timed(work)()

                return run

            with attach(policy, "policy", mode=mode, runtime_dir=place.runtime) as reader:
                for _ in range(6):
                    after_publish(partial(_take, reader))()
                yield reader, segment, after_publish
    finally:
        segment.close()


def _take(reader: Reader) -> None:
    if not reader.refresh():
        raise RuntimeError("refresh() did not take the version that was published")


class Word:
    """The least that a look can cost: a method call that loads eight bytes."""

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, _PAGE)).cast("Q")

    def load(self) -> int:
        return self._words[0]


def refresh_idle(place: Place) -> list[Row]:
    with _attached(place, MIB, 16) as (reader, _, _):
        ours, theirs = timed(reader.refresh, _CALLS), timed(Word().load, _CALLS)
        return [compare("refresh(), nothing new", ours, "loading 8 bytes", theirs, Aim("<=", 2.0), place.rounds(40))]


def refresh(place: Place) -> list[Row]:
    return _swap(place, place.settings.tensors, Aim("<=", 4.0))


def refresh_many(place: Place) -> list[Row]:
    return _swap(place, 2000, Aim("<=", 1.8))


def _swap(place: Place, tensors: int, aim: Aim) -> list[Row]:
    """Beside a loop that points parameters at other tensors, and beside ``load_state_dict``; all after a publish."""
    nbytes = max(place.settings.size, 4 * tensors)
    place.need(shared=3 * nbytes, disk=nbytes, memory=6 * nbytes)
    usual = make(nbytes, tensors)
    parameters = list(make(nbytes, tensors).parameters())
    state = {name: tensor.clone() for name, tensor in usual.state_dict().items()}
    views = itertools.cycle([[torch.empty_like(tensor) for tensor in parameters] for _ in range(2)])

    def point() -> None:
        for parameter, view in zip(parameters, next(views), strict=True):
            parameter.data = view

    with _attached(place, nbytes, tensors) as (reader, _, after_publish):
        name, ours = f"refresh() in swap, {tensors:,} tensors", after_publish(partial(_take, reader))
        loop, load = after_publish(point), after_publish(partial(usual.load_state_dict, state))
        return [
            compare(name, ours, "loop, p.data = v", loop, aim, place.rounds(20)),
            compare(name, ours, "load_state_dict", load, Aim("<=", 0.1), place.rounds(8)),
        ]


def refresh_copy(place: Place) -> list[Row]:
    """Beside a copy of the same bytes, which another process has just written, too."""
    with _attached(place, place.settings.size, place.settings.tensors, "copy") as (reader, segment, after_publish):
        nbytes = segment.layout.nbytes
        target = np.zeros(nbytes, "u1")

        def copy() -> None:
            live = segment.live_weights()
            assert live is not None
            np.copyto(target, np.frombuffer(live, "u1", nbytes))

        ours, theirs = after_publish(partial(_take, reader)), after_publish(copy)
        for _ in range(3):  # each slot is mapped once
            theirs()
        name, aim = f"refresh() in copy, {shown(nbytes)}", Aim(">=", 0.85)
        return [compare(name, ours, "memory copy", theirs, aim, place.rounds(20), nbytes=nbytes)]


# --- a watch, and many readers


def watch(place: Place) -> list[Row]:
    """How soon a running ``wsync watch`` has a new file in the policy, then what it costs while nothing is new."""
    tensors, nbytes = place.settings.tensors, max(MIB, 4 * place.settings.tensors)
    place.need(shared=4 * nbytes, disk=64 * nbytes)
    place.save("small/step_0.safetensors", nbytes, tensors)
    spec = place.standing("small", nbytes, tensors)
    taken = []
    with (
        place.role("watch", spec) as process,
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
    place.need(shared=3 * size, disk=size, memory=number * (2 * size + 300 * MIB))
    spec = place.standing("policy", size, tensors)
    file = place.save("policy/step_1.safetensors", size, tensors)
    place.run("-m", "wsync", "push", spec)
    attached = _growth(place, number, "reader", "policy", str(size), str(tensors))
    loaded = _growth(place, number, "loader", str(file), str(size), str(tensors))
    aim = Aim("<=", round(1.05 / number + _READER_OVERHEAD / size, 2))
    return [Row(f"memory of {number} readers", "B", ((attached, loaded),), f"{number} with load_file", aim)]


def _growth(place: Place, number: int, *role: str) -> float:
    with ExitStack() as stack:
        processes = [stack.enter_context(place.role(*role)) for _ in range(number)]
        for process in processes:
            heard(process)
        before = sum(map(_proportional_set, processes))
        for process in processes:
            tell(process)
        return float(sum(map(_proportional_set, processes)) - before)


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


def run(settings: Settings, names: Iterable[str], say: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Measures case by case; one that cannot be measured, or fails, is one row with the reason.

    Args:
        say: called with a case's name before it is measured.
    """
    rows = []
    for name in names:
        say(name)
        try:
            with private_place(settings) as place:
                rows += [replace(row, case=name) for row in CASES[name](place)]
        except Skip as exc:
            rows.append(Row(name, skipped=str(exc), case=name))
        except Exception as exc:  # whatever a library raises, the other cases are measured
            rows.append(Row(name, failed=(str(exc) or type(exc).__name__).splitlines()[0], case=name))
    return rows
