"""``wsync bench``: what it counts and shows, that every row is there and nothing is left behind; never a time."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import select
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from processes import DEADLINE, Cli, Spawn
from rich.console import Console

from wsync.bench import cases
from wsync.bench.rows import Aim, Row, Settings, Skip, compare, parse_size
from wsync.bench.workspace import Workspace, private_workspace
from wsync.cli.output.bench import amount, as_json, print_rows
from wsync.cli.terminal import unwind_at
from wsync.errors import UsageError

pytestmark = pytest.mark.slow

BOX = {"processor": "one", "cores": 2, "memory_free": 1, "load": 9.0, "kernel": "6", "python": "3", "torch": "2"}
SLOW = Row("something slow", "s", ((2.0, 1.0), (3.0, 1.5)), "the usual way", Aim("<=", 1.5))
FAST = Row("something fast", "B/s", ((9e9, 1e10),), "a copy", Aim(">=", 0.8))
ABSENT = Row("absent", aim=Aim("<=", 1.0), skipped="it is [not] installed", case="absent")
BROKEN_ROW = Row("broken", failed="out of luck", case="broken")
ALONE = Row("something by itself", "%", ((0.2,),), aim=Aim("<=", 0.3))


@pytest.fixture
def settings(runtime: Path, tmp_path: Path) -> Settings:
    """A small measurement in private places."""
    return Settings(size=1 << 20, tensors=8, quick=True, directory=tmp_path, runtime=runtime)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 64 << 20),
        ("1GiB", 1 << 30),
        ("1.5 kib", 1536),
        ("100MB", 100_000_000),
        ("4096", 4096),
        ("2M", 2_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """Bytes in the units that people write."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "0", "-1", "1e9", "64 apples", "1IB", "nan", "99999999TiB"])
