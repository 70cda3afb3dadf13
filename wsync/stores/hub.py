"""A repository of the Hugging Face hub: listed at one commit, and read at that commit, whose files never change.

URLs are ``hf://owner/repo/path``, ``hf://owner/repo@revision/path`` or ``hf://datasets/owner/repo/path``. The library
huggingface_hub lists the files, with its own token and endpoint (``HF_TOKEN``, ``HF_ENDPOINT``); ranges are read from
wherever the hub redirects to, as from any web server. The time of a file is that of its last commit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

from ..errors import UsageError
from . import store
from .client import web
from .store import DEPTH, Faulty, Store, Stored, beside

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta

_T = TypeVar("_T")


def split(rest: str) -> tuple[str, str]:
    """Splits what follows ``hf://`` into repository and path.

    Raises:
        UsageError: it names no repository.
    """
    parts = rest.split("/")
    kind = 1 if parts[0] in ("datasets", "spaces", "models") else 0
    if len(parts) < kind + 2 or not all(parts[: kind + 2]):
        raise UsageError("hf:// alone names no repository. Write hf://owner/repo, then a path in it.")
    return "/".join(parts[: kind + 2]), "/".join(parts[kind + 2 :])


class Hub(Store):
    """One repository; its root is ``[kind/]owner/repo[@revision]``."""

    def list(self, prefix: str) -> dict[str, Stored]:
        def work(api: Any, where: dict[str, Any]) -> dict[str, Stored]:
            where["revision"] = commit = api.repo_info(**where).sha
            if prefix.endswith(".safetensors"):
                files = api.get_paths_info(paths=[prefix, *beside(prefix)], expand=True, **where)
                named = {file.path: _stored(file, commit) for file in files if hasattr(file, "size")}
                if prefix in named:
                    return named
            tree = api.list_repo_tree(path_in_repo=prefix or None, recursive=True, expand=True, **where)
            skip = len(prefix) + 1 if prefix else 0
            near = (file for file in tree if file.path[skip:].count("/") < DEPTH and hasattr(file, "size"))
            return {file.path: _stored(file, commit) for file in near}

        return self._ask(prefix, work) or {}

    def head(self, key: str) -> Stored | None:
        def work(api: Any, where: dict[str, Any]) -> Stored | None:
            where["revision"] = commit = api.repo_info(**where).sha
            files = api.get_paths_info(paths=[key], expand=True, **where)
            return _stored(files[0], commit) if files else None

        return self._ask(key, work)

    def sha256(self, stored: Stored) -> str:
        return stored.etag if len(stored.etag) == 64 else ""  # Git's SHA-1, if the file is not in LFS

    def _ask(self, key: str, work: Callable[[Any, dict[str, Any]], _T]) -> _T | None:
        """Asks the hub; None if it has no such path."""
        try:
            from huggingface_hub import HfApi
            from huggingface_hub.errors import EntryNotFoundError
        except ImportError:
            raise UsageError(
                f"{self} is listed with huggingface_hub, which is not installed: pip install 'wsync[remote]'."
            ) from None
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        kind, repo, revision = self._names()

        def attempt(_: Any) -> _T | None:
            try:
                return work(api, {"repo_id": repo, "repo_type": kind, "revision": revision})
            except EntryNotFoundError:
                return None
            except Exception as exc:  # of whichever HTTP library it uses; its text may hold secret URLs
                answer = getattr(exc, "response", None)
                raise Faulty(str(getattr(answer, "status_code", "no connection"))) from None

        return self._patiently(key, attempt)

    def _names(self) -> tuple[str, str, str | None]:
        """Kind, name and revision of the repository."""
        name, _, revision = self.root.partition("@")
        *kind, owner, repo = name.split("/")
        return (kind[0][:-1] if kind else "model"), f"{owner}/{repo}", unquote(revision) or None

    def _source(self, stored: Stored) -> tuple[Any, GetOptions]:
        from huggingface_hub import get_token

        kind, repo, _ = self._names()
        place = repo if kind == "model" else f"{kind}s/{repo}"
        base = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self._library()
        return _client(f"{base}/{place}/resolve/{quote(stored.version, safe='')}", get_token() or ""), {}

    def _is(self, meta: ObjectMeta, stored: Stored) -> bool:
        return bool(meta["size"] == stored.size)  # the commit says which version it is


def _stored(file: Any, commit: str) -> Stored:
    content = file.lfs.sha256 if file.lfs else file.blob_id
    return Stored(file.path, file.size, content, int(file.last_commit.date.timestamp()), commit)


@lru_cache(8)
def _client(url: str, token: str) -> Any:
    return web(url, f"Bearer {token}" if token else "", store.PATIENCE)
