"""Checkpoints in several files that are written over one another: when the files are of one save, and when not."""

from __future__ import annotations

import os
import stat
import time
from itertools import permutations
from pathlib import Path

import pytest
from builders import shards, write
from policies import mlp
from safetensors.torch import save_file

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.checkpoints.files.parts import Parts, fingerprints, identity_of, parts_of
from wsync.checkpoints.files.settling import check_files
from wsync.errors import BeingRewritten
from wsync.layout.filenames import INDEX, SINGLE

FOLDER = Path("/runs/step_5")
PARTS = Parts(FOLDER, (FOLDER / "a", FOLDER / "b"), FOLDER / INDEX, (frozenset("a"), frozenset("b")))
BEFORE = (10, 11, 12)  # when the files of the save before were written, the index last


def info(when: float) -> os.stat_result:
    """A file that was written that many seconds after the beginning of this test; each moment has its own inode."""
    ns = int((time.time() // 1 - 1000 + when) * 1e9)
    seconds = ns // 10**9
    times = {"st_mtime_ns": ns, "st_ctime_ns": ns}
    return os.stat_result((stat.S_IFREG, int(when * 10), 0, 1, 0, 0, 100, seconds, seconds, seconds), times)


def verdict(first: float, second: float, index: float, published: bool = False, settle: float = 1.0) -> str:
    """What is said of two shards and an index that were written at these moments."""
    before = [identity_of(map(info, BEFORE))] if published else []
    try:
        check_files(PARTS, [info(first), info(second), info(index)], settle, before)
    except BeingRewritten as exc:
        return "never" if "is being rewritten" in exc.message else "later"
    return "whole"


@pytest.mark.parametrize(
    ("first", "second", "index", "said"),
    [
        (10, 11, 12, "whole"),  # the index last
        (11, 12, 10, "whole"),  # the index first
        (10, 10, 10, "whole"),  # a file system with coarse times
        (10, 10, 11, "whole"),
        (10, 11, 11, "whole"),
        (10, 12, 11, "later"),
        (12, 10, 11, "later"),
    ],
)
def test_an_index_amid_its_shards_is_of_two_saves(first: float, second: float, index: float, said: str) -> None:
    """Guards the first look at a place: the index is written before all shards or after all of them."""
    assert verdict(first, second, index, settle=1000.0) == said
    assert (
        verdict(first, second, index, settle=1.0) == "whole"
    )  # it has stood still for long: a copy has lost the times


def test_a_time_ahead_of_the_clock_is_not_waited_for() -> None:
    """Guards a file server whose clock is ahead, and times that were set: they do not make a checkpoint wait."""
    assert verdict(10, 5000, 11, settle=1.0) == "whole"


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_files_that_are_replaced_one_after_another(order: tuple[int, ...]) -> None:
    """Guards a save over one that was published, in every order: no state between the two is taken for whole."""
    files = [*map(float, BEFORE)]
    for number, place in enumerate(order[:2], 1):
        files[place] = 20.0 + number
        shard_1, shard_2 = (when > 20 for when in files[:2])
        said = verdict(files[0], files[1], files[2], published=True, settle=1000.0)
        assert said == ("never" if shard_1 != shard_2 else "later")
    files[order[2]] = 23.0
    said = verdict(files[0], files[1], files[2], published=True, settle=1000.0)
    assert said == ("later" if order[1] == 2 else "whole")  # an index amid its shards, as at a first look


def test_a_half_that_stays_is_never_whole() -> None:
    """Guards a save that was cut short: however long it stands still, shards of two saves are no checkpoint."""
    for files in ((20, 11, 12), (20, 11, 22), (10, 20, 12)):
        assert verdict(*files, published=True, settle=0.0) == "never"
    for files in ((20, 21, 12), (10, 11, 22)):  # an index that the trainer does not write again, or alone
        assert verdict(*files, published=True, settle=0.0) == "whole"
        assert verdict(*files, published=True, settle=1000.0) == "later"


def test_what_was_published_is_whole_as_it_is() -> None:
    """Guards a segment that was made anew, as after a reboot: the same files are published once more at once."""
    assert verdict(*BEFORE, published=True, settle=1000.0) == "whole"


def test_a_checkpoint_of_many_files_is_known_as_one() -> None:
    """Guards the bound on what a slot's header has to hold: the files of a very large checkpoint are not told apart."""
    few, many = [info(n) for n in range(256)], [info(n) for n in range(257)]
    assert len(fingerprints(identity_of(few))) == 256
    assert len(fingerprints(identity_of(many))) == 1
    assert identity_of(many) != identity_of([*many[:-1], info(300)])
    assert len(identity_of(few)) < 2200


@pytest.mark.parametrize("key", ["step", "global_step"])
def test_shards_of_two_steps_are_no_checkpoint(key: str, tmp_path: Path) -> None:
    """Guards that shards that say themselves that they are of two saves are never put together."""
    path = shards(tmp_path / "latest", mlp(), 1.0)
    states = [(file, dict(mlp().state_dict())) for file in parts_of(path).files]
    for (file, state), names, step in zip(states, parts_of(path).names, ("5", "6"), strict=True):
        save_file({name: state[name] for name in names}, file, metadata={key: step})
    with pytest.raises(BeingRewritten, match=r"00001.* is of step 5, and .*00002.* of step 6"):
        Checkpoint(path)


def test_the_newer_of_a_file_and_its_shards_is_the_checkpoint(tmp_path: Path) -> None:
    """Guards a directory whose model came to need shards, or no longer does: the older form that is left is stale."""
    path = shards(tmp_path / "latest", mlp(), 2.0)
    write(path / SINGLE, mlp(), 1.0)
    hour = path.stat().st_mtime - 3600
    assert parts_of(path).files == (path / SINGLE,)
    os.utime(path / SINGLE, (hour, hour))
    assert parts_of(path).beside == path / INDEX
    (path / "model-00002-of-00002.safetensors").unlink()  # they are on their way
    assert parts_of(path).files == (path / SINGLE,)
