"""Files that travel with the weights, in one version with them and under the same checks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import mark_of, marks, shards, write
from object_stores import Bucket
from policies import mlp
from processes import DEADLINE, Cli, Lines, Spawn
from safetensors.torch import save, save_file

import wsync
from wsync.checkpoints.files import settling
from wsync.checkpoints.files.extras import ExtraFiles
from wsync.errors import SegmentDamaged, SpecError, UsageError
from wsync.history.rollback import pin_checkpoint, rollback
from wsync.history.state import State
from wsync.layout.layout import layout_of
from wsync.segment.publishing import Staged
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import Spec, load_spec
from wsync.sync.outcome import Outcome
from wsync.sync.promoting import promote
from wsync.sync.syncer import Syncer
from wsync.system.access import Access

TOML = """policy = "policies:mlp"
name = "nets"
checkpoints = "runs"
keep = 2
[select]
settle = 0.0
[extras]
files = ["*norm*.safetensors", "preprocessor.json"]
"""
Push = Callable[..., Outcome]


@pytest.fixture
def push(runs: Path, layouts_here: None) -> Iterator[Push]:
    """Makes a pass for the spec with these changes, and remembers it as ``wsync push`` does."""
    Path("nets.toml").write_text(TOML)
    WritableSegment.create("nets", layout_of(mlp()), spec=load_spec("nets.toml").fingerprint()).close()

    def once(place: str | None = None, **changes: object) -> Outcome:
        spec = load_spec("nets.toml")
        select = {name: changes.pop(name) for name in list(changes) if name in ("settle", "digest", "order", "extras")}
        spec = replace(spec, select=replace(spec.select, **select), **changes)  # type: ignore[arg-type]
        with Syncer(spec, place, state=State("nets")) as syncer:
            return syncer.once()

    yield once


def save_extras(directory: Path, mark: float) -> None:
    save_file({"mean": torch.full((2,), float(mark))}, directory / "obs_norm.safetensors")
    (directory / "preprocessor.json").write_text(json.dumps({"mark": mark}))


def saved(directory: Path, mark: float) -> Path:
    """A checkpoint with its extras, all of one mark."""
    write(directory / "model.safetensors", mlp(), mark, int(mark))
    save_extras(directory, mark)
    return directory


def live() -> tuple[set[float], float | None]:
    """The mark of the live weights, and that of the extras in the same version."""
    with closing(Segment.open("nets")) as segment, wsync.lease("nets") as held:
        extras = held.extras.get("preprocessor.json")
        return mark_of(segment), json.loads(extras)["mark"] if extras else None


def test_extras_come_with_their_version(push: Push, runs: Path) -> None:
    """Guards what a reader, a lease and on_version find: bytes by their names, and the checkpoint's own metadata."""
    saved(runs / "1", 1)
    assert push().status == "published"
    told, policy = [], mlp()
    with wsync.attach(policy, "nets", on_version=lambda version, step, extras: told.append(dict(extras))) as reader:
        assert sorted(reader.extras) == ["obs_norm.safetensors", "preprocessor.json"]
        assert reader.extras["preprocessor.json"] == b'{"mark": 1}' and reader.metadata == {"step": "1"}
        assert reader.extras["obs_norm.safetensors"] == save({"mean": torch.full((2,), 1.0)})
        saved(runs / "2", 2)
        push()
        assert reader.extras["preprocessor.json"] == b'{"mark": 1}', "an extra changed before its version was taken"
        assert reader.refresh() and json.loads(reader.extras["preprocessor.json"]) == {"mark": 2}
        assert [json.loads(each["preprocessor.json"])["mark"] for each in told] == [1, 2]
    with wsync.lease("nets") as held:
        assert held.metadata == {"step": "2"} and held.extras == reader.extras


def test_a_version_without_extras_has_none_of_an_earlier_one(push: Push, runs: Path) -> None:
    """Guards a slot that is used again: nothing of what lay beside it stays."""
    saved(runs / "1", 1)
    push()
    policy = mlp()
    with wsync.attach(policy, "nets") as reader, closing(WritableSegment.open("nets")) as segment:
        for _ in range(4):
            with wsync.publisher("nets", mlp()) as publisher:
                publisher.push()
            assert reader.refresh() and reader.extras == {} and reader.metadata == {}
        assert not list(segment.path.glob("*.extras"))


