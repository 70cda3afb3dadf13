"""The protocol of ``wsync.segment`` as a model that is small enough to try every interleaving of its steps.

The steps have the names of the essay. One action of the model is one step of one process, or its death; staging and
copying are two writes and two reads, so that half a version can be seen. Publishers publish for ever: what a state
says of versions is only which is older than which, so that endlessly many publishes are finitely many states.

Every staging gets a stamp of its own, also one that is killed or refused and made again for the same version. The WORD
carries, unseen by the processes, the stamp of the weights that were complete when it was stored: what a reader uses
must be both halves of just that stamp.

A flaw is a protocol with one step left out or in another place. It shows what the step is there for: the property
that ``find`` then finds broken, and the shortest way there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeVar, get_args

STEPS = (
    *("P1 lock", "P2 pick", "P3 check", "P4 stage", "P5 verify", "P6 release", "P7 store", "P8 wake"),
    *("R1 load", "R2 lease", "R3 recheck", "R4 use", "R5 release"),
)
SLOTS = 3
FREE, NONE = -1, -1

T = TypeVar("T")

Flaw = Literal[
    "",
    "no P1 lock",
    "no P2 lock",
    "P3 before P2",  # the look that is taken before the lock is the only one
    "no look before P2",
    "no P3 check",  # neither
    "P3 before P1",
    "P7 before P6",
    "P7 before P4 is done",
    "no R2 lease",
    "no R3 recheck",
    "R3 of the slot alone",
    "R5 before R4",
    "locks outlive their process",
]
Property = Literal[
    "no torn read",  # what is used is one stamp
    "the version's own weights",  # and the one that was stored with the version that the reader believes it has
    "what is used is not written",  # a living reader's slot
    "versions grow",  # in the WORD and for each reader
    "the live slot can be leased",  # whoever follows the WORD at once gets what it says
    "no stuck publisher",  # once the others are dead or stand still a new publisher publishes, if a slot is spare
]
ALL: frozenset[Property] = frozenset(get_args(Property))


class Word(NamedTuple):
    """The WORD, and the stamp that came with it, which nobody reads."""

    version: int
    slot: int
    stamp: int


NOTHING = Word(0, NONE, 0)


class Publisher(NamedTuple):
    """A publisher before the step ``at``; ``half`` is how much of P4 is done, ``seen`` a live slot looked up early."""

    at: str = "P1 lock"
    slot: int = NONE
    half: int = 0
    stamp: int = 0
    version: int = 0  # to be stored; 0: refused
    seen: int = NONE


class Reader(NamedTuple):
    """A reader before the step ``at``: what it loaded, what its policy uses (swap), what it holds from before."""

    at: str = "R1 load"
    loaded: Word = NOTHING
    used: Word = NOTHING
    old: int = NONE
    half: int = 0  # copy: the stamp of the half that is copied


class State(NamedTuple):
    """All shared memory and all locks, and where each process is."""

    word: Word = NOTHING
    slots: tuple[tuple[int, int], ...] = ((0, 0),) * SLOTS
    publisher_lock: int = FREE
    writers: tuple[int, ...] = (FREE,) * SLOTS  # who holds a slot's lock exclusively
    leases: tuple[int, ...] = (0,) * SLOTS  # which readers hold it shared, a bit each
    publishers: tuple[Publisher, ...] = (Publisher(),)
    readers: tuple[Reader, ...] = (Reader(), Reader())


class Move(NamedTuple):
    """One step: whose, what, where it leads, and the property that it breaks."""

    who: str
    what: str
    to: State
    breaks: Property | None = None


@dataclass(frozen=True)
class Model:
    """A cast of processes, and a flaw.

    Attributes:
        publishers: how many there may be at a time; P1 is to keep all but one waiting.
        modes: of the readers.
        flaw: what is wrong with the protocol.
    """

    publishers: int = 1
    modes: tuple[Literal["swap", "copy"], ...] = ("swap", "copy")
    flaw: Flaw = ""

    @cached_property
    def idle(self) -> Publisher:
        return Publisher("P3 check" if self.flaw == "P3 before P1" else "P1 lock")

    @property
    def start(self) -> State:
        return State(publishers=(self.idle,) * self.publishers, readers=(Reader(),) * len(self.modes))

    def moves(self, state: State) -> Iterator[Move]:
        """Every step that some process can make, and every death."""
        for i in range(self.publishers):
            for what, to, breaks in self.publish(state, i):
                yield Move(f"publisher {i}", what, to, breaks)
            if state.publishers[i] != self.idle:
                yield Move(f"publisher {i}", "dies", self.kill_publisher(state, i))
        for i in range(len(self.modes)):
            for what, to, breaks in self.read(state, i):
                yield Move(f"{self.modes[i]} reader {i}", what, to, breaks)
            if state.readers[i] != Reader():
                yield Move(f"{self.modes[i]} reader {i}", "dies", self.kill_reader(state, i))

    # --- the publisher

    def publish(self, state: State, i: int) -> Iterator[tuple[str, State, Property | None]]:
        """The next step of a publisher, in each way that it can go."""
        me, at, flaw = state.publishers[i], state.publishers[i].at, self.flaw
        if at == "P1 lock":
            if flaw == "no P1 lock":
                yield at, _put(state, i, me._replace(at="P2 pick")), None
            elif state.publisher_lock == FREE:
                yield at, _put(state._replace(publisher_lock=i), i, me._replace(at="P2 pick")), None
        elif at == "P2 pick":
            for to in self._pick(state, i):
                yield at, to, None
        elif at == "P3 check":
            if flaw == "P3 before P1":
                yield at, _put(state, i, me._replace(at="P1 lock", seen=state.word.slot)), None
            elif state.word.slot != me.slot or flaw in ("P3 before P2", "no P3 check"):
                yield at, self._begin(state, i, me), None
            else:
                state = state._replace(writers=_set(state.writers, me.slot, FREE))
                yield at, _put(state, i, me._replace(at="P2 pick", slot=NONE)), None
        elif at == "P4 stage":
            both = state.slots[me.slot]
            both = (both[0], me.stamp) if me.half else (me.stamp, both[1])
            used = any(_uses(reader, me.slot) for reader in state.readers)
            done = "P5 verify" if me.half else "P7 store" if flaw == "P7 before P4 is done" else "P4 stage"
            early = state.word.version + 1 if flaw == "P7 before P4 is done" and not me.half else me.version
            me = me._replace(at=done, half=1 - me.half, version=early)
            state = state._replace(slots=_set(state.slots, me.slot, both))
            yield at, _put(state, i, me), "what is used is not written" if used else None
        elif at == "P5 verify":
            after = "P7 store" if flaw == "P7 before P6" else "P6 release"
            yield at, _put(state, i, me._replace(at=after, version=state.word.version + 1)), None
            yield f"{at}: refused", _put(state, i, me._replace(at="P6 release", version=0)), None
        elif at == "P6 release":
            state = state._replace(writers=_set(state.writers, me.slot, FREE))
            if not me.version:
                yield at, self._leave(state, i), None
            elif flaw in ("P7 before P6", "P7 before P4 is done"):
                yield at, _put(state, i, Publisher("P8 wake")), None
            else:
                yield at, _put(state, i, me._replace(at="P7 store")), None
        elif at == "P7 store":
            sooner = {"P7 before P6": "P6 release", "P7 before P4 is done": "P4 stage"}.get(flaw)
            back = me.version <= state.word.version
            state = state._replace(word=Word(me.version, me.slot, me.stamp))
            me = me._replace(at=sooner) if sooner else Publisher("P8 wake")
            yield at, _put(state, i, me), "versions grow" if back else None
        elif at == "P8 wake":
            yield at, self._leave(state, i), None

    def _pick(self, state: State, i: int) -> Iterator[State]:
        """Any slot that is not live and whose lock is to be had; where there is none the pass is over."""
        me, flaw = state.publishers[i], self.flaw
        live = me.seen if flaw == "P3 before P1" else state.word.slot
        busy = True
        for slot in range(SLOTS):
            if slot == live and flaw not in ("no look before P2", "no P3 check"):
                continue
            if flaw != "no P2 lock" and (state.leases[slot] or state.writers[slot] != FREE):
                continue
            busy = False
            to = state if flaw == "no P2 lock" else state._replace(writers=_set(state.writers, slot, i))
            picked = me._replace(at="P3 check", slot=slot)
            yield self._begin(to, i, picked) if flaw == "P3 before P1" else _put(to, i, picked)
        if busy:
            yield self._leave(state, i)

    def _begin(self, state: State, i: int, me: Publisher) -> State:
        """A stamp that is nowhere in this state is as good as one that never was."""
        known = {state.word.stamp, *(stamp for both in state.slots for stamp in both)}
        known |= {p.stamp for p in state.publishers}
        known |= {stamp for r in state.readers for stamp in (r.loaded.stamp, r.used.stamp, r.half)}
        stamp = next(n for n in range(1, 100) if n not in known)
        return _put(state, i, me._replace(at="P4 stage", half=0, stamp=stamp))

    def _leave(self, state: State, i: int) -> State:
        """Lets go of the publisher's lock; the next pass begins."""
        held = state.publisher_lock == i
        return _put(state._replace(publisher_lock=FREE if held else state.publisher_lock), i, self.idle)

    def kill_publisher(self, state: State, i: int) -> State:
        """The kernel drops its locks; another takes its place."""
        if self.flaw == "locks outlive their process":
            return _put(state, i, self.idle)
        return self._leave(state._replace(writers=tuple(FREE if w == i else w for w in state.writers)), i)

    # --- the reader

    def read(self, state: State, i: int) -> Iterator[tuple[str, State, Property | None]]:
        """The next step of a reader; none where nothing is new."""
        me, at, flaw, swap = state.readers[i], state.readers[i].at, self.flaw, self.modes[i] == "swap"
        slot = me.loaded.slot
        if at == "R1 load":
            if state.word.version not in (0, me.used.version):
                yield at, _seat(state, i, me._replace(at="R2 lease", loaded=state.word)), None
        elif at == "R2 lease":
            if flaw == "no R2 lease":
                yield at, _seat(state, i, me._replace(at="R3 recheck")), None
            elif state.writers[slot] == FREE:
                state = state._replace(leases=_set(state.leases, slot, state.leases[slot] | 1 << i))
                yield at, _seat(state, i, me._replace(at="R3 recheck")), None
            else:
                late = state.word[:2] != me.loaded[:2]
                state = _seat(state, i, me._replace(at="R1 load", loaded=NOTHING))
                yield f"{at}: locked", state, None if late else "the live slot can be leased"
        elif at == "R3 recheck":
            same = {
                "no R3 recheck": True,
                "R3 of the slot alone": state.word.slot == slot,
            }.get(flaw, state.word[:2] == me.loaded[:2])
            if not same:
                yield f"{at}: changed", _seat(_drop(state, i, slot), i, me._replace(at="R1 load", loaded=NOTHING)), None
                return
            early = swap and flaw == "R5 before R4"
            back = me.loaded.version <= me.used.version
            to = me._replace(at="R5 release" if early else "R4 use", old=me.used.slot if early else NONE)
            yield at, _seat(state, i, to), "versions grow" if back else None
        elif at == "R4 use" and swap:
            old, after = (NONE, "R1 load") if flaw == "R5 before R4" else (me.used.slot, "R5 release")
            yield at, _seat(state, i, Reader(after, NOTHING, me.loaded, old)), None
        elif at == "R4 use":
            half = state.slots[slot][1 if me.half else 0]
            if not me.half:
                yield at, _seat(state, i, me._replace(half=half)), None
                return
            used = Word(me.loaded.version, NONE, 0)  # the weights are the policy's own from here on
            to = Reader("R5 release", NOTHING, used, slot)
            yield at, _seat(state, i, to), _judge((me.half, half), me.loaded)
        elif at == "R5 release":
            to = me._replace(at="R4 use" if me.loaded.version else "R1 load", old=NONE)
            yield at, _seat(_drop(state, i, me.old), i, to), None

    def kill_reader(self, state: State, i: int) -> State:
        """The kernel drops its leases; another takes its place."""
        if self.flaw != "locks outlive their process":
            state = state._replace(leases=tuple(held & ~(1 << i) for held in state.leases))
        return _seat(state, i, Reader())

    # --- what must hold

    def broken(self, state: State) -> Property | None:
        """What a state by itself breaks: a policy that points into a slot must find its version there."""
        for mode, reader in zip(self.modes, state.readers, strict=True):
            if mode == "swap" and reader.used.version:
                wrong = _judge(state.slots[reader.used.slot], reader.used)
                if wrong:
                    return wrong
        return None

    def stuck(self, state: State, known: dict[object, bool]) -> bool:
        """Whether a new publisher cannot publish once all others are dead, or all readers stand still."""
        for i in range(self.publishers):
            state = self.kill_publisher(state, i)
        dead = state
        for i in range(len(self.modes)):
            dead = self.kill_reader(dead, i)
        return self._cannot(dead, known, spare=True) or self._cannot(state, known, spare=False)

    def _cannot(self, state: State, known: dict[object, bool], spare: bool) -> bool:
        key = (state.word, state.publisher_lock, state.writers, state.leases, spare)
        if key not in known:
            spare = spare or any(not state.leases[n] for n in range(SLOTS) if n != state.word.slot)
            version, done = state.word.version, not spare
            for _ in range(3 * len(STEPS)):
                way = next(self.publish(state, 0), None)
                if way is None or done:
                    break
                state = way[1]
                done = state.word.version == version + 1 and state.publishers[0] == self.idle
            known[key] = not done
        return known[key]


