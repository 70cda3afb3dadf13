"""Finds compiled code that holds weights as constants, where this can be seen: it would use them for ever."""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..errors import SpecError
from ..layout.layout import named_modules


def check_not_frozen(policy: torch.nn.Module) -> None:
    """Raises SpecError where a module is compiled with freezing, which folds its weights into the code."""
    inductor: Any = sys.modules.get("torch._inductor.config")
    for name, module in named_modules(policy):
        compiled = "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        if not compiled:
            continue
        settings = getattr(getattr(module, "dynamo_ctx", None), "compiler_config", None)
        own = settings.get("freezing") if isinstance(settings, dict) else getattr(settings, "freezing", None)
        if own or (own is None and inductor is not None and inductor.freezing):
            raise SpecError(
                f"{name.rstrip('.') or 'the policy'} ({type(module).__name__}) is compiled with freezing "
                "(torch._inductor.config.freezing), which folds the weights into the code: it would keep the weights "
                "that it was compiled with. Compile it without freezing, then attach."
            )
