"""Checkpoints of several files, and directories of them: what is one checkpoint, which is whole, which is newest."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import policies
import pytest
import torch
from builders import SUPPORT, write
from safetensors.torch import save_file

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.checkpoints.files import parts, settling
from wsync.checkpoints.files.parts import identity, parts_of
from wsync.cli.output.inspected import inspect
from wsync.discovery.listing import scan
from wsync.discovery.newest import Candidate, Select
from wsync.discovery.weight_getter import CheckpointWeightGetter
from wsync.errors import (
    CheckpointChanged,
    CheckpointError,
    IncompleteCheckpoint,
    MalformedCheckpoint,
    NoCheckpoint,
)
from wsync.fitting import header as module
from wsync.layout.filenames import ADAPTER, CONFIG, INDEX, MAX_INDEX, SINGLE
from wsync.layout.layout import Layout, layout_of
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import Spec
from wsync.sync.syncer import Syncer
from wsync.system.memory import being_written

LONG_AGO = 1_000_000  # seconds; a time at which every file here stood still already


def tensors(mark: float | None = None) -> dict[str, torch.Tensor]:
    """Weights of several dtypes, random or all of one value."""
    made = {
        "a.weight": torch.randn(5, 3),
        "b.bias": torch.randn(7).bfloat16(),
        "c.scale": torch.randn(2, 2, dtype=torch.float64),
        "d.count": torch.tensor(3),
        "e.empty": torch.zeros(0, 4),
        "f.weight": torch.randn(3, 5),
    }
    return made if mark is None else {name: torch.full_like(tensor, mark) for name, tensor in made.items()}


def shard(directory: Path, state: Mapping[str, torch.Tensor], count: int = 3, names: Callable[[int], str] | None = None,
          metadata: dict[str, str] | None = None) -> Path:  # fmt: skip
    """Writes shards and then their index, as Hugging Face's libraries do."""
    directory.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number in range(count):
        own = {name: tensor for place, (name, tensor) in enumerate(state.items()) if place % count == number}
        file = names(number) if names else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file(own, directory / file, metadata=metadata)
        weight_map |= dict.fromkeys(own, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return directory


def single(directory: Path, mark: float, step: int | None = None) -> Path:
    write(directory / SINGLE, policies.mlp(), mark, step)
    return directory


def index(directory: Path, weight_map: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def age(path: Path, mtime: float = LONG_AGO) -> Path:
    """Gives a checkpoint a modification time, all of its files included."""
    for file in [path, *path.rglob("*")]:
        os.utime(file, (mtime, mtime))
    return path


def read(path: Path, progress: Callable[[int], None] | None = None) -> tuple[Layout, bytes]:
    with Checkpoint(path) as checkpoint:
        weights = bytearray(b"\xa5" * checkpoint.layout.nbytes)
        checkpoint.read_into(memoryview(weights), checkpoint.plan(checkpoint.layout), progress=progress)
        return checkpoint.layout, bytes(weights)


def assert_holds(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """A checkpoint's tensors are these, to the bit."""
    layout, weights = read(path)
    assert {entry.name for entry in layout.tensors} == state.keys()
    for entry in layout.tensors:
        tensor = state[entry.name]
        bits = bytes(tensor.flatten().view(torch.uint8).numpy()) if tensor.numel() else b""
        assert entry.shape == tensor.shape and weights[entry.offset : entry.offset + entry.nbytes] == bits, entry.name


def names(candidates: list[Candidate]) -> list[str]:
    return [candidate.path.name for candidate in candidates]


def live(path: Path) -> Candidate:
    """A checkpoint as that which is live."""
    with Checkpoint(path) as checkpoint:
        return Candidate(str(path), checkpoint.identity, int(checkpoint.identity.rpartition("-")[2]), checkpoint.step)


# One checkpoint


def test_a_directory_with_one_file(tmp_path: Path) -> None:
    """Guards the plainest directory: its model.safetensors is the checkpoint, and its own name gives the step."""
    state = tensors()
    (tmp_path / "checkpoint-500").mkdir()
    save_file(state, tmp_path / "checkpoint-500" / SINGLE)
    assert_holds(tmp_path / "checkpoint-500", state)
    with Checkpoint(tmp_path / "checkpoint-500") as checkpoint:
        assert checkpoint.step == 500 and checkpoint.path == tmp_path / "checkpoint-500"


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_shards_are_read_as_one(count: int, tmp_path: Path) -> None:
    """Guards that however many files it has, a checkpoint is read to the bit."""
    state = tensors()
    path = shard(tmp_path / "checkpoint-7", state, count)
    assert_holds(path, state)
    with Checkpoint(path) as checkpoint:
        assert checkpoint.step == 7 and checkpoint.size == sum(f.stat().st_size for f in path.glob("*.safetensors"))


def test_a_metadata_step_of_shards_comes_before_the_name(tmp_path: Path) -> None:
    """Guards that the producer's own number counts in shards, too."""
    with Checkpoint(shard(tmp_path / "checkpoint-7", tensors(), metadata={"step": "11"})) as checkpoint:
        assert checkpoint.step == 11


def test_what_else_lies_there_is_none_of_the_checkpoints(tmp_path: Path) -> None:
    """Guards that stale shards of an older write, and other files, do not mix in or stop a read."""
    shard(tmp_path, tensors(9.0), 6)
    (tmp_path / INDEX).unlink()
    state = tensors()
    shard(tmp_path, state, 2)
    save_file({"optimizer": torch.ones(3)}, tmp_path / "optimizer.safetensors")
    save_file({"lora": torch.ones(3)}, tmp_path / ADAPTER)
    (tmp_path / "training_args.bin").write_bytes(b"no pickle of ours")
    (tmp_path / "broken.safetensors").write_bytes(b"half")
    (tmp_path / "logs").mkdir()
    assert_holds(tmp_path, state)


def test_an_adapter_alone_is_a_checkpoint(tmp_path: Path) -> None:
    """Guards the third form of a directory."""
    save_file({"lora": torch.ones(3)}, tmp_path / ADAPTER)
    assert_holds(tmp_path, {"lora": torch.ones(3)})


def test_files_behind_links_are_read(tmp_path: Path) -> None:
    """Guards the layout of Hugging Face's cache, where each file is a link to a blob elsewhere."""
    state = tensors()
    blobs, snapshot = shard(tmp_path / "blobs", state), tmp_path / "snapshots"
    snapshot.mkdir()
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(os.path.join("..", "blobs", blob.name))
    assert_holds(snapshot, state)


def test_a_closed_checkpoint_holds_none_of_its_descriptors(tmp_path: Path) -> None:
    """Guards that a watch among shards never runs out of descriptors, whether an open went well or not."""
    before = len(os.listdir("/proc/self/fd"))
    whole, broken = shard(tmp_path / "whole", tensors(), 6), shard(tmp_path / "broken", tensors(), 6)
    os.truncate(broken / "model-00006-of-00006.safetensors", 10)
    Checkpoint(whole).close()
    with pytest.raises(IncompleteCheckpoint):
        Checkpoint(broken)
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_shards_than_may_be_open_are_told_with_the_limit(tmp_path: Path) -> None:
    """Guards that the reason names what has to be raised, and by which means."""
    path = age(shard(tmp_path / "checkpoint", tensors()))
    free = os.open(tmp_path, os.O_RDONLY)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, hard))
        with pytest.raises(CheckpointError, match=rf"no more than {free + 2} files open.*ulimit -n"):
            Checkpoint(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_empty_directory_is_no_checkpoint(tmp_path: Path) -> None:
    """Guards that a directory whose writer has just begun is waited for."""
    with pytest.raises(NoCheckpoint, match=INDEX):
        Checkpoint(tmp_path)


# Not whole yet


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_missing_shard_is_incomplete(number: int, tmp_path: Path) -> None:
    """Guards that a copy that came without one of its shards is no checkpoint yet, and that the shard is named."""
    file = shard(tmp_path, tensors()) / f"model-0000{number}-of-00003.safetensors"
    file.unlink()
    with pytest.raises(IncompleteCheckpoint, match=file.name):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("change", ["fewer", "more", "others"])
def test_a_shard_of_another_write_is_incomplete(change: str, tmp_path: Path) -> None:
    """Guards that an index and a shard that disagree are not taken for one checkpoint."""
    state = tensors()
    file = shard(tmp_path, state, 2) / "model-00001-of-00002.safetensors"
    held = {name: tensor for place, (name, tensor) in enumerate(state.items()) if place % 2 == 0}
    if change != "more":
        del held["a.weight"]
    if change != "fewer":
        held["z.weight"] = torch.ones(2)
    save_file(held, file)
    with pytest.raises(IncompleteCheckpoint, match=rf"{file.name}.*(a|z)\.weight"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.7, 0.999])
def test_a_truncated_shard_is_incomplete(kept: float, tmp_path: Path) -> None:
    """Guards that a shard that is still being copied is not read."""
    file = shard(tmp_path, tensors(), 2) / "model-00002-of-00002.safetensors"
    os.truncate(file, int(file.stat().st_size * kept))
    with pytest.raises(IncompleteCheckpoint, match=file.name):
        Checkpoint(tmp_path)


def test_every_beginning_of_an_index_is_incomplete(tmp_path: Path) -> None:
    """Guards that an index that is still being written is waited for, wherever it ends."""
    text = (shard(tmp_path, tensors()) / INDEX).read_bytes()
    for length in range(len(text)):
        (tmp_path / INDEX).write_bytes(text[:length])
        with pytest.raises(IncompleteCheckpoint):
            parts_of(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"weight_map": {"gewicht_ü'.encode()[:-1]),
        pytest.param(b"\0" * 10),
        b"\0" * 4096,
    ],
)
def test_half_a_character_or_reserved_bytes_are_an_index_that_is_not_written_yet(text: bytes, tmp_path: Path) -> None:
    """Guards that a cut within a character, or zeros that a writer reserved, are waited for like any other cut."""
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(IncompleteCheckpoint):
        parts_of(tmp_path)


# An index is data from elsewhere


@pytest.mark.parametrize(
    "where",
    ["../x", "/etc/passwd", "a/b.safetensors", "./x.safetensors", "x\0.safetensors", ".", "..", "", "x/", 5, None,
     True, ["x"], {"x": "y"}],
)  # fmt: skip
def test_an_index_cannot_lead_elsewhere(where: object, tmp_path: Path) -> None:
    """Guards that an index opens nothing but the files beside it."""
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(MalformedCheckpoint):
        Checkpoint(index(tmp_path / "checkpoint", {"weight": where}))


@pytest.mark.parametrize(
    "text",
    ["[]", "5", "null", '"text"', "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": null}',
     '{"weight_map": "x"}', '{"weight_map": {"a": ' + "9" * 5000 + "}}", "[" * 100_000 + "]" * 100_000],
)  # fmt: skip
def test_what_is_no_index_is_malformed(text: str, tmp_path: Path) -> None:
    """Guards that JSON of another kind is refused in our own words, and shortly."""
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(MalformedCheckpoint) as caught:
        parts_of(tmp_path)
    assert len(str(caught.value)) < 1000


