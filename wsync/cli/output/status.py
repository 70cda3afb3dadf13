"""What ``wsync status`` prints: tables, the screen of ``--watch``, JSON, and a line for a monitoring system.

rich is loaded only to draw a table.

A monitor gets one line, and an exit code as Nagios and similar systems expect it. 0 is OK; 1 is a warning: something is
beyond its bound; 2 is critical: nothing is live, or a segment cannot be read. A usage error, such as a misspelt option,
also ends with 2. The figures after ``|`` are for graphs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import SegmentError, StateError, UsageError, printable
from ...fleet.membership import few, group_of
from ...history.state import Event, State
from ...segment.segment import Segment, segments
from ...segment.segment_files import extras_name
from ...system.access import open_dir, open_file, opened
from ...system.memory import read_at
from ...text import count, duration, size, when
from ...updaters.reader_progress import oldest_version
from ..terminal import complain, plain_table, stdout_console, unwind_at

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_REFRESH = 1.0  # seconds
_WORDS = ("OK", "WARNING", "CRITICAL")
_LOOKED_AT = 1000  # most events that are read
_COLUMNS = 80  # width of the screen of ``--watch``, which is like that of top(1)
_HEAD = f"{'segment, reader':<31}{'version':>8}{'lag':>5}{'step':>11}{'age':>12}{'per min':>9}"


class Bounds(NamedTuple):
    """The bounds within which all is well; None sets no bound.

    Attributes:
        staleness: most seconds since the live version was published.
        lag: most versions that a reader may be behind.
        lag_seconds: most seconds that a reader may be behind.
    """

    staleness: float | None = None
    lag: int | None = None
    lag_seconds: float | None = None

    def check(self) -> None:
        """Raises UsageError for a bound that is not a valid number."""
        for name, value in self._asdict().items():
            if value is not None and not (value >= 0 if name == "lag" else value > 0):
                bound = "versions, 0 or more" if name == "lag" else "seconds above 0"
                raise UsageError(f"--max-{name.replace('_', '-')} {value} is not a valid bound. Give {bound}.")


def show(name: str | None, runtime: Path | None, state: Path | None, bounds: Bounds, *, as_json: bool) -> int:
    """Prints the segments, or one line for a monitor if bounds are given; returns the exit code.

    Args:
        name: name of one segment; None for all.

    Raises:
        SegmentError: the named segment does not exist, or is unusable; not if bounds are given.
    """
    is_check = bounds != Bounds()
    found, broken = look(name, runtime, state)
    if name and broken and not is_check:
        raise broken[name]
    line, code = "", int(bool(broken))
    if is_check:
        line, code = check(found, {each: str(exc) for each, exc in broken.items()}, bounds, state)
    if not line or as_json:
        for exc in broken.values():
            complain(exc)
    if as_json:
        print(to_json((found[0] if found else {}) if name else {"segments": found}))
    elif line:
        print(line)
    else:
        stdout_console().print(status_view(found), soft_wrap=True)
    return code


def follow(name: str | None, runtime: Path | None, state: Path | None) -> None:
    """Shows the status each second until interrupted: in place on a terminal, otherwise one below the other."""
    from rich.live import Live

    console = stdout_console()
    unwind_at(signal.SIGTERM)  # so that the cursor is shown again
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        view = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        while True:
            found, broken = look(name, runtime, state)
            lines = console.height - 1 if view else sys.maxsize
            shown = view_of(found, broken, lambda each: len(_publishes(each, state, since=time.time() - 60)), lines)
            if view:
                view.update(shown, refresh=True)
            else:
                console.print(shown)
                sys.stdout.flush()
            time.sleep(_REFRESH)


def look(
    name: str | None, runtime: Path | None, state: Path | None
) -> tuple[list[dict[str, Any]], dict[str, SegmentError]]:
    """Returns each readable segment as ``segment_json`` does, and the errors of the others by name."""
    found: list[dict[str, Any]] = []
    broken: dict[str, SegmentError] = {}
    for each in [name] if name else segments(runtime):
        try:
            with closing(Segment.open(each, runtime)) as segment:
                _ = segment.live(), segment.layout, segment.readers()  # raise SegmentUnsafe before anything is shown
                found.append(_data_of(segment, state))
        except SegmentError as exc:  # one that is unusable, or was just removed, must not hide the others
            broken[each] = exc
    return found, broken


def _data_of(segment: Segment, state: Path | None) -> dict[str, Any]:
    """``segment_json``, with the pin, the last failure if nothing was published since, and the group, if any."""
    data = segment_json(segment) | {"extras": _bytes_of_extras(segment)}
    with State(segment.name, state) as history:
        try:
            if pin := history.pin_file.read():
                data["pin"] = pin.name
        except StateError as exc:
            complain(exc)
        try:
            for failure in history.events(kinds=("failure", "reject"), limit=1):
                at = datetime.fromtimestamp(failure.at, UTC)
                if not data["published_at"] or at > data["published_at"]:
                    data["last_failure"] = {"at": at, "reason": failure.reason}
        except StateError as exc:
            complain(exc)
    if group := group_of(segment.path):
        data["group"] = group
    return data


def _bytes_of_extras(segment: Segment) -> int:
    """The size of the files that travel with the live weights; of their bytes, only the header's length is read."""
    if (lease := segment.lease()) is None:
        return 0
    try:
        total = segment.leased(lease).extras
        if not total:
            return 0
        with (
            opened(open_dir(segment.path)) as directory,
            opened(open_file(extras_name(lease.slot), os.O_RDONLY, directory)) as fd,
        ):
            return max(0, total - 8 - int.from_bytes(read_at(fd, 8, 0), "little"))
    except FileNotFoundError:  # the segment is being removed
        return 0
    finally:
        lease.release()