def test_what_is_no_size(text: str) -> None:
    """Guards against a misread number: the message repeats it, and shows what one looks like."""
    with pytest.raises(UsageError, match=f"{re.escape(repr(text))}.*64MiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "many"], ["--size", "'many'", "64MiB"]),
        (["--size", "10", "--tensors", "200"], ["--size 10", "800"]),
        (["--readers", "65"], ["--readers", "65", "64"]),
        (["--tensors", "0"], ["--tensors", "0"]),
        (["--only", "nonsense"], ["'nonsense'", "staging"]),
        (["--dir", "/nowhere"], ["/nowhere", "--dir"]),
        (["--runtime-dir", "/nowhere"], ["/nowhere", "--runtime-dir"]),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(cli: Cli, options: list[str], words: list[str]) -> None:
    """Guards against a minute of work before a misspelt option is told: 2, one message, no traceback."""
    done = cli("bench", "--quick", *options)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_a_missed_aim_is_shown_as_missed(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the verdict: what is too slow says so in a word, what is fast enough says so, too."""
    rows = [SLOW, FAST, ABSENT, BROKEN_ROW, ALONE]
    assert [row.met for row in rows] == [False, True, None, None, True]
    print_rows(Settings(), BOX, rows)
    shown = capsys.readouterr().out
    slow, fast, alone = (next(line for line in shown.splitlines() if row.name in line) for row in (SLOW, FAST, ALONE))
    assert re.search(r"2.5 s the usual way +1.25 s +2 <= 1.5 +MISSED *$", slow), slow
    assert re.search(r"9 GB/s a copy +10 GB/s +0.9 >= 0.8 +met *$", fast) and re.search(r"<= 0.3 % met *$", alone)
    assert "absent not measured: it is [not] installed" in shown and "broken failed: out of luck" in shown
    assert "2 of 3 aims met" in shown and "busy" in shown
    assert [row["met"] for row in as_json(Settings(), BOX, rows)["results"]] == [False, True, None, None, True]


def test_figures_for_people() -> None:
    """Each unit is written as people write it."""
    assert [amount(v, "s") for v in (96e-9, 15e-6, 0.02, 0.9999, 3.0)] == ["96 ns", "15 us", "20 ms", "1 s", "3 s"]
    assert [amount(0.12, "%"), amount(2e9, "B/s"), amount(5e6, "B")] == ["0.12 %", "2 GB/s", "5 MB"]


def test_measured_in_turn() -> None:
    """Guards against a box that is busy for a while: A B A B after one round to warm up, neighbours compared."""
    calls: list[str] = []

    def work(name: str, figures: Iterator[float]) -> Callable[[], float]:
        def run() -> float:
            calls.append(name)
            return next(figures)

        return run

    ours, other = work("A", iter([100.0, 1.0, 2.0])), work("B", iter([1.0, 2.0, 8.0]))
    row = compare("made up", ours, "the other", other, None, 2)
    assert calls == ["A", "B"] * 3
    assert row.samples == ((1.0, 2.0), (2.0, 8.0))
    assert (row.ratio, row.value, row.beside_value) == (0.375, 1.5, 5.0)


def test_speeds_are_compared_as_speeds() -> None:
    """Guards against a ratio turned over: of speeds more is better, and it is of the figures that are shown."""
    row = compare("made up", lambda: 2.0, "the other", lambda: 1.0, Aim(">=", 0.85), 3, nbytes=10)
    assert (row.value, row.beside_value, row.ratio, row.met) == (5.0, 10.0, 0.5, False)


def test_one_round_is_made_whatever_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a figure of nothing where a round takes longer than all may."""
    monkeypatch.setattr("wsync.bench.rows.time.perf_counter", itertools.count(step=100).__next__)
    assert compare("made up", lambda: 1.0, "the other", lambda: 2.0, None, 5).samples == ((1.0, 2.0),)


def test_one_cases_trouble_is_not_the_others(settings: Settings) -> None:
    """Guards a long run: what a case cannot do is its result, and the next one is measured."""

    def fails(workspace: Workspace) -> list[Row]:
        raise RuntimeError("unable to allocate")  # as torch does

    def skips(workspace: Workspace) -> list[Row]:
        raise Skip("there is none")

    def works(workspace: Workspace) -> list[Row]:
        return [Row("works", "s", ((1.0,),))]

    failed, skipped, measured = cases.run(settings, {"a": fails, "b": skips, "c": works})
    assert (failed.failed, skipped.failed, measured.failed) == ("unable to allocate", "", "")
    assert skipped.skipped == "there is none" and measured.value == 1.0
    assert [row.case for row in (failed, skipped, measured)] == ["a", "b", "c"]


def test_no_room_is_a_reason(runtime: Path, tmp_path: Path) -> None:
    """Guards against a box that is driven out of memory: what does not fit is not begun."""
    huge = Settings(1 << 49, 8, 2, directory=tmp_path, runtime=runtime)
    names = ["push", "staging", "staging-cold", "refresh", "refresh-copy", "readers"]
    assert ["are free" in row.skipped for row in cases.run(huge, {name: cases.CASES[name] for name in names})] == [
        True
    ] * len(names)


def test_a_file_in_memory_is_not_called_cold(settings: Settings, runtime: Path) -> None:
    """Guards the figure of a cold file: where the page cache cannot be dropped there is a reason, and no figure."""
    (row,) = cases.run(replace(settings, directory=runtime), cases.chosen(("staging-cold",)))
    assert row.value is None and "--dir" in row.skipped, row


def test_what_runs_on_ends_with_a_killed_run(spawn: Spawn, runtime: Path, tmp_path: Path) -> None:
    """Guards a processor against a watch whose bench was killed outright, before anybody could end it."""
    run = spawn("-c", ENDLESS, str(tmp_path), str(runtime))
    assert run.stdout
    end = os.pidfd_open(int(run.stdout.readline()))
    try:
        run.kill()
        assert select.select([end], [], [], DEADLINE)[0]
    finally:
        os.close(end)


def test_places_may_be_relative_or_not_there_yet(
    cli: Cli, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards children, which run elsewhere, and a box on which nothing was published."""
    monkeypatch.chdir(tmp_path)
    options = ("--dir", ".", "--runtime-dir", str(runtime / "much" / "later"), "--json")
    done = cli("bench", "--quick", "--size", "1MiB", "--only", "readers", "--readers", "1", *options)
    (row,) = json.loads(done.stdout)["results"]
    assert row["value"] and json.loads(done.stdout)["settings"]["runtime"] == str(runtime)
    assert list(runtime.iterdir()) == []


def test_the_users_settings_are_not_the_measurements(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a gate or a runtime directory of the user's in what is measured, and against compiling anew."""
    monkeypatch.setenv("WSYNC_GATE", "false")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    with private_workspace(settings) as workspace:
        assert "PYTHONDONTWRITEBYTECODE" not in workspace.environment
        own = {name: value for name, value in workspace.environment.items() if name.startswith("WSYNC_")}
        assert own.keys() == {"WSYNC_RUNTIME_DIR", "WSYNC_STATE_DIR"}
        assert own["WSYNC_RUNTIME_DIR"] == str(workspace.runtime)


BRIEF = """
from wsync.cli import commands as cli
from wsync.bench.workspace import Workspace
Workspace.rounds = lambda workspace, number: 1
cli.main()
"""
ENDLESS = """
import sys, signal
from pathlib import Path
import wsync
from wsync.bench.workspace import COMMAND, make, private_workspace
from wsync.bench.rows import Settings
with private_workspace(Settings(directory=Path(sys.argv[1]), runtime=Path(sys.argv[2]))) as workspace:
    workspace.save("small/step_1.safetensors", 4096, 4)
    spec = workspace.write_spec("small", 4096, 4)
    with workspace.process("-c", COMMAND, "watch", spec) as process:
        with wsync.attach(make(4096, 4), "small", timeout=60, runtime_dir=workspace.runtime):
            print(process.pid, flush=True)
            signal.pause()
"""
BROKEN = """
from wsync.cli import commands as cli
from wsync.bench import cases
def fail(workspace):
    raise ArithmeticError("as asked")
cases.CASES["refresh-idle"] = fail
cli.main()
"""
HUNG_UP = """
import os, signal
from wsync.cli import commands as cli
from wsync.bench import cases
signal.signal(signal.SIGHUP, signal.SIG_IGN)
measure = cases.CASES["refresh-idle"]
cases.CASES["refresh-idle"] = lambda workspace: os.kill(os.getpid(), signal.SIGHUP) or measure(workspace)
cli.main()
"""


def test_a_quick_run(spawn: Spawn, runtime: Path, tmp_path: Path) -> None:
    """The real thing, a round of each: every case gives figures or a reason, and nothing is left.

    Each row's medians and ratio are those of the samples that it shows.
    """
    (tmp_path / "files").mkdir()
    places = ("--dir", str(tmp_path / "files"), "--runtime-dir", str(runtime))
    size = ("--size", "1MiB", "--tensors", "20", "--readers", "1", "--quick")
    run = spawn("-c", BRIEF, "bench", *size, *places, "--json")
    stdout, stderr = run.communicate(timeout=4 * DEADLINE)
    assert run.returncode == 0 and stderr == "", stderr
    told = json.loads(stdout)
    assert told["box"]["cores"] > 0 and told["settings"]["size"] == 1 << 20
    assert {row["case"] for row in told["results"]} == set(cases.CASES)
    for row in told["results"]:
        if row["skipped"]:
            assert "page cache" in row["skipped"], row
            assert row["value"] is None and row["met"] is None and row["samples"] == []
            continue
        columns = list(zip(*row["samples"], strict=True))
        assert all(figure > 0 for column in columns for figure in column), row
        assert row["value"] == statistics.median(columns[0]) and len(columns) == (2 if row["beside"] else 1)
        if row["beside"]:
            assert row["beside_value"] == statistics.median(columns[1])
            assert row["ratio"] == statistics.median(a / b for a, b in row["samples"])
        assert (row["met"] is None) == (row["aim"] is None)
    assert list(runtime.iterdir()) == [] == list((tmp_path / "files").iterdir())
    assert processes_in(runtime) == []


def test_a_table_of_what_was_asked_for(cli: Cli, runtime: Path, tmp_path: Path) -> None:
    """Without a terminal there is plain text in 80 columns: the chosen cases, or why one is left out."""
    places = ("--dir", str(runtime), "--runtime-dir", str(runtime))
    only = ("--only", "refresh-idle", "--only", "staging-cold")
    environment = {**os.environ, "COLUMNS": "80"}
    table = cli("bench", "--quick", "--size", "1MiB", *only, *places, env=environment).stdout
    figures = [line for line in table.splitlines() if "not measured" not in line]
    assert max(map(len, figures)) <= 80 and "\x1b" not in table, table
    assert re.search(r"refresh\(\), nothing new +\S+ .s loading 8 bytes +\S+ .s +\S+ <= 2 +(met|MISSED)", table), table
    assert "staging-cold not measured: the page cache" in table, table
    assert not re.search("push|copy", table), table


@pytest.mark.parametrize("columns", [80, 200])
def test_a_long_name_fits(columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the figures: a narrow table folds names, never what was measured; a wide one has a line for each row."""
    monkeypatch.setattr("wsync.cli.output.bench.stdout_console", lambda: Console(width=columns, highlight=False))
    long = Row("something with a long name and more", "s", ((2.345, 1.234),), "the usual long way", Aim("<=", 1.25))
    print_rows(Settings(), BOX, [long] * 3)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    figures = [line for line in lines if re.search(r"2.35 s .*1.23 s +1.9 <= 1.25 +MISSED", line)]
    assert len(figures) == 3 and (columns == 80 or all("name and more" in line for line in figures))


def test_a_failed_case_is_told_by_the_exit_code(spawn: Spawn, runtime: Path, tmp_path: Path) -> None:
    """Guards a script that asks for figures: it hears of a case that should have been measured and was not."""
    places = ("--dir", str(tmp_path), "--runtime-dir", str(runtime))
    told = spawn("-c", BROKEN, "bench", "--quick", "--only", "refresh-idle", *places, "--json")
    stdout, _ = told.communicate(timeout=DEADLINE)
    assert told.returncode == 1 and json.loads(stdout)["results"][0]["failed"] == "as asked"


def test_nohup_is_heeded(spawn: Spawn, runtime: Path, tmp_path: Path) -> None:
    """A hangup that whoever started it ignores does not end it."""
    places = ("--dir", str(tmp_path), "--runtime-dir", str(runtime))
    run = spawn("-c", HUNG_UP, "bench", "--quick", "--only", "refresh-idle", *places, "--json")
    stdout, stderr = run.communicate(timeout=DEADLINE)
    assert run.returncode == 0 and json.loads(stdout)["results"][0]["value"], stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_it_cleanly(
    spawn: Spawn, runtime: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Ctrl-C or a kill in the middle, a watch running: no process, no shared memory, no file."""
    (tmp_path / "files").mkdir()
    leader, follower = pty.openpty()
    options = ("--quick", "--only", "watch", "--dir", str(tmp_path / "files"), "--runtime-dir", str(runtime))
    started = spawn("-m", "wsync", "bench", *options, stderr=follower)
    os.close(follower)
    try:
        deadline = time.monotonic() + DEADLINE
        while not any(runtime.glob("**/small/readers/*")):  # attached, which takes a watch that published
            assert time.monotonic() < deadline, "nothing was measured"
            with pytest.raises(subprocess.TimeoutExpired):  # an end before that is one too early
                started.wait(0.01)
        started.send_signal(number)
        assert started.wait(DEADLINE) == code
        assert b"measuring: watch" in (said := os.read(leader, 10_000))
        assert number == signal.SIGTERM or b"nothing is left behind" in said
    finally:
        os.close(leader)
    assert list(runtime.iterdir()) == [] == list((tmp_path / "files").iterdir())
    assert processes_in(runtime) == []


def test_only_the_first_signal_counts() -> None:
    """Guards the tidying up against a second signal, as timeout(1) sends, and those who wait no longer."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        unwind_at(*numbers)
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
        assert {signal.getsignal(number) for number in before} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def processes_in(runtime: Path) -> list[str]:
    """Processes that were given a workspace below this one."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"WSYNC_RUNTIME_DIR={runtime}/".encode() in environment.read_bytes():
                found.append(environment.parent.name)
        except OSError:  # ended meanwhile
            continue
    return found
