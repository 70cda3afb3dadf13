"""A place where checkpoints appear: which entries are candidates, and which is newest.

Choosing is a pure function of one listing (``select``). The listing costs one ``scandir`` and a ``stat`` an entry and
opens no file, but for directories, whose own files are looked at too. Among 10,000 files a pass that finds nothing new
takes about 60 ms, half of them in the system; so a candidate is a plain tuple, and its path, identity and place in the
order are only worked out where they are asked for. Whether a candidate is complete is only known when it is opened: the
caller goes down the list.

The order by modification time believes the clock: what is written after the clock was set back is older than what was
written before. The orders by step and by name do not ask the clock.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..checkpoints.files import Parts, identity, identity_of, led_to, parts_of, place_at, remote, unreadable, written
from ..errors import CheckpointError, IncompleteCheckpoint, MalformedCheckpoint, NoCheckpoint, UsageError
from ..layout.filenames import ADAPTER, FORMS, INDEX, INDEX_SUFFIX, SINGLE, SUFFIX, is_file_name
from .inside import inside, pointed
from .markers import is_marked, markers_of

if TYPE_CHECKING:
    from .older import Older

TEMPORARY = re.compile(  # what editors, rsync, browsers, orbax and careful trainers call a file that is not done
    r"^\.|^~|~$|^tmp|\.tmp|\.(?:temp|part|partial|incomplete)(?:$|[.\-_])"
    r"|[-_](?:tmp(?:[-_.]?\d+)?|temp|partial|incomplete)(?:\.safetensors)?$",
    re.IGNORECASE,
)
_LEVELS = 3  # between a checkpoint's directory and its weights
_OTHERS = "lost+found"  # of a file system, in its root directory
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")

Place = tuple[int, int, list[tuple[int, int, str]]]


@dataclass(frozen=True, slots=True)
class Select:
    """Which entries of a directory are checkpoints, and which is newest: the settings of ``[select]``.

    Attributes:
        pattern: a glob that their names match.
        order: ``"mtime"`` (ties by natural name), ``"step"`` (of the metadata, else of the name) or ``"name"``
            (natural, so that 10 comes after 9); or
            ``"arrival"``, when the system last changed a file: copies with old modification times are new.
        marker: a file that its writer leaves last: in a checkpoint's directory, or beside a file with the file's name
            before it (``step_5.safetensors.STABLE``, or ``step_5.STABLE``). One that is older than a file of its
            checkpoint was left by an earlier save, and does not count.
        settle: seconds that a checkpoint must have stood still where nothing else tells that its writer is done: where
            it has several files, or where the system does not tell whether one is open for writing.
        within: the directory in each checkpoint that holds the weights: ``pretrained_model``, or ``policy/actor``.
        file: the file in each checkpoint that holds the weights, where there are several: ``model_1.safetensors``. With
            one of these two, an entry of the place is a checkpoint if it is a directory that has it.
        pointer: a file of the place, or a link, that names the one checkpoint to take.
        step: a ``/regular expression/`` whose group is the step in a checkpoint's name; empty takes what
            ``checkpoints.steps`` finds.
        digest: ``"sha256"`` takes only checkpoints beside which the digest of each file stands, and compares them.
    """

    pattern: str = "*"
    order: Literal["mtime", "step", "name", "arrival"] = "mtime"
    marker: str = ""
    settle: float = 1.0
    within: str = ""
    file: str = ""
    pointer: str = ""
    step: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        if self.step:
            from ..checkpoints.steps import expression

            expression(self.step)
        if self.order not in ("mtime", "step", "name", "arrival"):
            raise UsageError(f"order = {self.order!r} is unknown. Use mtime, step, name or arrival.")
        if not 0 <= self.settle <= 3600:
            raise UsageError(f"settle = {self.settle} is not a valid time. Give seconds, an hour at most.")
        if self.digest not in ("", "sha256"):
            raise UsageError(f'digest = {self.digest!r} is not a kind of digest. Use "sha256", or leave it out.')
        if "/" in self.marker or self.marker in (".", ".."):
            raise UsageError(f"marker = {self.marker!r} is not a file name. Give the name alone.")
        if self.pointer and not is_file_name(self.pointer):
            raise UsageError(
                f"pointer = {self.pointer!r} is not a file name. Name a file in the directory of checkpoints."
            )
        if self.file and not (is_file_name(self.file) and self.file.endswith(SUFFIX)):
            raise UsageError(
                f"file = {self.file!r} is not the name of a {SUFFIX} file. Write it as it stands in a checkpoint."
            )
        levels = self.within.split("/") if self.within else []
        if len(levels) > _LEVELS or not all(map(is_file_name, levels)):
            raise UsageError(
                f"within = {self.within!r} is not a directory in a checkpoint. Write its name, or up to {_LEVELS} "
                "names with / between them, such as pretrained_model or policy/actor."
            )


class Candidate(NamedTuple):
    """A file or directory that may be a checkpoint.

    Attributes:
        location: its absolute path.
        stamp: its identity, or what the system says of it, from which the identity is worked out.
        mtime_ns: when it was last written: its newest modification time; its change time where that is earlier, because
            a modification time can be set to anything, and one ahead of the clock would hide all that comes after.
        step: of its metadata, where the order needs it.
        name: its path below the place where it was found; empty where it is the place itself.
        arrived_ns: when the system last changed it, by its own clock: a copy with an old modification time arrives when
            it is made. Of what is live, when it went live.
        changed_ns: of what is live, when the system had last changed it before it was read; 0 where a later change
            says nothing.
    """

    location: str | Path
    stamp: str | os.stat_result
    mtime_ns: int
    step: int | None = None
    name: str = ""
    arrived_ns: int = 0
    changed_ns: int = 0

    @property
    def path(self) -> Path:
        return Path(self.location) if isinstance(self.location, str) else self.location

    @property
    def identity(self) -> str:
        return self.stamp if isinstance(self.stamp, str) else identity(self.stamp)

    @property
    def home(self) -> str:
        """The place where it was found."""
        where, below = str(self.location), f"/{self.name}"
        return where.removesuffix(below) if where.endswith(below) else os.path.dirname(where)

    def place(self, order: str = "mtime") -> Place:
        """Sorts candidates from oldest to newest."""
        name = natural(self.name or os.path.basename(self.location))
        if order == "name":
            return (0, 0, name)
        if order == "arrival":
            return (0, self.arrived_ns, name)
        if order == "step":
            return (-1 if self.step is None else self.step, self.mtime_ns, name)
        return (0, self.mtime_ns, name)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key by which ``step_9`` comes before ``step_10``."""
    return [
        (0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part)
        for part in re.split(r"([0-9]+)", name[:255])
        if part
    ]


