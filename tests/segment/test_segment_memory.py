"""Room and remains: shared memory that runs out, makers and removers that were killed, readers that died."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from policies import mlp
from processes import Spawn

from wsync.errors import OutOfSharedMemory
from wsync.layout.layout import Layout, layout_of
from wsync.segment import files as segment_files
from wsync.segment.readers import ReaderRecord, Registration
from wsync.segment.writable import WritableSegment

LAYOUT = layout_of(mlp())
LARGE = Layout.build({"weight": ("F32", (1 << 20,))}, {})  # 4 MiB a slot


@pytest.fixture
def small(runtime: Path) -> Iterator[Path]:
    """A file system in memory of 8 MiB, where the test may mount one."""
    place = runtime / "small"
    place.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "wsync-test", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting takes root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_no_room_is_said_with_both_numbers(small: Path) -> None:
    """A segment that does not fit is refused before anything could end in SIGBUS, and leaves nothing behind."""
    free = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
    with pytest.raises(OutOfSharedMemory) as caught:
        WritableSegment.create("nets", LARGE, small)
    text = str(caught.value)
    needed = [int(word.replace(",", "")) for word in text.split() if word.replace(",", "").isdigit()]
    assert any(3 * LARGE.nbytes <= number < 4 * LARGE.nbytes for number in needed), text
    assert any(0 <= number <= free for number in needed), text
    assert "--shm-size" in text and "--slots" in text
    assert os.listdir(small) == []
    assert os.statvfs(small).f_bavail * os.statvfs(small).f_frsize == free


def test_free_is_what_was_free_before(small: Path) -> None:
    """The message tells how much room there is for a smaller segment, not what the failed try left over."""
    free = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
    with pytest.raises(OutOfSharedMemory, match=f"{free:,}"):
        WritableSegment.create("nets", LARGE, small)


def test_every_byte_of_a_slot_is_reserved(runtime: Path) -> None:
    """Slots take their memory when they are made, so that no later write finds none."""
    segment = WritableSegment.create("nets", LARGE, slots=2)
    for slot in range(2):
        info = os.stat(segment.path / f"slot-{slot}.safetensors")
        assert info.st_blocks * 512 >= info.st_size >= LARGE.nbytes


def test_limit_of_file_sizes_is_no_traceback(runtime: Path, spawn: Spawn) -> None:
    """Where the limit is one of the process, it is told the same way, and nothing is left."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "from wsync.errors import OutOfSharedMemory\n"
        "from wsync.layout.layout import Layout\n"
        "from wsync.segment.writable import WritableSegment\n"
        "try: WritableSegment.create('nets', Layout.build({'weight': ('F32', (1 << 20,))}, {}))\n"
        "except OutOfSharedMemory as exc: print('refused', exc)\n"
    )
    out, err = spawn("-c", script).communicate()
    assert out.startswith("refused") and "no room" in out, err
    assert os.listdir(runtime) == []


def test_remains_of_killed_makers_are_swept(runtime: Path, spawn: Spawn) -> None:
    """The next maker removes what a killed one left half made, and not what a living one is at."""
    script = (
        "import sys\n"
        "from wsync.segment import files as segment_files\n"
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


def test_remains_of_a_killed_remover_are_swept(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that was cut short after its rename is finished by the next maker."""
    segment = WritableSegment.create("nets", LAYOUT)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        segment.remove()
    assert len(os.listdir(runtime)) == 1
    WritableSegment.create("nets", LAYOUT)
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


def test_killed_reader_is_not_listed(runtime: Path, spawn: Spawn) -> None:
    """A reader that had no chance to say goodbye is gone at the next look, and its record with it."""
    segment = WritableSegment.create("nets", LAYOUT)
    script = (
        "import pathlib, sys\n"
        "from wsync.segment.readers import ReaderRecord, Registration\n"
        "r = Registration(pathlib.Path(sys.argv[1]), 'copy'); print('listed', flush=True); sys.stdin.read()\n"
    )
    process = spawn("-c", script, str(segment.path), stdin=-1)
    assert process.stdout and process.stdout.readline() == "listed\n"
    assert [r.pid for r in segment.readers()] == [process.pid]
    process.kill()
    process.wait()
    assert segment.readers() == []
    assert os.listdir(segment.path / "readers") == []


def test_unreadable_record_stops_nobody(runtime: Path) -> None:
    """A record that cannot be read, as of another wsync, hides no other reader and fails nothing."""
    segment = WritableSegment.create("nets", LAYOUT)
    strange, good = Registration(segment.path, "swap"), Registration(segment.path, "copy")
    os.pwrite(strange._fd, b"?" * 1024, 0)
    assert [r.mode for r in segment.readers()] == ["copy"]
    strange.close()
    good.close()


def test_record_of_slots_that_hold_nothing_holds_nothing_back(runtime: Path) -> None:
    """A record may name an empty slot, one that is not there, or a segment that is gone: none of it is a version."""
    segment = WritableSegment.create("nets", LAYOUT)
    record = ReaderRecord(1, "x", 1, 1.0, "swap", (0, 63))
    assert segment.held_back(record) == []
    segment.remove()
    assert segment.held_back(record) == []
