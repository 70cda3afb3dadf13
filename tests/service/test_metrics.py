"""The figures: what they count, over HTTP and in the node exporter's file, from real pushes and watches."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from builders import NAME, SPEC, write
from policies import mlp
from processes import DEADLINE, Cli, Lines, Spawn

import wsync
from wsync.errors import UsageError, WsyncError
from wsync.layout.layout import layout_of
from wsync.segment.reader_records import Registration
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import Metrics, load_spec
from wsync.sync.outcome import EXIT_CODES, Outcome
from wsync.sync.syncer import Syncer

pytestmark = pytest.mark.slow

parser = pytest.importorskip("prometheus_client.parser")

from wsync.service.metrics import MAX_READERS, STATUSES, Figures, Live, reasons  # noqa: E402
from wsync.service.metrics_endpoint import (  # noqa: E402  (they need the client)
    PATIENCE,
    Endpoint,
    Monitor,
    _Server,
)

Samples = dict[tuple[str, ...], float]


@pytest.fixture
def runs(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory of checkpoints, and the standing segment of its policy with nothing in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    WritableSegment.create(NAME, layout_of(mlp()), spec=load_spec(SPEC).fingerprint()).close()
    return Path("runs")


@pytest.fixture
def serving(spawn: Spawn, runs: Path) -> Callable[..., tuple[Lines, str]]:
    """Starts a watch that serves figures on a free port; gives its log and the address without a path."""

    def start(*options: str) -> tuple[Lines, str]:
        log = Lines(spawn("-m", "wsync", "watch", SPEC, "runs", "--metrics-port", "0", "--poll", "0.05", *options))
        return log, log.until("figures on").partition("figures on ")[2].partition("/metrics")[0]

    return start


def parsed(text: str) -> Samples:
    """Value by sample name and labels other than ``name``, which must be there."""
    samples = [s for family in parser.text_string_to_metric_families(text) for s in family.samples]
    assert samples and {s.labels["name"] for s in samples} == {NAME}
    found = {(s.name, *(v for k, v in sorted(s.labels.items()) if k != "name")): s.value for s in samples}
    assert len(found) == len(samples)
    return found


def samples_of(collector: Any) -> list[Any]:
    return [sample for family in collector.collect() for sample in family.samples]


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=DEADLINE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with closing(exc):
            return exc.code, exc.read().decode()


def until(look: Callable[[], bool]) -> None:
    """Looks again, with a deadline, until it is so: over HTTP there is no other event to wait for."""
    deadline = time.monotonic() + DEADLINE
    while not look():
        assert time.monotonic() < deadline


def outcome(status: str, **more: object) -> Outcome:
    return Outcome(status=status, name=NAME, **more)  # type: ignore[arg-type]


def test_a_watch_tells_when_all_readers_have_a_version(serving: Callable[..., tuple[Lines, str]], runs: Path) -> None:
    """Once in the log for programs, and as a figure: seconds from the publish until the last reader had it."""
    log, url = serving("--log-format", "json")
    write(runs / "step_7.safetensors", mlp(), 1.0)
    log.until('"version": 1')
    with wsync.attach(mlp(), NAME) as reader:
        write(runs / "step_8.safetensors", mlp(), 1.0)
        log.until('"version": 2')
        assert ("wsync_time_to_all_readers_seconds",) not in parsed(get(f"{url}/metrics")[1])
        assert reader.wait(DEADLINE) and reader.refresh()
        told = json.loads(log.until('"event": "reached"'))
        assert (told["version"], told["readers"]) == (2, 1) and 0 < told["seconds"] < DEADLINE
        found = parsed(get(f"{url}/metrics")[1])
        assert round(found["wsync_time_to_all_readers_seconds",], 6) == told["seconds"]


def test_a_watch_serves_what_happened(serving: Callable[..., tuple[Lines, str]], runs: Path) -> None:
    """Over HTTP stand versions, passes, bytes, refusals by reason, readers' lag and ages, as they came about."""
    log, url = serving()
    assert get(f"{url}/healthz")[0] == 503
    assert parsed(get(f"{url}/metrics")[1])["wsync_version",] == 0
    write(runs / "step_7.safetensors", mlp(), 1.0)
    log.until("version 1")
    with wsync.attach(mlp(), NAME, mode="copy"):
        write(runs / "step_8.safetensors", mlp(), 1.0)
        log.until("version 2")
        write(runs / "step_9.safetensors", mlp(), float("nan"))
        log.until("rejected")
        found = parsed(get(f"{url}/metrics")[1])
        lags = {labels[1]: value for labels, value in found.items() if labels[0] == "wsync_reader_lag_versions"}
    assert (found["wsync_version",], found["wsync_step",], found["wsync_readers",]) == (2, 8, 1)
    assert list(lags.values()) == [1] and next(iter(lags)).endswith(f"-{os.getpid()}")
    assert found["wsync_sync_count_total", "published"] == 2
    assert found["wsync_staged_bytes_total",] == 2 * layout_of(mlp()).nbytes
    assert found["wsync_sync_duration_seconds_count", "published"] == 2
    assert found["wsync_sync_duration_seconds_bucket", "+Inf", "published"] == 2
    assert 0 < found["wsync_sync_duration_seconds_sum", "published"] < 2 * DEADLINE
    assert {r: found["wsync_rejected_total", r] for r in reasons()} == {r: float(r == "non_finite") for r in reasons()}
    assert abs(time.time() - found["wsync_last_success_timestamp_seconds",]) < DEADLINE
    assert 0 <= found["wsync_checkpoint_age_seconds",] < DEADLINE
    assert get(f"{url}/healthz") == (200, f"{NAME}: version 2\n")


