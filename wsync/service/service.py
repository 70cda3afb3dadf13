"""A watch as a service: its loop, the signals that it handles, and its messages to the service manager.

SIGTERM and SIGINT end it after the current pass. SIGHUP makes it read the TOML again, at once even if the loop waits:
the new settings hold from the next pass on, options of the command line still win, and a broken TOML leaves the old
settings. No signal waits for an object store: a pass that reads from one is abandoned. The segment's name, and the
port, address and file of the metrics, change only at a restart. A SIGHUP from a terminal that closes ends the watch.
"""

from __future__ import annotations

import _thread
import os
import signal
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import SpecError, WsyncError
from ..history.state import State
from ..segment.segment import Segment
from ..settings import layout_process
from ..settings.spec import Spec
from ..sync.loop import LONGEST, run
from ..sync.outcome import Outcome
from ..sync.syncer import Syncer
from .systemd import Notifier

if TYPE_CHECKING:
    from ..fleet.fleet import Fleet
    from ..fleet.group import Group
    from .metrics_endpoint import Monitor


class Log(Protocol):
    """Logs what a watch does; the command line has one for terminals, files and programs."""

    def tell(self, event: Outcome | WsyncError) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def hook(self, kind: str, ok: bool, message: str) -> None: ...

    def reached(self, version: int, readers: int, seconds: float) -> None: ...

    def note(self, level: str, event: str, text: str) -> None: ...