def segment_json(segment: Segment) -> dict[str, Any]:
    """Describes a segment and its readers, for programs and tables; times are ``datetime`` (see ``to_json``)."""
    live, readers = segment.live(), segment.readers()
    version = live.version if live else 0
    return {
        "name": segment.name,
        "version": version,
        "step": live.step if live else None,
        "checkpoint": live.checkpoint if live else None,
        "published_at": datetime.fromtimestamp(live.published_at, UTC) if live else None,
        "pin": None,
        "last_failure": None,
        "bytes": segment.layout.nbytes,
        "tensors": len(segment.layout.tensors),
        "slots": segment.slots,
        "added_slots": len(segment.slot_numbers()) - segment.slots,
        "max_slots": segment.bound,
        "oldest_version": oldest_version(segment),
        "readers": [
            {
                "pid": r.pid,
                "process": r.process,
                "mode": r.mode,
                "version": r.version,
                "lag": version - r.version,
                "since": datetime.fromtimestamp(r.since, UTC),
                "lease_since": datetime.fromtimestamp(r.oldest, UTC) if r.oldest else None,
                "holds": segment.held_back(r),
            }
            for r in readers
        ],
    }


def to_json(data: Any) -> str:
    """JSON on one line, with times as ``when`` writes them and paths as strings."""
    return json.dumps(
        data, default=lambda value: when(value.timestamp()) if isinstance(value, datetime) else str(value)
    )