def test_a_checkpoint_without_its_extras_is_not_complete(push: Push, runs: Path) -> None:
    """Guards the time between two writes of one save: what is live stays, and the message names what is missing."""
    write(runs / "1" / "model.safetensors", mlp(), 1)
    outcome = push()
    assert outcome.status == "empty" and "no file matches '*norm*.safetensors' of extras.files" in str(outcome.reason)
    save_extras(runs / "1", 1)
    assert push().status == "published"
    write(runs / "2" / "model.safetensors", mlp(), 2)
    (runs / "2" / "preprocessor.json").write_text('{"mark": 2}')
    outcome = push()
    assert (outcome.status, Path(str(outcome.newer)).name, live()) == ("current", "2", ({1.0}, 1))
    save_extras(runs / "2", 2)
    assert push().status == "published" and live() == ({2.0}, 2)


def test_a_change_of_an_extra_alone_is_a_new_version(push: Push, runs: Path) -> None:
    """Guards the identity of a checkpoint: its extras are a part of it."""
    saved(runs / "1", 1)
    push()
    assert push().status == "current"
    (runs / "1" / "preprocessor.json").write_text('{"mark": 5}')
    outcome = push()
    assert (outcome.status, outcome.version, live()) == ("published", 2, ({1.0}, 5))
    assert push().status == "current"


