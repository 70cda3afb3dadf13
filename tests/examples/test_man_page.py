"""The man page that is installed is made from the command line as it is now."""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PAGE = EXAMPLES / "operations" / "wsync.1"


def test_the_page_is_that_of_the_command_line(tmp_path: Path) -> None:
    """A command, an option or a help text that changes changes the page too."""
    made = tmp_path / "wsync.1"
    subprocess.run([sys.executable, EXAMPLES / "man_page.py", made], check=True)
    assert PAGE.read_text() == made.read_text(), "run: python examples/man_page.py examples/operations/wsync.1"


def test_the_page_is_installed() -> None:
    """`pip install` puts the page where man(1) looks for that of a command on the PATH."""
    assert any(str(file).endswith("share/man/man1/wsync.1") for file in metadata.files("wsync") or ())


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not installed")
def test_roff_reads_it_without_a_warning() -> None:
    """No text of a help is taken for a request, and nothing is left out."""
    done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", PAGE], capture_output=True, text=True, check=True)
    assert not done.stderr
    shown = re.sub(".\x08", "", done.stdout)  # bold, as a terminal without colours is told of it
    assert "wsync rollback" in shown and "--no-strict" in shown
