"""Runs a function of this package in a process of its own, where user code belongs.

So a watch stays small (torch takes 200 MiB), sees the code as it is now instead of as it was when the watch started,
and survives whatever that code does. Question and answer are pickled into one nameless file, which is the process's
stdin; nothing that the user's code prints can mix with them.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import WsyncError

_T = TypeVar("_T")


def ask(function: Callable[..., Any], *arguments: Any, run: Callable[[list[str], int], _T]) -> tuple[Any, _T]:
    """The function's result in its process, or the WsyncError that it raised; None without an answer.

    Args:
        run: runs a command to its end with this descriptor as its stdin; its result is returned as well.
    """
    code = f"import sys; sys.path[:] = {sys.path!r}; from wsync.system.child import _answer; _answer()"
    question = pickle.dumps((function, arguments, os.getpid()))
    link = os.memfd_create("wsync-child")
    try:
        os.pwrite(link, question, 0)
        ended = run([sys.executable, "-c", code], link)
        answer = os.pread(link, os.fstat(link).st_size - len(question), len(question))
    finally:
        os.close(link)
    try:
        return pickle.loads(answer), ended
    except (EOFError, pickle.UnpicklingError):
        return None, ended


def _answer() -> None:
    """In the child: reads the question from stdin, and appends the answer to it."""
    import ctypes

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which waits for this process
    link, size = os.dup(0), os.fstat(0).st_size
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    function, arguments, parent = pickle.loads(os.pread(link, size, 0))
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends when its parent does, however that ends
    if not os.path.exists(f"/proc/{parent}"):  # the parent had ended before; ours may now be a process in between
        os._exit(1)
    try:
        answer = function(*arguments)
    except WsyncError as exc:
        answer = exc
    os.pwrite(link, pickle.dumps(answer), size)
    os._exit(0)  # skips threads and exit handlers of the user's code
