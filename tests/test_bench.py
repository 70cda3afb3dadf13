"""``wsync bench``: what it counts and shows, that every row is there and nothing is left behind; never a time."""

from __future__ import annotations

import gc
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import DEADLINE, Cli, Spawn, leases

from wsync import bench, cli_bench, header, memory
from wsync.bench import Aim, Beside, Case, Result, Rounds, Settings, Skip, in_turn, parse_size
from wsync.bench_growth import exponent
from wsync.bench_place import Place
from wsync.bench_svg import drawing
from wsync.bench_view import amount, as_json, bar, print_results, ratio
from wsync.errors import UsageError
from wsync.spec import load_spec
from wsync.syncer import Syncer

SLOW = Result("made-up", "something slow", "s", 2.0, "the usual way", 1.0, 2.0, 0.1, 9, (Aim("<=", 1.5),))
FAST = Result("made-up", "something fast", "B/s", 9e9, "a copy", 1e10, 0.9, None, 9, (Aim(">=", 0.8),))
ABSENT = Result("made-up", "something absent", aims=(Aim("<=", 1.0),), skipped="it is [not] installed")
CURVE = Result("made-up", "a curve", "exponent", 1.9, aims=(Aim("<=", 1.1, "value"),), points=((1, 1.0), (4, 16.0)))


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
        (["--readers", "65"], ["--readers 65", "64"]),
        (["--tensors", "0"], ["--tensors 0"]),
        (["--only", "nonsense"], ["'nonsense'", "staging"]),
        (["--dir", "/nowhere"], ["/nowhere", "--dir"]),
        (["--runtime-dir", "/nowhere"], ["/nowhere", "--runtime-dir"]),
        (["--plot", "/nowhere/x.svg"], ["/nowhere/x.svg", "--plot"]),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(cli: Cli, options: list[str], words: list[str]) -> None:
    """Guards against a minute of work before a misspelt option is told: 2, one message, no traceback."""
    done = cli("bench", "--quick", *options)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_a_missed_aim_is_shown_as_missed(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the verdict: what is too slow says so in a word, what is fast enough says so, too."""
    assert (SLOW.met, FAST.met, ABSENT.met, CURVE.met) == (False, True, None, False)
    print_results("a box", [SLOW, FAST, ABSENT, CURVE])
    shown = capsys.readouterr().out
    lines = {line.split("  ")[1]: line for line in shown.splitlines() if line.startswith("  ")}
    assert "2.00 ±10%" in lines["the usual way"] and lines["the usual way"].rstrip().endswith("<= 1.50       MISSED")
    assert lines["a copy"].rstrip().endswith("met") and "MISSED" not in lines["a copy"]
    assert "it is [not] installed" in shown and "1 of 3 within the aim; 1 not measured" in shown
    rows = as_json(Settings(), {}, [SLOW, FAST, ABSENT])["results"]
    assert [row["met"] for row in rows] == [False, True, None]


def test_an_aim_of_the_value_is_not_one_of_the_ratio() -> None:
    """Guards rows with both: each is held against its own figure."""
    aims = (Aim("<=", 2.0), Aim("<=", 250e-9, "value"))
    assert Result("x", "x", "s", 200e-9, "y", 150e-9, 1.5, aims=aims).met is True
    assert Result("x", "x", "s", 300e-9, "y", 290e-9, 1.1, aims=aims).met is False
    assert Result("x", "x", "s", 200e-9, "y", 50e-9, 4.0, aims=aims).met is False


def test_figures_for_people() -> None:
    """Each unit is written as people write it, a small ratio as a part."""
    assert [amount(v, "s") for v in (96e-9, 15e-6, 0.02, 0.9999, 3.0)] == ["96 ns", "15 us", "20 ms", "1 s", "3 s"]
    assert [amount(0.003, "share"), amount(9, "calls"), amount(1.1, "exponent")] == ["0.3 %", "9 calls", "n^1.10"]
    assert [ratio(v) for v in (0.04, 0.11, 0.92, 1.4, 38.0)] == ["1/25", "1/9.1", "0.92", "1.40", "38"]
    assert [bar(v, 8.0) for v in (8.0, 4.0, 0.0)] == ["█" * 10, "█" * 5, "▏"]
    assert bar(4.0, 8.0, blocks=False) == "#####"


def test_measured_in_turn(settings: Settings) -> None:
    """Guards against a box that is busy for a while: A B A B after one round to warm up, neighbours compared."""
    calls: list[str] = []

    def work(name: str, figures: Iterator[float]) -> Callable[[], float]:
        def run() -> float:
            calls.append(name)
            return next(figures)

        return run

    case = Case("made-up", "made up", lambda *_: ())
    ours, other = work("A", iter([100.0, 1.0, 2.0])), work("B", iter([1.0, 2.0, 8.0]))
    with Place(settings) as place:
        (result,) = case.compare(place, ours, Beside("B", other), rounds=Rounds(8, seconds=1000))
    assert calls == ["A", "B"] * 3
    assert (result.rounds, result.ratio, result.value, result.beside_value) == (2, 0.375, 1.5, 5.0)


def test_one_round_is_made_whatever_it_takes() -> None:
    """Guards against a figure of nothing where a round takes longer than all may."""
    assert in_turn([lambda: 1.0], Rounds(5, seconds=0, warm_up=False)) == [[1.0]]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_worse_than_linear_shows(power: float) -> None:
    """Guards the fit: what is constant does not hide how the cost grows."""
    points = [(n, 0.05 + 0.01 * n**power) for n in (1, 10, 100, 1000, 10_000, 100_000, 1_000_000)]
    assert math.isclose(exponent(points), power, abs_tol=0.1)


def test_one_cases_trouble_is_not_the_others(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a long run: what a case cannot do is its result, and the next one is measured."""

    def fails(place: Place, case: Case) -> Iterator[Result]:
        raise RuntimeError("unable to allocate")  # of torch, say

    def skips(place: Place, case: Case) -> Iterator[Result]:
        raise Skip("there is none")

    def works(place: Place, case: Case) -> Iterator[Result]:
        yield case.result("s", 1.0)

    made_up = tuple(Case(name, name, run) for name, run in (("a", fails), ("b", skips), ("c", works)))
    monkeypatch.setattr(bench, "cases", lambda: made_up)
    failed, skipped, measured = bench.run(bench.chosen(settings), settings)
    assert [result.failed for result in (failed, skipped, measured)] == [True, False, False]
    assert "failed: " in failed.skipped and "unable to allocate" in failed.skipped
    assert skipped.skipped == "there is none" and measured.value == 1.0


def test_no_room_is_a_reason(settings: Settings, runtime: Path, tmp_path: Path) -> None:
    """Guards against a box that is driven out of memory: what does not fit is not begun."""
    huge = Settings(1 << 49, 8, 2, True, ("staging", "refresh", "push"), directory=tmp_path, runtime=runtime)
    results = list(bench.run(bench.chosen(huge), huge))
    told = {result.case: result.skipped for result in results}
    assert all("are free" in told[case] for case in ("push", "staging", "refresh", "refresh-many", "refresh-copy")), (
        told
    )
    assert told["refresh-idle"] == ""


@pytest.mark.parametrize("alone", [False, True])
def test_a_staged_file_costs_few_calls_and_no_memory(
    alone: bool, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts do not jitter: 64 MiB of the policy's own layout in at most 16 read calls, and less than 1 MiB."""
    monkeypatch.setattr(memory, "alone", alone)
    settings = Settings(quick=True, only=("counts",), directory=tmp_path, runtime=runtime)
    results = bench.run(bench.chosen(settings), settings)
    counted = {result.name.removeprefix("staging, "): result.value or 0 for result in results}
    assert 2 <= counted["read calls"] <= 16
    mapped = alone and leases(tmp_path)
    read = counted["bytes by read calls"]
    assert read < 1 << 17 if mapped else 64 << 20 < read < 65 << 20  # each once
    assert counted["page faults"] < 2048  # of 16,384 pages, sixteen at a time where they are mapped
    assert 0 < counted["most allocated"] < 1 << 20


def test_a_pass_is_not_searched_for_garbage(settings: Settings) -> None:
    """Guards a first pass that is linear in tensors: the collector looks at their tables neither once nor often."""
    with Place(settings) as place:
        spec = load_spec(str(place.stand("policy", 1 << 20, 3000)))
        place.save("policy/step_1.safetensors", 1 << 20, 3000)
        header.forget()
        collected: list[str] = []

        def note(phase: str, info: dict[str, int]) -> None:
            collected.append(phase)

        gc.collect()
        gc.callbacks.append(note)
        try:
            with Syncer(spec, runtime=place.runtime) as syncer:
                assert syncer.once().status == "published"
                assert gc.isenabled()
        finally:
            gc.callbacks.remove(note)
        assert len(collected) <= 4  # before and after the pass


def test_what_runs_on_ends_with_a_killed_run(spawn: Spawn, runtime: Path, tmp_path: Path) -> None:
    """Guards a processor against a publisher whose bench was killed outright, before anybody could end it."""
    run = spawn("-c", ENDLESS, str(tmp_path), str(runtime))
    assert run.stdout
    end = os.pidfd_open(int(run.stdout.readline()))
    try:
        run.kill()
        assert select.select([end], [], [], DEADLINE)[0]
    finally:
        os.close(end)


def test_a_place_may_be_named_from_here(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against children, which run elsewhere, that do not find what lies in a relative directory."""
    monkeypatch.chdir(tmp_path)
    with Place(replace(settings, directory=Path())) as place:
        (place.files / "there.py").write_text("")
        place.run(place.files / "there.py")


def test_a_runtime_directory_need_not_be_there_yet(settings: Settings, runtime: Path) -> None:
    """Guards a box on which nothing was published: segments are made where its directory would be."""
    with Place(replace(settings, runtime=runtime / "later")) as place:
        assert place.runtime.parent == runtime


def test_a_signal_waits_for_imports() -> None:
    """Guards against an interrupt in the midst of a library's own start, which turns it into another error."""
    imported = False
    with pytest.raises(KeyboardInterrupt), bench.uninterrupted():
        signal.raise_signal(signal.SIGINT)
        imported = True
    assert imported


def test_what_a_killed_run_left_is_removed(settings: Settings, runtime: Path) -> None:
    """Guards shared memory against runs that were killed outright; one that still runs is left alone."""
    with Place(settings) as running:
        (runtime / "wsync-bench-left" / "policy").mkdir(parents=True)
        with Place(settings):
            assert running.runtime.exists() and not (runtime / "wsync-bench-left").exists()
    assert list(runtime.iterdir()) == []


def test_the_users_settings_are_not_the_measurements(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a gate or a runtime directory of the user's in what is measured, and against compiling anew."""
    monkeypatch.setenv("WSYNC_GATE", "false")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    with Place(settings) as place:
        assert "PYTHONDONTWRITEBYTECODE" not in place.environment
        own = {name: value for name, value in place.environment.items() if name.startswith("WSYNC_")}
        assert own.keys() == {"WSYNC_RUNTIME_DIR", "WSYNC_STATE_DIR"}
        assert own["WSYNC_RUNTIME_DIR"] == str(place.runtime)


def test_a_curve_and_odd_names_are_drawn() -> None:
    """Guards the picture: it is XML whatever the names hold, with the curve, and the verdict as a word."""
    odd = Result("x", "<&> \N{SNOWMAN}", "s", 1.0, 'a "copy"', 2.0, 0.5, aims=(Aim("<=", 0.1),))
    text = ElementTree.tostring(drawing("a box\nof <two> lines", [odd, CURVE, ABSENT]), encoding="unicode")
    told = [element.text for element in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert "<&> \N{SNOWMAN}" in told and "of <two> lines" in told
    assert any(line and "MISSED (<= 1/10" in line for line in told) and any(line and "n^1.90" in line for line in told)
    assert "<polyline" in text and "something absent" not in text


BRIEF = """
import dataclasses
from wsync import bench, cli
bench.Rounds.of = lambda rounds, _: dataclasses.replace(rounds, number=1, warm_up=False)
cli.main()
"""


ENDLESS = """
import signal, sys
from pathlib import Path
from wsync.bench import Settings
from wsync.bench_place import Place
place = Place(Settings(directory=Path(sys.argv[1]), runtime=Path(sys.argv[2])))
print(place.start("-c", "import signal; signal.pause()").pid, flush=True)
signal.pause()
"""
BROKEN = """
from wsync import bench_memory, cli
def fail(*_):
    raise ArithmeticError("as asked")
bench_memory._counters = fail
cli.main()
"""
HUNG_UP = """
import os, signal
from wsync import bench_memory, cli
signal.signal(signal.SIGHUP, signal.SIG_IGN)
count = bench_memory._counters
bench_memory._counters = lambda: os.kill(os.getpid(), signal.SIGHUP) or count()
cli.main()
"""


def test_a_quick_run(spawn: Spawn, runtime: Path, tmp_path: Path) -> None:
    """The real thing, a round of each: every case gives figures or a reason, the picture is XML, nothing is left."""
    (tmp_path / "files").mkdir()
    places = ("--dir", str(tmp_path / "files"), "--runtime-dir", str(runtime))
    size = ("--size", "1MiB", "--tensors", "20", "--readers", "1", "--quick", "--plot", str(tmp_path / "bench.svg"))
    run = spawn("-c", BRIEF, "bench", *size, *places, "--json")
    stdout, stderr = run.communicate(timeout=4 * DEADLINE)
    assert run.returncode == 0 and stderr == "", stderr
    told = json.loads(stdout)
    assert told["box"]["cores"] > 0 and told["settings"]["size"] == 1 << 20
    assert {row["case"] for row in told["results"]} == {case.name for case in bench.cases()}
    for row in told["results"]:
        if row["skipped"]:
            assert re.search(r"--quick|page cache|not installed|what is cached", row["skipped"]), row
            continue
        assert row["value"] > 0 or row["unit"] == "faults", row
        assert not row["beside"] or (row["beside_value"] > 0 and row["ratio"] > 0), row
    assert ElementTree.parse(tmp_path / "bench.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert list(runtime.iterdir()) == [] == list((tmp_path / "files").iterdir())
    assert processes_in(runtime) == []


def test_a_table_of_80_columns(cli: Cli, runtime: Path, tmp_path: Path) -> None:
    """Without a terminal there is plain text in 80 columns, bars and verdicts in it; curves come with --growth."""
    places = ("--dir", str(tmp_path), "--runtime-dir", str(runtime))
    environment = {**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    only = ("--only", "refresh-idle", "--only", "counts", "--only", "staging-large")
    table = cli("bench", "--quick", "--size", "1MiB", *only, *places, env=environment).stdout
    curve = cli("bench", "--quick", "--growth", "--only", "growth-files", *places, env=environment).stdout
    for shown in (table, curve):
        assert shown and max(map(len, shown.splitlines())) <= 80 and "\x1b" not in shown, shown
    assert all(word in table for word in ("refresh(), nothing new", "█", "met", "calls", "--quick leaves out")), table
    assert "a pass against files, 1 to 1,000" in curve and "n^" in curve and "█" in curve, curve


def test_a_failed_case_is_told_by_the_exit_code(spawn: Spawn, runtime: Path, tmp_path: Path) -> None:
    """Guards a script that asks for figures: it hears of a case that should have been measured and was not."""
    places = ("--dir", str(tmp_path), "--runtime-dir", str(runtime))
    told = spawn("-c", BROKEN, "bench", "--quick", "--only", "counts", *places, "--json")
    stdout, _ = told.communicate(timeout=DEADLINE)
    assert told.returncode == 1 and json.loads(stdout)["results"][0]["skipped"] == "failed: as asked"


def test_nohup_is_heeded(spawn: Spawn, runtime: Path, tmp_path: Path) -> None:
    """A hangup that whoever started it ignores does not end it."""
    places = ("--dir", str(tmp_path), "--runtime-dir", str(runtime))
    run = spawn("-c", HUNG_UP, "bench", "--quick", "--only", "counts", *places, "--json")
    stdout, stderr = run.communicate(timeout=DEADLINE)
    assert run.returncode == 0 and json.loads(stdout)["results"], stderr


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
        assert b"measuring: file renamed" in (said := os.read(leader, 10_000))
        assert number == signal.SIGTERM or b"nothing is left behind" in said
    finally:
        os.close(leader)
    assert list(runtime.iterdir()) == [] == list((tmp_path / "files").iterdir())
    assert processes_in(runtime) == []


def test_only_the_first_signal_counts() -> None:
    """Guards the tidying up against a second signal, as timeout(1) sends, and those who wait no longer."""
    before = {number: signal.getsignal(number) for number in cli_bench._ENDING}
    try:
        with pytest.raises(SystemExit, match="143"):
            cli_bench._end(signal.SIGTERM, None)
        assert {signal.getsignal(number) for number in before} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def processes_in(runtime: Path) -> list[str]:
    """Processes that were given a place below this one."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"WSYNC_RUNTIME_DIR={runtime}/".encode() in environment.read_bytes():
                found.append(environment.parent.name)
        except OSError:  # ended meanwhile
            continue
    return found
