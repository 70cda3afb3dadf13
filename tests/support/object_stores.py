"""A real S3 server on the loopback, with a proxy before it, and what the tests do to its objects."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from builders import write
from faulty_proxy import Proxy

SECRET = "bd7f-very-secret-key"
BUCKET = "bucket"


class Bucket:
    """One bucket of the server, written to without the proxy.

    Attributes:
        proxy: what wsync talks to.
        port: of the server itself.
    """

    def __init__(self, port: int) -> None:
        import obstore
        from obstore.store import S3Store

        self.port, self.proxy = port, Proxy(port)
        self._obstore: Any = obstore
        self._store = S3Store(
            BUCKET,
            endpoint=f"http://127.0.0.1:{port}",
            access_key_id="testing",
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    @classmethod
    def of(cls, store: Any, proxy: Proxy) -> Bucket:
        """One of another kind, which ``store`` writes to."""
        import obstore

        made = cls.__new__(cls)
        made._obstore, made._store, made.port, made.proxy = obstore, store, 0, proxy
        return made

    def put(self, key: str, data: bytes) -> None:
        self._obstore.put(self._store, key, data)

    def written(self, key: str) -> float:
        """When an object was put there, in whole seconds since the epoch."""
        return float(self._obstore.head(self._store, key)["last_modified"].timestamp() // 1)

    def delete(self, key: str) -> None:
        self._obstore.delete(self._store, key)

    def save(self, key: str, policy: torch.nn.Module, mark: float | None = None, step: int | None = None) -> bytes:
        """Puts a policy's checkpoint there, every weight set to ``mark``; returns its bytes."""
        with tempfile.TemporaryDirectory() as folder:
            data = write(Path(folder) / "x.safetensors", policy, mark, step).read_bytes()
        self.put(key, data)
        return data

    def upload(self, folder: Path, key: str) -> None:
        """All files of a directory, in the order in which they were written."""
        for file in sorted(folder.rglob("*"), key=lambda file: file.stat().st_mtime_ns):
            if file.is_file():
                self.put(f"{key}/{file.relative_to(folder)}", file.read_bytes())
