"""A device for tests, on the CPU: a copy over its bus is done when the test says so, and not before."""

from __future__ import annotations

import os

import torch

from wsync.errors import OutOfDeviceMemory
from wsync.policy.gpu.cuda import Cuda


class LateFlight:
    """A copy that reads its sources only when it lands, as late as a bus can be.

    Destroyed in a forked child it ends that, as an event of CUDA does.
    """

    def __init__(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        self.targets, self.sources = targets, sources
        self.done = False
        self._pid = os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self._pid:
            os._exit(134)

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        if not self.done:
            with torch.no_grad():
                torch._foreach_copy_(self.targets, self.sources)
        self.done = True


class LateDevice(Cuda):
    """Stands in for ``wsync.policy.gpu.cuda.Cuda``.

    Attributes:
        refuses: of ``"read-only"`` and ``"writable"`` memory, what it does not lock; and ``"unlock"``.
        room: bytes that it has for buffers; None has no end.
        captured: whether the policy's stream is captured.
        trims: for how many buffers, that were asked for before, it gave back what was freed.
        locked: size of each locked range of the host's memory, by its address.
        locks: how many ranges were ever locked.
        flights: all copies over the bus.
        buffers: sizes of those that were asked for.
    """

    def __init__(self, *, prompt: bool = False) -> None:
        self._prompt = prompt  # copies are done at once
        self.refuses: set[str] = set()
        self.room: int | None = None
        self.captured = False
        self.trims: list[int] = []
        self.locked: dict[int, int] = {}
        self.locks = 0
        self.flights: list[LateFlight] = []
        self.buffers: list[int] = []

    def capturing(self) -> bool:
        return self.captured

    def lock(self, address: int, nbytes: int, *, read_only: bool) -> str:
        assert all(address + nbytes <= begin or begin + size <= address for begin, size in self.locked.items())
        if ("read-only" if read_only else "writable") in self.refuses:
            return "operation not permitted"
        self.locked[address] = nbytes
        self.locks += 1
        return ""

    def unlock(self, address: int) -> bool:
        """Undefined in CUDA while a copy reads that memory; here an error."""
        if "unlock" in self.refuses:
            return False
        size = self.locked.pop(address)
        for flight in self.flights:
            assert flight.done or not any(address <= s.data_ptr() < address + size for s in flight.sources)
        return True

    def empty(self, nbytes: int) -> torch.Tensor:
        if self.room is not None and nbytes > self.room:
            raise OutOfDeviceMemory(f"the test's device has no room for {nbytes} bytes. Give it more.")
        self.buffers.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def trim(self) -> None:
        self.trims.append(len(self.buffers))

    def send(self, targets: list[torch.Tensor], sources: list[torch.Tensor], *, aside: bool) -> LateFlight:
        if self._prompt:
            self.flights.clear()
        self.flights.append(LateFlight(targets, sources))
        if self._prompt or not aside:
            self.land()
        return self.flights[-1]

    def land(self) -> None:
        """What is under way arrives."""
        self.flights[-1].synchronize()