def test_a_change_whose_times_were_restored_is_a_new_version(push: Push, runs: Path) -> None:
    """Guards an extra written over in place with its size and time kept, as ``rsync --inplace --times`` does."""
    saved(runs / "1", 1)
    push()
    extra = runs / "1" / "preprocessor.json"
    for mark, status in ((5, "published"), (5, "current"), (6, "published")):
        before = extra.stat()
        extra.write_text(json.dumps({"mark": mark}))
        os.utime(extra, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (push().status, live()) == (status, ({1.0}, mark))


@pytest.mark.parametrize("first", ["weights", "extras"])
def test_a_save_in_place_is_not_published_half(
    push: Push, runs: Path, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a trainer that writes over its last save: new weights never go live with the extras of the one before."""
    saved(runs / "latest", 1)
    push()
    monkeypatch.setattr(settling, "EXTRAS_PATIENCE", 1e6)
    place = runs / "latest"
    writes: list[Callable[[], object]]
    writes = [lambda: write(place / "model.safetensors", mlp(), 2), lambda: save_extras(place, 2)]
    one, other = writes if first == "weights" else writes[::-1]
    one()
    outcome = push(settle=0.01)
    assert outcome.status == "busy" and "files of two saves" in str(outcome.reason) and live() == ({1.0}, 1)
    other()
    assert push(settle=0.01).status == "published" and live() == ({2.0}, 2)


def test_an_extra_that_never_changes_holds_nothing_up_for_ever(push: Push, runs: Path) -> None:
    """Guards weights that are written over beside one preprocessor: they go live when all has stood still."""
    saved(runs / "latest", 1)
    push()
    write(runs / "latest" / "model.safetensors", mlp(), 2)
    deadline = time.monotonic() + DEADLINE
    while push(settle=0.02).status != "published":
        assert time.monotonic() < deadline
    assert live() == ({2.0}, 1)


@pytest.mark.parametrize("name", ["preprocessor.json", "obs_norm.safetensors"])
@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.name), lambda path: path.symlink_to("nowhere")]
)
def test_what_is_no_file_is_no_extra(push: Push, runs: Path, name: str, make: Callable[[Path], None]) -> None:
    """Guards a name that a pipe, a directory or a link to nothing has: the message says what is missing, at once."""
    saved(runs / "1", 1)
    push()
    saved(runs / "2", 2)
    (runs / "2" / name).unlink()
    make(runs / "2" / name)
    outcome = push()
    assert (outcome.status, Path(str(outcome.newer)).name, live()) == ("current", "2", ({1.0}, 1))


@pytest.mark.parametrize("sharded", [False, True])
def test_extras_beside_weights_in_any_form(push: Push, runs: Path, sharded: bool) -> None:
    """Guards the count of a checkpoint's files: with an index, the extras come after it."""
    if sharded:
        shards(runs / "1", mlp(), 1.0)
        save_extras(runs / "1", 1)
    else:
        write(runs / "policy.safetensors", mlp(), 1)
        save_extras(runs, 1)
    assert push(None if sharded else "runs/policy.safetensors").status == "published" and live() == ({1.0}, 1)


def test_files_in_one_directory_share_extras_or_have_their_own(push: Push, runs: Path) -> None:
    """Guards a flat directory: ``{stem}`` is a file's own; a shared file, however new, makes no old one newest."""
    for mark in (1, 2):
        write(runs / f"step_{mark}.safetensors", mlp(), mark)
        (runs / f"step_{mark}.json").write_text(json.dumps({"mark": mark}))
    for name, age in (("step_1", 10), ("step_2", 20)):  # the other way round than their names
        os.utime(runs / f"{name}.safetensors", (1e9 - age, 1e9 - age))
        save_file({"mean": torch.zeros(1)}, runs / f"{name}_norm.safetensors")  # newer, and no checkpoint
    (runs / "preprocessor.json").write_text('{"mark": 7}')
    extras = ExtraFiles(("{stem}.json", "preprocessor.json", "{stem}_norm.safetensors"))
    assert push(extras=extras).checkpoint == str((runs / "step_1.safetensors").absolute())
    with wsync.lease("nets") as held:
        assert held.extras.keys() == {*extras.files} and held.extras["{stem}.json"] == b'{"mark": 1}'
    again = push(extras=extras)
    assert again.status == "current", again


def test_an_extra_beside_checkpoints_is_no_checkpoint(push: Push, runs: Path) -> None:
    """Guards a flat directory whose newest file is an extra: nothing is said of it, and ``newer`` is not it."""
    save_extras(runs, 1)
    assert "Passed over" not in str(push().reason)
    write(runs / "step_1.safetensors", mlp(), 1)
    save_extras(runs, 1)
    outcome = push()
    assert (outcome.status, outcome.passed_over) == ("published", ())
    save_extras(runs, 1)
    again = push()
    assert again.newer is None and again.passed_over == ()


@pytest.mark.parametrize(
    ("name", "data"), [("preprocessor.json", b'{"mark": '), ("obs_norm.safetensors", b"\x10\0\0\0\0\0\0\0{}")]
)
def test_a_cut_extra_is_not_complete(push: Push, runs: Path, name: str, data: bytes) -> None:
    """Guards a copy that broke off: a file of a known kind tells whether it is whole."""
    saved(runs / "1", 1)
    (runs / "1" / name).write_bytes(data)
    outcome = push()
    assert outcome.status == "empty" and name in str(outcome.reason)
    save_extras(runs / "1", 1)
    assert push().status == "published"


def test_too_much_is_rejected_and_taken_once_it_is_allowed(push: Push, runs: Path) -> None:
    """Guards the bound on what travels, and that raising it looks at the same files again."""
    saved(runs / "1", 1)
    small = ExtraFiles(load_spec("nets.toml").extras.files, max_bytes=20)
    outcome = push(extras=small)
    assert outcome.status == "rejected" and "extras.max_bytes is 20" in str(outcome.reason)
    assert push().status == "published"


def test_digests_cover_extras(push: Push, runs: Path) -> None:
    """Guards ``digest``: an extra without one is not complete, and one with other bytes is rejected."""
    folder = saved(runs / "1", 1)
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    listed = [f"{digest}  {name}\n" for name, digest in sums.items()]
    (folder / "SHA256SUMS").write_text("".join(line for line in listed if "preprocessor" not in line))
    outcome = push(digest="sha256")
    assert outcome.status == "empty" and "preprocessor.json" in str(outcome.reason)
    (folder / "preprocessor.json").write_text('{"mark": 3}')
    (folder / "SHA256SUMS").write_text("".join(listed))
    outcome = push(digest="sha256")
    assert outcome.status == "rejected" and "preprocessor.json has the SHA-256" in str(outcome.reason)
    (folder / "preprocessor.json").write_text('{"mark": 1}')
    (folder / "SHA256SUMS").write_text("".join(listed))
    assert push(digest="sha256").status == "published"


@pytest.mark.parametrize("pattern", ["/etc/passwd", "../x.json", "a/../b", "*/x.json", "", "{stem}*.json"])
def test_patterns_that_name_nothing_of_a_checkpoint(runs: Path, pattern: str) -> None:
    """Guards what a spec may ask for: files below the checkpoint's directory alone."""
    Path("nets.toml").write_text(TOML.replace("preprocessor.json", pattern))
    with pytest.raises((SpecError, UsageError), match="extras"):
        load_spec("nets.toml")


def test_a_glob_takes_neither_weights_nor_hidden_files_nor_directories(push: Push, runs: Path) -> None:
    """Guards ``*``: what a checkpoint consists of is no extra of it, and a writer's temporary files are nobody's."""
    folder = saved(runs / "1", 1)
    (folder / ".preprocessor.json.tmp").write_text("half")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocabulary.txt").write_text("words")
    assert push(extras=ExtraFiles(("*", "tokenizer/*.txt"))).status == "published"
    with wsync.lease("nets") as held:
        assert sorted(held.extras) == ["obs_norm.safetensors", "preprocessor.json", "tokenizer/vocabulary.txt"]


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to give a file to another user")
def test_a_link_to_somebody_elses_file_is_no_extra(push: Push, runs: Path, tmp_path: Path) -> None:
    """Guards what a writer cannot read from going to all policies; a hub's cache links to files of its own."""
    saved(runs / "1", 1)
    elsewhere = tmp_path / "secret.json"
    (runs / "1" / "preprocessor.json").rename(elsewhere)
    (runs / "1" / "preprocessor.json").symlink_to(elsewhere)
    os.chown(runs / "1" / "model.safetensors", 4242, -1)
    outcome = push()
    assert outcome.status == "failed" and "another owner than the weights" in str(outcome.reason)
    os.chown(elsewhere, 4242, -1)
    assert push().status == "published" and live() == ({1.0}, 1)


@pytest.mark.slow
def test_gates_and_hooks_see_them(push: Push, runs: Path) -> None:
    """Guards what a command finds: a directory with the files; and a hook of Python, their bytes."""
    saved(runs / "1", 1)
    look = 'cp "$WSYNC_HOOK_EXTRAS/preprocessor.json"'
    hooks = replace(load_spec("nets.toml").hooks, gate=f"{look} gate", exec=f"{look} exec")
    assert push(hooks=hooks).status == "published"
    assert Path("gate").read_text() == Path("exec").read_text() == '{"mark": 1}'
    Path("gates.py").write_text("def check(policy, extras):\n    return b'2' in extras['preprocessor.json']\n")
    saved(runs / "2", 2)
    assert push(hooks=replace(hooks, gate="gates:check", exec="")).status == "published"
    saved(runs / "3", 3)
    assert push(hooks=replace(hooks, gate="gates:check", exec="")).status == "rejected" and live() == ({2.0}, 2)


def test_a_gate_that_writes_to_the_extras_changes_nothing(push: Push, runs: Path) -> None:
    """Guards what was looked at: the file beside the slot is written again after the gate."""
    saved(runs / "1", 1)
    path = Segment.open("nets").path
    hooks = replace(load_spec("nets.toml").hooks, gate=f"for f in {path}/*.extras; do echo spoiled > $f; done")
    assert push(hooks=hooks).status == "published" and live() == ({1.0}, 1)


@pytest.mark.parametrize("source", ["slot", "copy", "file"])
def test_a_rollback_brings_them_back(push: Push, runs: Path, source: str) -> None:
    """Guards the way back, by each of its three sources."""
    for mark in (1, 2):
        saved(runs / str(mark), mark)
        push(keep=0 if source == "file" else 2)
    if source != "slot":
        WritableSegment.open("nets").remove()
        WritableSegment.create("nets", layout_of(mlp())).close()
    if source != "file":
        shutil.rmtree(runs / "1")
    with State("nets") as state:
        rollback("nets", 1, runtime=None, state=state)
    assert live() == ({1.0}, 1)
    with wsync.lease("nets") as held:
        assert held.metadata == {"step": "1"}


def test_a_rollback_does_not_take_changed_extras(push: Push, runs: Path) -> None:
    """Guards the identity on record: other extras beside the same weights are another version."""
    for mark in (1, 2):
        saved(runs / str(mark), mark)
        push(keep=0)
    WritableSegment.open("nets").remove()
    WritableSegment.create("nets", layout_of(mlp())).close()
    (runs / "1" / "preprocessor.json").write_text('{"mark": 9}')
    with State("nets") as state, pytest.raises(wsync.NoCheckpoint):
        rollback("nets", 1, runtime=None, state=state)


def test_a_pinned_file_comes_with_its_extras(push: Push, runs: Path) -> None:
    """Guards a pin by name, which knows of no spec: the history says which files belong to a checkpoint."""
    for mark in (1, 2):
        saved(runs / str(mark), mark)
        push(keep=0)
    saved(runs / "0", 7)
    with State("nets") as state:
        pin_checkpoint("nets", str(runs / "0"), runtime=None, state=state)
    assert push().status == "published" and live() == ({7.0}, 7)


def test_a_promote_takes_them_along(push: Push, runs: Path) -> None:
    """Guards slot to slot: the target has the extras of what was live."""
    saved(runs / "1", 1)
    push()
    Path("main.toml").write_text(TOML.replace('"nets"', '"main"'))
    assert promote("nets", "main.toml").status == "published"
    with wsync.lease("main") as held:
        assert held.extras["preprocessor.json"] == b'{"mark": 1}' and held.metadata == {"step": "1"}


def test_a_promote_takes_along_what_came_from_memory(push: Push, runs: Path) -> None:
    """Guards a source without a checkpoint: the slot alone says what travels with it."""
    with wsync.publisher("nets", mlp()) as publisher:
        publisher.push(1, extras={"bounds.json": b"[1]"})
    Path("main.toml").write_text(TOML.replace('"nets"', '"main"'))
    assert promote("nets", "main.toml").status == "published"
    with wsync.lease("main") as held:
        assert held.extras == {"bounds.json": b"[1]"} and held.step == 1


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(b"x"), lambda file: file.write_bytes(
    b"\xff" * file.stat().st_size)])  # fmt: skip
