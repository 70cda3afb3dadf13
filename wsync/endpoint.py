"""``/metrics`` and ``/healthz`` over HTTP, in a thread beside a watch.

On the loopback unless told otherwise: the figures name checkpoints' steps and processes, and nobody is asked who he is.
Only GET and HEAD of these two are answered; a client that sends nothing is dropped, and at most ``MAX_CLIENTS`` are
served at a time.
"""

from __future__ import annotations

import socket
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from .errors import UsageError
from .exposition import exposed, registry_of
from .metrics import Figures

MAX_CLIENTS = 16


class Endpoint:
    """The server of one watch's figures; serves until it is closed.

    Args:
        max_staleness: seconds, see ``metrics.Metrics``; may be set anew at any time.

    Attributes:
        port: the one that it has, also where any free one was asked for.

    Raises:
        UsageError: the port is taken or not allowed, or the address is not this machine's.
    """

    def __init__(self, figures: Figures, address: str, port: int, max_staleness: float | None = None) -> None:
        self.figures, self.max_staleness = figures, max_staleness
        self.registry = registry_of(figures)
        try:
            family, _, _, _, where = socket.getaddrinfo(
                address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._server = _Server(self, family, where)
        except (OSError, UnicodeError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise UsageError(
                f"figures cannot be served on {address} port {port} ({reason}). Name another with --metrics-port or "
                "--metrics-address; --metrics-port 0 takes any free one."
            ) from exc
        host, self.port = str(where[0]), int(self._server.server_address[1])
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, name="wsync-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, endpoint: Endpoint, family: int, where: Any) -> None:
        self.endpoint, self.address_family = endpoint, family
        self._free = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__(where, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nobody's concern."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds that a client may be silent
    server: _Server
    server_version = "wsync"
    sys_version = ""

    def do_GET(self) -> None:
        endpoint = self.server.endpoint
        path = urlsplit(self.path).path
        if path == "/metrics":
            self._answer(200, *exposed(endpoint.registry, self.headers.get("Accept", "")))
        elif path == "/healthz":
            healthy, text = endpoint.figures.health(endpoint.max_staleness)
            self._answer(200 if healthy else 503, "text/plain; charset=utf-8", f"{text}\n".encode())
        else:
            self._answer(404, "text/plain; charset=utf-8", b"there are /metrics and /healthz\n")

    do_HEAD = do_GET

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a scrape is no event."""
