"""Finds the candidates in a place where checkpoints appear.

A listing costs one ``scandir`` and at most one ``stat`` per entry, and opens no file; but in entries that are
directories, it looks at the files and reads an index. It may leave out entries older than the live version.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PosixPath
from typing import cast

from ..checkpoints.files.parts import (
    Parts,
    identity_of,
    led_to,
    parts_of,
    place_at,
    remote,
    unreadable,
    written,
)
from ..errors import CheckpointError, IncompleteCheckpoint, MalformedCheckpoint, NoCheckpoint
from ..layout.filenames import ADAPTER, FORMS, INDEX, INDEX_SUFFIX, SINGLE, SUFFIX
from .newest import Candidate, Select

TEMPORARY = re.compile(  # what editors, rsync, browsers, orbax and careful trainers call a file that is not done
    r"^\.|^~|~$|^tmp|\.tmp|\.(?:temp|part|partial|incomplete)(?:$|[.\-_])"
    r"|[-_](?:tmp(?:[-_.]?\d+)?|temp|partial|incomplete)(?:\.safetensors)?$",
    re.IGNORECASE,
)
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_OTHERS = "lost+found"  # in the root directory of a file system
_ANY = 1 << 63  # ns: later than any time

Older = Callable[[os.DirEntry[str]], bool]
"""Whether an entry is older than the live version and did not arrive after it."""
NamedStep = Callable[[str], int | None]
"""Returns the step that a name gives for certain, else None."""


def scan(
    place: Path,
    settings: Select = Select(),  # noqa: B008  (frozen)
    *,
    everything: bool = False,
    older: Older | None = None,
    only: set[str] | None = None,
) -> list[Candidate]:
    """The candidates in a directory, or the one checkpoint that ``place`` is itself.

    If the directory is a checkpoint itself, its other entries count only if a pattern is set: they may be parts of it.

    Args:
        everything: whether to list, for a person to see, also those entries, and sharded checkpoints that lack a shard.
        older: returns whether to skip an entry; the first one stays, to show that the live version is not alone.
        only: the names of the files to look at, besides those that would make the place a checkpoint; None for all.

    Raises:
        NoCheckpoint: there is no such place yet, or its pointer names no entry yet.
        CheckpointError: it cannot be listed; or it has no candidate, and it or an entry is broken or unreadable.
    """
    if settings.extras.files:
        settings, only = replace(settings, extras=replace(settings.extras, listed={})), None
    with _errors_about(place := led_to(place)):
        if away := remote(place):  # one listing of the store answers all that is asked below
            place = place_at(away.listed())
        if not stat.S_ISDIR(place.stat().st_mode):
            return _found(place.absolute(), "", settings)
        if settings.pointer:
            from .pointer import pointed  # few settings have one

            name = pointed(place, settings.pointer)
            return _found(place.absolute() / name, name, settings)
        counts = _counts(settings)
        listed = _listed(place, settings, older, only)
        names = {entry.name for entry in listed}
        found, own, trouble = _itself(place, settings) if names & _known_by(settings) else ([], set(), None)
        if own:
            listed = [] if settings.pattern == "*" and not everything else list(entries_of(place))
    links: set[str] = set()
    for entry in (entry for entry in listed if entry.name not in own and counts(entry.name)):
        candidates, error = _looked_at(place, entry, names, settings, everything)
        found += candidates
        trouble = trouble or error
        if candidates and not away and entry.is_symlink():
            links.add(candidates[0].name)
    if trouble and not found:
        raise trouble
    return _without_links(found, links) if links else found


@contextmanager
def _errors_about(place: Path) -> Iterator[None]:
    """Converts an OSError into a CheckpointError about the place."""
    try:
        yield
    except FileNotFoundError as exc:
        raise NoCheckpoint(f"there is no {place} yet. Check the name; a watch looks again at its next pass.") from exc
    except OSError as exc:
        if exc.errno == errno.EACCES:
            raise unreadable(place, exc) from exc
        raise CheckpointError(
            f"{exc.filename or place} cannot be listed ({exc.strerror}). Check what it is, its owner and its mode."
        ) from exc


def _listed(place: Path, settings: Select, older: Older | None, only: set[str] | None) -> list[os.DirEntry[str]]:
    """The entries to look at, as ``older`` and ``only`` of ``scan`` say."""
    if only is not None:
        return _named(place, only | _known_by(settings))
    return list(_without(entries_of(place), older, _counts(settings)) if older else entries_of(place))


def _without(
    entries: Iterable[os.DirEntry[str]], older: Older, counts: Callable[[str], bool]
) -> Iterator[os.DirEntry[str]]:
    """Yields the entries that are not older, and the first older one whose name may be a checkpoint's."""
    has_one = False
    for entry in entries:
        if older(entry):
            if has_one or not counts(entry.name):
                continue
            has_one = True
        yield entry


