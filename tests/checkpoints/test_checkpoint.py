"""One checkpoint: every honest file is read to the bit, every other one is refused by the right error, and soon."""

from __future__ import annotations

import mmap
import os
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import policies
import pytest
import torch
from builders import raw, write
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file, save_model

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.checkpoints.files.parts import identity
from wsync.checkpoints.step_number import read_step
from wsync.errors import (
    CheckpointChanged,
    CheckpointError,
    CheckpointMismatch,
    IncompleteCheckpoint,
    MalformedCheckpoint,
    NoCheckpoint,
    NonFiniteWeights,
)
from wsync.fitting.fit import Fit
from wsync.layout import finite
from wsync.layout.filenames import SINGLE
from wsync.layout.layout import TORCH_DTYPES, Layout, layout_of

MAX_HEADER = 100_000_000  # bytes; the official reader's bound
Progress = Callable[[int], None]
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture(autouse=True)
def promptly() -> Iterator[None]:
    """Nothing here may hang: a FIFO, a header of numbers without end, a loop over a file that shrinks."""

    def give_up(*_: object) -> None:
        raise AssertionError("not done in 20 seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read(path: Path, layout: Layout | None = None, *, finite: bool = True, progress: Progress | None = None) -> bytes:
    """The weights of a file in a layout's order, by default its own; the memory starts as garbage."""
    with Checkpoint(path) as checkpoint:
        layout = layout or checkpoint.layout
        weights = bytearray(b"\xa5" * layout.nbytes)
        checkpoint.read_into(memoryview(weights), checkpoint.plan(layout), finite=finite, progress=progress)
        return bytes(weights)


def row(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy()) if tensor.numel() else b""


def patterns(dtype: str, *shape: int) -> torch.Tensor:
    """A tensor of finite values, all different bytes where the dtype has that many."""
    kind: torch.dtype = getattr(torch, TORCH_DTYPES[dtype])
    count = int(np.prod(shape))
    if dtype == "BOOL":
        return (torch.arange(count) % 3 == 0).view(shape)
    generator = torch.Generator().manual_seed(count)
    if kind.is_floating_point or kind.is_complex:
        return (torch.rand(count, generator=generator) + 0.5).to(kind).view(shape)
    return (
        torch.randint(0, 256, (count * kind.itemsize,), generator=generator, dtype=torch.uint8).view(kind).view(shape)
    )


# Honest files


@pytest.mark.parametrize("dtype", [dtype for dtype in TORCH_DTYPES if dtype != "F4"])  # of which torch makes no values
def test_each_dtype_is_read_to_the_bit(dtype: str, tmp_path: Path) -> None:
    """Guards that matrices, scalars and empty tensors of each dtype come out as the official writer put them in."""
    state = {"matrix": patterns(dtype, 5, 3), "scalar": patterns(dtype), "empty": patterns(dtype, 0, 4)}
    save_file(state, tmp_path / "a.safetensors")
    with Checkpoint(tmp_path / "a.safetensors") as checkpoint:
        entries = {e.name: e for e in checkpoint.layout.tensors}
    weights = read(tmp_path / "a.safetensors")
    for name, tensor in state.items():
        assert entries[name].shape == tensor.shape
        assert weights[entries[name].offset :][: entries[name].nbytes] == bits(tensor)


@pytest.mark.parametrize("chunk", [8, 16, 24, 64, 1 << 20])
def test_a_file_of_any_order_and_chunk_is_read_to_the_bit(
    chunk: int, tmp_path: Path, in_pieces: Callable[[int], None]
) -> None:
    """Guards the split at chunks and the scatter into a layout whose order is not the file's, aligned or not."""
    in_pieces(chunk)
    sizes = {"BOOL": 3, "F32": 17, "I64": 5, "BF16": 9, "U8": 13, "F64": 4, "F16": 1, "F8_E4M3": 7, "C64": 3, "I16": 0}
    header, data = {}, b""
    for dtype, count in sizes.items():  # no order that any writer has: floats begin at odd bytes
        piece = bits(patterns(dtype, count))
        header[f"x.{dtype}"] = row(dtype, [count], len(data), len(data) + len(piece))
        data += piece
    path = raw(tmp_path / "a.safetensors", header, data)
    counted: list[int] = []
    weights = read(path, progress=counted.append)
    with safe_open(path, "pt") as official, Checkpoint(path) as checkpoint:
        assert weights == b"".join(bits(official.get_tensor(e.name)) for e in checkpoint.layout.tensors)
    assert sum(counted) == len(weights)
    assert max(counted) <= chunk


@pytest.mark.parametrize("chunk", [8, 40])
def test_reads_keep_elements_whole(chunk: int, tmp_path: Path, read_by: Callable[..., None]) -> None:
    """Guards that no read ends inside an element, which the finite check would then see by halves."""
    read_by(chunk=chunk)
    header = {"a": row("U8", [3], 0, 3), "b": row("F64", [9], 3, 75), "c": row("U8", [1], 75, 76)}
    path = raw(tmp_path / "a.safetensors", {**header, "d": row("F64", [2], 76, 92)}, bytes(92))
    with Checkpoint(path) as checkpoint:
        layout = checkpoint.layout
        reads = checkpoint.plan(layout).reads
    assert sum(r.nbytes for r in reads) == 92 and max(r.nbytes for r in reads) <= chunk
    assert all(before.start + before.nbytes == after.start for before, after in pairwise(reads))
    doubles = [e for e in layout.tensors if e.dtype == "F64"]
    for begin, end in [(at, at + size) for r in reads for at, size in r.slices]:
        assert all(
            (edge - e.offset) % 8 == 0
            for edge in (begin, end)
            for e in doubles
            if e.offset < edge < e.offset + e.nbytes
        )


def test_a_contiguous_file_takes_few_reads(tmp_path: Path) -> None:
    """Guards the cost: 64 MiB in the layout's own order are at most 16 reads, each into one piece of the weights."""
    size = 1 << 20
    header = {f"layer.{n:02}": row("F32", [size // 4], n * size, (n + 1) * size) for n in range(64)}
    path = raw(tmp_path / "a.safetensors", header)
    os.truncate(path, path.stat().st_size + 64 * size)
    with Checkpoint(path) as checkpoint:
        plan = checkpoint.plan(checkpoint.layout)
    assert len(plan.reads) <= 16
    assert all(len(r.slices) == 1 for r in plan.reads)


def test_many_small_tensors_share_a_read(tmp_path: Path) -> None:
    """Guards that thousands of tensors in a foreign order are gathered, within what one system call takes."""
    count = 3000
    header = {f"{count - n:05}": row("F32", [1], 4 * n, 4 * n + 4) for n in range(count)}
    values = np.arange(count, dtype="<f4")
    path = raw(tmp_path / "a.safetensors", header, values.tobytes())
    counted: list[int] = []
    assert read(path, progress=counted.append) == values[::-1].tobytes()
    assert len(counted) <= 8


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that a system that hands out few bytes at a time gives the same weights."""
    state = {"a": patterns("F32", 7), "b": patterns("F64", 3), "c": patterns("BOOL", 5), "d": patterns("U8", 4)}
    save_file(state, tmp_path / "a.safetensors")
    whole = read(tmp_path / "a.safetensors")
    header = {"c": row("BOOL", [5], 0, 5), "a": row("F32", [7], 5, 33), "d": row("U8", [4], 33, 37)}
    data = b"".join(bits(state[name]) for name in "cadb")
    shuffled = raw(tmp_path / "b.safetensors", {**header, "b": row("F64", [3], 37, 61)}, data)
    real, asked = os.preadv, [1, 3, 5, 2]

    def stingy(fd: int, buffers: list[memoryview], start: int) -> int:
        asked.append(asked.pop(0))
        wanted = min(asked[-1], sum(map(len, buffers)))
        return real(fd, [b[: max(0, wanted - sum(map(len, buffers[:n])))] for n, b in enumerate(buffers)], start)

    monkeypatch.setattr(os, "preadv", stingy)
    assert read(shuffled) == whole


def test_a_header_longer_than_the_first_read(tmp_path: Path) -> None:
    """Guards that a header of more than 64 KiB is read to its end."""
    state = {f"{'x' * 200}.{n}": torch.full((2,), float(n)) for n in range(600)}
    save_file(state, tmp_path / "a.safetensors")
    with Checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        assert sum(t.nbytes for t in checkpoint.tensors.values()) == 4800


def test_a_closed_checkpoint_holds_no_descriptor(tmp_path: Path) -> None:
    """Guards that neither a read, nor a double close, nor a refusal leaves a descriptor open."""
    good = write(tmp_path / "a.safetensors", policies.mlp(), 1.0)
    bad = raw(tmp_path / "b.safetensors", b"{")
    before = len(os.listdir("/proc/self/fd"))
    with Checkpoint(good) as checkpoint:
        checkpoint.close()
    for refused, error in ((bad, MalformedCheckpoint), (tmp_path, NoCheckpoint)):
        with pytest.raises(error):
            Checkpoint(refused)
    assert len(os.listdir("/proc/self/fd")) == before


# Fit


def test_what_does_not_fit_is_listed_whole(tmp_path: Path) -> None:
    """Guards that missing, unknown, reshaped and recast tensors are all named, with what was expected and found."""
    save_file(
        {
            "0.weight": torch.zeros(4, 8),
            "0.bias": torch.zeros(8).half(),
            "2.bias": torch.zeros(2),
            "extra": torch.zeros(1),
        },
        tmp_path / "a.safetensors",
    )
    with pytest.raises(CheckpointMismatch, match=r"extra +absent +F32 \[1\]") as caught:
        read(tmp_path / "a.safetensors", layout_of(policies.mlp()))
    assert [(d.name, d.expected, d.found) for d in caught.value.differences] == [
        ("0.bias", "F32 [8]", "F16 [8]"),
        ("0.weight", "F32 [8, 4]", "F32 [4, 8]"),
        ("2.weight", "F32 [2, 8]", "absent"),
        ("extra", "absent", "F32 [1]"),
    ]


TIED = {"embedding.weight", "head.weight"}


@pytest.mark.parametrize("kept", [("embedding.weight",), ("head.weight",), ("embedding.weight", "head.weight")])
def test_tied_weights_fit_under_any_of_their_names(kept: tuple[str, ...], tmp_path: Path) -> None:
    """Guards that a tied tensor may be stored under its first name, an alias, or under both where they are equal."""
    policy = policies.Tied()
    state = {name: t.clone() for name, t in policy.state_dict().items() if name not in TIED - {*kept}}
    save_file(state, tmp_path / "a.safetensors")
    layout = layout_of(policy)
    tied = next(e for e in layout.tensors if e.aliases)
    weights = read(tmp_path / "a.safetensors", layout)
    assert weights[tied.offset :][: tied.nbytes] == bits(policy.embedding.weight.detach())


def test_a_file_of_save_model_fits(tmp_path: Path) -> None:
    """Guards that the official way to save a tied policy is read as it stands: one copy, in the layout's order."""
    policy = policies.Tied()
    save_model(policy, str(tmp_path / "a.safetensors"))
    content = (tmp_path / "a.safetensors").read_bytes()
    assert content.endswith(read(tmp_path / "a.safetensors", layout_of(policy)))


@pytest.mark.parametrize("at", [0, 7, -1])
def test_two_copies_that_differ_are_refused(at: int, tmp_path: Path, in_pieces: Callable[[int], None]) -> None:
    """Guards that a tie is never broken silently: one differing byte, in any chunk, names the alias."""
    in_pieces(16)
    state = {name: t.clone() for name, t in policies.Tied().state_dict().items()}
    state["head.weight"].view(-1)[at] += 1
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointMismatch) as caught:
        read(tmp_path / "a.safetensors", layout_of(policies.Tied()))
    assert [d.name for d in caught.value.differences] == ["head.weight"]


@pytest.mark.parametrize(
    ("name", "metadata", "step"),
    [
        ("step_12.safetensors", {}, 12),
        ("step_12.safetensors", {"step": "7"}, 7),
        ("step_12.safetensors", {"step": " -7 "}, -7),
        ("step_12.safetensors", {"step": "soon"}, 12),
        ("step_12.safetensors", {"step": "9" * 5000}, 12),
        ("run3_step_0012.safetensors", {"format": "pt"}, 12),
        ("latest.safetensors", {}, None),
        ("latest.safetensors", {"step": ""}, None),
        ("9" * 40 + ".safetensors", {}, 10**18 - 1),
        ("t1732536000123456789.safetensors", {}, 1732536000123456789),
        ("step_12.safetensors", {"step": "1732536000123456789"}, 1732536000123456789),
        ("step_12.safetensors", {"step": f"{2**63}"}, 12),
        ("step_12.safetensors", {"step": f"-{2**63 - 1}"}, -(2**63 - 1)),
    ],
)
def test_the_step_is_the_producers(name: str, metadata: dict[str, str], step: int | None, tmp_path: Path) -> None:
    """Guards where the step comes from: the metadata, else the last integer of the name, else nowhere."""
    assert read_step(name, metadata).number == step
    with Checkpoint(raw(tmp_path / name, {"__metadata__": metadata, "a": F32}, bytes(8))) as checkpoint:
        assert (checkpoint.step, checkpoint.metadata) == (step, metadata)


# Finite


NON_FINITE = {
    "F64": [0x7FF0 << 48, 0xFFF0 << 48, 0x7FF8 << 48, 0xFFF0 << 48 | 1, (1 << 64) - 1],
    "F32": [0x7F80 << 16, 0xFF80 << 16, 0x7FC0 << 16, 0x7F80 << 16 | 1, (1 << 32) - 1],
    "C64": [0x7F80 << 16, 0xFF80 << 48, 0x7FC0 << 16, 0xFFC0 << 48],
    "F16": [0x7C00, 0xFC00, 0x7E00, 0xFC01, 0xFFFF],
    "BF16": [0x7F80, 0xFF80, 0x7FC0, 0xFF81, 0xFFFF],
    "F8_E5M2": [0x7C, 0xFC, 0x7D, 0xFF],
    "F8_E4M3": [0x7F, 0xFF],
    "F8_E4M3FNUZ": [0x80],
    "F8_E5M2FNUZ": [0x80],
    "F8_E8M0": [0xFF],
}
"""NaN and infinity of either sign, quiet and signalling, as the bits of one little-endian element."""

LARGEST = {
    "F64": 0xFFEF << 48 | 0xFFFF_FFFF_FFFF,
    "F32": 0xFF7F_FFFF,
    "C64": 0xFF7F_FFFF_FF7F_FFFF,
    "F16": 0xFBFF,
    "BF16": 0xFF7F,
    "F8_E5M2": 0xFB,
    "F8_E4M3": 0xFE,
    "F8_E4M3FNUZ": 0xFF,
    "F8_E5M2FNUZ": 0xFF,
    "F8_E8M0": 0xFE,
}
"""The negative finite value that is largest (of F8_E8M0, which has no sign, the largest)."""

WIDTH = {dtype: getattr(torch, TORCH_DTYPES[dtype]).itemsize for dtype in NON_FINITE}


def filled(path: Path, dtype: str, count: int, fill: int, at: int | None = None, odd: int = 0) -> Path:
    """A file of one tensor between two of bytes that no check may look at, with an odd element in it."""
    elements = [fill] * count
    if at is not None:
        elements[at] = odd
    data = b"".join(e.to_bytes(WIDTH[dtype], "little") for e in elements)
    end = 3 + len(data)
    header = {"a": row("U8", [3], 0, 3), "w": row(dtype, [count], 3, end), "z": row("I8", [9], end, end + 9)}
    return raw(path, header, b"\xff" * 3 + data + b"\x7f" * 9)


@pytest.fixture
def small_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the finite check look at a few bytes at a time."""
    monkeypatch.setattr(finite, "_PIECE", 16)


@pytest.mark.parametrize(
    ("dtype", "value"), [(dtype, value) for dtype, values in NON_FINITE.items() for value in values]
)
@pytest.mark.usefixtures("small_looks")
def test_nan_and_infinity_are_refused_wherever_they_are(
    dtype: str, value: int, tmp_path: Path, in_pieces: Callable[[int], None]
) -> None:
    """Guards each non-finite pattern of each dtype: first, last, in the middle, on both sides of a chunk's border."""
    in_pieces(32)
    count = 96 // WIDTH[dtype] + 1
    border = 32 // WIDTH[dtype]
    for at in {0, count // 2, border - 1, border, 2 * border - 1, count - 1}:
        path = filled(tmp_path / f"{at}.safetensors", dtype, count, LARGEST[dtype] & 0x3C3C, at, value)
        with pytest.raises(NonFiniteWeights, match="trainer") as caught:
            read(path)
        assert [d.name for d in caught.value.differences] == ["w"], at
        read(path, finite=False)


@pytest.mark.parametrize("dtype", NON_FINITE)
@pytest.mark.usefixtures("small_looks")
def test_the_largest_values_are_finite(dtype: str, tmp_path: Path) -> None:
    """Guards that values whose squares overflow, subnormals and -0 pass, also as the only element."""
    top = 1 << (8 * WIDTH[dtype] - 1)
    values = [LARGEST[dtype], LARGEST[dtype] & ~top, 1, 0] + ([] if "FNUZ" in dtype else [top, top | 1])
    for count in (1, 300):
        for value in values:
            read(filled(tmp_path / "a.safetensors", dtype, count, value))


@pytest.mark.usefixtures("small_looks")
def test_nan_among_the_largest_values_is_found(tmp_path: Path) -> None:
    """Guards that the overflow of the quick check does not excuse a real NaN or infinity beside it."""
    for value in NON_FINITE["F32"]:
        with pytest.raises(NonFiniteWeights):
            read(filled(tmp_path / "a.safetensors", "F32", 300, LARGEST["F32"], 299, value))


@pytest.mark.parametrize("dtype", ["I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL"])
def test_integers_that_look_like_nan_pass(dtype: str, tmp_path: Path) -> None:
    """Guards that only floats are checked: all ones are NaN in a float, and -1 or a mask in an integer."""
    size = getattr(torch, TORCH_DTYPES[dtype]).itemsize
    data = b"\xff" * (3 * size) if dtype != "BOOL" else b"\1\0\1"
    assert read(raw(tmp_path / "a.safetensors", {"x": row(dtype, [3], 0, len(data))}, data)) == data


def test_nan_in_a_policy_with_integers_is_refused(tmp_path: Path) -> None:
    """Guards the ordinary diverged policy with a BatchNorm, whose count of batches is an integer."""
    with pytest.raises(NonFiniteWeights, match="running_mean"):
        state = {"n": torch.tensor(3), "running_mean": torch.tensor([float("nan")])}
        save_file(state, tmp_path / "a.safetensors")
        read(tmp_path / "a.safetensors")


def test_nan_in_any_one_of_the_tensors_is_refused(tmp_path: Path) -> None:
    """Guards that the check reaches every tensor of a policy, and names just the one that is ill."""
    for ill in (policy := policies.mlp()).state_dict():
        state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        state[ill].view(-1)[-1] = float("nan")
        save_file(state, tmp_path / "a.safetensors")
        with pytest.raises(NonFiniteWeights) as caught:
            read(tmp_path / "a.safetensors")
        assert [d.name for d in caught.value.differences] == [ill]


def test_every_tensor_with_nan_is_named(tmp_path: Path) -> None:
    """Guards that the message names all diverged tensors, scalars among them, and none of the sound ones."""
    state = {
        "a": torch.tensor(float("nan")),
        "b": torch.ones(3),
        "c": torch.tensor([1.0, float("-inf")], dtype=torch.bfloat16),
        "d": torch.zeros(0),
        "e": torch.tensor([float("inf")], dtype=torch.float64),
    }
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(NonFiniteWeights) as caught:
        read(tmp_path / "a.safetensors")
    assert sorted(d.name for d in caught.value.differences) == ["a", "c", "e"]


# Files that are not whole, or change


def test_checkpoints_of_one_run_are_recognised(tmp_path: Path) -> None:
    """Guards that a header like the last one is neither parsed nor planned anew, and is still held against its file."""
    state = {f"w{n}": torch.full((4,), float(n)) for n in range(3)}
    paths = [tmp_path / f"{step}.safetensors" for step in ("10", "20", "30", "4" * 20)]
    for path in paths:
        save_file(state, path, metadata={"step": path.stem})
    with Checkpoint(paths[0]) as first, Checkpoint(paths[1]) as second, Checkpoint(paths[3]) as longer:
        assert second.tensors is first.tensors and second.metadata == {"step": "20"}
        plan = first.plan(first.layout)
        assert second.plan(plan.layout) is plan
        assert second.plan(plan.layout, Fit(include=("w*",))) is not plan
        shift = longer.tensors["w0"].start - first.tensors["w0"].start
        assert shift > 0
        assert longer.tensors == {n: t._replace(start=t.start + shift) for n, t in first.tensors.items()}
    os.truncate(paths[2], paths[2].stat().st_size - 1)
    with pytest.raises(IncompleteCheckpoint):
        Checkpoint(paths[2])
    assert read(paths[1]) == read(paths[0])


def test_a_huge_header_is_not_remembered(tmp_path: Path) -> None:
    """Guards against a watch that keeps what a hostile file filled its header with."""
    save_file({"w": torch.ones(4)}, path := tmp_path / "a.safetensors", {"filler": "x" * (5 << 20)})
    with Checkpoint(path) as first, Checkpoint(path) as second:
        assert second.tensors == first.tensors and second.tensors is not first.tensors


@pytest.mark.slow
def test_every_truncation_is_incomplete(tmp_path: Path) -> None:
    """Guards that a file cut at any byte, or still empty, is "not yet" (66) and never rejected for good."""
    content = write(tmp_path / "a.safetensors", policies.mlp(2), 1.0, step=1).read_bytes()
    cuts = [tmp_path / f"{length}.safetensors" for length in range(len(content))]
    for length, cut in enumerate(cuts):  # all are written before one is opened, which would wait for its last write
        cut.write_bytes(content[:length])
    for length, cut in enumerate(cuts):
        with pytest.raises(IncompleteCheckpoint, match=f"{length:,} bytes"):
            Checkpoint(cut)


Change = Callable[[Path], object]


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")


def put_back(path: Path) -> None:
    """Writes into a file and puts its times back, as ``cp -p``, ``tar`` and ``rsync --inplace -t`` do."""
    info = path.stat()
    overwrite(path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


CHANGES: dict[str, Change] = {
    "overwritten": overwrite,
    "overwritten, its times put back": put_back,
    "emptied": lambda path: os.truncate(path, 0),
    "one byte shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one byte longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "touched": lambda path: os.utime(path),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before the read", "amid the read", "after the last read"])
def test_a_file_that_changes_while_it_is_read(
    when: str, change: str, tmp_path: Path, in_pieces: Callable[[int], None]
) -> None:
    """Guards that what was written into while it was open is thrown away (75), whatever the moment."""
    in_pieces(64)
    path = write(tmp_path / "a.safetensors", policies.mlp(), 1.0)
    reads: list[int] = []
    with Checkpoint(path) as checkpoint:
        plan = checkpoint.plan(checkpoint.layout)
        at = {"before the read": 0, "amid the read": 1, "after the last read": len(plan.reads)}[when]
        if not at:
            CHANGES[change](path)

        def progress(nbytes: int) -> None:
            reads.append(nbytes)
            if len(reads) == at:
                CHANGES[change](path)

        with pytest.raises(CheckpointChanged):
            checkpoint.read_into(memoryview(bytearray(plan.layout.nbytes)), plan, progress=progress)
    assert len(reads) >= at


def test_a_writer_through_a_mapping_is_seen_in_shared_memory(runtime: Path) -> None:
    """Guards against a mixture on tmpfs, where what is written through a mapping changes no time of the file."""
    runtime.mkdir(exist_ok=True)
    path = write(runtime / "a.safetensors", policies.mlp(), 1.0)
    with Checkpoint(path) as checkpoint:
        plan, before = checkpoint.plan(checkpoint.layout), identity(path.stat())
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            assert mapped[-4:]  # a page that was read before it is written to
            mapped[-4:] = b"\0" * 4
            assert identity(path.stat()) == before
            with pytest.raises(CheckpointChanged):
                checkpoint.read_into(memoryview(bytearray(plan.layout.nbytes)), plan)


def test_a_change_comes_before_nan(tmp_path: Path) -> None:
    """Guards that NaN read out of a file that a writer was at does not reject it: it is only read again."""
    path = write(tmp_path / "a.safetensors", policies.mlp(), float("nan"))
    with pytest.raises(CheckpointChanged):
        read(path, progress=lambda _: os.truncate(path, path.stat().st_size + 1))


@pytest.mark.parametrize("then", ["replaced", "removed", "renamed"])
def test_a_file_that_is_replaced_while_it_is_read_stays_whole(then: str, tmp_path: Path) -> None:
    """Guards that a rename over an open checkpoint, or of it, or its removal, changes nothing about what is read."""
    path = write(tmp_path / "a.safetensors", policies.mlp(), 1.0)
    other = write(tmp_path / "b.safetensors", policies.mlp(), 2.0)

    def act(_: int) -> None:
        if then == "removed":
            path.unlink()
        elif then == "renamed":
            path.rename(tmp_path / "c.safetensors")
        else:
            other.replace(path)

    weights = read(path, progress=act)
    assert set(np.frombuffer(weights, "<f4")) == {1.0}


@pytest.mark.parametrize(("age", "waited"), [(0.001, True), (0.5, False), (-3.0, False)])
def test_a_file_of_this_very_tick_is_not_trusted_yet(
    age: float, waited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards that a later write shows in the time: opening waits out the tick of the last one, and never longer."""
    path = write(tmp_path / "a.safetensors", policies.mlp(), 1.0)
    asked: list[float] = []
    monkeypatch.setattr(time, "time", lambda: path.stat().st_mtime + age)
    monkeypatch.setattr(time, "sleep", asked.append)
    Checkpoint(path).close()
    assert bool(asked) == waited
    assert all(0 < seconds <= 0.05 for seconds in asked)


def test_the_identity_is_that_of_the_opened_file(tmp_path: Path) -> None:
    """Guards that a checkpoint is remembered by device, inode, size and time, each of which tells."""
    path = write(tmp_path / "a.safetensors", policies.mlp(), 1.0)
    with Checkpoint(path) as checkpoint:
        assert checkpoint.identity == identity(path.stat())
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert identity(path.stat()) != identity(before)
    write(path, policies.mlp(), 1.0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert identity(path.stat()) != identity(before)


# Files that are none


def entry(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]", more: str = "") -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


def one(**fields: str) -> str:
    return f'{{"a":{entry(**fields)}}}'


def two(shape: str, offsets: str) -> str:
    return f'{{"a":{entry()},"b":{entry(shape=shape, offsets=offsets)}}}'


HEADERS: dict[str, tuple[str | bytes, int]] = {
    "a tensor": (one(), 8),
    "no tensor": ("{}", 0),
    "a scalar": (one(shape="[]", offsets="[0,4]"), 4),
    "an empty tensor": (one(shape="[3,0]", offsets="[0,0]"), 0),
    "an empty tensor at the end": (two("[0]", "[8,8]"), 8),
    "an empty tensor before its elder": (two("[0]", "[0,0]"), 8),
    "a huge empty tensor": (one(shape="[0,4611686018427387904,8]", offsets="[0,0]"), 0),
    "a hundred dimensions": (one(shape=f"[{','.join('1' * 100)}]", offsets="[0,4]"), 4),
    "space around": (" \n\t" + one() + " \r\n", 8),
    "fields in another order": ('{"a":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}', 8),
    "metadata at the end": (f'{{"a":{entry()},"__metadata__":{{"x":"y"}}}}', 8),
    "metadata null": (f'{{"__metadata__":null,"a":{entry()}}}', 8),
    "a name that is empty": (f'{{"":{entry()}}}', 8),
    "a name with an escape": (f'{{"\\ud83d\\ude00\\u0000":{entry()}}}', 8),
    "half bytes": (one(dtype='"F4"', shape="[4]", offsets="[0,2]"), 2),
    "six bits": (one(dtype='"F6_E2M3"', shape="[4]", offsets="[0,3]"), 3),
    "half a byte more than given": (one(dtype='"F4"', shape="[3]", offsets="[0,1]"), 1),
    "half a byte too little": (one(dtype='"F4"', shape="[3]", offsets="[0,2]"), 2),
    "no header": ("", 0),
    "not JSON": ("garbage", 0),
    "JSON cut short": (one()[:-1], 8),
    "JSON and more": (one() + "}", 8),
    "JSON and NUL": (one() + "\0\0", 8),
    "a byte order mark": ("\ufeff" + one(), 8),
    "a trailing comma": (f'{{"a":{entry()},}}', 8),
    "not UTF-8": (b'{"\xff":' + entry().encode() + b"}", 8),
    "UTF-8 of a surrogate": (b'{"\xed\xa0\x80":' + entry().encode() + b"}", 8),
    "a control character": (f'{{"a\n":{entry()}}}', 8),
    "a list": ("[]", 0),
    "null": ("null", 0),
    "a number": ("1", 0),
    "NaN as JSON": (one(shape="[NaN]"), 8),
    "deep nesting": ("[" * 100_000, 0),
    "deep nesting of tables": ('{"a":' * 100_000, 0),
    "a deep tensor": ('{"a":' + "[" * 100 + "]" * 100 + "}", 0),
    "metadata of a number": (f'{{"__metadata__":{{"step":1}},"a":{entry()}}}', 8),
    "metadata of null": (f'{{"__metadata__":{{"step":null}},"a":{entry()}}}', 8),
    "metadata of text": (f'{{"__metadata__":"step","a":{entry()}}}', 8),
    "metadata twice, of strings": (f'{{"__metadata__":{{"x":"y"}},"a":{entry()},"__metadata__":{{"x":"y"}}}}', 8),
    "metadata, then null": (f'{{"__metadata__":{{"x":"y"}},"a":{entry()},"__metadata__":null}}', 8),
    "nothing after a comma": ('{"__metadata__":{"x":"y"},}', 0),
    "nothing before a comma": (f'{{"__metadata__":{{"x":"y"}},,"a":{entry()}}}', 8),
    "metadata twice": (f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{entry()}}}', 8),
    "an unknown field": (one(more=',"more":1'), 8),
    "an unknown field of minus zero": (one(more=',"more":-0'), 8),
    "an unknown field of 300 digits": (one(more=f',"more":{"9" * 300}'), 8),
    "an unknown field of 400 digits": (one(more=f',"more":{"9" * 400}'), 8),
    "an unknown field beyond all floats": (one(more=',"more":[1e999]'), 8),
    "an unknown field of half a surrogate": (one(more=',"more":{"x":"\\ud800"}'), 8),
    "an unknown field of two halves": (one(more=',"more":"\\ud83d\\ude00"'), 8),
    "an unknown field of 125 lists": (one(more=f',"more":{"[" * 125 + "]" * 125}'), 8),
    "an unknown field of 126 lists": (one(more=f',"more":{"[" * 126 + "]" * 126}'), 8),
    "an unknown field of 126 tables": (one(more=',"more":' + '{"a":' * 126 + "1" + "}" * 126), 8),
    "metadata of half a surrogate": (f'{{"__metadata__":{{"x":"\\udc00"}},"a":{entry()}}}', 8),
    "metadata of half a surrogate, last": (f'{{"a":{entry()},"__metadata__":{{"x":"\\udc00"}}}}', 8),
    "an empty dimension of 2**63": (one(shape=f"[{2**63},0]", offsets="[0,0]"), 0),
    "an empty dimension of 2**64": (one(shape=f"[{2**64},0]", offsets="[0,0]"), 0),
    "a field twice": (one(more=',"dtype":"F32"'), 8),
    "a field missing": ('{"a":{"dtype":"F32","shape":[2]}}', 8),
    "a tensor of null": ('{"a":null}', 0),
    "an unknown dtype": (one(dtype='"F31"'), 8),
    "a dtype in lower case": (one(dtype='"f32"'), 8),
    "a dtype of null": (one(dtype="null"), 8),
    "a negative shape": (one(shape="[-2]"), 8),
    "two negative dimensions": (one(shape="[-1,-2]"), 8),
    "a shape of floats": (one(shape="[2.0]"), 8),
    "a shape of truths": (one(shape="[true,2]"), 8),
    "a shape of text": (one(shape='["2"]'), 8),
    "a shape with a leading zero": (one(shape="[02]"), 8),
    "a shape of no list": (one(shape="2"), 8),
    "a shape beyond 64 bits": (one(shape=f"[{2**64},0]", offsets="[0,0]"), 0),
    "a shape of 5,000 digits": (one(shape=f"[{'9' * 5000}]"), 8),
    "a product beyond 64 bits": (one(shape=f"[{2**32},{2**32}]", offsets="[0,0]"), 0),
    "bytes beyond 64 bits": (one(shape=f"[{2**62}]", offsets="[0,0]"), 0),
    "three offsets": (one(offsets="[0,8,8]"), 8),
    "one offset": (one(offsets="[8]"), 8),
    "offsets of floats": (one(offsets="[0,8.0]"), 8),
    "negative offsets": (one(offsets="[-8,0]"), 8),
    "offsets backwards": (one(offsets="[8,0]"), 8),
    "offsets at the end of 64 bits": (one(offsets=f"[{2**64 - 8},{2**64 - 1}]"), 8),
    "offsets too wide": (one(offsets="[0,16]"), 16),
    "a gap at the beginning": (one(offsets="[8,16]"), 16),
    "a hole": (two("[2]", "[16,24]"), 24),
    "an overlap": (two("[2]", "[4,12]"), 12),
    "the same bytes twice": (two("[2]", "[0,8]"), 8),
    "an empty tensor amid another": (two("[0]", "[4,4]"), 8),
    "an empty tensor past the end": (two("[0]", "[9,9]"), 8),
    "a byte too many": (one(), 9),
    "a byte too few": (one(), 7),
}

LAX = {
    "metadata of an empty list": (f'{{"__metadata__":[],"a":{entry()}}}', 8),
    "metadata of false": (f'{{"__metadata__":false,"a":{entry()}}}', 8),
    "a shape of minus zero": (one(shape="[-0]", offsets="[0,0]"), 0),
    "an offset of minus zero": (one(offsets="[-0,8]"), 8),
    "an overflow before a zero": (one(shape=f"[{2**62},8,0]", offsets="[0,0]"), 0),
    "a name of half a surrogate": (f'{{"\\ud800":{entry()}}}', 8),
}
"""What the official reader refuses and ours takes, against its own docstring."""

STRICT = {
    "a tensor twice": (f'{{"a":{entry()},"a":{entry()}}}', 8),
    "a key of the metadata twice": (f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{entry()}}}', 8),
    "a tensor as a list": ('{"a":["F32",[2],[0,8]]}', 8),
    "a dtype as a table": (one(dtype='{"F32":null}'), 8),
}
"""What the official reader takes by the way of its parser, no writer writes, and ours refuses."""


def accepted_by(path: Path) -> tuple[bool, bool]:
    """Whether the official reader takes a file, and whether ours does."""
    official = ours = True
    try:
        with safe_open(path, "np") as file:
            file.keys()
    except SafetensorError:
        official = False
    try:
        Checkpoint(path).close()
    except (MalformedCheckpoint, IncompleteCheckpoint):
        ours = False
    return official, ours


def written(tmp_path: Path, header: str | bytes, nbytes: int) -> Path:
    return raw(tmp_path / "a.safetensors", header if isinstance(header, bytes) else header.encode(), bytes(nbytes))


@pytest.mark.parametrize("label", [*HEADERS, *(label for label in LAX)])
def test_we_accept_what_the_official_reader_accepts(label: str, tmp_path: Path) -> None:
    """Guards agreement with the reference on hand-made headers: what it takes we take, what it refuses we refuse."""
    official, ours = accepted_by(written(tmp_path, *{**HEADERS, **LAX}[label]))
    assert ours == official


@pytest.mark.parametrize("label", STRICT)
def test_where_we_are_stricter_than_the_official_reader(label: str, tmp_path: Path) -> None:
    """Guards that each place where we refuse more than the reference is a known one."""
    assert accepted_by(written(tmp_path, *STRICT[label])) == (True, False)


def test_the_table_of_headers_has_both_kinds() -> None:
    """Guards the comparison itself: a reader that refused all, or took all, would not pass for agreement."""
    with tempfile.TemporaryDirectory() as directory:
        verdicts = [accepted_by(written(Path(directory), *case))[0] for case in HEADERS.values()]
    assert verdicts.count(True) >= 15 and verdicts.count(False) >= 40


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 10**9, 2**63, 2**64 - 1])
@pytest.mark.parametrize("size", [9, 64])
def test_a_header_bomb_is_refused(length: int, size: int, tmp_path: Path) -> None:
    """Guards that a length field that promises gigabytes is refused by the field alone."""
    with pytest.raises(MalformedCheckpoint, match=f"{MAX_HEADER:,}"):
        Checkpoint(raw(tmp_path / "a.safetensors", b"{}".ljust(size), length=length))


def test_a_real_header_over_the_bound_is_refused(tmp_path: Path) -> None:
    """Guards the bound where the file really is that long, and that the bound itself is still "not yet"."""
    path = raw(tmp_path / "a.safetensors", b"{", length=MAX_HEADER + 1)
    os.truncate(path, MAX_HEADER + 100)
    with pytest.raises(MalformedCheckpoint, match="bound"):
        Checkpoint(path)
    with pytest.raises(IncompleteCheckpoint):
        Checkpoint(raw(path, b"{", length=MAX_HEADER))


def test_a_shape_without_end_is_refused_at_once(tmp_path: Path) -> None:
    """Guards that a shape of 100,000 huge numbers (2 MB of header) costs no more than reading it."""
    signal.alarm(2)
    with pytest.raises(MalformedCheckpoint):
        Checkpoint(written(tmp_path, one(shape=f"[{','.join([str(2**63 - 1)] * 100_000)}]"), 8))


@pytest.mark.parametrize(
    "header",
    [
        f'{{"{"x" * 100_000}":{entry(shape="[3]")}}}',
        one(shape=f"[{','.join(['1'] * 100_000)}]"),
        f'{{"{"x" * 100_000}":0}}',
    ],
    ids=["a long name", "a long shape", "a long name of nothing"],
)
def test_a_message_stays_short(header: str, tmp_path: Path) -> None:
    """Guards that a hostile header does not fill terminal, log and history through the error's own message."""
    with pytest.raises(MalformedCheckpoint) as caught:
        Checkpoint(written(tmp_path, header, 8))
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("kind", ["fifo", "socket", "directory", "device", "zero", "link to a directory"])
def test_what_is_no_regular_file_is_refused(kind: str, tmp_path: Path) -> None:
    """Guards that opening never blocks on a pipe, reads a device or lists a directory."""
    path = tmp_path / "a.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/null", "zero": "/dev/zero"}.get(kind, str(tmp_path)))
    if "directory" in kind:
        with pytest.raises(NoCheckpoint, match=SINGLE):
            Checkpoint(path)
    else:
        with pytest.raises(MalformedCheckpoint, match="regular file"):
            Checkpoint(path)


def test_what_is_not_there_is_no_checkpoint_yet(tmp_path: Path) -> None:
    """Guards that a missing file, or a link that leads nowhere, is "none yet" (66) and names the path."""
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    for name in ("a.safetensors", "link.safetensors"):
        with pytest.raises(NoCheckpoint, match=name):
            Checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["circle", "file/below", "x" * 300])
def test_other_failures_of_the_system_name_their_reason(name: str, tmp_path: Path) -> None:
    """Guards that no OSError escapes: circular links, a file amid the path, a name too long."""
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        Checkpoint(tmp_path / name)
    assert caught.value.exit_code == 1


def test_a_failing_disk_is_no_verdict_on_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that an I/O error amid a read is a plain CheckpointError, tried again, and never a rejection."""

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    path = write(tmp_path / "a.safetensors", policies.mlp(), 1.0)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="Input/output error") as caught:
        read(path)
    assert caught.value.exit_code == 1


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root reads everything: for it, this thread of control becomes nobody for a while."""
    if os.geteuid():
        yield
        return
    try:
        os.seteuid(65534)
    except OSError:
        pytest.skip("this root cannot become another user")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that other users can enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)
        os.chmod(directory, 0o755)


def test_a_file_of_another_user_tells_owner_and_mode(reachable: Path) -> None:
    """Guards that a trainer's umask is diagnosed in the message: whose file, which mode, who could not read it."""
    path = write(reachable / "a.safetensors", policies.mlp(), 1.0)
    path.chmod(0o200)
    owner = path.owner()
    with without_privileges(), pytest.raises(CheckpointError) as caught:
        user = os.geteuid()
        Checkpoint(path)
    assert f"belongs to {owner} with mode 0200" in str(caught.value) and f"uid {user}" in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_closed_directory_above_is_told(reachable: Path) -> None:
    """Guards that a file whose directory is closed is told apart from a file that is."""
    path = write(reachable / "a.safetensors", policies.mlp(), 1.0)
    reachable.chmod(0)
    with without_privileges(), pytest.raises(CheckpointError, match="directories above"):
        Checkpoint(path)
