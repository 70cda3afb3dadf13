"""What somebody prepared at our paths, and files that say what cannot be: refused by name, without a hang or crash."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import write
from others import STRANGER, forked
from policies import mlp
from processes import Cli

import wsync
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import AttachTimeout, SegmentDamaged, SegmentError, SegmentUnsafe, UsageError, WsyncError
from wsync.layout.layout import layout_of
from wsync.segment.publication import METADATA_END, Publication
from wsync.segment.publishing import publish
from wsync.segment.segment import Segment, segments
from wsync.segment.segment_files import MAX_TABLE, NO_SLOT, WORD_OFFSET
from wsync.segment.writable import WritableSegment, remove
from wsync.system.memory import PAGE

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")]
LAYOUT = layout_of(mlp())
PATHS = {
    "base": "",
    "segment": "nets",
    "control": "nets/control",
    "layout": "nets/layout.json",
    "lock": "nets/publisher.lock",
    "slot": "nets/slot-0.safetensors",
    "readers": "nets/readers",
}
FILES = ("control", "layout", "lock", "slot")


def link(path: Path) -> None:
    os.rename(path, path.parent / "elsewhere")
    path.symlink_to("elsewhere")


def dangling(path: Path) -> None:
    clear(path)
    path.symlink_to("nowhere")


def clear(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def fifo(path: Path) -> None:
    clear(path)
    os.mkfifo(path)


def listening(path: Path) -> None:
    clear(path)
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(here)


def other_kind(path: Path) -> None:
    was_directory = path.is_dir()
    clear(path)
    if was_directory:
        path.write_bytes(bytes(1 << 14))
    else:
        path.mkdir(mode=0o700)


def foreign(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving files to another user takes root")
    os.chown(path, STRANGER, STRANGER)


def open_to_all(path: Path) -> None:
    path.chmod(0o777)


KINDS: dict[str, Callable[[Path], None]] = {
    kind.__name__: kind for kind in (link, dangling, fifo, listening, other_kind, foreign, open_to_all)
}


@pytest.fixture
def base(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A named runtime directory with a segment in it, version 1 live in slot 0."""
    monkeypatch.setenv("WSYNC_RUNTIME_DIR", str(runtime / "base"))
    segment = WritableSegment.create("nets", LAYOUT)
    push(segment, runtime)
    yield runtime / "base"


def push(segment: WritableSegment, place: Path) -> Publication:
    with segment.publishing(), Checkpoint(write(place / "weights.safetensors", mlp(), 1.0)) as checkpoint:
        return publish(segment, checkpoint)


def use_all() -> list[WsyncError]:
    """Everything that opens a segment; what each refuses."""
    place = Path(os.environ["WSYNC_RUNTIME_DIR"]).parent
    uses: tuple[Callable[[], object], ...] = (
        lambda: Segment.open("nets").live(),
        lambda: Segment.open("nets").lease(),
        lambda: push(WritableSegment.create("nets", LAYOUT), place),
        lambda: push(WritableSegment.create("nets", LAYOUT), place),
        lambda: wsync.attach(mlp(), "nets", timeout=0.1).close(),
        segments,
    )
    refused = []
    for use in uses:
        try:
            use()
        except WsyncError as exc:
            refused.append(exc)
    return refused


