"""A watch as a service: what systemd hears, what SIGHUP does, and what its log looks like without a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from builders import NAME, SPEC, write
from policies import mlp
from processes import DEADLINE, Lines, Spawn
from trainers import Trainer

import wsync
from wsync.cli.output.watch import LOGGED, WatchLog, one_line
from wsync.errors import Difference, LayoutDiffers, WsyncError
from wsync.layout.layout import layout_of
from wsync.segment.writable import WritableSegment
from wsync.service.service import Reach, differing
from wsync.service.systemd import Notifier
from wsync.settings.spec import Spec, load_spec
from wsync.sync.outcome import Outcome

pytestmark = pytest.mark.slow

TOML = 'policy = "policies:mlp"\nname = "actor"\ncheckpoints = "runs"\n'
NO_POLL = "86400"  # only a notification or a signal can be why something happens
Watch = Callable[..., Lines]

OWN_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, which ignores it, hands that on
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "wsync", *sys.argv[1:]])
"""


class Manager:
    """The service manager's end: a datagram socket, as systemd has one."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.settimeout(DEADLINE)

    def until(self, line: str) -> list[str]:
        """What is heard up to the first datagram that has a line that begins so."""
        heard: list[str] = []
        while not any(part.startswith(line) for part in (heard[-1].split("\n") if heard else ())):
            heard.append(self._socket.recv(65536).decode())
        self.heard += heard
        return heard

    def silence(self, seconds: float, most: int) -> bool:
        """Whether nothing comes for so long, after at most so many datagrams."""
        self._socket.settimeout(seconds)
        try:
            for _ in range(most):
                self._socket.recv(65536)
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(DEADLINE)
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def runs(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory of checkpoints, the standing segments of the policy, and a TOML of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "actor.toml").write_text(TOML)
    for name, spec in ((NAME, SPEC), ("actor", "actor.toml")):
        WritableSegment.create(name, layout_of(mlp()), spec=load_spec(spec).fingerprint()).close()
    return Path("runs")


@pytest.fixture
def manager(runtime: Path) -> Iterator[Manager]:
    manager = Manager(str(runtime / "notify"))
    yield manager
    manager.close()


@pytest.fixture
def watch(spawn: Spawn, runs: Path) -> Watch:
    """Starts a watch, and waits until it looks."""

    def start(*options: str, spec: str = "actor.toml", **variables: str) -> Lines:
        log = Lines(spawn("-m", "wsync", "watch", spec, *options, env={**os.environ, **variables}))
        log.until("watching")
        return log

    return start


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=DEADLINE) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as exc:
        exc.close()
        assert exc.code == 503
        return False


def end(log: Lines, number: signal.Signals = signal.SIGTERM) -> None:
    log.process.send_signal(number)
    log.rest()
    assert log.process.returncode == 0


def test_a_signal_amid_a_wait(spawn: Spawn, runs: Path) -> None:
    """A signal that interrupts the main thread as it holds the lock of what it waits for ends the wait all the same."""
    code = (
        "import signal\n"
        "from wsync.service.service import Service\n"
        "from wsync.settings.spec import load_spec\n"
        "service = Service(lambda: load_spec('actor.toml'), 'actor.toml')\n"
        "with service._wake._cond:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        f"assert service._wake.wait({DEADLINE})\n"
        "service._wake.clear()\n"
        "import _thread\n"
        "def none(*_): raise RuntimeError('no thread is to be had')\n"
        "_thread.start_new_thread = none\n"
        "signal.raise_signal(signal.SIGTERM)\n"
        "assert service._wake.is_set()\n"
    )
    assert spawn("-c", code).wait(DEADLINE) == 0


def test_ready_comes_with_the_first_version(watch: Watch, manager: Manager, runs: Path) -> None:
    """Ready is said once, when weights are live and not before; each event is a status, and the end is told."""
    log = watch(NOTIFY_SOCKET=manager.address)
    log.until("empty")
    write(runs / "step_1.safetensors", mlp(), 1.0)
    start = manager.until("READY=1")
    assert [part for part in start if part.startswith("STATUS=")][-1].startswith("STATUS=actor: version 1, step 1")
    assert any("empty" in part for part in start) and start[-1] == "READY=1"
    write(runs / "step_2.safetensors", mlp(), 1.0)
    assert "READY=1" not in manager.until("STATUS=actor: version 2")
    end(log)
    assert "READY=1" not in manager.until("STOPPING=1")


def test_a_live_version_makes_ready_at_once(watch: Watch, manager: Manager, runs: Path) -> None:
    """A watch that is started again beside live weights is ready with its first look."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    first = watch("--poll", NO_POLL)
    first.until("version 1")
    end(first)
    log = watch("--poll", NO_POLL, NOTIFY_SOCKET=manager.address)
    assert any("is current" in part for part in manager.until("READY=1"))
    end(log)


