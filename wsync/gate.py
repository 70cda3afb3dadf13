"""A gate: the user's look at staged weights, the last thing before they go live.

A command (anything that is not ``package.module:function``) runs through ``/bin/sh`` in the spec's directory and finds
in its environment ``WSYNC_STAGED`` (the slot, a plain safetensors file), ``WSYNC_NAME``, ``WSYNC_STEP`` (empty where
there is none) and ``WSYNC_CHECKPOINT``. Status 0 accepts, 75 asks for the same again later, anything else rejects.

A function is called with the policy, in eval mode, with the staged weights in it. Whatever it returns accepts, but for
``False``, which is a check that failed and whose author forgot to raise; ``RetryLater`` asks for the same again later,
any other exception rejects. It runs in a process of its own, so that a watch never imports torch and outlives whatever
that code does; the weights are copies, so that nothing it does reaches the slot.

One that takes too long, or is ended by a signal, has rejected: a gate that hangs must not hold up the next checkpoint
for ever. While it runs the publisher's lock is held, and what was live stays live; nobody can lease the slot.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from . import child, command
from .errors import GateRejected, RetryLater, SpecError, WsyncError
from .hooks import environment
from .publisher import Staged
from .spec import Spec, origin

if TYPE_CHECKING:
    import torch

_ACCEPTED, _RETRY = 0, 75
_LONGEST = 4000  # characters of an exception's text


def ask(spec: Spec, staged: Staged, stop: threading.Event | None = None, state_dir: Path | None = None) -> None:
    """Returns when the gate accepts.

    Args:
        state_dir: where history and pins are kept, for a wsync that the gate calls.
        stop: ends the gate early, once set; the checkpoint may then be tried again.

    Raises:
        GateRejected: it does not accept.
        RetryLater: it asks for the same again later, or was ended by ``stop``.
        SpecError: its function, or the policy for it, cannot be imported or built.
        WsyncError: it could not be started, or torch cannot be loaded for it.
    """
    asks = _ask_function if spec.hooks.gate_is_function else _ask_command
    place, about = staged.path, {"name": staged.name, "step": staged.step, "checkpoint": staged.checkpoint}
    variables = environment(state_dir, staged=place, runtime_dir=place.parent.parent, **about)
    verdict, why = asks(spec, staged, stop, variables)
    if verdict == "accept":
        return
    what = staged.checkpoint or "the weights from memory"
    told = f"{what}: the gate {spec.hooks.gate!r} {why}" + ("" if why.endswith("\n") else ". ")
    if verdict == "retry":
        raise RetryLater(f"{told}It is asked again at the next pass.")
    raise GateRejected(f"{told}The checkpoint stays rejected until it changes.")


def _ask_command(
    spec: Spec, staged: Staged, stop: threading.Event | None, variables: Mapping[str, str]
) -> tuple[str, str]:
    ended = command.run(
        ["/bin/sh", "-c", spec.hooks.gate],
        timeout=spec.hooks.gate_timeout,
        environment=variables,
        directory=spec.directory,
        stop=stop,
    )
    if ended.code == _ACCEPTED:
        return "accept", ""
    return "retry" if ended.code == _RETRY or _was_stopped(ended, stop) else "reject", str(ended)


def _ask_function(
    spec: Spec, staged: Staged, stop: threading.Event | None, variables: Mapping[str, str]
) -> tuple[str, str]:
    def run(words: list[str], stdin: int) -> command.Ended:
        return command.run(words, timeout=spec.hooks.gate_timeout, environment=variables, stop=stop, stdin=stdin)

    answer: tuple[str, str] | WsyncError | None
    answer, ended = child.ask(_judge, spec, staged, run=run)
    if isinstance(answer, WsyncError):
        raise answer
    if answer is None:
        why = str(ended) if ended.code != 0 else f"ended without a verdict{ended.said}"
        return ("retry", why) if _was_stopped(ended, stop) else ("reject", why)
    return answer


def _was_stopped(ended: command.Ended, stop: threading.Event | None) -> bool:
    return ended.code is None and stop is not None and stop.is_set()


# --- in the child


def _judge(spec: Spec, staged: Staged) -> tuple[str, str]:
    function = spec.find(spec.hooks.gate)
    policy = spec.build()
    if not callable(function):
        raise SpecError(f"the gate {spec.hooks.gate} is a {type(function).__name__}. Name a function of the policy.")
    load(policy.eval(), staged.path)
    try:
        result = function(policy)
    except RetryLater as exc:
        return "retry", f"wants it later: {_bounded(str(exc))}"
    except (Exception, SystemExit) as exc:
        return "reject", f"raised {_bounded(origin(exc))}"
    if result is False:
        return "reject", "returned False"
    return "accept", ""


def load(policy: torch.nn.Module, path: Path) -> None:
    """Copies the weights of a slot into the policy's own tensors, all of them.

    Raises:
        SpecError: they are not the policy's.
    """
    import torch
    from safetensors.torch import load_file

    from .layout import layout_of, named_tensors

    weights, targets = load_file(path), dict(named_tensors(policy))
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()}
    expected = {e.name: (targets[e.name].dtype, targets[e.name].shape) for e in layout_of(policy).tensors}
    if found != expected:
        raise SpecError(
            "the policy that was built for the gate has other tensors than the segment. It must be the same each time "
            "that it is built; where it changed since, `wsync rm` its segment."
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            targets[name].copy_(tensor)


def _bounded(text: str) -> str:
    """An exception's text as ``command`` gives output: short, and harmless to a terminal."""
    return command.plain(text[:_LONGEST].encode("utf-8", "replace"))
