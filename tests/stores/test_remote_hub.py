"""A repository of the Hugging Face hub, as the hub's own library asks for it: one commit at a time."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from builders import marks, write
from policies import mlp
from safetensors.torch import save

import wsync
from wsync.checkpoints.files.extras import ExtraFiles
from wsync.fitting.fit import Fit
from wsync.layout.layout import layout_of
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec
from wsync.sync.syncer import Syncer

pytestmark = pytest.mark.slow

pytest.importorskip("obstore")
pytest.importorskip("huggingface_hub")

NAME, TOKEN = "policies.mlp", "hf_s3cretToken"


class Repository:
    """What the hub answers of one repository: its commits' files, behind a redirect to another place.

    Attributes:
        commits: the files of each commit, the last one the newest.
        asked: method and path of each request, with its Authorization.
        before: called with each path before it is answered.
    """

    def __init__(self) -> None:
        self.commits: list[dict[str, bytes]] = []
        self.asked: list[tuple[str, str, str | None]] = []
        self.before: Any = lambda path: None

    def commit(self, **files: bytes) -> None:
        before = self.commits[-1] if self.commits else {}
        self.commits.append({**before, **{name.replace("__", "/"): data for name, data in files.items()}})

    def entry(self, number: int, path: str) -> dict[str, Any]:
        since = next(n for n, files in enumerate(self.commits) if files.get(path) == self.commits[number][path])
        data = self.commits[number][path]
        content = sha256(data).hexdigest()
        date = f"2026-01-{since + 1:02}T00:00:00.000Z"
        return {
            "type": "file",
            "oid": content[:40],
            "path": path,
            "size": len(data),
            "lfs": {"oid": content, "size": len(data), "pointerSize": 130},
            "lastCommit": {"id": f"commit{since}", "title": "x", "date": date},
        }


@pytest.fixture
def hub(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    """A hub on the loopback with one repository, owner/net, and a segment."""
    repository = Repository()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            repository.before(path)
            repository.asked.append((self.command, path, self.headers["Authorization"]))
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            newest = len(repository.commits) - 1
            if match := re.fullmatch(r"/owner/net/resolve/commit(\d+)/(.+)", path):
                self.send_response(302)
                self.send_header("Location", f"/storage/{match[1]}/{match[2]}?sig=abc")
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif match := re.fullmatch(r"/storage/(\d+)/(.+)", path):
                self.give(repository.commits[int(match[1])][match[2]])
            elif re.fullmatch(r"/api/models/owner/net(/revision/main)?", path):
                self.tell({"id": "owner/net", "sha": f"commit{newest}", "siblings": []})
            elif match := re.fullmatch(r"/api/models/owner/net/tree/commit(\d+)/?(.*)", path):
                number = int(match[1])
                below = [p for p in repository.commits[number] if p.startswith(match[2])]
                self.tell([repository.entry(number, p) for p in below])
            elif match := re.fullmatch(r"/api/models/owner/net/paths-info/commit(\d+)", path):
                number = int(match[1])
                wanted = [p for p in repository.commits[number] if p in unquote(body.decode())]
                self.tell([repository.entry(number, p) for p in wanted])
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def tell(self, data: object) -> None:
            text = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def give(self, data: bytes) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
            start, end = (int(wanted[1]), min(int(wanted[2]), len(data) - 1)) if wanted else (0, len(data) - 1)
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(end - start + 1))
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
            self.send_header("ETag", '"of-the-storage"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[start : end + 1])

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    WritableSegment.create(NAME, layout_of(mlp()), spec=load_spec("policies:mlp").fingerprint()).close()
    with Server(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield repository
        server.shutdown()
        thread.join()


def data(tmp_path: Path, mark: float) -> bytes:
    return write(tmp_path / "x.safetensors", mlp(), mark).read_bytes()


def live_marks() -> set[float]:
    policy = mlp()
    with wsync.attach(policy, NAME, mode="copy"):
        return marks(policy)


def test_the_newest_of_a_repository_goes_live(hub: Repository, tmp_path: Path) -> None:
    """What was committed last is the newest; nothing new is current; the token goes to the hub."""
    hub.commit(**{"run__b.safetensors": data(tmp_path, 1.0)})
    hub.commit(**{"run__a.safetensors": data(tmp_path, 2.0), "README.md": b"net"})
    with Syncer(load_spec("policies:mlp"), "hf://owner/net/run") as syncer:
        outcome = syncer.once()
        assert (outcome.status, outcome.checkpoint) == ("published", "hf://owner/net/run/a.safetensors"), outcome.reason
        assert syncer.once().status == "current"
        assert live_marks() == {2.0}
        hub.commit(**{"run__b.safetensors": data(tmp_path, 3.0)})
        assert (syncer.once().status, live_marks()) == ("published", {3.0})
    assert {token for _, path, token in hub.asked if path.startswith(("/api/models", "/owner"))} == {f"Bearer {TOKEN}"}
    with Syncer(load_spec("policies:mlp"), "hf://owner/net/run/b.safetensors") as syncer:
        assert syncer.once().status == "current"


def test_a_commit_in_the_middle_of_the_read_is_seen(
    hub: Repository, tmp_path: Path, monkeypatch: Any, read_by: Callable[..., None]
) -> None:
    """Every range is of one commit; where the file is another by the end, it is read again at the new one."""
    read_by(chunk=64)
    hub.commit(**{"x.safetensors": data(tmp_path, 1.0)})
    other, done = data(tmp_path, 2.0), threading.Event()

    def before(path: str) -> None:
        if path.startswith("/storage") and len(hub.asked) > 8 and not done.is_set():
            done.set()
            hub.commit(**{"x.safetensors": other})

    hub.before = before
    with Syncer(load_spec("policies:mlp"), "hf://owner/net") as syncer:
        outcome = syncer.once()
        assert done.is_set() and (outcome.status, live_marks()) == ("published", {2.0}), outcome.reason
        commits = [path.split("/")[4] for _, path, _ in hub.asked if "/resolve/" in path]
        assert commits == sorted(commits) and {*commits} == {"commit0", "commit1"}


def test_a_named_adapter_of_a_repository_has_its_configuration(hub: Repository, tmp_path: Path) -> None:
    """The URL of an adapter's file leads to what lies beside it, and the two together are known again."""
    halves = {"0.lora_A.weight": torch.ones(1, 4), "0.lora_B.weight": torch.ones(8, 1)}
    adapter = save({f"base_model.model.{name}": half for name, half in halves.items()})
    hub.commit(**{"base.safetensors": data(tmp_path, 1.0), "run__adapter_model.safetensors": adapter})
    hub.commit(**{"run__adapter_config.json": b'{"peft_type": "LORA", "lora_alpha": 1, "r": 1}'})
    spec = replace(load_spec("policies:mlp"), weights=Fit(base="hf://owner/net/base.safetensors"))
    with Syncer(spec, "hf://owner/net/run/adapter_model.safetensors") as syncer:
        assert [syncer.once().status for _ in range(2)] == ["published", "current"]
    assert live_marks() == {1.0, 2.0}


