"""Serves a watch's metrics as ``[metrics]`` says: in a file, and as ``/metrics`` and ``/healthz`` over HTTP.

By default, the port listens on the loopback only: the metrics show steps and processes to any client. Each client has a
thread, ``PATIENCE`` seconds, and one request. If there are too many clients, the oldest is dropped, so that slow ones
keep nobody waiting.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import make_wsgi_app

from ..errors import UsageError, WsyncError
from ..settings.spec import Metrics
from ..sync.outcome import Outcome
from .metrics import HEALTHY, Figures, last_success, write

_log = logging.getLogger("wsync")
PATIENCE = 10.0  # most seconds that a client may take in total
_MOST = 64  # most clients at a time
_EVERY = 5.0  # least seconds between two writes of the file while passes find nothing new


class Endpoint:
    """Serves one watch's metrics until it is closed.

    Args:
        max_staleness: seconds, see ``spec.Metrics``; may be changed at any time.

    Attributes:
        port: the port that it listens on; if 0 was given, the free one that it got.

    Raises:
        UsageError: the port is taken or not allowed, or the address is not this machine's.
    """

    def __init__(self, figures: Figures, address: str, port: int, max_staleness: float | None = None) -> None:
        self._figures, self.max_staleness = figures, max_staleness
        self._metrics = make_wsgi_app(figures.registry)
        try:
            family, _, _, _, where = socket.getaddrinfo(
                address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._server = _Server(family, where)
        except (OSError, UnicodeError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise UsageError(
                f"figures cannot be served on {address} port {port} ({reason}). Name another with --metrics-port or "
                "--metrics-address; --metrics-port 0 takes any free one."
            ) from exc
        self._server.set_app(self._answer)
        host, self.port = str(where[0]), int(self._server.server_port)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, name="wsync-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
        is_head = environ["REQUEST_METHOD"] == "HEAD"
        if is_head:
            environ["REQUEST_METHOD"] = "GET"
        path = environ["PATH_INFO"]
        status, text = "404 Not Found", "only /metrics and /healthz exist"
        try:
            if "://" in path:  # a whole URL, as a client sends it to a proxy
                path = urlsplit(path).path
            if path == "/metrics":
                body: list[bytes] = self._metrics(environ, start_response)
                return [] if is_head else body
        except (ValueError, TypeError):  # from urlsplit, and from the client library for a version that is not a number
            status, text = "400 Bad Request", "the address, or the Accept header, cannot be read"
        if path == "/healthz":
            healthy, text = self._figures.health(self.max_staleness)
            status = "200 OK" if healthy else "503 Service Unavailable"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [] if is_head else [f"{text}\n".encode()]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 2 * _MOST
    patience = PATIENCE

    def __init__(self, family: socket.AddressFamily, where: Any) -> None:
        self.address_family = family
        self._clients: dict[Any, float] = {}  # when each connected (time.monotonic()), the oldest first
        super().__init__(where, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._clients) >= _MOST:
            self._drop(next(iter(self._clients)))
        self._clients[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Drops clients whose time is up; called after each client, and twice a second."""
        late = time.monotonic() - self.patience
        for request, since in list(self._clients.items()):
            if since < late:
                self._drop(request)

    def shutdown_request(self, request: Any) -> None:
        self._clients.pop(request, None)
        super().shutdown_request(request)

    def _drop(self, request: Any) -> None:
        """Shuts a client's connection down, which ends its thread."""
        self._clients.pop(request, None)
        try:
            request.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is gone already
            pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        exc = sys.exception()
        if not isinstance(exc, OSError):  # OSError: a client is silent, or went away
            _log.warning("a request to the figures' port failed: %s", f"{type(exc).__name__}: {exc!s:.200}")


class _Handler(WSGIRequestHandler):
    def get_stderr(self) -> io.StringIO:
        return io.StringIO()  # if the client library fails at an odd request, the answer is 500, without a traceback

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: a watch logs events, and a scrape is not one."""


class Monitor:
    """Counts a watch's passes, serves the metrics, and writes them to a file.

    Args:
        name: name of the segment.
        runtime: where segments live; None for the default.
        complain: called if the file cannot be written; again only if the reason changes.

    Raises:
        UsageError: the port or the file cannot be used.
    """

    def __init__(
        self,
        name: str,
        settings: Metrics,
        runtime: str | os.PathLike[str] | None,
        complain: Callable[[WsyncError], None],
    ) -> None:
        self.figures = Figures(name, runtime)
        self._complain, self._complaint, self._next = complain, "", 0.0
        self._file = Path(settings.file) if settings.file else None
        if self._file:
            self.figures.live.last_success = last_success(self._file, name)
        self.endpoint: Endpoint | None = None
        if settings.port is not None:
            self.endpoint = Endpoint(self.figures, settings.address, settings.port, settings.max_staleness)

    def tell(self, event: Outcome | WsyncError) -> None:
        """Counts a pass: its outcome, or why it failed."""
        self.figures.tell(event)
        quiet = isinstance(event, Outcome) and event.status in HEALTHY and event.status != "published"
        if not quiet or time.monotonic() >= self._next:
            self._write()

    def close(self) -> None:
        if self.endpoint:
            self.endpoint.close()
        self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        self._next = time.monotonic() + _EVERY
        try:
            write(self._file, self.figures.registry)
            self._complaint = ""
        except WsyncError as exc:
            if str(exc) != self._complaint:
                self._complaint = str(exc)
                self._complain(exc)
