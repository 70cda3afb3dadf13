"""One object store behind a URL: lists it, looks at one object, and reads ranges of one version of an object.

obstore does the work (https://github.com/developmentseed/obstore). Compared with fsspec's s3fs, for 512 MiB in ranges
of 8 MiB, eight at a time, from a server on the loopback of two cores: 2,090 MB/s with 20 MiB of memory (s3fs 1,030 MB/s
with 132 MiB), imported in 5 ms (200 ms), 16 MB installed (47 MB).

Each request for a range names the listed version (``If-Match``), and the answer is compared with it. A failed request
is tried again a bounded number of times, after growing pauses, from where it was cut. obstore's error messages hold
whole URLs with their secrets: only a status and words of a known form are taken from them.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote_to_bytes

from ..errors import CheckpointError, Stopped, UsageError, printable
from ..layout.filenames import ADAPTER, CONFIG, INDEX, MAX_INDEX, SINGLE, shards_of
from .client import Patience
from .prefetch import LOOK

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta

SCHEMES = ("s3", "gs", "az", "hf", "http", "https")
DEPTH = 5  # levels of names in a listing: checkpoints that are directories, and three more within them
_LOOKS = 16  # most objects that are looked at at once
_SHARDS = 10_000  # most shards of one checkpoint on a web server
_NO_RANGES = "it gives no ranges"
_NO_CREDENTIALS = "no valid credentials"
_FINAL = re.compile(r"4(?!08|25|29)\d\d|it ")  # a second try would not change these
_WORDS = {
    "kind: Connect": "no connection",
    "kind: Timeout": "no answer in time",
    "kind: Interrupted": "the connection was cut",
    "following redirect": "it redirects again and again",
    "MissingContentLength": "it gives no length",
    "ContentRange": "it gives no range",
    "NotPartial": "it gives no ranges",
    "InvalidListResponse": "its listing is broken XML",
}
_T = TypeVar("_T")


PATIENCE = Patience()


class Faulty(Exception):
    """An answer does not match its request; that of another try may."""


class OtherVersion(Exception):
    """The object is not the version that was listed."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One version of one object.

    Attributes:
        key: its name in the store.
        size: in bytes.
        etag: the store's tag of this version; empty if it has none.
        written: whole seconds since the epoch, because a listing has fractions and the answer for one object has none.
        version: the hub's commit; empty in other stores.
    """

    key: str
    size: int
    etag: str
    written: int
    version: str = ""

    @classmethod
    def of(cls, meta: ObjectMeta, key: str) -> Stored:
        etag = meta["e_tag"] or ""
        if etag and not etag.endswith('"'):  # Azure's listings omit the quotes, its answers do not
            etag = f'"{etag}"'
        return cls(key, meta["size"], etag, int(meta["last_modified"].timestamp()))

    def is_version(self, other: Stored) -> bool:
        """Whether this is the same version; times are compared only if there are no ETags."""
        same = (self.size, self.etag) == (other.size, other.etag)
        return same and (self.etag != "" or self.written == other.written)

    def stat(self, store: str) -> os.stat_result:
        """A stat result whose inode is a digest of store, key and ETag, so that identities are made as on a disk."""
        number = int.from_bytes(sha256(f"{store}\0{self.key}\0{self.etag}".encode()).digest()[:8], "big")
        return _stat(stat.S_IFREG, number, self.size, self.written)


def directory_stat() -> os.stat_result:
    return _stat(stat.S_IFDIR, 0, 0, 0)


def _stat(mode: int, inode: int, size: int, written: int) -> os.stat_result:
    times = {"st_mtime_ns": written * 10**9, "st_ctime_ns": written * 10**9}
    return os.stat_result((mode, inode, 0, 1, 0, 0, size, written, written, written), times)


class Store:
    """A bucket, a container, or a place on a web server.

    Args:
        scheme: one of ``SCHEMES``.
        root: the bucket or container, or the server's host and port.
        secret: the parts of a web server's URL that nobody else may see: ``user:password``, and the query.

    Attributes:
        stop: once set, every wait for an answer ends with ``Stopped``.
    """

    piece = 1 << 16  # bytes of a body handed over at a time; larger pieces miss the cache and are slower

    def __init__(self, scheme: str, root: str, secret: tuple[str, str] = ("", "")) -> None:
        self.scheme, self.root, self._secret = scheme, root, secret
        self.stop = threading.Event()

    def __str__(self) -> str:
        return f"{self.scheme}://{self.root}"

    @property
    def is_web(self) -> bool:
        return self.scheme in ("http", "https")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.scheme, self.root, self._secret)

    def list(self, prefix: str) -> dict[str, Stored]:
        """Returns, by key, the object of this name and what belongs to it, or all objects up to ``DEPTH`` levels below.

        Raises:
            CheckpointError: the store refuses, or cannot be reached.
        """
        if prefix.endswith(".safetensors") and (single := self.head(prefix)):
            found = {prefix: single} | {key: more for key in beside(prefix) if (more := self.head(key))}
        else:
            found = self._probe(prefix) if self.is_web else self._below(prefix)
        if not found and prefix and not prefix.endswith(".safetensors") and (single := self.head(prefix)):
            return {prefix: single}
        return found

    def head(self, key: str) -> Stored | None:
        """Looks at one object as it is now; None if it does not exist.

        Raises:
            CheckpointError: the store refuses, or cannot be reached.
        """

        def look(obstore: Any) -> Stored:
            if self.is_web:  # its signed URLs are often valid for GET alone
                try:
                    return Stored.of(obstore.get(self._client, key, options={"range": (0, 1)}).meta, key)
                except obstore.exceptions.GenericError as exc:
                    if not _reason(exc).startswith("416"):  # 416: the object is empty
                        raise
            return Stored.of(obstore.head(self._client, key), key)

        try:
            return self._patiently(key, look)
        except FileNotFoundError:
            return None

    def read(self, stored: Stored, start: int, nbytes: int, take: Callable[[int, memoryview], object]) -> None:
        """Reads a range of this very version, and passes it to ``take`` piece by piece, in order.

        Args:
            take: called with a piece's offset in the range and its bytes.

        Raises:
            FileNotFoundError: the object is gone.
            OtherVersion: it was overwritten.
            CheckpointError: the store refuses, or cannot be reached.
        """
        done = 0

        def attempt(obstore: Any) -> None:
            nonlocal done
            if done == nbytes:
                return
            client, options = self._source(stored)
            options["range"] = (start + done, start + nbytes)
            result = obstore.get(client, stored.key, options=options)
            if not self._is(result.meta, stored):
                raise OtherVersion
            if result.range != (start + done, start + nbytes):
                raise Faulty("another range than was asked for")
            for piece in result.stream(min_chunk_size=self.piece):
                if len(piece) > nbytes - done:
                    raise Faulty("more bytes than were asked for")
                take(done, memoryview(piece))
                done += len(piece)
            if done < nbytes:
                raise Faulty("fewer bytes than were asked for")

        self._patiently(stored.key, attempt)

    def _source(self, stored: Stored) -> tuple[Any, GetOptions]:
        """The client and the options that ask for this version."""
        strong = stored.etag and not stored.etag.startswith("W/")  # a weak ETag matches nothing
        return self._client, {"if_match": stored.etag} if strong else {}

    def _is(self, meta: ObjectMeta, stored: Stored) -> bool:
        """Whether an answer is of this version."""
        return Stored.of(meta, stored.key).is_version(stored)

    def sha256(self, stored: Stored) -> str:
        """The store's own digest of the object's bytes, as 64 hexadecimal digits; empty if it has none.

        obstore does not pass on checksums of S3, Google Cloud or Azure; their ETags are digests only in some settings.
        """
        return ""

    def read_whole(self, stored: Stored) -> bytes:
        """Reads all of a small object; see ``read``.

        Raises:
            FileNotFoundError: this version is gone.
        """
        data = bytearray(stored.size)
        try:
            if stored.size:
                self.read(stored, 0, stored.size, into(data))
        except OtherVersion:
            raise FileNotFoundError(2, "it was overwritten") from None
        return bytes(data)

    def _below(self, prefix: str) -> dict[str, Stored]:
        def attempt(obstore: Any) -> dict[str, Stored]:
            found = {}
            skip = len(prefix) + 1 if prefix else 0
            for page in obstore.list(self._client, prefix or None, chunk_size=1000):
                for meta in page:
                    key = meta["path"]
                    if key != prefix and key[skip:].count("/") < DEPTH:
                        found[key] = Stored.of(meta, key)
            return found

        try:
            return self._patiently(prefix, attempt)
        except FileNotFoundError:
            return {}

    def _probe(self, prefix: str) -> dict[str, Stored]:
        """The objects of the one checkpoint that a directory of a web server, which has no listings, may be."""
        folder = f"{prefix}/" if prefix else ""
        with ThreadPoolExecutor(_LOOKS) as pool:
            looked = list(pool.map(self.head, [folder + name for name in (SINGLE, INDEX, ADAPTER, CONFIG)]))
            index = looked[1]
            if index and not looked[0] and index.size <= MAX_INDEX:
                looked += pool.map(self.head, [folder + name for name in shards_of(self.read_whole(index))[:_SHARDS]])
        return {stored.key: stored for stored in looked if stored}

    def _patiently(self, key: str, attempt: Callable[[Any], _T]) -> _T:
        """Runs ``_try`` in a thread, because the library may block for a long time and cannot be stopped.

        Raises:
            Stopped: ``stop`` was set.
        """
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(self._try(key, attempt))
            except BaseException as exc:
                future.set_exception(exc)

        threading.Thread(target=run, daemon=True).start()
        while not self.stop.is_set():
            if wait([future], LOOK).done:
                return future.result()
        raise Stopped

    def _try(self, key: str, attempt: Callable[[Any], _T]) -> _T:
        """Tries until it works, after growing pauses; raises at once what another try would not change."""
        obstore = self._library()
        from obstore.exceptions import BaseError, InvalidPathError, PreconditionError

        patience = PATIENCE
        for number in range(1, patience.tries + 1):
            try:
                return attempt(obstore)
            except FileNotFoundError:
                raise FileNotFoundError(2, os.strerror(2)) from None  # obstore's own error has the URL in it
            except PreconditionError:
                raise OtherVersion from None
            except InvalidPathError as exc:
                raise self._unnamed(exc) from None
            except (BaseError, Faulty) as exc:
                reason = _reason(exc)
                if reason.startswith(("401", "403", _NO_CREDENTIALS)):
                    raise CheckpointError(
                        f"{self}/{key} is refused ({reason}). Give this process credentials that may list and read it, "
                        "where the store's own tools look for them."
                    ) from None
                if number == patience.tries or _FINAL.match(reason):
                    tried = f", {number} tries" if number > 1 else ""
                    raise CheckpointError(
                        f"{self}/{key} cannot be read ({reason}{tried}). It is tried again at the next pass; check "
                        "that the store can be reached, and that its name, region and endpoint are right."
                    ) from None
            except BaseException as exc:
                if type(exc).__name__ != "PanicException":  # Rust's, which is not an exception of the library
                    raise
                raise UsageError(
                    f"{self} cannot be reached: its name and the settings in the environment make no valid request. "
                    "Check both, keys and tokens too, for blanks and line breaks."
                ) from None
            time.sleep(patience.pause * 2 ** (number - 1))
        raise AssertionError

    def _unnamed(self, exc: Exception) -> CheckpointError:
        """An error that names the object whose name obstore does not accept; one such name fails a whole listing."""
        named = re.search(r'Path "(.+?)"(?: contained|: Encountered)', str(exc), re.DOTALL)
        what = f"{self}/{printable(named[1])}" if named else "an object there"
        return CheckpointError(
            f"{what:.300} cannot be read, and neither can anything listed with it: a part of its name is empty, . or "
            ".., or has control characters in it. Rename or remove it, or name a place that does not hold it."
        )

    def _library(self) -> Any:
        try:
            import obstore
        except ImportError:
            raise UsageError(
                f"{self}: object stores are read with obstore, which is not installed: pip install 'wsync[remote]'."
            ) from None
        return obstore

    @cached_property
    def _client(self) -> Any:
        self._library()
        from obstore.exceptions import BaseError

        from .client import bucket, web

        user, query = self._secret
        try:
            if self.is_web:
                basic = f"Basic {b64encode(unquote_to_bytes(user)).decode()}" if user else ""
                return web(f"{self}{'?' if query else ''}{query}", basic, PATIENCE)
            return bucket(self.scheme, self.root, PATIENCE)
        except (BaseError, ValueError) as exc:
            raise UsageError(
                f"{self} cannot be opened ({_reason(exc)}). Check its name, and the store's settings in the "
                "environment."
            ) from None


def into(data: bytearray) -> Callable[[int, memoryview], None]:
    """Returns a ``take`` for ``Store.read`` that writes the pieces into ``data``."""

    def take(at: int, piece: memoryview) -> None:
        data[at : at + len(piece)] = piece

    return take


def beside(key: str) -> list[str]:
    """The keys of the objects that belong to a named one: an adapter's configuration beside it."""
    folder, slash, name = key.rpartition("/")
    return [f"{folder}{slash}{CONFIG}"] if name == ADAPTER else []


def _reason(exc: Exception) -> str:
    """Says why the store failed, in words that hold no name, no URL and nothing else that may be secret."""
    if isinstance(exc, Faulty):
        return str(exc)
    text = str(exc)
    words = [
        match[1]
        for pattern in (r"status code: (\d{3}(?: [A-Z][A-Za-z-]*)*)", r"<Code>([A-Za-z]{1,60})</Code>")
        if (match := re.search(pattern, text))
    ]
    if not words:
        words = [word for sign, word in _WORDS.items() if sign in text][:1]
    if not words:
        known = {"NotSupportedError": _NO_RANGES, "UnauthenticatedError": _NO_CREDENTIALS}
        known["GenericError"] = "its answer is not one of such a store"
        words = [known.get(type(exc).__name__, type(exc).__name__)]
    return ", ".join(words)