def status_view(found: list[dict[str, Any]]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    return Group(*map(segment_view, found)) if found else Text("no segments")


def segment_view(data: dict[str, Any], most: int | None = None) -> RenderableType:
    """Shows a segment as ``segment_json`` gives it, and at most ``most`` of its readers."""
    from rich.console import Group
    from rich.text import Text

    readers = data["readers"]
    parts: list[RenderableType] = [Text.assemble(*_headline(data))]
    parts += [Text(f"  {note}", "yellow") for note in _notes(data)]
    parts.append(_reader_table(readers[:most]) if readers else Text("  no readers", "dim"))
    if most and len(readers) > most:
        parts.append(Text(f"  … and {count(len(readers) - most, 'more reader')}"))
    return Group(*parts)


def _headline(data: dict[str, Any]) -> list[str | tuple[str, str]]:
    name = (data["name"], "bold")
    if not data["version"]:
        return [name, ("  no version yet", "yellow")]
    step = "" if data["step"] is None else f"  step {data['step']}"
    file = printable(data["checkpoint"] or "weights from memory")
    more = f"{step}  {size(data['bytes'])}  {age(data['published_at'])} ago\n  {file}"
    return [name, (f"  version {data['version']}", "green"), more]


def _notes(data: dict[str, Any]) -> Iterator[str]:
    if data.get("pin"):
        yield f"pinned: {printable(data['pin'])}"
    if data.get("added_slots"):
        slots = data["slots"] + data["added_slots"]
        yield f"{slots} slots, {data['max_slots']} at most: readers keep older versions"
    if group := data.get("group"):
        yield f"group: rank {group['rank']} of {group['size']}: {few(group['boxes'])}"
    if failure := data.get("last_failure"):
        reason = " ".join((failure["reason"] or "").split())
        yield f"last failure {age(failure['at'])} ago: {printable(reason[:200])}"


def _reader_table(readers: list[dict[str, Any]]) -> Table:
    from rich.text import Text

    rows = plain_table()
    rows.add_column("  reader", overflow="ellipsis", no_wrap=True)
    for column in ("pid", "version", "lag", "since"):
        rows.add_column(column, justify="right", no_wrap=True)
    rows.add_column("mode", no_wrap=True)
    rows.add_column("oldest lease", justify="right", no_wrap=True)
    for r in readers:
        lease = age(r["lease_since"]) if r["lease_since"] else ""
        rows.add_row(
            f"  {r['process']}",
            str(r["pid"]),
            str(r["version"]),
            Text(str(r["lag"]), "yellow" if r["lag"] else ""),
            age(r["since"]),
            r["mode"],
            lease + (f", version {', '.join(map(str, r['holds']))}" if r["holds"] else ""),
        )
    return rows


def age(moment: datetime) -> str:
    return duration(max(0.0, time.time() - moment.timestamp()))


def view_of(
    found: list[dict[str, Any]], broken: Mapping[str, Exception], recent: Callable[[str], int], lines: int
) -> RenderableType:
    """The screen of ``--watch``; segments that cannot be read, or failed last, come first.

    Args:
        found: the segments that ``look`` returned.
        broken: why others cannot be read, by name.
        recent: returns the number of versions that went live in a segment within the last minute.
        lines: most lines that fit on the screen.
    """
    from rich.console import Group
    from rich.text import Text

    readers = sum(len(each["readers"]) for each in found)
    segments = count(len(found) + len(broken), "segment")
    rows = [(f"wsync {time.strftime('%H:%M:%S')}  {segments}, {count(readers, 'reader')}", ""), (_HEAD, "bold")]
    rows += [(_fit(f"{name}: {' '.join(str(why).split())}"), "red") for name, why in broken.items()]
    for each in sorted(found, key=lambda each: (not each["last_failure"], each["name"])):
        rows += _segment_rows(each, recent(each["name"]))
    if len(rows) > lines:
        rows = [*rows[: lines - 1], (f"… and {len(rows) - lines + 1} more lines", "dim")]
    return Group(*(Text(*row) for row in rows))


def _segment_rows(data: dict[str, Any], recent: int) -> list[tuple[str, str]]:
    """The lines of a segment and its readers, each with its style."""
    step = "" if data["step"] is None else str(data["step"])
    live = data["version"]
    since = age(data["published_at"]) if live else "nothing live"
    pinned = " (pinned)" if data["pin"] else ""
    name = f"{data['name']:.{31 - len(pinned) - 1}}{pinned}"
    line = f"{name:<31}{live or '':>8}{'':>5}{step:>11}{since:>12}{recent:>9}"
    rows = [(_fit(line), "green" if live else "yellow")]
    for reader in sorted(data["readers"], key=lambda reader: -reader["lag"]):
        who = printable(f"  {reader['process']:.18} {reader['pid']}")
        line = f"{who:<31}{reader['version']:>8}{reader['lag']:>5}{reader['mode']:>11}{age(reader['since']):>12}"
        rows.append((_fit(line), "yellow" if reader["lag"] else ""))
    if failure := data["last_failure"]:
        reason = printable(" ".join((failure["reason"] or "").split()))
        rows.append((_fit(f"  failed {age(failure['at'])} ago: {reason}"), "red"))
    return rows


def _fit(line: str) -> str:
    return line if len(line) <= _COLUMNS else f"{line[: _COLUMNS - 1]}…"


def check(
    found: list[dict[str, Any]], broken: Mapping[str, str], bounds: Bounds, state: Path | None
) -> tuple[str, int]:
    """The line for a monitor, and the exit code.

    Args:
        found: the segments that ``look`` returned.
        broken: why others cannot be read, by name.
        state: the directory of histories, which show since when a reader is behind.
    """
    code, words, figures = (0, [], []) if found or broken else (2, ["there is no segment"], [])
    for name, why in broken.items():
        code, words = 2, [*words, f"{name} cannot be read: {' '.join(why.split())}"]
    for each in found:
        name = each["name"]
        if not each["version"]:
            code, words = 2, [*words, f"{name} has no version yet"]
            continue
        age, readers = time.time() - each["published_at"].timestamp(), each["readers"]
        is_stale = bounds.staleness is not None and age > bounds.staleness
        troubles = [f"version {each['version']} is {duration(age)} old"] if is_stale else []
        troubles += _lagging(each, bounds, state)
        code = max(code, int(bool(troubles)))
        good = f"{name} is at version {each['version']}, {duration(age)} old, {count(len(readers), 'reader')}"
        words.append(f"{name}: {', '.join(troubles)}" if troubles else good)
        lag = max((reader["lag"] for reader in readers), default=0)
        figures += [
            f"{name}_age={age:.0f}s;{bounds.staleness or ''}",
            f"{name}_lag={lag};{'' if bounds.lag is None else bounds.lag}",
        ]
    words.sort(key=lambda word: " is at version " in word)  # problems come first
    line = f"WSYNC {_WORDS[code]}: {'; '.join(words)}"
    return printable(f"{line} | {' '.join(figures)}" if figures else line), code


def _lagging(data: dict[str, Any], bounds: Bounds, state: Path | None) -> list[str]:
    """Names the readers that are further behind than allowed."""
    behind = [reader for reader in data["readers"] if reader["lag"] > 0]
    late = [reader for reader in behind if bounds.lag is not None and reader["lag"] > bounds.lag]
    words = [f"{_named(r)} is {count(r['lag'], 'version')} behind" for r in late]
    if bounds.lag_seconds is None or not behind:
        return words
    events = _publishes(data["name"], state, limit=_LOOKED_AT)
    for reader in behind:
        missed = [event.at for event in events if event.version > reader["version"]]
        since = max(reader["since"].timestamp(), min(missed, default=data["published_at"].timestamp()))
        seconds = time.time() - since
        if seconds > bounds.lag_seconds:
            words.append(f"{_named(reader)} has not refreshed for {duration(seconds)}")
    return words


def _publishes(name: str, state: Path | None, **bounds: Any) -> list[Event]:
    """The publishes and rollbacks of a segment, within bounds of ``State.events``; empty if they cannot be read."""
    try:
        with State(name, state) as history:
            return history.events(kinds=("publish", "rollback"), **bounds)
    except StateError:  # the time of the newest version is known without it
        return []


def _named(reader: dict[str, Any]) -> str:
    return f"reader {reader['process']} (pid {reader['pid']})"
