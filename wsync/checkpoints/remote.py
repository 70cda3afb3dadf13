"""Checkpoints behind a URL: what stands for a path there, and a checkpoint that is read by ranges.

A ``RemotePath`` answers what listing and opening ask of a path, all of it from one listing of the store, so that
order, shards, markers, completeness and temporaries are decided by the same lines as on disk. A ``RemoteCheckpoint``
reads its headers first and then the planned ranges alone, ``AT_ONCE`` at a time, piece by piece straight into the slot:
beyond the slot it takes a few pieces of 64 KiB for each range, and where tensors are converted ``AHEAD`` chunks.

All is read of the versions that were listed, or nothing: an object that is overwritten in between ends the pass, and
what was read is thrown away. A thread that is late writes nothing any more.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urlsplit

from ..errors import NoCheckpoint, UsageError, printable
from ..layout.finite import Region, all_finite
from ..stores.prefetch import prefetch
from ..stores.store import SCHEMES, OtherVersion, Store, Stored, directory_stat, into
from .cast import Piece
from .checkpoint import Checkpoint
from .fit import Read
from .settling import let_objects_settle

AT_ONCE = 16  # ranges under way; a store gives some 50 to 100 MB/s for each
AHEAD = 4  # chunks that wait in memory to be converted
_ODD = re.compile(r"/\.{0,2}/|[\x00-\x1f\x7f\ud800-\udfff]")  # what obstore takes for no name


Tree = dict[str, Stored | None]
"""What a store had at one moment: objects by their keys, and None for a name that others lie below."""


def _tree(objects: dict[str, Stored]) -> Tree:
    tree: Tree = dict(objects)
    for key in objects:
        while key:
            key = key.rpartition("/")[0]
            if not (stored := tree.get(key)) or not stored.size:  # consoles make empty objects for folders
                tree[key] = None
    return tree


class RemotePath:
    """A place in a store, as far as it can be used like a path.

    Its text is the URL without user, password and query.

    Attributes:
        key: its name in the store, without slashes at its ends.
        tree: the listing that answers what is asked of it and of what lies below; None before ``listed``.
    """

    __slots__ = ("key", "store", "tree")

    def __init__(self, store: Store, key: str, tree: Tree | None = None) -> None:
        self.store, self.key, self.tree = store, key.strip("/"), tree

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
        return RemotePath(self.store, f"{self.key}/{name}", self.tree)

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.store.root

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.store, self.key.rpartition("/")[0], self.tree)

    @property
    def path(self) -> RemotePath:
        """Itself, as an entry of a directory has it."""
        return self

    def absolute(self) -> RemotePath:
        return self

    def listed(self) -> RemotePath:
        """The same place with a listing of its own.

        Raises:
            CheckpointError: the store refuses, or cannot be reached.
        """
        return RemotePath(self.store, self.key, _tree(self.store.list(self.key)))

    def stored(self) -> Stored | None:
        """The object of this name in the listing."""
        return self._listed().get(self.key)

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

    def is_dir(self) -> bool:
        return self.exists() and stat.S_ISDIR(self.stat().st_mode)

    def has(self, path: str) -> bool:
        """Whether the listing has an object at this path, in full."""
        return self._listed().get(path.removeprefix(f"{self.store}/")) is not None

    def read_bytes(self) -> bytes:
        stored = self.stored()
        if stored is None:
            raise FileNotFoundError(2, os.strerror(2), str(self))
        return self.store.read_whole(stored)

    def entries(self) -> list[os.DirEntry[str]]:
        """What lies directly below; each can be used like the entries that ``os.scandir`` gives."""
        skip = len(self.key) + 1 if self.key else 0
        names = dict.fromkeys(key[skip:].partition("/")[0] for key in self._listed())
        return cast("list[os.DirEntry[str]]", [self / name for name in names if name])

    def _listed(self) -> Tree:
        if self.tree is None:
            self.tree = self.listed().tree
        return cast(Tree, self.tree)


def open_url(url: str) -> RemotePath | Path:
    """What stands for a URL; a ``file://`` one is a path.

    Raises:
        UsageError: its scheme is none that we know, or it names no bucket or host.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "file":
        host, _, path = rest.partition("/")
        if host not in ("", "localhost"):
            raise UsageError(f"file://{host} is another machine. Write file:/// and an absolute path.")
        return Path("/" + unquote(path))
    if scheme not in SCHEMES:
        raise UsageError(
            f"{scheme!r:.40} is no store that wsync reads. Write a path, or a URL of {', '.join(SCHEMES)} or file."
        )
    if scheme in ("http", "https"):
        try:
            web = urlsplit(url)
        except ValueError:
            raise UsageError(f"a {scheme}:// URL names a host that is none. Write {scheme}://host/path.") from None
        user, _, host = web.netloc.rpartition("@")
        store, key = Store(scheme, host, (user, web.query)), unquote(web.path)
    elif scheme == "hf":
        from ..stores.hub import Hub, split

        host, key = split(rest)
        store = Hub(scheme, host)
    else:
        bucket, _, key = rest.partition("/")
        if "@" in bucket or "?" in rest:
            raise UsageError(
                f"a {scheme}:// URL holds a bucket and a name, and nothing secret. Give credentials in the environment."
            )
        host, store = bucket, Store(scheme, bucket)
    if not host:
        raise UsageError(f"{scheme}:// alone names no {'host' if 'http' in scheme else 'bucket'}. Write it behind it.")
    place = RemotePath(store, key)
    if place.key and _ODD.search(f"/{place.key}/"):
        raise UsageError(
            f"{printable(str(place))} names nothing that can be read: a part of it is empty, . or .., or has "
            "characters in it that no name has. Write the name as the store lists it."
        )
    return place


