"""Staging: how fast a checkpoint's bytes reach a slot, beside a copy of memory, the disk, and the usual loaders.

What is timed is all of it from the path on: open, validate, plan, read. ``load_file`` and the copy into shared tensors
do the same by hand.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from .bench import GIB, MIB, Aim, Beside, Case, Result, Rounds, Skip, Timed, timed, uninterrupted
from .bench_place import Place
from .checkpoint import Checkpoint
from .console import size as shown
from .finite import all_finite, float_regions
from .fitting import Fit
from .layout import Layout
from .mapped import Mapped
from .memory import reserve
from .segment import Segment

_CHUNK = 8 * MIB  # bytes of one read of dd


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot to stage into, and where a checkpoint for it lies."""

    weights: memoryview
    layout: Layout
    path: Path

    def stage(self, *, finite: bool = False, fit: Fit = Fit()) -> None:  # noqa: B008  (frozen)
        with Checkpoint(self.path) as checkpoint:
            checkpoint.read_into(self.weights, checkpoint.plan(self.layout, fit), finite=finite)


@contextmanager
def slot_for(
    place: Place, nbytes: int, tensors: int, *, dtype: str = "", memory: int = 0, shared: int = 0
) -> Iterator[Slot]:
    """A checkpoint on the disk and in the page cache, and a slot of its layout; in ``dtype`` where one is given.

    Args:
        memory, shared: bytes that the caller takes besides.

    Raises:
        Skip: there is not so much.
    """
    place.need(memory=nbytes + memory, shared=2 * nbytes + shared, disk=nbytes)
    path = place.save("staging.safetensors", nbytes, tensors)
    with Checkpoint(path) as checkpoint:
        layout = checkpoint.layout
    if dtype:
        layout = Layout.build({entry.name: (dtype, entry.shape) for entry in layout.tensors}, {})
    segment = Segment.create("staging", layout, place.runtime, slots=2)
    try:
        with segment.publishing(), segment.spare_slot() as slot:
            yield Slot(slot.weights, layout, path)
    finally:
        segment.close()


def shared_tensors(place: Place, path: Path) -> dict[str, torch.Tensor]:
    """Tensors in shared memory, as ``share_memory_`` makes them, their pages there; in the place, not in /dev/shm."""
    tensors = load_file(path)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with open(place.runtime / "shared", "w+b") as file:
        reserve(file.fileno(), nbytes)
        mapped = mmap.mmap(file.fileno(), nbytes)
    shared, at = {}, 0
    for name, tensor in tensors.items():
        whole = torch.frombuffer(mapped, dtype=tensor.dtype, count=tensor.numel(), offset=at)
        shared[name], at = whole.view(tensor.shape).zero_(), at + tensor.nbytes
    return shared


def load_and_copy(path: Path, shared: dict[str, torch.Tensor]) -> None:
    for name, tensor in load_file(path).items():
        shared[name].copy_(tensor)


def usual_size(place: Place, case: Case) -> Iterator[Result]:
    size = place.settings.size
    with slot_for(place, size, place.settings.tensors, memory=size, shared=size) as slot:
        yield from _warm(place, case, slot, Aim(">=", 0.92), Aim(">=", 1.4))


def many_tensors(place: Place, case: Case) -> Iterator[Result]:
    size = 2000 * 4096
    with slot_for(place, size, 2000, memory=size, shared=size) as slot:
        yield from _warm(place, case, slot, None, Aim(">=", 8))


def large_size(place: Place, case: Case) -> Iterator[Result]:
    """More than the processor's caches hold: from the page cache, then from the disk."""
    quick, size = place.settings.quick, place.settings.size
    nbytes = min(size, 64 * MIB) if quick else max(size, GIB)
    warm, cold = (replace(case, title=f"staging {shown(nbytes)}, {how} file") for how in ("warm", "cold"))
    with slot_for(place, nbytes, place.settings.tensors, memory=nbytes, shared=nbytes) as slot:
        if quick:
            yield case.result("", skipped="--quick leaves out what takes a GiB")
        else:
            yield from _warm(place, warm, slot, Aim(">=", 0.92), Aim(">=", 1.0))
        try:
            yield from _cold(place, cold, slot)
        except Skip as exc:
            yield cold.result("", skipped=str(exc))


def _warm(place: Place, case: Case, slot: Slot, copy: Aim | None, load: Aim) -> Iterator[Result]:
    """A file in the page cache."""
    nbytes = slot.layout.nbytes
    if copy:  # not in turn with torch, whose threads keep a processor for some milliseconds after their work
        source, target = np.ones(nbytes, "u1"), np.frombuffer(slot.weights, "u1", nbytes)
        beside = Beside("memory copy, 1 thread", timed(partial(np.copyto, target, source)), (copy,))
        yield from case.compare(place, timed(slot.stage), beside, nbytes=nbytes, rounds=Rounds(20))
    shared = shared_tensors(place, slot.path)
    beside = Beside("load_file and copy_", timed(lambda: load_and_copy(slot.path, shared)), (load,))
    yield from case.compare(place, timed(slot.stage), beside, nbytes=nbytes, rounds=Rounds(20))


