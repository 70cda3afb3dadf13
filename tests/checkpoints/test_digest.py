"""Digests that a checkpoint's writer leaves: checked on the bytes that are staged, in the same reading."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import write
from object_stores import Bucket
from policies import mlp
from processes import Cli
from safetensors.torch import save_file

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.checkpoints.files.local_files import Files
from wsync.cli.output.inspected import inspect
from wsync.discovery.newest import Select
from wsync.errors import BeingWritten, CheckpointMismatch, MalformedCheckpoint, NonFiniteWeights, WrongDigest
from wsync.fitting.fit import Fit
from wsync.history.rollback import pin_checkpoint
from wsync.history.state import State
from wsync.layout.layout import Layout
from wsync.segment.segment import Segment
from wsync.settings.spec import Spec, load_spec
from wsync.sync.syncer import Syncer

FLOATS = {"a": torch.arange(50_001.0), "b": torch.arange(7, dtype=torch.float64), "c": torch.ones(3, dtype=torch.int8)}


def of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def saved(file: Path, tensors: dict[str, torch.Tensor] = FLOATS) -> Path:
    file.parent.mkdir(exist_ok=True)
    save_file(tensors, file)
    return file


def beside(file: Path) -> Path:
    return file.parent / f"{file.name}.sha256"


def staged(path: Path, layout: Layout | None = None, fit: Fit = Fit()) -> bytes:  # noqa: B008  (frozen)
    with Checkpoint(path, digest="sha256") as checkpoint:
        plan = checkpoint.plan(layout or checkpoint.layout, fit)
        weights = bytearray(plan.layout.nbytes)
        checkpoint.read_into(memoryview(weights), plan)
    return bytes(weights)


def unchecked(path: Path, layout: Layout | None = None, fit: Fit = Fit()) -> bytes:  # noqa: B008
    with Checkpoint(path) as checkpoint:
        plan = checkpoint.plan(layout or checkpoint.layout, fit)
        weights = bytearray(plan.layout.nbytes)
        checkpoint.read_into(memoryview(weights), plan)
    return bytes(weights)


def spoil(file: Path, at: int = -1) -> None:
    """Another byte, as a broken disk or a bad copy leaves it: the same size, and no header is wrong."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    info = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))


LINES: dict[str, Callable[[Path], str]] = {
    "as sha256sum writes it": lambda f: f"{of(f)}  {f.name}\n",
    "binary": lambda f: f"{of(f)} *{f.name}\n",
    "in capitals, with CRLF": lambda f: f"{of(f).upper()}  {f.name}\r\n",
    "with ./": lambda f: f"{of(f)}  ./{f.name}\n",
    "with the path of where it was written": lambda f: f"{of(f)}  /elsewhere/run/{f.name}",
    "by --tag": lambda f: f"SHA256 ({f.name}) = {of(f)}\n",
    "alone": lambda f: f"{of(f)}\n",
    "of a pipe": lambda f: f"{of(f)}  -\n",
    "among others": lambda f: f"{'0' * 64}  other.safetensors\n{of(f)}  {f.name}\n{'1' * 64}  more\n",
    "of the right directory": lambda f: f"{'0' * 64}  x/{f.name}\n{of(f)}  {f.parent.name}/{f.name}\n",
    "grown by >>": lambda f: f"{'0' * 64}  {f.name}\n{of(f)}  {f.name}\n",
}


@pytest.mark.parametrize("form", LINES)
def test_every_form_of_sha256sum_is_read(form: str, tmp_path: Path) -> None:
    """Guards good weights that a list of another form would keep from going live, and the check under each form."""
    file = saved(tmp_path / "run" / "step_1.safetensors")
    beside(file).write_text(LINES[form](file))
    assert staged(file) == unchecked(file)
    spoil(file)
    os.utime(beside(file))
    with pytest.raises(WrongDigest, match="differ from those that were written"):
        staged(file)


TORN: dict[str, Callable[[Path], str]] = {
    "missing": lambda f: "",
    "cut": lambda f: f"{of(f)}  {f.name}"[:40],
    "cut in the name": lambda f: f"{of(f)}  {f.name}"[:-5],
    "of others": lambda f: f"{of(f)}  other.safetensors\n{of(f)}  more\n",
    "of no digest": lambda f: f"{'g' * 64}  {f.name}\n",
}


@pytest.mark.parametrize("form", TORN)
def test_without_its_digest_a_checkpoint_is_not_complete(form: str, tmp_path: Path) -> None:
    """Guards against weights that nobody vouches for, and against their refusal for ever."""
    file = saved(tmp_path / "step_1.safetensors")
    if text := TORN[form](file):
        beside(file).write_text(text)
    with pytest.raises(BeingWritten, match="not complete yet"):
        Checkpoint(file, digest="sha256")


