"""Finds parts of a file that were never written: reserved space, and holes."""

from __future__ import annotations

import os
import struct
from typing import Literal

_FIEMAP = 0xC020660B  # linux/fs.h
_HEAD, _EXTENT = struct.Struct("QQIIII"), struct.Struct("QQQ2QI3I")  # linux/fiemap.h
_UNWRITTEN = 0x800


def unwritten(fd: int) -> Literal["reserved", "hole", ""]:
    """Whether a part of a file was never written, and reads as zeros; empty if not, or if the system does not say.

    ``"reserved"`` is space from fallocate(2), as ext4 and XFS report it. ``"hole"`` may have been left on purpose, as
    ``cp --sparse`` does for zeros; on tmpfs it may also be reserved space. Bytes that were written and are still in
    memory do not count as a hole.
    """
    try:
        size, hole = os.fstat(fd).st_size, os.lseek(fd, 0, os.SEEK_HOLE)
    except OSError:  # the file is empty, or its file system has no holes
        return ""
    if hole >= size:
        return ""
    import fcntl

    extents = bytearray(_HEAD.pack(hole, 1, 0, 0, 1, 0) + bytes(_EXTENT.size))
    try:
        fcntl.ioctl(fd, _FIEMAP, extents)
    except OSError:
        return "hole"
    found, flags = _HEAD.unpack_from(extents)[3], _EXTENT.unpack_from(extents, _HEAD.size)[5]
    return "reserved" if found and flags & _UNWRITTEN else "hole"
