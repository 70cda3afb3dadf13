"""examples/fleet says what is true, its README with it, and works as far as this machine can tell."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

import pytest
from builders import ROOT, write
from processes import DEADLINE, Cli, Lines, Spawn

from wsync.settings.spec import load_spec
from wsync.settings.user_code import build

pytestmark = pytest.mark.slow

UNIT = ROOT / "examples" / "fleet" / "wsync-fleet@.service"
PAGE = (ROOT / "examples" / "fleet" / "README.md").read_text()


def options(command: list[str]) -> list[str]:
    """The options of torchrun, up to the module."""
    return command[1 : command.index("-m")]


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """systemd-analyze finds nothing wrong, once the programs and the user that it names are there."""
    if not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("systemd-analyze is not installed")
    text = UNIT.read_text()
    for program in ("torchrun", "wsync"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
        text = text.replace(f"/opt/policy/.venv/bin/{program}", str(tmp_path / program))
    text = text.replace("User=policy", f"User={pwd.getpwuid(os.getuid()).pw_name}")
    (tmp_path / "wsync-fleet@cartpole.service").write_text(text.replace("/opt/policy", str(tmp_path)))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(tmp_path / "wsync-fleet@cartpole.service")],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "wsync" in line]
    assert (done.returncode, ours) == (0, [])


def test_the_unit_starts_what_there_is(cli: Cli) -> None:
    """torchrun knows each option, the settings are checked before, and the variable that it needs is set."""
    parser = RawConfigParser(strict=False, comment_prefixes=("#",), delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT)
    service = parser["Service"]
    assert "Environment=TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n" in UNIT.read_text()
    command = shlex.split(service["ExecStart"])
    known = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True, timeout=DEADLINE
    ).stdout
    for option in options(command):
        assert not option.startswith("--") or re.search(rf"{option}\b", known), option
    assert command[command.index("-m") :][:3] == ["-m", "wsync", "watch"]
    checks = shlex.split(service["ExecStartPre"])
    assert checks[1] == "config" and cli("config", "policies:mlp", *checks[3:]).returncode == 0


def test_the_shown_command_makes_a_group(tmp_path: Path, runtime: Path, spawn: Spawn) -> None:
    """The command that the page shows, with a free port of this box, is a group of one that publishes."""
    (shown,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    variable, program, *command = shlex.split(shown.replace("\\\n", " "))
    assert program == "torchrun"
    with socket.create_server(("127.0.0.1", 0)) as free:
        command[command.index("--rdzv-endpoint") + 1] = f"127.0.0.1:{free.getsockname()[1]}"
    shutil.copytree(ROOT / "examples" / "cartpole", tmp_path, dirs_exist_ok=True)
    write(tmp_path / "checkpoints" / "step_2.safetensors", build(load_spec(str(tmp_path / "cartpole.toml"))), 2.0, 2)
    sys.modules.pop("policy", None)
    sys.path.remove(str(tmp_path))
    name, _, value = variable.partition("=")
    agent = spawn(
        *("-m", "torch.distributed.run", *command),
        cwd=tmp_path,
        env={**os.environ, name: value},
        stderr=subprocess.STDOUT,
    )
    lines = Lines(agent)
    lines.until("rank 0 of 1")
    lines.until("version 1, step 2")
    agent.send_signal(signal.SIGTERM)
    assert "Traceback" not in "".join(line for line in lines.rest() if "wsync" in line)
