"""What a group concludes from what its boxes tell, without any group."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from builders import SUPPORT
from policies import mlp
from safetensors.torch import save_file

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import GateRejected, NonFiniteWeights, RetryLater, SegmentBusy, UsageError, WsyncError
from wsync.fitting.fit import Fit
from wsync.fleet.delivery import Shared, Turn, judge
from wsync.fleet.group import Group
from wsync.fleet.member import Member
from wsync.fleet.membership import few
from wsync.fleet.reconcile import Change, Report, change_of, holder_of, leader_of
from wsync.fleet.rounds import Rounds
from wsync.layout.layout import Layout, layout_of
from wsync.segment.publication import Publication
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import Spec
from wsync.sync.one_pass import Pass
from wsync.sync.syncer import Syncer


def box(version: int, identity: str = "x", **more: object) -> Report:
    name = identity if version else ""
    return replace(Report(version, name, version, name), **more)  # type: ignore[arg-type]


def change(provider: int, takers: set[int], version: int, gated: bool = True) -> Change:
    return Change(provider, frozenset(takers), version, gated)


def test_equal_boxes_need_nothing() -> None:
    """Nothing live anywhere, or the same everywhere, moves nothing."""
    assert change_of([box(0), box(0)]) is None
    assert change_of([box(7), box(7)]) is None


def test_who_is_behind_takes_the_highest_version() -> None:
    """A box that joins, or that died before its store, gets the version under its own number; others take nothing."""
    assert change_of([box(0), box(7), box(7)]) == change(1, {0}, 7)
    assert change_of([box(6, "w"), box(7), box(6, "w")]) == change(1, {0, 2}, 7)


def test_a_stranger_is_brought_to_the_group() -> None:
    """Weights that did not come from the group give way, and numbers only grow, on all boxes alike."""
    assert change_of([box(50, "old", ours=False), box(7), box(7)]) == change(1, {0, 1, 2}, 51)
    assert change_of([box(3, "old", ours=False), box(7)]) == change(1, {0}, 7)
    assert change_of([box(50, ours=False), box(7, ours=False)]) == change(0, {1}, 50)
    assert change_of([box(0, last=9), box(7)]) == change(1, {0, 1}, 10)


def test_a_box_that_lost_its_memory_gets_the_same_number() -> None:
    """After a reboot, or `wsync rm`, a box takes again what it had, under the number that it had."""
    assert change_of([box(0, last=7, last_identity="x"), box(7)]) == change(1, {0}, 7)
    assert change_of([box(0, last=7, last_identity="y"), box(7)]) == change(1, {0, 1}, 8)


def test_one_number_with_two_contents_is_given_up() -> None:
    """Where all that had a version died, and its number was given again, the boxes agree on the next one."""
    assert change_of([box(7, "y"), box(7), box(7)]) == change(1, {0, 1, 2}, 8)


def test_a_pin_leads() -> None:
    """What a pin holds goes to all, without their gates, also from behind; one that is live nowhere is sought."""
    pinned = box(6, "w", pin="w", held=True)
    assert change_of([box(7), pinned, box(7)]) == change(1, {0, 1, 2}, 8, gated=False)
    assert holder_of([box(6, "w"), pinned]) == 1 and holder_of([box(6, "w")]) is None
    assert leader_of([box(6), box(6, pin="z")]) == 1 and leader_of([pinned, box(6, pin="z")]) == 0


def test_who_declined_is_left_alone() -> None:
    """A box whose gate does not want what is live is not asked again, and its own weights win over nobody."""
    declined = box(50, "own", ours=False, declined="x")
    assert change_of([box(7), declined]) is None
    assert change_of([box(7), declined, box(0)]) == change(0, {2}, 7)
    assert change_of([box(8, "y"), declined]) == change(0, {0, 1}, 51)


def test_the_gravest_objection_counts() -> None:
    """All boxes raise the same: a rejection before a later, each box with its reason."""
    later, busy = {"kind": "RetryLater", "text": "later"}, {"kind": "SegmentBusy", "text": "busy"}
    gate = {"kind": "GateRejected", "text": "no", "differences": []}
    judge([{}, {}], ["a", "b"])
    with pytest.raises(GateRejected, match=r"a: busy b: no"):
        judge([busy, gate], ["a", "b"])
    with pytest.raises(RetryLater):
        judge([busy, later], ["a", "b"])
    with pytest.raises(SegmentBusy):
        judge([{}, busy], ["a", "b"])


def test_a_line_tells_a_few_names() -> None:
    """Guards against lines of a thousand names, in each log and in status."""
    assert few(["a", "b"]) == "a, b"
    told = few([f"box-{n}" for n in range(1000)])
    assert told.startswith("box-0, box-1") and told.endswith("box-7 and 992 more")


class Alone(Group):
    """A group of one box, which keeps what it sends."""

    def __init__(self) -> None:
        super().__init__({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"})
        self.names, self.sent = ["a"], bytearray()

    def gather(self, mine: object) -> list[object]:
        return [mine]

    def tell(self, what: object) -> None:
        pass

    def share(self, memory: memoryview, rank: int) -> None:
        self.sent += memory


@pytest.mark.parametrize("wrong", [False, True])
def test_a_checkpoint_is_sent_in_pieces_once_it_is_read(wrong: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """The pieces are the slot's bytes, cast and checked; of one that is refused none is sent."""
    monkeypatch.setattr("wsync.fleet.group.PIECE", 24)
    tensors = {"a": torch.full((4, 4), 1.0), "b": torch.full((4, 4), float("nan") if wrong else 2.0).double()}
    save_file(tensors, tmp_path / "x.safetensors")
    layout = Layout.build(dict.fromkeys(tensors, ("F32", (4, 4))), {})
    weights, group = bytearray(layout.nbytes), Alone()
    with Checkpoint(tmp_path / "x.safetensors") as checkpoint:
        about = Publication(version=1, checkpoint=str(checkpoint.path), identity=checkpoint.identity)
        sent = Shared(about, Turn(group), 0, checkpoint)
        plan = sent.plan(layout, Fit(cast=True))
        with pytest.raises(NonFiniteWeights, match="a: ") if wrong else nullcontext():
            sent.read_into(memoryview(weights), plan, finite=True, progress=None)
    assert group.sent == (b"" if wrong else weights)
    assert wrong or torch.frombuffer(weights, dtype=torch.float32).tolist() == [1.0] * 16 + [2.0] * 16


