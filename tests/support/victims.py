"""Processes to kill: a server that forks them cheaply, what they do, and the trap in which one kills itself.

The server imports what its children need once, and forks for each request that comes with three descriptors to be the
child's stdin, stdout and stderr. A child may carry a trap: a line of the code at which it ends by SIGKILL, just before
the line runs or just after, whatever the code would say to it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

NAME = "storm"
HIDDEN = 20_000  # half a megabyte of weights, so that staging takes a while


def serve(number: int, modules: str) -> None:
    """Forks a child for each request, waits for one, or stops one, until nobody asks any more."""
    import importlib

    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    for module in modules.split():
        importlib.import_module(module)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    with socket.socket(fileno=number) as control:
        control.send(b"ready")
        while True:
            message, fds, _, _ = socket.recv_fds(control, 1 << 20, 3)
            if not message:
                return
            request = json.loads(message)
            if "wait" in request:
                answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            elif "stop" in request:
                os.kill(request["stop"], signal.SIGSTOP)
                os.waitid(os.P_PID, request["stop"], os.WSTOPPED)
                answer = 0
            else:
                answer = os.fork()
                if answer == 0:
                    control.close()
                    _become(request, fds)
                for fd in fds:
                    os.close(fd)
            control.send(str(answer).encode())


def _become(request: dict[str, Any], fds: list[int]) -> None:
    """The child's life; it never returns to the server."""
    try:
        for place, fd in enumerate(fds):
            os.dup2(fd, place)
            os.close(fd)
        sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
        os.chdir(request["cwd"])
        os.environ.update(request["environ"])
        if request["trap"]:
            trap(*request["trap"])
        ROLES[request["role"]](*request["arguments"])
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(99)


# --- what they do


def command_line(*arguments: str) -> None:
    """``wsync`` itself."""
    from wsync.cli.commands import main

    sys.argv = ["wsync", *arguments]
    main()


def tensors(mark: float, extras: dict[str, str] | None = None) -> None:
    """A trainer that publishes from memory."""
    from policies import mlp

    from wsync.segment.publishing import publish_tensors
    from wsync.segment.writable import WritableSegment

    state = {name: tensor.detach().fill_(mark) for name, tensor in mlp(HIDDEN).state_dict().items()}
    segment = WritableSegment.open(NAME)
    with segment.publishing():
        publish_tensors(
            segment, state, step=int(mark), extras={name: text.encode() for name, text in (extras or {}).items()}
        )


def create(name: str, layout: dict[str, Any]) -> None:
    """Makes a segment without any policy."""
    from wsync.layout.layout import Layout
    from wsync.segment.writable import WritableSegment

    WritableSegment.create(name, Layout.from_json(layout)).close()


def remove(name: str) -> None:
    """Removes a segment, as ``wsync rm`` does."""
    from wsync.segment.writable import remove

    remove(name)


