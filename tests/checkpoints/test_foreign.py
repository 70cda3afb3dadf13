"""Files that are not for wsync: pickles, which are named as what they are, and headers that no policy has."""

from __future__ import annotations

import gzip
import json
import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import raw
from object_stores import Bucket
from policies import mlp
from processes import Cli

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.cli.output.inspected import inspect
from wsync.discovery.weight_getter import CheckpointWeightGetter
from wsync.errors import MalformedCheckpoint, NoCheckpoint
from wsync.segment.segment import Segment
from wsync.settings.spec import load_spec
from wsync.sync.syncer import Syncer

SAVE = r"safetensors\.torch\.save_file\((model\.)?policy\.state_dict\(\), "


def sb3(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data", "{}")


PICKLES: dict[str, Callable[[Path], object]] = {
    "last.ckpt": lambda f: torch.save({"state_dict": mlp().state_dict()}, f),
    "model.pt": lambda f: torch.save(mlp().state_dict(), f),
    "old.pth": lambda f: torch.save(mlp().state_dict(), f, _use_new_zipfile_serialization=False),
    "pytorch_model.bin": lambda f: torch.save(mlp().state_dict(), f),
    "ppo_cartpole.zip": sb3,
    "net.pkl": lambda f: f.write_bytes(pickle.dumps({"a": list(range(100))})),
    "tiny.pkl": lambda f: f.write_bytes(pickle.dumps(None)),
    "step_1.safetensors": lambda f: torch.save(mlp().state_dict(), f),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_named_as_what_it_is(name: str, tmp_path: Path) -> None:
    """Guards each writer's file against a riddle of its length, and names the line that writes safetensors."""
    PICKLES[name](tmp_path / name)
    with pytest.raises(MalformedCheckpoint, match=SAVE) as refusal:
        Checkpoint(tmp_path / name)
    assert "pickle" in refusal.value.message and "can run any code" in refusal.value.message
    looked = inspect(tmp_path / name)
    assert (looked["complete"], looked["kind"]) == (False, "malformed")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "text that begins with 'version https://git-lfs"),
        (b"<!DOCTYPE html>\n<title>404</title>", "text that begins with '<!DOCTYPE html>'"),
        (b'{"error": "Unauthorized"}', "text that begins with"),
        (gzip.compress(bytes(100), mtime=0), "packed by gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "packed by zstd"),
        (b"\x93NUMPY\x01\x00" + bytes(100), "its header claims"),
    ],
    ids=["git-lfs", "html", "json", "gzip", "zstd", "numpy"],
)
def test_what_a_download_left_is_named(data: bytes, said: str, tmp_path: Path) -> None:
    """Guards error pages, pointers and packed files under a checkpoint's name against a riddle of their length."""
    (tmp_path / "step_1.safetensors").write_bytes(data)
    with pytest.raises(MalformedCheckpoint, match="is not a safetensors file") as refusal:
        Checkpoint(tmp_path / "step_1.safetensors")
    assert said in refusal.value.message


@pytest.mark.parametrize("below", ["", "checkpoint-500"])
def test_a_directory_of_pickles_says_so(below: str, tmp_path: Path) -> None:
    """Guards against waiting for ever, in silence, for what is there and cannot be read."""
    (tmp_path / "runs" / below).mkdir(parents=True)
    for name in ("model.pt", "pytorch_model.bin"):
        PICKLES[name](tmp_path / "runs" / below / name)
    (tmp_path / "runs" / "notes.bin").write_bytes(b"something else, which is not named")
    with pytest.raises(NoCheckpoint, match=SAVE) as nothing:
        CheckpointWeightGetter(tmp_path / "runs").open_newest()
    assert ", and 1 more like it: wsync never opens those" in nothing.value.message


def test_no_pickle_no_word(tmp_path: Path) -> None:
    """Guards the plain message of an empty place, and files that only have such a name."""
    (tmp_path / "events.bin").write_bytes(b"PK, but not a zip archive")
    with pytest.raises(NoCheckpoint) as nothing:
        CheckpointWeightGetter(tmp_path).open_newest()
    assert "never opens" not in nothing.value.message


