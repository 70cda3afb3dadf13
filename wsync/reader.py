"""A policy process's side: attach, refresh between steps, close.

Two ways to take a version. ``swap`` points the policy's parameters and buffers at the leased slot: no bytes move, and
the time depends neither on them nor much on the number of tensors (see ``swap``). ``copy`` copies into the policy's own
tensors, whose addresses stay.

A policy on a CUDA device has a reader of its own kind (``device_reader``), which this module makes and never imports
for others.

What a step costs when nothing is new is one load of eight bytes and one comparison. Call ``refresh()`` where no other
thread is inside the policy: it is between steps that a version changes.

A policy that writes to its own weights in place is kept from ``swap`` where that can be known beforehand. Where it
cannot, the write hits pages of the process's own (the mapping is private), harms nobody, and is gone with the next
version, of which a warning tells once.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Literal

import torch

from .attached import Attached
from .errors import (
    AttachTimeout,
    LayoutDiffers,
    SegmentError,
    SegmentMissing,
    SwapRefused,
    UsageError,
    WsyncError,
)
from .layout import Layout, layout_of, named_tensors, views
from .memory import read_at, sleep_on, trim
from .registry import Registration
from .segment import Lease, Segment
from .segment_files import METADATA_END, REMOVED, WORD_OFFSET, Publication
from .swap import Swap

if TYPE_CHECKING:
    from .device import Device

Mode = Literal["auto", "swap", "copy"]
Staging = Literal["device", "none"]

_log = logging.getLogger("wsync")
_LOOK = 0.1  # seconds between two looks where no word will change
_SELDOM, _SELDOM_SECONDS = 63, 1.0  # calls, and seconds, between two looks at the segment's directory
_WORD = WORD_OFFSET // 8


class Reader:
    """Keeps a policy in step with a segment; made by ``attach``.

    Attributes:
        name: of the segment.
        mode: ``"swap"`` or ``"copy"``.
        version: of the weights in the policy; 0 before the first.
        step: the producer's number for them, None where it gave none.
    """

    def __init__(self, attached: Attached, segment: Segment, mode: Literal["swap", "copy"]) -> None:
        self.name, self.mode = segment.name, mode
        self.version = 0
        self.step: int | None = None
        self._seen, self._taken = -1, 0
        self._lock = threading.Lock()
        self._closed = False
        self._calls, self._looked = 0, 0.0
        self._next_look = 0.0
        self._told_of_writing = False
        self._attached = attached
        self._swap = Swap(attached) if mode == "swap" else None
        self._sources: dict[int, list[torch.Tensor]] = {}  # by slot, what the policy's tensors are copied from
        self._registration = self._take(segment)
        _readers.add(self)

    def refresh(self, wait: bool = False) -> bool:
        """Takes the newest version if there is a newer one; call it between steps.

        Args:
            wait: on a GPU, for the version to be there; otherwise it is on its way, and a later call takes it. On the
                CPU a version is there at once in any case.

        Returns:
            True when a new version came in. Where the segment was removed the policy keeps its weights, a warning is
            logged once, and the reader attaches again when it comes back with the same layout.

        Raises:
            UsageError: this reader is closed, or the policy was moved (``.to()``) since it was attached; on a GPU also
                while a CUDA graph is captured, and in a forked child.
        """
        if self._words[_WORD] == self._seen:
            self._calls += 1
            return not self._calls & _SELDOM and self._look_around()
        return self._refresh(wait)

    def wait(self, timeout: float | None = None) -> bool:
        """Sleeps until there is a version that ``refresh`` would take; True if there is one, False when time is up.

        Args:
            timeout: seconds; None waits for ever.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                self._check_open()
                self._notice_removal()
                if self._words[_WORD] >> 8 != self._taken and self._words[_WORD] & 0xFF != REMOVED:
                    return True
                word, address = self._words[_WORD], self._address
            left = 3600.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            sleep_on(address, word, left)

    def close(self) -> None:
        """Gives the policy tensors of its own with the weights that it has, and lets go of the segment."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._give_own()
            finally:
                self._registration.close()
                self._sources.clear()
                self._words = _CLOSED
                self._segment.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"version {self.version}, step {self.step}"
        return f"<wsync.Reader {self.name!r}: {state}, mode {self.mode!r}>"

    def _refresh(self, wait: bool = False) -> bool:
        with self._lock:
            self._check_open()
            lease = self._newest()
            if lease is None:
                return False
            try:
                step = self._publication(lease).step
                written = self._swap.take(self._segment, lease) if self._swap else self._copy(lease)
            except BaseException:
                lease.release()
                raise
            self._took(lease, step)
            if self._swap:
                self._swap.renew()
            if written:
                self._tell_of_writing()
            return True

    def _newest(self) -> Lease | None:
        """A lease of the version that is newer than the policy's; None where there is none to be had now."""
        if self._words[_WORD] & 0xFF == REMOVED and not self._find_again():
            return None
        lease = self._segment.lease()
        if lease is None:
            return None
        if lease.version == self._taken:
            self._seen = lease.word
            lease.release()
            return None
        return lease

    def _took(self, lease: Lease, step: int | None) -> None:
        self.version = self._taken = lease.version
        self.step, self._seen = step, lease.word
        self._registration.update(self.version, *self._leases())

    def _look_around(self) -> bool:
        """A segment that was deleted by hand left no word of it: now and then the directory itself is looked at."""
        now = time.monotonic()
        if now - self._looked < _SELDOM_SECONDS:
            return False
        self._looked = now
        if self._closed or not self._is_gone():
            return False
        with self._lock:
            found = self._find_again()
        return found and self._refresh()

    def _tell_of_writing(self) -> None:
        if not self._told_of_writing:
            self._told_of_writing = True
            _log.warning(
                "the policy attached to %r writes to its weights in place: what it wrote was its own, and is gone with "
                'the next version. Attach with mode="copy" to keep its tensors its own.',
                self.name,
            )

    def _copy(self, lease: Lease) -> bool:
        """Copies a leased slot and lets go of it; False: what the policy writes is its own."""
        attached = self._attached
        attached.check()
        if lease.slot not in self._sources:
            with torch.inference_mode(False):
                sources = _view_slot(self._segment, lease.slot)
                self._sources[lease.slot] = [sources[index] for _, index in attached.targets]
        with torch.inference_mode(any(tensor.is_inference() for tensor in attached.tensors)), torch.no_grad():
            torch._foreach_copy_(attached.tensors, self._sources[lease.slot])  # R4 use
        lease.release()
        return False

    def _give_own(self) -> None:
        """Gives the policy tensors of its own, where it has none."""
        if self._swap:
            self._swap.give_own()

    def _leases(self) -> tuple[tuple[int, ...], float]:
        """The slots that this reader leases, and since when the oldest of them."""
        return self._swap.leases() if self._swap else ((), 0.0)

    def _publication(self, lease: Lease) -> Publication:
        return self._segment.publication_of(read_at(lease.fileno(), METADATA_END, 0), lease.slot)

    def _take(self, segment: Segment) -> Registration:
        """Makes a segment this reader's, and lists it there."""
        self._segment = segment
        self._words = segment.words
        self._address = segment.word_address
        self._seen, self._taken = -1, 0  # the WORD, and the version, of this very segment
        return Registration(segment.path, self.mode)

    def _notice_removal(self) -> None:
        """A segment that was deleted by hand left no word of it: a sleeper looks at the directory itself."""
        if self._is_gone():
            self._find_again()

    def _is_gone(self) -> bool:
        try:
            return not self._segment.is_current()
        except OSError:  # the system does not tell; what is mapped is there
            return False

    def _find_again(self) -> bool:
        """Attaches to a segment of the same name and layout that stands where ours was removed."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        if not self._next_look:
            _log.warning("segment %r was removed; the policy keeps version %d", self.name, self.version)
        self._next_look = now + _LOOK
        try:
            segment = Segment.open(self.name, self._segment.path.parent)
        except SegmentError:
            return False
        removed = segment.word & 0xFF == REMOVED  # ours still, by a remover that was killed, or another on its way out
        if removed or not _same_layout(segment, self._segment):
            segment.close()
            return False
        self._registration.close()
        self._sources.clear()
        self._segment.close()
        self._registration = self._take(segment)
        self._next_look = 0.0
        return True

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"this reader of {self.name!r} is closed. Attach again for new versions.")

    def _after_fork(self) -> None:
        """In a forked child: a record of its own; leases are shared with the parent, each part let go separately."""
        self._lock = threading.Lock()
        if self._swap:
            self._swap.after_fork()
        if not self._closed:
            try:
                self._registration.close(unlink=False)
                self._registration = Registration(self._segment.path, self.mode)
                self._registration.update(self.version, *self._leases())
            except (OSError, WsyncError) as exc:
                _log.warning("the forked reader of %r is not listed: %s", self.name, exc)


_CLOSED = memoryview(bytes(WORD_OFFSET + 8)).cast("Q")
_readers: weakref.WeakSet[Reader] = weakref.WeakSet()


def _after_fork() -> None:
    for reader in list(_readers):
        reader._after_fork()


os.register_at_fork(after_in_child=_after_fork)


def attach(
    policy: torch.nn.Module,
    name: str,
    *,
    timeout: float | None = None,
    mode: Mode = "auto",
    staging: Staging = "device",
    runtime_dir: str | os.PathLike[str] | None = None,
) -> Reader:
    """Attaches a policy to a segment; returns when its first version is in.

    Makes the segment where there is none yet, since the policy says what its layout is, and waits for a publisher.

    Args:
        policy: an ``nn.Module`` or ``TensorDictModule`` whose parameters and persistent buffers are kept in step.
        name: of the segment.
        timeout: seconds to wait for the first version; None waits for ever.
        mode: ``"swap"`` points the policy's tensors at the shared memory (CPU, inference), ``"copy"`` copies into the
            policy's own, whose addresses stay (training mode, CUDA graphs, any device), ``"auto"`` swaps where that is
            safe and copies elsewhere. On a GPU ``"swap"`` points them at two buffers there by turns, which is not for
            CUDA graphs, ``torch.compile(mode="reduce-overhead")`` and whatever remembers addresses: ``"auto"`` copies.
            What ``torch.compile`` makes for ``"swap"`` it must make afterwards, since it remembers alignments, too.
        staging: where the policy is on a GPU, a version comes by way of one more copy of the weights there, and no step
            waits for the bus; ``"none"`` does without it, with ``mode="copy"``, and ``refresh()`` waits for the bus.
            A policy that is split over devices has no such copy: ``refresh()`` copies tensor by tensor.
        runtime_dir: where segments live; default ``WSYNC_RUNTIME_DIR``, else ``/dev/shm/wsync-<uid>``.

    Raises:
        LayoutDiffers: the segment holds another architecture; the text has a table of the differences.
        SwapRefused: ``mode="swap"`` where the policy writes to its own tensors, or may.
        AttachTimeout: no version came in time.
        SegmentError: the segment can be neither opened nor made.
        OutOfDeviceMemory: the GPU has no room for that copy.
        UsageError: the mode, the staging or the name is none.
    """
    if not isinstance(policy, torch.nn.Module):
        raise UsageError(f"attach takes an nn.Module, not a {type(policy).__name__}. Give the policy itself.")
    if mode not in ("auto", "swap", "copy"):
        raise UsageError(f'mode={mode!r} is none of "auto", "swap" and "copy". Use one of them.')
    if staging not in ("device", "none") or (staging == "none" and mode == "swap"):
        raise UsageError(
            f'staging={staging!r} with mode={mode!r}: staging is "device", or "none" with mode="copy". Use one of them.'
        )
    reader = _make(policy, name, mode, staging, runtime_dir)
    try:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not reader.refresh(wait=True):
            left = None if deadline is None else deadline - time.monotonic()
            if not reader.wait(left) or (left is not None and left <= 0):
                raise AttachTimeout(
                    f"segment {name!r} got no version within {timeout} s. Start `wsync watch` or `wsync push` for it, "
                    "or wait longer with timeout=."
                )
            if reader.refresh(wait=True):
                break
            time.sleep(_LOOK)  # there is a version, and its slot is locked by somebody who does not follow the protocol
    except BaseException:
        reader.close()
        raise
    if reader.mode == "swap":
        trim()  # the policy's own weights, which it has no more: one copy a box is what readers share
    return reader


def _make(
    policy: torch.nn.Module, name: str, mode: Mode, staging: Staging, runtime: str | os.PathLike[str] | None
) -> Reader:
    device = _device_of(policy)
    hindrance = None if mode == "copy" else _hindrance(policy, device)
    if mode == "swap" and hindrance:
        raise SwapRefused(
            f"{hindrance}, and swap points it at memory that each version changes, where what it writes is gone with "
            'the next. Use mode="copy", or mode="auto", which takes swap where it is safe.'
        )
    layout = layout_of(policy)
    attached = Attached(policy, layout)
    if device is None:
        return Reader(attached, _open(name, layout, runtime), "copy" if mode == "copy" or hindrance else "swap")
    from .device_reader import DeviceReader
    from .device_weights import DeviceWeights, check_contiguous

    chosen: Literal["swap", "copy"] = "swap" if mode == "swap" else "copy"
    staged = staging == "device" and len(_places(policy)) == 1
    if staging == "none":
        check_contiguous(policy)
    weights = DeviceWeights(attached, device, chosen, staged=staged)
    return DeviceReader(attached, _open(name, layout, runtime), chosen, weights)


def _device_of(policy: torch.nn.Module) -> Device | None:
    """What a policy lies on that has tensors on a CUDA device, and none but there and on the host; or None."""
    places = _places(policy)
    cuda = [place for place in places if place.type == "cuda"]
    if not cuda or {place.type for place in places} - {"cuda", "cpu"}:
        return None
    from .device import Cuda, Split

    return Cuda(cuda[0]) if len(places) == 1 else Split({place: Cuda(place) for place in cuda})


def _places(policy: torch.nn.Module) -> set[torch.device]:
    return {tensor.device for _, tensor in named_tensors(policy)}


def _open(name: str, layout: Layout, runtime_dir: str | os.PathLike[str] | None) -> Segment:
    try:
        segment = Segment.open(name, runtime_dir)
    except SegmentMissing:
        Segment.create(name, layout, runtime_dir).close()
        segment = Segment.open(name, runtime_dir)
    if segment.layout.digest != layout.digest:
        differences = layout.differences(segment.layout)
        segment.close()
        raise LayoutDiffers(
            f"the policy does not fit segment {name!r}: {len(differences)} tensors differ. Build the policy as the "
            f"segment's publisher does, attach to another name, or `wsync rm {name}` if it is stale.",
            differences,
        )
    return segment


def _same_layout(one: Segment, other: Segment) -> bool:
    try:
        return one.layout.digest == other.layout.digest
    except SegmentError:  # it has none that can be read
        return False


def _hindrance(policy: torch.nn.Module, device: Device | None) -> str | None:
    """Why the policy's tensors must not point at a slot, or None."""
    for name, module in policy.named_modules():
        where = f"{name or 'the policy'} ({type(module).__name__})"
        if module.training:
            return f"{where} is in training mode (policy.eval() leaves it)"
        own = [b for b in module._buffers if b not in module._non_persistent_buffers_set]
        if own and not type(module).__module__.startswith("torch.nn."):
            return f"{where} has the buffer {own[0]!r}, which its own code may write in place"
    split = len(_places(policy)) > 1
    for name, tensor in named_tensors(policy):
        if tensor.device.type != "cpu" and (device is None or split):
            return f"{name} is on {tensor.device}" + (" and others are not" if split else "")
        if tensor.is_inference():
            return f"{name} was made in inference mode"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous in memory"
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return f"{name} is a {type(tensor).__name__}, not a plain tensor"
    return None


def _view_slot(segment: Segment, slot: int) -> list[torch.Tensor]:
    """Tensors over a leased slot's memory, in the layout's order; torch copies nothing."""
    mapped, address = segment.map_slot(slot)
    kind: Any = type("_Slot", (ctypes.c_uint8 * len(mapped),), {})  # a subclass can carry attributes
    memory = kind.from_address(address)
    memory.keep = mapped
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return views(segment.layout, storage, segment.data_offset)