def test_a_list_that_claims_gigabytes_is_not_read(tmp_path: Path) -> None:
    """Guards memory: a list of digests is data from elsewhere, too."""
    file = saved(tmp_path / "step_1.safetensors")
    with beside(file).open("wb") as sparse:
        sparse.truncate(1 << 33)
    with pytest.raises(MalformedCheckpoint, match="list of digests"):
        Checkpoint(file, digest="sha256")


def test_the_header_is_part_of_it(tmp_path: Path) -> None:
    """Guards a header whose bytes changed while all tensors are right: the names may be exchanged."""
    file = saved(tmp_path / "step_1.safetensors", {"a": torch.ones(4), "b": torch.zeros(4)})
    beside(file).write_text(of(file))
    spoiled = file.read_bytes().replace(b'"a"', b'"x"').replace(b'"b"', b'"a"').replace(b'"x"', b'"b"')
    file.write_bytes(spoiled)
    os.utime(beside(file))
    with pytest.raises(WrongDigest):
        staged(file)


@pytest.mark.parametrize(
    ("wanted", "fit"),
    [
        ({"a": torch.zeros(50_001), "b": torch.zeros(7, dtype=torch.float64)}, Fit(exclude=("c",))),
        ({"a": torch.zeros(50_001, dtype=torch.bfloat16), "b": torch.zeros(7)}, Fit(include=("a", "b"), cast=True)),
        ({"a": torch.zeros(50_001, dtype=torch.float64)}, Fit(strict=False, cast=True)),
    ],
    ids=["a part", "cast", "cast to wider"],
)  # fmt: skip
def test_what_is_left_out_or_cast_is_in_the_digest(
    wanted: dict[str, torch.Tensor], fit: Fit, tmp_path: Path, in_pieces: Callable[[int], None]
) -> None:
    """Guards equal weights with and without a digest under each way to fit them, and the check of all of the file."""
    in_pieces(1000)
    file, shape = saved(tmp_path / "step_1.safetensors"), saved(tmp_path / "layout.safetensors", wanted)
    with Checkpoint(shape) as other:
        layout = other.layout
    beside(file).write_text(of(file))
    assert staged(file, layout, fit) == unchecked(file, layout, fit) != bytes(layout.nbytes)
    for at in (-1, -4, -100_000, -200_060):  # one of each tensor, taken or not
        spoil(file, at)
        os.utime(beside(file))
        with pytest.raises(WrongDigest):
            staged(file, layout, fit)
        spoil(file, at)


