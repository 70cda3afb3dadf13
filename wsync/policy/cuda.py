"""What wsync needs of a CUDA device, in six methods.

The bus is used at its full speed, and without the host's waiting, only where the pages that it reads are page-locked.
Those must be the pages of the slot itself, and so its mapping is a shared one. Of a private mapping, such as policies
on the CPU point into, the kernel locks copies of its own making: they would show the weights of the moment of locking
for ever.

Streams: a version crosses the bus on a stream of its own, which first waits for what the policy's stream had to do
when the copy was asked for, since that may still read the buffer that is written. The policy's stream is the one that
is current where ``attach`` and ``refresh()`` are called; it never waits for the other.

A buffer is memory of the policy's stream, as the policy's own tensors are: torch gives it out anew in the order of that
stream, and nobody lets go of it before the copy over the bus is done. So it needs no mark of the other stream; such a
mark makes torch ask CUDA where the memory is freed, which ends a forked child. Only where the policy changed its stream
since then does the buffer get the mark of the new one.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ..errors import OutOfDeviceMemory

_PORTABLE, _READ_ONLY = 1, 8  # cudaHostRegisterPortable, cudaHostRegisterReadOnly: driver_types.h


class Flight(Protocol):
    """A copy under way; ``torch.cuda.Event`` is one."""

    def query(self) -> bool:
        """Whether the copy is done."""

    def synchronize(self) -> None:
        """Waits until it is."""


class Cuda:
    """One CUDA device, and a side stream on it; a test puts something else in its place."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._homes: set[torch.cuda.Stream] = set()  # streams that own buffers

    def capturing(self) -> bool:
        """Whether the policy's stream is being captured: work then goes into a graph and is not run now."""
        with torch.cuda.device(self._device):
            return torch.cuda.is_current_stream_capturing()

    def lock(self, address: int, nbytes: int, *, read_only: bool) -> str:
        """Page-locks memory of the host, for all devices; an empty text, or why that was refused."""
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device):
            code = runtime.cudaHostRegister(address, nbytes, _PORTABLE | (_READ_ONLY if read_only else 0))
            if int(code) == 0:
                return ""
            self._forget_error()
            return str(runtime.cudaGetErrorString(code))

    def unlock(self, address: int) -> bool:
        """Undoes ``lock``; no copy from that memory may be under way.

        False where that was refused: the memory must stay mapped, since it is these pages that the device reads at
        that address.
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
        """So many uint8 on the device; raises OutOfDeviceMemory."""
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
        """Gives memory that was freed back to the device; torch keeps it, for this process alone."""
        torch.cuda.empty_cache()

    def send(self, targets: list[torch.Tensor], sources: list[torch.Tensor], *, aside: bool) -> Flight:
        """Begins to copy tensors of the host to the device, each to its target of the same shape and dtype.

        Args:
            aside: on a stream of its own, after all that the policy's stream was given before; else on the policy's,
                whose next step waits.
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
            except BaseException:  # whatever it was: nobody would know when it is done, and the slot's lease ends now
                stream.synchronize()
                raise
        return done

    def _forget_error(self) -> None:
        """CUDA reports its last error to the next caller, usually the next kernel's launch, which would then be blamed.

        torch has no call that clears the error, so this launches a kernel of its own.
        """
        try:
            torch.empty(1, device=self._device).fill_(1)
        except RuntimeError:
            pass
