"""Finds entries of a ``state_dict()`` that are neither parameters nor persistent buffers: no segment holds them.

They come from ``get_extra_state``, and from modules that pack their weights, as quantised ones do. They would stay as
they are while versions change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SpecError
from .layout import named_tensors, unreadable
from .names import bare

if TYPE_CHECKING:
    import torch

WAYS = ("refuse", "ignore")


def check_extra_state(module: torch.nn.Module, extra_state: str) -> None:
    """Refuses a policy that has such state, or says once that it has.

    Args:
        extra_state: ``"refuse"``, or ``"ignore"``, which logs the names.

    Raises:
        SpecError: it has, and that is not to be ignored; the module's own code failed; another way was named.
    """
    import torch

    if extra_state not in WAYS:
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
