"""Runs hooks after a publish, in the background, so that they never delay the next publish.

Each kind of hook has a thread and a mailbox for one version. The newest wins: a version that nobody has taken out yet
is replaced by the next. A hook that failed is tried again after its backoff, until it succeeds or a newer version
comes. When wsync ends, a running hook may finish within its time, a waiting version gets one run, and nothing is tried
again.

``exec`` is a command for ``/bin/sh`` in the spec's directory; status 0 is success. Its environment has
``WSYNC_HOOK_NAME``, ``WSYNC_HOOK_VERSION``, ``WSYNC_HOOK_STEP`` (empty if there is none), ``WSYNC_HOOK_CHECKPOINT`` and
``WSYNC_HOOK_EXTRAS`` (a directory with the extras; empty if there are none). ``webhook`` is one request whose body is a
JSON object with name, version, step, checkpoint and the names of the extras; the header ``Wsync-Version`` has the
version, too. A redirect is not followed but treated like any other answer, and no proxy is used.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoints.files.extras import Extras
from ..errors import WsyncError
from ..segment.publication import Publication
from ..settings.hook_settings import environment
from ..settings.spec import Spec
from . import command

if TYPE_CHECKING:
    import http.client
    from urllib.parse import SplitResult

_log = logging.getLogger("wsync")
_LOOK = 0.25  # seconds between two checks of a wait, which a signal that another thread gets would not end


class Published(NamedTuple):
    """What a hook is run for: a version that went live, and the extras that came with it."""

    live: Publication
    extras: Extras = Extras()


Act = Callable[[Published, threading.Event], None]
Report = Callable[[str, bool, str], None]


class Hook:
    """One kind of hook, with a thread and a mailbox for one version.

    Args:
        kind: its name in messages.
        act: runs the hook once; must return soon after the event is set.
        timeout: seconds that ``act`` takes at most.
        backoff: seconds between a failure and the next try.
        report: called from the hook's thread with the kind, whether the run succeeded, and a message.

    Attributes:
        runs: how often the hook ran, including failures.
        failures: how often it failed.
    """

    def __init__(self, kind: str, act: Act, timeout: float, backoff: float, report: Report) -> None:
        self.kind, self.runs, self.failures = kind, 0, 0
        self._act, self._timeout, self._backoff, self._report = act, timeout, backoff, report
        self._changed = threading.Condition()
        self._waiting: Published | None = None
        self._closing = False
        self._cancel, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._work, name=f"wsync-{kind}", daemon=True).start()

    def send(self, news: Published) -> None:
        """Puts a version into the mailbox in place of one that still waits there."""
        with self._changed:
            self._waiting = news
            self._changed.notify()

    def shut(self, *, now: bool = False) -> None:
        """Ends all retries. With ``now``, also ends a running hook and drops a waiting version."""
        if now:
            self._cancel.set()
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self) -> None:
        """Waits for the running hook and the waiting version, up to their timeouts. An exception ends the hook."""
        until = time.monotonic() + 2 * (self._timeout + 2 * command.GRACE)
        try:
            while not self._ended.wait(_LOOK) and time.monotonic() < until:
                pass
        finally:
            self._cancel.set()
            self._ended.wait(2 * command.GRACE + 1)

    def _work(self) -> None:
        failed: Published | None = None  # to be tried again
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing, self._backoff if failed else None)
                news, self._waiting = self._waiting or (None if self._closing else failed), None
            if news is None or self._cancel.is_set():
                break
            failed = None if self._run(news) else news
        self._ended.set()

    def _run(self, news: Published) -> bool:
        self.runs += 1
        version = news.live.version
        ok, message = True, f"{self.kind} succeeded for version {version}"
        try:
            self._act(news, self._cancel)
        except Exception as exc:  # any: the thread must go on
            self.failures += 1
            why = str(exc) if isinstance(exc, WsyncError) else f"{self.kind} failed: {type(exc).__name__}: {exc}."
            ok, message = False, f"version {version} is live, but {why} A watch tries it again; a push does not."
        try:
            self._report(self.kind, ok, message)
        except Exception:  # other writes to the log report that it cannot be written
            pass
        return ok


class HookRunner:
    """The hooks of a spec.

    Args:
        runtime: where segments live; the command gets this as ``WSYNC_RUNTIME_DIR``.
        report: called from the hooks' threads, see ``Hook``; default: logs failures.
        state_dir: where history and pins are kept; the command gets this as ``WSYNC_STATE_DIR``.

    Attributes:
        hooks: the hooks that are set, by kind: ``exec`` and ``webhook``.
    """

    def __init__(self, spec: Spec, runtime: Path, report: Report | None = None, state_dir: Path | None = None) -> None:
        settings, report = spec.hooks, report or _warn
        self.hooks: dict[str, Hook] = {}
        if settings.exec:
            act: Act = partial(run_command, spec, (runtime, state_dir))
            self.hooks["exec"] = Hook("exec", act, settings.exec_timeout, settings.exec_backoff, report)
        if settings.webhook:
            act = lambda news, cancel: request(spec, news)  # noqa: E731
            self.hooks["webhook"] = Hook("webhook", act, settings.webhook_timeout, settings.webhook_backoff, report)

    def send(self, live: Publication, extras: Extras) -> None:
        """Passes a version to each hook; returns at once."""
        for hook in self.hooks.values():
            hook.send(Published(live, extras))

    def close(self, *, now: bool = False) -> None:
        """Waits until running hooks and waiting versions are done; with ``now``, ends and drops them instead."""
        for hook in self.hooks.values():
            hook.shut(now=now)
        for hook in self.hooks.values():
            hook.join()


def run_command(spec: Spec, places: tuple[Path, Path | None], news: Published, cancel: threading.Event) -> None:
    """Runs ``exec`` once.

    Args:
        places: where segments live, and where history and pins are kept.
        cancel: ends the command once it is set.

    Raises:
        WsyncError: the command failed, or took too long.
        OSError: the extras cannot be written.
    """
    (runtime, state_dir), (live, extras) = places, news
    about = {"name": spec.name, "version": live.version, "step": live.step, "checkpoint": live.checkpoint}
    with command.unpacked(extras.files) as directory:
        ended = command.run(
            ["/bin/sh", "-c", spec.hooks.exec],
            timeout=spec.hooks.exec_timeout,
            environment=environment(runtime, state_dir, **about, extras=directory),
            directory=spec.directory,
            stop=cancel,
        )
    if ended.code != 0:
        why = str(ended) if str(ended).endswith("\n") else f"{ended}. "
        what_now = "Run it by hand" if ended.code is not None else "Let it end sooner, or raise hooks.exec_timeout"
        raise WsyncError(f"the command {spec.hooks.exec!r} {why}{what_now}.")


def request(spec: Spec, news: Published) -> None:
    """Makes the webhook's request once.

    The timeout is for the whole request: a server that sends a byte now and then must not delay a newer version.

    Raises:
        WsyncError: there was no answer in time, or no success. It names only the host: the rest of a URL may be secret.
    """
    import http.client
    from urllib.parse import urlsplit

    settings, (live, extras) = spec.hooks, news
    url = urlsplit(settings.webhook)
    shown = f"the webhook at {url.hostname}"
    about = {"name": spec.name, "version": live.version, "step": live.step, "checkpoint": live.checkpoint}
    body = json.dumps(about | ({"extras": sorted(extras.files)} if extras.files else {})).encode()
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname or "", url.port, timeout=settings.webhook_timeout)
    deadline = time.monotonic() + settings.webhook_timeout
    watchdog = threading.Timer(settings.webhook_timeout, _cut, [connection])
    watchdog.daemon = True
    watchdog.start()
    try:
        connection.connect()
        if time.monotonic() < deadline:
            connection.request(settings.webhook_method.upper(), target, body, _headers(url, live))
            status = connection.getresponse().status
        if time.monotonic() >= deadline:  # http.client takes headers that were cut off as complete
            raise TimeoutError
    except (OSError, http.client.HTTPException) as exc:
        if isinstance(exc, TimeoutError) or time.monotonic() >= deadline:
            raise WsyncError(
                f"{shown} gave no answer within {settings.webhook_timeout:g} s. Look at that server, or raise "
                f"hooks.webhook_timeout."
            ) from exc
        why = command.plain(f"{type(exc).__name__}: {exc}".encode())  # the error may quote the server
        raise WsyncError(f"{shown} could not be called: {why}. Look at that server and hooks.webhook.") from exc
    finally:
        watchdog.cancel()
        connection.close()
    if settings.webhook_success_status not in (0, status):
        raise WsyncError(
            f"{shown} answered {status}, not {settings.webhook_success_status}. Look at that server's log, or set "
            f"hooks.webhook_success_status."
        )


def _headers(url: SplitResult, live: Publication) -> dict[str, str]:
    import base64
    from urllib.parse import unquote

    headers = {"Content-Type": "application/json", "Wsync-Version": str(live.version), "Connection": "close"}
    if url.username is not None:
        pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return headers


def _cut(connection: http.client.HTTPConnection) -> None:
    """Shuts the socket down when time is up, which wakes the thread that waits on it."""
    try:
        if connection.sock:
            connection.sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is not connected yet, or closed already


def _warn(kind: str, ok: bool, message: str) -> None:
    if not ok:
        _log.warning("%s", message)
