"""Files that are as long as they will be, and not all written: reserved, sparse, or with a downloader at work."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from builders import shards, write
from policies import mlp

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.checkpoints.files.parts import parts_of
from wsync.checkpoints.files.settling import COMPANIONS, PATIENCE
from wsync.errors import BeingWritten
from wsync.layout.filenames import INDEX
from wsync.system.file_holes import unwritten

HIDDEN = 4096  # units: some pages of weights
SETTLE = 0.02


@pytest.fixture(params=[None, "/dev/shm"], ids=["disk", "memory"])
def place(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory on a disk or in memory that other users can enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory(dir=request.param) as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


@contextmanager
def another_user() -> Iterator[None]:
    """One to whom the kernel gives no leases on our files."""
    if os.geteuid() != 0:
        pytest.skip("takes root to become another user")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def part_of(path: Path, whole: bytes, reserve: Callable[[int, int], object]) -> int:
    """A file of the final size of which the header and a page of weights are written; it stays open."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    reserve(fd, len(whole))
    os.pwrite(fd, whole[:8192], 0)
    return fd


def reserve(fd: int, size: int) -> None:
    os.posix_fallocate(fd, 0, size)


@pytest.mark.parametrize("by", [reserve, os.ftruncate])
def test_a_file_whose_writer_stalls_is_not_whole(by: Callable[[int, int], object], place: Path) -> None:
    """Guards weights of zeros: a file of its final size, its writer silent, read by one who cannot see that writer."""
    whole = write(place / "source", mlp(HIDDEN), 1.0).read_bytes()
    fd = part_of(path := place / "step_1.safetensors", whole, by)
    try:
        if by is reserve and unwritten(fd) == "reserved":
            with another_user(), pytest.raises(BeingWritten, match="is incomplete"):
                Checkpoint(path)  # however long it has stood still
        with another_user(), pytest.raises(BeingWritten):
            Checkpoint(path, settle=1.0)
        os.pwrite(fd, whole[8192:], 8192)
    finally:
        os.close(fd)
    with another_user(), Checkpoint(path, settle=SETTLE) as checkpoint:
        assert checkpoint.size == len(whole)


def test_a_file_of_which_a_writer_died_is_not_whole(place: Path) -> None:
    """Guards the same for the owner, who sees that nobody has it open: its writer may have been killed."""
    whole = write(place / "source", mlp(HIDDEN), 1.0).read_bytes()
    fd = part_of(path := place / "step_1.safetensors", whole, reserve)
    told = unwritten(fd)
    os.close(fd)
    if told != "reserved":
        pytest.skip("this file system does not tell reserved room from a hole")
    with pytest.raises(BeingWritten, match="was reserved"):
        Checkpoint(path)


def test_a_sparse_file_comes_through(place: Path) -> None:
    """Guards a copy that left out the zeros: at once for the owner, and after a while for others."""
    whole = write(place / "source", mlp(HIDDEN), 0.0).read_bytes()
    os.close(part_of(path := place / "step_1.safetensors", whole, os.ftruncate))
    Checkpoint(path, settle=3000.0).close()
    with another_user():
        with pytest.raises(BeingWritten, match=f"must not change for {PATIENCE:g} s"):
            Checkpoint(path, settle=1.0)
        Checkpoint(path, settle=SETTLE).close()


@pytest.mark.parametrize("end", COMPANIONS)
def test_a_download_at_work_is_not_whole(end: str, tmp_path: Path) -> None:
    """Guards a file that a downloader reserved: what it keeps beside the file says that the rest is on its way."""
    single, several = write(tmp_path / "step_1.safetensors", mlp(), 1.0), shards(tmp_path / "run", mlp())
    files = {single: single, parts_of(several).files[1]: several, several / INDEX: several}
    for file, checkpoint in files.items():
        companion = file.with_name(f"{file.name}.{end}")
        companion.touch()
        with pytest.raises(BeingWritten, match=rf"{companion.name} says .* remove that file"):
            Checkpoint(checkpoint)
        companion.unlink()
        Checkpoint(checkpoint).close()