def test_a_refusal_counts_once_over_many_passes(serving: Callable[..., tuple[Lines, str]], runs: Path) -> None:
    """Passes that meet the same refused checkpoint again are passes, and not further refusals."""
    log, url = serving()
    write(runs / "step_1.safetensors", mlp(hidden=3), 1.0)
    log.until("rejected")
    until(lambda: parsed(get(f"{url}/metrics")[1])["wsync_sync_count_total", "rejected"] > 3)
    assert parsed(get(f"{url}/metrics")[1])["wsync_rejected_total", "mismatch"] == 1


def test_a_refusal_that_is_tried_anew_counts_once() -> None:
    """A checkpoint that is refused again under settings that were read again is the same refused checkpoint."""
    figures = Figures(NAME)
    for identity in ("1-1-1-1", "1-1-1-1", "1-1-1-2"):
        figures.tell(outcome("rejected", kind="mismatch", identity=identity))
    for _ in range(2):
        figures.tell(outcome("published", passed_over=(outcome("rejected", kind="malformed", identity="1-1-1-3"),)))
    counts = {(s.name, s.labels.get("reason")): s.value for s in samples_of(figures.registry)}
    assert (counts["wsync_rejected_total", "mismatch"], counts["wsync_rejected_total", "malformed"]) == (2, 1)


def test_stale_is_unhealthy_and_recovers(serving: Callable[..., tuple[Lines, str]], runs: Path) -> None:
    """A source that is gone for longer than --max-staleness is 503, and one that is back is 200."""
    log, url = serving("--max-staleness", "0.5")
    write(runs / "step_1.safetensors", mlp(), 1.0)
    log.until("version 1")
    until(lambda: get(f"{url}/healthz")[0] == 200)
    runs.rename("elsewhere")
    until(lambda: get(f"{url}/healthz")[0] == 503)
    assert "0.5 s are allowed" in get(f"{url}/healthz")[1]
    Path("elsewhere").rename(runs)
    until(lambda: get(f"{url}/healthz")[0] == 200)