def scan(
    place: Path, settings: Select = Select(), *, halves: bool = False, older: Older | None = None
) -> list[Candidate]:
    """The candidates of a directory, or the one checkpoint that ``place`` is itself.

    A directory that is itself a checkpoint offers what it is. The checkpoints in it count only where a pattern asks for
    them: they may be anything, such as the parts of a pipeline.

    Args:
        halves: list all that a person may want to see: those beside the checkpoint that the place is, and sharded ones
            of which a part is missing.
        older: what is left out, but for one of them.

    Raises:
        NoCheckpoint: there is no such place yet.
        CheckpointError: it cannot be listed; or it is a checkpoint itself, broken or incomplete, with none beside it.
    """
    try:
        away = remote(place)  # one listing of the store answers all that is asked below
        place = place_at(away.listed()) if away else led_to(place)
        info = place.stat()
        if not stat.S_ISDIR(info.st_mode):
            return _named(place.absolute(), info, settings)
        if settings.pointer:
            return _pointed(place, settings)
        counts, entries = _counts(settings), entries_of(place)
        listed = list(older.without(entries, counts) if older else entries)
        names = {entry.name for entry in listed}
        found, own, trouble = _itself(place, settings) if names & _known_by(settings) else ([], set(), None)
        if own:
            listed = [] if settings.pattern == "*" and not halves else list(entries_of(place))
    except FileNotFoundError as exc:
        raise NoCheckpoint(f"there is no {place} yet. It is looked at again at the next pass.") from exc
    except OSError as exc:
        if exc.errno == errno.EACCES:
            raise unreadable(place, exc) from exc
        raise CheckpointError(f"{place} cannot be listed ({exc.strerror}). Check its owner and mode.") from exc
    links: set[str] = set()
    for entry in listed:
        if entry.name in own or not counts(entry.name):
            continue
        several, wrong = _looked_at(place, entry, names, settings, halves)
        found += several
        trouble = trouble or wrong
        if several and not remote(place) and entry.is_symlink():
            links.add(several[0].name)
    if trouble and not found:
        raise trouble
    return _without_links(found, links) if links else found


