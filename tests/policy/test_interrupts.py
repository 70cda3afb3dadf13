"""Ctrl-C and signal handlers inside a reader's calls: at each point where the interpreter may run one."""

from __future__ import annotations

import contextlib
import dis
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from builders import marks
from policies import mlp
from trainers import Trainer, leased, taken_over

import wsync
from wsync.errors import UsageError
from wsync.policy import reader as reading
from wsync.policy import segment_search, tensors

PLACES = (str(Path(wsync.__file__).parent), contextlib.__file__)
CHECKED = {"CALL", "PRECALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME"}  # after these a signal's handler may run
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of a descriptor that its object closes
]


def interrupt() -> None:
    raise KeyboardInterrupt


class At:
    """Runs a handler at one of the points of a block where the interpreter may run a signal's.

    These are after the instructions that look for one, in code of wsync and of context managers: where a signal comes
    in a C function that Python called, the handler runs when that has returned, before its result is stored.
    """

    def __init__(self, point: int, handler: Callable[[], object] = interrupt) -> None:
        self.left, self._handler = point, handler
        self._last: dict[FrameType | None, int | None] = {}

    def __enter__(self) -> At:
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(None)
        self._last.clear()

    def _call(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_back in self._last:
            self._last[frame.f_back] = None  # what Python returns is stored before the next look
        if not frame.f_code.co_filename.startswith(PLACES):
            return None
        frame.f_trace_opcodes = True
        self._last[frame] = None
        return self._step

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode":
            last, self._last[frame] = self._last[frame], frame.f_lasti
            code = frame.f_code.co_code
            if last is not None and dis.opname[code[last]] in CHECKED and dis.opname[code[frame.f_lasti]] != "CALL":
                self.left -= 1
                if not self.left:
                    sys.settrace(None)
                    self._handler()
        return self._step


def at_each_point(work: Callable[[], object], handler: Callable[[], object] = interrupt) -> Iterator[None]:
    """Does the work again and again, interrupted one point later each time; yields after each, the whole one last."""
    for point in range(1, 10_000):
        with At(point, handler) as at, contextlib.suppress(KeyboardInterrupt):
            work()
        yield
        if at.left > 0:
            assert point > 3, "nothing was interrupted"
            return


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def assert_no_more_descriptors(before: int) -> None:
    if descriptors() > before:
        gc.collect()  # an interrupt's traceback, and what its frames hold, may be in a circle
    assert descriptors() <= before


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_an_interrupt_at_any_point_of_a_refresh_leaves_nothing_behind(trainer: Trainer, mode: reading.Mode) -> None:
    """Guards Ctrl-C in ``refresh``: one whole version, a usable reader, no lease and no descriptor too many."""
    trainer.push(1)
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        for mark in (2, 3, 4):  # each slot is mapped once
            trainer.push(mark)
            assert reader.refresh()
        taken_over()  # its thread has begun
        gc.collect()
        before, mark = descriptors(), 5
        trainer.push(mark)
        for _ in at_each_point(reader.refresh):
            assert marks(policy) == {reader.step} and reader.step in (mark - 1, mark)
            reader.refresh()
            assert marks(policy) == {reader.step} == {mark}
            held = [trainer.segment.word & 0xFF] if mode == "swap" else []
            assert leased(trainer.segment) == held == [*trainer.segment.readers()[0].slots]
            assert_no_more_descriptors(before)
            mark += 1
            trainer.push(mark)


def test_a_take_that_was_begun_is_finished(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a policy on new weights beside a version and casts of the old ones: the interrupt is raised afterwards."""
    trainer.push(1)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        trainer.push(2)
        drop, due = tensors.drop_caches, [True]

        def dropped() -> None:
            if due and due.pop():
                raise KeyboardInterrupt
            drop()

        monkeypatch.setattr(reading, "drop_caches", dropped)
        with pytest.raises(KeyboardInterrupt):
            reader.refresh()
        assert (marks(policy), reader.step) == ({2.0}, 2) and not reader.refresh()


def test_an_interrupt_at_any_point_of_a_wait_leaves_nothing_behind(trainer: Trainer) -> None:
    """Guards Ctrl-C in ``wait``, where it is most likely."""
    trainer.push(1)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        for mark in (2, 3, 4):  # each slot is mapped once
            trainer.push(mark)
            assert reader.refresh()
        taken_over()  # its thread has begun
        gc.collect()
        before = descriptors()
        for _ in at_each_point(lambda: reader.wait(0.001)):
            assert not reader.wait(0)
            mark += 1
            trainer.push(mark)
            assert reader.wait(0) and reader.refresh() and marks(policy) == {float(mark)}
            assert_no_more_descriptors(before)


@pytest.mark.slow
def test_an_interrupt_at_any_point_of_finding_a_segment_again_leaves_a_reader_that_works(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a reader between two segments, the one that was removed and the one that was made anew."""
    monkeypatch.setattr(segment_search.Search, "seconds", 0.0)
    trainer.push(1)
    policy, mark = mlp(), 2
    with wsync.attach(policy, "nets", mode="swap") as reader:
        for _ in at_each_point(reader.refresh):
            reader.refresh()
            assert marks(policy) == {reader.step}
            trainer.segment.remove()
            trainer.segment.close()
            trainer = Trainer(mlp)
            mark += 1
            trainer.push(mark)


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_handler_that_refreshes_returns_at_once(trainer: Trainer, mode: reading.Mode) -> None:
    """A signal's handler that calls ``refresh`` in the middle of a ``refresh`` of its thread does not wait for it."""
    trainer.push(1)
    policy, mark = mlp(), 2
    trainer.push(mark)
    with wsync.attach(policy, "nets", mode=mode) as reader:
        for _ in at_each_point(reader.refresh, reader.refresh):
            reader.refresh()
            assert marks(policy) == {reader.step} == {mark}
            mark += 1
            trainer.push(mark)


@pytest.mark.slow
def test_a_handler_that_closes_has_it_done_afterwards(trainer: Trainer) -> None:
    """SIGTERM's handler that calls ``close`` in the middle of a ``refresh`` neither hangs nor leaves a lease."""
    trainer.push(1)
    policy, mark = mlp(), 1
    readers = [wsync.attach(policy, "nets", mode="swap")]

    def refresh() -> None:
        with contextlib.suppress(UsageError):  # where the handler came before its first step
            readers[-1].refresh()

    for _ in at_each_point(refresh, lambda: readers[-1].close()):
        readers[-1].close()
        assert len(marks(policy)) == 1 and marks(policy) <= {float(mark), float(mark - 1)}
        taken_over()
        assert leased(trainer.segment) == [] and trainer.segment.readers() == []
        readers.append(wsync.attach(policy, "nets", mode="swap"))
        mark += 1
        trainer.push(mark)
    readers[-1].close()


def test_a_handler_that_waits_is_refused(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """``wait`` in the middle of a ``refresh`` of the same thread could never end: it says so, and nothing is torn."""
    trainer.push(1)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        trainer.push(2)
        monkeypatch.setattr(reading, "drop_caches", lambda: reader.wait(None))
        with pytest.raises(UsageError, match="signal handler"):
            reader.refresh()
        monkeypatch.undo()
        assert reader.refresh() and marks(policy) == {2.0}
