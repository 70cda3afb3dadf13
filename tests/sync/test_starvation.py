"""A trainer that keeps one checkpoint, and a policy that takes long to import: what is newest still goes live."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from builders import SPEC, marks, shards, write
from policies import mlp, normed
from processes import DEADLINE, Spawn

import wsync
from wsync.discovery.newest import Select
from wsync.errors import WsyncError
from wsync.layout.layout import Layout, layout_of
from wsync.segment.writable import WritableSegment
from wsync.settings import layout_process
from wsync.settings.spec import Spec, load_spec
from wsync.sync.loop import run
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer

NAME = "nets"
LAYOUT = layout_of(mlp())


PLAIN = replace(load_spec(SPEC), name=NAME, select=Select(settle=0.01))

ReadBy = Callable[[Callable[[], Layout]], Spec]


@pytest.fixture
def read_by(monkeypatch: pytest.MonkeyPatch) -> ReadBy:
    """Gives a spec whose layout is read by a function, in this process."""

    def spec_of(layout: Callable[[], Layout]) -> Spec:
        monkeypatch.setattr(layout_process, "layout_of_spec", lambda spec: layout())
        return PLAIN

    return spec_of


class Trainer:
    """Keeps one sharded checkpoint; each save has the next number as its mark and removes the one before."""

    def __init__(self, place: Path) -> None:
        self.place, self.number = place, 0

    def save(self) -> None:
        self.number += 1
        shards(self.place / f".checkpoint-{self.number}", mlp(), float(self.number))
        (self.place / f".checkpoint-{self.number}").rename(self.place / f"checkpoint-{self.number}")
        shutil.rmtree(self.place / f"checkpoint-{self.number - 1}", ignore_errors=True)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    (tmp_path / "runs").mkdir()
    return Trainer(tmp_path / "runs")


@pytest.mark.parametrize("made", ["by a reader", "for an older policy", ""])
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_comes_while_the_layout_is_read_goes_live(
    trainer: Trainer, runtime: Path, read_by: ReadBy, made: str, dry_run: bool
) -> None:
    """The layout is read before a checkpoint is opened, and what was listed by then is listed again."""
    if made:
        WritableSegment.create(NAME, LAYOUT, spec="0123" if made == "for an older policy" else "").close()
    reads = []

    def slow() -> Layout:
        reads.append(trainer.number)
        trainer.save()
        return LAYOUT

    trainer.save()
    with Syncer(read_by(slow), trainer.place) as syncer:
        outcome = syncer.once(dry_run=dry_run)
        assert (outcome.status, outcome.step) == ("checked" if dry_run else "published", 2), outcome.reason
        assert reads == [1]
        if not dry_run:
            trainer.save()
            assert (syncer.once().status, reads) == ("published", [1])


def test_that_it_fits_is_remembered_though_nothing_went_live(trainer: Trainer, runtime: Path, read_by: ReadBy) -> None:
    """A pass after one that published nothing reads the layout no more."""
    WritableSegment.create(NAME, LAYOUT).close()
    reads = []

    def layout() -> Layout:
        reads.append(1)
        return LAYOUT

    (trainer.place / "half.safetensors").write_bytes((1 << 20).to_bytes(8, "little"))
    with Syncer(read_by(layout), trainer.place) as syncer:
        assert [syncer.once().status for _ in range(3)] == ["empty"] * 3
    assert reads == [1]


def test_a_watch_reads_the_layout_when_it_starts(
    trainer: Trainer, runtime: Path, read_by: ReadBy, stop: threading.Event
) -> None:
    """The first checkpoint, which comes later, is not waited for with it again."""
    reads, told = [], []

    def layout() -> Layout:
        reads.append(trainer.number)
        return LAYOUT

    def tell(event: Outcome | WsyncError) -> None:
        assert isinstance(event, Outcome)
        told.append(event.status)
        if event.status == "empty" and not trainer.number:
            trainer.save()
        elif event.status == "published":
            stop.set()

    with Syncer(replace(read_by(layout), poll=0.01), trainer.place) as syncer:
        assert run(syncer, stop, tell)
    assert reads == [0] and told[0] == "empty" and told[-1] == "published"


@pytest.mark.parametrize(("made", "changed"), [(True, False), (True, True), (False, False)])
def test_the_layout_is_read_once_for_many_that_do_not_fit(
    tmp_path: Path, runtime: Path, read_by: ReadBy, made: bool, changed: bool
) -> None:
    """Thirty checkpoints of another policy start one process, not thirty; a policy that changed ends the pass."""
    if made:
        WritableSegment.create(NAME, LAYOUT, spec=PLAIN.fingerprint()).close()
    for number in range(30):
        write(tmp_path / f"runs/step_{number}.safetensors", normed(), 1.0)
    reads = []

    def layout() -> Layout:
        reads.append(1)
        return layout_of(normed()) if changed else LAYOUT

    with Syncer(read_by(layout), tmp_path / "runs") as syncer:
        if changed:
            with pytest.raises(wsync.LayoutDiffers):
                syncer.once()
            assert reads == [1]
            return
        assert syncer.once().status == "rejected"
        assert len(syncer.record.refusals(c.identity for c in syncer.getter.candidates())) == 30
        write(tmp_path / "runs/step_30.safetensors", normed(), 1.0)
        assert syncer.once().status == "rejected"
    assert reads == [1, 1], "once in each pass that refused something"


def test_that_it_does_not_fit_is_not_remembered(trainer: Trainer, runtime: Path, read_by: ReadBy) -> None:
    """A policy that is put right in a module that it imports is read again by the next pass."""
    WritableSegment.create(NAME, LAYOUT).close()
    layouts = [layout_of(normed()), LAYOUT]
    trainer.save()
    with Syncer(read_by(lambda: layouts.pop(0)), trainer.place) as syncer:
        with pytest.raises(wsync.LayoutDiffers):
            syncer.once()
        assert syncer.once().status == "published"


@pytest.mark.slow
def test_a_slow_policy_does_not_starve(trainer: Trainer, runtime: Path, spawn: Spawn, tmp_path: Path) -> None:
    """A reader attaches first, the policy takes long to import, a sharded trainer keeps one: weights go live."""
    (tmp_path / "slow_policy.py").write_text(
        "import pathlib, time, torch\n"
        "saves = lambda: len(pathlib.Path('saves').read_text())\n"
        "enough = saves() + 2\n"
        "while saves() < enough: time.sleep(0.01)\n"
        "def make(): return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).eval()\n"
    )
    policy = mlp()
    with pytest.raises(wsync.AttachTimeout):
        wsync.attach(policy, NAME, timeout=0.01)
    end = threading.Event()

    saves = tmp_path / "saves"  # a character for each
    saves.touch()

    def train() -> None:
        while not end.wait(1.0):
            trainer.save()
            with saves.open("a") as file:
                file.write("x")

    training = threading.Thread(target=train)
    training.start()
    try:
        spawn(
            "-m",
            "wsync",
            "watch",
            "slow_policy:make",
            str(trainer.place),
            "--name",
            NAME,
            "--settle",
            "0.1",
            cwd=tmp_path,
        )
        with wsync.attach(policy, NAME, timeout=DEADLINE) as reader:
            version, until = reader.version, time.monotonic() + DEADLINE
            while reader.version < version + 2 and time.monotonic() < until:
                reader.wait(1.0)
                reader.refresh()
            assert reader.version >= version + 2 and len(marks(policy)) == 1
    finally:
        end.set()
        training.join()