class Found(NamedTuple):
    """How many states there are up to the first that is broken; which property, and the shortest way there."""

    states: int
    broken: Property | None = None
    way: tuple[str, ...] = ()


def find(model: Model, properties: frozenset[Property] = ALL) -> Found:
    """Tries every interleaving until one of these properties is broken."""
    start = model.start
    came: dict[State, tuple[State, str] | None] = {start: None}
    queue, known = deque([start]), dict[object, bool]()

    def found(broken: Property, state: State, *last: str) -> Found:
        way = list(last)
        while before := came[state]:
            state, step = before
            way.insert(0, step)
        return Found(len(came), broken, tuple(way))

    while queue:
        state = queue.popleft()
        if "no stuck publisher" in properties and model.stuck(state, known):
            return found("no stuck publisher", state)
        for who, what, after, breaks in model.moves(state):
            step = f"{who}: {what}"
            if breaks in properties and breaks:
                return found(breaks, state, step)
            to = canonical(after)
            if to in came:
                continue
            came[to] = state, step
            breaks = model.broken(to)
            if breaks in properties and breaks:
                return found(breaks, to)
            queue.append(to)
    return Found(len(came))


def canonical(state: State) -> State:
    """The same state for all that differ only in how versions and stamps are numbered, or in bytes that nobody sees."""
    word, _, publisher_lock, _, _, publishers, readers = state
    now = word.version
    order = [] if word.slot == NONE else [word.slot]  # the slots, in the order in which somebody knows them
    for _, loaded, used, old, _ in readers:
        order += [slot for slot in (loaded.slot, used.slot, old) if slot != NONE and slot not in order]
    order += [slot for p in publishers for slot in (p.slot, p.seen) if slot != NONE and slot not in order]
    known = len(order)
    if known < SLOTS:
        rest = [slot for slot in range(SLOTS) if slot not in order]
        order += sorted(rest, key=lambda slot: (state.writers[slot], state.leases[slot])) if len(rest) > 1 else rest
    stamps = {0: 0}
    for slot in order[:known]:
        for stamp in state.slots[slot]:
            stamps.setdefault(stamp, len(stamps))
    for stamp in (word.stamp, *[p.stamp for p in publishers], *[n for r in readers for n in (r[1][2], r[2][2], r[4])]):
        stamps.setdefault(stamp, len(stamps))
    number = {NONE: NONE, **{slot: n for n, slot in enumerate(order)}}

    def renumber(word: Word, ranks: list[int]) -> Word:
        return Word(_rank(word.version, now, ranks), number[word.slot], stamps[word.stamp]) if word.version else word

    seats = []
    for at, loaded, used, old, half in readers:
        ranks = sorted({now, loaded.version, used.version} - {0})
        seats.append(Reader(at, renumber(loaded, ranks), renumber(used, ranks), number[old], stamps[half]))
    posts = []
    for at, slot, half, stamp, version, early in publishers:
        if version and now:
            version = _rank(version, now, sorted({now, version}))
        posts.append(Publisher(at, number[slot], half, stamps[stamp], version, number[early]))
    return State(
        renumber(word, [now]),
        tuple([(stamps[a], stamps[b]) for a, b in [state.slots[slot] for slot in order[:known]]])
        + ((0, 0),) * (SLOTS - known),
        publisher_lock,
        tuple([state.writers[slot] for slot in order]),
        tuple([state.leases[slot] for slot in order]),
        tuple(posts),
        tuple(seats),
    )


_NOW = 9  # what the live version is renumbered to


def _rank(version: int, now: int, ranks: list[int]) -> int:
    """Older or newer than the live version, by how many that the same process knows: it compares no others."""
    return _NOW + ranks.index(version) - ranks.index(now)


def _judge(both: tuple[int, int], word: Word) -> Property | None:
    if both[0] != both[1]:
        return "no torn read"
    return None if both[0] == word.stamp else "the version's own weights"


def _uses(reader: Reader, slot: int) -> bool:
    return reader.used.slot == slot or (reader.at in ("R4 use", "R5 release") and reader.loaded.slot == slot)


def _drop(state: State, i: int, slot: int) -> State:
    """A reader lets go of a lease."""
    return state if slot == NONE else state._replace(leases=_set(state.leases, slot, state.leases[slot] & ~(1 << i)))


def _put(state: State, i: int, publisher: Publisher) -> State:
    return state._replace(publishers=_set(state.publishers, i, publisher))


def _seat(state: State, i: int, reader: Reader) -> State:
    return state._replace(readers=_set(state.readers, i, reader))


def _set(items: tuple[T, ...], place: int, item: T) -> tuple[T, ...]:
    return (*items[:place], item, *items[place + 1 :])
