"""A listing leaves out the thousands that are older than what is live, and tells the same as one that has all."""

from __future__ import annotations

import contextlib
import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file

from wsync.discovery import weight_getter
from wsync.discovery.listing import scan
from wsync.discovery.newest import Candidate, Select
from wsync.discovery.weight_getter import CheckpointWeightGetter, Look

Order = Literal["mtime", "step", "arrival"]
ORDERS: list[Order] = ["mtime", "step", "arrival"]


def save(place: Path, name: str, at: int, **metadata: str) -> Path:
    path = place / f"{name}.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata or None)
    os.utime(path, (at, at))
    return path


def live_at(place: Path, name: str, step: int) -> Candidate:
    (same,) = (candidate for candidate in scan(place) if candidate.name == f"{name}.safetensors")
    after_a_tick(place)
    live = Candidate(same.location, same.identity, same.mtime_ns, step, arrived_ns=time.time_ns())
    after_a_tick(place)
    return live


def after_a_tick(place: Path) -> None:
    """Waits until the clock of the file system has moved: what arrived within the same tick counts as new."""
    probe = place.with_name("tick")
    probe.touch()
    was = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == was:
        probe.touch()


def told(look: Look) -> tuple[list[str], list[str], bool]:
    return [c.name for c in look.newer], sorted(c.name for c in look.late), look.is_new_run


def arrives(place: Path) -> None:
    save(place, "step_9", 900)


def is_late(place: Path) -> None:
    save(place, "step_1", 50)


def is_rewritten(place: Path) -> None:
    save(place, "step_5", 10)


def is_gone(place: Path) -> None:
    (place / "step_5.safetensors").unlink()


def is_gone_as_an_older_one_comes(place: Path) -> None:
    is_gone(place)
    is_late(place)


def is_renamed(place: Path) -> None:
    (place / "step_5.safetensors").rename(place / "step_3b.safetensors")


def is_a_new_run(place: Path) -> None:
    for path in place.iterdir():
        path.unlink()
    save(place, "step_1", 50)
    save(place, "step_2", 60)


def disagrees(place: Path) -> None:
    save(place, "step_6", 900, step="1")
    save(place, "step_0", 5, step="700")


def is_linked(place: Path) -> None:
    (place / "best.safetensors").symlink_to(place / "step_2.safetensors")
    os.link(place / "step_5.safetensors", place / "last.safetensors")


def has_others(place: Path) -> None:
    save(place, "model", 1)
    save(place, "tmp_step_8", 900)
    (place / "step_7").mkdir()
    save(place / "step_7", "model", 700)


def is_nothing(place: Path) -> None:
    pass


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "change",
    [
        *(is_nothing, arrives, is_late, is_rewritten, is_gone, is_renamed, is_a_new_run, disagrees, is_linked),
        is_gone_as_an_older_one_comes,
        has_others,
    ],
)
def test_what_is_left_out_changes_nothing(
    change: Any, order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards each answer of a look, whatever came, went, or was renamed, against the answer of a listing of all."""
    for step in range(1, 6):
        save(tmp_path, f"step_{step}", 100 * step)
    for number in range(20):  # some of them come first, in whatever order they are listed
        save(tmp_path, f"tmp_step_{number}", 1)
    live = live_at(tmp_path, "step_5", 5)
    change(tmp_path)
    settings = Select(order=order)
    short = told(CheckpointWeightGetter(tmp_path, select=settings).look(live))
    monkeypatch.setattr(weight_getter, "older_than", lambda *_: None)
    assert short == told(CheckpointWeightGetter(tmp_path, select=settings).look(live))


@pytest.mark.parametrize("order", ORDERS)
def test_a_link_to_what_is_live_makes_nothing_new(order: Order, tmp_path: Path) -> None:
    """Guards a hard link whose name tells no step: it is what is live, and no older one goes live for it."""
    for step in (1, 2):
        save(tmp_path, f"step_{step}", 100 * step)
    os.link(tmp_path / "step_2.safetensors", tmp_path / "last.safetensors")
    live = live_at(tmp_path, "step_2", 2)
    assert CheckpointWeightGetter(tmp_path, select=Select(order=order)).candidates(live) == []


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_what_is_older_takes_no_memory(order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a push with nothing new among 100,000 files: it makes two candidates, and keeps nothing of the others."""
    for step in range(5000):
        os.close(os.open(path := tmp_path / f"step_{step}.safetensors", os.O_CREAT | os.O_WRONLY))
        os.utime(path, (step, step))
    after_a_tick(tmp_path)
    save(tmp_path, "step_5000", 5000)
    live = live_at(tmp_path, "step_5000", 5000)
    listed: list[int] = []
    real = scan

    def counting(*arguments: Any, **options: Any) -> list[Candidate]:
        found = real(*arguments, **options)
        listed.append(len(found))
        return found

    monkeypatch.setattr(weight_getter, "scan", counting)
    getter = CheckpointWeightGetter(tmp_path, select=Select(order=order))
    tracemalloc.start()
    assert getter.candidates(live) == []
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert listed == [2] and most < 200_000


def test_many_that_came_are_compared_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a push after 100,000 files came: it compared each with each, for a quarter of an hour."""
    save(tmp_path, "step_0", 100)
    live = live_at(tmp_path, "step_0", 0)
    for step in range(1, 101):
        save(tmp_path, f"step_{step}", 200 + step)
    compared: list[Candidate] = []

    def counting(one: Candidate, other: object) -> bool:
        compared.append(one)
        return tuple.__eq__(one, other) is True

    monkeypatch.setattr(Candidate, "__eq__", counting)
    assert len(CheckpointWeightGetter(tmp_path).look(live).newer) == 100 and len(compared) < 300


def count_stats(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the entries that are looked at from now on."""
    looked: list[str] = []
    real = os.scandir

    class Entry:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self._entry = entry

        def __getattr__(self, name: str) -> Any:
            if name == "stat":
                looked.append(self._entry.name)
            return getattr(self._entry, name)

    @contextlib.contextmanager
    def counting(place: Path) -> Iterator[Iterator[Entry]]:
        with real(place) as entries:
            yield map(Entry, entries)

    monkeypatch.setattr(os, "scandir", counting)
    return looked


@pytest.mark.parametrize(("order", "number"), [("mtime", 101), ("step", 2)])
def test_a_listing_looks_at_no_more_files_than_it_must(
    order: Order, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards what a push with nothing new costs: by step, names tell it alone until a file comes."""
    for step in range(1, 101):
        save(tmp_path, f"step_{step}", 100 * step)
    live = live_at(tmp_path, "step_100", 100)
    getter = CheckpointWeightGetter(tmp_path, select=Select(order=order))
    looked = count_stats(monkeypatch)
    assert getter.candidates(live) == [] and len(looked) == number
    save(tmp_path, "step_0", 5)
    looked.clear()
    assert [c.name for c in getter.look(live).late] == ["step_0.safetensors"] and len(looked) > 100
