"""Weights on their way from one box into the slots of all, with the votes that every box casts on the way.

``Sent`` and ``Received`` stand where a checkpoint stands in ``publisher.publish``, so that a group publishes by the
very steps by which one box does. The pieces have a fixed schedule: a piece goes as soon as all its bytes were read,
while the next are being read; where the reading fails, the rest goes all the same, and is then voted down. A checksum
of all that was staged follows the pieces.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import group as transport
from .errors import (
    BeingWritten,
    CheckpointChanged,
    CheckpointError,
    CheckpointMismatch,
    CheckpointRejected,
    Difference,
    GateRejected,
    GroupBroken,
    IncompleteCheckpoint,
    LayoutDiffers,
    MalformedCheckpoint,
    NonFiniteWeights,
    PartialCheckpoint,
    RetryLater,
    SegmentBusy,
    UnusableBase,
    WithDifferences,
    WsyncError,
)
from .fitting import Fit, Plan
from .group import Group, Stream
from .layout import Layout

if TYPE_CHECKING:
    from .publisher import Source

_KINDS: tuple[type[WsyncError], ...] = (  # the first that fits is what all boxes raise; the gravest come first
    MalformedCheckpoint,
    CheckpointMismatch,
    NonFiniteWeights,
    GateRejected,
    CheckpointRejected,
    LayoutDiffers,
    CheckpointChanged,
    BeingWritten,
    PartialCheckpoint,
    IncompleteCheckpoint,
    RetryLater,
    SegmentBusy,
    UnusableBase,
    CheckpointError,
    WsyncError,
)


_OTHERS = (
    "other bytes came than were sent. They are thrown away, and sent again; look at the network between the boxes."
)


class Turn:
    """The votes on one publish; each raises on all boxes what any box has against it.

    Attributes:
        over: nothing is left to vote on: it is agreed, or refused.
        objected: this box was against it.
    """

    VOTES = 3

    def __init__(self, group: Group) -> None:
        self.group, self.over, self.objected = group, False, False
        self._cast = 0

    def vote(self, objection: WsyncError | None = None, *, work: Callable[[], None] | None = None) -> None:
        """Casts this box's vote, and waits for those of all others.

        Args:
            work: what decides; the group goes on talking meanwhile.

        Raises:
            GroupBroken: a box is gone.
            WsyncError: some box is against it; the message names each.
        """

        def verdict() -> dict[str, Any]:
            try:
                if work:
                    work()
            except WsyncError as exc:
                self.objected = True
                return _objection(exc)
            self.objected = objection is not None
            return _objection(objection) if objection else {}

        self._cast += 1
        self.over = self._cast == self.VOTES
        try:
            judge(self.group.together(verdict), self.group.names)
        except BaseException:
            self.over = True
            raise

    def refuse(self, exc: WsyncError) -> None:
        """Says at the next vote why this box cannot go on; where nothing is left to vote on, raises it.

        Raises:
            WsyncError: always.
        """
        if not self.over and not isinstance(exc, GroupBroken):
            self.vote(exc)
        raise exc


def _objection(exc: WsyncError) -> dict[str, Any]:
    kind = next(kind for kind in _KINDS if isinstance(exc, kind))
    rows = [asdict(row) for row in exc.differences[:20]] if isinstance(exc, WithDifferences) else []
    text = exc.message if isinstance(exc, WithDifferences) else str(exc)
    return {"kind": kind.__name__, "text": text, "differences": rows}


def judge(verdicts: Iterable[dict[str, Any]], names: list[str]) -> None:
    """Raises what boxes have against it as one error, the gravest kind of all, with each box named."""
    against = [(name, verdict) for name, verdict in zip(names, verdicts, strict=True) if verdict]
    if not against:
        return
    kind = next(kind for kind in _KINDS if any(verdict["kind"] == kind.__name__ for _, verdict in against))
    text = " ".join(f"{name}: {verdict['text']}" for name, verdict in against)
    if issubclass(kind, WithDifferences):
        raise kind(text, tuple(Difference(**row) for _, verdict in against for row in verdict.get("differences", ())))
    raise kind(text)


class Sent:
    """A checkpoint, or the live weights, that go to the other boxes while they are read into this box's slot.

    Args:
        source: what is read.
        whole: only send it once it was read to its end, because bytes may change until then, or come in any order.
    """

    def __init__(self, source: Source, turn: Turn, *, whole: bool) -> None:
        self.path, self.step, self.identity = source.path, source.step, source.identity
        self._source, self._turn, self._whole = source, turn, whole

    @property
    def kept(self) -> bool:
        return self._source.kept

    @property
    def fitted(self) -> Fit | None:
        return self._source.fitted

    def plan(self, layout: Layout, settings: Fit) -> Plan:
        return self._source.plan(layout, settings)

    def read_into(
        self, weights: memoryview, plan: Plan, *, finite: bool, progress: Callable[[int], None] | None
    ) -> None:
        self._turn.vote()  # ready
        group = self._turn.group
        outbox = Outbox(weights[: plan.layout.nbytes], group.stream(group.rank))
        whole = self._whole or bool(plan.casts)  # a cast comes in pieces, of which only the size is told
        reads, arrived = deque(() if whole else plan.reads), 0

        def note(nbytes: int) -> None:  # they come in their order, joined or split
            nonlocal arrived
            arrived += nbytes
            while reads and arrived >= reads[0].nbytes:
                read = reads.popleft()
                arrived -= read.nbytes
                for offset, size in read.slices:
                    outbox.filled(offset, size)
            if progress:
                progress(nbytes)

        def read() -> WsyncError | None:
            try:
                for entry in () if whole else plan.kept:
                    outbox.filled(entry.offset, entry.nbytes)
                self._source.read_into(weights, plan, finite=finite, progress=note)
            except GroupBroken:
                raise
            except WsyncError as exc:
                return exc
            return None

        objection = group.busy(read) if whole else None
        group.tell(True)  # the pieces come now
        if not whole:
            objection = read()
        outbox.close()
        group.tell(group.busy(lambda: zlib.crc32(weights[: plan.layout.nbytes])))
        self._turn.vote(objection)  # whole


class Outbox:
    """Sends pieces of ``PIECE`` bytes in their order, each once all of it was filled."""

    def __init__(self, weights: memoryview, stream: Stream) -> None:
        self._stream, self._size = stream, transport.PIECE
        self._pieces = list(pieces_of(weights))
        self._left = [len(piece) for piece in self._pieces]
        self._next = 0

    def filled(self, offset: int, nbytes: int) -> None:
        end = offset + nbytes
        while offset < end:
            piece, within = divmod(offset, self._size)
            size = min(end - offset, self._size - within)
            self._left[piece] -= size
            offset += size
        while self._next < len(self._left) and not self._left[self._next]:
            self._send()

    def close(self) -> None:
        """Sends the rest, and waits for it."""
        while self._next < len(self._left):
            self._send()
        self._stream.finish()

    def _send(self) -> None:
        self._stream.pass_on(self._pieces[self._next])
        self._next += 1


class Received:
    """What another box sends, as it goes into this box's slot."""

    kept, fitted = False, None

    def __init__(self, offer: dict[str, Any], rank: int, turn: Turn) -> None:
        self.path, self.step, self.identity = offer["path"], offer["step"], offer["identity"]
        self._turn, self._rank = turn, rank

    def plan(self, layout: Layout, settings: Fit) -> Plan:
        return Plan(layout)

    def read_into(
        self, weights: memoryview, plan: Plan, *, finite: bool, progress: Callable[[int], None] | None
    ) -> None:
        self._turn.vote()  # ready
        self._turn.group.hear(self._rank)
        stream = self._turn.group.stream(self._rank)
        for piece in pieces_of(weights[: plan.layout.nbytes]):
            stream.pass_on(piece)
            if progress:
                progress(len(piece))
        stream.finish()
        sent = self._turn.group.hear(self._rank)

        def compare() -> None:
            if zlib.crc32(weights[: plan.layout.nbytes]) != sent:
                raise WsyncError(f"{self.path}: {_OTHERS}")

        self._turn.vote(work=compare)  # whole


