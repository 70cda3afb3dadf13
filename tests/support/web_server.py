"""A plain web server of a folder on the loopback, with ranges and ETags as the test wants them."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Web:
    """How the server answers.

    Attributes:
        ranges: it gives ranges; else always all of a file.
        etags: it gives ETags, and heeds If-Match.
        heads: it answers HEAD, which a signed URL is not good for.
        password: ``user:password`` that it asks for.
        query: that each request must have.
        paths: what was asked for, with the query.
    """

    folder: Path
    ranges: bool = True
    etags: bool = True
    heads: bool = True
    password: str = ""
    query: str = ""
    port: int = 0
    paths: list[str] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextmanager
def serve(web: Web) -> Iterator[Web]:
    """Serves until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            if web.heads:
                self.answer(body=False)
            else:
                self.send_error(403)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            web.paths.append(self.path)
            url = urlsplit(self.path)
            file = web.folder / unquote(url.path).lstrip("/")
            expected = f"Basic {base64.b64encode(web.password.encode()).decode()}"
            if (web.password and self.headers["Authorization"] != expected) or url.query != web.query:
                self.send_error(401 if web.password else 403)
                return
            if not file.is_file():
                self.send_error(404)
                return
            data, info = file.read_bytes(), file.stat()
            etag = f'"{info.st_mtime_ns}-{info.st_size}"'
            if web.etags and self.headers["If-Match"] not in (None, etag):
                self.send_error(412)
                return
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "") if web.ranges else None
            size = len(data)
            if wanted:
                start, end = int(wanted[1]), min(int(wanted[2]), size - 1)
                if start >= size:
                    self.send_error(416)
                    return
                data = data[start : end + 1]
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Last-Modified", formatdate(info.st_mtime, usegmt=True))
            if web.etags:
                self.send_header("ETag", etag)
            self.end_headers()
            if body:
                self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that hangs up is none."""

    with Server(("127.0.0.1", 0), Handler) as server:
        web.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield web
        finally:
            server.shutdown()
            thread.join()
