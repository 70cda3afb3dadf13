"""Attaches a policy: finds its device, chooses how it takes versions, and waits for the first one.

``swap`` is for policies that do not write to their own weights. If it can be seen beforehand that a policy may write,
``swap`` is refused and ``auto`` copies. Otherwise the write goes to private pages, harms nobody else, and is lost with
the next version; a warning says so once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import SpecError, SwapRefused, UsageError
from ..layout.layout import Layout, layout_of_tensors, named_modules, named_tensors
from ..layout.module import check_extra_state, check_module, followed
from ..layout.tensor_subclasses import check_takes_copies
from ..segment.segment import Segment
from ..system.memory import trim
from .first_version import Opening
from .reader import Mode, PlainReader, Reader
from .reader_options import OnVersion, Terms
from .swap import own_uses
from .tensors import Attached, Tensors, lie_together, mapped, shared

if TYPE_CHECKING:
    from .gpu.cuda import Cuda

Staging = Literal["device", "none"]


def attach(
    policy: torch.nn.Module,
    name: str,
    *,
    timeout: float | None = None,
    mode: Mode = "auto",
    staging: Staging = "device",
    extra_state: Literal["refuse", "ignore"] = "refuse",
    exclude: Iterable[str] = (),
    on_version: OnVersion | None = None,
    on_version_error: Literal["log", "raise"] = "log",
    max_age: float | None = None,
    runtime_dir: str | os.PathLike[str] | None = None,
) -> Reader:
    """Attaches a policy to a segment; returns once the policy has its first version.

    If the segment does not exist yet, makes it with the policy's layout, and waits for a publisher. After five seconds
    without one, a warning names the segments that exist. If no version comes, removes the segment that it made.

    An alias of a tensor, or a ``state_dict()``, that you took earlier stays as it was in mode ``"swap"``. In mode
    ``"copy"`` it shares the policy's own memory, which each version overwrites: take a ``clone()``.

    Args:
        policy: an ``nn.Module`` or ``TensorDictModule`` whose parameters and persistent buffers are kept in step.
        name: name of the segment.
        timeout: seconds to wait for the first version; None waits for ever.
        mode: ``"swap"`` points the policy's tensors at the shared memory (CPU, inference). ``"copy"`` copies each
            version into the policy's own tensors, which keep their addresses (training mode, CUDA graphs, TorchScript,
            any device). ``"auto"`` swaps if that is safe, and else copies. It also copies if, when the policy is
            attached, other tensors share its memory (such as a view of its own weights, or a ``state_dict()``) or other
            processes do (``share_memory()``, a queue of ``torch.multiprocessing``, a mapped file): swap would leave
            them with old weights. On a GPU ``"auto"`` copies; ``"swap"`` points the tensors at two buffers there by
            turns, which does not work with CUDA graphs, ``torch.compile(mode="reduce-overhead")`` and other code that
            remembers addresses. With ``"swap"``, call ``torch.compile`` after ``attach``: compiled code also remembers
            how tensors are aligned.
        staging: on a GPU, ``"device"`` copies each version into a second buffer there while the policy runs, which
            takes GPU memory for one more set of weights. ``"none"`` (only with ``mode="copy"``) saves that memory, and
            ``refresh()`` waits for the transfer, as it always does for a policy that is split over devices.
        extra_state: what to do if the policy's ``state_dict()`` has entries that are neither parameters nor persistent
            buffers (``get_extra_state``, packed quantised weights), which no version changes: raise SpecError, or, with
            ``"ignore"``, log their names.
        exclude: globs of names of tensors that the policy keeps for itself, such as exploration noise: no version
            changes them, and the segment need not have them (``[weights] own`` in a spec). If set, the segment is not
            made here; a publisher must make it.
        on_version: called as ``on_version(version, step, extras)`` after the policy takes a version, the first one
            included, in the thread that takes it, while no other thread is inside ``using()``. It may run the policy; a
            ``refresh()`` in it returns False. ``extras`` is ``reader.extras``: the files that travel with the weights.
        on_version_error: ``"log"`` logs what ``on_version`` raises; ``"raise"`` also raises it from the call that took
            the version. The policy has that version in either case.
        max_age: seconds. While the policy's version was published longer ago than this, each ``refresh()`` raises
            Stale, after it has taken a newer version if there is one; ``attach`` takes a first version of any age. The
            age is measured by the wall clock until the version is taken, and then by one that never jumps and that
            goes on while the machine is suspended.
        runtime_dir: where segments live; default ``WSYNC_RUNTIME_DIR``, else ``/dev/shm/wsync-<uid>``.

    Raises:
        LayoutDiffers: the segment holds another architecture; the text has a table of the differences.
        SwapRefused: ``mode="swap"``, and the policy may write to its own tensors, or other processes share them.
        AttachTimeout: no version came in time.
        SegmentError: the segment can be neither opened nor made.
        OutOfDeviceMemory: the GPU has no room for the buffers.
        UsageError: an argument is invalid, or a tensor of the policy has no memory that can be written to.
        CopyRefused: a tensor's class refuses copies.
        SpecError: the policy's own code fails, its weights are folded into compiled code, or it has extra state.
    """
    check_module(policy, "attach")
    _check_arguments(mode, staging)
    _check_not_frozen(policy)
    terms = Terms(on_version, on_version_error, max_age)
    check_extra_state(policy, extra_state)
    globs = _globs(exclude)
    with Opening(name, runtime_dir, timeout) as opening:
        reader = _make(policy, opening, mode, staging, globs, terms)
        try:
            opening.wait(reader)
        except BaseException:  # even an interrupt: ``close`` gives the policy tensors of its own
            reader.close()
            raise
    if reader.mode == "swap":
        trim()  # frees the policy's own weights: all readers on a machine share one copy
    return reader


def _check_arguments(mode: str, staging: str) -> None:
    """Raises UsageError for an argument of ``attach`` that cannot be used."""
    if mode not in ("auto", "swap", "copy"):
        raise UsageError(f'mode={mode!r} is unknown. Use "auto", "swap" or "copy".')
    if staging not in ("device", "none") or (staging == "none" and mode == "swap"):
        raise UsageError(
            f'staging={staging!r} with mode={mode!r}: staging is "device", or "none" with mode="copy". Use one of them.'
        )


def _globs(exclude: object) -> list[str]:
    """Returns what ``exclude`` names as a list; raises UsageError if that is not all strings."""
    globs: list[Any] = list(exclude) if isinstance(exclude, Iterable) and not isinstance(exclude, str) else [exclude]
    if not all(isinstance(glob, str) for glob in globs):
        raise UsageError(f'exclude={exclude!r} is not a list of globs. Give strings, such as ["log_std"].')
    return globs


def _check_not_frozen(policy: torch.nn.Module) -> None:
    """Raises SpecError if a module is compiled with freezing, which folds its weights into the code."""
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


def _make(
    policy: torch.nn.Module, opening: Opening, mode: Mode, staging: Staging, exclude: Sequence[str], terms: Terms
) -> Reader:
    tensors = followed(policy, exclude, "exclude")
    layout = layout_of_tensors(tensors)
    device = _device_of(policy)
    _check_memory(tensors)
    hindrance = None if mode == "copy" else _hindrance(policy, tensors, device)
    if mode == "swap" and hindrance:
        raise SwapRefused(
            f"{hindrance}, and swap points it at memory that each version replaces, so that its own writes are lost "
            'with the next version. Use mode="copy", or mode="auto", which swaps only if that is safe.'
        )
    others = [] if mode == "copy" or hindrance else shared(tensors)
    if mode == "swap" and others:
        raise SwapRefused(
            f"{others[0]} lies in memory that other processes share (share_memory(), a torch.multiprocessing queue, a "
            'mapped file), and swap would leave the others with their old weights. Use mode="copy", which writes to '
            'that memory, or mode="auto".'
        )
    if device is None:
        copies = mode == "copy" or bool(hindrance or others)
        copies = copies or (mode == "auto" and lie_together(tensors, layout, own_uses))
        if copies:
            _check_writable(tensors)
        segment = opening.open(layout, exclude)
        return PlainReader(_attached(policy, layout, segment, exclude), segment, "copy" if copies else "swap", terms)
    from .gpu.reader import DeviceReader
    from .gpu.transfer import DeviceWeights, check_contiguous

    chosen: Literal["swap", "copy"] = "swap" if mode == "swap" else "copy"
    if staging == "none":
        check_contiguous(policy)
    segment = opening.open(layout, exclude)
    attached = _attached(policy, layout, segment, exclude)
    weights = DeviceWeights(attached, device, chosen, staged=staging == "device")
    return DeviceReader(attached, segment, chosen, weights, terms)


def _attached(policy: torch.nn.Module, layout: Layout, segment: Segment, exclude: Sequence[str]) -> Attached:
    names = layout.names_in(segment.layout.without(exclude))
    assert names is not None  # otherwise it would not have been opened
    return Attached(policy, segment.layout, names)


def _check_memory(tensors: Tensors) -> None:
    """Raises UsageError if no version can be written into a tensor."""
    for name, tensor in tensors:
        if tensor.is_meta:
            raise UsageError(
                f"{name} is on the meta device, which holds no weights. Give the policy memory with "
                'policy.to_empty(device="cpu"), then attach: the first version fills it.'
            )
        if tensor._is_zerotensor():
            raise UsageError(
                f"{name} is a tensor of zeros without memory, as derivatives are. Give the policy a tensor of its own "
                "(torch.zeros), then attach."
            )
    check_takes_copies(tensors)


def _check_writable(tensors: Tensors) -> None:
    """Raises UsageError if a copy into a tensor would end this process."""
    for name, how in mapped(tensors).items():
        if how.startswith("r-"):
            raise UsageError(
                f"{name} lies in read-only memory, such as a mapped file. Give the policy "
                "memory of its own (.clone()), then attach."
            )


def _device_of(policy: torch.nn.Module) -> Cuda | None:
    """The CUDA device that holds all of a policy's tensors; None if there is no such device."""
    places = {tensor.device for _, tensor in named_tensors(policy)}
    if {place.type for place in places} != {"cuda"} or len(places) > 1:
        return None
    from .gpu.cuda import Cuda

    return Cuda(*places)


def _hindrance(policy: torch.nn.Module, tensors: list[tuple[str, torch.Tensor]], device: Cuda | None) -> str | None:
    """Why the policy's tensors must not be pointed at a slot; None if they may."""
    followed = {id(tensor) for _, tensor in tensors}
    for name, module in named_modules(policy):
        where = f"{name.rstrip('.') or 'the policy'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{where} is TorchScript, whose code may write to its tensors"
        if module.training:
            return f"{where} is in training mode (policy.eval() leaves it)"
        own = [name for name, buffer in module._buffers.items() if id(buffer) in followed]
        kinds = type(module).__mro__[:-1]  # all of them: torch.nn parametrizes by making a subclass
        if own and not all(kind.__module__.startswith("torch.nn.") for kind in kinds):
            return f"{where} has the buffer {own[0]!r}, which its own code may write in place"
    split = len({tensor.device for _, tensor in tensors}) > 1
    for name, tensor in tensors:
        if tensor.device.type != "cpu" and device is None:
            return f"{name} is on {tensor.device}" + (" and others are not" if split else "")
        if tensor.is_inference():
            return f"{name} was made in inference mode"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous in memory"
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return f"{name} is a {type(tensor).__name__}, not a plain tensor"
    return None