class Service:
    """One watch, from its first look until it is stopped.

    Args:
        load: reads the spec, with the options of the command line; called again at each SIGHUP.
        toml: the file that ``load`` reads; None for an import string, which cannot be read again.
        checkpoints: a directory, file or URL; default the spec's.
        runtime: where segments live; None for the default.
        state: where history and pins are kept; None for the default.
        take_over: whether the first publish may replace another spec's version.

    Attributes:
        notifier: sends messages to the service manager.

    Raises:
        UsageError: the spec cannot be used, or names no checkpoints.
    """

    def __init__(
        self,
        load: Callable[[], Spec],
        toml: str | None,
        checkpoints: str | os.PathLike[str] | None = None,
        runtime: str | os.PathLike[str] | None = None,
        state: str | os.PathLike[str] | None = None,
        *,
        take_over: bool = False,
    ) -> None:
        self._state = state
        self._load, self._toml, self._checkpoints, self._runtime = load, toml, checkpoints, runtime
        self._wake = threading.Event()
        self._stopped = self._hup = False
        self._terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._signalled)
        self._group: Group | None = None
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started it: one box of a group
            from ..fleet.group import Group

            self._group = Group(os.environ)
        self.spec = load()
        self._use(self._syncer(self.spec, take_over))
        self.notifier = Notifier.from_environment()

    def run(self, log: Log, monitor: Monitor | None = None) -> bool:
        """Makes passes until it is stopped; returns False if too many failed in a row.

        Raises:
            UsageError: the policy cannot be used.
        """

        def tell(event: Outcome | WsyncError) -> None:
            self.notifier.turned()
            if monitor:  # before the log: whoever reads the log finds the metrics up to date
                monitor.tell(event)
            log.tell(event)
            self._look(reach, event, log, monitor)
            if isinstance(event, Outcome) and event.version:
                self.notifier.ready()

        def progress(done: int, total: int) -> None:
            self.notifier.staging()
            log.progress(done, total)

        def report(kind: str, ok: bool, message: str) -> None:
            if monitor:
                monitor.figures.hook(kind, ok)
            log.hook(kind, ok, message)

        reach = Reach()
        try:
            while not self._stopped:
                self.notifier.patience = _patience(self.spec)
                self.syncer.box.progress, self.syncer.box.report = progress, report
                if self._group:
                    self._group.note = log.note
                self.syncer.record.complain = lambda exc: log.note("warning", "history", str(exc))
                if not (self._fleet.run(self._wake, tell) if self._fleet else run(self.syncer, self._wake, tell)):
                    return False
                self._wake.clear()  # before the flags are checked: a signal that comes now ends the next wait
                if self._hup and not self._stopped:
                    self._hup = False
                    self._hang_up(log, monitor)
            return True
        finally:
            self._close()
            self.notifier.close()

    def _look(self, reach: Reach, event: Outcome | WsyncError, log: Log, monitor: Monitor | None) -> None:
        """Reports once that all readers have the version that this watch published."""
        published = event.version if isinstance(event, Outcome) and event.status == "published" else 0
        with suppress(OSError, WsyncError):  # the next pass reports it
            if told := reach.look(self.syncer.standing.opened, published):
                if monitor:
                    monitor.figures.live.to_all_readers = told[-1]
                log.reached(*told)

    def _signalled(self, number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            self._hup = True
        else:
            self._stopped = True
        try:  # in another thread: the interrupted one may hold the event's lock
            _thread.start_new_thread(self._wake.set, ())
        except RuntimeError:  # no thread can be started, or the process is ending
            self._wake.set()

    def _hang_up(self, log: Log, monitor: Monitor | None) -> None:
        if self._terminal and not _has_terminal():
            self._stopped = True
            _leave_terminal()
            return
        if self._toml is None:
            log.note(
                "info", "reload", f"SIGHUP: {self.spec.policy} is not a TOML file, so there is nothing to read again"
            )
            return
        self.notifier.reloading()
        try:
            new = self._load()
            if new.name != self.spec.name:
                raise SpecError(
                    f"{self._toml}: the name is now {new.name!r}, but this watch keeps segment {self.spec.name!r}. "
                    "Restart the watch to change the name."
                )
            if new.fingerprint() != self.spec.fingerprint():
                layout_process.layout_of_spec(new)  # a policy that cannot be built must not end a watch that works
            standing = replace(self.spec.metrics, max_staleness=new.metrics.max_staleness)
            late = differing(new.metrics, standing, "metrics.")
            new = replace(new, metrics=standing)
            syncer = self._syncer(new, self.syncer.box.claim.take_over)
        except WsyncError as exc:
            log.note("error", "reload", f"SIGHUP: the old settings stay: {exc}")
        else:
            differ = ", ".join(differing(self.spec, new))
            self._close()
            self._use(syncer)
            self.spec = new
            if monitor and monitor.endpoint:
                monitor.endpoint.max_staleness = standing.max_staleness
            log.note("info", "reload", f"SIGHUP: {self._toml} read again: {differ or 'nothing'} changed")
            if late:
                log.note("warning", "reload", f"SIGHUP: {', '.join(late)} changed, which needs a restart")
        self.notifier.turned()
        self.notifier.reloaded()

    def _syncer(self, spec: Spec, take_over: bool) -> Syncer:
        allowed = spec.metrics.max_staleness
        if allowed is not None and allowed <= spec.poll:
            raise SpecError(
                f"metrics.max_staleness = {allowed} (--max-staleness) is too short: two looks are up to {spec.poll} "
                "seconds apart (--poll). Give several times that."
            )
        state = State(spec.name, self._state, spec.history)
        role: Any = "member" if self._group else "watch"
        return Syncer(spec, self._checkpoints, runtime=self._runtime, state=state, role=role, take_over=take_over)

    def _use(self, syncer: Syncer) -> None:
        """Uses this syncer from now on, for this box alone or as one box of the group."""
        self.syncer = syncer
        self._fleet: Fleet | None = None
        if self._group:
            from ..fleet.fleet import Fleet

            self._fleet = Fleet(syncer, self._group)

    def _close(self) -> None:
        (self._fleet or self.syncer).close()


class Reach:
    """Reports, once for each version that a watch published, when all readers have it."""

    def __init__(self) -> None:
        self._version = 0  # the version that some readers do not have yet; 0 if there is no such version

    def look(self, segment: Segment | None, published: int) -> tuple[int, int, float] | None:
        """Looks after a pass, without waiting.

        Args:
            published: the version that this pass published; 0 if it published nothing.

        Returns:
            The version, the number of readers, and the seconds from its publish until the last of them had it; None if
            a reader does not have it yet, or there is nothing to report.
        """
        self._version = published or self._version
        live = segment.live() if segment and self._version else None
        if not segment or not live or live.version != self._version:
            self._version = 0
            return None
        readers = segment.readers()
        if any(reader.version < live.version for reader in readers):
            return None
        self._version = 0
        if not readers:
            return None
        return live.version, len(readers), max(0.0, max(reader.since for reader in readers) - live.published_at)


def differing(old: Any, new: Any, table: str = "") -> list[str]:
    """The names of the settings that differ; not their values, which may be secret."""
    names = []
    for field in fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if is_dataclass(before):
            names += differing(before, after, f"{field.name}.")
        elif before != after:
            names.append(table + field.name)
    return names


def _patience(spec: Spec) -> float:
    """Most seconds that a turn of a healthy loop takes, without staging: a pause, a gate, hooks that must end."""
    hooks = spec.hooks
    gate = hooks.gate_timeout if hooks.gate else 0.0
    ends = max(hooks.exec_timeout if hooks.exec else 0.0, hooks.webhook_timeout if hooks.webhook else 0.0)
    return max(spec.poll, LONGEST) + gate + 2 * ends


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal; it loses that when the window is closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _leave_terminal() -> None:
    """Discards all further output to the terminal, which is closed: a write to it would fail."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1, 2):
        try:
            if stat.S_ISCHR(os.fstat(fd).st_mode):
                os.dup2(null, fd)
        except OSError:  # it was closed from the start
            pass
    os.close(null)
