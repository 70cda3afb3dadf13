"""Brings weights from one box into the slots of all boxes, with votes of all boxes between the steps.

``Shared`` takes the place of a checkpoint in ``publishing.publish``, so that a group publishes by the same steps as one
box. The box that reads fills its whole slot first; then the slot is broadcast in pieces, and its checksum compared.
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

_GRAVEST = (65, 75, 66, 1, 2)  # exit codes, gravest first: all boxes raise the gravest of several objections


class Turn:
    """The votes on one publish; an objection of any box is raised on all boxes.

    Attributes:
        over: whether no vote is left: all boxes agreed, or one refused.
        objected: whether this box objected.
    """

    VOTES = 3

    def __init__(self, group: Group) -> None:
        self.group, self.over, self.objected = group, False, False
        self._cast = 0

    def vote(self, objection: WsyncError | None = None, *, work: Callable[[], None] | None = None) -> None:
        """Casts this box's vote, and waits for those of all others.

        Args:
            work: decides by raising an error or not; meanwhile this box sends signs of life.

        Raises:
            GroupBroken: a box is gone.
            WsyncError: some boxes object; the message names each of them.
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
        except BaseException:  # an objection, a broken group or an interrupt: no vote follows
            self.over = True
            raise

    def refuse(self, exc: WsyncError) -> None:
        """Objects at the next vote, if one is left, because this box cannot go on.

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
    """Raises the boxes' objections, if any, as one error of the gravest kind that names each box."""
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
    """Weights that one box sends into the slots of all; takes a checkpoint's place in ``publishing.publish``.

    Args:
        weights: what goes live on every box, as the sending box described it; each box sets time and spec itself.
        rank: rank of the sending box.
        source: on the sending box, the checkpoint that it reads first; else None.
        live: on the sending box, its live weights, if they go live again under another number; else None.
        extras: on the sending box, the extras of its live weights.

    Attributes:
        extras: on each box, the extras that arrived, once ``read_into`` is done.
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
        rank: rank of the sending box.
        weights: what this box sends, or where it receives; None if it needs nothing.
        nbytes: size of the weights.
        extras: on the sending box, returns the extras of the weights, once those are read.
        read: on the sending box, fills its weights, once all boxes are ready.
        progress: called with the number of bytes of each piece that arrives.

    Raises:
        WsyncError: the weights could not be read, or arrived damaged; raised on all boxes.
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
    """Broadcasts ``nbytes`` from one box to all; a box whose ``memory`` is None drops what it receives."""
    room = memory if memory is not None else memoryview(bytearray(min(nbytes, transport.PIECE)))
    for at in range(0, nbytes, transport.PIECE):
        size = min(nbytes - at, transport.PIECE)
        start = at if memory is not None else 0
        group.share(room[start : start + size], rank)
        if progress:
            progress(size)
