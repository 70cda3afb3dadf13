"""``wsync`` on one box of a test's group: it has a name of its own, and can die at a chosen step.

FLEET_BOX is its name; FLEET_TIMEOUT and FLEET_PIECE are those of ``group``, whose beat is ten times as quick; the
policy is asked in the process of the watch, where torch is already. FLEET_ORDER is a file with ``step what``:
at that step the file is removed, and the worker, or its agent with it, ends by SIGKILL, or the worker stops; or the
piece that came is garbled; or a command of wsync runs here by hand. To the file FLEET_BUSY a line is added each time
that this box tells that it is at work.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wsync.cli import commands as cli
from wsync.fleet import delivery, fleet, group, membership
from wsync.segment.writable import WritableSegment
from wsync.settings import layout_process


def ordered(step: str) -> str:
    """What is to happen at this step, once; mostly nothing."""
    file = Path(os.environ["FLEET_ORDER"])
    if not file.exists():
        return ""
    at, _, what = file.read_text().partition(" ")
    if at != step:
        return ""
    file.unlink()
    return what


def obey_at(step: str) -> None:
    how = ordered(step)
    if not how:
        return
    if how.startswith("wsync "):
        subprocess.run([sys.executable, "-m", *how.split()], check=True)
        return
    if how == "agent":
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()  # its end ends us
    os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)


def around(owner: Any, name: str, before: Callable[..., None], after: Callable[[], None] = lambda: None) -> None:
    original = getattr(owner, name)

    def wrapped(self: Any, *given: Any, **more: Any) -> Any:
        before(self)
        try:
            return original(self, *given, **more)
        finally:
            after()

    setattr(owner, name, wrapped)


def sharing(self: group.Group, memory: memoryview, rank: int) -> None:
    share(self, memory, rank)
    if ordered("came"):
        memory[0] ^= 1
    obey_at("stage")


def voting(turn: delivery.Turn) -> None:
    if turn._cast == turn.VOTES - 1:
        obey_at("agree")


def hearing(self: group.Group, rank: int) -> Any:
    told = hear(self, rank)
    if isinstance(told, dict) and told.get("offer"):
        obey_at("offer")
    return told


def gathering(self: group.Group, mine: Any) -> list[Any]:
    if mine is None and (file := os.environ.get("FLEET_BUSY")):
        with open(file, "a") as log:
            log.write("busy\n")
    return gather(self, mine)


hear, gather, share = group.Group.hear, group.Group.gather, group.Group.share


def main() -> None:
    group.Group.hear = hearing  # type: ignore[method-assign]
    group.Group.gather = gathering  # type: ignore[method-assign]
    if "FLEET_BOX" in os.environ:
        socket.gethostname = lambda: os.environ["FLEET_BOX"]
    group.TIMEOUT = float(os.environ.get("FLEET_TIMEOUT", group.TIMEOUT))
    group.PIECE = int(os.environ.get("FLEET_PIECE", group.PIECE))
    group.BEAT = fleet.BEAT = 0.1  # type: ignore[attr-defined]
    layout_process.ask_policy = lambda spec, question, *more: question(spec, *more)
    group.Group.share = sharing  # type: ignore[method-assign]
    around(delivery.Turn, "vote", voting)
    around(membership.GroupFile, "record", lambda _: obey_at("counted"))
    around(WritableSegment, "store", lambda _: obey_at("store"), lambda: obey_at("stored"))
    cli.main()


if __name__ == "__main__":
    main()