def test_a_trainer_that_is_done_makes_nothing_stale(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks that find the newest live keep a watch healthy; refusals, failures and silence do not."""
    clock = [1000.0]
    monkeypatch.setattr("wsync.service.metrics.time.monotonic", lambda: clock[0])
    figures = Figures(NAME)
    write(runs / "step_1.safetensors", mlp(), 1.0)
    with Syncer(load_spec(SPEC), runs) as syncer:
        figures.tell(syncer.once())
        clock[0] += 9
        figures.tell(syncer.once())
    clock[0] += 9
    assert figures.health(10)[0] and figures.health(None)[0]
    figures.tell(outcome("rejected", kind="mismatch"))
    figures.tell(WsyncError("failed"))
    clock[0] += 2
    assert not figures.health(10)[0] and figures.health(None)[0]


def test_only_get_and_head_of_two_paths(serving: Callable[..., tuple[Lines, str]]) -> None:
    """Nothing else is answered: other paths are 404, other methods refused, HEAD has no body."""
    _, url = serving()
    with closing(HTTPConnection(url.removeprefix("http://"), timeout=DEADLINE)) as client:
        for method, path, status in (
            ("GET", "/", 404),
            ("GET", "/metrics/..", 404),
            ("POST", "/metrics", 405),
            ("HEAD", "/metrics", 200),
        ):
            client.request(method, path)
            answer = client.getresponse()
            body = answer.read()
            assert answer.status == status, (method, path)
            assert bool(body) == (method != "HEAD")
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), DEADLINE) as plain:
        plain.sendall(b"HEAD /metrics HTTP/1.0\r\n\r\n")
        head, _, body = plain.makefile("rb").read().partition(b"\r\n\r\n")
    assert b"200 OK" in head and body == b""
    request = urllib.request.Request(f"{url}/metrics", headers={"Accept": "application/openmetrics-text"})
    with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        assert answer.read().endswith(b"# EOF\n")


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n",
        b"nonsense\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"GET /metrics?name[]=%ff%00 HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text;version=x\r\n\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"X: x\r\n" * 200 + b"\r\n",
        b"GET /healthz HT",
        b"GET http://[::1/metrics HTTP/1.1\r\n\r\n",
        b"GET //[x/metrics HTTP/1.1\r\nAccept: \xff;q=;=\r\nHost: [::1\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\n\r\n",
    ],
)
def test_an_odd_request_leaves_no_traceback(runs: Path, capfd: pytest.CaptureFixture[str], request_: bytes) -> None:
    """What a scanner sends, or a client that goes away, is answered or dropped, without a word in the log."""
    with closing(Endpoint(Figures(NAME), "127.0.0.1", 0)) as endpoint:
        with socket.create_connection(("127.0.0.1", endpoint.port), DEADLINE) as client:
            client.sendall(request_)
            client.shutdown(socket.SHUT_WR)
            try:
                while client.recv(65_536):
                    pass
            except ConnectionResetError:  # what it did not read of a request that is too long
                pass
        assert get(f"http://127.0.0.1:{endpoint.port}/metrics")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_read_is_400(runs: Path) -> None:
    """Half an IPv6 host, or a version that is no number, is the client's fault; a whole address is taken."""
    with closing(Endpoint(Figures(NAME), "127.0.0.1", 0)) as endpoint:
        for target, accept, status in (
            ("http://[::1/metrics", "*/*", b"400"),
            ("/metrics", "application/openmetrics-text;version=x", b"400"),
            ("http://[::1]/metrics", "*/*", b"200"),
        ):
            with socket.create_connection(("127.0.0.1", endpoint.port), DEADLINE) as client:
                client.sendall(f"GET {target} HTTP/1.1\r\nAccept: {accept}\r\n\r\n".encode())
                assert client.makefile("rb").readline().split()[1] == status, (target, accept)


@pytest.mark.parametrize("drips", [False, True])
def test_slow_clients_keep_nobody_waiting(
    runs: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, drips: bool
) -> None:
    """The oldest of too many clients goes at once, the others when their time is up, and their threads end."""
    assert PATIENCE <= 10
    monkeypatch.setattr(_Server, "patience", 0.5)
    before = threading.active_count()
    with closing(Endpoint(Figures(NAME), "127.0.0.1", 0)) as endpoint, ExitStack() as stack:
        where = "127.0.0.1", endpoint.port
        slow = [stack.enter_context(socket.create_connection(where, DEADLINE)) for _ in range(100)]
        slow[-1].sendall(b"GET /metrics HT")
        assert get(f"http://127.0.0.1:{endpoint.port}/healthz")[0] == 503
        while drips and not select.select([slow[-1]], [], [], 0.05)[0]:
            with suppress(OSError):
                slow[-1].sendall(b"x")
        for client in slow:
            with suppress(ConnectionResetError):
                assert client.recv(1) == b""
        until(lambda: threading.active_count() == before + 1)  # which is the server's own
    assert capfd.readouterr() == ("", "")


def test_it_listens_on_the_loopback_alone(serving: Callable[..., tuple[Lines, str]]) -> None:
    """Unless told otherwise nobody else reaches the port."""
    _, url = serving()
    assert url.startswith("http://127.0.0.1:")
    port = int(url.rpartition(":")[2])
    local = {line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
    assert f"0100007F:{port:04X}" in local and f"00000000:{port:04X}" not in local


def test_a_port_that_is_taken_is_usage(cli: Cli, runs: Path) -> None:
    """The watch says so before it looks at anything, and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = cli("watch", SPEC, "runs", "--metrics-port", str(port))
    assert done.returncode == 2 and str(port) in done.stderr and "--metrics-port 0" in done.stderr


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--metrics-port", "70000"], "65535"),
        (["--metrics-file", "figures.txt"], ".prom"),
        (["--metrics-file", "nowhere/figures.prom"], "nowhere"),
        (["--max-staleness", "-1"], "above 0"),
        (["--max-staleness", "nan"], "above 0"),
        (["--max-staleness", "1", "--poll", "2"], "--poll"),
        (["--metrics-address", "203.0.113.7", "--metrics-port", "0"], "--metrics-address"),
    ],
)
def test_impossible_settings_are_usage(cli: Cli, runs: Path, options: list[str], word: str) -> None:
    """What cannot work is 2 and one message, before anything is published."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    done = cli("watch", SPEC, "runs", *options)
    assert (done.returncode, done.stdout) == (2, "") and word in done.stderr and "Traceback" not in done.stderr
    assert Segment.open(NAME).version == 0


def test_a_failed_hook_is_in_the_file(cli: Cli, runs: Path) -> None:
    """A hook that fails each night is seen in the figures, also where nobody reads cron's mail."""
    for step, command in enumerate(("exit 1", "true"), 1):
        write(runs / f"step_{step}.safetensors", mlp(), 1.0)
        assert cli("push", SPEC, "runs", "--exec", command, "--metrics-file", "wsync.prom").returncode == 0
        found = parsed(Path("wsync.prom").read_text())
        assert found["wsync_last_run_hook_failures", "exec"] == (command == "exit 1")
        assert found["wsync_last_run_hook_failures", "webhook"] == 0


def test_a_push_leaves_what_is_live_and_how_it_ended(program: Cli, runs: Path) -> None:
    """Each run of a cron job tells its time and exit code; what is live, and the last success, outlive a bad run."""
    file = Path("wsync.prom")
    push = ("push", SPEC, "runs", "--metrics-file", str(file))

    def run(code: int) -> Samples:
        began = time.time()
        assert program(*push, umask=0o077).returncode == code  # cron's may be anything; the node exporter must read it
        assert file.stat().st_mode & 0o777 == 0o644
        assert sorted(path.name for path in Path().iterdir()) == ["runs", "wsync.prom"]
        found = parsed(file.read_text())
        assert began <= found["wsync_last_run_timestamp_seconds",] <= time.time()
        assert 0 < found["wsync_last_run_duration_seconds",] < DEADLINE
        assert found["wsync_last_run_exit_code",] == code
        return found

    empty = run(66)
    assert (empty["wsync_version",], empty["wsync_last_success_timestamp_seconds",]) == (0, 0)
    write(runs / "step_1.safetensors", mlp(), 1.0)
    published, current = run(0), run(0)
    assert (published["wsync_version",], published["wsync_step",]) == (1, 1)
    success = current["wsync_last_success_timestamp_seconds",]
    assert success > published["wsync_last_success_timestamp_seconds",] > 1e9
    write(runs / "step_2.safetensors", mlp(), float("inf"))
    bad = run(65)
    assert (bad["wsync_version",], bad["wsync_last_success_timestamp_seconds",]) == (1, success)
    assert not [name for name, *_ in bad if name.endswith(("_total", "_count"))]  # which no single run can tell


def test_a_failed_push_is_told(cli: Cli, runs: Path, runtime: Path) -> None:
    """A push that ends with an error says so in the file."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    (runtime / NAME / "layout.json").write_text("{}")
    assert cli("push", SPEC, "runs", "--metrics-file", "wsync.prom").returncode == 1
    assert parsed(Path("wsync.prom").read_text())["wsync_last_run_exit_code",] == 1


def test_a_file_that_cannot_be_written_stops_no_push(cli: Cli, runs: Path) -> None:
    """Where the figures cannot be written the push says so, and its weights are live all the same."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    Path("out").mkdir()
    result = cli("push", SPEC, "runs", "--metrics-file", "out/wsync.prom", "--exec", "rmdir out")
    assert result.returncode == 0 and "out/wsync.prom" in result.stderr and "Traceback" not in result.stderr
    assert Segment.open(NAME).version == 1


def test_a_dry_run_leaves_no_figures(cli: Cli, runs: Path) -> None:
    """A rehearsal is no pass that monitoring shall see."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    assert cli("push", SPEC, "runs", "--dry-run", "--metrics-file", "wsync.prom").returncode == 0
    assert not Path("wsync.prom").exists()


@pytest.mark.parametrize(
    "text",
    [
        'wsync_version{name="another"} 3\n',
        "node_load1 0.5\n",
        'systemd_unit_state{name="policies.mlp"} 1\n',
        "root:x:0:0:root:/root:/bin/sh\n",
    ],
)
def test_a_file_that_is_not_ours_is_left_alone(cli: Cli, runs: Path, text: str) -> None:
    """Another segment's figures, and what is none at all, are not overwritten."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    Path("wsync.prom").write_text(text)
    done = cli("push", SPEC, "runs", "--metrics-file", "wsync.prom")
    assert done.returncode == 2 and "wsync.prom" in done.stderr and "Traceback" not in done.stderr
    assert Path("wsync.prom").read_text() == text and Segment.open(NAME).version == 0


def test_a_lost_file_does_not_stop_a_watch(spawn: Spawn, runs: Path) -> None:
    """Where the figures cannot be written the log says so once, and weights still go live."""
    Path("out").mkdir()
    options = ("--metrics-file", "out/wsync.prom", "--poll", "0.05")
    log = Lines(spawn("-m", "wsync", "watch", SPEC, "runs", *options))
    log.until("watching")
    until(Path("out/wsync.prom").exists)
    Path("out").rename("gone")
    for step in (1, 2):
        write(runs / f"step_{step}.safetensors", mlp(), 1.0)
        log.until(f"version {step}")
    log.process.send_signal(signal.SIGTERM)
    log.rest()
    assert log.process.returncode == 0
    assert len([line for line in log.seen if "error" in line and "wsync.prom" in line]) == 1


def test_a_watch_leaves_its_last_figures_in_the_file(spawn: Spawn, runs: Path) -> None:
    """What was counted before the end stands in the file after it."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    log = Lines(spawn("-m", "wsync", "watch", SPEC, "runs", "--metrics-file", "wsync.prom"))
    log.until("version 1")
    log.process.send_signal(signal.SIGTERM)
    assert log.process.wait(DEADLINE) == 0
    found = parsed(Path("wsync.prom").read_text())
    assert (found["wsync_version",], found["wsync_sync_count_total", "published"]) == (1, 1)


def test_quiet_passes_are_written_now_and_then_and_at_the_end(runs: Path) -> None:
    """Passes that find nothing new do not write a file each; what they counted is there after the end."""
    monitor = Monitor(NAME, Metrics(file="wsync.prom"), None, lambda exc: pytest.fail(str(exc)))
    for _ in range(9):
        monitor.tell(outcome("current"))
    assert parsed(Path("wsync.prom").read_text())["wsync_sync_count_total", "current"] == 1
    monitor.close()
    assert parsed(Path("wsync.prom").read_text())["wsync_sync_count_total", "current"] == 9


def test_without_the_client_one_line_says_what_to_install(runs: Path) -> None:
    """The core needs no prometheus-client; who asks for figures is told of the extra, and nothing is published."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    code = "import sys; sys.modules['prometheus_client'] = None; from wsync.cli.commands import main; main()"
    command = [sys.executable, "-c", code, "push", SPEC, "runs"]
    done = subprocess.run([*command, "--metrics-file", "a.prom"], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 2 and "wsync[metrics]" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr


def test_who_asks_for_no_figures_loads_nothing_for_them(program: Cli, runs: Path) -> None:
    """A push without the option imports neither the client nor what serves it."""
    done = program("push", SPEC, "runs", env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "wsync.sync.syncer" in loaded
    figures = {"wsync.service.metrics", "wsync.service.metrics_endpoint", "wsync.service.systemd"}
    assert not {"prometheus_client", "http.server", *figures} & loaded


def test_reader_labels_are_few_and_harmless(runs: Path) -> None:
    """However many readers there are and whatever their programs are called, the labels are bounded and plain."""
    segment = Segment.open(NAME)
    odd = 'a"b\n{x}\\' * 9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [odd])
        named = Registration(segment.path, "copy")
        pids = iter(range(10_000))
        patch.setattr("wsync.segment.reader_records.os.getpid", lambda: next(pids))
        many = [Registration(segment.path, "copy") for _ in range(MAX_READERS)]
    figures = [(sample.name, sample.labels.get("reader"), sample.value) for sample in samples_of(Live(NAME))]
    labels = [reader for name, reader, _ in figures if name == "wsync_reader_lag_versions"]
    for registration in (named, *many):
        registration.close()
    assert ("wsync_readers", None, MAX_READERS + 1) in figures and len(labels) == MAX_READERS
    assert all(len(label) < 45 and label.replace("_", "").replace("-", "").isalnum() for label in labels)


def test_readers_of_one_process_share_a_label(runs: Path) -> None:
    """Two readers in a process give one sample, of the one that lags most; two would break the exposition."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    with Syncer(load_spec(SPEC), runs) as syncer:
        syncer.once()
        with wsync.attach(mlp(), NAME, mode="copy"), wsync.attach(mlp(), NAME, mode="copy") as fresh:
            write(runs / "step_2.safetensors", mlp(), 1.0)
            syncer.once()
            fresh.refresh()
            lags = [sample.value for sample in samples_of(Live(NAME)) if sample.name == "wsync_reader_lag_versions"]
    assert lags == [1]


def test_every_status_and_reason_is_there_from_zero() -> None:
    """Counters begin at 0 for all that can come, so that the first one is an increase."""
    assert {*EXIT_CODES} - {"checked"} <= {*STATUSES}
    families = {family.name: family for family in Figures("x").registry.collect()}
    assert all(name.startswith("wsync_") and family.documentation for name, family in families.items())
    samples = [sample for family in families.values() if family.type == "counter" for sample in family.samples]
    assert {sample.value for sample in samples} == {0} and all(sample.labels["name"] == "x" for sample in samples)
    assert {sample.labels["status"] for sample in families["wsync_sync_count"].samples} == {*STATUSES}
    assert {sample.labels["reason"] for sample in families["wsync_rejected"].samples} == {*reasons()}
    assert {sample.labels["hook"] for sample in families["wsync_hook_runs"].samples} == {"exec", "webhook"}
    assert {"malformed", "mismatch", "non_finite", "rejected"} <= {*reasons()}


def test_the_toml_has_them_all(runs: Path) -> None:
    """[metrics] takes each setting; its file lies beside the TOML."""
    Path("sub").mkdir()
    Path("sub/a.toml").write_text(
        'policy = "policies:mlp"\n[metrics]\nport = 0\naddress = "::1"\nfile = "a.prom"\nmax_staleness = 60\n'
    )
    settings = load_spec("sub/a.toml").metrics
    assert settings == Metrics(0, "::1", str(Path("sub/a.prom").absolute()), 60)
    with pytest.raises(UsageError, match="metrics.prot"):
        Path("sub/a.toml").write_text('policy = "policies:mlp"\n[metrics]\nprot = 0\n')
        load_spec("sub/a.toml")