def test_an_index_without_end_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an index that would fill the memory."""
    (tmp_path / INDEX).touch()
    os.truncate(tmp_path / INDEX, MAX_INDEX + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read"))
    with pytest.raises(MalformedCheckpoint, match="100,000,001"):
        parts_of(tmp_path)


@pytest.mark.parametrize("kind", ["directory", "fifo"])
@pytest.mark.parametrize("which", [INDEX, "model-00001-of-00001.safetensors"])
def test_what_is_no_regular_file_is_refused_at_once(which: str, kind: str, tmp_path: Path) -> None:
    """Guards that a FIFO in place of a file hangs nobody."""
    shard(tmp_path, tensors(), 1)
    (tmp_path / which).unlink()
    if kind == "fifo":
        os.mkfifo(tmp_path / which)
    else:
        (tmp_path / which).mkdir()
    with pytest.raises((MalformedCheckpoint, IncompleteCheckpoint)):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "weight_map",
    [pytest.param({"a": "\ud800.safetensors"}), pytest.param({"\ud800": "x.safetensors"})],
)
def test_half_a_surrogate_in_an_index_can_be_told(weight_map: dict[str, str], tmp_path: Path) -> None:
    """Guards that a hostile index is refused with a message that can be printed."""
    index(tmp_path, weight_map)
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    str(caught.value).encode()


def test_a_shard_of_an_impossible_name_is_a_checkpoints_error(tmp_path: Path) -> None:
    """Guards that a listing outlives an index that names what no file can be called."""
    index(tmp_path, {"a": "x" * 300})
    with pytest.raises(CheckpointError):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError):
        scan(tmp_path)


# While it is read


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("change", ["replaced", "overwritten", "truncated", "index"])
def test_a_change_of_one_shard_while_reading_is_noticed(change: str, number: int, tmp_path: Path) -> None:
    """Guards that shards of two writes are never one version: each may be whole, and together they are none."""
    path = age(shard(tmp_path / "checkpoint", tensors(1.0)))
    other = shard(tmp_path / "other", tensors(2.0))
    file = f"model-{number:05d}-of-00003.safetensors"
    happened: list[int] = []

    def during(nbytes: int) -> None:
        happened.append(nbytes)
        if len(happened) > 1:
            return
        if change == "replaced":
            os.replace(other / file, path / file)
            os.utime(path / file, (LONG_AGO, LONG_AGO))  # as copies that keep times leave it
        elif change == "overwritten":
            (path / file).write_bytes((other / file).read_bytes())
        elif change == "truncated":
            os.truncate(path / file, 100)
        else:
            os.rename(path / file, path / "model-9.safetensors")
            table = json.loads((path / INDEX).read_text().replace(file, "model-9.safetensors"))
            index(path, table["weight_map"])

    with pytest.raises(CheckpointChanged):
        read(path, during)


@pytest.mark.parametrize("form", ["file", "single", "shards"])
def test_a_checkpoint_survives_its_deletion_once_it_is_open(form: str, tmp_path: Path) -> None:
    """Guards that a trainer that keeps one checkpoint does not take it away from a pass that has opened it."""
    path, state = tmp_path / "checkpoint", tensors(1.0)
    if form == "shards":
        shard(path, state)
    else:
        path.mkdir()
        save_file(state, path / "model.safetensors")
    with Checkpoint(path / "model.safetensors" if form == "file" else path) as checkpoint:
        shutil.rmtree(path)
        weights = bytearray(checkpoint.layout.nbytes)
        checkpoint.read_into(memoryview(weights), checkpoint.plan(checkpoint.layout))
    assert bytes(weights) == read(shard(tmp_path / "again", state))[1]


def test_shards_that_are_being_removed_are_waited_for(tmp_path: Path) -> None:
    """Guards that a deletion is told from a rewrite, whose files are missing for a moment only."""
    path = shard(tmp_path / "checkpoint", tensors(1.0))
    first, *others = sorted(path.iterdir())
    removing = threading.Timer(0.2, lambda: list(map(os.unlink, others)))
    with Checkpoint(path) as checkpoint:
        first.unlink()
        removing.start()
        weights = bytearray(checkpoint.layout.nbytes)
        checkpoint.read_into(memoryview(weights), checkpoint.plan(checkpoint.layout))
    removing.join()


def test_a_shard_that_is_missing_for_a_moment_is_a_change(tmp_path: Path) -> None:
    """Guards that a writer which deletes each shard before it writes the new one is seen at work."""
    path = shard(tmp_path / "checkpoint", tensors(1.0))
    file = path / "model-00002-of-00003.safetensors"
    new = file.read_bytes()
    writing = threading.Timer(0.2, lambda: file.write_bytes(new))
    with Checkpoint(path) as checkpoint:
        file.unlink()
        writing.start()
        weights = memoryview(bytearray(checkpoint.layout.nbytes))
        with pytest.raises(CheckpointChanged):
            checkpoint.read_into(weights, checkpoint.plan(checkpoint.layout))
    writing.join()


def test_a_shard_that_stays_away_is_a_change(tmp_path: Path) -> None:
    """Guards that half a deletion is not taken for a whole one, however long it takes."""
    path = shard(tmp_path / "checkpoint", tensors(1.0))
    with Checkpoint(path) as checkpoint:
        (path / INDEX).unlink()
        weights = memoryview(bytearray(checkpoint.layout.nbytes))
        with pytest.raises(CheckpointChanged):
            checkpoint.read_into(weights, checkpoint.plan(checkpoint.layout))


def test_shards_of_two_directories_are_not_opened_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the moment between the first shard that is opened and the last."""
    path, other = shard(tmp_path / "checkpoint", tensors(1.0)), shard(tmp_path / "other", tensors(2.0))
    first = path / "model-00001-of-00003.safetensors"
    real = os.open

    def replacing(file: Any, *more: Any, **options: Any) -> int:
        fd = real(file, *more, **options)
        if file == first:
            os.replace(other / first.name, first)
        return fd

    monkeypatch.setattr(os, "open", replacing)
    with pytest.raises(CheckpointChanged):
        Checkpoint(path)


