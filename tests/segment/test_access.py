"""Sharing a segment: who gets in, what they can do there, and what they cannot do to anybody else."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import marks, write
from others import GROUP, MEMBER, OWNER, STRANGER, as_person, person, run_cli
from policies import mlp
from processes import Cli

import wsync
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import SegmentBusy, SegmentUnsafe, UsageError
from wsync.layout.layout import layout_of
from wsync.segment.publishing import publish, publish_tensors
from wsync.segment.reader_records import ReaderRecord, Registration
from wsync.segment.segment import Segment, segments
from wsync.segment.segment_files import open_readers
from wsync.segment.writable import WritableSegment, remove
from wsync.settings.spec import load_spec
from wsync.system.access import Access

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
LAYOUT = layout_of(mlp())
SHARED = Access("0640", str(GROUP))
TABLE = {
    ".": 0o750,
    "control": 0o640,
    "layout.json": 0o640,
    "slot-0.safetensors": 0o640,
    "slot-1.safetensors": 0o640,
    "slot-2.safetensors": 0o640,
    "publisher.lock": 0o600,
    "readers": 0o3770,
}


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("giving files to another group or user takes root")


@pytest.fixture
def base(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a shared runtime directory can be made, reachable by others and named."""
    runtime.chmod(0o711)
    monkeypatch.setenv("WSYNC_RUNTIME_DIR", str(runtime / "shared"))
    return runtime / "shared"


@pytest.fixture
def shared(base: Path, tmp_path: Path) -> WritableSegment:
    """A segment of ours that the group may read, with version 1 in it."""
    needs_root()
    segment = WritableSegment.create("nets", LAYOUT, access=SHARED)
    push(segment, tmp_path, 1.0)
    return segment


def push(segment: WritableSegment, place: Path, mark: float) -> None:
    with segment.publishing(), Checkpoint(write(place / "weights.safetensors", mlp(), mark)) as checkpoint:
        publish(segment, checkpoint)


def modes(path: Path) -> dict[str, int]:
    return {name: stat.S_IMODE((path / name).stat().st_mode) for name in (".", *os.listdir(path))}


# --- sharing


def test_a_segment_is_private_unless_asked(base: Path) -> None:
    """Nobody else can read anything of it, whatever the umask says."""
    before = os.umask(0)
    try:
        segment = WritableSegment.create("nets", LAYOUT)
    finally:
        os.umask(before)
    found = modes(segment.path) | {"base": stat.S_IMODE(base.stat().st_mode)}
    assert not any(mode & 0o077 for mode in found.values()), found


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_a_shared_segment_has_the_modes_of_the_table(base: Path, umask: int) -> None:
    """Group and modes are those that the docstring of ``access`` tells, the lock's too; the umask changes none."""
    needs_root()
    before = os.umask(umask)
    try:
        segment = WritableSegment.create("nets", LAYOUT, access=SHARED)
    finally:
        os.umask(before)
    assert modes(segment.path) == TABLE
    assert (stat.S_IMODE(base.stat().st_mode), base.stat().st_gid) == (0o750, GROUP)
    assert {(segment.path / name).stat().st_gid for name in TABLE if name != "publisher.lock"} == {GROUP}


@pytest.mark.parametrize(
    ("access", "bits"),
    [
        (Access(), 0o600),
        (Access("0600"), 0o600),
        (Access("640"), 0o640),
        (Access("0644"), 0o644),
        (Access(None, "0"), 0o640),
    ],
)
def test_directories_are_searchable_where_they_are_readable(access: Access, bits: int) -> None:
    """A group alone means that it may read; nobody is ever given a file to write."""
    assert access.bits == bits
    assert access.directory_bits == bits + 0o100 + (bits & 0o040) // 4 + (bits & 0o004) // 4
    assert not (access.bits | access.directory_bits) & 0o022
    assert bool(access.readers_bits & 0o022) == bool(access.readers_bits & stat.S_ISVTX) == (bits != 0o600)


@pytest.mark.parametrize("mode", ["0660", "0666", "0646", "0750", "4640", "0240", "rw", "", "0o640", "٠٦٤٠", "-640"])
def test_a_mode_that_lets_others_write_is_refused(mode: str) -> None:
    """So is what is no mode; the message lists those that there are."""
    with pytest.raises(UsageError, match="0640"):
        Access(mode)


@pytest.mark.parametrize("group", ["", "no such group", "-1", "4294967295", "99999999999", "a\0b"])
def test_a_group_that_is_none_is_refused(group: str) -> None:
    """Neither a name that nobody has, nor a number that means something else to chown."""
    with pytest.raises(UsageError, match="group"):
        Access(None, group)