def older_than(live: Candidate, order: str, named_step: NamedStep | None) -> Older | None:
    """Returns the test for older entries; None if a listing needs them all.

    In the order by step, names alone decide, and no file is looked at, until an entry comes or goes after the live
    version was published. Until then a file that is overwritten in place, under a lower step, goes unnoticed.

    Args:
        live: the live version's candidate, whose name is its path below the place.
        named_step: returns the step of a name; only in the order by step, if names are known to agree with metadata.
    """
    where, arrived, before, step = str(live.location), live.arrived_ns, _ANY, None
    is_still = False  # whether no entry has come or gone since the live version was published
    try:
        info = os.stat(where)
    except OSError:
        info = None  # the file is gone: the newest other one must show whether names agree with metadata
    if order == "mtime":
        before = min(live.mtime_ns, written(info)) if info else live.mtime_ns
    elif order == "arrival":
        arrived = min(arrived, info.st_ctime_ns - 1) if info else arrived
    elif not info or not named_step or (step := named_step(live.name.partition("/")[0])) is None:
        return None
    else:
        is_still = os.stat(live.home).st_mtime_ns <= arrived

    def is_older(entry: os.DirEntry[str]) -> bool:
        name = entry.name
        if not name.endswith(SUFFIX) or name in FORMS or entry.path == where:
            return False
        if step is not None and (named_step is None or (lower := named_step(name)) is None or lower >= step):
            return False
        try:
            if not entry.is_file(follow_symlinks=False):
                return False
            info = None if is_still else entry.stat(follow_symlinks=False)
        except OSError:  # reported when it is tried as a candidate
            return False
        return info is None or (info.st_mtime_ns < before and info.st_ctime_ns <= arrived)

    return is_older


def _counts(settings: Select) -> Callable[[str], bool]:
    """Returns a function that says whether a name may be a checkpoint's."""
    matches = re.compile(fnmatch.translate(settings.pattern)).match if settings.pattern != "*" else None
    is_extra = settings.extras.matches if settings.extras.files else None
    return lambda name: (
        not (
            TEMPORARY.search(name)
            or SHARD.search(name)
            or (matches and not matches(name))
            or (is_extra and name.endswith(SUFFIX) and is_extra(name))
        )
    )


def _itself(place: Path, settings: Select) -> tuple[list[Candidate], set[str], CheckpointError | None]:
    """The candidate for the place itself, the names of its files, and the error if it is broken."""
    try:
        parts = parts_of(inside(place.absolute(), settings), settings.extras)
        own = {SINGLE, ADAPTER, *(file.name for file in parts.files)}
        return _of_parts(parts, "", [place / settings.marker], settings), own, None
    except NoCheckpoint:
        return [], set(), None
    except CheckpointError as exc:
        return [], {*FORMS}, exc
    except OSError as exc:
        return [], {*FORMS}, unreadable(place, exc)


def _looked_at(
    place: Path, entry: os.DirEntry[str], names: set[str], settings: Select, everything: bool
) -> tuple[list[Candidate], CheckpointError | None]:
    """An entry's candidate, or an error; a candidate may also be unreadable or broken, for opening it to say so."""
    name = entry.name
    try:
        return candidate_of(place, entry, names, settings), None
    except FileNotFoundError:  # retention was faster, or a link leads nowhere
        return [], None
    except OSError as exc:
        path = Path(entry.path)
        if exc.errno == errno.EACCES and name != _OTHERS and (closed := _unopened(path, path, name)):
            return closed, None
        is_ours = exc.errno != errno.ELOOP and (name.endswith(SUFFIX) or exc.errno == errno.EACCES)
        return [], unreadable(path, exc) if is_ours and name != _OTHERS else None
    except CheckpointError as exc:  # mostly a directory without a checkpoint, or with an incomplete one
        is_shown = isinstance(exc, MalformedCheckpoint) or (everything and isinstance(exc, IncompleteCheckpoint))
        return _unopened(place / name, place / name / INDEX, name) if is_shown else [], None


def _found(path: Path, name: str, settings: Select) -> list[Candidate]:
    """The candidate for a file or directory; empty if it lacks its marker.

    Args:
        name: the entry's name in its place; empty for the place itself.
    """
    if stat.S_ISDIR(path.stat().st_mode):
        weights, markers = inside(path, settings), [path / settings.marker]
    else:
        weights, markers = path, [path.parent / each for each in _markers_of(path.name, settings.marker)]
    below = f"{name}{str(weights)[len(str(path)) :]}"
    return _of_parts(parts_of(weights, settings.extras), below, markers, settings)


def entries_of(place: Path) -> Iterator[os.DirEntry[str]]:
    """Yields the entries one by one, so that skipped ones take no memory."""
    if away := remote(place):
        yield from away.entries()
        return
    with os.scandir(place.absolute()) as entries:
        yield from entries


class _Entry(PosixPath):
    """A path that can be used like an entry of ``os.scandir``."""

    @property
    def path(self) -> str:
        return str(self)


def _named(place: Path, names: set[str]) -> list[os.DirEntry[str]]:
    entries = (_Entry(place.absolute(), name) for name in names)
    return [cast("os.DirEntry[str]", entry) for entry in entries if os.path.lexists(entry)]