def _cold(place: Place, case: Case, slot: Slot) -> Iterator[Result]:
    """A file that is on the disk alone; dd reads past the page cache, the others through it."""
    drop_cache(slot.path)
    shared = shared_tensors(place, slot.path)

    def dropped(work: Callable[[], object]) -> Timed:
        def run() -> float:
            drop_cache(slot.path)
            return timed(work)()

        return run

    dd = ["dd", f"if={slot.path}", "of=/dev/null", "iflag=direct", f"bs={_CHUNK}"]
    besides = [
        _dd(dd),
        Beside("load_file and copy_", dropped(lambda: load_and_copy(slot.path, shared)), (Aim(">=", 1.0),)),
        _streamer(slot.path, shared, dropped),
    ]
    rounds = Rounds(5, seconds=6, warm_up=False)
    yield from case.compare(place, dropped(slot.stage), *besides, nbytes=slot.layout.nbytes, rounds=rounds)


def drop_cache(path: Path) -> None:
    """Takes a file, which is on the disk, out of the page cache.

    Raises:
        Skip: it is still there, as on tmpfs, or nobody tells.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts, size = Mapped(fd), os.fstat(fd).st_size
        for _ in range(20):  # what somebody uses in that moment, the system itself too, stays
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            looks = {parts.is_cached(size * part // 4, 1) for part in range(4)}
            if None in looks:
                raise Skip(f"{path.parent} does not tell what is cached; --dir names a disk")
            if True not in looks:
                return
            time.sleep(0.05)
    finally:
        os.close(fd)
    raise Skip(f"the page cache of {path.parent} cannot be dropped; --dir names a disk")


def _dd(command: list[str]) -> Beside:
    name, aims = "dd, direct I/O", (Aim(">=", 0.9),)
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    try:
        works = subprocess.run(command, **quiet).returncode == 0
    except FileNotFoundError:
        return Beside(name, None, aims, "there is no dd")
    work = timed(partial(subprocess.run, command, **quiet)) if works else None
    return Beside(name, work, aims, "dd cannot read there directly")


def _streamer(path: Path, shared: dict[str, torch.Tensor], dropped: Callable[[Callable[[], object]], Timed]) -> Beside:
    name, aims = "runai-model-streamer", (Aim(">=", 1.0),)
    os.environ.setdefault("RUNAI_STREAMER_LOG_LEVEL", "ERROR")
    try:
        with uninterrupted():
            from runai_model_streamer import SafetensorsStreamer
    except ImportError:
        return Beside(name, None, aims, "runai-model-streamer is not installed")

    def stream() -> None:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(str(path))
            for tensor_name, tensor in streamer.get_tensors():
                shared[tensor_name].copy_(tensor)

    return Beside(name, dropped(stream), aims)


def cast(place: Place, case: Case) -> Iterator[Result]:
    """Speeds of the bytes that are read."""
    size = place.settings.size
    with slot_for(place, size, place.settings.tensors, dtype="BF16", memory=size) as slot:
        weights = [tensor.clone() for tensor in load_file(slot.path).values()]
        beside = Beside(
            "torch .to in memory",
            timed(lambda: [tensor.to(torch.bfloat16) for tensor in weights]),
            (Aim(">=", 0.8),),
        )
        stage = timed(lambda: slot.stage(fit=Fit(cast=True)))
        yield from case.compare(place, stage, beside, nbytes=2 * slot.layout.nbytes)


def finite(place: Place, case: Case) -> Iterator[Result]:
    """The check by itself, and what it adds."""
    with slot_for(place, place.settings.size, place.settings.tensors) as slot:
        nbytes = slot.layout.nbytes
        slot.stage()
        regions, words = float_regions(slot.layout), np.frombuffer(slot.weights, "u4", nbytes // 4)
        check = timed(lambda: all_finite(slot.weights, regions, ((0, nbytes),)))
        alone = Beside("one read of the memory", timed(words.max))
        yield from case.compare(place, check, alone, nbytes=nbytes, rounds=Rounds(20))
        without = Beside("staging without it", timed(slot.stage), (Aim("<=", 1.25),))
        checked = Case(case.name, "staging with the finite check", case.run)
        yield from checked.compare(place, timed(lambda: slot.stage(finite=True)), without, rounds=Rounds(20))


CASES = (
    Case("staging", "staging, warm file", usual_size),
    Case("staging-large", "staging a GiB, warm file", large_size),
    Case("staging-many", "staging 2,000 tensors of 4 KiB", many_tensors),
    Case("cast", "staging, float32 to bfloat16", cast),
    Case("finite", "finite check", finite),
)
