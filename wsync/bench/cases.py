"""The measurements: each case is a function that takes a workspace of its own and returns rows.

Staging is timed from a path (open, validate, plan, read) into a file in shared memory, as into a slot. The policies
attach as any policy does.
"""

from __future__ import annotations

import itertools
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ..checkpoints.checkpoint import Checkpoint
from ..errors import UsageError
from ..fitting.fit import Fit
from ..layout.layout import views
from ..policy.attaching import attach
from ..policy.reader import Mode, Reader
from ..text import size as shown
from ..updaters.shared_memory import SharedMemoryWeightUpdater
from .rows import GIB, MIB, Aim, Row, Settings, Skip, Timed, compare, timed
from .workspace import BY_HAND, COMMAND, Workspace, make, private_workspace

_DEADLINE = 30.0  # seconds after which a new file that was not noticed fails the case


def push(workspace: Workspace) -> list[Row]:
    """A push with nothing to do, compared with imports alone; then a new checkpoint, with a script written by hand."""
    size, tensors = workspace.settings.size, workspace.settings.tensors
    workspace.need(5 * size)
    spec = workspace.write_spec("policy", size, tensors)
    file = workspace.save("policy/step_1.safetensors", size, tensors)
    times = itertools.count(1)

    def renewed(work: Timed) -> float:
        os.utime(file, ns=(0, next(times) * 10**9))  # new, and old enough that nobody waits for its writer
        return work()

    ours = timed(partial(workspace.run, "-m", "wsync", "push", spec))
    imports = timed(partial(workspace.run, "-c", "import typer, rich"))
    script = timed(partial(workspace.run, "-c", BY_HAND, file.parent, workspace.runtime))
    new, our_new, script_new = f"wsync push, new {shown(size)}", partial(renewed, ours), partial(renewed, script)
    return [
        compare(
            "wsync push, nothing to do", ours, "import typer, rich", imports, Aim("<=", 1.45), workspace.rounds(12)
        ),
        compare(new, our_new, "script, load_file", script_new, Aim("<=", 1 / 7), workspace.rounds(4)),
    ]