def test_an_abstract_socket_is_one(watch: Watch, runs: Path) -> None:
    """An address that begins with @ names no file."""
    manager = Manager(f"@wsync-test-{secrets.token_hex(8)}")
    write(runs / "step_1.safetensors", mlp(), 1.0)
    log = watch(NOTIFY_SOCKET=manager.address)
    manager.until("READY=1")
    end(log)
    manager.close()


def test_a_stage_puts_time_outs_off(watch: Watch, manager: Manager, runs: Path) -> None:
    """While bytes move, neither a start nor a stop is cut off."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    log = watch(NOTIFY_SOCKET=manager.address)
    assert any(part == "EXTEND_TIMEOUT_USEC=60000000" for part in manager.until("READY=1"))
    end(log)


def test_a_long_stage_does_not_flood(manager: Manager) -> None:
    """However many reads there are, the time-outs are put off about once a second."""
    notifier = Notifier(manager.address)
    for _ in range(8):  # what a datagram socket holds unread
        notifier.staging()
    notifier.close()
    assert len(manager.until("STOPPING=1")) <= 3


def test_the_watchdog_is_fed_while_the_loop_waits(watch: Watch, manager: Manager, runs: Path) -> None:
    """Between two looks that are a day apart the watchdog is fed."""
    log = watch("--poll", NO_POLL, NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="100000")
    for _ in range(5):
        manager.until("WATCHDOG=1")
    end(log)


def test_the_watchdog_is_fed_while_a_gate_looks(watch: Watch, manager: Manager, runs: Path) -> None:
    """A gate may take its time, and a pause after failures too: neither is a loop that hangs."""
    os.mkfifo("answer")
    log = watch("--gate", "read line < answer", NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="100000", WSYNC_POLL="0.1")
    write(runs / "step_1.safetensors", mlp(), 1.0)
    with open("answer", "w") as answer:  # opens once the gate reads
        for _ in range(40):  # by half the watchdog's time: long after it would have run out
            manager.until("WATCHDOG=1")
        answer.write("fine\n")
    log.until("version 1")
    end(log)


def test_a_loop_that_hangs_starves_the_watchdog(manager: Manager) -> None:
    """When the loop turns no more, the thread beside it stops feeding, and starts again when the loop does."""
    notifier = Notifier(manager.address, watchdog=0.05)
    notifier.patience = 0.1
    manager.until("WATCHDOG=1")
    assert manager.silence(0.5, most=50)
    notifier.turned()
    manager.until("WATCHDOG=1")
    notifier.close()


@pytest.mark.parametrize("pid", ["ours", "another's"])
def test_only_our_own_watchdog_is_fed(manager: Manager, pid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watchdog that is meant for another process is none of ours; no variable is left to children either way."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() if pid == "ours" else os.getpid() + 1))
    notifier = Notifier.from_environment()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & {*os.environ}
    if pid == "ours":
        manager.until("WATCHDOG=1")
    else:
        assert manager.silence(0.2, most=1)
    notifier.close()


def test_without_a_manager_nothing_is_opened() -> None:
    """Outside systemd there is no socket and no thread."""
    before, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    notifier = Notifier.from_environment()
    notifier.ready()
    notifier.status("x")
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (before, descriptors)
    notifier.close()


def test_a_manager_that_is_gone_changes_nothing(watch: Watch, runs: Path, runtime: Path) -> None:
    """A socket that nobody listens on is no reason to fail."""
    log = watch(NOTIFY_SOCKET=str(runtime / "nobody"), WATCHDOG_USEC="50000")
    write(runs / "step_1.safetensors", mlp(), 1.0)
    log.until("version 1")
    end(log)


def test_users_code_cannot_speak_in_our_name(spawn: Spawn, manager: Manager, runtime: Path, tmp_path: Path) -> None:
    """The process that reads the layout, and what the policy's code starts, does not know the socket."""
    (tmp_path / "net.py").write_text(
        "import os\nfrom policies import mlp\nopen('seen', 'w').write(os.environ.get('NOTIFY_SOCKET', 'nothing'))\n"
    )
    write(tmp_path / "runs" / "step_1.safetensors", mlp(), 1.0)
    environment = {**os.environ, "NOTIFY_SOCKET": manager.address}
    log = Lines(spawn("-m", "wsync", "watch", "net:mlp", "runs", cwd=tmp_path, env=environment))
    manager.until("READY=1")
    end(log)
    assert (tmp_path / "seen").read_text() == "nothing"