def test_a_copy_without_its_extras_is_not_used(push: Push, runs: Path, spoil: Callable[[Path], object]) -> None:
    """Guards a kept copy: where what travels with it is gone, cut or garbled, only the file itself brings it back."""
    for mark in (1, 2):
        saved(runs / str(mark), mark)
        push()
    with State("nets") as state:
        spoil(state.copies / "1.extras")
        WritableSegment.open("nets").remove()
        WritableSegment.create("nets", layout_of(mlp())).close()
        rollback("nets", 1, runtime=None, state=state)
        assert live() == ({1.0}, 1)
    with State("nets") as state:
        WritableSegment.open("nets").remove()
        WritableSegment.create("nets", layout_of(mlp())).close()
        spoil(state.copies / "2.extras")
        shutil.rmtree(runs / "2")
        with pytest.raises(wsync.NoCheckpoint):
            rollback("nets", 2, runtime=None, state=state)


def test_a_version_from_before_there_were_extras_comes_back_without_any(push: Push, runs: Path) -> None:
    """Guards a history in which an older wsync, or an older TOML, recorded no extras: its versions are rolled back."""
    saved(runs / "1", 1)
    push(keep=0, extras=ExtraFiles())
    saved(runs / "2", 2)
    push(keep=0)
    WritableSegment.open("nets").remove()
    WritableSegment.create("nets", layout_of(mlp())).close()
    with State("nets") as state:
        assert ["extras" in str(event.settings) for event in state.events() if event.kind == "publish"] == [False, True]
        rollback("nets", 1, runtime=None, state=state)
    assert live() == ({1.0}, None)


