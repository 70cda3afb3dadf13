"""A reader under a name that nobody publishes: it says where it looks and what is there, and leaves nothing behind."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import marks
from policies import mlp
from processes import DEADLINE
from trainers import Trainer

import wsync
from wsync.errors import AttachTimeout
from wsync.layout.layout import layout_of
from wsync.policy.first_version import Opening
from wsync.policy.reader import Reader
from wsync.segment.reader_records import Registration
from wsync.segment.segment import segments
from wsync.segment.writable import WritableSegment


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning comes after a moment."""
    monkeypatch.setattr(Opening, "patience", 0.05)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Does something while a reader waits for its first version, and interrupts that wait."""

    def while_waiting(act: Callable[[], object]) -> None:
        def wait(reader: Reader, timeout: float | None = None) -> bool:
            act()
            raise KeyboardInterrupt

        monkeypatch.setattr(Reader, "wait", wait)

    return while_waiting


def test_a_name_that_nobody_publishes_is_told_with_those_that_are(
    runtime: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``cartpol`` for ``cartpole``: one warning has the path, the user, near names first, and other users' places."""
    mine, theirs = runtime / "wsync-1", runtime / "wsync-2"
    for place, names in ((mine, ["ant", "cartpole", "zebra"]), (theirs, ["cartpol"])):
        for name in names:
            WritableSegment.create(name, layout_of(mlp()), place).close()
    with caplog.at_level(logging.WARNING, "wsync"), pytest.raises(AttachTimeout) as caught:
        wsync.attach(mlp(), "cartpol", timeout=0.4, runtime_dir=mine)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    for told in (caplog.text, str(caught.value)):
        assert f"{mine}/cartpol (uid {os.geteuid()})" in told and "'cartpole', 'ant', 'zebra'" in told
        assert f"{theirs} (runtime_dir=) there are 'cartpol'" in told
    assert isinstance(caught.value, TimeoutError) and "0.4 s" in str(caught.value)
    assert segments(mine) == ["ant", "cartpole", "zebra"]


def test_a_policy_that_waited_long_gets_its_version(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    """The warning is said once, and the wait goes on to its end."""
    with caplog.at_level(logging.WARNING, "wsync"):
        pushing = threading.Timer(0.3, trainer.push, [1])
        pushing.start()
        policy = mlp()
        with wsync.attach(policy, "nets", timeout=DEADLINE):
            assert marks(policy) == {1.0}
        pushing.join()
    assert len(caplog.records) == 1 and "keeps waiting" in caplog.text


def test_a_segment_made_for_nothing_is_removed(
    runtime: Path, interrupted: Callable[[Callable[[], object]], None]
) -> None:
    """Guards three times the weights in shared memory for a name that was misspelt: also after Ctrl-C."""
    seen: list[list[str]] = []
    interrupted(lambda: seen.append(segments()))
    with pytest.raises(KeyboardInterrupt):
        wsync.attach(mlp(), "cartpol")
    assert seen == [["cartpol"]] and segments() == []


def test_a_segment_that_stood_before_stays(trainer: Trainer) -> None:
    """Who only waits for it removes nothing of others'."""
    with pytest.raises(AttachTimeout):
        wsync.attach(mlp(), "nets", timeout=0)
    assert segments() == ["nets"]


def test_a_segment_that_somebody_else_needs_stays(
    runtime: Path, tmp_path: Path, interrupted: Callable[[Callable[[], object]], None]
) -> None:
    """Giving up takes nothing from a publisher that is at work in it, from one that published, or another reader."""
    for name in ("publisher", "published", "reader"):
        kept: list[object] = []

        def act(name: str = name, kept: list[object] = kept) -> None:
            trainer = Trainer(mlp, name)
            if name == "publisher":
                publishing = trainer.segment.publishing()
                publishing.__enter__()
                kept.append(publishing)
            elif name == "published":
                trainer.push(1)
            else:
                kept.append(Registration(trainer.segment.path, "swap"))

        interrupted(act)
        with pytest.raises(KeyboardInterrupt):
            wsync.attach(mlp(), name)
        assert name in segments()
        trainer = Trainer(mlp, name)
        assert trainer.segment.path.exists()
        kept.clear()