def test_a_name_cannot_forge_a_message(manager: Manager) -> None:
    """A line break in a checkpoint's name stays inside the status, and inside its line of the log."""
    notifier = Notifier(manager.address)
    with WatchLog(NAME, Path("runs"), "plain", lambda: None, notifier.status) as log:
        log.tell(Outcome("published", NAME, version=1, checkpoint="/runs/a\nREADY=1\n\x1b[31m.safetensors", bytes=1))
    notifier.close()
    heard = manager.until("STOPPING=1")
    assert any("READY=1" in part for part in heard)
    assert all("\n" not in part and "\x1b" not in part for part in heard)


def test_sighup_takes_new_settings_at_once(watch: Watch, manager: Manager, runs: Path) -> None:
    """A waiting loop wakes, says what changed, looks with the new settings, and systemd hears of both ends."""
    write(runs / "best_1.safetensors", mlp(), 1.0)
    log = watch("--poll", NO_POLL, NOTIFY_SOCKET=manager.address)
    log.until("version 1")
    manager.until("READY=1")
    Path("others").mkdir()
    write(Path("others/step_5.safetensors"), mlp(), 5.0)
    write(Path("others/last.safetensors"), mlp(), 6.0)
    Path("actor.toml").write_text(
        TOML.replace('"runs"', '"others"') + '[select]\npattern = "step_*"\n[watch]\npoll = 7\n'
    )
    log.process.send_signal(signal.SIGHUP)
    line = log.until("SIGHUP")
    assert "info" in line and "checkpoints, select.pattern changed" in line
    assert "poll" not in line  # given on the command line, which wins
    assert "step 5" in log.until("version 2")
    reloading, *_, ready = [part for part in manager.until("READY=1") if not part.startswith("STATUS=")]
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", reloading) and ready == "READY=1"
    end(log)


def test_sighup_before_ready_does_not_say_ready(watch: Watch, manager: Manager, runs: Path) -> None:
    """A watch without weights that reads its TOML again is still starting."""
    log = watch("--poll", NO_POLL, NOTIFY_SOCKET=manager.address)
    log.until("empty")
    log.process.send_signal(signal.SIGHUP)
    assert "nothing changed" in log.until("SIGHUP")
    end(log)
    heard = manager.until("STOPPING=1")
    assert not [part for part in heard if part.startswith(("READY", "RELOADING"))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("policy = ", ["not TOML"]),
        (TOML.replace("actor", "critic"), ["'critic'", "Restart"]),
        (TOML.replace("policies:mlp", "policies:nothing"), ["no attribute"]),
        (TOML + "[select]\norder = 'size'\n", ["order"]),
        (TOML.replace('checkpoints = "runs"', ""), ["no checkpoints are named"]),
    ],
)
def test_broken_settings_leave_the_old_ones(watch: Watch, runs: Path, text: str, words: list[str]) -> None:
    """What cannot be taken is an error in the log, one line, and the watch goes on as it was."""
    log = watch("--poll", NO_POLL)
    log.until("empty")
    Path("actor.toml").write_text(text)
    log.process.send_signal(signal.SIGHUP)
    line = log.until("SIGHUP")
    assert "error" in line and "the old settings stay" in line and all(word in line for word in words)
    write(runs / "step_1.safetensors", mlp(), 1.0)
    log.until("version 1", "actor")
    end(log)


def test_sighup_of_an_import_string_is_told_and_ignored(watch: Watch, runs: Path) -> None:
    """Without a TOML there is nothing to read again; the watch goes on."""
    log = watch("runs", spec=SPEC)
    log.process.send_signal(signal.SIGHUP)
    assert "nothing to read again" in log.until("SIGHUP")
    write(runs / "step_1.safetensors", mlp(), 1.0)
    log.until("version 1")
    end(log)


def test_sigterm_ends_it_also_right_after_sighup(watch: Watch) -> None:
    """Two signals at once are both obeyed."""
    log = watch("--poll", NO_POLL)
    log.process.send_signal(signal.SIGHUP)
    end(log)