def _counts(settings: Select) -> Callable[[str], bool]:
    """Tells whether an entry may be a checkpoint by its name."""
    matches = re.compile(fnmatch.translate(settings.pattern)).match if settings.pattern != "*" else None
    return lambda name: not (TEMPORARY.search(name) or SHARD.search(name) or (matches and not matches(name)))


def _itself(place: Path, settings: Select) -> tuple[list[Candidate], set[str], CheckpointError | None]:
    """The checkpoint that a place is itself, the names of its files, and what is wrong with it."""
    try:
        parts = parts_of(inside(place.absolute(), settings.within, settings.file))
        own = {SINGLE, ADAPTER, *(file.name for file in parts.files)}
        return _marked(_of_parts(parts), [place / settings.marker], settings), own, None
    except NoCheckpoint:
        return [], set(), None
    except CheckpointError as exc:
        return [], {*FORMS}, exc
    except OSError as exc:
        return [], {*FORMS}, unreadable(place, exc)


def _looked_at(
    place: Path, entry: os.DirEntry[str], names: set[str], settings: Select, halves: bool
) -> tuple[list[Candidate], CheckpointError | None]:
    """The candidate that an entry is, also where only opening it says what is wrong; and what is wrong with others."""
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
    except CheckpointError as exc:  # else a directory that holds no checkpoint, or half of one
        is_told = isinstance(exc, MalformedCheckpoint) or (halves and isinstance(exc, IncompleteCheckpoint))
        return _unopened(place / name, place / name / INDEX, name) if is_told else [], None


def _named(place: Path, info: os.stat_result, settings: Select) -> list[Candidate]:
    """The one file that the place is; an adapter is two files, too, and an index names several."""
    is_several = place.name == ADAPTER or place.name.endswith(INDEX_SUFFIX)
    named = (
        _of_parts(parts_of(place)) if is_several else Candidate(place, info, written(info), arrived_ns=info.st_ctime_ns)
    )
    return _marked(named, (place.parent / name for name in markers_of(place.name, settings.marker)), settings)


def _pointed(place: Path, settings: Select) -> list[Candidate]:
    """The checkpoint that the pointer names; nothing while that is not complete."""
    name = pointed(place, settings.pointer)
    path = place / name
    if stat.S_ISDIR(path.stat().st_mode):
        path = inside(path, settings.within, settings.file)
        beside = [place / name / settings.marker]
    else:
        beside = [place / each for each in markers_of(name, settings.marker)]
    return _marked(_of_parts(parts_of(path.absolute()), name), beside, settings)


def entries_of(place: Path) -> Iterator[os.DirEntry[str]]:
    """One after the other, so that of what nobody keeps no memory is taken."""
    if away := remote(place):
        yield from away.entries()
        return
    with os.scandir(place.absolute()) as entries:
        yield from entries


def _known_by(settings: Select) -> set[str]:
    """Names by one of which a place may be a checkpoint itself."""
    if settings.within:
        return {settings.within.partition("/")[0]}
    return {settings.file, settings.file.removesuffix(SUFFIX) + INDEX_SUFFIX} if settings.file else {*FORMS}


