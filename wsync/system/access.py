"""Who may open what: checks every directory and file of a segment when it is opened, and shares a segment on request.

A segment belongs to one user, who alone publishes into it, and is private unless ``Access`` says otherwise. A file is
checked after it is opened, so that nothing can be exchanged in between: it must be a directory or a regular file, not
reached through a symbolic link, of the right owner, and writable by nobody else.

Sharing (``--mode 0640 --group policies``) lets others read, never write:

    the runtime directory   0750   if wsync makes it. An existing one is never changed, because a wider mode would show
                                   the names of everything else in it: an error says how to open it
    the segment             0750
    control, layout, slots  0640
    publisher.lock          0600   always: whoever can open it could lock publishers out
    readers/                3770   sticky: each reader puts a record of its own there, and removes no other's

To read another user's segments, name the runtime directory: the default one is trusted only if it is your own, because
anybody may make a directory in /dev/shm. A reader trusts the owner, who can do anything to the segment. Every user who
may read can hold slots by leasing them, as each reader does; ``wsync status`` shows who does.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path

from ..errors import SegmentUnsafe, UsageError, from_os_error
from .memory import closed_on_error, default_runtime_dir, no_room, shut

_NAME = re.compile(r"[^\W_][\w.+@=-]*")
_MODES = ("0600", "0640", "0644")
_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WAY_OUT = "Remove it (`wsync rm` removes a segment), or name another place with --runtime-dir."


def is_name(name: str) -> bool:
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and len(name.encode()) <= 200


def check_name(name: str) -> str:
    """Returns a segment's name, which is also its directory's, if it is valid.

    Raises:
        UsageError: it is not 1 to 200 bytes of letters, digits and ``_ . + @ = -`` that begin with a letter or digit.
    """
    if not is_name(name):
        raise UsageError(
            f"{name!r} cannot be a segment's name: use letters, digits and _ . + @ = -, beginning with a letter or "
            "digit, at most 200 bytes. Set another with --name or `name` in the TOML."
        )
    return name


@dataclass(frozen=True, slots=True)
class Access:
    """Who may read a segment besides its owner; nobody if neither is set.

    Attributes:
        mode: of its files, as for chmod: ``0600`` (private), ``0640`` (a group may read) or ``0644`` (everybody may).
        group: name or number; default that of the process that makes the segment. Alone it implies mode ``0640``.
    """

    mode: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if self.mode is not None and f"{self.mode:0>4}" not in _MODES:
            raise UsageError(
                f"mode {self.mode!r} is not possible for a segment: nobody but its owner may write, and directories "
                "are searchable wherever they are readable. Give 0640 (a group may read), 0644 (everybody may), or "
                "0600."
            )
        _ = self.gid

    @property
    def given(self) -> bool:
        """Whether a mode or a group is set."""
        return self.mode is not None or self.group is not None

    @property
    def bits(self) -> int:
        """The mode of a file."""
        return int(self.mode or ("0600" if self.group is None else "0640"), 8)

    @property
    def directory_bits(self) -> int:
        return self.bits | (self.bits & 0o444) >> 2

    @property
    def readers_bits(self) -> int:
        """The mode of ``readers/``: each reader may add a record, in the directory's group, and remove only its own."""
        return 0o700 | (0o3070 if self.bits & 0o040 else 0) | (0o1007 if self.bits & 0o004 else 0)

    @property
    def gid(self) -> int | None:
        """Raises UsageError if there is no such group."""
        if self.group is None:
            return None
        import grp

        try:
            return grp.getgrnam(self.group).gr_gid
        except (KeyError, ValueError):
            if re.fullmatch(r"\d{1,10}", self.group, re.ASCII) and int(self.group) < (1 << 32) - 1:
                return int(self.group)
        raise UsageError(f"there is no group {self.group!r} on this machine. Name one that `getent group` lists.")

    def holds(self, directory: int) -> bool:
        """Whether a segment's open directory already has this mode and group."""
        info = os.fstat(directory)
        return stat.S_IMODE(info.st_mode) == self.directory_bits and self.gid in (None, info.st_gid)

    def grant(self, fd: int, bits: int) -> None:
        """Gives an open file or directory the group and these bits, whatever the umask.

        Raises:
            UsageError: this user is not in the group.
        """
        gid = self.gid
        try:
            if gid is not None and os.fstat(fd).st_gid != gid:
                os.fchown(fd, -1, gid)
        except PermissionError as exc:
            raise UsageError(
                f"uid {os.geteuid()} is not in group {self.group}, and cannot give it files. Join it (usermod -aG, "
                "then log in again), or name another --group."
            ) from exc
        os.fchmod(fd, bits)

    def check_enterable(self, base: Path) -> None:
        """Checks that the users who may read a segment can enter the runtime directory ``base``.

        Raises:
            UsageError: they cannot; the message gives the command that lets them.
        """
        info = os.stat(base)
        gid = os.getegid() if self.gid is None else self.gid
        everybody = info.st_mode & 0o005 == 0o005
        group = everybody or (info.st_gid == gid and info.st_mode & 0o050 == 0o050)
        if (self.bits & 0o040 and not group) or (self.bits & 0o004 and not everybody):
            raise UsageError(
                f"{base} has mode {stat.S_IMODE(info.st_mode):04o} and group {info.st_gid}: the users who should read "
                "a segment there cannot enter it, and opening it would show them the names of everything in it. Open "
                f"it (`chgrp {gid} {base} && chmod {self.directory_bits:04o} {base}`), or name another --runtime-dir, "
                "which is then made with the right mode."
            )


