"""A policy process's side: what a step pays for ``refresh()``, with and without something new."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .attaching import attach
from .bench import MIB, Aim, Beside, Case, Result, Rounds, Timed, timed, uninterrupted
from .bench_place import Place, heard
from .bench_policy import layers, make
from .bench_watching import percentile
from .layout import layout_of
from .reader import Mode, Reader
from .segment import Segment
from .segment_files import WORD_OFFSET

_CALLS = 10_000


class Word:
    """The least that a look can cost: one method call that loads eight bytes."""

    def __init__(self, words: memoryview) -> None:
        self._words = words

    def load(self) -> int:
        return self._words[WORD_OFFSET // 8]


@dataclass(frozen=True, slots=True)
class Attached:
    """A policy that is attached, and a publisher in a process of its own, as it is in use."""

    reader: Reader
    segment: Segment
    publisher: subprocess.Popen[str]

    def next_version(self) -> None:
        assert self.publisher.stdin
        self.publisher.stdin.write("next\n")
        self.publisher.stdin.flush()
        heard(self.publisher)

    def refresh(self) -> float:
        """The seconds that taking a new version takes."""
        self.next_version()
        return timed(self.reader.refresh)()


@contextmanager
def attached(place: Place, nbytes: int, tensors: int, mode: Mode = "swap") -> Iterator[Attached]:
    place.need(memory=4 * nbytes + 100 * MIB, shared=3 * nbytes, disk=nbytes)
    name = f"reading-{tensors}-{nbytes}-{mode}"
    path = place.save(f"{name}.safetensors", nbytes, tensors)
    policy = make(nbytes, tensors)
    segment = Segment.create(name, layout_of(policy), place.runtime)
    try:
        publisher = place.start("-m", "wsync.bench_policy", "giver", name, path)
        heard(publisher)
        with attach(policy, name, mode=mode, runtime_dir=place.runtime) as reader:
            yield Attached(reader, segment, publisher)
    finally:
        segment.close()


def nothing_new(place: Place, case: Case) -> Iterator[Result]:
    with attached(place, MIB, 16) as policy:
        aims = (Aim("<=", 2.0), Aim("<=", 250e-9, "value"))
        beside = Beside("a call that loads a word", timed(Word(policy.segment.words).load, _CALLS), aims)
        yield from case.compare(place, timed(policy.reader.refresh, _CALLS), beside, rounds=Rounds(40))


def few(place: Place, case: Case) -> Iterator[Result]:
    yield from _swap(place, case, place.settings.tensors)
    yield from _bytes_do_not_matter(place, Case(case.name, f"{case.title}, all bytes", case.run))


def many(place: Place, case: Case) -> Iterator[Result]:
    return _swap(place, case, 2000)


def _swap(place: Place, case: Case, tensors: int) -> Iterator[Result]:
    nbytes = max(place.settings.size, 4 * tensors)
    with attached(place, nbytes, tensors) as policy:
        usual = make(nbytes, tensors)
        state = {name: tensor.clone() for name, tensor in usual.state_dict().items()}
        besides = (
            Beside("load_state_dict", timed(lambda: usual.load_state_dict(state)), (Aim("<=", 1 / 50),)),
            _torchrl(place, nbytes, tensors),
        )
        for _ in range(3):  # each slot's views are made once
            policy.refresh()
        yield from case.compare(place, policy.refresh, *besides, rounds=Rounds(20))


def _torchrl(place: Place, nbytes: int, tensors: int) -> Beside:
    name, aims = "VanillaWeightUpdater", (Aim("<=", 1 / 50),)
    if place.settings.quick:
        return Beside(name, None, aims, "--quick leaves out what takes seconds to import")
    try:
        with uninterrupted():
            from tensordict import TensorDict
            from torchrl.collectors.weight_update import VanillaWeightUpdater
    except ImportError:
        return Beside(name, None, aims, "torchrl is not installed")

    weights = TensorDict.from_module(make(nbytes, tensors).requires_grad_(False))
    updater = VanillaWeightUpdater.from_policy(make(nbytes, tensors).requires_grad_(False))
    return Beside(name, timed(lambda: updater.push_weights(weights)), aims)


def _bytes_do_not_matter(place: Place, case: Case) -> Iterator[Result]:
    size, tensors = place.settings.size, place.settings.tensors
    least = max(size // 16, 4 * tensors)
    with attached(place, size, tensors) as large, attached(place, least, tensors) as small:
        for policy in (large, small) * 3:
            policy.refresh()
        beside = Beside("a 16th of the bytes", small.refresh, (Aim("<=", 1.5),))
        yield from case.compare(place, large.refresh, beside, rounds=Rounds(20))


def copied(place: Place, case: Case) -> Iterator[Result]:
    """Beside a copy of the same bytes, which another process has just written, too."""
    with attached(place, place.settings.size, place.settings.tensors, "copy") as policy:
        nbytes = policy.segment.layout.nbytes
        target = np.zeros(nbytes, "u1")

        def copy() -> float:
            policy.next_version()
            live = policy.segment.live_weights()
            assert live is not None
            return timed(lambda: np.copyto(target, np.frombuffer(live, "u1", nbytes)))()

        for _ in range(3):  # each slot is mapped once
            copy()
            policy.reader.refresh()
        beside = Beside("memory copy, 1 thread", copy, (Aim(">=", 0.85),))
        yield from case.compare(place, policy.refresh, beside, nbytes=nbytes, rounds=Rounds(20))


def stepping(place: Place, case: Case) -> Iterator[Result]:
    """The 99th percentile of a step (``refresh()``, then the policy), a publisher at work in a process of its own.

    Beside it the same with that publisher stopped.
    """
    yield from _stepping(place, case, layers(place.settings.size, place.settings.tensors), 1.0)
    small = Case(case.name, f"{case.title}, of 0.3 MB", case.run)  # a few thousand versions a second
    yield from _stepping(place, small, layers(MIB // 3, 6), 0.2)


def _stepping(place: Place, case: Case, policy: nn.Sequential, seconds: float) -> Iterator[Result]:
    nbytes = sum(tensor.nbytes for tensor in policy.state_dict().values())
    place.need(memory=300 * MIB + 2 * nbytes, shared=4 * nbytes, disk=nbytes)
    path, name = _save(place, policy), f"step-{nbytes}"
    Segment.create(name, layout_of(policy), place.runtime).close()
    publisher = place.start("-m", "wsync.bench_policy", "publisher", name, str(path))
    heard(publisher)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with attach(policy, name, mode="swap", timeout=60, runtime_dir=place.runtime) as reader:
            observation = torch.zeros(policy.get_parameter("0.weight").shape[1])
            work = _steps(reader, policy, observation, seconds)

            def alone() -> float:
                os.kill(publisher.pid, signal.SIGSTOP)
                try:
                    return work()
                finally:
                    os.kill(publisher.pid, signal.SIGCONT)

            beside = Beside("no publisher", alone, (Aim("<=", 1.3),))
            yield from case.compare(place, work, beside, rounds=Rounds(8, seconds=20 * seconds))
    finally:
        torch.set_num_threads(threads)
        place.end()


def _save(place: Place, policy: nn.Module) -> str:
    from safetensors.torch import save_file

    path = place.files / "step.safetensors"
    save_file(copy.deepcopy(policy.state_dict()), path)
    os.utime(path, (0, 0))
    return str(path)


def _steps(reader: Reader, policy: nn.Module, observation: torch.Tensor, seconds: float) -> Timed:
    def run() -> float:
        taken: list[float] = []
        end = time.perf_counter() + seconds
        with torch.inference_mode():
            while (began := time.perf_counter()) < end:
                reader.refresh()
                policy(observation)
                taken.append(time.perf_counter() - began)
        return percentile(taken, 99)

    return run


CASES = (
    Case("refresh-idle", "refresh(), nothing new", nothing_new),
    Case("refresh", "refresh(), new version, swap", few),
    Case("refresh-many", "refresh(), new version, 2,000 tensors", many),
    Case("refresh-copy", "refresh(), new version, copy", copied),
    Case("step", "a policy's step while publishing, 99th", stepping),
)
