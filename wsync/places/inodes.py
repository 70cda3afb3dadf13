"""Inodes that change: some FUSE file systems and sandboxes number a file anew at each look, or after a while.

There what is live is known again by its path, its size and its times.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..checkpoints.files import remote
from .candidates import Candidate

_KINDS = {0x65735546, 0x01021997}  # FUSE and 9P: linux/magic.h


def known_again(found: Sequence[Candidate], live: Candidate | None) -> list[Candidate]:
    """Returns the candidates; the one that is live has its recorded identity, though its inode is another by now.

    Args:
        live: what is live; its ``arrived_ns`` is when it went live.
    """
    where = str(live.location) if live else ""
    return [
        c._replace(stamp=live.identity) if live and str(c.location) == where and _is_live(c, live) else c for c in found
    ]


def _is_live(candidate: Candidate, live: Candidate) -> bool:
    """Whether only the inode of a candidate differs from what is live, and says nothing."""
    return (
        candidate.identity != live.identity
        and _without_inodes(candidate.identity) == _without_inodes(live.identity)
        and candidate.arrived_ns <= live.arrived_ns
        and not remote(candidate.path)
        and inodes_change(str(candidate.location))
    )


def inodes_change(where: str) -> bool:
    """Whether the inode of a path says nothing: it changes between two looks, or on file systems of this kind may."""
    first, second = os.stat(where), os.stat(where)
    if first.st_ino != second.st_ino and first.st_ctime_ns == second.st_ctime_ns:
        return True
    import ctypes  # only where a checkpoint seems to have been replaced by one of the same size and time

    about = (ctypes.c_long * 64)()  # a struct statfs; its first field is the kind
    return ctypes.CDLL(None).statfs(os.fsencode(where), about) == 0 and about[0] in _KINDS


def _without_inodes(identity: str) -> str:
    """An identity without the inode of a file, or the fingerprints of several."""
    fields = identity.split("-")
    return "-".join(fields[1:] if len(fields) == 3 else [fields[0], *fields[2:]])
