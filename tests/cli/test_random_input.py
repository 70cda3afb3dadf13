"""Random command lines, variables, settings and WORDs: no traceback, no exit code outside the table, no long wait."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from builders import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policies import mlp

from wsync.cli import commands
from wsync.segment.segment_files import WORD_OFFSET
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import KEYS
from wsync.sync.outcome import EXIT_CODES

CODES = {*EXIT_CODES.values(), 2}
LONGEST = 5.0  # seconds
bounded = settings(
    max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
Main = Callable[..., str]


@pytest.fixture
def main(runs: Path, segment: WritableSegment, layouts_here: None) -> Iterator[Main]:
    """The whole command line in this process, which checks what comes of it and returns what was said."""
    write(runs / "step_1.safetensors", mlp(), 1.0)

    def run(*arguments: str, **variables: str) -> str:
        codes: list[int] = []
        said, began = io.StringIO(), time.monotonic()
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            mock.patch.dict(os.environ, variables),
            mock.patch.object(sys, "argv", ["wsync", *arguments]),
            mock.patch.object(os, "_exit", codes.append),
        ):
            commands.main()
        assert set(codes) <= CODES and time.monotonic() - began < LONGEST, (arguments, codes)
        assert "Traceback" not in said.getvalue()
        return said.getvalue()

    yield run


TYPED = """
push status log pin unpin rollback rm config inspect policies:mlp policies.mlp runs --to --json --name --since --number
--slots --keep --poll --mode --rename --max-lag --max-staleness --plot --init --quiet --dry-run --force --spec --scan -n
-1 0 1e400 nan 99999999999999999999 runs/step_1.safetensors
"""
WORDS = st.one_of(text, st.sampled_from(TYPED.split()))
COMMANDS = st.sampled_from(["push", "status", "log", "pin", "unpin", "rollback", "rm", "config", "inspect"])


@pytest.mark.slow
@bounded
@given(command=COMMANDS, words=st.lists(WORDS, max_size=5))
def test_any_command_line(main: Main, command: str, words: list[str]) -> None:
    """What is typed is done, or is an error with a code of the table; watches and followers are left out."""
    if not {"--watch", "--follow", "-f", "--exec", "--gate"} & {*words}:
        main(command, *words)


VARIABLES = """
SLOTS KEEP POLL MODE ORDER STEP RENAME SETTLE FORCE JSON STRICT GATE_TIMEOUT GROUP NAME METRICS_FILE TAKE_OVER
"""


@bounded
@given(name=st.sampled_from(VARIABLES.split()), value=text)
def test_any_variable(main: Main, name: str, value: str) -> None:
    """A variable is an option's value, or a usage error."""
    main("push", "policies:mlp", "runs", **{f"WSYNC_{name}": value})


@bounded
@given(data=st.data())
def test_any_setting_of_a_toml(main: Main, data: st.DataObject) -> None:
    """Whatever stands in a TOML is taken, or told as that file's fault."""
    tables = {"": KEYS} | {key: kind for key, kind in KEYS.items() if isinstance(kind, dict)}
    table = data.draw(st.sampled_from(sorted(tables)))
    key = data.draw(st.one_of(st.sampled_from(sorted(tables[table])), st.just("unknown")))
    value = data.draw(
        st.sampled_from(["1", "-1", "0", "1e999", "nan", "9999999999999999999", '""', '"/x"', '"[/"', "[]", "[1]", "{}",
                         "true", "2020-01-01", '"é\\u0000"', '{ a = "b" }', '["/(/"]', '"\\n"'])
    )  # fmt: skip
    if key in ("exec", "webhook", "gate"):
        return
    head = "" if key in ("policy", "checkpoints") and not table else 'policy = "policies:mlp"\ncheckpoints = "runs"\n'
    Path("spec.toml").write_text(f"{head}{f'[{table}]' if table else ''}\n{key} = {value}\n")
    main("config", "spec.toml")
    main("push", "spec.toml", "--dry-run")


@pytest.mark.slow
@bounded
@given(word=st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 12)))
def test_any_word(main: Main, segment: WritableSegment, word: int) -> None:
    """A WORD that was damaged is told, and what is published after it counts on from no damage."""
    segment.control.words[WORD_OFFSET // 8] = word
    main("push", "policies:mlp", "runs", "--force")
    main("status")
    main("status", "--max-lag", "1")
    main("pin", "policies.mlp")
    main("unpin", "policies.mlp")
    main("rollback", "policies.mlp")
