"""Jobs side by side: their order, who does them, and that none is under way when it is over."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from conftest import DEADLINE, interrupted_at

from wsync import helper as module
from wsync.helper import Done, side_by_side, undivided


def test_two_do_the_jobs_and_the_results_keep_their_order() -> None:
    """Guards each job once, in the order given, with a second thread at work that gives way to others."""
    both, threads, nice = threading.Barrier(2), set(), {}

    def work(job: int) -> int:
        if job < 2:
            both.wait(DEADLINE)  # each of the two has one
        threads.add(threading.get_ident())
        nice[threading.get_ident()] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return job * job

    assert list(side_by_side(range(50), work)) == [(job, job * job) for job in range(50)]
    assert len(threads) == 2
    mine = nice.pop(threading.get_ident())
    assert list(nice.values()) == [min(mine + 10, 19)] and os.getpriority(os.PRIO_PROCESS, 0) == mine


@pytest.mark.parametrize("ends", ["error", "consumer"])
def test_none_is_under_way_when_it_ends_early(ends: str) -> None:
    """Guards a slot that was given back against a thread that is late, and jobs that were not begun stay so."""
    both, entered, late, done = threading.Barrier(2), threading.Event(), threading.Event(), []

    def work(job: int) -> int:
        if job < 2:
            both.wait(DEADLINE)  # each of the two has one
            if ends == "error" and threading.current_thread() is threading.main_thread():
                assert entered.wait(DEADLINE)
                threading.Timer(0.05, late.set).start()
                raise ValueError("as asked")
        elif threading.current_thread() is threading.main_thread():
            assert entered.wait(DEADLINE)
        else:
            entered.set()
            late.wait(DEADLINE)
        done.append(job)
        return job

    found = side_by_side(range(1000), work)
    with pytest.raises(ValueError, match="as asked") if ends == "error" else pytest.raises(GeneratorExit):
        for _ in found:
            if ends == "consumer":
                assert entered.wait(DEADLINE)
                threading.Timer(0.05, late.set).start()
                found.close()  # type: ignore[attr-defined]
                raise GeneratorExit
    after = list(done)
    assert late.is_set() and 0 < len(after) < 1000
    assert not [thread for thread in threading.enumerate() if thread.name == "wsync-staging"]
    assert done == after


def test_without_a_second_thread_one_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may have no more threads stages alone."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert [result for _, result in side_by_side(range(5), str)] == list("01234")


def test_an_interrupt_waits_for_what_is_under_way() -> None:
    """Guards a slot that is given back: Ctrl-C, once or twice, is raised when no thread writes there any more."""
    waits, interrupted, main = threading.Event(), threading.Semaphore(0), threading.get_ident()
    left = [KeyboardInterrupt(), KeyboardInterrupt()]

    class Done(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.set()
            return super().wait(timeout)

    def interrupt(number: int, frame: object) -> None:
        if left:
            interrupted.release()
            raise left.pop()

    def work() -> None:
        try:
            waits.wait(DEADLINE)
            for _ in range(2):
                tries = 0
                while not interrupted.acquire(timeout=0.05) and tries < 20 * DEADLINE:
                    signal.pthread_kill(main, signal.SIGINT)  # one that comes just before the wait does not end it
                    tries += 1
        finally:
            done.set()

    done, before = Done(), signal.signal(signal.SIGINT, interrupt)
    interrupting = threading.Thread(target=work)
    try:
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            undivided(done.wait)
        assert done.is_set() and not left
    finally:
        interrupting.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("moment", range(90))
def test_an_interrupt_at_any_moment_of_a_wait_leaves_it_whole(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a wait for ever, of both: raised after any one instruction, Ctrl-C leaves no lock held."""
    monkeypatch.setattr(module, "_LOOK", 0.001)
    done = Done()
    with interrupted_at(moment, Done.wait.__code__):
        done.wait()
    teller = threading.Thread(target=done.tell, daemon=True)
    teller.start()
    teller.join(DEADLINE)
    assert not teller.is_alive() and done
    done.wait()


def test_a_wait_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a hook that nobody can end, which would hold up the end of a watch."""
    done = Done()
    assert not done.wait(0.01)
    done.tell()
    assert done.wait(0)


def test_who_never_begins_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a wait for ever: an interrupt of its start can leave a thread that has a number and never runs."""
    monkeypatch.setattr(threading.Thread, "start", lambda thread: setattr(thread, "_ident", 4711))
    assert [result for _, result in side_by_side(range(5), str)] == list("01234")


def test_a_thread_that_dies_is_no_end_of_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against weights of which a part is missing: a job that was taken and lost is an error, whoever lost it."""
    taken, real = threading.Event(), module._Work.__init__

    def begin(self: module._Work[int, str], job: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            taken.set()
            raise MemoryError
        real(self, job)

    def work(job: int) -> str:
        assert taken.wait(DEADLINE)
        return str(job)

    monkeypatch.setattr(module._Work, "__init__", begin)
    with pytest.raises(MemoryError):
        list(side_by_side(range(5), work))


def test_an_interrupt_of_the_start_leaves_nobody_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a slot that is given back, also where Ctrl-C comes just as the second thread begins."""
    start, done = threading.Thread.start, list[int]()
    at_work, go_on = threading.Event(), threading.Event()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        assert at_work.wait(DEADLINE)
        start(threading.Timer(0.1, go_on.set))
        raise KeyboardInterrupt

    def work(job: int) -> None:
        at_work.set()
        assert go_on.wait(DEADLINE)
        done.append(job)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(side_by_side(range(100), work))
    assert done == [0]
