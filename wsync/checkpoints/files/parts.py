"""Finds the files of one checkpoint: a ``.safetensors`` file, or a directory that holds one, shards, or an adapter.

A directory is recognised by the names that Hugging Face's libraries write: ``model.safetensors``, or
``model.safetensors.index.json`` with the shards that it names, the newer if both exist; else
``adapter_model.safetensors`` with its ``adapter_config.json``; else the first two under the names that diffusers and
OpenCLIP use. Every other file in it is ignored, stale shards included.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import pwd
import resource
import stat
import time
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from ...errors import (
    CheckpointChanged,
    CheckpointError,
    IncompleteCheckpoint,
    MalformedCheckpoint,
    NoCheckpoint,
    UsageError,
)
from ...layout.filenames import (
    ADAPTER,
    CONFIG,
    FORMS,
    INDEX,
    INDEX_SUFFIX,
    MAX_INDEX,
    MAX_TENSORS,
    SINGLE,
    SUFFIX,
    is_file_name,
)
from ...system.memory import read_at
from .extras import ExtraFiles

if TYPE_CHECKING:
    from ...stores.path import RemotePath

_KEPT = 1 << 18  # most bytes of an index that is cached
_TOLD_APART = 256  # most files with their own fingerprint; a slot's header has room for no more
_STEADY = 1.0  # seconds after which a further write of an index shows in its times


def place_at(place: str | os.PathLike[str]) -> Path:
    """Makes a path absolute; turns a URL into a ``RemotePath``, which is used like a path, and typed as one.

    Raises:
        UsageError: the text is empty, or the URL is of an unknown kind or names nothing that can be read.
    """
    if isinstance(place, Path):
        return place.absolute()
    text = os.fspath(place)
    if not text:  # an unset variable of a script, which must not mean the current directory
        raise UsageError("an empty text names no checkpoints. Give a directory, a file or a URL.")
    if "://" not in text:
        return Path(text).absolute()
    from ...stores.path import RemotePath, open_url

    return cast(Path, place if isinstance(place, RemotePath) else open_url(text))


def led_to(path: Path) -> Path:
    """Resolves links now, so that a recorded path does not change with them.

    A link to a file keeps its own name if the target's name does not end in .safetensors, as in Hugging Face's cache.
    """
    if remote(path):
        return path
    try:
        real = Path(os.path.realpath(path))
        return (
            real if real.suffix == ".safetensors" or real.is_dir() else Path(os.path.realpath(path.parent), path.name)
        )
    except OSError:  # a link was replaced meanwhile: opening it reports what is there
        return path


def remote(place: object) -> RemotePath | None:
    """The same object typed as a RemotePath; None for a path on disk."""
    return None if isinstance(place, Path) else cast("RemotePath", place)


class Parts(NamedTuple):
    """What a checkpoint consists of.

    Attributes:
        path: the file or directory that is the checkpoint.
        files: the safetensors files to read.
        beside: the small file that describes ``files``: the index of the shards, or an adapter's configuration; None if
            the checkpoint has no such file, or the file has not been written yet.
        names: the tensors that the index assigns to each of ``files``; empty without an index.
        extras: the files that travel with the weights, by their names; some may still be missing.
        wanted: the settings that ``extras`` were found with.
    """

    path: Path
    files: tuple[Path, ...]
    beside: Path | None = None
    names: tuple[frozenset[str], ...] = ()
    extras: Mapping[str, Path] = {}
    wanted: ExtraFiles = ExtraFiles()

    @property
    def own(self) -> tuple[Path, ...]:
        """``files``, followed by ``beside`` if there is one."""
        return (*self.files, self.beside) if self.beside else self.files

    @property
    def every(self) -> tuple[Path, ...]:
        """``own``, followed by the extras."""
        return (*self.own, *self.extras.values())

    @property
    def is_adapter(self) -> bool:
        return self.files[0].name == ADAPTER

    @property
    def is_several(self) -> bool:
        """Whether its writer writes several files, one after another."""
        return bool(self.names or self.extras) or self.is_adapter


def identity(info: os.stat_result) -> str:
    """Identifies one state of a file, by inode, size in bytes and modification time in ns.

    The device is left out: its number may change at a reboot (NFS, overlays), and pins and rejections must survive one.
    """
    return f"{info.st_ino}-{info.st_size}-{info.st_mtime_ns}"


def identity_of(infos: Iterable[os.stat_result]) -> str:
    """The identity of one file, or of several together: number, fingerprints, total bytes, newest modification time."""
    listed = list(infos)
    if len(listed) == 1:
        return identity(listed[0])
    marks = "".join(map(fingerprint, listed))
    if len(listed) > _TOLD_APART:
        marks = f"{zlib.crc32(marks.encode()):08x}"
    return f"{len(listed)}-{marks}-{sum(i.st_size for i in listed)}-{max(i.st_mtime_ns for i in listed)}"


def fingerprint(info: os.stat_result) -> str:
    """CRC-32 of a file's identity, in 8 hexadecimal digits: enough to tell a file from its replacement."""
    return f"{zlib.crc32(identity(info).encode()):08x}"


