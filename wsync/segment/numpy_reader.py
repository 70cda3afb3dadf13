"""Readers without torch: a leased version as numpy arrays and as a safetensors file.

An array that is kept after its block never changes either: the lease ends when the last array is gone.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..errors import AttachTimeout, SegmentMissing, UsageError
from ..layout.layout import TORCH_DTYPES, TensorEntry, torch_shape
from ..system.memory import sleep_on
from .reader_records import Registration
from .segment import Segment
from .segment_files import REMOVED, slot_name
from .word_and_lease import Lease, SlotMemory

if TYPE_CHECKING:
    import numpy as np

_LOOK = 0.1  # seconds between two looks if no WORD will change


class Held(Mapping[str, "np.ndarray[Any, Any]"]):
    """One version, which does not change during the block of ``lease`` or the turn of ``follow`` that yields it.

    ``held["body.0.weight"]`` is a read-only numpy array of the tensor's shape and dtype (from ``ml_dtypes`` if numpy
    lacks it; uint8 for packed four-bit floats), without a copy. Tied weights are found under each of their names.

    Attributes:
        version: the segment's number for it.
        step: the trainer's own number for it; None if it gave none.
        extras: the files that travel with the weights: bytes by file name.
        metadata: the metadata of its checkpoint.
        path: the slot's file, a safetensors file that does not change meanwhile; it has tied weights once.
    """

    def __init__(self, segment: Segment, lease: Lease) -> None:
        publication = segment.leased(lease)
        self.version, self.step = lease.version, publication.step
        self.extras, self.metadata = segment.extras(publication, lease.slot)
        self.path = segment.path / slot_name(lease.slot)
        self._entries = {name: entry for entry in segment.layout.tensors for name in entry.names}
        self._start = segment.data_offset
        memory, _ = segment.map_pages(lease.slot)
        registration = Registration(segment.path, "swap", self.version, (lease.slot,), time.time())
        weakref.finalize(memory, registration.close)
        memory.lease = lease
        self._memory: SlotMemory | None = memory

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        import numpy as np

        if self._memory is None:
            raise UsageError(
                f"version {self.version} was given back at the end of its block. Read its tensors inside the block."
            )
        entry = self._entries[name]
        array = np.frombuffer(self._memory, np.uint8, entry.nbytes, self._start + entry.offset)
        return array.view(_dtype(entry)).reshape(torch_shape(entry))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _give_back(self) -> None:
        self._memory = None


@contextmanager
def lease(name: str, *, timeout: float = 0.0, runtime_dir: str | os.PathLike[str] | None = None) -> Iterator[Held]:
    """Holds the newest version of a segment for a block: ``with wsync.lease("cartpole") as held``.

    Args:
        name: name of the segment, which must exist.
        timeout: seconds to wait for a first version.
        runtime_dir: where segments live; default ``WSYNC_RUNTIME_DIR``, else ``/dev/shm/wsync-<uid>``.

    Raises:
        AttachTimeout: the segment has no version, and got none in time.
        SegmentError: there is no such segment, or it is damaged.
    """
    deadline = time.monotonic() + timeout
    with closing(Segment.open(name, runtime_dir)) as segment:
        while (leased := segment.lease()) is None:
            if (left := deadline - time.monotonic()) <= 0:
                raise AttachTimeout(
                    f"segment {name!r} has no version after {timeout} s. Start `wsync watch` or `wsync push` for it, "
                    "or wait longer with timeout=."
                )
            time.sleep(min(left, _LOOK))
        held = Held(segment, leased)
    try:
        yield held
    finally:
        held._give_back()


def follow(name: str, *, runtime_dir: str | os.PathLike[str] | None = None) -> Generator[Held, None, None]:
    """Yields the newest version of a segment, then newer ones as they come; skips those replaced meanwhile.

    Each version is held until the next one is asked for. If the segment is removed, waits until there is a new one.

    Raises:
        SegmentError: there is no such segment at the start, or it is damaged.
    """
    segment = Segment.open(name, runtime_dir)
    version = 0
    while True:
        with closing(segment):
            while (word := segment.word) & 0xFF != REMOVED and segment.is_current():
                leased = segment.lease() if word >> 8 != version else None
                if leased is None:
                    sleep_on(segment.control.address, word, _LOOK if word >> 8 != version else 3600.0)
                    continue
                held = Held(segment, leased)
                version = held.version
                try:
                    yield held
                finally:
                    held._give_back()
        while True:
            with suppress(SegmentMissing):
                segment, version = Segment.open(name, runtime_dir), 0
                break
            time.sleep(_LOOK)


def _dtype(entry: TensorEntry) -> np.dtype[Any]:
    import numpy as np

    attribute = "uint8" if entry.dtype == "F4" else TORCH_DTYPES[entry.dtype]
    try:
        return np.dtype(attribute)
    except TypeError:
        import ml_dtypes

        known: np.dtype[Any] = np.dtype(getattr(ml_dtypes, attribute))
        return known
