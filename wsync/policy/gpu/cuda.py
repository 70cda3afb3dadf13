"""What wsync needs from a CUDA device, in six methods.

A copy uses the full speed of the bus, and does not block the host, only if the pages that it reads are page-locked.
They must be the pages of the slot itself, so the mapping is shared. In a private mapping, such as policies on the CPU
use, the kernel would lock copies of the pages, which would show the weights of that moment for ever.

Streams: a version crosses the bus on a side stream, which first waits for the work that the policy's stream had when
the copy was requested, because that work may still read the buffer. The policy's stream is the one that is current when
``attach`` and ``refresh()`` are called; it never waits for the side stream.

A buffer is allocated on the policy's stream, like the policy's own tensors: torch reuses its memory in the order of
that stream, and the buffer is kept until the copy over the bus is done. So it is not recorded on the side stream; if it
were, torch would call CUDA when the memory is freed, which ends a forked child. Only if the policy has changed its
stream in the meantime is the buffer recorded on the new one.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ...errors import OutOfDeviceMemory

_PORTABLE, _READ_ONLY = 1, 8  # cudaHostRegisterPortable, cudaHostRegisterReadOnly: driver_types.h


class Flight(Protocol):
    """A copy that is under way, such as a ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Whether the copy is done."""

    def synchronize(self) -> None:
        """Waits until the copy is done."""


class Cuda:
    """One CUDA device, and a side stream on it; a test replaces it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._homes: set[torch.cuda.Stream] = set()  # streams that own buffers

    def capturing(self) -> bool:
        """Whether the policy's stream is being captured into a CUDA graph: then its work does not run now."""
        with torch.cuda.device(self._device):
            return torch.cuda.is_current_stream_capturing()

    def lock(self, address: int, nbytes: int, *, read_only: bool) -> str:
        """Page-locks host memory for all devices; returns why that was refused, or an empty string."""
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device):
            code = runtime.cudaHostRegister(address, nbytes, _PORTABLE | (_READ_ONLY if read_only else 0))
            if int(code) == 0:
                return ""
            self._forget_error()
            return str(runtime.cudaGetErrorString(code))

    def unlock(self, address: int) -> bool:
        """Undoes ``lock``; no copy from that memory may be under way.

        Returns False if that was refused: then the memory must stay mapped, because the device still reads these pages
        at that address.
        """
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.device(self._device):
                if int(runtime.cudaHostUnregister(address)) == 0:
                    return True
                self._forget_error()
        except RuntimeError:  # the device failed
            pass
        return False

    def empty(self, nbytes: int) -> torch.Tensor:
        """Allocates ``nbytes`` on the device, as uint8; raises OutOfDeviceMemory if there is no room."""
        self._homes.add(torch.cuda.current_stream(self._device))
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as exc:
            free = torch.cuda.mem_get_info(self._device)[0]
            raise OutOfDeviceMemory(
                f"{self._device} has no room for a second copy of the weights: it takes {nbytes:,} bytes, {free:,} are "
                'free. Make room there, or attach with mode="copy", staging="none", which needs no second copy.'
            ) from exc

    def trim(self) -> None:
        """Returns freed memory to the device; torch would keep it for this process alone."""
        torch.cuda.empty_cache()

    def send(self, targets: list[torch.Tensor], sources: list[torch.Tensor], *, aside: bool) -> Flight:
        """Begins to copy tensors from the host to the device, each to its target of the same shape and dtype.

        Args:
            aside: whether to copy on the side stream, after the policy's work until now; otherwise on the policy's own
                stream, whose next step then waits for the copy.
        """
        policy_stream = torch.cuda.current_stream(self._device)
        stream = self._side if aside else policy_stream
        if aside:
            self._side.wait_stream(policy_stream)
            if self._homes != {policy_stream}:
                for target in targets:
                    target.record_stream(policy_stream)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            try:
                torch._foreach_copy_(targets, sources, non_blocking=True)
                done.record(stream)
            except BaseException:  # the caller cannot know when the copy is done, and releases the slot's lease now
                stream.synchronize()
                raise
        return done

    def _forget_error(self) -> None:
        """Clears CUDA's last error, which would otherwise be reported by the next call, such as the policy's kernel.

        torch has no call for that, so this launches a kernel of its own, which reports the error.
        """
        try:
            torch.empty(1, device=self._device).fill_(1)
        except RuntimeError:
            pass
