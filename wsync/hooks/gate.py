"""A gate: the user's own check of staged weights, the last one before they go live.

A command (anything that is not ``package.module:function``) runs through ``/bin/sh`` in the spec's directory. Its
environment has ``WSYNC_HOOK_STAGED`` (a plain safetensors file that nobody can write), ``WSYNC_HOOK_NAME``,
``WSYNC_HOOK_STEP`` (empty if there is none), ``WSYNC_HOOK_CHECKPOINT``, and ``WSYNC_HOOK_EXTRAS`` (a directory with the
extras; empty if there are none). Status 0 accepts, 75 asks to be asked again later, and any other status rejects.

A function gets the policy, in eval mode and with the staged weights; if it has a parameter ``extras``, it also gets the
extras, as bytes by name. Any result accepts but ``False``, which counts as a failed check whose author forgot to raise;
``RetryLater`` asks to be asked again later, and any other exception rejects. The function runs in a separate process,
so that a watch never imports torch and survives whatever the function does.

Both get a copy of the staged slot, because a gate runs as the owner of the slot and could write to it. The copy is in
memory that the kernel seals (memfd_create(2)), is as large as the weights, and is freed after the gate. Then the slot
must still hold what was copied.

A gate that takes too long, or is ended by a signal, rejects: a hanging gate must not hold up the next checkpoint for
ever. While a gate runs, the publisher's lock is held, the live version stays live, and nobody can lease the slot.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GateRejected, RetryLater, SegmentError, SpecError, WsyncError
from ..segment.publishing import Staged
from ..settings.hook_settings import environment
from ..settings.spec import Spec
from ..settings.user_code import build, find, where_raised
from ..system import child
from ..system.access import opened
from . import command

if TYPE_CHECKING:
    import torch

_VERDICTS: dict[int | None, str] = {0: "accept", 75: "retry"}  # by a command's status; any other rejects
_LONGEST = 4000  # characters of an exception's text
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PIECE = 8 << 20  # bytes compared at a time


def ask(spec: Spec, staged: Staged, stop: threading.Event | None = None, state_dir: Path | None = None) -> None:
    """Asks the gate; returns if it accepts.

    Args:
        stop: ends the gate once it is set; the checkpoint may then be tried again.
        state_dir: where history and pins are kept, for a wsync that the gate runs.

    Raises:
        GateRejected: the gate rejects.
        RetryLater: the gate asks to be asked again later, or ``stop`` ended it.
        SpecError: the gate's function, or the policy for it, cannot be imported or built.
        SegmentError: the gate changed the slot.
        WsyncError: the gate could not be started, there is no room for what it gets, or torch cannot be loaded.
    """
    with _sealed_copy(staged.path) as copy:
        verdict, why, ended = _answer_of(spec, replace(staged, path=copy), staged.path, stop, state_dir)
    if verdict == "accept":
        return
    what = staged.checkpoint or "the weights from memory"
    message = f"{what}: the gate {spec.hooks.gate!r} {why}" + ("" if why.endswith("\n") else ". ")
    was_stopped = ended.code is None and stop is not None and stop.is_set()
    if verdict == "retry" or was_stopped:
        raise RetryLater(f"{message}It is asked again at the next pass.")
    raise GateRejected(f"{message}The checkpoint stays rejected until it or the gate changes.")


def _answer_of(
    spec: Spec, staged: Staged, slot: Path, stop: threading.Event | None, state_dir: Path | None
) -> tuple[str, str, command.Ended]:
    """Runs the gate; returns its verdict, why, and how it ended."""
    about = {"staged": staged.path, "name": staged.name, "step": staged.step, "checkpoint": staged.checkpoint}
    with _unpacked(staged) as extras:
        variables = environment(slot.parent.parent, state_dir, **about, extras=extras)
        run = partial(command.run, timeout=spec.hooks.gate_timeout, environment=variables, stop=stop)
        if not spec.hooks.gate_is_function:
            ended = run(["/bin/sh", "-c", spec.hooks.gate], directory=spec.directory)
            return _VERDICTS.get(ended.code, "reject"), str(ended), ended
        answer, ended = child.ask(_judge, spec, staged, run=lambda words, link: run(words, stdin=link))
    if isinstance(answer, WsyncError):
        raise answer
    silent = f"ended without a verdict{ended.said}" if ended.code == 0 else str(ended)
    verdict, why = answer or ("reject", silent)
    return verdict, why, ended


@contextmanager
def _unpacked(staged: Staged) -> Iterator[str]:
    """See ``command.unpacked``; raises WsyncError if the extras cannot be written."""
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(command.unpacked(staged.extras))
        except OSError as exc:
            raise WsyncError(
                f"the extras could not be copied for the gate ({exc}). Make room in the directory for temporary files, "
                "or name another with TMPDIR."
            ) from exc
        yield directory


@contextmanager
def _sealed_copy(slot: Path) -> Iterator[Path]:
    """Yields the path of a copy of a staged slot that nobody can change.

    Other processes of this user can open the path until the block ends.

    Raises:
        WsyncError: there is no memory for the copy, or the slot is gone.
        SegmentError: the slot was changed while the block ran.
    """
    with ExitStack() as stack:
        try:
            original = stack.enter_context(opened(os.open(slot, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)))
            copy = stack.enter_context(opened(os.memfd_create("wsync-staged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)))
            while os.sendfile(copy, original, None, _PIECE):
                pass
            fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as exc:
            raise WsyncError(
                f"the copy of {slot} for the gate could not be made ({exc.strerror}). It takes as much memory as the "
                "weights: raise the limit of this process, or of its container."
            ) from exc
        try:
            yield Path(f"/proc/{os.getpid()}/fd/{copy}")
        finally:
            size = os.fstat(copy).st_size
            same = os.fstat(original).st_size == size and all(
                os.pread(original, _PIECE, at) == os.pread(copy, _PIECE, at) for at in range(0, size, _PIECE)
            )
            if not same:
                raise SegmentError(
                    "the staged weights changed while the gate looked at them, so nothing went live. Make the gate "
                    "write to no file of a segment, and read the staged weights from WSYNC_HOOK_STAGED."
                )


# --- in the child


def _judge(spec: Spec, staged: Staged) -> tuple[str, str]:
    function = find(spec, spec.hooks.gate)
    policy = build(spec)
    if not callable(function):
        raise SpecError(f"the gate {spec.hooks.gate} is a {type(function).__name__}. Name a function of the policy.")
    load(policy.eval(), staged.path, spec.weights.own)
    more: dict[str, Any] = {}
    with suppress(TypeError, ValueError):  # some callables have no signature
        more = {"extras": staged.extras} if "extras" in signature(function).parameters else {}
    try:
        result = function(policy, **more)
    except RetryLater as exc:
        return "retry", f"asks to try it later: {_bounded(str(exc))}"
    except (Exception, SystemExit) as exc:
        return "reject", f"raised {_bounded(where_raised(exc))}"
    if result is False:
        return "reject", "returned False"
    return "accept", ""


def load(policy: torch.nn.Module, path: Path, own: Sequence[str] = ()) -> None:
    """Copies the weights of a slot into the policy's tensors, except for those that match the globs of ``own``.

    Raises:
        SpecError: the slot has other tensors than the policy.
    """
    import torch
    from safetensors.torch import load_file

    from ..layout.layout import layout_of_tensors
    from ..layout.module import followed
    from ..layout.tensor_names import seen_through

    weights, targets = load_file(path), dict(followed(policy, own, "weights.own"))
    homes = seen_through(weights, targets)
    weights = {homes.get(name, name): tensor for name, tensor in weights.items()}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()}
    layout = layout_of_tensors(targets.items())
    expected = {e.name: (targets[e.name].dtype, targets[e.name].shape) for e in layout.tensors}
    if found != expected:
        raise SpecError(
            "the policy that was built for the gate has other tensors than the segment. It must be the same each time "
            "that it is built; if its architecture changed, run `wsync rm` for the segment."
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            targets[name].copy_(tensor)


def _bounded(text: str) -> str:
    """Shortens an exception's text and makes it safe for a terminal, like a command's output."""
    return command.plain(text[:_LONGEST].encode("utf-8", "replace"))