class RemoteCheckpoint(Checkpoint):
    """A checkpoint in a store; see ``Checkpoint`` for all but how it is read."""

    def _open_files(self, settle: float) -> None:
        self._stored = [self._listed_as(file) for file in self.parts.files]
        self._infos = [file.stat() for file in self.parts.files]
        is_web = cast(RemotePath, self.path).store.is_web
        let_objects_settle(self.parts, settle, self._stands, is_web=is_web)

    @staticmethod
    def _listed_as(file: Path) -> Stored:
        stored = cast(RemotePath, file).stored()
        if stored is None:
            raise NoCheckpoint(f"there is no {file}. Name a checkpoint that exists.")
        return stored

    def check_unchanged(self) -> None:
        if not self._stands():
            raise self._changed()

    def _stands(self) -> bool:
        """Whether the store has all files as they were listed."""
        files = [*self._stored, *([self._listed_as(self.parts.index)] if self.parts.index else [])]
        store = cast(RemotePath, self.path).store
        return all(
            now and now.is_version(file) for file, now in prefetch(files, lambda file: store.head(file.key), AT_ONCE)
        )

    def _at(self, number: int, nbytes: int, start: int) -> bytes:
        data = bytearray(nbytes)
        self._fetch(number, nbytes, start, into(data))
        return bytes(data)

    def _fetch(self, number: int, nbytes: int, start: int, take: Callable[[int, memoryview], object]) -> None:
        if not nbytes:
            return
        try:
            cast(RemotePath, self.path).store.read(self._stored[number], start, nbytes, take)
        except OtherVersion:
            raise self._changed() from None
        except FileNotFoundError:
            raise NoCheckpoint(f"{self.parts.files[number]} is gone. The next pass takes what is there.") from None

    def _staged(
        self, weights: memoryview, reads: Sequence[Read], regions: Sequence[Region]
    ) -> Iterator[tuple[Read, bool]]:
        lock, over = threading.Lock(), threading.Event()

        def work(read: Read) -> None:
            def take(at: int, piece: memoryview) -> None:
                with lock:  # a pass that failed has given the slot back
                    if over.is_set():
                        raise _Abandoned
                    _scatter(weights, read, at, piece)

            self._fetch(read.file, read.nbytes, read.start, take)

        try:
            for read, _ in prefetch(reads, work, AT_ONCE):
                yield read, all_finite(weights, regions, read.slices)
        finally:
            with lock:
                over.set()

    def _each(self, listed: Sequence[Piece], work: Callable[[Piece, memoryview], bool]) -> Iterator[tuple[Piece, bool]]:
        fetch = lambda piece: self._at(piece.file, piece.nbytes, piece.start)  # noqa: E731
        for piece, data in prefetch(listed, fetch, AHEAD):
            yield piece, work(piece, memoryview(data))


class _Abandoned(Exception):
    """The pass is over; nobody waits for this range."""


def _scatter(weights: memoryview, read: Read, at: int, piece: memoryview) -> None:
    """Puts a piece of a read, ``at`` bytes into it, into the slices that it belongs to."""
    for offset, nbytes in read.slices:
        if at < nbytes:
            part = piece[: nbytes - at]
            weights[offset + at : offset + at + len(part)] = part
            piece, at = piece[len(part) :], at + len(part)
            if not piece:
                return
        at -= nbytes
