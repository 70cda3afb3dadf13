"""Says why a place has no checkpoint: which entries were passed over, and which setting finds weights that lie deeper.

It runs only when there is nothing to publish, and looks at a bounded number of names.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ..checkpoints.files import led_to, parts_of, place_at, remote
from ..checkpoints.steps import names_a_step, step_in_name
from ..errors import CheckpointError, printable
from ..layout.filenames import SUFFIX
from .candidates import SHARD, TEMPORARY, Select, candidate_of, entries_of, scan

_MOST = 200  # entries that are looked at
_DEEPER = 8  # directories that are looked into
_SHOWN = 3


def passed_over(place: Path, settings: Select) -> str:
    """Sentences that say what lies in a place and does not count, each with a blank behind it; else nothing.

    Args:
        place: a directory, or the URL of one.
    """
    try:
        away = remote(place)
        place = place_at(away.listed()) if away else led_to(place)
        if settings.pointer or not place.is_dir():
            return ""
        entries = sorted(entries_of(place), key=lambda entry: entry.name)
        names = {entry.name for entry in entries}
        reasons = ((entry.name, _why_not(place, entry, names, settings)) for entry in entries[:_MOST])
        told = [f"{printable(name):.100} ({why})" for name, why in reasons if why]
        if not told:
            return ""
        more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
        return f"Passed over: {', '.join(told[:_SHOWN])}{more}. {_advice(place, entries, settings)}"
    except (CheckpointError, OSError):  # which the pass itself reports
        return ""


def _why_not(place: Path, entry: os.DirEntry[str], names: set[str], settings: Select) -> str:
    """Why an entry is no candidate; empty where it is one, or is hidden."""
    if entry.name.startswith("."):
        return ""
    if TEMPORARY.search(entry.name):
        return "a temporary name"
    if SHARD.search(entry.name):
        return "a shard without an index beside it"
    if settings.pattern != "*" and not fnmatch.fnmatch(entry.name, settings.pattern):
        return f"its name does not match {settings.pattern!r}"
    try:
        if candidate_of(place, entry, names, settings):
            return ""
        if entry.is_dir() or entry.name.endswith(SUFFIX):
            if settings.marker:
                return f"it has no marker {settings.marker!r}, or only an older one"
            return "a file, and select.within and select.file look in directories"
        return f"its name does not end in {SUFFIX}"
    except CheckpointError as exc:
        return exc.message.partition(": ")[2].partition(". ")[0] or exc.message.partition(". ")[0]
    except OSError as exc:
        return os.strerror(exc.errno or 0)


def _advice(place: Path, entries: list[os.DirEntry[str]], settings: Select) -> str:
    """What finds weights one to three levels deeper: tried, so that what is advised is true."""
    directories = [place / entry.name for entry in reversed(entries) if entry.is_dir()]
    for directory in directories[:_DEEPER]:
        for within, file in _deeper(directory):
            if any(names_a_step(name) for name in within.split("/")) or step_in_name(file).number is not None:
                where = directory / within.rpartition("/")[0] if within else directory
                return f"There are checkpoints in {where}: name that directory. "
            change = {name: value for name, value in (("within", within), ("file", file)) if value}
            if change and scan(place, replace(settings, within=within, file=file)):
                words = " and ".join(f'{name} = "{value}"' for name, value in change.items())
                options = " ".join(f"--{name} {value}" for name, value in change.items())
                return f"The weights are found with {words} in [select] ({options}). "
    return ""


def _deeper(directory: Path) -> Iterator[tuple[str, str]]:
    """What ``within`` and ``file`` could be for a directory: first what is known by its name, then any file."""
    levels = list(_below(directory))
    for within, path in levels:
        try:
            if within:
                parts_of(path)
                yield within, ""
        except (CheckpointError, OSError):
            continue
    for within, path in levels:
        for entry in islice(entries_of(path), _MOST):
            name = entry.name
            if name.endswith(SUFFIX) and not SHARD.search(name) and not name.startswith(("optim", "sched", "random")):
                yield within, name


def _below(directory: Path) -> Iterator[tuple[str, Path]]:
    """A directory and those up to three levels below it, each with its path from there."""
    level = [("", directory)]
    for _ in range(4):
        yield from level
        level = [
            (f"{within}/{entry.name}".lstrip("/"), path / entry.name)
            for within, path in level
            for entry in sorted(islice(entries_of(path), _MOST), key=lambda entry: entry.name)
            if entry.is_dir() and not TEMPORARY.search(entry.name)
        ][:_DEEPER]