def test_figures_of_a_standing_port_change_as_far_as_they_can(watch: Watch, runs: Path) -> None:
    """A new --max-staleness holds at once; another port is told to need a restart, and the old one stays."""
    pytest.importorskip("prometheus_client")
    Path("actor.toml").write_text(TOML + "[metrics]\nport = 0\n")
    write(runs / "step_1.safetensors", mlp(), 1.0)
    log = watch("--poll", "0.05")
    address = log.until("figures on").partition("figures on ")[2].partition("/metrics")[0]
    log.until("version 1")
    write(runs / "step_2.safetensors", mlp(), float("nan"))
    log.until("rejected")
    assert healthy(address)
    Path("actor.toml").write_text(TOML + "[metrics]\nport = 1\nmax_staleness = 0.1\n")
    log.process.send_signal(signal.SIGHUP)
    line = log.until("SIGHUP")
    assert "metrics.max_staleness changed" in line and "port" not in line
    assert "metrics.port changed, which needs a restart" in log.until("warning")
    deadline = time.monotonic() + DEADLINE
    while healthy(address):  # the newest is refused, so that nothing was good since
        assert time.monotonic() < deadline
    end(log)


def test_what_may_be_secret_stays_out_of_the_log() -> None:
    """Of settings only that they changed is told."""
    before = Spec(SPEC, NAME, Path("/"), {"token": "old secret"})
    after = Spec(SPEC, NAME, Path("/"), {"token": "new secret"}, poll=2.0)
    assert differing(before, after) == ["policy_kwargs", "poll"]


def terminal(spawn: Spawn, *options: str, **variables: str) -> tuple[subprocess.Popen[str], int]:
    """A watch on a terminal of its own, and the other side of that terminal."""
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLORTERM")}
    environment |= {"TERM": "xterm-256color", **variables}
    process = spawn("-c", OWN_TERMINAL, "watch", *options, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    return process, ours


def seen(ours: int, word: bytes) -> bytes:
    """What stands on a terminal up to a word."""
    text, deadline = b"", time.monotonic() + DEADLINE
    while word not in text:
        assert select.select([ours], [], [], deadline - time.monotonic())[0], text
        text += os.read(ours, 65536)
    return text


def rest(ours: int) -> bytes:
    """What still comes to a terminal until nobody has it open any more; a reader that left early would hang it up."""
    text, deadline = b"", time.monotonic() + DEADLINE
    try:
        while select.select([ours], [], [], deadline - time.monotonic())[0]:
            text += os.read(ours, 65536)
    except OSError:  # EIO: the last one closed it
        return text
    finally:
        os.close(ours)
    pytest.fail(f"it was not closed: {text!r}")


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}])
def test_no_color_is_obeyed_on_a_terminal(spawn: Spawn, runs: Path, variables: dict[str, str]) -> None:
    """A terminal gets colours, and none where NO_COLOR is set."""
    write(runs / "step_1.safetensors", mlp(), float("nan"))
    process, ours = terminal(spawn, "actor.toml", **variables)
    text = seen(ours, b"NaN or infinity")
    process.send_signal(signal.SIGTERM)
    text += rest(ours)
    assert process.wait(DEADLINE) == 0
    colours = re.findall(rb"\x1b\[[0-9;]*?(?<![0-9])(?:3[0-8]|4[0-8]|9[0-7])[0-9;]*m", text)
    assert bool(colours) == (not variables)


def test_a_name_cannot_steer_a_terminal(spawn: Spawn, runs: Path) -> None:
    """An escape sequence in a checkpoint's name is shown, not obeyed, by the log above the panel too."""
    process, ours = terminal(spawn, "actor.toml", NO_COLOR="1")
    seen(ours, b"empty")
    write(runs / "step_1\x1b[2J.safetensors", mlp(), float("nan"))
    text = seen(ours, b"expected")
    assert b"\x1b[2J" not in text and rb"step_1\x1b[2J" in text
    process.send_signal(signal.SIGTERM)
    assert b"stopped" in rest(ours)
    assert process.wait(DEADLINE) == 0


def test_a_closed_terminal_ends_a_watch(spawn: Spawn, runs: Path) -> None:
    """SIGHUP from a terminal that is gone is no wish for new settings: nobody is there to stop an orphan."""
    process, ours = terminal(spawn, "actor.toml", "--log-format", "plain", "--poll", NO_POLL)
    seen(ours, b"next pass.\r\n")
    os.close(ours)
    assert process.wait(DEADLINE) == 0


def test_sighup_beside_a_standing_terminal_reads_again(spawn: Spawn, runs: Path) -> None:
    """kill -HUP of a watch in an open window does what it does elsewhere."""
    process, ours = terminal(spawn, "actor.toml", "--log-format", "plain", "--poll", NO_POLL)
    seen(ours, b"empty")
    process.send_signal(signal.SIGHUP)
    assert b"nothing changed" in seen(ours, b"nothing changed")
    process.send_signal(signal.SIGTERM)
    assert b"stopped" in rest(ours)
    assert process.wait(DEADLINE) == 0