def test_a_repository_that_is_not_there_is_told(hub: Repository) -> None:
    """A wrong name is a failed pass with the status, without the token."""
    with Syncer(load_spec("policies:mlp"), "hf://owner/other/run") as syncer:
        outcome = syncer.once()
    assert outcome.status == "failed" and outcome.reason
    assert "hf://owner/other/run" in outcome.reason and "404" in outcome.reason and TOKEN not in outcome.reason


@pytest.mark.parametrize("spoiled", ["x.safetensors", "stats.safetensors"])
def test_the_hubs_own_digest_is_compared(
    hub: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoiled: str
) -> None:
    """Guards against other bytes than were uploaded, of weights or an extra, which the hub names by their SHA-256."""
    hub.commit(**{"x.safetensors": data(tmp_path, 1.0), "stats.safetensors": save({"mean": torch.ones(2)})})
    hub.commit(**{"config.json": b"{}"})
    entry = Repository.entry

    def other(self: Repository, number: int, path: str) -> dict[str, Any]:
        told = entry(self, number, path)
        if path == spoiled:
            told["lfs"]["oid"] = "0" * 64
        if path == "config.json":  # Git's own digest, which is not of the bytes alone
            del told["lfs"]
        return told

    spec = load_spec("policies:mlp")
    extras = ExtraFiles(("stat*.safetensors", "config.json"))
    spec = replace(spec, select=replace(spec.select, extras=extras))
    with Syncer(spec, "hf://owner/net/x.safetensors") as syncer:
        outcome = syncer.once()
        assert outcome.status == "published", outcome.reason
    monkeypatch.setattr(Repository, "entry", other)
    with Syncer(spec, "hf://owner/net/x.safetensors") as syncer:
        outcome = syncer.once()
        assert (outcome.status, outcome.kind, outcome.version) == ("rejected", "digest", 1)