def test_weights_from_memory_bring_theirs(runtime: Path) -> None:
    """Guards ``extras=`` of an updater and of a publisher, and what a gate of Python is given."""
    seen: list[Staged] = []
    with closing(wsync.SharedMemoryWeightUpdater("nets", policy=mlp())) as updater:
        updater.gate = seen.append
        updater.push_weights(mlp(), extras={"bounds.json": b"[0, 1]"})
        with wsync.attach(mlp(), "nets") as reader, wsync.publisher("nets", mlp()) as publisher:
            assert reader.extras == {"bounds.json": b"[0, 1]"} == seen[0].extras
            publisher.push(2, extras={"a/b": b"x"})
            assert reader.refresh() and reader.extras == {"a/b": b"x"}
            updater.push_weights(mlp())
            assert reader.refresh() and reader.extras == {}
        for wrong in ({"../x": b""}, {"": b""}, {"__metadata__": b""}, {"x": "text"}, {"a": b"", "a/b": b""}, "x", [1]):
            with pytest.raises(UsageError, match="extras"):
                updater.push_weights(mlp(), extras=wrong)  # type: ignore[arg-type]
        assert updater.published and updater.published.version == 3


def test_an_added_slot_goes_with_its_extras(runtime: Path) -> None:
    """Guards shared memory: nothing stays of a slot that is given back."""
    readers = []
    with wsync.publisher("nets", mlp()) as publisher:
        for mark in range(6):
            publisher.push(mark, extras={"mark": b"x"})
            readers.append(wsync.attach(mlp(), "nets", mode="swap"))
        assert len(list((runtime / "nets").glob("*.extras"))) == 6
        for reader in readers:
            reader.close()
        for mark in range(3):
            publisher.push(mark, extras={"mark": b"x"})
        slots = {file.stem for file in (runtime / "nets").glob("slot-*.safetensors")}
        assert len(slots) < 6 and {file.stem for file in (runtime / "nets").glob("*.extras")} <= slots