def open_dir(path: str | Path, owner: int | None = None, *, dir_fd: int | None = None, sticky: bool = False) -> int:
    """Opens a directory that nobody but its owner can change.

    Args:
        owner: uid that must own it; default this user.
        sticky: whether others may write to it if its sticky bit is set, so that they can remove only their own files.

    Raises:
        OSError: it does not exist, or cannot be opened for another reason than those below.
        SegmentUnsafe: it is not a directory (but maybe a link to one), not ``owner``'s, writable by others, or closed.
    """
    owner = os.geteuid() if owner is None else owner
    return _open(path, os.O_RDONLY | os.O_DIRECTORY, owner, dir_fd, sticky)


def open_file(name: str, flags: int, dir_fd: int) -> int:
    """Opens a regular file in a segment's directory, with the same owner, never through a link; a new one is private.

    Raises:
        FileNotFoundError: it does not exist.
        SegmentUnsafe: it is not a regular file, another user's, writable by others, or closed to this user.
    """
    return _open(name, flags, os.fstat(dir_fd).st_uid, dir_fd)


class Descriptor(FileIO):
    """A file object that also closes its descriptor if it is just dropped; close(2) closes even if it fails."""

    def close(self) -> None:
        self._finalizing = False  # a finalizer may close it, without a ResourceWarning
        with suppress(OSError):
            super().close()


def open_owned(name: str, flags: int, dir_fd: int) -> Descriptor:
    """As ``open_file``, but returns a file object, which closes its descriptor even if it is just dropped.

    No Python code runs between the two calls that make it, so that no interrupt can leak it.
    """
    with _converted(name, flags, dir_fd):
        info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode):  # FileIO would raise this without closing the descriptor
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        file = next(map(Descriptor, map(partial(os.open, dir_fd=dir_fd), [name], [flags | _SAFELY])))
    try:
        _check(file.fileno(), name, flags, os.fstat(dir_fd).st_uid, dir_fd)
    except BaseException:
        file.close()
        raise
    return file


def _open(path: str | Path, flags: int, owner: int, dir_fd: int | None, sticky: bool = False) -> int:
    with _converted(path, flags, dir_fd):
        fd = os.open(path, flags | _SAFELY, 0o600, dir_fd=dir_fd)
    with closed_on_error(fd):
        _check(fd, path, flags, owner, dir_fd, sticky)
    return fd


@contextmanager
def _converted(path: str | Path, flags: int, dir_fd: int | None) -> Iterator[None]:
    """Converts an OSError into SegmentUnsafe if access is denied or the file is of another kind."""
    try:
        yield
    except PermissionError as exc:
        raise SegmentUnsafe(
            f"{_named(path, dir_fd)} may not be opened by uid {os.geteuid()}. Its owner can share the segment (wsync "
            "push --mode 0640 --group GROUP), or name another place with --runtime-dir."
        ) from exc
    except OSError as exc:
        if exc.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG):
            raise
        raise SegmentUnsafe(f"{_named(path, dir_fd)} is not a {_kind(flags)} ({exc.strerror}). {_WAY_OUT}") from exc


def _check(fd: int, path: str | Path, flags: int, owner: int, dir_fd: int | None, sticky: bool = False) -> None:
    """Raises SegmentUnsafe if an open file is another user's, writable by others, or of another kind."""
    info = os.fstat(fd)
    shared = info.st_mode & 0o022 and not (sticky and info.st_mode & stat.S_ISVTX)
    if not (flags & os.O_DIRECTORY or stat.S_ISREG(info.st_mode)) or info.st_uid != owner or shared:
        raise SegmentUnsafe(
            f"{_named(path, dir_fd)} belongs to uid {info.st_uid} with mode {stat.filemode(info.st_mode)}; it must "
            f"be a {_kind(flags)} of uid {owner} that nobody else may write. {_WAY_OUT}"
        )


def _kind(flags: int) -> str:
    return "directory" if flags & os.O_DIRECTORY else "regular file"


def _named(path: str | Path, dir_fd: int | None) -> Path:
    return Path("" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}"), path)


@contextmanager
def opened(fd: int) -> Iterator[int]:
    """Closes a descriptor when the block is left."""
    try:
        yield fd
    finally:
        shut(fd)


def base_owner(base: Path, *, write: bool) -> int:
    """The uid of a runtime directory's owner; this user's if the directory does not exist yet.

    Raises:
        SegmentUnsafe: it is another user's, and is to be written or this user's default one; or others may write to it.
        SegmentError: it cannot be opened.
    """
    me = os.geteuid()
    try:
        owner = os.stat(base, follow_symlinks=False).st_uid
    except OSError:  # open_dir says what is wrong
        owner = me
    if owner != me and (write or base == default_runtime_dir()):
        why = "only that user publishes there" if write else f"it is the place of uid {me}'s own segments"
        raise SegmentUnsafe(
            f"{base} belongs to uid {owner}, and {why}. Publish as that user, have it removed, or name another place "
            "with --runtime-dir."
        )
    try:
        shut(open_dir(base, owner))
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise from_os_error(exc, base) from exc
    return owner


def make_base(base: Path, access: Access) -> None:
    """Makes the runtime directory, which users who may read can enter. One that exists is checked, and never changed.

    Raises:
        OutOfSharedMemory: there is no room for it.
        SegmentUnsafe: it cannot be made, or is not this user's.
        UsageError: it exists, and users who may read cannot enter it; or this user is not in the group.
    """
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        base.mkdir(mode=0o700)
    except FileExistsError:
        base_owner(base, write=True)
        access.check_enterable(base)
        return
    except OSError as exc:
        raise no_room(exc, base.parent) or SegmentUnsafe(
            f"{base} cannot be made ({exc.strerror}). Name another place with --runtime-dir."
        ) from exc
    with opened(open_dir(base)) as fd:
        try:
            if access.given:
                access.grant(fd, access.directory_bits)
        except BaseException:
            os.rmdir(base)
            raise
