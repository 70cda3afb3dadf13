"""Room and remains: shared memory that runs out, makers and removers that were killed, readers that died."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from policies import mlp
from processes import Spawn

from wsync.layout.layout import Layout, layout_of
from wsync.segment import segment_files
from wsync.segment.reader_records import ReaderRecord, Registration
from wsync.segment.writable import WritableSegment

LAYOUT = layout_of(mlp())
LARGE = Layout.build({"weight": ("F32", (1 << 20,))}, {})  # 4 MiB a slot


def test_every_byte_of_a_slot_is_reserved(runtime: Path) -> None:
    """Slots take their memory when they are made, so that no later write finds none."""
    segment = WritableSegment.create("nets", LARGE, slots=2)
    for slot in range(2):
        info = os.stat(segment.path / f"slot-{slot}.safetensors")
        assert info.st_blocks * 512 >= info.st_size >= LARGE.nbytes


def test_remains_of_killed_makers_are_swept(runtime: Path, spawn: Spawn) -> None:
    """The next maker removes what a killed one left half made, and not what a living one is at."""
    script = (
        "import sys\n"
        "from wsync.segment import segment_files\n"
        "from wsync.layout.layout import Layout\n"
        "from wsync.segment.writable import WritableSegment\n"
        "def reserve(*_, **__): print('making', flush=True); sys.stdin.read()\n"
        "segment_files.reserve = reserve\n"
        "WritableSegment.create('other', Layout.build({'weight': ('F32', (4,))}, {}))\n"
    )
    maker = spawn("-c", script, stdin=-1)
    assert maker.stdout and maker.stdout.readline() == "making\n"
    (begun,) = os.listdir(runtime)
    WritableSegment.create("first", LAYOUT)
    assert sorted(os.listdir(runtime)) == sorted([begun, "first"])
    maker.kill()
    maker.wait()
    WritableSegment.create("second", LAYOUT)
    assert sorted(os.listdir(runtime)) == ["first", "second"]


@pytest.mark.parametrize("step", ["open_dir", "try_lock"])
def test_maker_whose_directory_is_swept_makes_another(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A sweeper that comes before the maker has its lock takes the directory for a dead maker's: no harm is done."""
    real, due = getattr(segment_files, step), [True]

    def late(*arguments: Any, **more: Any) -> Any:
        if due and due.pop():
            (swept,) = runtime.glob(".new-*")
            swept.rmdir()
        return real(*arguments, **more)

    monkeypatch.setattr(segment_files, step, late)
    WritableSegment.create("nets", LAYOUT).close()
    assert os.listdir(runtime) == ["nets"]


def test_failed_making_leaves_nothing(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in the middle of making a segment removes what was there of it."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(segment_files, "reserve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        WritableSegment.create("nets", LAYOUT)
    assert os.listdir(runtime) == []


def test_living_reader_is_listed(runtime: Path) -> None:
    """A registered reader is listed with what it last said, once, until it closes."""
    segment = WritableSegment.create("nets", LAYOUT)
    registration = Registration(segment.path, "swap")
    registration.update(7, (2,))
    for _ in range(2):
        (reader,) = segment.readers()
        assert (reader.pid, reader.version, reader.mode, reader.slots) == (os.getpid(), 7, "swap", (2,))
    registration.update(12345678, (0, 1))
    assert [r.version for r in segment.readers()] == [12345678]
    registration.close()
    assert segment.readers() == [] and os.listdir(segment.path / "readers") == []


def test_record_of_slots_that_hold_nothing_holds_nothing_back(runtime: Path) -> None:
    """A record may name an empty slot, one that is not there, or a segment that is gone: none of it is a version."""
    segment = WritableSegment.create("nets", LAYOUT)
    record = ReaderRecord(1, "x", 1, 1.0, "swap", (0, 63))
    assert segment.held_back(record) == []
    segment.remove()
    assert segment.held_back(record) == []