def test_a_file_is_the_same_after_a_reboot(tmp_path: Path) -> None:
    """Guards pins and refusals where a file system has another device number each time that it is mounted."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"weights")
    info = path.stat()
    again = os.stat_result((*info[:2], info.st_dev + 1, *info[3:]), {"st_mtime_ns": info.st_mtime_ns})
    assert again.st_dev != info.st_dev and identity(again) == identity(info)


@pytest.mark.parametrize("form", ["file", "single", "shards", "adapter"])
def test_retention_at_any_moment_is_no_failure(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards each look, opening and read: a checkpoint that is removed there is gone (66) or changed (75), never 1."""
    for moment in range(1000):
        path = tmp_path / f"{moment}"
        if form == "file":
            write(path / "a.safetensors", policies.mlp(), 1.0)
        elif form == "single":
            single(path, 1.0)
        elif form == "shards":
            shard(path, tensors(1.0))
        else:
            save_file({"lora": torch.ones(3)}, single(path, 1.0) / ADAPTER)
            (path / SINGLE).unlink()
            (path / CONFIG).write_text("{}")
        calls = 0

        def count(real: Any, *arguments: Any, path: Path = path, moment: int = moment, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment + 1:
                subprocess.run(["rm", "-r", str(path)], check=True)
            return real(*arguments, **options)

        with monkeypatch.context() as patched:
            for name in ("open", "stat", "pread", "preadv"):
                patched.setattr(os, name, partial(count, getattr(os, name)))
            try:
                read(path / "a.safetensors" if form == "file" else path)
            except CheckpointError as exc:
                assert exc.exit_code in (66, 75), (moment, exc)
        if calls <= moment:
            assert moment > 2
            return
    pytest.fail("it never ends")


def test_each_rewrite_of_any_file_is_another_identity(tmp_path: Path) -> None:
    """Guards that a checkpoint that was refused is tried again when any of its files changed."""
    path, seen = shard(tmp_path, tensors(1.0)), set()
    for number, file in enumerate([None, *sorted(path.iterdir())]):
        if file:
            os.utime(file, (LONG_AGO, LONG_AGO + number))
        with Checkpoint(path) as checkpoint:
            seen.add(checkpoint.identity)
            assert [c.identity for c in scan(tmp_path)] == [checkpoint.identity]
    assert len(seen) == 5


# Its writer is done


@pytest.fixture
def told(tmp_path: Path) -> None:
    """Skips where the system does not tell who writes a file."""
    with (tmp_path / "probe").open("wb") as file:
        fd = os.open(file.name, os.O_RDONLY)
        known = being_written(fd)
        os.close(fd)
    if known is None:
        pytest.skip("this file system grants no leases, or the file is another user's")


@pytest.mark.usefixtures("told")
def test_a_thread_that_opens_the_file_with_the_interpreter_locked_waits_for_nobody(tmp_path: Path) -> None:
    """Guards a trainer in the same process, as torch and older safetensors write: else both wait for 45 s."""
    (tmp_path / "file").touch()
    fd, name, locked = os.open(tmp_path / "file", os.O_RDONLY), os.fsencode(tmp_path / "file"), ctypes.PyDLL(None)

    def open_again_and_again() -> None:
        for _ in range(3000):
            os.close(locked.open(name, os.O_RDWR))

    interval, opens = sys.getswitchinterval(), threading.Thread(target=open_again_and_again)
    began = time.monotonic()
    sys.setswitchinterval(1e-6)  # the threads take turns wherever they can
    opens.start()
    while opens.is_alive():
        being_written(fd)
    sys.setswitchinterval(interval)
    os.close(fd)
    assert time.monotonic() - began < 30  # a lease is waited for 45 s, and the work takes less than one


@pytest.mark.usefixtures("told")
def test_the_system_is_asked_who_writes_a_file(tmp_path: Path) -> None:
    """Guards the three answers: a writer, none, and that a file of this kind has no leases."""
    with (tmp_path / "file").open("wb") as writer:
        fd = os.open(writer.name, os.O_RDONLY)
        assert being_written(fd) is True
    assert being_written(fd) is False
    os.close(fd)
    fd = os.open(tmp_path, os.O_RDONLY)
    assert being_written(fd) is None
    os.close(fd)


@pytest.mark.usefixtures("told")
def test_a_named_file_that_is_being_written_is_not_refused(tmp_path: Path, runtime: Path) -> None:
    """Guards a trainer that overwrites one file in place: not yet (66) while it writes, refused (65) if it stops."""
    spec = Spec("policies:mlp", "a", SUPPORT)
    path = write(tmp_path / "latest.safetensors", policies.mlp(), 1.0)
    whole = path.read_bytes()
    with (
        closing(WritableSegment.create("a", layout_of(policies.mlp()), spec=spec.fingerprint())),
        Syncer(spec, path) as syncer,
    ):
        with path.open("wb") as file:
            file.write(whole[:300])
            file.flush()
            assert syncer.once().status == "empty"
        assert syncer.once().status == "rejected"
        path.write_bytes(whole)
        assert syncer.once().status == "published"


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("form", ["file", "single", "shards"])
def test_what_is_open_for_writing_is_not_taken(form: str, tmp_path: Path) -> None:
    """Guards that bytes that look whole are not taken while their writer may still change them."""
    if form == "file":
        path = file = write(tmp_path / "a.safetensors", policies.mlp(), 1.0)
    elif form == "single":
        path = single(tmp_path / "a", 1.0)
        file = path / SINGLE
    else:
        path = shard(tmp_path / "a", tensors(1.0))
        file = path / "model-00002-of-00003.safetensors"
    age(path)
    with file.open("r+b"), pytest.raises(IncompleteCheckpoint, match="open for writing"):
        Checkpoint(path)
    Checkpoint(path).close()


@pytest.mark.usefixtures("told")
def test_reserved_zeros_are_not_taken(tmp_path: Path) -> None:
    """Guards against zeros going live: a file of full size whose data its writer has yet to fill in."""
    whole = write(tmp_path / "source", policies.mlp(), 1.0).read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    write(tmp_path / "runs" / "step_1.safetensors", policies.mlp(), 0.5)
    age(tmp_path / "runs")
    getter = CheckpointWeightGetter(tmp_path / "runs")
    path = tmp_path / "runs" / "step_2.safetensors"
    with path.open("wb") as file:
        file.write(whole[:length])
        file.flush()
        os.posix_fallocate(file.fileno(), 0, len(whole))
        with pytest.raises(IncompleteCheckpoint):
            Checkpoint(path)
        older = getter.open_newest()
        assert older is not None and older.path.name == "step_1.safetensors"
        older.close()
        file.write(whole[length:])
    newest = getter.open_newest()
    assert newest is not None and newest.path == path
    newest.close()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were asked to sleep, by a clock that only sleeping moves."""
    asked: list[float] = []
    start = time.time()
    monkeypatch.setattr(time, "time", lambda: start + sum(asked))
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


@pytest.mark.parametrize(("seconds", "waited"), [(0.0, 0.3), (0.1, 0.2), (0.25, 0.05), (0.5, 0.0), (100.0, 0.0)])
def test_shards_must_have_stood_still(seconds: float, waited: float, tmp_path: Path, slept: list[float]) -> None:
    """Guards that several files, which are written one after another, are waited for, and no longer than needed."""
    path = shard(tmp_path / "checkpoint", tensors())
    slept.append(seconds)  # this long after the last of them
    Checkpoint(path, settle=0.3).close()
    assert sum(slept[1:]) == pytest.approx(waited, abs=0.04)


@pytest.mark.parametrize(("seconds", "waited"), [(0.0, 1.01), (0.75, 0.26), (1.0, 0.01), (1.5, 0.0), (100.0, 0.0)])
def test_a_clock_of_whole_seconds_is_waited_out(
    seconds: float, waited: float, tmp_path: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a mixture, and a file that is never seen, where a file system's times have whole seconds."""
    second = int(time.time()) + 1
    path = age(write(tmp_path / "a.safetensors", policies.mlp()), second)
    slept.append(second + seconds - time.time())
    monkeypatch.setattr(settling, "being_written", lambda _: False)
    Checkpoint(path).close()
    assert sum(slept[1:]) == pytest.approx(waited, abs=0.001)


def test_the_newest_of_the_shards_counts(tmp_path: Path, slept: list[float]) -> None:
    """Guards that one young shard among old ones is waited for."""
    path = age(shard(tmp_path / "checkpoint", tensors()))
    slept.append(100.0)
    now = time.time()
    os.utime(path / "model-00002-of-00003.safetensors", (now, now))
    Checkpoint(path, settle=0.3).close()
    assert sum(slept[1:]) == pytest.approx(0.3, abs=0.001)


@pytest.mark.parametrize(("answer", "waited"), [(False, 0.01), (None, 0.3)])
def test_a_file_waits_only_where_the_system_does_not_tell(
    answer: bool | None, waited: float, tmp_path: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards that a file whose writer is known to be done is taken at once, and one on a remote disk is not."""
    slept.append(100.0)
    path = age(write(tmp_path / "a.safetensors", policies.mlp()), time.time())
    monkeypatch.setattr(settling, "being_written", lambda _: answer)
    Checkpoint(path, settle=0.3).close()
    assert sum(slept[1:]) == pytest.approx(waited, abs=0.001)


def test_a_write_while_settling_begins_the_wait_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that a writer that goes on during the wait is not taken for one that is done."""
    now = [LONG_AGO + 0.5]
    path = age(shard(tmp_path / "checkpoint", tensors()), now[0])
    asked: list[float] = []

    def sleep(seconds: float) -> None:
        now[0] += seconds
        asked.append(seconds)
        if len(asked) == 1:  # another shard arrives just before the wait is over
            os.utime(path / "model-00003-of-00003.safetensors", (now[0], now[0]))

    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    try:
        Checkpoint(path, settle=0.3).close()
    except IncompleteCheckpoint:
        return  # left to the next pass is as good
    assert sum(asked) == pytest.approx(0.6, abs=0.001)


def test_a_copy_that_keeps_times_is_waited_for_from_its_arrival(tmp_path: Path, slept: list[float]) -> None:
    """Guards against a mixture: rsync -a and cp -p replace shard after shard with times of long ago."""
    path, newer = age(shard(tmp_path / "latest", tensors(1.0))), age(shard(tmp_path / "other", tensors(2.0)))
    file = "model-00001-of-00003.safetensors"
    os.utime(newer / file, (LONG_AGO + 60, LONG_AGO + 60))
    os.replace(newer / file, path / file)  # the other two are still on their way
    try:
        Checkpoint(path, settle=30.0).close()
    except IncompleteCheckpoint:
        return
    assert sum(slept) > 29.0


# A place of checkpoints


def mixed(place: Path) -> Path:
    """Files and directories under the names that trainers give, of marks, steps and times in different orders."""
    age(single(place / "checkpoint-500", 1.0), 60)
    age(shard(place / "step_700", tensors(2.0)), 50)
    age(single(place / "600", 3.0), 40)
    age(write(place / "step_650.safetensors", policies.mlp(), 4.0), 55)
    age(single(place / "zebra", 5.0), 30)
    age(write(place / "9.safetensors", policies.mlp(), 6.0), 20)
    (place / "logs").mkdir()
    (place / "empty-9000").mkdir()
    (place / "notes.txt").touch()
    return place


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("mtime", ["checkpoint-500", "step_650.safetensors", "step_700", "600", "zebra", "9.safetensors"]),
        ("step", ["step_700", "step_650.safetensors", "600", "checkpoint-500", "9.safetensors", "zebra"]),
        ("name", ["zebra", "step_700", "step_650.safetensors", "checkpoint-500", "600", "9.safetensors"]),
    ],
)
def test_files_and_directories_stand_in_one_order(order: Any, expected: list[str], tmp_path: Path) -> None:
    """Guards which of a trainer's checkpoints is the newest, whatever their forms."""
    getter = CheckpointWeightGetter(mixed(tmp_path), select=Select(order=order, settle=0))
    assert names(getter.candidates()) == expected
    for place, name in enumerate(expected):
        assert names(getter.candidates(live(tmp_path / name))) == expected[:place], name
    newest = getter.open_newest()
    assert newest is not None and newest.path == tmp_path / expected[0]
    newest.close()