def test_extras_are_open_to_those_who_may_read_the_segment(push: Push, runs: Path) -> None:
    """Guards a shared segment: the file beside a slot has the slot's mode, before and after it is shared."""
    saved(runs / "1", 1)
    push()
    with closing(WritableSegment.open("nets")) as segment:
        os.chmod(segment.path.parent, 0o755)
        segment.share(Access("0644"))
        saved(runs / "2", 2)
        push()
        modes = {oct(file.stat().st_mode & 0o777) for file in segment.path.glob("*.extras")}
    assert modes == {"0o644"}


def test_extras_that_somebody_removed_are_told(push: Push, runs: Path) -> None:
    """Guards a cleaner of old files: a reader says what is gone, and the next push makes the segment anew."""
    saved(runs / "1", 1)
    push()
    policy = mlp()
    with wsync.attach(policy, "nets") as reader:
        spoils: list[Callable[[Path], None]] = [os.unlink, lambda file: os.truncate(file, 5)]
        spoils.append(lambda file: os.truncate(file, file.stat().st_size - 1))
        for mark, spoil in enumerate(spoils, 2):
            saved(runs / str(mark), mark)
            push()
            with closing(Segment.open("nets")) as segment:
                spoil(segment.path / f"slot-{segment.word & 0xFF}.extras")
            with pytest.raises(SegmentDamaged, match=r"slot-\d\.extras"):
                reader.refresh()
            assert (
                marks(policy) == {float(mark - 1)}
                and json.loads(reader.extras["preprocessor.json"])["mark"] == mark - 1
            )
            assert push().status == "published" and live() == ({float(mark)}, mark)
            assert reader.refresh() and marks(policy) == {float(mark)}


def test_weights_and_extras_are_never_of_two_versions(runtime: Path) -> None:
    """Guards the take: a reader beside a busy publisher finds each version's own extras, in swap and in copy."""
    policies = {mode: mlp() for mode in ("swap", "copy")}
    stop = threading.Event()

    def publish() -> None:
        with wsync.publisher("nets", mlp()) as publisher:
            mark = 0
            while not stop.is_set():
                mark += 1
                with torch.no_grad():
                    for parameter in publisher._policy.parameters():
                        parameter.fill_(mark)
                publisher.push(mark, extras={"mark": str(mark).encode() * (1 + mark % 3 * 5000)})

    with wsync.publisher("nets", mlp()) as publisher:
        publisher.push(0, extras={"mark": b""})
    readers = {mode: wsync.attach(policy, "nets", mode=mode) for mode, policy in policies.items()}  # type: ignore[arg-type]
    thread = threading.Thread(target=publish)
    thread.start()
    try:
        for _ in range(300):
            for mode, reader in readers.items():
                assert reader.wait(DEADLINE) and reader.refresh()
                (mark,) = marks(policies[mode])
                assert reader.extras["mark"] == str(int(mark)).encode() * (1 + int(mark) % 3 * 5000)
    finally:
        stop.set()
        thread.join()
        for reader in readers.values():
            reader.close()


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True])
def test_a_watch_is_told_of_extras(push: Push, runs: Path, spawn: Spawn, flat: bool) -> None:
    """Guards the notifications of a watch that would not look by itself: extras come after their weights, or alone."""
    Path("nets.toml").write_text(TOML.replace("[select]", "[watch]\npoll = 3600\n[select]"))
    if flat:
        Path("nets.toml").write_text(Path("nets.toml").read_text().replace('"preprocessor.json"', '"{stem}.json"'))
    lines = Lines(spawn("-m", "wsync", "watch", "nets.toml", "--log-format", "json"))
    place = runs if flat else runs / "1"
    write(place / ("step_1.safetensors" if flat else "model.safetensors"), mlp(), 1)
    lines.until("of extras.files")
    save_extras(place, 1)
    if flat:
        (place / "step_1.json").write_text('{"mark": 1}')
    assert '"version": 1' in lines.until('"published"')
    (place / ("step_1.json" if flat else "preprocessor.json")).write_text('{"mark": 2}')
    assert '"version": 2' in lines.until('"published"')