def _known_by(settings: Select) -> set[str]:
    """The names that a place must have one of to be a checkpoint itself."""
    if settings.within:
        return {settings.within.partition("/")[0]}
    return {settings.file, settings.file.removesuffix(SUFFIX) + INDEX_SUFFIX} if settings.file else {*FORMS}


def candidate_of(place: Path, entry: os.DirEntry[str], names: set[str], settings: Select) -> list[Candidate]:
    """The candidate for an entry of a place; empty if the entry does not count.

    Args:
        names: the names of all entries.

    Raises:
        CheckpointError: it is a directory without a complete checkpoint.
        OSError: the entry, or a file in it, cannot be looked at.
    """
    name = entry.name
    if (
        not (settings.within or settings.file)
        and name.endswith(SUFFIX)
        and stat.S_ISREG((info := entry.stat()).st_mode)
    ):
        where = str(led_to(Path(entry.path))) if not remote(place) and entry.is_symlink() else entry.path
        if settings.extras.files:
            return _found(place / name if remote(place) else Path(where), name, settings)
        single = Candidate(where, info, written(info), None, name, info.st_ctime_ns)
        markers = (place / m for m in _markers_of(name, settings.marker) if m in names)
        return _marked(single, single.mtime_ns, markers, settings)
    if not entry.is_dir():
        return []
    path = Path(entry.path) if remote(place) is None else place / name
    if not remote(place) and entry.is_symlink():
        path = led_to(path)
    if settings.marker and not (path / settings.marker).exists():
        return []
    return _found(path, name, settings)


def _markers_of(name: str, marker: str) -> tuple[str, ...]:
    """The names that a marker beside a file may have; one such marker is enough."""
    dotted = marker if marker.startswith(".") else f".{marker}"
    own = f"{name}{dotted}", f"{name.removesuffix(SUFFIX)}{dotted}"
    return (*own, marker) if name == SINGLE else own


def _marked(candidate: Candidate, saved_ns: int, markers: Iterable[Path], settings: Select) -> list[Candidate]:
    """The candidate, if it needs no marker or has one; a marker older than ``saved_ns`` is of an earlier save."""
    infos = map(_look, markers) if settings.marker else ()
    is_marked = not settings.marker or any(written(info) >= saved_ns for info in infos if info)
    return [candidate] if is_marked else []


def _look(file: Path) -> os.stat_result | None:
    """The ``stat`` of a file, or of an object in a store; None if it does not exist."""
    if away := remote(file):
        stored = away.now()
        return stored.stat(str(away.store)) if stored else None
    try:
        return file.lstat()
    except OSError:
        return None


def _without_links(found: list[Candidate], links: Collection[str]) -> list[Candidate]:
    """The candidates without the links to other candidates."""
    real = {candidate.identity for candidate in found if candidate.name not in links}
    return [c for c in found if c.name not in links or c.identity not in real]


def listing_of(place: Path, settings: Select = Select()) -> object:  # noqa: B008  (frozen)
    """A value to compare states of a place by: what it lists, or why it cannot be listed.

    Unlike identities, the value also changes when a file's mode does. Reading a file does not change it.
    """
    try:
        return {(c.location, c.identity, getattr(c.stamp, "st_ctime_ns", 0)) for c in scan(place, settings)}
    except CheckpointError as exc:
        return str(exc)


def _of_parts(parts: Parts, name: str, markers: Iterable[Path], settings: Select) -> list[Candidate]:
    """The candidate for a checkpoint of several files, or in a directory.

    Extras count in its identity, but not in its age, because several checkpoints may share them.
    """
    infos = [file.stat() for file in parts.every]
    own = infos[: len(parts.own)]
    arrived = max(info.st_ctime_ns for info in own)
    changed = max(info.st_ctime_ns for info in infos)
    candidate = Candidate(parts.path, identity_of(infos), max(map(written, own)), None, name, arrived, changed)
    return _marked(candidate, max(map(written, infos)), markers, settings)


def _unopened(path: Path, file: Path, name: str) -> list[Candidate]:
    """Candidate for an unreadable entry, with the times of one of its files, so that opening it says what is wrong."""
    try:
        info = file.stat()
    except OSError:
        return []
    return [Candidate(path, info, written(info), None, name, info.st_ctime_ns)]


def inside(entry: Path, settings: Select) -> Path:
    """The path of the weights in a directory: as ``settings.within`` and ``settings.file`` say, or that file's index.

    Raises:
        NoCheckpoint: there is no ``settings.file`` and no index of it.
    """
    directory = entry / settings.within if settings.within else entry
    if not (file := settings.file):
        return directory
    for name in (file, f"{file.removesuffix(SUFFIX)}{INDEX_SUFFIX}"):
        if (directory / name).exists():
            return directory / name
    raise NoCheckpoint(f"{directory} has no {file}. Wait for its writer, or name another file (select.file).")