def test_a_store_of_pickles_says_so(bucket: Bucket, tmp_path: Path) -> None:
    """Guards the same in a store."""
    PICKLES["model.pt"](tmp_path / "model.pt")
    bucket.put("run/model.pt", (tmp_path / "model.pt").read_bytes())
    with pytest.raises(NoCheckpoint, match=SAVE):
        CheckpointWeightGetter("s3://bucket/run").open_newest()


def test_a_push_of_pickles_tells_its_user(cli: Cli, segment: Segment, runs: Path) -> None:
    """Guards the words that reach a terminal."""
    PICKLES["last.ckpt"](runs / "last.ckpt")
    done = cli("push", "policies:mlp", str(runs), "--name", segment.name)
    assert done.returncode == 66 and "save_file" in "".join((done.stdout + done.stderr).split("\n"))


def test_a_length_that_looks_like_a_pickle_is_none(tmp_path: Path) -> None:
    """Guards a good file whose header is 640 bytes long, which a pickle begins with, too."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(0x0480).encode()
    raw(tmp_path / "a.safetensors", header, bytes(4))
    assert (tmp_path / "a.safetensors").read_bytes()[:2] == b"\x80\x04"
    Checkpoint(tmp_path / "a.safetensors").close()


ENTRY = '{"dtype":"F32","shape":[],"data_offsets":[0,0]}'
HOSTILE: dict[str, Callable[[], str]] = {
    "tensors": lambda: "{" + ",".join(f'"{n}":{ENTRY}' for n in range(1_500_000)) + "}",
    "dimensions": lambda: '{"a":{"dtype":"F32","shape":[' + ",".join(["1"] * 48_000_000) + '],"data_offsets":[0,4]}}',
    "a name": lambda: '{"' + "x" * 99_000_000 + '":' + ENTRY + "}",
    "metadata": lambda: '{"__metadata__":{"a":"' + "x" * 99_000_000 + '"},"a":' + ENTRY + "}",
    "metadata with braces": lambda: '{"__metadata__":{"a":"' + "{x}" * 33_000_000 + '"},"a":' + ENTRY + "}",
    "many metadata": lambda: '{"__metadata__":{' + ",".join(f'"{n}":"x"' for n in range(6_000_000)) + "}}",
    "lists": lambda: '{"a":{"dtype":"F32","shape":[' + ",".join(["[]"] * 30_000_000) + '],"data_offsets":[0,4]}}',
}


@pytest.mark.slow
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_of_100_mb_is_refused_at_once(case: str, tmp_path: Path) -> None:
    """Guards a watch and an inspection against a minute and gigabytes for what no policy has."""
    raw(tmp_path / "a.safetensors", HOSTILE[case]().encode(), bytes(4))
    began = time.process_time()
    with pytest.raises(MalformedCheckpoint):
        Checkpoint(tmp_path / "a.safetensors")
    assert time.process_time() - began < 1.0  # it takes 0.3 s


BOUNDS = {
    "rank": '{"a":{"dtype":"F32","shape":[' + ",".join(["1"] * 129) + '],"data_offsets":[0,4]}}',
    "name": '{"' + "x" * 4097 + '":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("case", BOUNDS)
def test_each_bound_is_named(case: str, tmp_path: Path) -> None:
    """Guards that the message says which bound it was."""
    raw(tmp_path / "a.safetensors", BOUNDS[case].encode(), bytes(4))
    with pytest.raises(MalformedCheckpoint, match="over the bound of"):
        Checkpoint(tmp_path / "a.safetensors")


def test_a_large_index_is_refused_at_once(tmp_path: Path) -> None:
    """Guards the file beside the shards, which is parsed before any of them."""
    table = ",".join(f'"{n}":"a.safetensors"' for n in range(1_000_000))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map":{' + table + "}}")
    began = time.process_time()
    with pytest.raises(MalformedCheckpoint, match="over the bound"):
        Checkpoint(tmp_path)
    assert time.process_time() - began < 1.0


def test_a_refused_header_is_remembered(segment: Segment, runs: Path) -> None:
    """Guards each later pass against reading it again."""
    raw(
        runs / "step_1.safetensors",
        HOSTILE["dimensions"]().encode()[:20_000_000] + b'1],"data_offsets":[0,4]}}',
        bytes(4),
    )
    with Syncer(load_spec("policies:mlp"), runs) as syncer:
        first, second = syncer.once(), syncer.once()
        assert (first.status, first.kind, second.status, second.kind) == ("rejected", "malformed", "rejected", "")
