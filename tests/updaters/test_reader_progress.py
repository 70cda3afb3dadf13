"""Which readers have a version: a push that waits for them, and the oldest version in use."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from builders import write
from others import run_cli
from policies import mlp
from processes import DEADLINE
from trainers import Trainer

import wsync
from wsync.updaters.reader_progress import oldest_version, wait_for_readers


@pytest.fixture
def trainer(runtime: Path, tmp_path: Path, layouts_here: None, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.chdir(tmp_path)
    return Trainer(mlp)


def test_all_living_readers_are_waited_for(trainer: Trainer) -> None:
    """Guards a trainer that goes on when the last reader has its weights, and not before."""
    assert wait_for_readers(trainer.segment, 1, 0) == []  # nobody is there
    trainer.push(1)
    slow, quick = wsync.attach(mlp(), "nets"), wsync.attach(mlp(), "nets")
    with quick, slow:
        version = trainer.push(2)
        quick.refresh()
        (late,) = wait_for_readers(trainer.segment, version, 0.05)
        assert late.version == 1
        found: list[object] = []
        waiting = threading.Thread(target=lambda: found.append(wait_for_readers(trainer.segment, version, DEADLINE)))
        waiting.start()
        assert slow.refresh()
        waiting.join(DEADLINE)
        assert found == [[]]
        trainer.push(3)
        quick.refresh()
        waiting = threading.Thread(target=lambda: found.append(wait_for_readers(trainer.segment, 3)))
        waiting.start()
        slow.close()  # who is gone is not waited for
        waiting.join(DEADLINE)
        assert found == [[], []]


def test_the_oldest_version_that_somebody_has(trainer: Trainer) -> None:
    """Guards what a trainer may delete: a version that a reader acts on, or whose tensor it keeps, is in use."""
    assert oldest_version(trainer.segment) == 0
    trainer.push(1)
    assert oldest_version(trainer.segment) == 1
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        kept = policy.get_parameter("0.weight").detach()
        trainer.push(2)
        assert oldest_version(trainer.segment) == 1
        reader.refresh()
        assert oldest_version(trainer.segment) == 1 and float(kept[0, 0]) == 1
        del kept
        trainer.push(3)
        reader.refresh()
        assert oldest_version(trainer.segment) == 3
        code, out, _ = run_cli("status", "nets", "--json")
        assert code == 0 and json.loads(out)["oldest_version"] == 3


def test_an_updater_and_a_publisher_know_their_readers(runtime: Path) -> None:
    """Guards the same by the objects that a training script has."""
    policy = mlp()
    with wsync.publisher("nets", policy) as publisher:
        assert publisher.wait_for_readers(timeout=0) == [] and publisher.oldest_version() == 0
        publisher.push(1)
        with wsync.attach(mlp(), "nets") as reader:
            version = publisher.push(2)
            (late,) = publisher.wait_for_readers(timeout=0.05)
            assert late.version == 1 == publisher.oldest_version()
            reader.refresh()
            assert publisher.wait_for_readers(version, DEADLINE) == [] and publisher.oldest_version() == 2


@pytest.mark.parametrize("timeout", [math.nan, "x", 10**400], ids=["nan", "text", "large"])
def test_a_timeout_that_is_no_number_is_refused(runtime: Path, timeout: Any) -> None:
    """Guards a wait with a wrong timeout, which raised Python's own error, or never ended while a reader was late."""
    with wsync.publisher("nets", mlp()) as publisher:
        publisher.push(1)
        with pytest.raises(wsync.UsageError, match="is not a number of seconds"):
            publisher.wait_for_readers(timeout=timeout)
    with pytest.raises(wsync.UsageError, match="is not a number of seconds"):
        wsync.attach(mlp(), "nets", timeout=timeout)


@pytest.mark.slow
def test_a_push_waits_and_says_who_is_late(trainer: Trainer) -> None:
    """Guards exit code 75 with the names of those that have not, and 0 when all have, also where nothing was new."""
    trainer.push(1)
    write(Path("step_2.safetensors"), mlp(), 2.0, 2)
    push = ("push", "policies:mlp", "step_2.safetensors", "--name", "nets", "--take-over")
    with wsync.attach(mlp(), "nets") as reader:
        code, out, told = run_cli(*push, "--wait", "0.05")
        assert code == 75 and "version 2" in out and "1 reader did not take version 2 in time" in told
        assert f"(pid {os.getpid()}), on version 1" in told
        for words in (1, 0):  # for cron each trouble is reported once, and the exit code stays
            code, _, told = run_cli(*push, "--wait", "0.05", "--quiet")
            assert code == 75 and told.count("did not take") == words
        reader.refresh()
        code, out, told = run_cli(*push, "--wait", "5")
        assert code == 0 and "is current" in out and "did not take" not in told
        trainer.push(3)
    code, out, _ = run_cli(*push, "--force", "--wait", "5", "--json")
    assert code == 0 and json.loads(out)["version"] == 4