def lines_of(role: str, arguments: list[Any], functions: list[list[str]]) -> None:
    """Runs another role and prints how often each line of these functions began: file, line, times."""
    wanted = {tuple(function) for function in functions}
    counts: dict[tuple[str, int], int] = {}

    def line(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            key = frame.f_code.co_filename, frame.f_lineno
            counts[key] = counts.get(key, 0) + 1
        return line

    def call(frame: FrameType, event: str, argument: object) -> Any:
        return line if (frame.f_code.co_filename, frame.f_code.co_qualname) in wanted else None

    sys.settrace(call)
    ROLES[role](*arguments)
    sys.settrace(None)
    print(json.dumps([[*key, count] for key, count in counts.items()]))


def act(mode: str, follow: bool, late: list[Any] | None = None) -> None:
    """A policy process: says its version, step, and lowest and highest weight; when asked, or at each version.

    Args:
        late: a trap that is set once the first version is in.
    """
    import torch
    from policies import mlp

    import wsync

    policy = mlp(HIDDEN)
    weights = list(policy.parameters())

    def range_now() -> tuple[float, float]:
        with torch.no_grad():
            return min(float(w.min()) for w in weights), max(float(w.max()) for w in weights)

    def say() -> tuple[float, float]:
        seen = range_now()
        os.write(1, f"{reader.version} {reader.step} {seen[0]} {seen[1]}\n".encode())
        return seen

    reader = wsync.attach(policy, NAME, mode=mode, timeout=60)  # type: ignore[arg-type]
    last = say()
    if late:
        trap(*late)
    while not follow:
        if not sys.stdin.readline():
            return
        reader.wait(0)
        reader.refresh()
        last = say()
    while not select.select([0], [], [], 0)[0]:
        if range_now() != last or reader.wait(0.25):
            if range_now() != last:  # what is in use was written: said like a version, it will not pass for one
                say()
            reader.refresh()
            last = say()


ROLES: dict[str, Callable[..., None]] = {
    "wsync": command_line,
    "tensors": tensors,
    "create": create,
    "remove": remove,
    "lines": lines_of,
    "act": act,
}


# --- the trap


def trap(file: str, number: int, when: str, times: int = 1) -> None:
    """Ends this process by SIGKILL just before, or just after, a line runs for the given time."""
    armed: list[FrameType] = []
    left = times

    def line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame in armed:  # whatever comes next in this frame comes after the line
            _end()
        if event == "line" and frame.f_lineno == number:
            left -= 1
            if left == 0:
                if when == "before":
                    _end()
                armed.append(frame)
        return line

    def call(frame: FrameType, event: str, argument: object) -> Any:
        return line if frame.f_code.co_filename == file else None

    sys.settrace(call)
    threading.settrace(call)


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- the test's side


class Server:
    """Starts and asks the server; all of its children are killed with it."""

    def __init__(self, modules: str, environ: dict[str, str]) -> None:
        import subprocess

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"import victims; victims.serve({theirs.fileno()}, {modules!r})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environ,
                start_new_session=True,
            )
        self._control = ours
        ours.settimeout(60)
        try:
            assert ours.recv(10) == b"ready"
        except BaseException:
            self.close()
            raise

    def ask(self, request: dict[str, Any], fds: list[int] | None = None) -> int:
        socket.send_fds(self._control, [json.dumps(request).encode()], fds or [])
        return int(self._control.recv(100))

    def close(self) -> None:
        self._control.close()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def start(self, role: str, *arguments: Any, trap: list[Any] | None = None) -> Child:
        """Forks a child in this role, in this process's current directory and with its ``WSYNC_`` variables."""
        stdin, ours_in = os.pipe()
        ours_out, stdout = os.pipe()
        environ = {name: value for name, value in os.environ.items() if name.startswith("WSYNC_")}
        request = {"role": role, "arguments": arguments, "trap": trap, "cwd": os.getcwd(), "environ": environ}
        try:
            pid = self.ask(request, [stdin, stdout, 2])
        except BaseException:
            os.close(ours_in)
            os.close(ours_out)
            raise
        finally:
            os.close(stdin)
            os.close(stdout)
        return Child(self, pid, ours_in, ours_out)


class Child:
    """A child of the server: what it says, line by line, and how it ends."""

    def __init__(self, server: Server, pid: int, stdin: int, stdout: int) -> None:
        self.server, self.pid = server, pid
        self._stdin, self._stdout = stdin, stdout
        self._buffer = b""
        self._code: int | None = None

    def ask(self) -> None:
        os.write(self._stdin, b"\n")

    def quiet(self, seconds: float) -> bool:
        """Whether it goes on for so long, and says nothing."""
        return not select.select([self._stdout], [], [], seconds)[0]

    def line(self, seconds: float = 60.0) -> str:
        """Its next line; an empty one when it has ended."""
        while b"\n" not in self._buffer:
            assert not self.quiet(seconds), "nothing is said"
            more = os.read(self._stdout, 1 << 16)
            if not more:
                return ""
            self._buffer += more
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode()

    def lines(self) -> list[str]:
        """What it said so far, without waiting."""
        found = []
        while b"\n" in self._buffer or not self.quiet(0):
            line = self.line()
            if not line:
                break
            found.append(line)
        return found

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Stopped, for certain, when this returns."""
        self.server.ask({"stop": self.pid})

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def ended(self) -> int:
        """Its exit code, or minus the signal, once it has ended."""
        if self._code is None:
            self._code = self.server.ask({"wait": self.pid})
            os.close(self._stdin)
        return self._code

    def close(self) -> None:
        """Ends it, whatever it does."""
        if self._code is None:
            self.kill()
            self.ended()
        os.close(self._stdout)

    def files(self) -> list[str]:
        """Where its descriptors lead."""
        found = []
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                found.append(os.readlink(link))
            except FileNotFoundError:
                continue
        return found
