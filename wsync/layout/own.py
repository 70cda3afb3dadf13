"""Tensors that each process keeps for itself, such as exploration noise: globs name them, and no version has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError
from .layout import named_tensors, place_of
from .names import matching

if TYPE_CHECKING:
    import torch


def followed(module: torch.nn.Module, own: Sequence[str], setting: str) -> list[tuple[str, torch.Tensor]]:
    """The named tensors of a policy that are kept in step: all but those that a glob names.

    Args:
        own: the globs.
        setting: what they are called where they are set.

    Raises:
        UsageError: a glob matches nothing, or one name of a tensor that has several; nothing is left.
        SpecError: the module's own code failed.
    """
    tensors = list(named_tensors(module))
    names = [name for name, _ in tensors]
    out = matching(names, own)
    for glob in own:
        if not matching(names, [glob]):
            raise UsageError(f"{setting}: {glob!r} matches no parameter and no persistent buffer. Correct the glob.")
    left = [(name, tensor) for name, tensor in tensors if name not in out]
    kept = {place_of(tensor): name for name, tensor in left}
    for name, tensor in tensors:
        if name in out and (tied := kept.get(place_of(tensor))):
            raise UsageError(f"{setting} names {name}, which is tied to {tied}. Name both, or neither.")
    if out and not left:
        raise UsageError(f"{setting} names every tensor of the policy, so that nothing is kept in step. Name fewer.")
    return left
