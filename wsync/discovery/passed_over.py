"""Says why a place has no checkpoint: which entries were passed over, which setting finds weights that lie deeper, and
which files would have to be safetensors.

It runs only when there is nothing to publish, and looks at a bounded number of names.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ..checkpoints.files.parts import led_to, open_untrusted, parts_of, place_at, remote
from ..checkpoints.step_number import names_a_step, step_in_name
from ..errors import CheckpointError, WsyncError, printable
from ..fitting.header import instead, kind_of
from ..layout.filenames import SUFFIX
from ..system.memory import read_at
from .listing import SHARD, TEMPORARY, candidate_of, entries_of, scan
from .newest import Select

_MOST = 200  # most entries of a directory that are looked at
_DEEPER = 8  # most directories that are looked into, on each level
_SHOWN = 3  # most entries that are named
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".zip", ".pkl", ".pickle", ".tar")
_LOOKED_AT = 20  # most files that are opened, because their names are like a pickle's
_ENTRIES = 10_000  # most names of a directory that are compared with those
_FIRST = 9  # bytes of a file that show its kind


def passed_over(place: Path, settings: Select) -> str:
    """Sentences that say which entries of a place do not count, each followed by a space; or empty.

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
        named = [f"{printable(name):.100} ({why})" for name, why in reasons if why]
        if not named:
            return ""
        more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
        return f"Passed over: {', '.join(named[:_SHOWN])}{more}. {_advice(place, entries, settings)}"
    except (CheckpointError, OSError):  # the pass itself reports it
        return ""


def _why_not(place: Path, entry: os.DirEntry[str], names: set[str], settings: Select) -> str:
    """Why an entry is not a candidate; empty if it is one, is hidden, or is an extra."""
    if entry.name.startswith(".") or settings.extras.matches(entry.name):
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
    """Settings that find weights one to three levels deeper; each is tried before it is advised."""
    directories = [place / entry.name for entry in reversed(entries) if (place / entry.name).is_dir()]
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
    """Values of ``within`` and ``file`` to try for a directory: first files of known names, then any file."""
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


def _below(directory: Path, levels: int = 4) -> Iterator[tuple[str, Path]]:
    """Yields a directory and those below it, of so many levels in all, each with its path from the first."""
    level = [("", directory)]
    for _ in range(levels):
        yield from level
        level = [
            (f"{within}/{entry.name}".lstrip("/"), path / entry.name)
            for within, path in level
            for entry in sorted(islice(entries_of(path), _MOST), key=lambda entry: entry.name)
            if entry.is_dir() and not TEMPORARY.search(entry.name)
        ][:_DEEPER]


def pickles_in(place: Path) -> str:
    """A sentence that names a pickle in a directory or one level below: wsync never loads one. Empty without any."""
    try:
        entries = ((path, entry.name) for _, path in _below(place, 2) for entry in islice(entries_of(path), _ENTRIES))
        files = (path / name for path, name in entries if name.lower().endswith(_PICKLES))
        found = [(file, kind) for file in islice(files, _LOOKED_AT) if (kind := _kind(file))]
    except (OSError, WsyncError):  # it was listed a moment ago; this only explains
        return ""
    if not found:
        return ""
    file, kind = found[0]
    name, more = str(file).removeprefix(f"{place}/"), len(found) - 1
    others = f", and {more} more like it" if more else ""
    return (
        f" There is {printable(name):.100}, {kind}{others}: wsync never opens those, since loading one can run any "
        f"code. Let the trainer write safetensors: {printable(instead(file.name)):.200}"
    )


def _kind(file: Path) -> str:
    """The kind of a pickle, by its first bytes; empty if the file is something else, or cannot be read."""
    try:
        if away := remote(file):
            stored = away.stored()
            data = bytearray(min(stored.size, _FIRST)) if stored else bytearray()
            if stored and data:
                from ..stores.store import into

                away.store.read(stored, 0, len(data), into(data))
            return kind_of(bytes(data))
        fd = open_untrusted(file)
    except (OSError, WsyncError):
        return ""
    try:
        return kind_of(read_at(fd, _FIRST, 0)) if stat.S_ISREG(os.fstat(fd).st_mode) else ""
    except OSError:
        return ""
    finally:
        os.close(fd)
