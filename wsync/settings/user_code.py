"""Loads the user's code: the policy that a spec names, and the function of a gate.

Only this module imports what a spec names, and only when it is needed. What the user's code prints goes to stderr,
because stdout carries the output of wsync.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from ..errors import SpecError, UsageError, WsyncError
from ..layout.layout import Layout, layout_of_tensors, named_tensors
from ..layout.module import check_extra_state, followed
from ..layout.tensor_subclasses import check_takes_copies
from .spec import Spec

if TYPE_CHECKING:
    import torch


def read_layout(spec: Spec) -> Layout:
    """Returns the policy's layout, read in this process.

    The module is built on the meta device if it can be, which takes no memory.

    Raises:
        SpecError: the policy cannot be imported or built, is not an ``nn.Module``, or has state outside its tensors.
        UsageError: ``weights.own`` matches nothing, all, or one name of a tied tensor.
        CopyRefused: a tensor's class refuses copies, so no reader could take a version.
        WsyncError: torch cannot be loaded.
    """
    with _running(spec):
        import torch

        target = _import(spec, spec.policy)  # not on the meta device: tensors that are made at import are real
        try:
            with torch.device("meta"):
                return _layout_of(_make(spec, target), spec)
        except UsageError:
            return _layout_of(_make(spec, target), spec)


def _layout_of(policy: torch.nn.Module, spec: Spec) -> Layout:
    check_extra_state(policy, spec.weights.extra_state)
    tensors = followed(policy, spec.weights.own, "weights.own")
    layout = layout_of_tensors(tensors)  # first, because its error says what a lazy module needs
    check_takes_copies(tensors)
    return layout


def read_built(spec: Spec, names: Collection[str]) -> dict[str, bytes]:
    """Builds the policy in this process, and returns the bytes of these tensors.

    Raises:
        SpecError: the policy cannot be imported or built, or lacks one of the tensors.
        WsyncError: torch cannot be loaded.
    """
    import torch

    tensors = dict(named_tensors(build(spec)))
    if gone := sorted(set(names) - tensors.keys()):
        raise SpecError(
            f"{spec.policy} has no {gone[0]!r} when it is built again. Make it build the same policy each time."
        )
    return {
        name: tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name in names
    }


def build(spec: Spec) -> torch.nn.Module:
    """Builds the policy.

    Raises:
        SpecError: the policy cannot be imported or built, or is not an ``nn.Module``.
        WsyncError: torch cannot be loaded.
    """
    with _running(spec):
        return _make(spec, _import(spec, spec.policy))


def _make(spec: Spec, target: Any) -> torch.nn.Module:
    import torch

    if isinstance(target, torch.nn.Module):
        if spec.policy_kwargs:
            raise SpecError(
                f"{spec.policy} is already a module, so policy_kwargs would do nothing. Name its class or a "
                "function that makes it, or remove [policy_kwargs]."
            )
        return target
    if not callable(target):
        raise SpecError(
            f"{spec.policy} is a {type(target).__name__}, not a policy. Name an nn.Module, its class, or a "
            "function that returns one."
        )
    try:
        policy = target(**spec.policy_kwargs)
    except (Exception, SystemExit) as exc:
        raise SpecError(
            f"{spec.policy} failed when it was called with {dict(spec.policy_kwargs)}: {where_raised(exc)}. Correct "
            "it, or its [policy_kwargs]."
        ) from exc
    if not isinstance(policy, torch.nn.Module):
        raise SpecError(
            f"{spec.policy} returned a {type(policy).__name__}, not an nn.Module. Return the policy itself."
        )
    return policy


def find(spec: Spec, text: str) -> Any:
    """Imports what an import string names, from the spec's directory or the installed packages.

    Raises:
        SpecError: it cannot be imported.
        WsyncError: torch cannot be loaded.
    """
    with _running(spec):
        return _import(spec, text)


def _import(spec: Spec, text: str) -> Any:
    module_name, _, attributes = text.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as exc:
        missing = exc.name if isinstance(exc, ModuleNotFoundError) else None
        if missing and (module_name == missing or module_name.startswith(f"{missing}.")):
            raise SpecError(
                f"there is no module {module_name!r} (no {missing!r}) in {spec.directory} or among the "
                "installed packages. Check the spelling, or run wsync from the directory that holds it."
            ) from None
        raise SpecError(
            f"module {module_name!r} exists, but its own import failed: {where_raised(exc)}. Correct it, or install "
            "what it needs."
        ) from exc
    for attribute in attributes.split("."):
        try:
            target = getattr(target, attribute)
        except (Exception, SystemExit) as exc:
            if not isinstance(exc, AttributeError):
                raise SpecError(f"{text} exists, but looking it up failed: {where_raised(exc)}. Correct it.") from exc
            near = difflib.get_close_matches(attribute, dir(target), 1)
            raise SpecError(
                f"module {module_name!r} has no attribute {attributes!r}. "
                + (f"Did you mean {near[0]!r}?" if near else "Check the spelling after the colon.")
            ) from None
    return target


@contextmanager
def _running(spec: Spec) -> Iterator[None]:
    """Makes the spec's directory importable, and sends what the user's code prints to stderr.

    Raises:
        WsyncError: torch cannot be loaded; without this check the policy would be blamed for that.
    """
    try:
        import torch  # noqa: F401
    except (ImportError, OSError, MemoryError) as exc:
        raise WsyncError(
            f"torch cannot be loaded ({exc or type(exc).__name__}). Where this process's memory is limited "
            "(`ulimit -v`; LimitAS= of its systemd unit), raise the limit; else install torch again."
        ) from exc
    directory = str(spec.directory)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    with redirect_stdout(sys.stderr):
        yield


def where_raised(exc: BaseException) -> str:
    """The error and the user's line that it came from."""
    import traceback

    frames = traceback.extract_tb(exc.__traceback__)
    own = [f for f in frames if not f.filename.startswith("<frozen") and f.filename != __file__]
    last = next((f for f in reversed(own) if f"{os.sep}importlib{os.sep}" not in f.filename), None)
    where = f" ({last.filename}:{last.lineno})" if last else ""
    return f"{type(exc).__name__}: {exc}{where}"