def candidate_of(place: Path, entry: os.DirEntry[str], names: set[str], settings: Select) -> list[Candidate]:
    """The candidate that an entry of a place is, if it is one.

    Args:
        names: of all entries.

    Raises:
        CheckpointError: it is a directory, and no complete checkpoint.
        OSError: the system refuses a look.
    """
    name, is_nested = entry.name, bool(settings.within or settings.file)
    if not is_nested and name.endswith(SUFFIX) and stat.S_ISREG((info := entry.stat()).st_mode):
        where = str(led_to(Path(entry.path))) if not remote(place) and entry.is_symlink() else entry.path
        single = Candidate(where, info, written(info), None, name, info.st_ctime_ns)
        return _marked(single, (place / m for m in markers_of(name, settings.marker) if m in names), settings)
    if not entry.is_dir():
        return []
    path = Path(entry.path) if remote(place) is None else place / name
    if not remote(place) and entry.is_symlink():
        path = led_to(path)
    if settings.marker and not (path / settings.marker).exists():
        return []
    lies = inside(path, settings.within, settings.file) if is_nested else path
    below = f"{name}{str(lies)[len(str(path)) :]}"
    return _marked(_of_parts(parts_of(lies), below), [path / settings.marker], settings)


def _marked(candidate: Candidate, markers: Iterable[Path], settings: Select) -> list[Candidate]:
    return [candidate] if not settings.marker or is_marked(candidate.mtime_ns, markers) else []


def _without_links(found: list[Candidate], links: Collection[str]) -> list[Candidate]:
    """The same without the links to others of them."""
    real = {candidate.identity for candidate in found if candidate.name not in links}
    return [c for c in found if c.name not in links or c.identity not in real]


def listing_of(place: Path, settings: Select = Select()) -> object:
    """Tells one state of a place from another: what it lists, or why it cannot be listed.

    Other than an identity it tells, too, that a file's mode changed; and other than a time of access, that it was read.
    """
    try:
        return {(c.location, c.identity, getattr(c.stamp, "st_ctime_ns", 0)) for c in scan(place, settings)}
    except CheckpointError as exc:
        return str(exc)


def select(candidates: Iterable[Candidate], live: Candidate | None = None, order: str = "mtime") -> list[Candidate]:
    """What is newer than what is live, newest first.

    Args:
        candidates: one listing.
        live: where the live version came from; None takes everything as newer. A live file that was replaced under its
            own name counts as new; one from another directory says nothing about what is newer here.
        order: see ``Select``.
    """
    found = list(candidates)
    if live is not None:
        same = [c for c in found if c.identity == live.identity]
        beside = any(c.home == live.home for c in found)
        bound = max(same, key=lambda c: c.place(order)) if same else live if beside else None
        if bound is not None:
            where = str(live.location)
            if order == "mtime":  # spares the thousands that are older their place
                found = [c for c in found if c.mtime_ns >= bound.mtime_ns or str(c.location) == where]
            least = bound.place(order)
            found = [c for c in found if str(c.location) == where or c.place(order) >= least]
        found = [c for c in found if c not in same]
    return sorted(found, key=lambda c: c.place(order), reverse=True)


def _of_parts(parts: Parts, name: str = "") -> Candidate:
    """A checkpoint of several files, or in a directory, as a candidate."""
    infos = [file.stat() for file in parts.every]
    arrived = max(info.st_ctime_ns for info in infos)
    return Candidate(parts.path, identity_of(infos), max(map(written, infos)), None, name, arrived)


def _unopened(path: Path, file: Path, name: str) -> list[Candidate]:
    """Candidate for what cannot be looked into, by this file of it, so that opening it says what is wrong."""
    try:
        info = file.stat()
    except OSError:
        return []
    return [Candidate(path, info, written(info), None, name, info.st_ctime_ns)]