@pytest.mark.parametrize("how", ["options", "variables", "toml"])
def test_push_shares_as_it_is_told(base: Path, cli: Cli, tmp_path: Path, monkeypatch: Any, how: str) -> None:
    """Options, variables and the TOML mean the same, and wrong ones are usage errors that make nothing."""
    needs_root()
    write(tmp_path / "a.safetensors", mlp(), 1.0)
    (tmp_path / "nets.toml").write_text(
        'policy = "policies:mlp"\ncheckpoints = "a.safetensors"\n'
        + (f'mode = "0640"\ngroup = {GROUP}\n' if how == "toml" else "")
    )
    given = ["--mode", "0640", "--group", str(GROUP)] if how == "options" else []
    if how == "variables":
        monkeypatch.setenv("WSYNC_MODE", "0640")
        monkeypatch.setenv("WSYNC_GROUP", str(GROUP))
    wrong = cli("push", "nets.toml", "--mode", "0660", cwd=tmp_path)
    assert (wrong.returncode, base.exists()) == (2, False) and "0660" in wrong.stderr
    done = cli("push", "nets.toml", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert modes(base / "nets") == TABLE


def test_toml_values_of_other_kinds_are_refused(tmp_path: Path) -> None:
    """A mode that TOML reads as a number is asked for as text, since 640 and 0o640 are not the same."""
    (tmp_path / "nets.toml").write_text('policy = "policies:mlp"\nmode = 640\n')
    with pytest.raises(UsageError, match="mode"):
        load_spec(str(tmp_path / "nets.toml"))


def test_a_standing_segment_is_opened_and_closed(base: Path) -> None:
    """The same segment gets the access that is asked for later, and keeps what it has where nothing is asked for."""
    needs_root()
    updater = wsync.SharedMemoryWeightUpdater("nets", policy=mlp())
    WritableSegment.create("other", LAYOUT, access=SHARED)
    first = updater.make_segment()
    assert modes(first.path)["."] == 0o700
    for access, expected in ((SHARED, 0o750), (Access(), 0o750), (Access("0600"), 0o700)):
        updater.access = access
        assert updater.make_segment() is first
        assert modes(first.path)["."] == expected
    assert not any(mode & 0o077 for mode in modes(first.path).values())


def test_a_standing_runtime_directory_is_never_opened_by_us(base: Path) -> None:
    """Sharing in a private one is refused with the command that opens it, which then is enough."""
    needs_root()
    private = WritableSegment.create("private", LAYOUT)
    for share in (lambda: WritableSegment.create("nets", LAYOUT, access=SHARED), lambda: private.share(SHARED)):
        with pytest.raises(UsageError, match="chgrp") as caught:
            share()
    assert modes(base) == {".": 0o700, "private": 0o700}
    command = str(caught.value).split("`")[1]
    assert os.system(command) == 0
    WritableSegment.create("nets", LAYOUT, access=SHARED)
    assert modes(base) == {".": 0o750, "private": 0o700, "nets": 0o750}


@pytest.mark.parametrize("standing", [True, False])
def test_a_group_of_others_is_refused(runtime: Path, monkeypatch: pytest.MonkeyPatch, standing: bool) -> None:
    """Who is not in a group cannot share with it, is told so, and leaves nothing half made."""
    place = runtime / "place"
    runtime.chmod(0o777)

    def make() -> None:
        if standing:
            place.mkdir()
            place.chmod(0o755)
        with pytest.raises(UsageError, match="not in group"):
            WritableSegment.create("nets", LAYOUT, place, access=SHARED)

    as_person(OWNER, make, group=None)
    assert os.listdir(place if standing else runtime) == []


# --- a member of the group


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_member_follows_and_is_listed(shared: WritableSegment, tmp_path: Path, mode: Any) -> None:
    """Another user of the group attaches by naming the place, gets each version whole, and is seen to."""
    policy = mlp()
    held: list[wsync.Reader] = []

    def attach() -> None:
        held.append(wsync.attach(policy, "nets", timeout=10, mode=mode, runtime_dir=shared.path.parent))

    def refresh() -> tuple[bool, set[float]]:
        return held[0].refresh(), marks(policy)

    with person(MEMBER, attach, refresh, refresh, lambda: held[0].close()) as step:
        step()
        (record,) = shared.readers()
        assert (record.version, record.mode) == (1, mode)
        (file,) = (shared.path / "readers").iterdir()
        assert (file.stat().st_uid, stat.S_IMODE(file.stat().st_mode)) == (MEMBER, 0o640)
        assert step() == (False, {1.0})
        push(shared, tmp_path, 2.0)
        assert step() == (True, {2.0})
        assert [r.version for r in shared.readers()] == [2]
        step()
        assert shared.readers() == [] and os.listdir(shared.path / "readers") == []


def test_a_member_has_the_extras(shared: WritableSegment) -> None:
    """The file beside a slot is for those who may read the slot, and for nobody else."""
    with shared.publishing():
        publish_tensors(shared, mlp().state_dict(), extras={"bounds.json": b"[1]"})

    def read() -> dict[str, bytes]:
        with wsync.lease("nets", runtime_dir=shared.path.parent) as held:
            return dict(held.extras)

    assert as_person(MEMBER, read) == {"bounds.json": b"[1]"}
    (file,) = shared.path.glob("*.extras")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640 and file.stat().st_gid == GROUP


def test_an_owner_who_is_not_root_sees_its_readers(base: Path, tmp_path: Path) -> None:
    """Records belong to the shared group, so that a publisher of the group reads them, and removes dead ones."""
    needs_root()
    base.parent.chmod(0o777)
    tmp_path.chmod(0o777)
    opened: list[WritableSegment] = []

    def make() -> None:
        opened.append(WritableSegment.create("nets", LAYOUT, base, access=SHARED))

    def look() -> tuple[list[int], int]:
        return [r.pid for r in opened[0].readers()], len(os.listdir(opened[0].path / "readers"))

    with person(OWNER, make, look, look) as owner:
        owner()
        kept: list[Registration] = []

        def register() -> int:
            kept.append(Registration(base / "nets", "swap"))
            return os.getpid()

        with person(MEMBER, register) as member:
            pid = member()
            assert owner() == ([pid], 1)
        assert owner() == ([], 0)


def test_a_member_writes_nothing(shared: WritableSegment) -> None:
    """Neither weights nor control nor layout nor lock can be written, removed or replaced, by a mapping neither."""
    theirs = Registration(shared.path, "swap")
    (record,) = os.listdir(shared.path / "readers")

    def attempt() -> None:
        for name in TABLE:
            with pytest.raises((PermissionError, IsADirectoryError)):
                os.open(shared.path / name, os.O_RDWR)
        with pytest.raises(PermissionError):
            os.open(shared.path / "publisher.lock", os.O_RDONLY)
        changes: tuple[Callable[[], object], ...] = (
            lambda: os.unlink(shared.path / "control"),
            lambda: os.rename(shared.path / "readers", shared.path / "gone"),
            lambda: os.unlink(shared.path / "readers" / record),
            lambda: os.open(shared.path / "readers" / record, os.O_WRONLY),
            lambda: os.mkdir(shared.path / "more"),
            lambda: os.mkdir(shared.path.parent / "more"),
            lambda: os.rename(shared.path, shared.path.with_name("gone")),
            lambda: os.truncate(shared.path / "slot-0.safetensors", 0),
        )
        for change in changes:
            with pytest.raises(PermissionError):
                change()
        opened = Segment.open("nets", shared.path.parent)
        mapped = opened.map_slot(0)
        before = (shared.path / "slot-0.safetensors").read_bytes()
        mapped[-1] ^= 0xFF  # hits a page of its own
        assert (shared.path / "slot-0.safetensors").read_bytes() == before
        with pytest.raises(TypeError):
            opened.control.words[8] = 1

    as_person(MEMBER, attempt)
    assert shared.version == 1 and len(shared.readers()) == 1
    theirs.close()


def test_a_member_makes_and_removes_no_segment(shared: WritableSegment) -> None:
    """Publishing, making, sharing and removing are the owner's; the message says whose place it is."""
    place = shared.path.parent
    uses: tuple[Callable[[], object], ...] = (
        lambda: WritableSegment.open("nets", place),
        lambda: WritableSegment.create("nets", LAYOUT, place),
        lambda: WritableSegment.create("more", LAYOUT, place),
        lambda: wsync.attach(mlp(), "more", timeout=1, runtime_dir=place),
        lambda: remove("nets", place),
    )

    def attempt() -> None:
        for use in uses:
            with pytest.raises(SegmentUnsafe, match="belongs to uid 0"):
                use()

    as_person(MEMBER, attempt)
    assert segments(place) == ["nets"] and shared.is_current()


def test_a_member_sees_the_status(shared: WritableSegment) -> None:
    """``wsync status`` of a named place works for a member, by name and without, and passes over private segments."""
    WritableSegment.create("private", LAYOUT)
    place = str(shared.path.parent)
    with person(
        MEMBER,
        lambda: run_cli("status", "--runtime-dir", place, "--json"),
        lambda: run_cli("status", "nets", "--runtime-dir", place),
        lambda: run_cli("status", "private", "--runtime-dir", place),
    ) as step:
        code, out, err = step()
        assert (code, [s["name"] for s in json.loads(out)["segments"]], err) == (0, ["nets"], "")
        code, out, err = step()
        assert code == 0 and "nets  version 1" in out and "no readers" in out
        code, out, err = step()
        assert code == 1 and "--group" in err


def test_a_stranger_gets_nowhere(shared: WritableSegment) -> None:
    """Who is not in the group is told whom to ask."""
    place = shared.path.parent
    uses: tuple[Callable[[], object], ...] = (
        lambda: Segment.open("nets", place),
        lambda: segments(place),
        lambda: wsync.attach(mlp(), "nets", timeout=1, runtime_dir=place),
    )

    def attempt() -> None:
        for use in uses:
            with pytest.raises(SegmentUnsafe, match="may not be opened"):
                use()

    as_person(STRANGER, attempt, group=None)


@pytest.fixture
def squatted(shared: WritableSegment) -> Iterator[Path]:
    """The member's own default place, taken by somebody else, with a fine segment in it."""
    place = Path(f"/dev/shm/wsync-{MEMBER}")
    try:
        WritableSegment.create("nets", LAYOUT, place, access=SHARED)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def test_ones_own_default_place_is_believed_only_where_it_is_ones_own(squatted: Path) -> None:
    """Anybody may make a directory in /dev/shm: another's at our default path is refused, named or not."""

    def attempt() -> None:
        os.environ.pop("WSYNC_RUNTIME_DIR")
        for place in (None, squatted):
            for use in (lambda p=place: Segment.open("nets", p), lambda p=place: segments(p)):
                with pytest.raises(SegmentUnsafe, match="own segments"):
                    use()

    as_person(MEMBER, attempt)


@pytest.mark.parametrize("path", ["", "nets", "nets/control", "nets/layout.json", "nets/slot-0.safetensors"])
def test_what_more_than_its_owner_may_write_is_not_read(shared: WritableSegment, path: str) -> None:
    """A place, segment or file that a group may write is refused: it could say anything."""
    target = shared.path.parent / path
    target.chmod(stat.S_IMODE(target.stat().st_mode) | 0o020)

    def attempt() -> None:
        with pytest.raises(SegmentUnsafe, match="nobody else may write"):
            Segment.open("nets", shared.path.parent).live()

    as_person(MEMBER, attempt)


@pytest.mark.parametrize(
    "path", ["nets", "nets/control", "nets/layout.json", "nets/slot-0.safetensors", "nets/readers"]
)
def test_what_belongs_to_a_third_is_not_read(shared: WritableSegment, path: str) -> None:
    """All of a segment is of the place's owner; what somebody else put there is refused."""
    os.chown(shared.path.parent / path, STRANGER, GROUP)

    def attempt() -> None:
        with pytest.raises(SegmentUnsafe, match="of uid 0"):
            Segment.open("nets", shared.path.parent).live()

    as_person(MEMBER, attempt)


# --- records of others


def record(**changed: Any) -> bytes:
    fine = {"pid": 7, "process": "x", "version": 1, "since": 1.0, "mode": "copy", "slots": [0]}
    return json.dumps({**fine, **changed}).encode()


def hostile(directory: int) -> list[int]:
    """What a bad member of the group puts among the records, its files held so that they look alive."""
    os.mkfifo("fifo", dir_fd=directory)
    os.symlink("/etc/passwd", "link", dir_fd=directory)
    os.symlink("../publisher.lock", "lock", dir_fd=directory)
    os.mkdir("directory", dir_fd=directory)
    os.chdir(directory)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    texts = [
        b"",
        b"?" * 1024,
        b"[" * 1024,
        b"[]",
        b"{}",
        b"1e999",
        record(pid="1"),
        record(pid=True),
        record(pid=-1),
        record(pid=1 << 80),
        record(version=1 << 56),
        record(version=0.5),
        record(since="1"),
        record(since=float("nan")),
        record(since=1e300),
        record(since=10**400),
        record(mode="[red]"),
        record(mode=[]),
        record(slots=5),
        record(slots=[64]),
        record(slots=[[]]),
        record(slots={"a": 1}),
        record(process=5),
        record(process=None),
    ]
    held = []
    for number, text in enumerate(texts):
        fd = os.open(f"{number}", os.O_RDWR | os.O_CREAT, 0o644, dir_fd=directory)
        held.append(fd)
        os.write(fd, text)
        os.set_inheritable(fd, False)
    os.ftruncate(held[1], 1 << 40)
    for fd in held:
        fcntl.flock(fd, fcntl.LOCK_EX)
    closed = os.open("closed", os.O_RDWR | os.O_CREAT, 0, dir_fd=directory)
    fcntl.flock(closed, fcntl.LOCK_EX)
    return [*held, closed]


@pytest.mark.parametrize("many", [0, 3000])
def test_hostile_records_stop_nobody(shared: WritableSegment, tmp_path: Path, many: int) -> None:
    """FIFOs, links, sockets, directories, broken and endless files among the records fail neither side."""
    held: list[int] = []

    def attack() -> None:
        directory = open_readers(shared.path)
        held.extend(hostile(directory))
        for number in range(many):
            os.close(os.open(f"dead{number}", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=directory))

    place = str(shared.path.parent)
    with person(MEMBER, attack) as member:
        member()
        good = Registration(shared.path, "swap")
        push(shared, tmp_path, 2.0)
        for _ in range(3):  # what one look leaves out of too many, the next takes
            code, out, err = run_cli("status", "nets", "--runtime-dir", place, "--json")
            assert code == 0, err
        assert [r["pid"] for r in json.loads(out)["readers"]] == [os.getpid()]
        assert as_person(STRANGER, lambda: [r.pid for r in Segment.open("nets", place).readers()]) == [os.getpid()]
        good.close()
    remove("nets")
    assert os.listdir(shared.path.parent) == []


def test_a_record_that_others_lock_at_once_holds_no_reader_up(
    shared: WritableSegment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever grabs each new record's lock first keeps a reader off the list, and not from reading."""
    fchmod, grabbed = os.fchmod, []

    def grab(fd: int, mode: int) -> None:
        fchmod(fd, mode)
        grabbed.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))
        fcntl.flock(grabbed[-1], fcntl.LOCK_EX)

    monkeypatch.setattr(os, "fchmod", grab)
    with wsync.attach(mlp(), "nets", timeout=10) as reader:
        assert reader.version == 1 and "is not in the list" in caplog.text
    for fd in grabbed:
        os.close(fd)