def fingerprints(identity: str) -> frozenset[str]:
    """The fingerprints in the identity of several files; empty for a single file."""
    marks = identity.split("-")[1] if identity.count("-") == 3 else ""
    return frozenset(marks[at : at + 8] for at in range(0, len(marks), 8))


def written(info: os.stat_result) -> int:
    """When a file was last written, in ns: its modification time, which can be set, or its change time if earlier."""
    return min(info.st_mtime_ns, info.st_ctime_ns)


def parts_of(path: Path, extras: ExtraFiles = ExtraFiles()) -> Parts:  # noqa: B008  (frozen)
    """Finds the parts of the checkpoint at a path; reads nothing but an index. Extras may still be missing.

    Raises:
        NoCheckpoint: nothing is there, or a directory that holds no checkpoint.
        IncompleteCheckpoint: a shard is not there yet, or the index is cut off.
        MalformedCheckpoint: the index is not an index, or names files elsewhere.
        OSError: the system refused access.
    """
    parts = _own_parts(path)
    if not extras.files:
        return parts
    return parts._replace(extras=extras.beside(path, parts.own), wanted=extras)


def _own_parts(path: Path) -> Parts:
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return _by(path, path)
    except FileNotFoundError as exc:
        raise NoCheckpoint(f"there is no {path}. Name a checkpoint that exists.") from exc
    for name in FORMS:
        file, index = path / name, path / f"{name}.index.json"
        if not file.exists():
            continue
        if index.exists() and written(index.stat()) > written(file.stat()):  # a later save is sharded
            with suppress(CheckpointError):  # its shards are not all there: the file still counts
                return _by(path, index)
        return _by(path, file)
    raise NoCheckpoint(
        f"{path} holds no checkpoint: neither {SINGLE}, nor {INDEX}, nor {ADAPTER}. Wait for its writer, or name "
        "another."
    )


def _by(path: Path, file: Path) -> Parts:
    """The parts of the checkpoint at ``path``; the name of ``file`` tells whether it is sharded or an adapter."""
    if file.name.endswith(INDEX_SUFFIX):
        return _sharded(path, file)
    return _adapter(path, file) if file.name == ADAPTER else Parts(path, (file,))


def read_small(file: Path, most: int) -> bytes:
    """Reads a small file beside a checkpoint, which is untrusted like the checkpoint.

    Raises:
        ValueError: it has more than ``most`` bytes, or is not a regular file.
        OSError: the system could not read it.
    """
    if away := remote(file):
        stored = away.now()
        if stored is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
        if stored.size > most:
            raise ValueError(f"{stored.size:,} bytes")
        return away.store.read_whole(stored)
    fd = open_untrusted(file)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("it is not a regular file")
        if info.st_size > most:
            raise ValueError(f"{info.st_size:,} bytes")
        return read_at(fd, info.st_size, 0)
    finally:
        os.close(fd)


def open_untrusted(file: Path) -> int:
    """Opens an untrusted file without blocking, even if it is a pipe that nobody ever writes to."""
    return os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def _adapter(path: Path, file: Path) -> Parts:
    config = file.parent / CONFIG
    return Parts(path, (file,), config if config.exists() else None)


def _sharded(path: Path, index: Path) -> Parts:
    info, away = index.stat(), remote(index)
    has_tags = away and not away.store.is_web  # each version has an ETag or a commit
    if info.st_size <= _KEPT and (has_tags or info.st_ctime < time.time() - _STEADY):  # spares a pass the read
        shards = _known(index, identity(info), info.st_ctime_ns)
    else:
        shards = _shards(index)
    for number, shard in enumerate(sorted(shards), 1):
        if not (index.parent / shard).exists():
            raise IncompleteCheckpoint(
                f"{path} is incomplete: shard {number} of {len(shards)}, {shard:.100}, is not there. Wait for its "
                "writer to finish, or write it again."
            )
    ordered = sorted(shards)
    return Parts(
        path, tuple(index.parent / shard for shard in ordered), index, tuple(shards[shard] for shard in ordered)
    )


