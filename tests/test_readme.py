"""The README stays true: every command and snippet in it is run."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import DEADLINE, TESTS, Cli, Spawn, write

from wsync.layout.layout import layout_of
from wsync.segment.segment import Segment
from wsync.settings.spec import Spec, load_spec

ROOT = TESTS.parent
README = (ROOT / "README.md").read_text()

PRELUDE = """
import sys
import torch
from policy import make_policy

policy = make_policy(hidden=64)
observations = [torch.zeros(4)] * 3
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def setup_lines() -> list[str]:
    return [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")]


def built(spec: Spec) -> torch.nn.Module:
    """The policy of a spec, of whose directory nothing stays imported."""
    policy = spec.build()
    sys.modules.pop("policy", None)
    sys.path.remove(str(spec.directory))
    return policy


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A folder as the README's reader has it: the spec, its policy, and two checkpoints."""
    shutil.copytree(ROOT / "examples" / "cartpole", tmp_path, dirs_exist_ok=True)
    policy = built(load_spec(str(tmp_path / "cartpole.toml")))
    write(tmp_path / "best.safetensors", policy, 1.0, 1)
    write(tmp_path / "checkpoints" / "step_2.safetensors", policy, 2.0, 2)
    return tmp_path


def stand(toml: Path) -> None:
    """Makes a spec's segment here, where torch is already, before the first push does."""
    spec = load_spec(str(toml))
    Segment.create(spec.name, layout_of(built(spec)), spec=spec.fingerprint).close()


def test_two_setup_lines_name_what_is_there() -> None:
    """The set-up lines use extras and files that exist, and ask for one torch by name."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = setup_lines()
    assert len(lines) == 2
    for line, what in zip(lines, ("examples/quickstart.py", "pytest"), strict=True):
        steps = [shlex.split(step) for step in line.split("&&")]
        assert steps[0] == ["python3", "-m", "venv", ".venv"]
        assert steps[1] == [".venv/bin/pip", "install", "torch==2.13.0"]
        extra = re.fullmatch(r"\.\[(\w+)\]", steps[2][-1])
        assert extra and extra[1] in extras
        assert what in steps[3]
    assert (ROOT / "examples" / "quickstart.py").exists()


def test_six_lines_attach_a_policy(box: Path, cli: Cli) -> None:
    """The snippet runs as it stands in a policy process."""
    stand(box / "cartpole.toml")
    assert cli("push", "cartpole.toml", cwd=box).returncode == 0
    snippet = blocks("python")[0]
    assert len(snippet.strip().splitlines()) <= 7
    check = "\nassert (reader.version, reader.step) == (1, 2), reader\nassert float(policy[0].weight[0, 0]) == 2\n"
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + snippet + check], cwd=box, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr


def test_the_updaters_snippet_publishes_and_follows(box: Path, runtime: Path) -> None:
    """A training script's lines run as they stand: a version without a file, and a policy that follows a directory."""
    snippet = blocks("python")[1]
    before = PRELUDE + "other_policy = make_policy(hidden=64)\n"
    check = (
        "\nassert (updater.published.version, updater.published.step) == (1, 500)\n"
        "assert other_policy[0].weight[0, 0].item() == 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", before + snippet + check], cwd=box, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr


def test_the_shown_spec_is_the_example(box: Path) -> None:
    """The TOML in the README is that of the example, word for word in its settings."""
    shown = blocks("toml")[0]
    assert tomllib.loads(shown) == tomllib.loads((box / "cartpole.toml").read_text())


def test_the_shown_settings_are_settings(box: Path, cli: Cli) -> None:
    """Each setting of the README is one, with a value that is taken, and the checkpoints go live with all of them."""
    (box / "all.toml").write_text(blocks("toml")[1])
    spec = load_spec(str(box / "all.toml"))
    assert spec.weights.name("actor.net.3.bias") == "3.bias" and spec.weights.name("actor.critic.bias") is None
    assert cli("push", "all.toml", cwd=box).returncode == 66
    stand(box / "all.toml")
    (box / "checkpoints" / "step_2.STABLE").touch()
    assert cli("push", "all.toml", cwd=box).returncode == 65
    assert cli("push", "all.toml", "--prefix", "", cwd=box).returncode == 0


def test_the_shown_store_is_the_example() -> None:
    """The spec of an object store in the README is that of the example, word for word in its settings."""
    (shown,) = (block for block in blocks("toml") if "s3://" in block)
    example = ROOT / "examples" / "s3" / "net.toml"
    assert tomllib.loads(shown) == tomllib.loads(example.read_text())
    assert str(load_spec(str(example)).checkpoints) == "s3://bucket/run"


def test_the_shown_gate_and_hooks_run(box: Path, cli: Cli) -> None:
    """The settings of gate and hooks are settings: the gate refuses what does not balance, the command runs."""
    pytest.importorskip("gymnasium")
    (shown,) = (block for block in blocks("toml") if "[hooks]" in block)
    (box / "gated.toml").write_text(shown)
    stand(box / "gated.toml")
    refused = cli("push", "gated.toml", cwd=box)
    assert refused.returncode == 65 and "mean return" in refused.stderr
    assert cli("push", "gated.toml", "--gate", "", "--webhook", "", cwd=box).returncode == 0
    assert (box / "published.log").read_text() == "gated is at version 1\n"


def test_the_shown_figures_are_kept(box: Path, cli: Cli) -> None:
    """The table metrics of the README is one, and a push keeps the file that it names, beside the TOML."""
    pytest.importorskip("prometheus_client")
    with (box / "cartpole.toml").open("a") as spec:
        spec.write(next(block for block in blocks("toml") if "[metrics]" in block))
    assert load_spec(str(box / "cartpole.toml")).metrics.port == 9464
    stand(box / "cartpole.toml")
    assert cli("push", str(box / "cartpole.toml"), cwd="/").returncode == 0
    assert 'wsync_version{name="cartpole"} 1.0' in (box / "wsync.prom").read_text()


def test_every_command_runs(box: Path, cli: Cli, spawn: Spawn) -> None:
    """Each command of the README does what its comment says, in the order in which it stands there."""
    (console,) = blocks("console")
    commands = [shlex.split(line.removeprefix("$ "), comments=True) for line in console.splitlines()]
    assert len(commands) == 11
    for program, *arguments in commands:
        assert program == "wsync"
        if arguments[0] != "watch":
            done = cli(*arguments, cwd=box)
            assert done.returncode == 0, (arguments, done.stderr)
            continue
        watch = spawn("-m", "wsync", *arguments, cwd=box)
        assert watch.stdout is not None
        assert "watching" in watch.stdout.readline()
        watch.send_signal(signal.SIGTERM)
        assert watch.wait(DEADLINE) == 0


def test_the_crontab_line_runs_in_crons_bare_environment(box: Path, runtime: Path) -> None:
    """cron's command publishes, is silent about a missing checkpoint, and fails where a person must look."""
    (line,) = blocks("crontab")
    stand(box / "cartpole.toml")
    command = line.split(maxsplit=5)[5].replace("/opt/policy/.venv/bin/wsync", f"{sys.executable} -m wsync")
    command = command.replace("/opt/policy", str(box))
    environment = {
        "PATH": "/usr/bin:/bin",
        "WSYNC_STATE_DIR": str(runtime / "state"),  # else the box's own
        "HOME": str(box),
        "WSYNC_RUNTIME_DIR": str(runtime),
        "PYTHONPATH": str(ROOT),
    }

    def run() -> int:
        return subprocess.run(["/bin/sh", "-c", command], env=environment, cwd="/", timeout=DEADLINE).returncode

    assert run() == 0
    assert Segment.open("cartpole").version == 1
    (box / "checkpoints").rename(box / "elsewhere")
    assert run() == 0
    (box / "cartpole.toml").write_text("nonsense")
    assert run() != 0