def test_the_plain_log_is_one_line_an_event(watch: Watch, runs: Path) -> None:
    """Without a terminal each line has a time, a level and its event whole, also with what differs, and no colour."""
    log = watch(FORCE_COLOR="1", TERM="xterm")
    write(runs / "step_1.safetensors", mlp(hidden=3), 1.0)
    line = log.until("rejected")
    assert "0.weight: expected F32 [8, 4], found F32 [3, 4]; 2.weight" in line
    odd = os.fsencode(runs) + b"/step_2\n\x1b[31m\xff.safetensors"
    os.rename(write(runs / ".hidden.tmp", mlp(), 1.0), odd)
    assert r"step_2\n\x1b[31m\udcff.safetensors" in log.until("version 1")
    end(log)
    form = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (?:info|warning|error) {0,4} actor: .*")
    assert len(log.seen) >= 4
    assert all(form.fullmatch(line) and line.isprintable() for line in log.seen), log.seen


def test_the_json_log_is_objects_whatever_comes(watch: Watch, runs: Path) -> None:
    """Each line is one object with time, level, event and name, also with an odd file name or an error of many rows."""
    log = watch("--log-format", "json")
    os.rename(write(runs / ".hidden.tmp", mlp(), 1.0), os.fsencode(runs) + b"/step_2\n\xff.safetensors")
    log.until("published")
    log.process.send_signal(signal.SIGHUP)
    log.until("reload")
    end(log)
    records = [json.loads(line) for line in log.seen]
    assert all({"time", "level", "event", "name"} <= {*record} for record in records)
    assert records[0]["event"] == "watch" and records[-1]["event"] == "stop"


def test_a_log_line_is_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    """Thousands of differences, of a refusal or of an error, are a few and how many more."""
    rows = tuple(Difference(f"w{i}", "F32 [1]", "nothing") for i in range(1000))
    with WatchLog(NAME, Path("runs"), "plain", lambda: None) as log:
        log.tell(Outcome("rejected", NAME, reason="it does not fit", differences=rows, identity="1"))
        log.tell(LayoutDiffers("another architecture", rows))
        log.tell(WsyncError("first\n\n  second"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "first; second" in lines[3]
    for line in lines[1:3]:
        assert f"w{LOGGED - 1}: expected F32 [1], found nothing; {1000 - LOGGED} more" in line and len(line) < 400
    assert one_line("tab\there") == r"tab\there"


def test_a_log_in_a_latin_1_locale_does_not_fail(spawn: Spawn, runs: Path) -> None:
    """Where the output cannot carry a character it is written as an escape."""
    write(runs / "step_1.safetensors", mlp(), 1.0).rename(runs / "step_1 ☃.safetensors")
    log = Lines(spawn("-m", "wsync", "watch", "actor.toml", env={**os.environ, "PYTHONIOENCODING": "latin-1:strict"}))
    assert r"\u2603" in log.until("version 1")
    end(log)
    assert sys.stdout.encoding


def test_the_last_line_tells_what_is_live(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards who reads why a watch stopped: a rollback, by another process, put another version live since."""
    with WatchLog("nets", Path("runs"), "plain", lambda: None) as log:
        log.tell(Outcome("published", "nets", version=2))
        log.tell(Outcome("pinned", "nets", version=3))
        log.tell(WsyncError("the disk is gone"))
    assert "stopped; version 3 stays live" in capsys.readouterr().out.splitlines()[-1]


def test_how_long_all_readers_took_is_told_once(runtime: Path) -> None:
    """Guards the figure of a watch: seconds from the publish until the last reader had it, whenever that is seen."""
    trainer, reach = Trainer(mlp), Reach()
    assert reach.look(None, 0) is None
    trainer.push(1)
    assert reach.look(trainer.segment, 1) is None  # nobody is there to be told of
    with wsync.attach(mlp(), "nets") as reader, torch.no_grad():
        trainer.push(2)
        assert reach.look(trainer.segment, 2) is None
        reader.refresh()
        told = reach.look(trainer.segment, 0)
        assert told and told[:2] == (2, 1) and 0 <= told[2] < DEADLINE
        assert reach.look(trainer.segment, 0) is None
        trainer.push(3)
        trainer.push(4)  # another publisher's
        assert reach.look(trainer.segment, 3) is None
        reader.refresh()
        assert reach.look(trainer.segment, 0) is None
