"""Names with line breaks: nothing that a file is called makes a line of its own."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest import mock

import pytest
from builders import write
from others import run_main
from policies import mlp

from wsync.errors import from_os_error

ODD = "step_1\n2026-01-01T00:00:00Z info    policy: version 9\x1b[2J.safetensors"


@pytest.mark.parametrize("kind", ["cut", "malformed", "misfit"])
def test_a_file_name_makes_no_line(runs: Path, kind: str) -> None:
    """Neither push nor inspect tells a part of the name as something that happened, and the verdict stays whole."""
    file = write(runs / ODD, mlp(hidden=9 if kind == "misfit" else 8), 1.0)
    if kind != "misfit":
        file.write_bytes(file.read_bytes()[:-4] if kind == "cut" else b"x" * 100)
    for command in (["push", "policies:mlp", str(runs)], ["push", "policies:mlp", str(file)], ["inspect", str(runs)]):
        _, out, err = run_main(*command)
        lines = [line for line in (out + err).split("\n") if line.startswith(("2026", " 2026"))]
        assert not lines and "\x1b" not in out + err and "step_1\\n2026" in out + err, out + err
    _, out, _ = run_main("inspect", str(runs), "--spec", "policies:mlp")
    words = {"cut": "incomplete", "malformed": "safetensors", "misfit": "fit"}
    assert words[kind] in out
    _, _, err = run_main("push", f"{ODD}.toml", str(runs))
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "Make room"),
        (errno.EROFS, "for writing"),
        (errno.EACCES, "access"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ESTALE, "anew"),
        (errno.EIO, "dmesg"),
        (errno.EXDEV, "Look at"),
    ],
)
def test_an_error_of_the_system_tells_what_to_do(runs: Path, number: int, words: str) -> None:
    """What happened, to what, and what to do next, whichever call fails and in whichever command."""
    exc = OSError(number, os.strerror(number), "/srv/x")
    told = str(from_os_error(exc, Path("/dev/shm/x")))
    assert all(part in told for part in ("OS error at /dev/shm/x: ", os.strerror(number), "/srv/x", words))
    with mock.patch("wsync.cli.output.status.segments", side_effect=exc):
        code, _, err = run_main("status")
    assert code == 1 and err.count("\n") == 1 and "/srv/x" in err and words in err
