"""The tensors of a module that are kept in step: all named ones except those that each process keeps for itself.

Versions do not contain those, such as exploration noise. Nor do they contain the other entries of a ``state_dict()``,
from ``get_extra_state`` and from modules that pack their weights, such as quantised ones: these stay as they are while
versions change.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..errors import SpecError, UsageError
from .layout import named_tensors, tied_key, unreadable
from .tensor_names import bare, matching

if TYPE_CHECKING:
    import torch


def followed(module: torch.nn.Module, own: Sequence[str], setting: str) -> list[tuple[str, torch.Tensor]]:
    """The named tensors of a policy that are kept in step.

    Args:
        own: globs of the names of the other tensors.
        setting: the name of the setting that has these globs, for messages.

    Raises:
        UsageError: a glob matches nothing, or matches only some names of a tied tensor; or no tensor is left.
        SpecError: the module's own code failed.
    """
    tensors = list(named_tensors(module))
    names = [name for name, _ in tensors]
    out = matching(names, own)
    for glob in own:
        if not matching(names, [glob]):
            raise UsageError(f"{setting}: {glob!r} matches no parameter and no persistent buffer. Correct the glob.")
    left = [(name, tensor) for name, tensor in tensors if name not in out]
    names_left = {tied_key(tensor): name for name, tensor in left}
    for name, tensor in tensors:
        if name in out and (tied := names_left.get(tied_key(tensor))):
            raise UsageError(f"{setting} names {name}, which is tied to {tied}. Name both, or neither.")
    if out and not left:
        raise UsageError(f"{setting} names every tensor of the policy, so that nothing is kept in step. Name fewer.")
    return left


def check_module(policy: object, caller: str) -> None:
    """Raises UsageError if a policy is not an ``nn.Module``; imports no torch."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(policy, torch.nn.Module):
        raise UsageError(
            f"{caller} takes an nn.Module, not an object of type {type(policy).__name__}. Give the policy itself."
        )


def check_unmerged(modules: Iterable[torch.nn.Module]) -> None:
    """Refuses modules whose adapters PEFT has merged into their weights, which no tensor shows.

    A version would replace those weights, and the modules would go on as if the adapters were still in them.

    Raises:
        UsageError: a module has merged adapters.
    """
    for each in modules:
        if getattr(each, "merged_adapters", None):
            raise UsageError(
                f"adapters are merged into the weights of the policy ({type(each).__name__}), and no tensor says so. "
                "Call unmerge_adapter() first, or take the plain model that merge_and_unload() returns."
            )


def check_extra_state(module: torch.nn.Module, extra_state: str) -> None:
    """Checks whether a policy's ``state_dict()`` has entries that are neither parameters nor persistent buffers.

    Args:
        extra_state: what to do about them: ``"refuse"``, or ``"ignore"``, which logs their names.

    Raises:
        SpecError: it has some, and ``extra_state`` is not ``"ignore"``; or the module's own code failed.
    """
    import torch

    if extra_state not in ("refuse", "ignore"):
        raise SpecError(f'extra_state={extra_state!r} is neither "refuse" nor "ignore". Use one of them.')
    tensors = dict(named_tensors(module))
    known, objects = set(map(bare, tensors)), set(map(id, tensors.values()))
    try:
        state = dict(module.state_dict(keep_vars=True))
    except Exception as exc:
        raise unreadable(module, exc) from exc
    others = [
        f"{name} ({type(value).__name__})"
        for name, value in state.items()
        if not (bare(name) in known or id(value) in objects or value is None)
        and not (isinstance(value, torch.Tensor) and not value.numel())
    ]
    if not others:
        return
    held = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    what = f"the policy's state_dict() holds entries that are neither parameters nor persistent buffers: {held}"
    if extra_state == "refuse":
        raise SpecError(
            f"{what}. They would stay as they are while versions change. Keep them in buffers, or set "
            'extra_state="ignore" if they need not change.'
        )
    import logging

    logging.getLogger("wsync").warning("%s. They stay as they are while versions change.", what)
