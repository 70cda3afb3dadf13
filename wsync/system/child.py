"""Runs a function of this package in a child process, because it runs a user's code.

So a watch stays small (torch takes 200 MiB), runs that code as it is now and not as it was when the watch started, and
survives whatever the code does. Function and result are pickled into one nameless file, which is the child's stdin;
nothing that the user's code prints can mix with them.
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
    """Runs a function in a child, and returns its result or the WsyncError that it raised; None if the child failed.

    Args:
        run: runs a command to its end, with this descriptor as its stdin; what it returns is returned as well.
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
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the child ends with its parent
    if not os.path.exists(f"/proc/{parent}"):  # it ended before that call (getppid() may be a process in between)
        os._exit(1)
    try:
        answer = function(*arguments)
    except WsyncError as exc:
        answer = exc
    os.pwrite(link, pickle.dumps(answer), size)
    os._exit(0)  # skips threads and exit handlers of the user's code