def test_tied_and_infinite_weights_are_told_as_without_a_digest(tmp_path: Path) -> None:
    """Guards the other checks, which go with each piece that is read."""
    file = saved(tmp_path / "step_1.safetensors", {"a": torch.ones(4), "z": torch.ones(4)})
    beside(file).write_text(of(file))
    tied = Layout.build({"a": ("F32", (4,))}, {"z": "a"})
    assert staged(file, tied) == torch.ones(4).numpy().tobytes()
    saved(file, {"a": torch.ones(4), "z": torch.zeros(4)})
    beside(file).write_text(of(file))
    with pytest.raises(CheckpointMismatch, match="one tensor in the policy"):
        staged(file, tied)
    saved(file, {"a": torch.tensor([1.0, float("nan")])})
    beside(file).write_text(of(file))
    with pytest.raises(NonFiniteWeights):
        staged(file)


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the promise that what is checked is what is staged, and that a large file is not read twice."""
    file = saved(tmp_path / "step_1.safetensors")
    beside(file).write_text(of(file))
    read: list[tuple[int, int]] = []
    pieces = Files._pieces

    def counted(self: Files, number: int, start: int, nbytes: int) -> Any:
        read.append((start, nbytes))
        return pieces(self, number, start, nbytes)

    monkeypatch.setattr(Files, "_pieces", counted)
    monkeypatch.setattr(Files, "_fill", Files._fill)
    staged(file)
    (only,) = read
    assert sum(only) == file.stat().st_size


def sharded(folder: Path) -> list[Path]:
    folder.mkdir()
    names = {f"t{n}": f"model-{n + 1:05}-of-00002.safetensors" for n in range(2)}
    for tensor, name in names.items():
        save_file({tensor: torch.full((100,), 1.0)}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return [folder / name for name in names.values()]


def listed(files: list[Path], start: Path) -> str:
    return "".join(f"{of(file)}  {file.relative_to(start)}\n" for file in files)


@pytest.mark.parametrize("place", ["SHA256SUMS", "beside", "each"])
def test_a_directory_has_its_digests_within_or_beside_it(place: str, tmp_path: Path) -> None:
    """Guards each natural place of a list, every shard in it, and the index where it is listed."""
    files = sharded(tmp_path / "step_1")
    listing = {
        "SHA256SUMS": tmp_path / "step_1" / "SHA256SUMS",
        "beside": tmp_path / "step_1.sha256",
        "each": beside(files[1]),
    }[place]
    start = tmp_path if place == "beside" else tmp_path / "step_1"
    if place == "each":
        beside(files[0]).write_text(listed(files[:1], start))
    else:
        listing.write_text(listed(files[:1], start))
    with pytest.raises(BeingWritten, match="00002-of-00002"):
        Checkpoint(tmp_path / "step_1", digest="sha256")
    index = tmp_path / "step_1" / "model.safetensors.index.json"
    listing.write_text(listed([*files, index], start))
    assert staged(tmp_path / "step_1") == unchecked(tmp_path / "step_1")
    spoil(files[1])
    os.utime(listing)
    with pytest.raises(WrongDigest, match="00002-of-00002"):
        staged(tmp_path / "step_1")
    spoil(files[1])
    index.write_text(index.read_text() + " ")
    os.utime(listing)
    if place != "each":
        with pytest.raises(WrongDigest, match=r"index\.json"):
            staged(tmp_path / "step_1")


def adapter(folder: Path) -> tuple[Path, Path]:
    folder.mkdir()
    halves = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2)}
    save_file({f"base_model.model.0.{k}.weight": v for k, v in halves.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 16}')
    return folder / "adapter_model.safetensors", folder / "adapter_config.json"


def test_an_adapter_has_a_digest_of_its_configuration_too(tmp_path: Path) -> None:
    """Guards the scale, which stands in the configuration: another alpha is another policy."""
    base = saved(tmp_path / "base.safetensors", {"0.weight": torch.zeros(4, 4), "0.bias": torch.zeros(4)})
    weights, config = adapter(tmp_path / "step_1")
    with Checkpoint(base) as opened:
        layout = opened.layout
    fit, sums = Fit(base=str(base)), tmp_path / "step_1" / "SHA256SUMS"
    sums.write_text(listed([weights], tmp_path / "step_1"))
    with pytest.raises(BeingWritten, match="adapter_config"):
        Checkpoint(tmp_path / "step_1", digest="sha256")
    sums.write_text(listed([weights, config], tmp_path / "step_1"))
    assert staged(tmp_path / "step_1", layout, fit) == unchecked(tmp_path / "step_1", layout, fit)
    spoil(weights)
    os.utime(sums)
    with pytest.raises(WrongDigest, match="adapter_model"):
        staged(tmp_path / "step_1", layout, fit)
    spoil(weights)
    config.write_text(config.read_text().replace("16", "17"))
    os.utime(sums)
    with pytest.raises(WrongDigest, match="adapter_config"):
        staged(tmp_path / "step_1", layout, fit)


def test_an_adapter_is_merged_from_the_very_bytes_that_were_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a disk that gives other bytes when it is asked again: the halves are not read a second time."""
    base = saved(tmp_path / "base.safetensors", {"0.weight": torch.zeros(4, 4), "0.bias": torch.zeros(4)})
    weights, config = adapter(tmp_path / "step_1")
    (tmp_path / "step_1" / "SHA256SUMS").write_text(listed([weights, config], tmp_path / "step_1"))
    with Checkpoint(base) as opened:
        layout = opened.layout
    fit = Fit(base=str(base))
    right, real = unchecked(tmp_path / "step_1", layout, fit), Files.read

    def read(self: Files, file: int, nbytes: int, start: int) -> bytes:
        return bytes(nbytes) if nbytes == 32 else real(self, file, nbytes, start)  # the size of one half

    monkeypatch.setattr(Files, "read", read)
    assert unchecked(tmp_path / "step_1", layout, fit) != right
    assert staged(tmp_path / "step_1", layout, fit) == right


def test_the_header_is_covered(tmp_path: Path) -> None:
    """Guards the names and the step, which stand in the header: what is compared begins with a file's first byte."""
    file = tmp_path / "step_1.safetensors"
    save_file(FLOATS, file, metadata={"step": "1"})
    beside(file).write_text(of(file))
    assert staged(file) == unchecked(file)
    file.write_bytes(file.read_bytes().replace(b'"step":"1"', b'"step":"2"'))
    os.utime(beside(file))
    with pytest.raises(WrongDigest):
        staged(file)


