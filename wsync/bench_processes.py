"""``wsync push`` as a shell or cron meets it: whole processes, from the start of the interpreter to its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

from .bench import Aim, Beside, Case, Result, Rounds, Timed
from .bench_place import BY_HAND, Place

_SLOW = Rounds(2, seconds=6, warm_up=False)  # both have run once before


def push(place: Place, case: Case) -> Iterator[Result]:
    """Nothing to do, beside the imports that any command line with typer and rich pays; then a file that is new.

    The script by hand is ahead by as much as it leaves out. Both find the same file, of which the first pass was made
    already.
    """
    size, tensors = place.settings.size, place.settings.tensors
    place.need(memory=2 * size, shared=4 * size, disk=size)
    spec = place.stand("policy", size, tensors)
    file = place.save("policy/step_1.safetensors", size, tensors)
    ours, theirs = ("-m", "wsync", "push", spec), ("-P", BY_HAND, file.parent, place.runtime / "by-hand")
    place.run(*ours)
    place.run(*theirs)
    typer = Beside("import typer, rich", place.whole("-c", "import typer, rich"), (Aim("<=", 1.6),))
    yield from case.compare(place, place.whole(*ours), typer, rounds=Rounds(10))
    by_hand = Beside("script by hand", place.whole(*theirs), (Aim("<=", 1 / 25),))
    yield from case.compare(place, place.whole(*ours), by_hand, rounds=_SLOW)
    written = count(1)

    def renewed(work: Timed) -> Timed:
        def run() -> float:
            now = next(written)
            os.utime(file, (now, now))  # long ago, so that there is nothing to wait for
            return work()

        return run

    by_hand = Beside("script by hand", renewed(place.whole(*theirs)), (Aim("<=", 1 / 15),))
    new = replace(case, title="wsync push, new checkpoint")
    yield from new.compare(place, renewed(place.whole(*ours)), by_hand, rounds=_SLOW)


CASES = (Case("push", "wsync push, nothing to do", push),)