def _shards(index: Path) -> Mapping[str, frozenset[str]]:
    """Reads the shards that an index names, and the tensors that it assigns to each."""
    try:
        data = read_small(index, MAX_INDEX)
        if (names := data.count(b'"') // 4) > MAX_TENSORS + 1000:
            raise ValueError(f"it names some {names:,} tensors, over the bound of {MAX_TENSORS:,}")
        content = json.loads(data)
        table = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(table, dict) or not table:
            raise ValueError("no weight_map")
    except FileNotFoundError as exc:
        raise NoCheckpoint(f"{index} is gone. It is looked at again at the next pass.") from exc
    except (ValueError, RecursionError) as exc:
        if isinstance(exc, json.JSONDecodeError | UnicodeDecodeError):
            raise IncompleteCheckpoint(
                f"{index} is not JSON, or is cut off. Wait for its writer to finish, or write it again."
            ) from exc
        raise MalformedCheckpoint(f"{index} is not an index of shards ({exc!s:.100}). Write it again.") from exc
    shards: dict[str, set[str]] = {}
    for tensor, shard in table.items():
        if not is_file_name(shard):
            raise MalformedCheckpoint(
                f"{index} puts a tensor into {shard!a:.100}, which is not a file beside it. Write it again."
            )
        shards.setdefault(shard, set()).add(tensor)
    return {shard: frozenset(names) for shard, names in shards.items()}


@functools.lru_cache(maxsize=64)
def _known(index: Path, state: str, changed: int) -> Mapping[str, frozenset[str]]:
    """Returns ``_shards``, cached for one state of the index."""
    return _shards(index)


def changed_while_read(path: Path) -> CheckpointChanged:
    return CheckpointChanged(
        f"{path} changed while it was read; what was read is thrown away. You need not do anything: it is read again "
        "at the next pass. A writer should write under another name, and rename the file into place."
    )


def unreadable(path: Path, exc: OSError) -> CheckpointError:
    """Converts an OSError into a CheckpointError, which names the owner where access is denied."""
    reason = os.strerror(exc.errno) if exc.errno else str(exc)
    if exc.errno in (errno.ENOENT, errno.ESTALE):  # the trainer has deleted it
        return NoCheckpoint(
            f"{path}, or a part of it, is gone. You need not do anything: the next pass takes what it finds."
        )
    if exc.errno in (errno.EACCES, errno.EPERM):
        return _forbidden(Path(exc.filename) if isinstance(exc.filename, str) else path, reason)
    if exc.errno == errno.EMFILE:
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return CheckpointError(
            f"{path} cannot be read: this process may have no more than {most:,} files open, and a checkpoint in "
            "several files takes one for each. Raise the limit (`ulimit -n`; LimitNOFILE= of its systemd unit), or "
            "write fewer files."
        )
    return CheckpointError(f"{path} cannot be read ({reason}). It is tried again at the next pass.")


def _forbidden(path: Path, reason: str) -> CheckpointError:
    path = path.absolute()
    looks = ((each, _stat(each)) for each in (path, *path.parents))
    closed, info = next((each, info) for each, info in looks if info)  # everyone can stat the root
    try:
        owner = pwd.getpwuid(info.st_uid).pw_name
    except KeyError:
        owner = str(info.st_uid)
    whose, user = f"{closed} belongs to {owner} with mode {stat.S_IMODE(info.st_mode):04o}", f"uid {os.geteuid()}"
    if closed != path:
        return CheckpointError(
            f"{path} cannot be reached by {user} ({reason}): {whose}. Give it access to the directories above."
        )
    why = ""
    if stat.S_IMODE(info.st_mode) == 0o600 and path.name.endswith(SUFFIX):
        why = " safetensors 0.8 writes files that only their owner can read, whatever the umask is."
    return CheckpointError(
        f"{whose} and cannot be read by {user} ({reason}).{why} Let the trainer make it readable (os.chmod(path, "
        "0o644) once it is saved), or run wsync as its owner."
    )


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
