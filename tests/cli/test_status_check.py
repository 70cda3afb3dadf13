"""``wsync status`` for a monitoring system: one line, and an exit code that its checkers take."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import write
from others import run_cli
from policies import mlp

import wsync
from wsync.errors import SegmentMissing
from wsync.history.state import State
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec
from wsync.sync.syncer import Syncer

NAME = "policies.mlp"


def push(runs: Path, mark: int) -> None:
    write(runs / f"step_{mark}.safetensors", mlp(), float(mark))
    with Syncer(load_spec("policies:mlp"), runs, state=State(NAME)) as syncer:
        assert syncer.once().version == mark


def status(*options: str) -> tuple[int, str]:
    code, out, err = run_cli("status", *options)
    assert not err and out.count("\n") == 1, out + err
    return code, out


def test_a_bound_gives_one_line_and_a_code(segment: WritableSegment, runs: Path) -> None:
    """0 while all is well; 1 names what is old, and the reader that is behind; 2 where nothing is live."""
    assert status("--max-lag", "1") == (2, f"WSYNC CRITICAL: {NAME} has no version yet\n")
    push(runs, 1)
    with wsync.attach(mlp(), NAME) as reader:
        code, line = status(NAME, "--max-staleness", "600", "--max-lag", "2", "--max-lag-seconds", "600")
        assert code == 0 and line.startswith(f"WSYNC OK: {NAME} is at version 1, ") and f"| {NAME}_age=0s;600.0" in line
        for mark in (2, 3):
            push(runs, mark)
        code, line = status(NAME, "--max-lag", "1")
        assert code == 1 and line.startswith(f"WSYNC WARNING: {NAME}: reader ") and "is 2 versions behind" in line
        assert status(NAME, "--max-lag", "2")[0] == 0
        code, line = status("--max-lag-seconds", "0.000001")
        assert code == 1 and "has not refreshed for" in line
        assert reader.refresh() and status("--max-lag-seconds", "0.000001", "--max-lag", "0")[0] == 0
    code, line = status(NAME, "--max-staleness", "0.000001")
    assert code == 1 and "version 3 is" in line and " old" in line
    assert run_cli("status", NAME, "--max-lag", "1", "--json")[1].startswith("{")


def test_what_cannot_be_read_is_critical(segment: WritableSegment, runs: Path) -> None:
    """A segment that is missing or damaged is told in the one line, beside those that are well."""
    push(runs, 1)
    code, line = status("absent", "--max-lag", "1")
    assert code == 2 and "absent cannot be read: there is no segment" in line
    with pytest.raises(SegmentMissing):
        segment.open("absent")
    (segment.path.parent / "broken").mkdir(mode=0o700)
    (segment.path.parent / "broken" / "control").write_bytes(b"x")
    code, line = status("--max-staleness", "600")
    assert code == 2 and line.index("broken cannot be read") < line.index(f"{NAME} is at version 1")


@pytest.mark.parametrize("odd", [("--max-lag", "-1"), ("--max-lag-seconds", "0"), ("--max-staleness", "nan")])
def test_no_bound_is_usage(runtime: Path, odd: tuple[str, str]) -> None:
    """Guards against a check that can never fail."""
    code, _, err = run_cli("status", *odd)
    assert code == 2 and odd[0] in err