@pytest.mark.slow
def test_extras_in_a_store(bucket: Bucket, program: Cli) -> None:
    """Guards objects beside the weights: the listing finds them, and the version that was listed is what is read."""
    spec = Path(os.environ["WSYNC_RUNTIME_DIR"]) / "nets.toml"
    spec.write_text(TOML.replace('"runs"', '"s3://bucket/run"'))
    bucket.save("run/1/model.safetensors", mlp(), 1, 1)
    result = program("push", str(spec), "--json")
    assert (result.returncode, json.loads(result.stdout)["status"]) == (66, "empty")
    bucket.put("run/1/obs_norm.safetensors", save({"mean": torch.ones(2)}))
    bucket.put("run/1/preprocessor.json", b'{"mark": 1}')
    for extra in (1, 2):
        bucket.put("run/1/preprocessor.json", json.dumps({"mark": extra}).encode())
        assert program("push", str(spec)).returncode == 0 and live() == ({1.0}, extra)
    bucket.put("run/1/preprocessor.json", b'{"mark": 3}')  # beside one named object, whose neighbours nobody listed
    assert program("push", str(spec), "s3://bucket/run/1/model.safetensors").returncode == 0 and live() == ({1.0}, 3)
    result = program("push", str(spec), "s3://bucket/run/1/model.safetensors", "--json")
    assert json.loads(result.stdout)["status"] == "current"


def test_options_name_them(push: Push, runs: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the settings as options, and that ``config`` shows them."""
    folder = saved(runs / "1", 1)
    (folder / "bounds.json").write_text("[1]")
    assert cli("push", "nets.toml", "--extras-files", "bounds.json").returncode == 0
    with wsync.lease("nets") as held:
        assert held.extras == {"bounds.json": b"[1]"}
    monkeypatch.setattr("wsync.segment.segment.read_extras_file", None)  # which would read all of them
    assert json.loads(cli("status", "nets", "--json").stdout)["extras"] == 3
    shown = cli("config", "nets.toml", "--json", "--extras-max-bytes", "100").stdout
    assert "extras.files" in shown and "extras.max_bytes" in shown


@pytest.mark.slow
def test_inspect_lists_them(push: Push, runs: Path, cli: Cli) -> None:
    """Guards what ``inspect`` calls complete: what a push would; and with ``--scan``, extras are whole, too."""
    folder = saved(runs / "1", 1)
    write(runs / "2" / "model.safetensors", mlp(), 2)
    options = ("--extras-files", "preprocessor.json", "--extras-files", "*norm*.safetensors")
    told = json.loads(cli("inspect", "runs", *options, "--json").stdout)
    verdicts = {Path(each["path"]).name: each["complete"] for each in told["candidates"]}
    assert verdicts == {"1": True, "2": False}
    shown = cli("inspect", "runs/1", "--spec", "nets.toml", "--scan")
    assert shown.returncode == 0 and "extras: obs_norm.safetensors, preprocessor.json" in shown.stdout
    (folder / "preprocessor.json").write_text("{")
    shown = cli("inspect", "runs/1", *options, "--scan")
    assert shown.returncode == 65 and "is not JSON" in shown.stdout


def test_spec_has_them(runs: Path) -> None:
    """Guards that the settings reach what lists and opens checkpoints."""
    Path("nets.toml").write_text(TOML)
    spec: Spec = load_spec("nets.toml")
    assert spec.extras == spec.select.extras == ExtraFiles(("*norm*.safetensors", "preprocessor.json"))
