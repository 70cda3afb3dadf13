"""The pictures beside the examples are what the programs show today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from builders import ROOT
from processes import DEADLINE

pytest.importorskip("pyte")

EXAMPLES = ROOT / "examples"


def words_of(picture: Path) -> str:
    """The text of an SVG."""
    return " ".join("".join(ElementTree.parse(picture).getroot().itertext()).split())


@pytest.mark.slow
def test_a_recorded_watch_shows_its_log_and_its_panel(runtime: Path, tmp_path: Path) -> None:
    """Guards the script that makes the pictures, and that the stored one shows the same panel as a watch of today."""
    script = [sys.executable, str(EXAMPLES / "recording.py"), "watch", str(tmp_path / "watch.svg")]
    done = subprocess.run(
        [*script, "--until", "version 2,"], capture_output=True, text=True, timeout=2 * DEADLINE, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for picture in (tmp_path / "watch.svg", EXAMPLES / "cartpole" / "watch.svg"):
        words = words_of(picture)
        for said in ("watching /opt/policy/checkpoints", "version 2,", "wsync watch", "oldest lease", "play.py"):
            assert said in words, (picture, words)


def test_pictures_are_small_and_load_nothing() -> None:
    """Guards the repository's size, and a reader's browser."""
    for picture in (EXAMPLES / "quickstart.svg", EXAMPLES / "cartpole" / "watch.svg"):
        assert picture.stat().st_size < 40_000
        assert "url(http" not in picture.read_text() and "href" not in picture.read_text()
    assert "What the policy process played" in words_of(EXAMPLES / "quickstart.svg")
