"""The protocol in one process, on real shared memory: what it publishes, whom it lets in, and in which order."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import write
from hypothesis import given
from hypothesis import strategies as st
from policies import mlp
from processes import Spawn
from safetensors import safe_open
from safetensors.torch import load_file
from segments import LAYOUT, Push, push, segment, slot_file

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import (
    CheckpointChanged,
    NonFiniteWeights,
    SegmentBusy,
)
from wsync.segment import segment as protocol
from wsync.segment import segment_files, word_and_lease, writable
from wsync.segment.publication import METADATA_END, Publication
from wsync.segment.publishing import publish, publish_again
from wsync.segment.reader_records import Registration
from wsync.segment.segment import Segment, segments
from wsync.segment.segment_files import NO_SLOT, REMOVED, WORD_OFFSET, metadata_block
from wsync.segment.writable import WritableSegment
from wsync.system import memory

__all__ = ["push", "segment"]  # fixtures


def is_free(path: Path) -> bool:
    """Whether a publisher could have the slot."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return memory.try_lock(fd)
    finally:
        os.close(fd)


def test_a_fresh_slot_is_a_safetensors_file(segment: WritableSegment) -> None:
    """The official reader reads every slot of a new segment: names, shapes, zeros."""
    for slot in range(segment.slots):
        tensors = load_file(slot_file(segment, slot))
        assert {name: tuple(t.shape) for name, t in tensors.items()} == {e.name: e.shape for e in LAYOUT.tensors}
        assert not any(t.any() for t in tensors.values())


def test_a_published_slot_is_a_safetensors_file(segment: WritableSegment, push: Push, tmp_path: Path) -> None:
    """The official reader sees the weights of each publish, and whose they are in the metadata."""
    for mark, step in ((1.0, 10), (2.0, 20), (3.0, None), (4.0, 40)):
        publication = push(mark, step)
        path = slot_file(segment, segment.word & 0xFF)
        assert all((t == mark).all() for t in load_file(path).values())
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["version"] == str(publication.version)
        assert metadata["step"] == ("" if step is None else str(step))
        assert metadata["source"] == str(tmp_path / "weights.safetensors")


def test_nothing_is_live_at_first(segment: WritableSegment) -> None:
    """A new segment has version 0, no live weights and nothing to lease."""
    assert (segment.version, segment.word, segment.live(), segment.lease()) == (0, NO_SLOT, None, None)


def test_version_grows_by_one(segment: WritableSegment, push: Push) -> None:
    """Every publish adds one, whatever the step does, and the WORD says version and slot."""
    for version, step in enumerate((100, 5, 5, -7), start=1):
        push(float(version), step)
        live = segment.live()
        assert live and (live.version, live.step) == (version, step)
        assert (segment.version, segment.word >> 8) == (version, version)
        assert Publication.from_header(slot_file(segment, segment.word & 0xFF).read_bytes()[:METADATA_END]) == live


@given(
    step=st.none() | st.integers(-(1 << 63), 1 << 63),
    source=st.text(max_size=20),
    at=st.integers(8, 200),
    damage=st.binary(max_size=3) | st.sampled_from([b"9" * 20, b'"', b"e9"]),
    end=st.sampled_from([b"", b" ", b"x", b"}"]),
)
def test_a_damaged_header_is_no_crash(step: int | None, source: str, at: int, damage: bytes, end: bytes) -> None:
    """Guards that a slot's header comes back as it was written, and that a damaged one is at worst a ValueError."""
    written = Publication(
        version=3, step=step, checkpoint=source or None, identity="id", published_at=1.75e9, spec="spec"
    )
    head = bytes(8) + metadata_block(written.to_metadata())
    assert Publication.from_header(head) == written
    with suppress(ValueError):
        Publication.from_header(head[:at] + damage + head[at + len(damage) :] + end)


