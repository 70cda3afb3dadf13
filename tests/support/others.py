"""Processes forked to be somebody else, or somewhere else: another user, a small file system, a limited process.

They are forked and not started anew, because another user may not be able to reach the interpreter; what they would
load later is loaded here. What they mount and limit ends with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import os
import resource
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import rich.cells
import rich.console
import rich.table
import rich.text
from processes import DEADLINE

import wsync.layout.weights
import wsync.updaters.vanilla
from wsync.cli import commands as cli
from wsync.cli.output import inspected, status, watch
from wsync.errors import WsyncError
from wsync.policy import reader
from wsync.settings import layout_process, spec
from wsync.sync import syncer

__all__ = ["inspected", "reader", "rich", "spec", "status", "syncer", "watch", "wsync"]

GROUP = 64242
OWNER, MEMBER, STRANGER = 64001, 64002, 64003
Work = Callable[[], Any]
_FORK = multiprocessing.get_context("fork")
_CLONE_NEWNS, _MS_REC_PRIVATE = 0x20000, 0x4000 | 0x40000  # linux/sched.h, linux/mount.h


@contextmanager
def forked(become: Work, *work: Work) -> Iterator[Work]:
    """A process that first does ``become``; each call of what is given does the next work there, and tells its end."""
    here, there = _FORK.Pipe()
    process = _FORK.Process(target=_live, args=(there, here, become, *work))
    process.start()
    there.close()

    def step() -> Any:
        here.send("next")
        assert here.poll(DEADLINE), "it hangs"
        try:
            good, answer = here.recv()
        except EOFError:
            process.join(DEADLINE)
            pytest.fail(f"it ended with {process.exitcode}")
        if not good:
            raise answer
        return answer

    try:
        try:
            step()
        except OSError as exc:
            pytest.skip(f"not allowed here: {exc}")
        yield step
    finally:
        here.close()
        process.kill()
        process.join(DEADLINE)
        process.close()


@contextmanager
def person(uid: int, *work: Work, group: int | None = GROUP) -> Iterator[Work]:
    """A process of ``uid``, in ``group`` besides its own."""

    def become() -> None:
        os.setgroups([] if group is None else [group])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        os.umask(0o077)

    with forked(become, *work) as step:
        yield step


def as_person(uid: int, work: Work, group: int | None = GROUP) -> Any:
    """Does one work as ``uid``."""
    with person(uid, work, group=group) as step:
        return step()


def in_a_small_place(place: Path, work: Work, options: str = "size=4m") -> Any:
    """Does one work where ``place`` is a tmpfs of its own, which nobody else sees."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(failed: int) -> None:
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def become() -> None:
        check(libc.unshare(_CLONE_NEWNS))
        check(libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None))
        check(libc.mount(b"wsync-test", bytes(place), b"tmpfs", 0, f"{options},mode=0700".encode()))

    with forked(become, work) as step:
        return step()


def limited(work: Work, what: int, more: int) -> Any:
    """Does one work in a process that may have ``more`` bytes than it has; of file sizes, ``more`` bytes in all."""

    def become() -> None:
        taken = 0
        if what != resource.RLIMIT_FSIZE:
            field = "VmSize:" if what == resource.RLIMIT_AS else "VmData:"
            status = Path("/proc/self/status").read_text().split()
            taken = int(status[status.index(field) + 1]) * 1024
        resource.setrlimit(what, (taken + more, taken + more))

    with forked(become, work) as step:
        return step()


def run_cli(*arguments: str) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout, stderr; an error of ours as ``main`` tells it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.command_line(*arguments[:1])(list(arguments), standalone_mode=False) or 0
        except WsyncError as exc:
            code = exc.exit_code
            print(f"wsync: {exc}", file=err)
    return code, out.getvalue(), err.getvalue()


def run_main(*arguments: str) -> tuple[int, str, str]:
    """All of the command line in a process forked from this one, which has torch and reads layouts without another."""
    codes: list[int] = []
    out, err = io.StringIO(), io.StringIO()

    def work() -> tuple[int, str, str]:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", ["wsync", *arguments]),
            mock.patch.object(layout_process, "ask_policy", lambda spec, question, *more: question(spec, *more)),
            mock.patch.object(os, "_exit", codes.append),
        ):
            cli.main()
        return codes[0], out.getvalue(), err.getvalue()

    with (
        warnings.catch_warnings(action="ignore", category=DeprecationWarning),  # of a fork beside threads, since 3.12
        forked(lambda: None, work) as step,
    ):
        code, said, complained = step()
    return code, said, complained


def run_forked(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """``run_main`` in an environment and a directory, with its answer as ``subprocess.run`` gives it."""
    with mock.patch.dict(os.environ, env or {}, clear=env is not None), contextlib.chdir(cwd or "."):
        return subprocess.CompletedProcess(arguments, *run_main(*arguments))


run_cli("--help")  # typer loads parts of its own at the first command


def _live(line: Connection, other: Connection, *work: Work) -> None:
    other.close()
    for each in work:
        try:
            line.recv()
        except EOFError:
            break
        try:
            line.send((True, each()))
        except BaseException as exc:
            try:
                line.send((False, exc))
            except Exception:
                line.send((False, AssertionError(traceback.format_exc())))
    line.close()
