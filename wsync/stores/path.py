"""Opens URLs as objects that are used like paths on a disk.

A ``RemotePath`` answers all questions about a path from one listing of the store, so that the same code as on a disk
decides about order, shards, markers, completeness and temporary files.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urlsplit

from ..errors import UsageError, printable
from .store import SCHEMES, Store, Stored, directory_stat

_ODD = re.compile(r"/\.{0,2}/|[\x00-\x1f\x7f\ud800-\udfff]")  # names that obstore does not accept

Tree = dict[str, Stored | None]
"""What a store had at one moment: objects by key, and None for the key of a directory."""


def _tree(objects: dict[str, Stored]) -> Tree:
    tree: Tree = dict(objects)
    for key in objects:
        while key:
            key = key.rpartition("/")[0]
            if not (stored := tree.get(key)) or not stored.size:  # web consoles make empty objects for folders
                tree[key] = None
    return tree


class RemotePath:
    """A place in a store that is used like a ``pathlib.Path``; as text, its URL without user, password and query.

    Attributes:
        key: its name in the store, without leading and trailing slashes.
        tree: the listing that answers for it and for all below it; None until something is asked.
        narrow: whether that listing is of one named object or of a web server, and does not show its neighbours.
    """

    __slots__ = ("key", "narrow", "store", "tree")

    def __init__(self, store: Store, key: str, tree: Tree | None = None, *, narrow: bool = False) -> None:
        self.store, self.key, self.tree, self.narrow = store, key.strip("/"), tree, narrow

    def __str__(self) -> str:
        return f"{self.store}/{self.key}" if self.key else str(self.store)

    __fspath__ = __str__

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.store, f"{self.key}/{name}", self.tree, narrow=self.narrow)

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.store.root

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.store, self.key.rpartition("/")[0], self.tree, narrow=self.narrow)

    @property
    def path(self) -> RemotePath:
        """Itself, for callers that take it for an ``os.DirEntry``."""
        return self

    def absolute(self) -> RemotePath:
        return self

    def listed(self) -> RemotePath:
        """Returns the same place with a new listing.

        Raises:
            CheckpointError: the store refuses, or cannot be reached.
        """
        objects = self.store.list(self.key)
        return RemotePath(self.store, self.key, _tree(objects), narrow=self.store.is_web or self.key in objects)

    def stored(self) -> Stored | None:
        """The object of this name in the listing; None if there is none."""
        return self._listed().get(self.key)

    def now(self) -> Stored | None:
        """The object in the listing, or else in the store, because the listing may be narrow; None if there is none."""
        return self.stored() or self.store.head(self.key)

    def stat(self) -> os.stat_result:
        if stored := self.stored():
            return stored.stat(str(self.store))
        if self.key in self._listed():
            return directory_stat()
        raise FileNotFoundError(2, os.strerror(2), str(self))

    def exists(self) -> bool:
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_there(self) -> bool:
        """``is_file``; if the listing is narrow, asks the store, and adds the answer to the listing."""
        tree = self._listed()
        if self.narrow and self.key not in tree and (stored := self.store.head(self.key)):
            tree[self.key] = stored
        return self.is_file()

    def is_file(self) -> bool:
        return self.stored() is not None

    def is_dir(self) -> bool:
        return self.exists() and stat.S_ISDIR(self.stat().st_mode)

    def entries(self) -> list[os.DirEntry[str]]:
        """What lies directly below; each can be used like an entry of ``os.scandir``."""
        skip = len(self.key) + 1 if self.key else 0
        names = dict.fromkeys(key[skip:].partition("/")[0] for key in self._listed())
        return cast("list[os.DirEntry[str]]", [self / name for name in names if name])

    def neighbours(self) -> list[os.DirEntry[str]]:
        """``entries``; a narrow listing is first widened to all that lies below, unless it is of a web server."""
        tree = self._listed()
        if self.narrow and not self.store.is_web:
            tree |= _tree(self.store.list(self.key)) | tree
        return self.entries()

    def _listed(self) -> Tree:
        if self.tree is None:
            listed = self.listed()
            self.tree, self.narrow = listed.tree, listed.narrow
        return cast(Tree, self.tree)


def open_url(url: str) -> RemotePath | Path:
    """Opens a URL; one of ``file://`` becomes a path on disk.

    Raises:
        UsageError: its scheme is unknown, it names no bucket or host, or it names nothing that can be read.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "file":
        host, _, path = rest.partition("/")
        if host not in ("", "localhost"):
            raise UsageError(f"file://{host} is another machine. Write file:/// and an absolute path.")
        return Path("/" + unquote(path))
    if scheme not in SCHEMES:
        raise UsageError(
            f"{scheme!r:.40} is not a store that wsync reads. Write a path, or a URL of {', '.join(SCHEMES)} or file."
        )
    if scheme in ("http", "https"):
        try:
            web = urlsplit(url)
        except ValueError:
            raise UsageError(f"a {scheme}:// URL names an invalid host. Write {scheme}://host/path.") from None
        user, _, host = web.netloc.rpartition("@")
        store, key = Store(scheme, host, (user, web.query)), unquote(web.path)
    elif scheme == "hf":
        from .hub import Hub, split

        host, key = split(rest)
        store = Hub(scheme, host)
    else:
        bucket, _, key = rest.partition("/")
        if "@" in bucket or "?" in rest:
            raise UsageError(
                f"a {scheme}:// URL may hold a bucket and a name, but nothing secret. Give credentials in the "
                "environment."
            )
        host, store = bucket, Store(scheme, bucket)
    if not host:
        raise UsageError(f"{scheme}:// alone names no {'host' if 'http' in scheme else 'bucket'}. Add it to the URL.")
    place = RemotePath(store, key)
    if place.key and _ODD.search(f"/{place.key}/"):
        raise UsageError(
            f"{printable(str(place))} names nothing that can be read: a part of it is empty, . or .., or has "
            "characters that no name may have. Write the name as the store lists it."
        )
    return place
