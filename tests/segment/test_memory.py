"""Room that runs out, of every kind and at every step: one clear error, nothing left behind, what is live untouched."""

from __future__ import annotations

import json
import logging
import mmap
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import marks, write
from others import in_a_small_place, limited, run_cli
from policies import mlp
from processes import Cli

import wsync
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import OutOfSharedMemory, SegmentBusy, WsyncError
from wsync.layout.layout import Layout, layout_of
from wsync.segment.publishing import publish
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment, remove
from wsync.settings import layout_process
from wsync.settings.spec import load_spec
from wsync.settings.user_code import read_layout
from wsync.sync.loop import run
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer
from wsync.system.access import Access
from wsync.system.memory import PAGE

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")]
LAYOUT = layout_of(mlp())
LARGE = Layout.build({"weight": ("F32", (8 << 20,))}, {})  # 32 MiB a slot
PAGES = 3 + 3 * 4  # control, layout.json, lock, and three slots of 12,520 bytes


@pytest.fixture
def small(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a small file system is mounted, in which the runtime directory is."""
    (runtime / "small").mkdir()
    monkeypatch.setenv("WSYNC_RUNTIME_DIR", str(runtime / "small/base"))
    return runtime / "small"


def push(segment: WritableSegment, checkpoint: Path) -> None:
    with segment.publishing(), Checkpoint(checkpoint) as opened:
        publish(segment, opened)


def fill(place: Path, *, pages: int = 0) -> None:
    """Leaves so many free pages in a file system."""
    (place / "filler").unlink(missing_ok=True)
    info = os.statvfs(place)
    with open(place / "filler", "wb") as file:
        size = (info.f_bavail - pages) * info.f_frsize
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
    assert os.statvfs(place).f_bavail == pages


def fill_inodes(place: Path, *, left: int = 0) -> None:
    """Leaves so many free inodes in a file system."""
    for path in place.glob("filler-*"):
        path.unlink()
    for number in range(os.statvfs(place).f_favail - left):
        (place / f"filler-{number}").touch()
    assert os.statvfs(place).f_favail == left


def names(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if "filler" not in path.name)


# --- a full file system


def test_every_page_but_the_last_is_too_few(small: Path) -> None:
    """With any number of free pages a segment is made whole, or refused with both numbers and nothing left behind."""

    def work() -> None:
        (small / "base").mkdir(mode=0o700)
        for pages in range(PAGES):
            fill(small, pages=pages)
            with pytest.raises(OutOfSharedMemory) as caught:
                WritableSegment.create("nets", LAYOUT)
            text = str(caught.value)
            assert f"{pages * PAGE:,} are free" in text and "--shm-size" in text and "sizeLimit" in text, text
            needed = int(text.split("takes ")[1].split()[0].replace(",", ""))
            assert (PAGES - 2) * PAGE - 3 * PAGE < needed <= PAGES * PAGE
            assert names(small) == ["base"] and os.statvfs(small).f_bavail == pages
        fill(small, pages=PAGES)
        WritableSegment.create("nets", LAYOUT)
        assert os.statvfs(small).f_bavail == 0

    in_a_small_place(small, work)


def test_a_standing_segment_needs_no_more_room(small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On a file system that is full to the last page versions go live, policies attach and follow, and rm removes."""
    checkpoints = [write(tmp_path / f"{mark}.safetensors", mlp(), float(mark)) for mark in range(1, 7)]

    def work() -> None:
        segment = WritableSegment.create("nets", LAYOUT)
        fill(small)
        push(segment, checkpoints[0])
        policies = mlp(), mlp()
        readers = [
            wsync.attach(policies[0], "nets", timeout=10, mode="swap"),
            wsync.attach(policies[1], "nets", timeout=10, mode="copy"),
        ]
        assert "is not in the list" in caplog.text and "No space left" in caplog.text
        assert os.listdir(segment.path / "readers") == []
        for mark, checkpoint in enumerate(checkpoints[1:], start=2):
            push(segment, checkpoint)
            assert all(r.refresh() and r.version == mark for r in readers)
            assert all(marks(policy) == {float(mark)} for policy in policies)
        with (
            segment.publishing(),
            pytest.raises(SegmentBusy, match=f"pid {os.getpid()}"),
            WritableSegment.open("nets").publishing(),
        ):
            pytest.fail("two publishers")
        (small / "base").chmod(0o755)
        segment.share(Access("0644"))
        code, out, err = run_cli("status", "nets", "--json")
        assert (code, json.loads(out)["version"], json.loads(out)["readers"]) == (0, 6, []), err
        for reader in readers:
            reader.close()
        remove("nets")
        assert names(small) == ["base"]

    with caplog.at_level(logging.WARNING, "wsync"):
        in_a_small_place(small, work)


def test_what_is_live_stays_when_another_finds_no_room(small: Path, tmp_path: Path) -> None:
    """A second segment that does not fit leaves the first and its readers as they were."""
    checkpoint = write(tmp_path / "a.safetensors", mlp(), 1.0)

    def work() -> None:
        push(WritableSegment.create("nets", LAYOUT), checkpoint)
        policy = mlp()
        reader = wsync.attach(policy, "nets", timeout=10)
        before = names(small)
        for pages in (0, 1, 2, 3, PAGES - 1):
            fill(small, pages=pages)
            with pytest.raises(OutOfSharedMemory):
                WritableSegment.create("more", LAYOUT)
            with pytest.raises(OutOfSharedMemory):
                wsync.attach(mlp(), "more", timeout=1)
        assert names(small) == before and marks(policy) == {1.0} and reader.version == 1
        assert len(Segment.open("nets").readers()) == 1

    in_a_small_place(small, work)


@pytest.mark.parametrize("command", ["push", "watch"])
def test_the_command_line_says_how_to_enlarge_it(small: Path, tmp_path: Path, cli: Cli, command: str) -> None:
    """push exits with 1 and one message, in JSON too; watch logs it and goes on to its end."""
    write(tmp_path / "a.safetensors", mlp(), 1.0)
    arguments = ("push", "policies:mlp", str(tmp_path), "--json", "--settle", "0")

    def pushes() -> None:
        fill(small, pages=3)
        done = cli(*arguments)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert "--shm-size" in done.stderr and "sizeLimit" in done.stderr
        answer = json.loads(done.stdout)
        assert answer["status"] == "failed" and "bytes" in answer["reason"]
        assert set(names(small)) <= {"base"}

    def watches() -> None:
        import threading

        fill(small, pages=3)
        stop, told = threading.Event(), []

        def tell(what: Outcome | WsyncError) -> None:
            told.append(what)
            if len(told) == 2:
                stop.set()
            (small / "filler").unlink(missing_ok=True)

        layout_process.layout_of_spec = read_layout  # in a process that ends with this work
        with Syncer(replace(load_spec("policies:mlp"), poll=0.01), tmp_path / "a.safetensors") as syncer:
            run(syncer, stop, tell)
        assert isinstance(told[0], OutOfSharedMemory) and isinstance(told[1], Outcome), told
        assert told[1].status == "published"

    in_a_small_place(small, pushes if command == "push" else watches)


# --- inodes


def test_inodes_that_run_out_are_told_as_such(small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With any number of free inodes a segment is made whole, or refused with both numbers and nothing left behind."""
    checkpoint = write(tmp_path / "a.safetensors", mlp(), 1.0)

    def work() -> None:
        for left in range(9):
            fill_inodes(small, left=left)
            with pytest.raises(OutOfSharedMemory, match=f"inodes: {8 if left else 1} wanted, {max(left - 1, 0)} of 60"):
                WritableSegment.create("nets", LAYOUT)
            assert set(names(small)) <= {"base"}
            (small / "base").rmdir() if (small / "base").exists() else None
        fill_inodes(small, left=9)  # the place, the segment, three files, readers/ and three slots
        push(WritableSegment.create("nets", LAYOUT), checkpoint)
        assert os.statvfs(small).f_favail == 0
        policy = mlp()
        assert wsync.attach(policy, "nets", timeout=10).version == 1 and marks(policy) == {1.0}
        assert "is not in the list" in caplog.text
        push(WritableSegment.open("nets"), checkpoint)
        remove("nets")

    with caplog.at_level(logging.WARNING, "wsync"):
        in_a_small_place(small, work, "size=4m,nr_inodes=60")


# --- limits of the process


@pytest.mark.parametrize("more", [0, 1, PAGE, 12_519])
def test_a_limit_of_file_sizes_is_told(runtime: Path, more: int) -> None:
    """A process whose files may not be so large is told which limit it is, and leaves nothing behind."""

    def work() -> None:
        with pytest.raises(OutOfSharedMemory, match=r"File too large.*ulimit -f"):
            WritableSegment.create("nets", LAYOUT)

    limited(work, resource.RLIMIT_FSIZE, more)
    assert os.listdir(runtime) == []


def test_a_reader_under_a_limit_of_file_sizes_attaches(runtime: Path, tmp_path: Path) -> None:
    """It cannot write its record, and reads all the same."""
    push(WritableSegment.create("nets", LAYOUT), write(tmp_path / "a.safetensors", mlp(), 1.0))

    def work() -> int:
        return wsync.attach(mlp(), "nets", timeout=10).version

    assert limited(work, resource.RLIMIT_FSIZE, 0) == 1
    assert os.listdir(runtime / "nets/readers") == []


@pytest.fixture
def live(runtime: Path) -> WritableSegment:
    """A large segment that takes more address space than the limited process has left."""
    return WritableSegment.create("nets", LARGE)


def test_an_address_space_that_is_full_is_told(live: WritableSegment) -> None:
    """Neither side can map a slot: both say how much, which limit it is, and leave everything as it was."""

    def work() -> None:
        for handle in (WritableSegment, Segment):
            with pytest.raises(OutOfSharedMemory, match="ulimit -v") as caught:
                handle.open("nets").map_slot(0)
            assert f"{LARGE.nbytes + live.data_offset:,} bytes" in str(caught.value)

    limited(work, resource.RLIMIT_AS, 16 << 20)
    assert live.version == 0


def test_a_control_page_that_finds_no_memory_leaves_nothing_open(live: WritableSegment) -> None:
    """A watch that looks again at each pass does not run out of descriptors besides, nor is told to remove anything."""

    def work() -> None:
        keep = []
        while True:  # to the last page
            try:
                keep.append(mmap.mmap(-1, PAGE))
            except OSError:
                break
        before = os.listdir("/proc/self/fd")
        for _ in range(3):
            with pytest.raises(OutOfSharedMemory, match="ulimit -v"):
                Segment.open("nets")
        after = os.listdir("/proc/self/fd")
        keep.clear()
        assert len(after) == len(before)

    limited(work, resource.RLIMIT_AS, 1 << 20)


@pytest.mark.parametrize(("limit", "more"), [(resource.RLIMIT_AS, 0), (resource.RLIMIT_AS, 4 << 20)])
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_push_under_a_limit_is_one_message(
    runtime: Path, tmp_path: Path, options: list[str], limit: int, more: int
) -> None:
    """push exits with 1 and one message, and what was live stays live and readable."""
    (tmp_path / "nets.toml").write_text('policy = "policies:mlp"\n[policy_kwargs]\nhidden = 500000\n')
    spec = load_spec(str(tmp_path / "nets.toml"))
    paths = [write(tmp_path / f"{mark}.safetensors", mlp(500_000), float(mark)) for mark in (1, 2)]
    segment = WritableSegment.create("nets", layout_of(mlp(500_000)), spec=spec.fingerprint())
    push(segment, paths[0])
    segment.unmap()
    code, out, err = limited(lambda: run_cli("push", str(tmp_path / "nets.toml"), str(paths[1]), *options), limit, more)
    assert code == 1 and "ulimit -v" in err and "Traceback" not in err, (code, out, err)
    assert segment.version == 1
    policy = mlp(500_000)
    assert wsync.attach(policy, "nets", timeout=10).version == 1 and marks(policy) == {1.0}


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_memory_that_is_gone_is_one_message(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """An allocation that fails, or a system that refuses, is an error of ours in push, and in watch the next pass's."""
    import threading

    path = write(tmp_path / "a.safetensors", mlp(), 1.0)
    WritableSegment.create("policies.mlp", LAYOUT, spec=load_spec("policies:mlp").fingerprint())

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("wsync.segment.publishing.publish", fail)
        code, _, err = run_cli("push", "policies:mlp", str(path))
        assert code == 1 and err.startswith("wsync: ") and err.count("\n") == 1
        stop, told = threading.Event(), []

        def tell(what: Outcome | WsyncError) -> None:
            told.append(what)
            patch.undo()
            if len(told) == 2:
                stop.set()

        with Syncer(replace(load_spec("policies:mlp"), poll=0.01), path) as syncer:
            run(syncer, stop, tell)
    assert isinstance(told[0], WsyncError) and isinstance(told[1], Outcome) and told[1].status == "published"


def test_the_command_line_itself_may_run_out(cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Memory that ends outside of a pass is one message and exit code 1 as well."""
    ended: list[int] = []

    def exhausted(**_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("wsync.cli.commands.command_line", lambda *_: exhausted)
    monkeypatch.setattr("os._exit", ended.append)
    from wsync.cli.commands import main

    main()
    assert ended == [1] and "no memory left" in capsys.readouterr().err
