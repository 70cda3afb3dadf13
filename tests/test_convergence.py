"""What a group concludes from what its boxes tell, without any group."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import raw
from safetensors.torch import save_file

from wsync.badge import few
from wsync.checkpoint import Checkpoint
from wsync.convergence import Change, Report, change_of, holder_of, leader_of
from wsync.delivery import Outbox, Sent, Turn, judge
from wsync.errors import GateRejected, NonFiniteWeights, RetryLater, SegmentBusy, UsageError, WsyncError
from wsync.fitting import Fit
from wsync.group import Group, Stream
from wsync.layout import Layout


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


class Recorder(Stream):
    """Takes pieces and keeps them."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def pass_on(self, piece: memoryview) -> None:
        self.sent.append(bytes(piece))

    def finish(self) -> None:
        pass


def test_a_piece_goes_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces go in their order, each as soon as all its bytes are there and never before; the rest at the end."""
    monkeypatch.setattr("wsync.group.PIECE", 4)
    weights, stream = bytearray(10), Recorder()
    outbox = Outbox(memoryview(weights), stream)

    def fill(offset: int, nbytes: int) -> list[bytes]:
        weights[offset : offset + nbytes] = b"x" * nbytes
        outbox.filled(offset, nbytes)
        return stream.sent

    assert fill(4, 4) == []
    assert fill(0, 3) == []
    assert fill(3, 1) == [b"xxxx", b"xxxx"]
    outbox.close()
    assert stream.sent[2:] == [b"\0\0"]


def test_a_line_tells_a_few_names() -> None:
    """Guards against lines of a thousand names, in each log and in status."""
    assert few(["a", "b"]) == "a, b"
    told = few([f"box-{n}" for n in range(1000)])
    assert told.startswith("box-0, box-1") and told.endswith("box-7 and 992 more")


class Counted(Turn):
    """Counts votes, and asks nobody."""

    def __init__(self) -> None:
        super().__init__(Group(TORCHRUN))
        self.objection: WsyncError | None = None

    def vote(self, objection: WsyncError | None = None, *, work: Callable[[], None] | None = None) -> None:
        self._cast += 1
        self.objection = self.objection or objection


@pytest.mark.parametrize("chunk", [8, 24, 1 << 20])
@pytest.mark.parametrize("form", ["plain", "cast", "reversed", "part", "adapter", "nan"])
def test_what_is_sent_is_what_is_staged(form: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order, dtypes or merging a checkpoint has: the pieces are the slot's bytes, never sent too early."""
    monkeypatch.setattr("wsync.fitting.CHUNK", chunk)
    monkeypatch.setattr("wsync.group.PIECE", 8)
    stream = Recorder()
    monkeypatch.setattr(Group, "stream", lambda *_: stream)
    monkeypatch.setattr(Group, "tell", lambda _, what: told.append(what))
    told: list[object] = []
    early: list[int] = []
    names = ["a", "b", "c.weight"]
    layout = Layout.build(dict.fromkeys(names, ("F32", (4, 4))), {})
    tensors = {name: torch.full((4, 4), 1.0 + n) for n, name in enumerate(names)}
    if form == "cast":
        tensors["b"] = tensors["b"].double()
    if form == "nan":
        tensors["b"][0, 0] = float("nan")
    if form == "part":
        del tensors["a"]
    settings = Fit(cast=True, strict=form != "part", base=str(tmp_path / "base.safetensors"))
    place = tmp_path / "x.safetensors"
    if form == "adapter":
        save_file(tensors, tmp_path / "base.safetensors")
        place = tmp_path / "x"
        place.mkdir()
        (place / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
        lora = {f"base_model.model.c.lora_{x}.weight": torch.ones(s) for x, s in (("A", (1, 4)), ("B", (4, 1)))}
        save_file(lora, place / "adapter_model.safetensors")
    elif form == "reversed":
        header: dict[str, object] = {}
        for n, name in enumerate(reversed(names)):
            header[name] = {"dtype": "F32", "shape": [4, 4], "data_offsets": [64 * n, 64 * n + 64]}
        raw(place, header, b"".join(tensors[name].numpy().tobytes() for name in reversed(names)))
    else:
        save_file(tensors, place)
    weights, turn = bytearray(layout.nbytes), Counted()
    with Checkpoint(place) as checkpoint:
        plan = checkpoint.plan(layout, settings)
        sent = Sent(checkpoint, turn, whole=checkpoint.merged)
        sent.read_into(memoryview(weights), plan, finite=True, progress=lambda _: early.append(len(stream.sent)))
    assert b"".join(stream.sent) == weights and told == [True, zlib.crc32(weights)]
    if form in ("plain", "reversed"):
        assert early[-1] == len(stream.sent)  # each as soon as it was there, not when all was checked
    assert isinstance(turn.objection, NonFiniteWeights) == (form == "nan")
    assert turn._cast == 2
    if form == "adapter":
        assert torch.frombuffer(weights[128:], dtype=torch.float32).tolist() == [4.0] * 16


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