@pytest.mark.parametrize("where", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_prepared_at_a_path_is_refused(base: Path, where: str, kind: str) -> None:
    """Whatever stands where something of ours was, is refused by a WsyncError that names it and says what to do."""
    path = base / PATHS[where]
    KINDS[kind](path)
    refused = use_all()
    assert refused and all(isinstance(exc, SegmentError) for exc in refused), refused
    assert any(path.name in str(exc) for exc in refused), refused
    assert all("emove" in str(exc) or "--runtime-dir" in str(exc) for exc in refused), refused
    if kind == "link":
        assert (path.parent / "elsewhere").exists()


@pytest.mark.parametrize("where", PATHS)
@pytest.mark.parametrize("kind", ["link", "fifo", "other_kind"])
def test_the_command_line_refuses_it_too(base: Path, cli: Cli, tmp_path: Path, where: str, kind: str) -> None:
    """status and push end with one message, exit code 1 and no traceback; what is named in rm, rm removes."""
    KINDS[kind](base / PATHS[where])
    checkpoint = write(tmp_path / "a.safetensors", mlp(), 2.0)
    for command in (["status", "nets"], ["push", "policies:mlp", str(checkpoint), "--name", "nets"]):
        done = cli(*command)
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
        assert done.returncode == 1 or where in ("lock", "slot"), done.stdout
    removed = cli("rm", "nets")
    assert "Traceback" not in removed.stderr
    if where not in ("base", "segment"):
        assert removed.returncode == 0 and not (base / "nets").exists(), removed.stderr
    else:
        assert removed.returncode == 1


@pytest.mark.parametrize("where", FILES)
def test_a_missing_file_is_named(base: Path, where: str) -> None:
    """Half a segment is told from one that is being removed; `wsync rm` removes it, and a publish makes it anew."""
    (base / PATHS[where]).unlink()
    if where != "lock":  # which is for publishers
        with pytest.raises(SegmentDamaged, match=f"(?s){Path(PATHS[where]).name}.*wsync rm nets"):
            Segment.open("nets").lease()
    assert use_all() == [] or where != "lock"
    assert Segment.open("nets").version == 2
    (base / PATHS[where]).unlink()
    remove("nets")
    assert os.listdir(base) == []


def test_a_missing_registry_is_named(base: Path) -> None:
    """So is a segment without the directory of its readers."""
    (base / "nets/readers").rmdir()
    with pytest.raises(SegmentUnsafe, match="readers"):
        Segment.open("nets")


@pytest.mark.parametrize("where", ["", "nets"])
def test_a_path_with_something_else_in_it_is_never_removed(base: Path, runtime: Path, where: str) -> None:
    """`wsync rm` follows no link to what is not ours."""
    path = base / where
    link(path)
    with pytest.raises(SegmentUnsafe):
        remove("nets")
    assert len(list((path.parent / "elsewhere").rglob("*"))) >= 6


@pytest.mark.parametrize("name", ["a\0b", "x/\0"])
def test_a_runtime_directory_that_is_no_path_is_refused(name: str) -> None:
    """A path that the system cannot take is a usage error."""
    with pytest.raises(UsageError, match="path"):
        Segment.open("nets", name)


@pytest.mark.parametrize("length", [300, 5000])
def test_a_runtime_directory_that_is_too_long_is_refused(runtime: Path, length: int) -> None:
    """So is one whose name is longer than the system takes, for making as for opening."""
    place = runtime / ("x" * length)
    uses: tuple[Callable[[], object], ...]
    uses = (lambda: Segment.open("nets", place), lambda: WritableSegment.create("nets", LAYOUT, place))
    for use in uses:
        with pytest.raises(SegmentUnsafe, match="--runtime-dir"):
            use()


# --- files that say what cannot be


def about(base: Path, **changed: Any) -> bytes:
    return json.dumps({**json.loads((base / "nets/layout.json").read_text()), **changed}).encode()


ABOUT: dict[str, Any] = {
    "slots text": {"slots": "3"},
    "slots true": {"slots": True},
    "one slot": {"slots": 1},
    "many slots": {"slots": 1 << 40},
    "no slots": {"slots": None},
    "offset far": {"data_offset": 1 << 50},
    "offset negative": {"data_offset": -PAGE},
    "offset odd": {"data_offset": METADATA_END + 1},
    "offset small": {"data_offset": 0},
    "offset float": {"data_offset": 3.0 * PAGE},
    "spec": {"spec": 5},
    "layout list": {"layout": []},
    "layout none": {"layout": None},
    "no tensors": {"layout": {"tensors": []}},
    "row short": {"layout": {"tensors": [["a"]]}},
    "row number": {"layout": {"tensors": [5]}},
    "name": {"layout": {"tensors": [[5, "F32", [1], []]]}},
    "name list": {"layout": {"tensors": [[["a"], "F32", [1], []]]}},
    "alias": {"layout": {"tensors": [["a", "F32", [1], [5]]]}},
    "dtype": {"layout": {"tensors": [["a", "F99", [1], []]]}},
    "dtype list": {"layout": {"tensors": [["a", [], [1], []]]}},
    "shape negative": {"layout": {"tensors": [["a", "F32", [-1], []], ["b", "F32", [9], []]]}},
    "shape huge": {"layout": {"tensors": [["a", "F32", [1 << 62, 1 << 62], []]]}},
    "shape text": {"layout": {"tensors": [["a", "F32", "11", []]]}},
    "shape float": {"layout": {"tensors": [["a", "F32", [1.5], []]]}},
    "larger": {"layout": {"tensors": [["a", "F32", [1 << 30], []]]}},
    "offset larger": {"data_offset": 1 << 16},
}


@pytest.mark.parametrize("what", ABOUT)
def test_a_layout_that_cannot_be_is_refused(base: Path, cli: Cli, what: str) -> None:
    """Every number and text of layout.json is checked before anything is mapped by it, and rm still works."""
    (base / "nets/layout.json").write_bytes(about(base, **ABOUT[what]))

    def use() -> None:
        segment = Segment.open("nets")
        segment.map_slot(0)

    with pytest.raises(SegmentUnsafe, match="wsync rm"):
        use()
    with pytest.raises(SegmentError):
        wsync.attach(mlp(), "nets", timeout=0.1)
    remove("nets")


@pytest.mark.parametrize(
    "text", [b"[" * 200_000, b'{"slots":' * 100_000, b'{"slots": 1' + b"0" * 5000 + b"}", b"\xff\xfe", b"null", b"NaN"]
)
def test_a_layout_that_is_no_json_is_refused(base: Path, text: bytes) -> None:
    """Deep nesting, endless numbers and what is no text end in the same message."""
    (base / "nets/layout.json").write_bytes(text)
    with pytest.raises(SegmentUnsafe, match="wsync rm nets"):
        Segment.open("nets")


def test_an_endless_layout_is_not_read(base: Path) -> None:
    """A layout.json beyond the bound is refused by its size; it would not fit into memory."""
    os.truncate(base / "nets/layout.json", 1 << 50)
    with pytest.raises(SegmentUnsafe, match=f"{MAX_TABLE:,}"):
        Segment.open("nets")


@pytest.mark.parametrize("slot", [3, 64, 200, NO_SLOT - 1])
def test_a_word_beyond_the_slots_is_refused(base: Path, slot: int) -> None:
    """A WORD that names a slot that the segment does not have is an error, not an endless wait."""
    with open(base / "nets/control", "r+b") as file:
        file.seek(WORD_OFFSET)
        file.write((7 << 8 | slot).to_bytes(8, "little"))
    segment = Segment.open("nets")
    uses: tuple[Callable[[], object], ...]
    uses = (segment.live, segment.lease, lambda: wsync.attach(mlp(), "nets", timeout=0.1))
    for use in uses:
        with pytest.raises(SegmentUnsafe, match=f"slot.{slot}"):
            use()


@pytest.mark.parametrize("size", [0, 1, METADATA_END, 3 * PAGE - 1, 3 * PAGE, 1 << 20])
@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_slot_of_another_size_never_ends_a_process(base: Path, size: int, mode: Any) -> None:
    """A slot that ends before its weights do is refused where its first byte would have been a SIGBUS."""
    os.truncate(base / "nets/slot-0.safetensors", size)

    def work() -> None:
        with pytest.raises(AttachTimeout):  # it waits for a publisher
            wsync.attach(mlp(), "nets", timeout=0.1, mode=mode)

    with forked(lambda: None, work) as step:
        step()


@pytest.mark.parametrize("size", [0, METADATA_END, 1 << 20])
def test_a_spare_slot_of_another_size_is_not_published_into(base: Path, runtime: Path, size: int) -> None:
    """A publisher refuses it before it writes, and what is live stays."""
    os.truncate(base / "nets/slot-1.safetensors", size)
    segment = WritableSegment.open("nets")
    with pytest.raises(SegmentUnsafe, match="slot-1"):
        push(segment, runtime)
    live = segment.live()
    assert live and live.version == 1
    assert os.stat(base / "nets/slot-1.safetensors").st_size == size


def metadata(**changed: Any) -> bytes:
    table = {
        **Publication(version=1, step=2, checkpoint="a", identity="b", published_at=3.0, spec="c").to_metadata(),
        **changed,
    }
    return bytes(8) + (b'{"__metadata__":' + json.dumps(table).encode()).ljust(METADATA_END - 8)


@pytest.mark.parametrize(
    "head",
    [
        bytes(METADATA_END),
        b"\xff" * METADATA_END,
        bytes(8) + b"[" * (METADATA_END - 8),
        bytes(8) + b'{"__metadata__":[]'.ljust(METADATA_END - 8),
        metadata(version="x"),
        metadata(version="-1"),
        metadata(version=str(1 << 56)),
        metadata(version=None),
        metadata(step="1.5"),
        metadata(step=[1]),
        metadata(published_at="inf"),
        metadata(published_at="nan"),
        metadata(published_at="1e300"),
        metadata(published_at="-1"),
        metadata(source=5),
        metadata(identity=[]),
        metadata(spec=None),
    ],
)
def test_a_header_that_says_nothing_is_refused(base: Path, cli: Cli, head: bytes) -> None:
    """What the header of a live slot says is checked before it is shown or compared."""
    with open(base / "nets/slot-0.safetensors", "r+b") as file:
        file.write(head)
    segment = Segment.open("nets")
    uses: tuple[Callable[[], object], ...] = (segment.live, lambda: wsync.attach(mlp(), "nets", timeout=0.1))
    for use in uses:
        with pytest.raises(SegmentUnsafe, match="wsync rm"):
            use()


def test_a_source_is_harmless_to_print(base: Path, cli: Cli) -> None:
    """The name of a checkpoint may hold anything; the table of status shows it without obeying it."""
    with open(base / "nets/slot-0.safetensors", "r+b") as file:
        file.write(metadata(source="/x/[red]\x1b[31m\u202e.safetensors"))
    out = cli("status", "nets").stdout
    assert r"[red]\x1b[31m\u202e.safetensors" in out and "\x1b" not in out


def test_a_broken_segment_hides_no_other(base: Path, cli: Cli) -> None:
    """status tells of each segment that cannot be read, exits with 1, and shows the rest."""
    for name in ("layout", "header", "word", "fine"):
        WritableSegment.create(name, LAYOUT)
    (base / "layout/layout.json").write_bytes(about(base, layout={"tensors": 5}))
    for name, word in (("header", 1 << 8), ("word", 1 << 8 | 9)):
        with open(base / name / "control", "r+b") as file:
            file.seek(WORD_OFFSET)
            file.write(word.to_bytes(8, "little"))
    for options in ([], ["--json"]):
        done = cli("status", *options)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert "fine" in done.stdout and "nets" in done.stdout
        assert all(f"{name!r}" in done.stderr or name in done.stderr for name in ("layout", "header", "word"))
    assert [s["name"] for s in json.loads(done.stdout)["segments"]] == ["fine", "nets"]
