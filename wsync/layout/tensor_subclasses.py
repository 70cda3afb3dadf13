"""Copies into tensors whose class runs code of its own, which may refuse them: quantised, packed or sharded weights.

A copy into a plain tensor of the same shape cannot fail. A copy into any other tensor is tried before a policy is
attached or its weights are published; if a copy fails later, the tensors already written are restored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..errors import CopyRefused, HalfWritten, UsageError

if TYPE_CHECKING:
    import torch


def runs_code(tensor: torch.Tensor) -> bool:
    """Whether a copy into a tensor, or out of it, runs code of the tensor's own class."""
    import torch

    kind = type(tensor)
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    return (
        kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        or kind.copy_ is not torch.Tensor.copy_
        or function not in (torch.Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]
    )


def check_takes_copies(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Tries to copy each tensor's own values, in a plain tensor, into a clone of it; the tensors keep their values.

    Raises:
        UsageError: two elements of a tensor share one place in memory.
        CopyRefused: a tensor's class refuses the copy.
    """
    import torch

    for name, tensor in tensors:
        if any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise UsageError(
                f"{name} is an expanded tensor: several of its elements share one place in memory, which cannot hold "
                "different values. Give each element its own memory (.contiguous()) in the policy."
            )
        if not runs_code(tensor):
            continue
        plain = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        try:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                trial = tensor.detach().clone()
                try:
                    plain.copy_(tensor)
                    trial = trial if type(trial) is type(tensor) else tensor  # else it gets its own values
                except Exception:  # its values cannot be read: zeros do for a trial
                    plain.zero_()
                trial.copy_(plain)
        except Exception as exc:
            raise CopyRefused(
                f"{name} is of the class {type(tensor).__name__}, which refuses a copy of plain weights "
                f"({_said(exc)}). Nothing was written. Keep a policy of plain tensors in step, and quantise, pack or "
                "shard a copy of it after each version."
            ) from exc


def check_copy(name: str, target: torch.Tensor, source: torch.Tensor) -> None:
    """Tries to copy a source into a clone of its target, if the class of either runs code of its own.

    Raises:
        CopyRefused: a class refuses the copy.
    """
    import torch

    if not (runs_code(target) or runs_code(source)):
        return
    try:
        with torch.no_grad():
            target.detach().clone().copy_(source)
    except Exception as exc:
        raise CopyRefused(
            f"{name}: a {type(source).__name__} cannot be copied into a {type(target).__name__} "
            f"({_said(exc)}). Nothing was written. Give plain tensors, as dequantize() or full_tensor() return them, "
            "to a policy of plain tensors."
        ) from exc


def copy_each(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copies into tensors whose class runs code of its own: all of them, or none.

    Raises:
        CopyRefused: one refused its copy; all tensors have the values that they had.
        HalfWritten: one refused its copy, and those already written could not be restored.
    """
    before = [target.detach().clone() for target in targets]
    for at, (target, source) in enumerate(zip(targets, sources, strict=True)):
        try:
            target.copy_(source)
        except Exception as exc:
            try:
                for written, old in zip(targets[:at], before[:at], strict=True):
                    written.copy_(old)
                _write_back(target, before[at])
            except Exception:
                raise half_written(f"a {type(target).__name__} refused its copy", exc) from exc
            raise CopyRefused(
                f"a tensor of the class {type(target).__name__} refused its copy ({_said(exc)}). The policy keeps the "
                "weights that it had. See which copies this class allows."
            ) from exc


def half_written(what: str, exc: Exception) -> HalfWritten:
    return HalfWritten(
        f"{what} ({_said(exc)}), and what was written before it could not be written back: the policy has weights of "
        "two versions. Build it again, and attach it."
    )


def _write_back(target: torch.Tensor, old: torch.Tensor) -> None:
    """Restores the tensor that refused its copy, unless it still has its old values."""
    import torch

    if not torch.equal(target, old):
        target.copy_(old)


def _said(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc!s:.200}"
