"""Asks a separate process for the layout of a spec's policy, and for the values that the policy is built with.

This process loads neither torch nor the user's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import SpecError, WsyncError
from ..fitting.fit import Built
from ..layout.layout import Layout
from .spec import Spec


def layout_of_spec(spec: Spec) -> Layout:
    """Returns the policy's layout; raises what ``user_code.read_layout`` and ``ask_policy`` raise."""
    from .user_code import read_layout

    layout: Layout = ask_policy(spec, read_layout)
    return layout


def built_by(spec: Spec) -> Built:
    """Returns a function that takes names of tensors and returns their bytes in a newly built policy.

    It remembers the last answer until the spec's fingerprint changes. It raises what ``user_code.read_built`` and
    ``ask_policy`` raise.
    """
    known: dict[tuple[str, frozenset[str]], Mapping[str, bytes]] = {}

    def built(names: Iterable[str]) -> Mapping[str, bytes]:
        from .user_code import read_built

        wanted = frozenset(names)
        if (key := (spec.fingerprint(), wanted)) not in known:
            known.clear()
            known[key] = ask_policy(spec, read_built, wanted)
        return known[key]

    return built


def ask_policy(spec: Spec, question: Callable[..., Any], *more: Any) -> Any:
    """Calls a function with the spec in a separate process; returns its answer, or raises its WsyncError.

    Raises:
        SpecError: the process ended by itself without an answer.
        WsyncError: a signal ended the process.
    """
    import subprocess

    from ..system import child

    answer, ended = child.ask(
        question, spec, *more, run=lambda words, link: subprocess.run(words, stdin=link, stdout=2, check=False)
    )
    if isinstance(answer, WsyncError):
        raise answer
    if answer is None:
        kind = SpecError if ended.returncode >= 0 else WsyncError  # a signal: ended from outside, or for lack of memory
        raise kind(
            f"the process that read the layout of {spec.policy} ended with status {ended.returncode} and no "
            "answer. Import the policy in a Python session to see why; where memory is limited (`ulimit -v`), "
            "raise the limit."
        )
    return answer
