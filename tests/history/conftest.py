"""What the tests of the history share."""

from __future__ import annotations

from pathlib import Path

import pytest
from others import run_forked
from processes import Cli


@pytest.fixture
def cli(runtime: Path) -> Cli:
    """Runs the command line in a process forked from this one, which has all imported that it may want."""
    return run_forked