def test_only_names_that_match_the_pattern_are_candidates(tmp_path: Path) -> None:
    """Guards that the pattern holds for files and directories alike."""
    assert set(names(scan(mixed(tmp_path), Select("step_*")))) == {"step_700", "step_650.safetensors"}


def test_a_sharded_place_is_one_candidate(tmp_path: Path) -> None:
    """Guards that the shards of a checkpoint are not taken for checkpoints."""
    assert [c.path for c in scan(shard(tmp_path, tensors()))] == [tmp_path]
    write(tmp_path / "step_5.safetensors", policies.mlp())
    assert [c.path for c in scan(tmp_path)] == [tmp_path]
    assert {c.path for c in scan(tmp_path, Select("step_*"))} == {tmp_path, tmp_path / "step_5.safetensors"}


def test_shards_of_any_name_are_no_candidates(tmp_path: Path) -> None:
    """Guards the same where a writer calls its shards otherwise: the index names them."""
    shard(tmp_path, tensors(), names=lambda number: f"part_{'abc'[number]}.safetensors")
    assert [c.path for c in scan(tmp_path)] == [tmp_path]


def test_shards_whose_index_has_not_come_are_no_candidates(tmp_path: Path) -> None:
    """Guards that the first shards of a checkpoint, whose index is written last, are not published as a whole."""
    (shard(tmp_path, tensors()) / INDEX).unlink()
    assert scan(tmp_path) == []


