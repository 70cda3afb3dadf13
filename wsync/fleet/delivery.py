"""Brings weights from one box into the slots of all boxes, with the votes that every box casts on the way.

``Shared`` takes the place of a checkpoint in ``publishing.publish``, so that a group publishes by the same steps as one
box. The box that reads fills its whole slot first; then the slot is broadcast in pieces, followed by a checksum of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import errors
from ..checkpoints.files.extras import Extras
from ..errors import Difference, GroupBroken, RetryLater, WithDifferences, WsyncError
from ..fitting.fit import Fit
from ..fitting.plan import Plan
from ..layout.layout import Layout
from ..segment.publication import Publication
from . import group as transport
from .group import Group

if TYPE_CHECKING:
    from ..segment.publishing import Source

_GRAVEST = (65, 75, 66, 1, 2)  # exit codes, gravest first: of several objections, all boxes raise the gravest


class Turn:
    """The votes on one publish; an objection of any box is raised on all of them.

    Attributes:
        over: there is nothing left to vote on: it was agreed or refused.
        objected: this box was against it.
    """

    VOTES = 3

    def __init__(self, group: Group) -> None:
        self.group, self.over, self.objected = group, False, False
        self._cast = 0

    def vote(self, objection: WsyncError | None = None, *, work: Callable[[], None] | None = None) -> None:
        """Casts this box's vote, and waits for those of all others.

        Args:
            work: makes the decision; meanwhile the group goes on talking.

        Raises:
            GroupBroken: a box is gone.
            WsyncError: some box is against it; the message names each.
        """

        def verdict() -> dict[str, Any]:
            try:
                if objection:
                    raise objection
                if work:
                    work()
            except WsyncError as exc:
                self.objected = True
                return _objection(exc)
            self.objected = False
            return {}

        self._cast += 1
        self.over = self._cast == self.VOTES
        try:
            judge(self.group.together(verdict), self.group.names)
        except BaseException:  # an objection, a broken group or an interrupt: nothing is left to vote on
            self.over = True
            raise

    def refuse(self, exc: WsyncError) -> None:
        """Says at the next vote why this box cannot go on, or raises that if no vote is left.

        Raises:
            WsyncError: always.
        """
        if not self.over and not isinstance(exc, GroupBroken):
            self.vote(exc)
        raise exc


def _objection(exc: WsyncError) -> dict[str, Any]:
    kind = next(each for each in type(exc).__mro__ if each.__module__ == errors.__name__)  # not a gate's own subclass
    rows, text = [asdict(row) for row in exc.differences[:20]], exc.message
    return {"kind": kind.__name__, "text": text, "differences": rows}


def judge(verdicts: Iterable[dict[str, Any]], names: list[str]) -> None:
    """Raises the boxes' objections as one error of the gravest kind, with each box named."""
    against = [(name, verdict) for name, verdict in zip(names, verdicts, strict=True) if verdict]
    if not against:
        return
    kinds: list[type[WsyncError]] = [getattr(errors, verdict["kind"]) for _, verdict in against]
    kind = min(kinds, key=lambda kind: (_GRAVEST.index(kind.exit_code), kind is not RetryLater))
    text = " ".join(f"{name}: {verdict['text']}" for name, verdict in against)
    if issubclass(kind, WithDifferences):
        raise kind(text, tuple(Difference(**row) for _, verdict in against for row in verdict.get("differences", ())))
    raise kind(text)


class Shared:
    """What one box sends into this box's slot.

    Args:
        weights: what goes live on every box, as the sending box described it; time and spec are each box's own.
        rank: of the box that sends.
        source: what the sending box reads first.
        live: the sending box's live weights, if they go live again under another number.
        extras: what travels with the sending box's live weights.

    Attributes:
        extras: on each box, once ``read_into`` is done.
    """

    def __init__(
        self,
        weights: Publication,
        turn: Turn,
        rank: int,
        source: Source | None = None,
        live: memoryview | None = None,
        extras: Extras = Extras(),  # noqa: B008  (immutable)
    ) -> None:
        self.path, self.step, self.identity = weights.checkpoint or "", weights.step, weights.identity
        self.changed_ns = weights.changed_ns
        self.mixed, self.fitted = (source.mixed, source.fitted) if source else (False, None)
        self.weights, self.turn = weights, turn
        self.extras = extras
        self._rank, self._source, self._live = rank, source, live

    def plan(self, layout: Layout, settings: Fit) -> Plan:
        return self._source.plan(layout, settings) if self._source else Plan(layout)

    def read_into(
        self, weights: memoryview, plan: Plan, *, finite: bool, progress: Callable[[int], None] | None
    ) -> None:
        read = None
        if self._source:
            source = self._source
            read = partial(self._source.read_into, weights, plan, finite=finite, progress=progress)
            progress = None  # reading reports progress
        elif self._live is not None:
            weights[:] = self._live
        extras = (lambda: source.extras) if self._source else (lambda: self.extras)
        self.extras = deliver(self.turn, self._rank, weights, plan.layout.nbytes, extras, read=read, progress=progress)


def deliver(
    turn: Turn,
    rank: int,
    weights: memoryview | None,
    nbytes: int,
    extras: Callable[[], Extras],
    *,
    read: Callable[[], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Extras:
    """Brings the weights of one box to all others, with their extras; every box of the group takes part.

    Args:
        rank: of the box that sends.
        weights: what is sent, or where it goes; None ignores it.
        extras: gives what travels with the sender's weights, once those are read.
        read: fills the sender's weights, once all boxes are ready.
        progress: called with the bytes of each piece that arrives.

    Raises:
        WsyncError: they could not be read, or arrived damaged; raised on all boxes.
    """
    group = turn.group
    turn.vote()  # ready
    turn.vote(work=read)  # read
    _share_pieces(group, rank, weights, nbytes, progress)
    own = extras().to_bytes() if group.rank == rank else b""
    size = group.together(lambda: len(own))[rank]
    travelling = bytearray(own) if group.rank == rank else bytearray(size)
    _share_pieces(group, rank, memoryview(travelling), size)
    sums = group.together(lambda: zlib.crc32(travelling, zlib.crc32(weights[:nbytes])) if weights is not None else -1)
    wrong = [name for name, each in zip(group.names, sums, strict=True) if each not in (-1, sums[rank])]
    if wrong:
        turn.over = True
        raise WsyncError(
            f"{', '.join(wrong)}: the bytes that arrived differ from the bytes sent. They are thrown away and sent "
            "again. Check the network between the boxes."
        )
    return Extras.from_bytes(bytes(travelling))


def _share_pieces(
    group: Group, rank: int, memory: memoryview | None, nbytes: int, progress: Callable[[int], None] | None = None
) -> None:
    """Shares so many bytes of one box; a box without memory for them ignores them."""
    room = memory if memory is not None else memoryview(bytearray(min(nbytes, transport.PIECE)))
    for at in range(0, nbytes, transport.PIECE):
        size = min(nbytes - at, transport.PIECE)
        start = at if memory is not None else 0
        group.share(room[start : start + size], rank)
        if progress:
            progress(size)
