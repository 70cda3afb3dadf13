"""Hooks: real commands and a real HTTP server are told of each publish, and never stand in the way of the next."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from builders import NAME, SPEC, write
from policies import mlp
from processes import DEADLINE, Cli, Spawn, heard, signal_another_thread

from wsync.cli.output.watch import WatchLog
from wsync.errors import WsyncError
from wsync.hooks import command
from wsync.hooks.runner import Hook, HookRunner, Published, request
from wsync.segment.publication import Publication
from wsync.segment.writable import WritableSegment
from wsync.settings.hook_settings import VARIABLES, Hooks
from wsync.settings.spec import load_spec
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer

Told = tuple[str, bool, str]
MakeBox = Callable[..., "Box"]


class Box:
    """A syncer with hooks, what it was told by them, and a trainer for it."""

    def __init__(self, runs: Path, settings: Hooks) -> None:
        self.told: Queue[Told] = Queue()
        self.runs = runs
        self.syncer = Syncer(replace(load_spec(SPEC), hooks=settings), runs)
        self.syncer.box.report = lambda kind, ok, message: self.told.put((kind, ok, message))

    def publish(self, step: int) -> Outcome:
        write(self.runs / f"step_{step}.safetensors", mlp(), float(step))
        outcome = self.syncer.once()
        assert (outcome.status, outcome.step) == ("published", step)
        return outcome

    def next(self) -> Told:
        return self.told.get(timeout=DEADLINE)

    def hook(self, kind: str) -> Hook:
        assert self.syncer.box.hooks
        return self.syncer.box.hooks.hooks[kind]


@pytest.fixture
def make(segment: WritableSegment, runs: Path) -> Iterator[Callable[..., Box]]:
    """Makes a syncer with hooks; its threads have ended after the test."""
    made: list[Box] = []

    def start(**settings: Any) -> Box:
        made.append(Box(runs, Hooks(**settings)))
        return made[-1]

    yield start
    for each in made:
        each.syncer.close()
    for thread in threading.enumerate():
        if thread.name in ("wsync-exec", "wsync-webhook"):
            thread.join(DEADLINE)
            assert not thread.is_alive()


class Server(ThreadingHTTPServer):
    """Keeps each request, and answers as it is told to."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: Queue[tuple[str, str, dict[str, str], dict[str, Any]]] = Queue()
        self.answer: Callable[[int], int] = lambda version: 200
        self.url = f"http://127.0.0.1:{self.server_port}/hook"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self.take
        raise AttributeError(name)

    def take(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.put((self.command, self.path, dict(self.headers), body))
        status = self.server.answer(body["version"])
        try:
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
        except OSError:
            pass  # the one who asked did not wait

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    """A real HTTP server on loopback."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join(DEADLINE)


# --- exec


def test_exec_is_told_of_the_version(make: MakeBox, runs: Path, segment: WritableSegment) -> None:
    """The command finds name, version, step and checkpoint, when the version is live; it may call wsync."""
    box = make(exec=f'env > seen.env; {sys.executable} -m wsync status "$WSYNC_HOOK_NAME" --json > seen.json')
    box.publish(7)
    assert box.next()[:2] == ("exec", True)
    seen = dict(line.split("=", 1) for line in Path("seen.env").read_text().splitlines() if line.startswith("WSYNC_"))
    assert (seen["WSYNC_HOOK_NAME"], seen["WSYNC_HOOK_VERSION"], seen["WSYNC_HOOK_STEP"]) == (NAME, "1", "7")
    assert seen["WSYNC_HOOK_CHECKPOINT"] == str((runs / "step_7.safetensors").absolute())
    assert seen.keys() - os.environ.keys() <= set(VARIABLES)
    assert json.loads(Path("seen.json").read_text())["version"] == 1


def test_no_hook_without_a_publish(make: MakeBox, runs: Path) -> None:
    """A pass that publishes nothing runs nothing, and starts no thread."""
    box = make(exec="touch ran")
    assert box.syncer.once().status == "empty" and box.syncer.box.hooks is None
    box.publish(1)
    assert box.next()[1] and box.hook("exec").runs == 1
    assert box.syncer.once().status == "current"
    box.syncer.close()
    assert box.hook("exec").runs == 1


def test_failed_exec_is_tried_again(make: MakeBox) -> None:
    """A failure is told with its output, counted, and tried again after the backoff until it succeeds."""
    box = make(exec="printf x >> ran; test $(wc -c < ran) -ge 3 || { echo disk on fire; exit 9; }", exec_backoff=0.01)
    box.publish(1)
    first, _, last = box.next(), box.next(), box.next()
    assert first[:2] == ("exec", False) and "version 1 is live" in first[2]
    assert "status 9: disk on fire. Run it by hand. A watch tries it again; a push does not." in first[2]
    assert last[1] and (box.hook("exec").runs, box.hook("exec").failures) == (3, 2)


def test_newer_version_ends_the_backoff(make: MakeBox) -> None:
    """While a failed version waits to be tried again, a newer one takes its place at once."""
    box = make(exec="echo $WSYNC_HOOK_VERSION >> ran; test $WSYNC_HOOK_VERSION = 2", exec_backoff=3600)
    box.publish(1)
    assert not box.next()[1]
    box.publish(2)
    assert box.next()[1] and Path("ran").read_text() == "1\n2\n"


def test_exec_timeout_ends_the_whole_group(
    make: MakeBox, fifo: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that takes too long has failed, and nothing that it started is left."""
    monkeypatch.setattr(command, "GRACE", 0.2)
    up = fifo("up")
    stubborn = 'trap "" TERM; echo up; sleep 99'
    box = make(exec=f"sh -c '{stubborn}' > up & sh -c '{stubborn}'", exec_timeout=1.5, exec_backoff=3600)
    box.publish(1)
    _, ok, message = box.next()
    assert not ok and "took longer than 1.5 s" in message and "raise hooks.exec_timeout" in message
    assert (heard(up), heard(up)) == (b"up\n", b"")


def test_push_runs_its_hooks_once(segment: WritableSegment, runs: Path, cli: Cli, server: Server) -> None:
    """A one-shot push waits for its hooks; what fails is a warning, tried once, and the exit code stays 0."""
    server.answer = lambda version: 500
    write(runs / "step_1.safetensors", mlp(), 1.0)
    hooks = ["--exec", "printf x >> ran; exit 1", "--exec-backoff", "0.01", "--webhook", server.url]
    result = cli("push", SPEC, "runs", "--json", *hooks)
    assert (result.returncode, json.loads(result.stdout)["status"]) == (0, "published")
    assert Path("ran").read_text() == "x" and server.requests.qsize() == 1
    assert result.stderr.count("wsync: warning: version 1 is live") == 2 and "answered 500" in result.stderr
    again = cli("push", SPEC, "runs", *hooks)
    assert (again.returncode, again.stderr, Path("ran").read_text()) == (0, "", "x")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_stopped_push_ends_its_hook(
    segment: WritableSegment, runs: Path, spawn: Spawn, fifo: Callable[[str], int], number: signal.Signals
) -> None:
    """A push that is stopped while its command runs ends that, with all it started; the version stays live."""
    up = fifo("up")
    write(runs / "step_1.safetensors", mlp(), 1.0)
    push = spawn("-m", "wsync", "push", SPEC, "runs", "--exec", "exec > up; echo up; sleep 99")
    assert heard(up) == b"up\n"
    signal_another_thread(push.pid, number)
    assert push.wait(DEADLINE) == 128 + number and heard(up) == b"" and segment.version == 1


def test_an_interrupt_does_not_wait_for_hooks(make: MakeBox, fifo: Callable[[str], int]) -> None:
    """Ctrl-C anywhere in a syncer's block ends the command that runs, however much of its time is left."""
    up = fifo("up")
    box = make(exec="exec > up; echo up; sleep 99", exec_timeout=3600)
    with pytest.raises(KeyboardInterrupt), box.syncer:
        box.publish(1)
        assert heard(up) == b"up\n"
        raise KeyboardInterrupt
    assert heard(up) == b"" and "was stopped" in box.next()[2]


def test_a_signal_while_a_push_is_closing_ends_its_hook(
    make: MakeBox, fifo: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the moments before the hooks are waited for: a signal there left their commands at work."""
    up, closed, close = fifo("up"), list[bool](), HookRunner.close
    box = make(exec="exec > up; echo up; sleep 99", exec_timeout=3600)

    def signalled(self: HookRunner, *, now: bool = False) -> None:
        closed.append(now)
        if len(closed) == 1:
            sys.exit(143)
        close(self, now=now)

    monkeypatch.setattr(HookRunner, "close", signalled)
    with pytest.raises(SystemExit), box.syncer:
        box.publish(1)
        assert heard(up) == b"up\n"
    assert heard(up) == b"" and closed == [False, True]


def test_an_interrupt_ends_the_command(fifo: Callable[[str], int], tmp_path: Path) -> None:
    """Ctrl-C while a command runs ends it, with all that it started, before it is raised."""
    up = fifo("up")

    def interrupt() -> None:
        if heard(up) == b"up\n":
            signal.raise_signal(signal.SIGINT)  # whose handler Python runs in the main thread

    thread = threading.Thread(target=interrupt)
    thread.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run of tests in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            both = ["/bin/sh", "-c", "(echo up; sleep 99) > up & sleep 99"]
            command.run(both, timeout=DEADLINE, environment=os.environ, directory=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
        thread.join()
    assert heard(up) == b""


def test_watch_goes_on_beside_a_failing_hook(segment: WritableSegment, runs: Path, spawn: Spawn) -> None:
    """The log tells of the failure once, as long as it is the same, and each version is published."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    hooks = ["--exec", "echo broken; exit 1", "--exec-backoff", "0.01", "--log-format", "json", "--poll", "0.1"]
    watch = spawn("-m", "wsync", "watch", SPEC, "runs", *hooks)
    assert watch.stdout
    for step in (1, 2, 3):
        write(runs / f"step_{step}.safetensors", mlp(), float(step))
        for line in watch.stdout:
            event = json.loads(line)
            if event["event"] == "hook":
                assert event["level"] == "warning" and "broken" in event["message"]
                told = event["message"]
                break
        assert f"version {step} is live" in told
    watch.send_signal(signal.SIGTERM)
    assert watch.wait(DEADLINE) == 0 and segment.version == 3


# --- webhook


def test_webhook_is_told_of_the_version(make: MakeBox, server: Server, runs: Path) -> None:
    """A POST with a JSON object and the version in a header; what the URL holds beside the host comes along."""
    user = server.url.replace("http://", "HTTP://me:p%40ss@")
    box = make(webhook=f"{user}?token=1")
    box.publish(7)
    method, path, headers, body = server.requests.get(timeout=DEADLINE)
    assert (method, path, headers["Wsync-Version"]) == ("POST", "/hook?token=1", "1")
    assert headers["Content-Type"] == "application/json"
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")) == b"me:p@ss"
    checkpoint = str((runs / "step_7.safetensors").absolute())
    assert body == {"name": NAME, "version": 1, "step": 7, "checkpoint": checkpoint}
    assert box.next()[:2] == ("webhook", True)


def test_a_hanging_webhook_delays_nothing(make: MakeBox, server: Server) -> None:
    """While a request hangs three more versions are published at once; then the newest is told, and no other."""
    release = threading.Event()
    server.answer = lambda version: 200 if version > 1 or release.wait(DEADLINE) else 500
    box = make(webhook=server.url, webhook_timeout=DEADLINE)
    box.publish(1)
    assert server.requests.get(timeout=DEADLINE)[3]["version"] == 1
    for step in (2, 3, 4):
        box.publish(step)
    assert server.requests.empty() and box.hook("webhook").runs == 1  # it hangs all the while
    release.set()
    assert server.requests.get(timeout=DEADLINE)[3]["version"] == 4
    assert box.next()[1] and box.next()[1]
    assert box.hook("webhook").runs == 2 and server.requests.empty()


def test_the_end_tells_what_waits_and_tries_nothing_again(make: MakeBox, server: Server) -> None:
    """At the end a request that runs may finish, the version that waits is told once, and a failure stays one."""
    release = threading.Event()
    server.answer = lambda version: 500 if release.wait(DEADLINE) else 200
    box = make(webhook=server.url, webhook_timeout=DEADLINE, webhook_backoff=0.01)
    box.publish(1)
    server.requests.get(timeout=DEADLINE)
    box.publish(2)
    closing = threading.Thread(target=box.syncer.close)
    closing.start()
    while not box.hook("webhook")._closing:
        closing.join(0.001)
    release.set()
    closing.join(DEADLINE)
    assert not closing.is_alive() and server.requests.get_nowait()[3]["version"] == 2
    assert (box.hook("webhook").runs, box.hook("webhook").failures) == (2, 2) and server.requests.empty()


LIVE = Published(Publication(version=1))


@pytest.mark.parametrize(
    ("answered", "wanted", "ok"),
    [(200, 200, True), (204, 200, False), (204, 204, True), (500, 0, True), (302, 200, False)],
)
def test_success_status(server: Server, answered: int, wanted: int, ok: bool) -> None:
    """The status that is wanted succeeds, 0 takes any; a redirect is no success and is not followed."""
    server.answer = lambda version: answered
    settings = Hooks(webhook=server.url, webhook_method="put", webhook_success_status=wanted, webhook_timeout=DEADLINE)
    spec = replace(load_spec(SPEC), hooks=settings)
    if ok:
        request(spec, LIVE)
    else:
        with pytest.raises(
            WsyncError, match=rf"answered {answered}, not {wanted}\. .*or set hooks\.webhook_success_status\.$"
        ):
            request(spec, LIVE)
    method, _, _, body = server.requests.get_nowait()
    assert method == "PUT" and (body["step"], body["checkpoint"]) == (None, None) and server.requests.empty()


def test_secrets_of_a_url_are_never_told(make: MakeBox) -> None:
    """Whatever fails, the message names the host, and nothing else of the URL; nor does the settings' repr."""
    with socket.socket() as taken:  # bound, and not listening: a connection is refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://hidden:hidden@127.0.0.1:{taken.getsockname()[1]}/hidden?hidden#hidden"
        box = make(webhook=url, webhook_backoff=3600, webhook_timeout=DEADLINE)
        box.publish(1)
        _, ok, message = box.next()
    assert not ok and "127.0.0.1" in message and "ConnectionRefused" in message and "hidden" not in message
    assert "Look at that server and hooks.webhook." in message
    assert "hidden" not in repr(box.syncer.spec)


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200 OK\r\n"])
def test_a_server_that_drips_is_cut_off(first: bytes) -> None:
    """The time is that of the whole request: a byte now and then does not make it longer."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                try:
                    connection.sendall(first)
                    while not stop.wait(0.05):
                        connection.sendall(b"x")
                except OSError:
                    pass

        dripping = threading.Thread(target=drip)
        dripping.start()
        began = time.monotonic()
        settings = Hooks(webhook=f"http://127.0.0.1:{listener.getsockname()[1]}", webhook_timeout=0.5)
        spec = replace(load_spec(SPEC), hooks=settings)
        with pytest.raises(WsyncError, match=r"no answer within 0\.5 s\. .*raise hooks\.webhook_timeout\.$"):
            request(spec, LIVE)
        assert time.monotonic() - began < DEADLINE / 2
        stop.set()
        dripping.join(DEADLINE)


def test_no_file_is_a_webhook() -> None:
    """Only http and https: neither a scheme of the disk nor one that only looks like it."""
    for url in ("file:///etc/passwd", "httpx://host/", "/etc/passwd"):
        with pytest.raises(WsyncError):
            Hooks(webhook=url)


# --- the thread


def test_the_thread_outlives_what_it_calls() -> None:
    """An error that nobody thought of is a failure; a report that fails is none of the hook's business."""
    ran: Queue[int] = Queue()

    def act(news: Published, cancel: threading.Event) -> None:
        ran.put(news.live.version)
        raise RuntimeError("unforeseen")

    def report(kind: str, ok: bool, message: str) -> None:
        assert "RuntimeError: unforeseen" in message
        raise BrokenPipeError

    hook = Hook("exec", act, timeout=DEADLINE, backoff=3600, report=report)
    for version in (1, 2):
        hook.send(Published(replace(LIVE.live, version=version)))
        assert ran.get(timeout=DEADLINE) == version
    hook.shut()
    hook.join()
    assert (hook.runs, hook.failures) == (2, 2)


def test_the_log_tells_a_failure_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The same failure again is not told again; another one is, and that it works again; a success is no news."""
    with WatchLog(NAME, Path("runs"), "plain", lambda: None) as log:
        for ok, message in (
            (True, "a"),
            (False, "b"),
            (False, "b"),
            (False, "c"),
            (True, "d"),
            (True, "e"),
            (False, "c"),
        ):
            log.hook("exec", ok, message)
    told = [line.split()[1::2] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert told == [["warning", "b"], ["warning", "c"], ["info", "d"], ["warning", "c"]]


def test_without_a_report_failures_are_logged(
    segment: WritableSegment, runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A library that sets no report finds failures in the log of ``wsync``, and no successes."""
    for step, code in ((1, 0), (2, 1)):
        write(runs / f"step_{step}.safetensors", mlp(), float(step))
        with Syncer(replace(load_spec(SPEC), hooks=Hooks(exec=f"exit {code}")), runs) as syncer:
            syncer.once()
    assert len(caplog.messages) == 1 and "version 2 is live, but the command 'exit 1'" in caplog.messages[0]


def test_nothing_to_do_costs_nothing(segment: WritableSegment, runs: Path, program: Cli) -> None:
    """With gate and hooks set, a push that has nothing to do imports nothing that would run them."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    settings = ["--gate", "true", "--exec", "true", "--webhook", "http://127.0.0.1:9/"]
    with Syncer(load_spec(SPEC), runs) as syncer:
        syncer.once()
    result = program("push", SPEC, "runs", *settings, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert "current" in result.stdout
    found = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "wsync.settings.hook_settings" in found
    runners = {
        "wsync.hooks.gate",
        "wsync.hooks.command",
        "wsync.hooks.runner",
        "http.client",
        "urllib.request",
        "torch",
    }
    assert not found & runners
