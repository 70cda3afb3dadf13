"""The values that a spec's policy has when it is built, read in a process of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..checkpoints.fit import Built
from .layout_process import ask_policy
from .spec import Spec


def built_by(spec: Spec) -> Built:
    """Gives the bytes of tensors of the policy as it is built; asks again only for others, or of another policy.

    Calling it raises what ``layout_of_spec`` raises.
    """
    known: dict[tuple[str, frozenset[str]], Mapping[str, bytes]] = {}

    def built(names: Iterable[str]) -> Mapping[str, bytes]:
        from .user_code import read_built

        wanted = frozenset(names)
        if (key := (spec.fingerprint, wanted)) not in known:
            known.clear()
            known[key] = ask_policy(spec, read_built, wanted)
        return known[key]

    return built