def test_live_is_never_what_is_only_staged(
    segment: WritableSegment, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that is late meets a slot that is already being staged again: it looks again, and tells what is live."""
    first = push(1.0, 10)
    pread, due = os.pread, [True]

    def late(fd: int, size: int, offset: int) -> bytes:
        if due and due.pop():
            push(2.0, 20)
            with segment.publishing(), segment.spare_slot() as slot:
                assert slot.number == 0
                slot.describe(replace(first, version=99))
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", late)
    live = segment.live()
    assert live and (live.version, live.step) == (2, 20)


def test_another_handle_sees_the_version(segment: WritableSegment, push: Push) -> None:
    """A reader's own mapping of the control page follows the publisher's."""
    other = Segment.open("nets")
    push(1.0, 3)
    live = other.live()
    assert live and (other.version, live.step) == (1, 3)
    assert other.control.words[WORD_OFFSET // 8] == segment.word


def test_second_maker_opens_the_first_ones(segment: WritableSegment, push: Push) -> None:
    """Whoever comes second gets the standing segment with what is live in it, and its slots stay."""
    push(1.0)
    again = WritableSegment.create("nets", LAYOUT, slots=5)
    assert os.path.samestat(os.stat(again.path), os.stat(segment.path))
    assert (again.version, again.slots) == (1, 3)


def test_maker_that_loses_the_race_opens_the_winners(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another maker that is done just before our rename wins, and nothing of ours is left."""
    inside: list[bool] = []

    def slow(fd: int, size: int, **rest: Any) -> None:
        if not inside:
            inside.append(True)
            inside.append(bool(WritableSegment.create("nets", LAYOUT, slots=2)))
        memory.reserve(fd, size, **rest)

    monkeypatch.setattr(segment_files, "reserve", slow)
    assert WritableSegment.create("nets", LAYOUT, slots=4).slots == 2
    assert os.listdir(runtime) == ["nets"]


def test_second_publisher_is_told_who_holds_it(segment: WritableSegment, spawn: Spawn) -> None:
    """The one publisher is named by its pid; once it is killed the next one gets in."""
    hold = "import sys; from wsync.segment.segment import Segment; from wsync.segment.writable import WritableSegment\n"
    hold += "with WritableSegment.open('nets').publishing(): print('held', flush=True); sys.stdin.read()"
    holder = spawn("-c", hold, stdin=-1)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with pytest.raises(SegmentBusy, match=f"pid {holder.pid}"), segment.publishing():
        pytest.fail("two publishers")
    holder.kill()
    holder.wait()
    with segment.publishing():
        pass


def test_second_publisher_of_one_process_is_refused(segment: WritableSegment) -> None:
    """The lock is one of the open file, not of the process, so two publishers of one process exclude each other."""
    with (
        segment.publishing(),
        pytest.raises(SegmentBusy, match=f"pid {os.getpid()}"),
        WritableSegment.open("nets").publishing(),
    ):
        pytest.fail("two publishers")


def test_leased_slot_is_never_written(segment: WritableSegment, push: Push) -> None:
    """However often is published, the bytes of a leased slot stay; released, it is used again."""
    push(1.0)
    lease = segment.lease()
    assert lease
    before = slot_file(segment, lease.slot).read_bytes()
    used = []
    for mark in (2.0, 3.0, 4.0, 5.0):
        push(mark)
        used.append(segment.word & 0xFF)
    assert lease.slot not in used
    assert slot_file(segment, lease.slot).read_bytes() == before
    lease.release()
    push(6.0)
    push(7.0)
    assert all((t == 7.0).all() for t in load_file(slot_file(segment, segment.word & 0xFF)).values())
    assert slot_file(segment, lease.slot).read_bytes() != before


def test_all_spare_slots_leased_is_busy(segment: WritableSegment, push: Push) -> None:
    """With every spare slot leased nothing is published, the readers are named, and a release is enough to go on."""
    registration = Registration(segment.path, "swap")
    segment.control.bound = 3
    leases = []
    for mark in (1.0, 2.0, 3.0):
        push(mark)
        leases.append(segment.lease())
    registration.update(1, (leases[0].slot,) if leases[0] else ())
    with pytest.raises(SegmentBusy, match=rf"pid {os.getpid()}, version 1"):
        push(4.0)
    assert segment.version == 3 and all((t == 3.0).all() for t in load_file(slot_file(segment, 2)).values())
    assert leases[0]
    leases[0].release()
    assert push(4.0).version == 4
    registration.close()


def test_mapping_holds_no_lock(segment: WritableSegment, push: Push) -> None:
    """A released slot is free though both sides still map it: no mapping keeps a lock's descriptor."""
    reader = Segment.open("nets")
    push(1.0)
    lease = reader.lease()
    assert lease
    mapped = reader.map_slot(lease.slot)
    assert not is_free(slot_file(segment, lease.slot))
    lease.release()
    assert is_free(slot_file(segment, lease.slot))
    with segment.publishing(), segment.spare_slot() as spare:
        staged, weights = slot_file(segment, spare.number), spare.weights
        assert not is_free(staged)
    assert is_free(staged)
    assert len(weights) == LAYOUT.nbytes and len(mapped) == staged.stat().st_size


def test_failed_staging_leaves_what_is_live(segment: WritableSegment, push: Push, tmp_path: Path) -> None:
    """A source that changes under the read, or is not finite, is never live, and its slot is free again."""
    push(1.0)
    path = write(tmp_path / "weights.safetensors", mlp(), 2.0)
    with pytest.raises(CheckpointChanged), segment.publishing(), Checkpoint(path) as checkpoint:
        publish(segment, checkpoint, progress=lambda _: os.utime(path, ns=(0, 0)))
    with pytest.raises(NonFiniteWeights):
        push(float("nan"))
    assert segment.version == 1
    assert all(is_free(slot_file(segment, slot)) for slot in range(segment.slots))
    assert push(3.0).version == 2


@pytest.mark.parametrize("publishes", [1, 2])
def test_reader_checks_the_word_again(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, publishes: int
) -> None:
    """A publish between a reader's load of the WORD and its lock is noticed, also one to the same slot."""
    segment = WritableSegment.create("nets", LAYOUT, slots=2)
    reader = Segment.open("nets")

    def publish_marks(*numbers: int) -> None:
        for number in numbers:
            path = write(tmp_path / "weights.safetensors", mlp(), float(number))
            with segment.publishing(), Checkpoint(path) as checkpoint:
                publish(segment, checkpoint)

    publish_marks(1)
    due = [range(2, 2 + publishes)]

    def late(fd: int, *, shared: bool = False) -> bool:
        if shared and due:
            publish_marks(*due.pop())
        return memory.try_lock(fd, shared=shared)

    monkeypatch.setattr(protocol, "try_lock", late)
    lease = reader.lease()
    assert lease and (lease.version, lease.word) == (1 + publishes, segment.word)
    assert all((t == 1.0 + publishes).all() for t in load_file(slot_file(segment, lease.slot)).values())
    lease.release()
    assert all(is_free(slot_file(segment, slot)) for slot in range(2))


def test_reader_starts_over_while_the_slot_is_staged(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, push: Push
) -> None:
    """A reader that is late by whole publishes meets the publisher's lock, and never reads what is being written."""
    segment = WritableSegment.open("nets")
    fds: list[int] = []
    push(1.0)

    def late(fd: int, *, shared: bool = False) -> bool:
        if shared and not fds:
            push(2.0)
            fds.append(os.open(slot_file(segment, 0), os.O_RDWR))
            fcntl.flock(
                fds[0], fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # a publisher is staging the slot that the reader is about to lease
        return memory.try_lock(fd, shared=shared)

    monkeypatch.setattr(protocol, "try_lock", late)
    lease = segment.lease()
    os.close(fds[0])
    assert lease and (lease.version, lease.slot) == (2, 1)


def test_publisher_checks_the_word_under_the_lock(
    segment: WritableSegment, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot that went live before its lock was had is not staged over."""
    push(1.0)
    spare = (segment.word + 1) & 0xFF

    def late(fd: int, *, shared: bool = False) -> bool:
        if segment.version == 1:
            segment.store(2, spare)
        return memory.try_lock(fd, shared=shared)

    monkeypatch.setattr(writable, "try_lock", late)
    with segment.spare_slot() as slot:
        assert slot.number != spare


def test_published_slot_never_looks_locked(
    segment: WritableSegment, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The publisher lets go of a slot before its store: whoever follows the new WORD at once gets the lease."""
    leases = []
    reader = Segment.open("nets")
    monkeypatch.setattr(word_and_lease, "wake", lambda _: leases.append(reader.lease()))
    push(1.0)
    push(2.0)
    assert [lease.version for lease in leases if lease] == [1, 2]


def test_a_slot_is_let_go_whoever_holds_its_generator(
    segment: WritableSegment, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot is free once it is live, even where a tracer, or a Python that counts no references, keeps generators."""
    real, kept, identities = WritableSegment._spare_slots, list[Any](), list[str]()

    def keep(*given: Any) -> Any:
        kept.append(real(*given))
        return kept[-1]

    monkeypatch.setattr(WritableSegment, "_spare_slots", keep)
    for version in (1, 2, 3):
        if version < 3:
            push(float(version))
        else:
            with segment.publishing():
                publish_again(segment, 1, identities[0], 0)
        assert is_free(slot_file(segment, segment.word & 0xFF)), version
        live = segment.live()
        assert live and live.version == version
        identities.append(live.identity)
    assert len(kept) == 3


def test_remove_tells_the_readers_who_keep_their_memory(segment: WritableSegment, push: Push, runtime: Path) -> None:
    """The WORD says removed, the directory is gone, and what a reader has mapped keeps its bytes."""
    push(3.0)
    reader = Segment.open("nets")
    lease = reader.lease()
    assert lease
    mapped = reader.map_slot(lease.slot)
    before = bytes(mapped)
    segment.remove()
    assert reader.word & 0xFF == REMOVED and reader.version == 1
    assert (reader.live(), reader.lease(), reader.is_current()) == (None, None, False)
    assert os.listdir(runtime) == [] and bytes(mapped) == before
    again = WritableSegment.create("nets", LAYOUT)
    assert again.is_current() and not reader.is_current()


def test_remove_waits_for_no_publisher(segment: WritableSegment, push: Push) -> None:
    """A segment that a publisher holds stays as it is."""
    push(1.0)
    with segment.publishing(), pytest.raises(SegmentBusy):
        WritableSegment.open("nets").remove()
    assert segment.version == 1 and segment.live() and segment.is_current()


def test_segments_are_listed_by_name(segment: WritableSegment, runtime: Path) -> None:
    """Only whole segments are listed, sorted; what is being made or removed is not."""
    WritableSegment.create("Actor", LAYOUT)
    (runtime / ".new-abc").mkdir()
    (runtime / "state").mkdir()
    assert segments() == ["Actor", "nets"]


def test_busy_pass_keeps_no_descriptor(segment: WritableSegment, push: Push) -> None:
    """A watch that finds every spare slot leased, pass after pass, does not run out of descriptors."""
    segment.control.bound = 3
    leases = []
    for mark in (1.0, 2.0, 3.0):
        push(mark)
        leases.append(segment.lease())
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        with pytest.raises(SegmentBusy):
            push(4.0)
    assert os.listdir("/proc/self/fd") == before
