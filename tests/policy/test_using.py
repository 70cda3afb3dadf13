"""Threads that use a policy while another one refreshes it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from builders import marks
from policies import mlp
from processes import DEADLINE
from trainers import Trainer

import wsync
from wsync.errors import UsageError
from wsync.policy.reader import Mode
from wsync.policy.user_threads import Users


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_version_stands_still_for_a_block(trainer: Trainer, mode: Mode) -> None:
    """Guards requests of many threads, each of which must act on one version, whole, and know which."""
    trainer.push(1)
    policy, stop, wrong = mlp(), threading.Event(), []
    with wsync.attach(policy, "nets", mode=mode) as reader:

        def ask() -> None:
            while not stop.is_set():
                with reader.using() as version:
                    seen = {value for tensor in policy.parameters() for value in tensor.flatten()[[0, -1]].tolist()}
                    if seen != {float(version)} or reader.version != version:
                        wrong.append((version, seen))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for mark in range(2, 40):
            trainer.push(mark)
            assert reader.refresh() and reader.version == mark
        stop.set()
        for thread in threads:
            thread.join(DEADLINE)
    assert not wrong


def test_a_refresh_waits_for_those_inside_or_skips_them(trainer: Trainer) -> None:
    """Guards both ways, and that nobody comes in before a refresh that waits: it would wait for ever."""
    trainer.push(1)
    policy = mlp()
    with wsync.attach(policy, "nets") as reader:
        trainer.push(2)
        came: list[int] = []
        taken = threading.Event()

        def refresh() -> None:
            assert reader.refresh()
            taken.set()

        def come() -> None:
            with reader.using() as version:
                came.append(version)

        with reader.using() as version:
            assert version == 1
            skipping = threading.Thread(target=lambda: came.append(reader.refresh(users="skip")))
            skipping.start()
            skipping.join(DEADLINE)
            assert came.pop() is False
            refreshing = threading.Thread(target=refresh)
            refreshing.start()
            while not reader._users._changer:
                pass
            later = threading.Thread(target=come)
            later.start()
            assert not taken.wait(0.05) and not came and marks(policy) == {1.0}
            with reader.using() as again:  # the same thread comes in at any time
                assert again == 1
        refreshing.join(DEADLINE)
        later.join(DEADLINE)
        assert taken.is_set() and came == [2] and marks(policy) == {2.0}


def test_a_refresh_from_inside_is_told(trainer: Trainer) -> None:
    """Guards against a thread that waits for itself."""
    trainer.push(1)
    with wsync.attach(mlp(), "nets") as reader:
        trainer.push(2)
        with reader.using():
            assert reader.wait(0)
            for call in (reader.refresh, reader.close):
                with pytest.raises(UsageError, match=r"inside a using\(\) block"):
                    call()
        assert reader.refresh() and reader.version == 2
    with pytest.raises(UsageError, match="closed"), reader.using():
        pass


def test_a_close_waits_for_those_inside(trainer: Trainer) -> None:
    """Guards the weights of a request that is under way when its server ends."""
    trainer.push(1)
    policy = mlp()
    reader = wsync.attach(policy, "nets", mode="swap")
    with reader.using():
        before = policy.get_parameter("0.weight").data_ptr()
        closing = threading.Thread(target=reader.close)
        closing.start()
        while not reader._users._changer:
            pass
        assert policy.get_parameter("0.weight").data_ptr() == before
    closing.join(DEADLINE)
    assert policy.get_parameter("0.weight").data_ptr() != before and marks(policy) == {1.0}


def test_one_thread_at_a_time_changes_a_policy() -> None:
    """Guards a close beside a refresh: the second one begins when the first is done."""
    users, entered = Users(), threading.Event()

    def change() -> None:
        with users.alone():
            entered.set()

    with users.alone():
        other = threading.Thread(target=change)
        other.start()
        assert not entered.wait(0.05)
    assert entered.wait(DEADLINE)
    other.join(DEADLINE)


def test_threads_of_a_parent_are_not_waited_for_in_its_child(trainer: Trainer, tmp_path: Path) -> None:
    """Guards workers that are forked while requests, and a refresh that waits for them, are under way."""
    trainer.push(1)
    policy, inside, go = mlp(), threading.Event(), threading.Event()
    with wsync.attach(policy, "nets", mode="copy") as reader:

        def ask() -> None:
            with reader.using():
                inside.set()
                go.wait(DEADLINE)

        thread = threading.Thread(target=ask)
        thread.start()
        assert inside.wait(DEADLINE)
        trainer.push(2)
        refreshing = threading.Thread(target=reader.refresh)
        refreshing.start()
        while not reader._users._changer:
            pass
        pid = os.fork()
        if not pid:
            torch.set_num_threads(1)
            signal.alarm(int(DEADLINE))
            os._exit(0 if reader.refresh() and reader.version == 2 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        go.set()
        thread.join(DEADLINE)
        refreshing.join(DEADLINE)
        assert reader.version == 2
