"""A gate: the user's own check of staged weights, the last one before they go live.

A command (anything that is not ``package.module:function``) runs through ``/bin/sh`` in the spec's directory and finds
in its environment ``WSYNC_HOOK_STAGED`` (a plain safetensors file that nobody can write), ``WSYNC_HOOK_NAME``,
``WSYNC_HOOK_STEP`` (empty if there is none), ``WSYNC_HOOK_CHECKPOINT``, and ``WSYNC_HOOK_EXTRAS``: a directory with the
extras, empty if there are none. Status 0 accepts, 75 asks for the same again later, anything else rejects.

A function is called with the policy, in eval mode, with the staged weights in it; and with the extras, bytes by their
names, if it has a parameter ``extras``. It accepts with any result but ``False``, which is taken for a failed check
whose author forgot to raise; ``RetryLater`` asks for the same again later, and any other exception rejects. It runs in
a process of its own, so that a watch never imports torch and survives whatever that code does.

Both look at a copy of the staged slot. The gate runs as the owner of the slot, so nothing could keep it from writing
there. The copy is in memory that the kernel seals (memfd_create(2)), is as large as the weights, and is freed after the
gate. Afterwards the slot must still hold what was copied.

A gate that takes too long, or is ended by a signal, rejects: a hanging gate must not hold up the next checkpoint for
ever. While it runs the publisher's lock is held, and what was live stays live; nobody can lease the slot.
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
    """Returns when the gate accepts.

    Args:
        state_dir: where history and pins are kept, for a wsync that the gate calls.
        stop: ends the gate early, once set; the checkpoint may then be tried again.

    Raises:
        GateRejected: it does not accept.
        RetryLater: it asks for the same again later, or was ended by ``stop``.
        SpecError: its function, or the policy for it, cannot be imported or built.
        SegmentError: it changed the weights that it should check.
        WsyncError: it could not be started, or torch cannot be loaded for it.
    """
    with _sealed_copy(staged.path) as copy:
        verdict, why, ended = _answer_of(spec, replace(staged, path=copy), staged.path, stop, state_dir)
    if verdict == "accept":
        return
    what = staged.checkpoint or "the weights from memory"
    told = f"{what}: the gate {spec.hooks.gate!r} {why}" + ("" if why.endswith("\n") else ". ")
    was_stopped = ended.code is None and stop is not None and stop.is_set()
    if verdict == "retry" or was_stopped:
        raise RetryLater(f"{told}It is asked again at the next pass.")
    raise GateRejected(f"{told}The checkpoint stays rejected until it changes.")


def _answer_of(
    spec: Spec, staged: Staged, slot: Path, stop: threading.Event | None, state_dir: Path | None
) -> tuple[str, str, command.Ended]:
    """The gate's verdict, why, and how it ended."""
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
    """See ``command.unpacked``; raises WsyncError where there is no room."""
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
    """A copy of a staged slot that nobody can change; at the end the slot must hold the same.

    Its path can be opened by other processes of this user until the end of the block.

    Raises:
        WsyncError: there is no memory for the copy, or the slot is gone.
        SegmentError: the slot was changed meanwhile.
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
                    "the staged weights changed while the gate looked at them, and nothing went live. Let the gate "
                    "write to no file of a segment; it reads the staged weights from WSYNC_HOOK_STAGED."
                )


# --- in the child


def _judge(spec: Spec, staged: Staged) -> tuple[str, str]:
    function = find(spec, spec.hooks.gate)
    policy = build(spec)
    if not callable(function):
        raise SpecError(f"the gate {spec.hooks.gate} is a {type(function).__name__}. Name a function of the policy.")
    load(policy.eval(), staged.path, spec.weights.own)
    more: dict[str, Any] = {}
    with suppress(TypeError, ValueError):  # not every callable tells its parameters
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
    """Copies the weights of a slot into the policy's own tensors, except for those that the globs of ``own`` name.

    Raises:
        SpecError: they are not the policy's.
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
    """An exception's text, short and harmless to a terminal like a command's output."""
    return command.plain(text[:_LONGEST].encode("utf-8", "replace"))
