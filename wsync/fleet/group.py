"""The group of boxes that torchrun forms: which boxes are in it, and how they exchange messages and weights.

The transport is torch.distributed with gloo. Messages are JSON, never pickled; weights are broadcast in pieces of
``PIECE`` bytes, from memory into memory. A group is never repaired: if a box dies, hangs for longer than ``TIMEOUT`` or
is cut off, every call raises ``GroupBroken``, the process ends with 1, and torchrun's agents form a new group.

A watch is a box of a group if torchrun started it: then ``TORCHELASTIC_RUN_ID``, RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT are set. A watch that a training script starts under torchrun must be started without
``TORCHELASTIC_RUN_ID``.

``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` must be set for torchrun itself. Without it (torch 2.13) the torchrun of rank 0
announces the address of its store only in its first round, and assumes in later rounds that it is known. The torchrun
of a box that joins, or comes back, waits for that address in vain, the others wait for that box, and after a minute all
end (``DistStoreError``) before any of them has started a watch again. torchrun reads the variable long before a watch
runs, so a watch cannot set it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, TypeVar

from .. import __version__
from ..errors import GroupBroken, UsageError
from .membership import few

TIMEOUT = 30.0  # most seconds without a message from a box; a thread does longer work (a gate, a store, a layout)
FORMING = 120.0  # most seconds until the last box comes, once torchrun has counted the boxes
BEAT = 1.0  # seconds between two signs of life
PIECE = 8 << 20  # bytes of one broadcast
_FRAME = 2048  # bytes; enough for most messages between boxes
_T = TypeVar("_T")
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Group:
    """This box's place in the group.

    Attributes:
        rank: this box's rank.
        size: number of boxes in the group.
        run: torchrun's --rdzv-id, which successive groups share.
        names: names of the boxes, by rank; empty before ``join``.
        note: logs events of the group itself, as ``WatchLog.note``.
        thread: the thread that makes the rounds; None before the first.
        stop: if set, this box's work ends; set if the group breaks meanwhile.

    Raises:
        UsageError: some of torchrun's variables are missing, or it starts more than one watch on a box.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        missing = [name for name in _NEEDED if name not in environment]
        numbers = [environment.get(name, "") for name in _NEEDED[:3]]
        if missing or not all(number.isdecimal() for number in numbers):
            raise UsageError(
                f"TORCHELASTIC_RUN_ID is set, and {missing[0] if missing else 'a rank or size'} is not as torchrun "
                "sets it. Start the watch with torchrun, or, for this box alone, without TORCHELASTIC_RUN_ID."
            )
        self.rank, self.size, local = map(int, numbers)
        if local != 1:
            raise UsageError(
                f"torchrun started {local} processes on this box, which needs only one watch. Use --nproc-per-node 1; "
                "a watch that a training script starts must be started without TORCHELASTIC_RUN_ID."
            )
        self.run = environment["TORCHELASTIC_RUN_ID"]
        self.shared_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.names: list[str] = []
        self.note: Callable[[str, str, str], None] = lambda level, event, text: None
        self.thread: threading.Thread | None = None
        self.stop = threading.Event()
        self._group: Any = None

    def join(self) -> None:
        """Waits until all boxes have joined.

        Raises:
            GroupBroken: a box did not come, or has another version of wsync.
        """
        _end_with_parent()
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # our errors report what it would warn about
        import torch.distributed as dist

        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=FORMING))
            self._group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
        except (RuntimeError, ValueError) as exc:
            raise self._broken(exc) from exc
        hosts, versions = zip(*self.gather((socket.gethostname(), __version__)), strict=True)
        if len(set(versions)) > 1:
            raise GroupBroken(
                f"the boxes have different versions of wsync: {', '.join(sorted(set(versions)))}. Install the same "
                "version on all."
            )
        self.names = [h if hosts.count(h) == 1 else f"{h} (rank {rank})" for rank, h in enumerate(hosts)]
        self.note("info", "group", f"rank {self.rank} of {self.size}: {few(self.names)}")
        if self.shared_store:
            self.note(
                "warning",
                "group",
                "torchrun ends on all boxes if one joins late or comes back: set "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun starts",
            )

    def gather(self, mine: Any) -> list[Any]:
        """Sends ``mine`` to all boxes; returns what each box sent, by rank.

        Raises:
            GroupBroken: a box is gone, or sent nothing for ``TIMEOUT`` seconds.
        """
        text = json.dumps(mine).encode()
        rows = self._exchange(len(text).to_bytes(8, "little") + text, _FRAME)
        sizes = [int.from_bytes(row[:8], "little") for row in rows]
        rows = [row[8:] for row in rows] if max(sizes) <= _FRAME - 8 else self._exchange(text, max(sizes))
        return [json.loads(row[:size]) for row, size in zip(rows, sizes, strict=True)]

    def _exchange(self, data: bytes, nbytes: int) -> list[bytes]:
        """Exchanges the first bytes of each box's data, padded with zeros; returns them by rank."""
        import torch
        import torch.distributed as dist

        mine = torch.frombuffer(bytearray(data[:nbytes].ljust(nbytes, b"\0")), dtype=torch.uint8)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            dist.all_gather(rows, mine, group=self._group)
        except RuntimeError as exc:
            raise self._broken(exc) from exc
        return [row.numpy().tobytes() for row in rows]

    def busy(self, work: Callable[[], _T]) -> _T:
        """Returns the result of this box's work; meanwhile sends the others a sign of life each second."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            try:
                while not wait([future], BEAT).done:
                    self.gather(None)
            except GroupBroken:
                self.stop.set()  # so that a gate does not delay the end
                raise
            return future.result()

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Does this box's work, and returns the results of all boxes by rank; no result may be None."""
        mine = self.busy(work)
        while None in (answers := self.gather(mine)):  # some are still at work
            pass
        return answers

    def tell(self, what: Any) -> None:
        """Sends to all others, which call ``hear``."""
        self.gather(what)

    def hear(self, rank: int) -> Any:
        """Returns what that box sends by ``tell``, once it is no longer ``busy``."""
        while (told := self.gather(False)[rank]) is None:
            pass
        return told

    def share(self, memory: memoryview, rank: int) -> None:
        """Broadcasts the contents of that box's ``memory`` into the ``memory`` of all others, which is as large."""
        import torch
        import torch.distributed as dist

        try:
            dist.broadcast(torch.frombuffer(memory, dtype=torch.uint8), rank, group=self._group)
        except RuntimeError as exc:
            raise self._broken(exc) from exc

    def _broken(self, exc: Exception) -> GroupBroken:
        said = str(exc).partition("\n")[0]
        why = (said.partition(".cc:")[2].partition("] ")[2] or said).partition(". ")[0]
        boxes = f" ({few(self.names)})" if self.names else ""
        return GroupBroken(
            f"the group of {self.size} boxes{boxes} broke: {why[:200]}. What is live stays live; this watch ends, so "
            "that torchrun forms the group again."
        )


def _end_with_parent() -> None:
    """Has the kernel end this watch with SIGTERM if its torchrun is killed, before another one is started."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