class Slot:
    """A checkpoint on disk, and a file in shared memory for its weights, like a slot."""

    def __init__(self, workspace: Workspace, path: Path) -> None:
        self.path = path
        with Checkpoint(path) as checkpoint:
            self.layout = checkpoint.layout
        self.nbytes = self.layout.nbytes
        with open(workspace.runtime / path.name, "w+b") as file:
            os.posix_fallocate(file.fileno(), 0, self.nbytes)
            self.weights = memoryview(mmap.mmap(file.fileno(), self.nbytes))

    def stage(self, *, finite: bool = False) -> None:
        with Checkpoint(self.path) as checkpoint:
            checkpoint.read_into(self.weights, checkpoint.plan(self.layout, Fit()), finite=finite)

    def load_and_copy(self) -> None:
        """Does the same in the usual way, with as many threads as staging has."""
        before = torch.get_num_threads()
        torch.set_num_threads(min(max(len(os.sched_getaffinity(0)) // 4, 1), 8))
        loaded, storage = load_file(self.path), torch.frombuffer(self.weights, dtype=torch.uint8).untyped_storage()
        for entry, tensor in zip(self.layout.tensors, views(self.layout, storage, 0), strict=True):
            tensor.copy_(loaded[entry.name])
        torch.set_num_threads(before)


def _memory_copy(target: memoryview) -> Timed:
    """Times a copy of as many bytes within memory, by one thread."""
    return timed(partial(np.copyto, np.frombuffer(target, "u1"), np.ones(target.nbytes, "u1")))


def staging(workspace: Workspace) -> list[Row]:
    """Staging of a file in the page cache, without and with the check for NaN and infinity."""
    workspace.need(2 * workspace.settings.size)
    slot = Slot(workspace, workspace.save("staging.safetensors", workspace.settings.size, workspace.settings.tensors))
    name, ours, checked = "staging, warm", timed(slot.stage), timed(partial(slot.stage, finite=True))
    load, rounds, nbytes = timed(slot.load_and_copy), workspace.rounds(20), slot.nbytes
    return [
        compare(name, ours, "memory copy", _memory_copy(slot.weights), Aim(">=", 0.85), rounds, nbytes=nbytes),
        compare(name, ours, "load_file, copy_", load, Aim(">=", 1.0), rounds, nbytes=nbytes),
        compare("staging, finite check", checked, "without it", ours, Aim("<=", 1.4), rounds),
    ]


def staging_cold(workspace: Workspace) -> list[Row]:
    """Staging of a file that is not in the page cache, compared with a plain read past the page cache."""
    size = workspace.settings.size if workspace.settings.quick else max(workspace.settings.size, GIB)
    workspace.need(2 * size)
    slot = Slot(workspace, workspace.save("staging.safetensors", size, workspace.settings.tensors))
    dd = ["dd", f"if={slot.path}", "of=/dev/null", "iflag=direct", "bs=8M"]
    read_directly = partial(subprocess.run, dd, check=True, capture_output=True, start_new_session=True)
    no_disk = Skip(f"the page cache of {slot.path.parent} cannot be bypassed; name a directory on a disk with --dir")

    def dropped(work: Callable[[], object]) -> float:
        with open(slot.path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with suppress(BlockingIOError):  # raised if the byte is not in memory
                os.preadv(file.fileno(), [bytearray(1)], size // 2, os.RWF_NOWAIT)
                raise no_disk
        return timed(work)()

    try:
        dropped(read_directly)
    except (OSError, subprocess.CalledProcessError) as exc:
        raise no_disk from exc
    name, ours, theirs = f"staging {shown(size)}, cold", partial(dropped, slot.stage), partial(dropped, read_directly)
    return [compare(name, ours, "dd iflag=direct", theirs, Aim(">=", 0.9), workspace.rounds(8), nbytes=slot.nbytes)]


@contextmanager
def _attached(workspace: Workspace, nbytes: int, tensors: int, mode: Mode) -> Iterator[tuple[Timed, Reader]]:
    """Attaches two policies, and lets them take a version from each slot.

    Yields:
        A function that publishes, refreshes both and returns the seconds of the second refresh; and the second reader.
    """
    state = {name: torch.rand_like(tensor) for name, tensor in make(nbytes, tensors).state_dict().items()}
    with ExitStack() as stack:
        updater = stack.enter_context(closing(SharedMemoryWeightUpdater("policy", runtime_dir=workspace.runtime)))
        updater.push_weights(state)
        attached = partial(attach, name="policy", mode=mode, runtime_dir=workspace.runtime)
        readers = [stack.enter_context(attached(make(nbytes, tensors))) for _ in range(2)]

        def renewed() -> float:
            updater.push_weights(state)
            return _last(Reader.refresh, readers)

        for _ in range(6):
            renewed()
        yield renewed, readers[-1]


def _last(work: Callable[[Any], object], each: Iterable[Any]) -> float:
    """Calls ``work`` with each in turn; returns the seconds of the last call, for which the others warm the caches."""
    return [timed(partial(work, one))() for one in each][-1]


def refresh_idle(workspace: Workspace) -> list[Row]:
    """``refresh()`` with nothing new, compared with the least it could cost: a method call that loads eight bytes."""
    load = MethodType(lambda words: words[0], memoryview(bytes(8)).cast("Q"))
    with _attached(workspace, MIB, 16, "swap") as (_, reader):
        ours, theirs = timed(reader.refresh, 10_000), timed(load, 10_000)
        return [
            compare("refresh(), nothing new", ours, "loading 8 bytes", theirs, Aim("<=", 2.0), workspace.rounds(40))
        ]


def refresh(workspace: Workspace) -> list[Row]:
    """``refresh()`` in swap mode, compared with a loop that sets ``parameter.data``, and with ``load_state_dict``."""
    nbytes, tensors = workspace.settings.size, workspace.settings.tensors
    workspace.need(5 * nbytes)
    usual = [make(nbytes, tensors) for _ in range(2)]
    pairs = [(list(policy.parameters()), list(map(torch.rand_like, policy.parameters()))) for policy in usual]

    def point(pair: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
        for parameter, view in zip(*pair, strict=True):
            parameter.data = view

    def load() -> float:
        return _last(methodcaller("load_state_dict", usual[0].state_dict()), [usual[1]] * 2)

    with _attached(workspace, nbytes, tensors, "swap") as (ours, _):
        name, loop = f"refresh() in swap, {tensors:,} tensors", partial(_last, point, pairs)
        return [
            compare(name, ours, "loop, p.data = v", loop, Aim("<=", 4.0), workspace.rounds(20)),
            compare(name, ours, "load_state_dict", load, Aim("<=", 0.1), workspace.rounds(8)),
        ]


def refresh_copy(workspace: Workspace) -> list[Row]:
    size, tensors = workspace.settings.size, workspace.settings.tensors
    workspace.need(6 * size)
    nbytes = sum(parameter.nbytes for parameter in make(size, tensors).parameters())
    name, theirs = f"refresh() in copy, {shown(nbytes)}", _memory_copy(memoryview(bytearray(nbytes)))
    with _attached(workspace, size, tensors, "copy") as (ours, _):
        return [compare(name, ours, "memory copy", theirs, Aim(">=", 0.85), workspace.rounds(20), nbytes=nbytes)]


def watch(workspace: Workspace) -> list[Row]:
    """The time from a new file to a refreshed policy under ``wsync watch``, and the watch's load with nothing new."""
    tensors, nbytes = workspace.settings.tensors, max(MIB, 4 * workspace.settings.tensors)
    workspace.save("small/step_0.safetensors", nbytes, tensors)
    spec = workspace.write_spec("small", nbytes, tensors)
    taken = []
    with (
        workspace.process("-c", COMMAND, "watch", spec) as process,
        attach(make(nbytes, tensors), "small", timeout=60, runtime_dir=workspace.runtime) as reader,
    ):
        for number in range(1, workspace.rounds(48) + 1):
            written = workspace.save("new.safetensors", nbytes, tensors)
            os.utime(written)
            began = time.perf_counter()
            written.rename(workspace.files / "small" / f"step_{number}.safetensors")
            while not reader.refresh():
                if not reader.wait(_DEADLINE):
                    raise RuntimeError(f"wsync watch did not publish a new file within {_DEADLINE:g} s")
            taken.append((time.perf_counter() - began,))
        time.sleep(0.3)  # until the last publish is over
        clock = ~process.pid << 3 | 2  # processor time of all its threads; see clock_getcpuclockid(3)
        before, began = time.clock_gettime(clock), time.perf_counter()
        time.sleep(1.5 if workspace.settings.quick else 5.0)
        percent = 100 * (time.clock_gettime(clock) - before) / (time.perf_counter() - began)
    return [
        Row("new file until refresh() is True", "s", tuple(taken), aim=Aim("<=", 0.015)),
        Row(f"the slowest of {len(taken)}", "s", (max(taken),), aim=Aim("<=", 0.04)),
        Row("wsync watch, idle, of a core", "%", ((percent,),), aim=Aim("<=", 0.3)),
    ]


def readers(workspace: Workspace) -> list[Row]:
    """Memory (proportional set size) of processes that attach, compared with as many that load the file.

    Only the growth counts: the interpreter and torch, which each process has before, are left out on both sides.
    """
    size, tensors, number = workspace.settings.size, workspace.settings.tensors, workspace.settings.readers
    workspace.need((3 + number) * size)
    spec = workspace.write_spec("policy", size, tensors)
    file = workspace.save("policy/step_1.safetensors", size, tensors)
    workspace.run("-m", "wsync", "push", spec)
    samples = _growth(workspace, "policy"), _growth(workspace, str(file))
    aim = Aim("<=", round(1.05 / number + 8 * MIB / size, 2))  # 8 MiB to map a segment
    return [Row(f"memory of {number} readers", "B", (samples,), f"{number} with load_file", aim)]


def _growth(workspace: Workspace, source: str) -> float:
    """The bytes by which all processes together grow from the end of their imports until they have the weights."""
    role = ("-m", "wsync.bench.workspace", source, str(workspace.settings.size), str(workspace.settings.tensors))
    sizes = []
    with ExitStack() as stack:
        processes = [stack.enter_context(workspace.process(*role)) for _ in range(workspace.settings.readers)]
        for _ in ("imported", "attached or loaded"):
            if not all(process.stdout and process.stdout.readline() for process in processes):
                raise RuntimeError("a process of the measurement ended")
            rollups = [Path(f"/proc/{process.pid}/smaps_rollup").read_text() for process in processes]
            sizes.append(sum(int(text.partition("Pss:")[2].split()[0]) * 1024 for text in rollups))
            for process in processes:
                print(file=process.stdin, flush=True)
    return float(sizes[1] - sizes[0])


Case = Callable[[Workspace], list[Row]]
CASES: dict[str, Case] = {
    "push": push,
    "staging": staging,
    "staging-cold": staging_cold,
    "refresh-idle": refresh_idle,
    "refresh": refresh,
    "refresh-copy": refresh_copy,
    "watch": watch,
    "readers": readers,
}


def chosen(only: tuple[str, ...]) -> dict[str, Case]:
    """Returns the cases whose names begin with one of these; all if no name is given; UsageError for an unknown one."""
    for name in only:
        if not any(case.startswith(name) for case in CASES):
            raise UsageError(f"--only {name!r}: there is no such case. There are {', '.join(CASES)}.")
    return {name: case for name, case in CASES.items() if not only or name.startswith(only)}


def run(settings: Settings, cases: Mapping[str, Case]) -> list[Row]:
    """Runs the cases in turn; one that cannot be measured, or fails, becomes one row with the reason."""
    rows = []
    for name, case in cases.items():
        if sys.stderr.isatty():
            print(f"measuring: {name}", file=sys.stderr)
        try:
            with private_workspace(settings) as workspace:
                rows += [replace(row, case=name) for row in case(workspace)]
        except Skip as exc:
            rows.append(Row(name, skipped=str(exc), case=name))
        except Exception as exc:  # whatever a library raises, the other cases are measured
            rows.append(Row(name, failed=(str(exc) or type(exc).__name__).splitlines()[0], case=name))
    return rows
