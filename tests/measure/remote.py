"""Figures of a push from a store, beside a download to shared memory and a push from there.

Run ``python tests/measure/remote.py``. The server is on the loopback and sends from the page cache: once as fast as it
can, and once with each connection held to 80 MB/s, as object stores hold theirs. Times jitter, so nothing here is
asserted. Takes about a minute on two cores.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import socketserver
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from email.utils import formatdate
from pathlib import Path

SIZE = 512 << 20
TENSORS = 200
ROUNDS = 5
HELD = 80e6  # bytes a second

POLICY = """
import torch
from torch import nn

def make():
    return nn.ParameterList(nn.Parameter(torch.zeros({size} // {tensors} // 4)) for _ in range({tensors})).eval()
"""

DOWNLOAD = """
import sys, os
from concurrent.futures import ThreadPoolExecutor
import obstore
from obstore.store import HTTPStore

url, target = sys.argv[1:]
store = HTTPStore.from_url(url.rpartition("/")[0], client_options={"allow_http": True})
size, chunk = obstore.head(store, "x.safetensors")["size"], 8 << 20
fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
def work(at):
    end = min(at + chunk, size)
    for piece in obstore.get(store, "x.safetensors", options={"range": (at, end)}).stream(min_chunk_size=1 << 16):
        at += os.pwrite(fd, piece, at)
with ThreadPoolExecutor(16) as pool:
    list(pool.map(work, range(0, size, chunk)))
"""

PEAK = """
import json, sys
from pathlib import Path
from wsync.settings.spec import load_spec
from wsync.sync.syncer import Syncer

def anonymous():
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon"))

with Syncer(load_spec(sys.argv[1]), sys.argv[2]) as syncer:
    import numpy, obstore
    seen = [anonymous()]
    syncer.box.progress = lambda done, total: seen.append(anonymous())
    syncer.once(force=True)
print(json.dumps([seen[0], max(seen)]))
"""


class Sender(http.server.BaseHTTPRequestHandler):
    """Ranges of one file, by sendfile."""

    protocol_version = "HTTP/1.1"
    file = ""
    rate = 0.0

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.head()

    def do_GET(self) -> None:
        at, left = self.head()
        began, sent = time.monotonic(), 0
        with open(self.file, "rb") as file:
            while left:
                done = os.sendfile(self.connection.fileno(), file.fileno(), at, min(left, 1 << 19))
                at, left, sent = at + done, left - done, sent + done
                if self.rate and (ahead := sent / self.rate - (time.monotonic() - began)) > 0:
                    time.sleep(ahead)

    def head(self) -> tuple[int, int]:
        size = os.path.getsize(self.file)
        match = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(match[1]), min(int(match[2]), size - 1)) if match else (0, size - 1)
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(end - start + 1))
        self.send_header("ETag", '"one"')
        self.send_header("Last-Modified", formatdate(1e9, usegmt=True))
        if match:
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.end_headers()
        self.wfile.flush()
        return start, end - start + 1


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 64


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="wsync-measure-"))
    shared = Path(tempfile.mkdtemp(prefix="wsync-measure-", dir="/dev/shm"))
    os.environ |= {"WSYNC_RUNTIME_DIR": str(shared / "run"), "WSYNC_STATE_DIR": str(shared / "state")}
    try:
        (folder / "policy.py").write_text(POLICY.format(size=SIZE, tensors=TENSORS))
        (folder / "download.py").write_text(DOWNLOAD)
        (folder / "peak.py").write_text(PEAK)
        (folder / "p.toml").write_text('policy = "policy:make"\n')
        import torch
        from safetensors.torch import save_file

        source = folder / "x.safetensors"
        save_file({str(i): torch.randn(SIZE // TENSORS // 4) for i in range(TENSORS)}, source)
        source.read_bytes()
        for rate in (0.0, HELD):
            measure(folder, shared, source, rate)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(shared)


def measure(folder: Path, shared: Path, source: Path, rate: float) -> None:
    """Both ways in turn, as whole processes, into a standing segment."""
    sender = type("One", (Sender,), {"file": str(source), "rate": rate})
    with Server(("127.0.0.1", 0), sender) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, copy = f"http://127.0.0.1:{server.server_port}/x.safetensors", shared / "x.safetensors"
        spec = folder / "p.toml"
        push = [sys.executable, "-m", "wsync", "push", str(spec), "--force"]
        straight = [[*push, url]]
        parallel = [[sys.executable, str(folder / "download.py"), url, str(copy)], [*push, str(copy)]]
        single = [["curl", "-sSo", str(copy), url], [*push, str(copy)]]
        ways = {"straight": straight, "download 16 ranges, then push": parallel}
        if shutil.which("curl"):
            ways["curl, then push"] = single
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, commands in ways.items():
                began = time.perf_counter()
                for command in commands:
                    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                times[name].append(time.perf_counter() - began)
                copy.unlink(missing_ok=True)
        held = f"{rate / 1e6:.0f} MB/s a connection" if rate else "as fast as it goes"
        base = statistics.median(times["straight"])
        for name, taken in times.items():
            middle = statistics.median(taken)
            speed = f"{middle:.2f} s, {SIZE / middle / 1e6:.0f} MB/s, {middle / base:.2f} times"
            print(f"{SIZE >> 20} MiB, {held}: {name}: {speed}")
        peak = [sys.executable, str(folder / "peak.py"), str(spec), url]
        before, most = json.loads(subprocess.run(peak, stdout=subprocess.PIPE, check=True).stdout)
        print(f"  memory of its own: {before >> 10} MiB before, {(most - before) >> 10} MiB more while it reads")
        server.shutdown()


if __name__ == "__main__":
    main()
