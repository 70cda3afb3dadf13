"""The canary example: what is better is promoted, what is worse is rolled back, and the page shows what is said."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from builders import ROOT
from pages import run_console

EXAMPLE = ROOT / "examples" / "canary"


def plain(text: str) -> list[str]:
    """Output without how long things took."""
    return [" ".join(line.split()) for line in re.sub(r"\b[\d.]+ (ms|s)\b", "T", text).splitlines()]


@pytest.mark.slow
def test_the_page_shows_what_is_said(runtime: Path, tmp_path: Path) -> None:
    """A promote that two readers follow, and a rollback that the canary follows, by the returns of real episodes."""
    pytest.importorskip("gymnasium")
    place = tmp_path / "canary"
    shutil.copytree(EXAMPLE, place)
    (console,) = re.findall(r"^```console\n(.*?)```$", (EXAMPLE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert plain(run_console(console, place)) == plain(console)
