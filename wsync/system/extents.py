"""Finds what was never written of a file: space that was reserved, and holes."""

from __future__ import annotations

import os
import struct
from typing import Literal

_FIEMAP = 0xC020660B  # linux/fs.h
_HEAD, _EXTENT = struct.Struct("QQIIII"), struct.Struct("QQQ2QI3I")  # linux/fiemap.h
_UNWRITTEN = 0x800


def unwritten(fd: int) -> Literal["reserved", "hole", ""]:
    """Tells whether a part of a file was never written, and reads as zeros; empty where the system does not say.

    ``"reserved"`` is room from fallocate(2), as ext4 and XFS tell it. ``"hole"`` is one that somebody may have left on
    purpose, as ``cp --sparse`` leaves it for zeros; on tmpfs it may be reserved, too. What was written and is still in
    memory is no hole.
    """
    try:
        size, hole = os.fstat(fd).st_size, os.lseek(fd, 0, os.SEEK_HOLE)
    except OSError:  # the file is empty, or on a file system that knows no holes
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
