"""A proxy between wsync and a server on the loopback that does to answers what networks and servers do.

It speaks as much HTTP as it takes to tell requests apart: one request on a connection, its head read, the server's
answer handed back whole or as a fault leaves it. What the test arms holds for the requests that match, so often.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

Answer = Callable[[bytes, bytes], "list[bytes]"]
"""What a fault makes of an answer: of its head and its body, the pieces that are sent before the connection is cut."""


@dataclass
class Fault:
    """What happens to requests whose first line and headers match, ``times`` times."""

    matches: str
    times: int
    answer: Answer | None = None
    before: Callable[[], object] | None = None
    happened: threading.Event = field(default_factory=threading.Event)


class Proxy:
    """Listens on a free port of the loopback until closed.

    Attributes:
        url: of itself.
        requests: the head of each request, in their order.
        most: connections that were served at one time.
    """

    def __init__(self, port: int) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._port, self._lock = port, threading.Lock()
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.requests: list[str] = []
        self.sent = self.most = self._now = 0
        self._faults: list[Fault] = []
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(
        self,
        matches: str,
        answer: Answer | None = None,
        *,
        times: int = 1,
        before: Callable[[], object] | None = None,
    ) -> Fault:
        """The next ``times`` requests that match get this answer; ``before`` runs before the server is asked."""
        fault = Fault(matches, times, answer, before)
        with self._lock:
            self._faults.append(fault)
        return fault

    def heads(self, matches: str) -> list[str]:
        return [head for head in self.requests if re.search(matches, head)]

    def close(self) -> None:
        self._closed.set()
        self._server.close()

    @property
    def closed(self) -> threading.Event:
        return self._closed

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        with client, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (data := client.recv(65536)):
                    return
                head += data
            text = head.decode("latin-1")
            with self._lock:
                self.requests.append(text)
                fault = next((f for f in self._faults if f.times and re.search(f.matches, text)), None)
                if fault:
                    fault.times -= 1
            if fault and fault.before:
                fault.before()
            answer, body = self._ask(head)
            pieces = fault.answer(answer, body) if fault and fault.answer else [answer, body]
            if fault:
                fault.happened.set()
            for piece in pieces:
                client.sendall(piece)
                self.sent += len(piece)
        with self._lock:
            self._now -= 1

    def _ask(self, head: bytes) -> tuple[bytes, bytes]:
        head = re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head).replace(
            b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1
        )
        with socket.create_connection(("127.0.0.1", self._port)) as server:
            server.sendall(head)
            data = b""
            while piece := server.recv(1 << 20):
                data += piece
        answer, _, body = data.partition(b"\r\n\r\n")
        answer = re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", answer) + b"\r\nConnection: close\r\n\r\n"
        return answer, body


def cut(answer: bytes, body: bytes) -> list[bytes]:
    """The connection ends in the middle of the body."""
    return [answer, body[: len(body) // 2]]


def nothing(answer: bytes, body: bytes) -> list[bytes]:
    """The connection ends before any answer."""
    return []


def busy(answer: bytes, body: bytes) -> list[bytes]:
    """503, as a store says that it wants fewer requests."""
    text = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    return [b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(text), text]


def truncated(answer: bytes, body: bytes) -> list[bytes]:
    """A shorter range than was asked for, told as a whole one."""
    body = body[: len(body) // 2]
    return [re.sub(rb"(?i)content-length: \d+", b"Content-Length: %d" % len(body), answer), body]


def shifted(answer: bytes, body: bytes) -> list[bytes]:
    """Another range than was asked for, of the right length, told as what it is."""
    return [re.sub(rb"(?i)content-range: bytes (\d+)-(\d+)", rb"Content-Range: bytes 1\1-1\2", answer), body]


def longer(answer: bytes, body: bytes) -> list[bytes]:
    """More bytes than the range has."""
    body += b"more"
    return [re.sub(rb"(?i)content-length: \d+", b"Content-Length: %d" % len(body), answer), body]
