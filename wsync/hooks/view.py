"""What a gate looks at: a copy of the staged slot that nobody can change, and whether the slot is still the same.

The slot itself belongs to the user as whom the gate runs, so nothing could keep the gate from writing to it. The copy
is in memory that the kernel seals (memfd_create(2)), as large as the weights, and is gone with the gate.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import SegmentError, WsyncError
from ..segment.access import opened

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PIECE = 8 << 20  # bytes compared at a time


class View:
    """A sealed copy of a file, under a path that other processes of this user can open as long as it is there."""

    def __init__(self, original: int, copy: int) -> None:
        self._original, self._copy = original, copy
        self.path = Path(f"/proc/{os.getpid()}/fd/{copy}")

    def check(self) -> None:
        """Whether the original still holds what was copied.

        Raises:
            SegmentError: it was changed.
        """
        size = os.fstat(self._copy).st_size
        same = os.fstat(self._original).st_size == size and all(
            os.pread(self._original, _PIECE, at) == os.pread(self._copy, _PIECE, at) for at in range(0, size, _PIECE)
        )
        if not same:
            raise SegmentError(
                "the staged weights changed while the gate looked at them, and nothing went live. Let the gate "
                "write to no file of a segment; it reads the staged weights from WSYNC_HOOK_STAGED."
            )


@contextmanager
def view_of(path: Path) -> Iterator[View]:
    """Copies a staged slot for a gate.

    Raises:
        WsyncError: there is no memory for the copy, or the slot is gone.
    """
    with ExitStack() as stack:
        try:
            original = stack.enter_context(opened(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)))
            copy = stack.enter_context(opened(os.memfd_create("wsync-staged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)))
            while os.sendfile(copy, original, None, _PIECE):
                pass
            fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as exc:
            raise WsyncError(
                f"the copy of {path} for the gate could not be made ({exc.strerror}). It takes as much memory as the "
                "weights: raise the limit of this process, or of its container."
            ) from exc
        yield View(original, copy)