def test_an_error_of_the_system_is_told_to_all_boxes(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a box that sends its live weights, and has no descriptor left to read what travels with them."""
    spec, group = Spec("policies:mlp", "nets", SUPPORT), Alone()
    told: list[object] = []

    def gather(mine: object) -> list[object]:
        told.append(mine)
        return [mine]

    monkeypatch.setattr(group, "gather", gather)
    WritableSegment.create("nets", layout_of(mlp()), spec=spec.fingerprint()).close()
    save_file(mlp().state_dict(), tmp_path / "step_1.safetensors")
    with Syncer(spec, tmp_path, role="member") as syncer:
        assert syncer.once().status == "published"
        segment = syncer.box.make_segment()
        monkeypatch.setattr(segment, "extras", lambda *_: os.stat("/proc/self/fd/99999999"))
        rounds, this = Rounds(syncer, group, Member(syncer.box, group)), Pass("nets", segment.live(), 0.0)
        with pytest.raises(WsyncError, match="No such file"):
            rounds._change(this, segment, change(0, {1}, 2, gated=False))
    assert "No such file" in str(told)


@pytest.mark.parametrize("length", [0, 2038, 2039, 100_000])
def test_what_is_told_may_be_longer_than_a_frame(length: int) -> None:
    """Guards long reasons and tables of differences, which have no room in what is sent first."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        assert Group({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}).gather("x" * length) == ["x" * length]
    finally:
        dist.destroy_process_group()


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"} | {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize("wrong", [{"RANK": "one"}, {"LOCAL_WORLD_SIZE": "2"}, {"MASTER_PORT": None}, {"RANK": None}])
def test_half_of_torchruns_variables_are_told(wrong: dict[str, str | None]) -> None:
    """What torchrun did not set, or more than one watch a box, is a usage error that says how to start it."""
    group = Group(TORCHRUN)
    assert (group.rank, group.size, group.run) == (1, 2, "x")
    environment = {key: value for key, value in {**TORCHRUN, **wrong}.items() if value is not None}
    with pytest.raises(UsageError, match="TORCHELASTIC_RUN_ID"):
        Group(environment)
