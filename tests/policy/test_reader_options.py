"""What a policy's process asks for besides the weights: to be told of each version, and not to act on old ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest
from builders import marks
from devices import LateDevice
from policies import mlp
from processes import DEADLINE
from trainers import Trainer

import wsync
from wsync.errors import UsageError
from wsync.policy import reader as reading
from wsync.policy import reader_options


class Clock:
    """The wall clock and the one that never jumps, as a test sets them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._offset = self._jump = 0.0
        real, wall = reading._clock, time.time
        monkeypatch.setattr(reading, "_clock", lambda: real() + self._offset)
        monkeypatch.setattr(time, "time", lambda: wall() + self._offset + self._jump)

    def passes(self, seconds: float) -> None:
        self._offset += seconds

    def jumps(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self._jump += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_each_version_is_told_in_the_thread_that_takes_it(trainer: Trainer, mode: reading.Mode) -> None:
    """Guards when the callable comes: after each take, the first in attach too, with the policy on that version."""
    policy, told = mlp(), []

    def tell(version: int, step: int | None, extras: Mapping[str, bytes]) -> None:
        told.append((version, step, dict(extras), marks(policy), threading.get_ident()))

    trainer.push(10)
    with wsync.attach(policy, "nets", mode=mode, on_version=tell) as reader:
        assert not reader.refresh()
        for mark in (20, 7):
            trainer.push(mark)
        assert reader.refresh() and not reader.refresh()
        trainer.push(30)
        thread = threading.Thread(target=reader.refresh)
        thread.start()
        thread.join(DEADLINE)
        me = threading.get_ident()
        assert told == [(1, 10, {}, {10.0}, me), (3, 7, {}, {7.0}, me), (4, 30, {}, {30.0}, thread.ident)]


def test_the_callable_may_use_the_reader(trainer: Trainer) -> None:
    """Guards against a reader that waits for itself: using, refresh and close are allowed; nobody else is inside."""
    trainer.push(1)
    seen: list[Any] = []
    entered = threading.Event()

    def come() -> None:
        with suppress(UsageError), reader.using():  # it is closed by then
            entered.set()

    other = threading.Thread(target=come)

    def tell(version: int, step: int | None, extras: object) -> None:
        if version == 1:
            return
        other.start()
        with reader.using() as used:
            seen.append((version, used, reader.version, reader.refresh(), entered.wait(0.05)))
        reader.close()

    reader = wsync.attach(mlp(), "nets", on_version=tell)
    trainer.push(2)
    assert reader.refresh()
    other.join(DEADLINE)
    assert seen == [(2, 2, 2, False, False)]
    with pytest.raises(UsageError, match="is closed"):
        reader.refresh()


@pytest.mark.parametrize("how", ["log", "raise"])
def test_an_error_of_the_callable_is_logged_and_raised_where_asked(
    trainer: Trainer, how: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards that the version is in all the same, and that an OSError is not told as one of the segment."""

    def fail(version: int, step: int | None, extras: object) -> None:
        if version > 1:
            raise FileNotFoundError("normalizer.json")

    trainer.push(1)
    policy = mlp()
    with wsync.attach(policy, "nets", on_version=fail, on_version_error=how) as reader:
        trainer.push(2)
        if how == "raise":
            with pytest.raises(FileNotFoundError, match=r"^normalizer.json$"):
                reader.refresh()
        else:
            assert reader.refresh()
        assert (reader.version, marks(policy)) == (2, {2.0}) and not reader.refresh()
        record = caplog.records[-1]
        assert record.name == "wsync" and "version 2 of 'nets'" in record.getMessage() and record.exc_info
        trainer.push(3)
        if how == "log":
            assert reader.refresh()


def test_an_error_that_attach_is_to_raise_detaches(trainer: Trainer) -> None:
    """Guards against a reader that nobody has: the first version's error ends attach, and its record is gone."""
    trainer.push(1)

    def fail(*_: object) -> None:
        raise ValueError("no such normaliser")

    with pytest.raises(ValueError, match="no such normaliser"):
        wsync.attach(mlp(), "nets", on_version=fail, on_version_error="raise")
    assert trainer.segment.readers() == []


def test_a_version_that_an_interrupt_came_into_is_told(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards what goes with the weights: a policy that goes on after Ctrl-C has the version, and must know."""
    trainer.push(1)
    told: list[int] = []
    with wsync.attach(mlp(), "nets", on_version=lambda version, step, extras: told.append(version)) as reader:
        trainer.push(2)
        take, interrupts = reader._way.take, iter([KeyboardInterrupt])  # type: ignore[attr-defined]

        def interrupted(*given: Any) -> None:
            take(*given)
            for interrupt in interrupts:
                raise interrupt

        monkeypatch.setattr(reader._way, "take", interrupted)  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            reader.refresh()
        assert reader.version == 2 and told == [1, 2]


def test_a_policy_on_a_gpu_is_told_when_a_version_has_arrived(trainer: Trainer, device: LateDevice) -> None:
    """Guards the other kind of reader: not when a copy begins, but when the policy has it."""
    trainer.push(1)
    told: list[int] = []
    with wsync.attach(mlp(), "nets", on_version=lambda version, step, extras: told.append(version)) as reader:
        trainer.push(2)
        assert not reader.refresh() and told == [1]
        assert reader.refresh(wait=True) and told == [1, 2]


def test_age_and_lag(trainer: Trainer, clock: Clock) -> None:
    """Guards the two figures: the age is the policy's version's, and the lag counts what it has not taken."""
    trainer.push(1)
    clock.passes(5)
    with wsync.attach(mlp(), "nets") as reader:
        assert reader.lag == 0 and 5 <= reader.age < 60
        clock.jumps(-1000)
        assert 5 <= reader.age < 60
        clock.passes(600)
        trainer.push(2)
        trainer.push(3)
        assert reader.lag == 2 and reader.age >= 605
        assert reader.refresh() and reader.lag == 0 and reader.age < 60
        clock.jumps(1e6)
        assert reader.age < 60
        trainer.push(4)
        clock.jumps(-1000)  # it was published in the future
        assert reader.refresh() and 0 <= reader.age < 60


@pytest.mark.parametrize("make", [lambda: None, LateDevice], ids=["CPU", "GPU"])
def test_a_policy_is_kept_from_old_weights(
    trainer: Trainer, clock: Clock, make: Callable[[], LateDevice | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards ``max_age``: every refresh raises while the version is too old, and none once a newer one is in."""
    made = make()
    monkeypatch.setattr(wsync.policy.attaching, "_device_of", lambda policy: made)
    trainer.push(1)
    policy = mlp()
    with wsync.attach(policy, "nets", max_age=30) as reader:
        for _ in range(3):
            assert not reader.refresh()
        clock.passes(40)
        for _ in range(3):
            with pytest.raises(wsync.Stale, match=r"'nets' has version 1, .* 40\.. s ago, .* 30 s\. See .*status nets"):
                reader.refresh()
        trainer.push(2)
        assert reader.wait(DEADLINE) and reader.refresh(wait=True) and marks(policy) == {2.0}
        for _ in range(3):
            assert not reader.refresh()
    assert wsync.Stale.exit_code == 75


def test_a_version_that_is_old_when_it_comes(trainer: Trainer, clock: Clock) -> None:
    """Guards the start: attach returns with what is there, and no later refresh lets the policy act on it."""
    trainer.push(1)
    clock.passes(40)
    policy = mlp()
    with wsync.attach(policy, "nets", max_age=30, timeout=DEADLINE) as reader:
        assert (reader.version, marks(policy)) == (1, {1.0})
        with pytest.raises(wsync.Stale):
            reader.refresh()
        trainer.push(2)
        clock.passes(40)
        with pytest.raises(wsync.Stale):  # and yet the newest is in
            reader.refresh()
        assert reader.version == 2


def test_a_segment_deleted_by_hand_is_found_again_under_max_age(trainer: Trainer, clock: Clock) -> None:
    """Guards the way of those who look at each step: it goes on looking for a segment that took another's place."""
    import shutil

    trainer.push(1)
    policy = mlp()
    with wsync.attach(policy, "nets", max_age=3600) as reader:
        shutil.rmtree(trainer.segment.path)
        other = wsync.SharedMemoryWeightUpdater("nets", policy=mlp())
        other.step, other.last_version = 7, 1
        other.push_weights(mlp())
        deadline = time.monotonic() + DEADLINE
        while not reader.refresh():
            assert time.monotonic() < deadline
        assert (reader.version, reader.step) == (2, 7)
        other.close()


def test_an_idle_refresh_does_nothing_more(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the price of a step: without ``max_age`` neither a clock is looked at nor the terms; with it, both are."""
    trainer.push(1)
    looks: list[float] = []
    monkeypatch.setattr(reader_options.Terms, "check_age", lambda self, name, version, age: looks.append(age))
    for max_age, most in ((None, 40), (3600, 1000)):
        with wsync.attach(mlp(), "nets", max_age=max_age) as reader:
            looks.clear()
            for _ in range(1000):
                assert not reader.refresh()
            assert len(looks) == 1000 if max_age else len(looks) <= most


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"on_version": 3}, "on_version=3 cannot be called"),
        ({"on_version_error": "ignore"}, "on_version_error='ignore' is unknown"),
        ({"max_age": 0}, "max_age=0 is not"),
        ({"max_age": float("nan")}, "max_age=nan is not"),
        ({"max_age": "30"}, "max_age='30' is not"),
    ],
)
def test_terms_that_cannot_be_used(trainer: Trainer, given: dict[str, Any], told: str) -> None:
    """Guards the moment of the error: attach says it, not a step at night."""
    with pytest.raises(UsageError, match=told):
        wsync.attach(mlp(), "nets", **given)