@pytest.fixture
def syncer(segment: Segment, runs: Path, layouts_here: None) -> Callable[[], Syncer]:
    spec = load_spec("policies:mlp", name=segment.name)
    spec = replace(spec, select=Select(digest="sha256"))
    return lambda: Syncer(spec, runs)


@pytest.mark.slow
def test_a_push_waits_for_the_digest_and_refuses_a_wrong_one_for_good(syncer: Callable[[], Syncer], runs: Path) -> None:
    """Guards each outcome: not complete without it, rejected and remembered with a wrong one, else live."""
    file = write(runs / "step_1.safetensors", mlp(), 1.0)
    with syncer() as each:
        assert each.once().status == "empty"
        beside(file).write_text(of(file))
        assert each.once().status == "published"
        file = write(runs / "step_2.safetensors", mlp(), 2.0)
        beside(file).write_text(of(file))
        spoil(file)
        os.utime(beside(file))
        first, second = each.once(), each.once()
        assert (first.status, first.kind, second.status) == ("rejected", "digest", "rejected")
        assert (first.version, second.version) == (1, 1)
        looked = inspect(file, spec=each.spec, scan_values=True)
        assert (looked["complete"], looked["kind"]) == (False, "digest")
        (runs / "step_2.safetensors.sha256").unlink()
        assert "not complete" in inspect(file, spec=each.spec)["reason"]


def test_a_digest_that_is_older_than_its_weights_is_waited_for(syncer: Callable[[], Syncer], runs: Path) -> None:
    """Guards a file that is written again in its place: the digest of the state before refuses nothing."""
    file = write(runs / "step_1.safetensors", mlp(), 1.0)
    beside(file).write_text(of(file))
    with syncer() as each:
        assert each.once().status == "published"
        write(file, mlp(), 2.0)
        waits = each.once()
        assert waits.version == 1 and "older than the file" in (waits.reason or "")
        beside(file).write_text(of(file))
        assert (each.once().status, each.standing.segment and each.standing.segment.version) == ("published", 2)


def test_a_pinned_checkpoint_is_compared_too(segment: Segment, runs: Path, runtime: Path) -> None:
    """Guards a pin that is published, by a named file or after a reboot: its digest is waited for, and compared."""
    file = write(runs / "step_1.safetensors", mlp(), 1.0)
    spec = replace(load_spec("policies:mlp", name=segment.name), select=Select(digest="sha256"))
    with State(segment.name) as state, Syncer(spec, runs, state=state) as each:
        pin_checkpoint(segment.name, str(file), runtime=runtime, state=state)
        waits = each.once()
        assert waits.version == 0 and "neither step_1.safetensors.sha256" in (waits.reason or "")
        beside(file).write_text("0" * 64)
        assert each.once().kind == "digest"
        beside(file).write_text(of(file))
        assert [each.once().status for _ in range(2)] == ["published", "pinned"]


def test_the_command_has_an_option_for_it(cli: Cli, segment: Segment, runs: Path) -> None:
    """Guards ``--digest``, and a word for what it is not."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    done = cli("push", "policies:mlp", str(runs), "--name", segment.name, "--digest", "sha256")
    assert done.returncode == 66 and "step_1.safetensors.sha256" in done.stdout + done.stderr
    done = cli("push", "policies:mlp", str(runs), "--name", segment.name, "--digest", "md5")
    assert done.returncode == 2 and "digest = 'md5'" in done.stderr


def test_objects_of_a_store_have_their_digests_beside_them(bucket: Bucket, tmp_path: Path) -> None:
    """Guards the same in a store, where a named object is listed without its neighbours."""
    file = saved(tmp_path / "step_1.safetensors")
    bucket.put("run/step_1.safetensors", file.read_bytes())
    url: Any = "s3://bucket/run/step_1.safetensors"
    with pytest.raises(BeingWritten):
        Checkpoint(url, digest="sha256")
    bucket.put("run/step_1.safetensors.sha256", of(file).encode())
    assert staged(url) == unchecked(file)
    bucket.put("run/step_1.safetensors.sha256", b"0" * 64)
    with pytest.raises(WrongDigest):
        staged(url)


def test_spec_takes_the_setting(tmp_path: Path) -> None:
    """Guards the table of the TOML."""
    (tmp_path / "a.toml").write_text('policy = "policies:mlp"\n[select]\ndigest = "sha256"\n')
    spec: Spec = load_spec(str(tmp_path / "a.toml"))
    assert spec.select.digest == "sha256"
