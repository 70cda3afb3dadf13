"""The layout of a spec's policy, and the values that it is built with, read in a process of its own.

Torch and the user's code stay out of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import SpecError, WsyncError
from ..fitting.fit import Built
from ..layout.layout import Layout
from .spec import Spec


def layout_of_spec(spec: Spec) -> Layout:
    """The policy's layout, read in a process of its own.

    Raises:
        SpecError: the policy cannot be imported or built, or is not an ``nn.Module``.
        WsyncError: that process was ended, or torch cannot be loaded.
    """
    from .user_code import read_layout

    layout: Layout = ask_policy(spec, read_layout)
    return layout


def built_by(spec: Spec) -> Built:
    """Returns a function that gives the bytes of tensors of the policy as it is built, and remembers the last ones.

    Calling it raises what ``layout_of_spec`` raises.
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
    """Runs a function on the policy of a spec, in a process of its own; raises as ``layout_of_spec``."""
    import subprocess

    from ..system import child

    answer, ended = child.ask(
        question, spec, *more, run=lambda words, link: subprocess.run(words, stdin=link, stdout=2, check=False)
    )
    if isinstance(answer, WsyncError):
        raise answer
    if answer is None:
        kind = SpecError if ended.returncode >= 0 else WsyncError  # ended from outside, or for lack of memory
        raise kind(
            f"the process that read the layout of {spec.policy} ended with status {ended.returncode} and no "
            "answer. Import the policy in a Python session to see why; where memory is limited (`ulimit -v`), "
            "raise the limit."
        )
    return answer