class Live:
    """This box's own live weights, which go live again under another number; the publisher's lock keeps them."""

    kept, fitted = False, None

    def __init__(self, weights: memoryview, offer: dict[str, Any]) -> None:
        self.path, self.step, self.identity = offer["path"], offer["step"], offer["identity"]
        self._weights = weights

    def plan(self, layout: Layout, settings: Fit) -> Plan:
        return Plan(layout)

    def read_into(
        self, weights: memoryview, plan: Plan, *, finite: bool, progress: Callable[[int], None] | None
    ) -> None:
        weights[:] = self._weights


def look_on(turn: Turn, rank: int, nbytes: int, weights: memoryview | None = None) -> None:
    """Takes part where this box takes nothing: it sends its own live weights, or lets what comes go by."""
    turn.vote()  # ready
    stream = turn.group.stream(rank)
    scratch = memoryview(bytearray(min(nbytes, transport.PIECE)))
    if weights is not None:
        turn.group.tell(True)
        for piece in pieces_of(weights):
            stream.pass_on(piece)
    else:
        turn.group.hear(rank)
        for at in range(0, nbytes, transport.PIECE):
            stream.pass_on(scratch[: nbytes - at])
    stream.finish()
    if weights is not None:
        turn.group.tell(turn.group.busy(lambda: zlib.crc32(weights)))
    else:
        turn.group.hear(rank)
    turn.vote()  # whole
    turn.vote()  # agreed
    turn.group.together(dict)  # others keep copies


def pieces_of(weights: memoryview) -> Iterable[memoryview]:
    return (weights[at : at + transport.PIECE] for at in range(0, len(weights), transport.PIECE))
