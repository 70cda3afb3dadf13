"""Finds changes that a file's identity (inode, size, modification time) does not show.

A writer that keeps a file's size and restores its time (``rsync --inplace -t``, ``cp -p`` onto it) leaves its identity
as it was; only the change time, which nobody can set, is later. But ``chmod``, a hard link and a rename also move the
change time. So a file that has the live version's identity but changed after it was read is a candidate with a new
identity, which begins with the change time; reading it shows whether its bytes differ.

Some FUSE file systems and sandboxes give a file another inode at each ``stat``, or after a while. There a file is
recognised by its path, its size and its times; a pinned one also by its headers.
"""

from __future__ import annotations

import os
import zlib

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files.parts import remote
from .newest import Candidate

_KINDS = {0x65735546, 0x01021997}  # FUSE and 9P: linux/magic.h


def known_again(found: list[Candidate], live: Candidate | None) -> list[Candidate]:
    """Returns the candidates, the live one with its recorded identity, or with a new one if it changed since then.

    Args:
        live: where the live version came from; its ``arrived_ns`` is when it went live.
    """
    if live is None:
        return found
    plain, where, written = _plain(live.identity), str(live.location), int(live.identity.rpartition("-")[2])

    def known(candidate: Candidate) -> Candidate:
        stamp = candidate.stamp
        is_same = (isinstance(stamp, str) or stamp.st_mtime_ns == written) and candidate.identity == plain
        later = max(candidate.arrived_ns, candidate.changed_ns)
        if is_same and 0 < live.changed_ns < later and not remote(candidate.path):
            return candidate._replace(stamp=changed_since(later, plain))
        if is_same or (str(candidate.location) == where and _is_renumbered(candidate, live)):
            return candidate._replace(stamp=live.identity)
        return candidate

    return list(map(known, found))


def lasting(newer: list[Candidate]) -> list[Candidate]:
    """Returns the candidates of one place, with paths instead of inodes in their identities if inodes change there."""
    if not newer or remote(newer[0].path) or not inodes_change(str(newer[0].location)):
        return newer
    return [each if "@" in each.identity else each._replace(stamp=_by_path(each)) for each in newer]


def as_listed(candidate: Candidate, checkpoint: Checkpoint) -> str:
    """The identity of an opened checkpoint: in the candidate's form, if they differ only in inode or change time."""
    plain = _plain(candidate.identity)
    if "@" in candidate.identity and _without_inodes(plain) == _without_inodes(checkpoint.identity):
        return changed_since(checkpoint.changed_ns, plain)
    return checkpoint.identity


def is_same(checkpoint: Checkpoint, identity: str, changed_ns: int, header: str = "") -> bool:
    """Whether a checkpoint, opened at its recorded path, has this identity.

    Args:
        changed_ns: newest change time of its files when the identity was recorded, in ns; 0 if unknown.
        header: its ``Checkpoint.header`` at that time, compared only if inodes change; empty if unknown.
    """
    plain = _plain(identity)
    if checkpoint.identity == plain:
        now = checkpoint.changed_ns
        return identity == changed_since(now, plain) or (identity == plain and changed_ns in (0, now))
    same = _without_inodes(checkpoint.identity) == _without_inodes(plain)
    same = same and header in ("", checkpoint.header)
    return same and not remote(checkpoint.path) and inodes_change(str(checkpoint.path))


def was_changed(identity: str, later: str) -> bool:
    """Whether the later identity is that of the same file after a change that kept its size and modification time."""
    return later != identity and _plain(later) == _plain(identity)


def inodes_change(where: str) -> bool:
    """Whether a path's inode is unreliable: it changes between two looks, or may on this kind of file system."""
    try:
        first, second = os.stat(where), os.stat(where)
    except OSError:  # it is gone
        return False
    if first.st_ino != second.st_ino and first.st_ctime_ns == second.st_ctime_ns:
        return True
    import ctypes  # needed only if a checkpoint is newer, or seems replaced by one of the same size and time

    about = (ctypes.c_long * 64)()  # a struct statfs; its first field is the kind
    return ctypes.CDLL(None).statfs(os.fsencode(where), about) == 0 and about[0] in _KINDS


def _is_renumbered(candidate: Candidate, live: Candidate) -> bool:
    """Whether a candidate differs from the live one only in an unreliable inode."""
    return (
        _without_inodes(candidate.identity) == _without_inodes(_plain(live.identity))
        and candidate.arrived_ns <= live.arrived_ns
        and not remote(candidate.path)
        and inodes_change(str(candidate.location))
    )


def changed_since(changed_ns: int, plain: str) -> str:
    """The identity of files that changed at this time, while inode, size and modification time stayed the same."""
    return f"{changed_ns}@{plain}"


def _plain(identity: str) -> str:
    """An identity without its change time."""
    return identity.rpartition("@")[2]


def _by_path(candidate: Candidate) -> str:
    """The candidate's identity with a hash of its path in place of inodes, and with its change time."""
    fields = candidate.identity.split("-")
    fields[-3] = f"{zlib.crc32(os.fsencode(candidate.location)):08x}"
    return changed_since(candidate.arrived_ns, "-".join(fields))


def _without_inodes(plain: str) -> str:
    """An identity without the inode of a single file, or without the fingerprints of several files."""
    fields = plain.split("-")
    return "-".join(fields[:-3] + fields[-2:])