def test_a_named_directory_is_its_own_candidate(tmp_path: Path) -> None:
    """Guards that a directory that is named itself keeps the step of its name, in each of its forms."""
    shard(tmp_path / "checkpoint-500", tensors())
    single(tmp_path / "checkpoint-600", 1.0)
    for name, step in (("checkpoint-500", 500), ("checkpoint-600", 600)):
        newest = CheckpointWeightGetter(tmp_path / name, select=Select(settle=0)).open_newest()
        assert newest is not None
        newest.close()
        assert newest.step == step, name


def test_a_named_directory_that_is_broken_says_why(tmp_path: Path) -> None:
    """Guards that someone who names a checkpoint with a missing shard is told of the shard."""
    (shard(tmp_path / "checkpoint-500", tensors()) / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        CheckpointWeightGetter(tmp_path / "checkpoint-500").open_newest()


def test_an_unfinished_directory_is_no_candidate(tmp_path: Path) -> None:
    """Guards that a listing passes over what lacks a shard or its index, and finds it when it came."""
    path = shard(tmp_path / "checkpoint-1", tensors())
    text = (path / INDEX).read_bytes()
    (path / INDEX).write_bytes(text[:20])
    assert scan(tmp_path) == []
    (path / INDEX).write_bytes(text)
    (path / "model-00003-of-00003.safetensors").rename(path / "aside")
    assert scan(tmp_path) == []
    (path / "aside").rename(path / "model-00003-of-00003.safetensors")
    assert names(scan(tmp_path)) == ["checkpoint-1"]


def test_an_index_that_names_files_elsewhere_is_refused_once(tmp_path: Path, runtime: Path) -> None:
    """Guards that a hostile index among the checkpoints is told as such, and then passed over until it changes."""
    spec = Spec("policies:mlp", "a", SUPPORT)
    with closing(WritableSegment.create("a", layout_of(policies.mlp()), spec=spec.fingerprint())):
        runs = tmp_path / "runs"
        index(runs / "checkpoint-7", {"0.weight": "../model.safetensors"})
        with Syncer(spec, runs) as syncer:
            first, second = syncer.once(), syncer.once()
            assert (first.status, first.kind, second.status, second.kind) == ("rejected", "malformed", "rejected", "")
            assert "not a file beside it" in (first.reason or "")
            shard(runs / "checkpoint-7", policies.mlp().state_dict())
            syncer.getter.select = Select(settle=0.01)
            assert syncer.once().status == "published"


def test_halves_are_listed_where_they_are_asked_for(tmp_path: Path) -> None:
    """Guards a look at a directory, which is to say why a checkpoint that is missing a shard is none."""
    (shard(tmp_path / "checkpoint-1", tensors()) / "model-00003-of-00003.safetensors").unlink()
    shard(tmp_path / "checkpoint-2", tensors())
    assert names(scan(tmp_path)) == ["checkpoint-2"]
    assert {*names(scan(tmp_path, everything=True))} == {"checkpoint-1", "checkpoint-2"}
    verdicts = {Path(c["path"]).name: c["reason"] for c in inspect(tmp_path)["candidates"]}
    assert verdicts["checkpoint-2"] is None and "shard 3 of 3" in verdicts["checkpoint-1"]


@pytest.mark.parametrize(
    "name",
    [".x.tmp", ".hidden", "checkpoint-500.tmp", "checkpoint-500-tmp", "checkpoint-500_temp", "checkpoint-500.partial",
     "checkpoint-500.incomplete", "~checkpoint", "checkpoint~", ".checkpoint-500.Ab3dEf"],
)  # fmt: skip
def test_a_temporary_directory_is_no_candidate(name: str, tmp_path: Path) -> None:
    """Guards that a directory that is not renamed into place yet is never opened, whole as it may look."""
    single(tmp_path / name, 1.0)
    shard(tmp_path / f"{name}.2", tensors()).rename(tmp_path / f".{name}")
    assert scan(tmp_path) == []


def test_the_temporaries_of_rsync_are_no_candidates(tmp_path: Path) -> None:
    """Guards that a copy at work is passed over, beside the checkpoints and within one."""
    write(tmp_path / ".step_1.safetensors.Ab3dEf", policies.mlp())
    write(tmp_path / "checkpoint-2" / f".{SINGLE}.Xy9zQw", policies.mlp())
    assert scan(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become another user")
def test_a_newer_directory_that_is_not_for_us_is_told_while_another_is_live(tmp_path: Path) -> None:
    """Guards that a policy does not stay behind in silence because its trainer's umask is another one."""
    runs = tmp_path / "runs"
    for parent in runs.parents:
        if parent.is_relative_to(Path(tempfile.gettempdir())) and parent != Path(tempfile.gettempdir()):
            parent.chmod(0o755)
    older = age(write(runs / "step_1.safetensors", policies.mlp()))
    older.chmod(0o644)
    closed = single(runs / "checkpoint-2", 2.0)
    closed.chmod(0o700)
    getter = CheckpointWeightGetter(runs)
    os.seteuid(65534)
    try:
        (newer,) = getter.candidates(live(older))
        with pytest.raises(CheckpointError, match="checkpoint-2 belongs to root with mode 0700"):
            getter.open(newer)
        assert getter.candidates(newer) == []
        os.seteuid(0)
        age(closed, LONG_AGO - 1)
        os.seteuid(65534)
        assert getter.candidates(live(older)) == []
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become another user")
@pytest.mark.parametrize("what", ["the place", "a directory in it", "its shards"])
def test_a_directory_that_is_not_for_us_says_whose_it_is(what: str, tmp_path: Path) -> None:
    """Guards that what another user keeps to himself is told with owner and mode, and is not "no checkpoint yet"."""
    path = shard(tmp_path / "runs" / "checkpoint-5", tensors())
    for parent in (tmp_path, *tmp_path.parents):
        if parent.is_relative_to(Path(tempfile.gettempdir())) and parent != Path(tempfile.gettempdir()):
            parent.chmod(0o755)
    closed = {"the place": path.parent, "a directory in it": path, "its shards": path / INDEX}[what]
    (path.parent / "lost+found").mkdir(mode=0o700)
    closed.chmod(0o600 if closed.is_file() else 0o700)
    os.seteuid(65534)
    try:
        for place in (path.parent, path):
            with pytest.raises(CheckpointError, match=rf"{closed.name} belongs to root with mode 0[67]00") as caught:
                CheckpointWeightGetter(place).open_newest()
            assert caught.value.exit_code == 1
    finally:
        os.seteuid(0)
    shutil.rmtree(path)
    os.seteuid(65534)
    try:
        if what == "a directory in it":
            assert scan(path.parent) == []  # a file system's own is no trouble
    finally:
        os.seteuid(0)


# A marker


def test_a_directory_waits_for_its_marker(tmp_path: Path) -> None:
    """Guards that with a marker a directory is none before its writer has left it."""
    single(tmp_path / "checkpoint-1", 1.0)
    shard(tmp_path / "checkpoint-2", tensors())
    settings = Select(marker="STABLE")
    assert scan(tmp_path, settings) == []
    (tmp_path / "checkpoint-2" / "STABLE").touch()
    assert names(scan(tmp_path, settings)) == ["checkpoint-2"]
    (tmp_path / "checkpoint-1" / "STABLE").touch()
    assert set(names(scan(tmp_path, settings))) == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("marker", ["STABLE", ".STABLE"])
@pytest.mark.parametrize("beside", ["step_5.safetensors.STABLE", "step_5.STABLE"])
def test_a_file_waits_for_its_marker(marker: str, beside: str, tmp_path: Path) -> None:
    """Guards that a file's marker is its own and not another file's."""
    for number in (5, 50):
        write(tmp_path / f"step_{number}.safetensors", policies.mlp())
    assert scan(tmp_path, Select(marker=marker)) == []
    (tmp_path / beside).touch()
    assert names(scan(tmp_path, Select(marker=marker))) == ["step_5.safetensors"]


@pytest.mark.parametrize("beside", ["step_5.safetensors.STABLE", "step_5.STABLE"])
def test_a_named_file_waits_for_its_marker(beside: str, tmp_path: Path) -> None:
    """Guards that the marker holds as well where the place is itself the file, and that its absence is told."""
    path = write(tmp_path / "step_5.safetensors", policies.mlp())
    getter = CheckpointWeightGetter(path, select=Select(marker="STABLE"))
    with pytest.raises(NoCheckpoint, match='a marker "STABLE"'):
        getter.open_newest()
    (tmp_path / beside).touch()
    assert [c.path for c in getter.candidates()] == [path]
    (single(tmp_path / "checkpoint-7", 1.0) / "STABLE").touch()
    assert len(scan(tmp_path / "checkpoint-7" / SINGLE, Select(marker="STABLE"))) == 1


@pytest.mark.parametrize("form", ["single", "shards", "adapter", "itself", "file", "named file"])
def test_a_marker_of_an_earlier_save_does_not_count(form: str, tmp_path: Path) -> None:
    """Guards a save in place: the marker that the one before left says nothing of files that are newer."""
    path = tmp_path / "checkpoint-5"
    match form:
        case "file" | "named file":
            files = [write(tmp_path / "step_5.safetensors", policies.mlp(), 1.0)]
            marker = tmp_path / "step_5.safetensors.STABLE"
        case "shards" | "itself":
            shard(path, tensors())
            files, marker = [*path.iterdir()], path / "STABLE"
        case "adapter":
            path.mkdir()
            save_file(tensors(), path / ADAPTER)
            (path / CONFIG).write_text("{}")
            files, marker = [*path.iterdir()], path / "STABLE"
        case _:
            files, marker = [single(path, 1.0) / SINGLE], path / "STABLE"
    place = {"itself": path, "named file": files[0]}.get(form, tmp_path)
    marker.touch()
    for newer in files:
        for file in files:
            os.utime(file, (100, 100))
        os.utime(newer, (200, 200))
        for when, counts in ((100, False), (199, False), (200, True), (300, True)):  # equal where times are coarse
            os.utime(marker, (when, when))
            assert len(scan(place, Select(marker="STABLE"))) == counts, (newer, when)


def test_an_index_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the price of a pass with nothing new among sharded checkpoints; and that a new index is seen at once."""
    path = shard(tmp_path / "checkpoint-1", tensors())
    reads: list[Path] = []
    real = vars(parts)["read_small"]

    def count(file: Path, most: int) -> Any:
        reads.append(file)
        return real(file, most)

    monkeypatch.setattr(parts, "read_small", count)
    clock = [time.time()]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    for _ in range(3):
        scan(tmp_path)
    assert len(reads) == 3  # a write in the same tick would not show
    clock[0] += 5
    for _ in range(3):
        assert len(scan(tmp_path)) == 1
    assert len(reads) == 4
    shard(path, tensors(1.0), 2)
    clock[0] += 5
    (found,) = scan(tmp_path)
    assert found.identity == live(path).identity
    assert parts_of(path).files == tuple(path / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    index = json.loads((path / INDEX).read_text())
    (path / INDEX).write_text(json.dumps(index | {"metadata": {"filler": "x" * (1 << 19)}}))  # too much to keep
    clock[0] += 5
    before = len(reads)
    scan(tmp_path)
    scan(tmp_path)
    assert len(reads) == before + 2


@pytest.mark.parametrize("form", ["single", pytest.param("shards")])
def test_a_named_directory_waits_for_its_marker(form: str, tmp_path: Path) -> None:
    """Guards that the marker holds as well where the place is itself the checkpoint."""
    if form == "single":
        single(tmp_path, 1.0)
    else:
        shard(tmp_path, tensors())
    assert scan(tmp_path, Select(marker="STABLE")) == []
    (tmp_path / "STABLE").touch()
    assert len(scan(tmp_path, Select(marker="STABLE"))) == 1


# Order by step


def test_a_metadata_step_comes_before_the_name_and_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the order of producers whose names say nothing, at the price of one look at each header."""
    for number, step in ((1, 30), (2, 10), (3, 20)):
        age(write(tmp_path / f"step_{number}.safetensors", policies.mlp(), step=step))
        age(single(tmp_path / f"checkpoint-{number}", 1.0, step + 5))
    opened: list[str] = []
    header = vars(module)["read_header"]

    def count(read: Any, size: int, path: Path, number: int) -> Any:
        opened.append(str(path))
        return header(read, size, path, number)

    monkeypatch.setattr(module, "read_header", count)
    (tmp_path / "broken_0.safetensors").write_bytes(b"garbage, and more of it")
    getter = CheckpointWeightGetter(tmp_path, select=Select(order="step"))
    expected = ["checkpoint-1", "step_1.safetensors", "checkpoint-3", "step_3.safetensors", "checkpoint-2",
                "step_2.safetensors", "broken_0.safetensors"]  # fmt: skip
    for _ in range(3):
        assert names(getter.candidates()) == expected
    assert len(opened) == len(set(opened)) == 7
    age(write(tmp_path / "step_2.safetensors", policies.mlp(), step=99))
    assert names(getter.candidates())[0] == "step_2.safetensors"
    assert len(opened) == 8


def test_a_step_of_the_name_goes_with_the_name(tmp_path: Path) -> None:
    """Guards a checkpoint that a watch saw under a temporary name before it was renamed into place."""
    write(tmp_path / "step_1.safetensors", policies.mlp())
    new = write(tmp_path / "new.safetensors", policies.mlp())
    getter = CheckpointWeightGetter(tmp_path, select=Select(order="step"))
    assert [c.step for c in getter.candidates()] == [1, None]
    new.rename(tmp_path / "step_2.safetensors")
    assert [c.step for c in getter.candidates()] == [2, 1]
    os.link(tmp_path / "step_2.safetensors", tmp_path / "step_3.safetensors")
    assert [c.step for c in getter.candidates()] == [3, 2, 1]


def test_looking_for_steps_waits_for_nobody(tmp_path: Path, slept: list[float]) -> None:
    """Guards the time of a pass among checkpoints that have still to stand still: it is waited for one, not for all."""
    for number in range(20):
        shard(tmp_path / f"checkpoint-{number}", tensors(), metadata={"step": str(100 - number)})
    getter = CheckpointWeightGetter(tmp_path, select=Select(order="step", settle=1.0))
    assert names(getter.candidates())[0] == "checkpoint-0"
    assert sum(slept) < 1.0


# Links


def link(at: Path, to: str) -> None:
    """Moves a symbolic link in one step, as trainers do."""
    temporary = at.with_name(f".{at.name}.tmp")
    temporary.symlink_to(to)
    temporary.rename(at)


@pytest.mark.parametrize("form", ["file", "single", "shards"])
def test_a_link_that_moves_is_seen(form: str, tmp_path: Path) -> None:
    """Guards the usual `latest`: each place that it comes to point at is new, and on record under its own name."""
    ends = []
    for number in (1, 2):
        path = tmp_path / f"checkpoint-{number}"
        if form == "file":
            path = write(path.with_suffix(".safetensors"), policies.mlp(), number)
        elif form == "single":
            single(path, number)
        else:
            shard(path, tensors(number))
        ends.append(age(path, LONG_AGO + number).name)
    latest = tmp_path / "latest"
    link(latest, ends[0])
    getter = CheckpointWeightGetter(latest)
    for target in (ends[1], ends[0], ends[1]):
        before = getter.candidates()
        assert len(before) == 1
        assert getter.candidates(live(before[0].path)) == []
        was = live(before[0].path)
        link(latest, target)
        (after,) = getter.candidates(was)
        assert after.identity == live(tmp_path / target).identity
        assert live(latest).step == live(tmp_path / target).step in (1, 2)
        with Checkpoint(latest) as checkpoint:
            assert checkpoint.path == tmp_path / target


@pytest.mark.parametrize("wrong", ["values", "header"])
def test_a_refusal_is_of_what_was_opened(wrong: str, tmp_path: Path, runtime: Path) -> None:
    """Guards a good checkpoint against being refused for a bad one to which the link moved before it was opened."""
    spec = Spec("policies:mlp", "a", SUPPORT)
    write(tmp_path / "1", policies.mlp())
    bad = write(tmp_path / "2", policies.mlp(), float("nan"))
    if wrong == "header":
        bad.write_bytes(bad.read_bytes().replace(b"F32", b'F"2'))
    latest = tmp_path / "latest.safetensors"
    link(latest, "1")
    segment = closing(WritableSegment.create("a", layout_of(policies.mlp()), spec=spec.fingerprint()))
    with segment, Syncer(spec, latest) as syncer:
        opens = syncer.getter.open

        def moved(candidate: Candidate, published: Callable[[], Sequence[str]] = tuple) -> Checkpoint:
            link(latest, "2")
            return opens(candidate, published)

        syncer.getter.open = moved  # type: ignore[method-assign]
        assert syncer.once().status == "rejected"
        syncer.getter.open = opens  # type: ignore[method-assign]
        refused = syncer.once()
        assert (refused.status, refused.kind) == ("rejected", "")  # remembered
        link(latest, "1")
        assert syncer.once().status == "published"


def test_a_named_adapter_is_known_by_both_its_files(tmp_path: Path) -> None:
    """Guards that an adapter's file that is named itself is live, or refused, as it was opened."""
    write(tmp_path / ADAPTER, policies.mlp())
    (tmp_path / CONFIG).write_text("{}")
    (candidate,) = scan(tmp_path / ADAPTER)
    with Checkpoint(tmp_path / ADAPTER) as checkpoint:
        assert candidate.identity == checkpoint.identity


def test_a_link_beside_its_checkpoint_is_no_news(tmp_path: Path) -> None:
    """Guards that the newest checkpoint is not published a second time under the name of the link to it."""
    for number in (1, 2):
        age(shard(tmp_path / f"checkpoint-{number}", tensors(number)), LONG_AGO + number)
    link(tmp_path / "latest", "checkpoint-2")
    getter = CheckpointWeightGetter(tmp_path)
    for name in ("checkpoint-2", "latest"):
        assert getter.candidates(live(tmp_path / name)) == []
    assert names(getter.candidates(live(tmp_path / "checkpoint-1"))) == ["checkpoint-2"]


# Many


@pytest.mark.parametrize("order", ["mtime", "name"])
def test_ten_thousand_files_are_not_opened(order: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the price of a pass with nothing new: a listing, and no file opened."""
    for number in range(10_000):
        os.close(os.open(tmp_path / f"step_{number}.safetensors", os.O_CREAT | os.O_WRONLY))
    newest = write(tmp_path / "step_99999.safetensors", policies.mlp())
    age(newest, time.time() + 10)
    now = live(newest)

    def count(*arguments: Any, **options: Any) -> int:
        pytest.fail(f"opened {arguments[0]}")

    monkeypatch.setattr(os, "open", count)
    assert CheckpointWeightGetter(tmp_path, select=Select(order=order)).candidates(now) == []