def test_a_look_is_bounded(shared: WritableSegment) -> None:
    """However many records there are, a look opens a bounded number of them."""
    for number in range(2500):
        (shared.path / "readers" / f"{number}").touch()
    assert shared.readers() == []
    assert len(os.listdir(shared.path / "readers")) == 500


def test_a_file_with_another_name_is_no_record(shared: WritableSegment) -> None:
    """What is linked into the records is neither locked against its users nor removed."""
    os.link(shared.path / "slot-1.safetensors", shared.path / "readers" / "1-1")
    assert shared.readers() == [] and os.listdir(shared.path / "readers") == ["1-1"]


def test_names_of_others_are_harmless_to_print(shared: WritableSegment, cli: Cli, tmp_path: Path) -> None:
    """Neither markup nor an escape sequence in a process's name means anything in a table or a message."""
    evil = "[red]x[/]\x1b]0;owned\x07\u202e\n"
    registrations = [Registration(shared.path, "swap") for _ in range(2)]
    leases = []
    for number, registration in enumerate(registrations):
        registration._record = registration._record._replace(process=evil)
        leases.append(shared.lease())
        registration.update(1, (number,))
        push(shared, tmp_path, 2.0)
    out = cli("status", "nets").stdout
    assert r"[red]x[/]\x1b]0;owned\x07\u202e" in out and not {"\x1b", "\x07", "\u202e"} & set(out)
    shared.control.bound = 3
    with pytest.raises(SegmentBusy) as caught:
        push(shared, tmp_path, 3.0)
    assert r"[red]x[/]\x1b" in str(caught.value) and str(caught.value).isprintable()
    assert all(r.process.isprintable() for r in shared.readers())
    for registration in registrations:
        registration.close()


def test_a_record_is_what_a_reader_writes() -> None:
    """A record that is whole is taken as it is."""
    assert ReaderRecord.parse(record()) == ReaderRecord(7, "x", 1, 1.0, "copy", (0,))
