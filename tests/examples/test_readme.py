"""The README and those of the examples stay true: every command and snippet in them is run."""

from __future__ import annotations

import grp
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ROOT, write
from object_stores import Bucket
from processes import DEADLINE, Cli, Lines, Spawn

from wsync.layout.layout import layout_of
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import Spec, load_spec
from wsync.settings.user_code import build

pytestmark = pytest.mark.slow

PAGES = {page.parent.name: page for page in (ROOT / "examples").glob("*/README.md")} | {"README": ROOT / "README.md"}
README = PAGES["README"].read_text()

TESTED = {
    ("README", "text"): 1,  # the diagram
    ("README", "console"): 3,
    ("README", "python"): 2,
    ("README", "toml"): 1,
    ("canary", "console"): 1,  # run by test_canary.py
    ("cartpole", "python"): 1,
    ("cartpole", "toml"): 2,
    ("fleet", "sh"): 1,  # run by test_fleet_example.py
    ("gpu", "python"): 1,
    ("how-it-works", "console"): 1,
    ("layouts", "toml"): 1,  # taken by test_layouts.py
    ("operations", "console"): 4,  # one is run by test_drill.py
    ("operations", "crontab"): 1,  # looked at by test_operations.py, which runs the file
    ("operations", "sh"): 2,  # looked at by test_operations.py
    ("operations", "toml"): 1,
    ("readers", "python"): 2,  # run by test_without_torch.py
    ("stable_baselines3", "console"): 1,  # run by test_trainer_examples.py, with what follows
    ("stable_baselines3", "python"): 2,
    ("s3", "console"): 1,
    ("s3", "toml"): 1,
}
"""Blocks by page and language that a test here runs, in number; whoever adds one adds its test."""

PRELUDE = """
import sys
import torch
from policy import make_policy

policy = make_policy(hidden=64)
observations = [torch.zeros(4)] * 3
"""


def fences(page: str) -> list[tuple[str, str]]:
    """The blocks of a page, each as its language and its text."""
    return re.findall(r"^```(.*)\n((?s:.*?))^```$", PAGES[page].read_text(), re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    return [text for spoken, text in fences(page) if spoken == language]


def block_with(page: str, language: str, word: str) -> str:
    """The one block of a page in which this word stands."""
    (found,) = (text for text in blocks(page, language) if word in text)
    return found


def commands(block: str) -> list[list[str]]:
    """The command lines of a console, in words, without their comments."""
    return [shlex.split(line[2:], comments=True) for line in block.splitlines() if line.startswith("$ ")]


def setup_lines() -> list[str]:
    return [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")]


def built(spec: Spec) -> torch.nn.Module:
    """The policy of a spec, of whose directory nothing stays imported."""
    policy = build(spec)
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
    WritableSegment.create(spec.name, layout_of(built(spec)), spec=spec.fingerprint()).close()


def test_every_block_has_its_test() -> None:
    """No page shows a command or a snippet that nothing runs."""
    assert Counter((page, language) for page in PAGES for language, _ in fences(page)) == TESTED


def test_every_link_leads_somewhere() -> None:
    """Each link of a page names a file that is there, and a heading that it has."""
    for page in PAGES.values():
        for target in re.findall(r"\]\(([^)]*)\)", page.read_text()):
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), (page, target)
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], (
                target
            )


def test_every_command_in_a_sentence_is_one(cli: Cli) -> None:
    """What a sentence of a page calls a command has its options, and is a file where it is a script."""
    helps: dict[str, str] = {}
    for page in PAGES.values():
        for text in re.findall(r"`((?:wsync|python) [^`]*)`", page.read_text()):
            program, first, *rest = text.split()
            if program == "python":
                assert (ROOT / first).exists(), (page, text)
                continue
            if first not in helps:
                wide = {**os.environ, "TERM": "dumb", "COLUMNS": "300"}
                helps[first] = cli(first, "--help", env=wide).stdout
            options = [word for word in rest if word.startswith("--")]
            assert helps[first] and all(re.search(rf"{each}\b", helps[first]) for each in options), (page, text)


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
    snippet = blocks("README", "python")[0]
    assert len(snippet.strip().splitlines()) <= 7
    check = "\nassert (reader.version, reader.step) == (1, 2), reader\nassert float(policy[0].weight[0, 0]) == 2\n"
    threads = "import threading\nreader = wsync.attach(policy, 'cartpole')\n" + blocks("README", "python")[1]
    program = f"{PRELUDE}{snippet}{check}{threads}\nassert version == 1 and action.shape == (2,)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=box, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr


def test_the_updaters_snippet_publishes_and_follows(box: Path, runtime: Path) -> None:
    """A training script's lines run as they stand: a version without a file, and a policy that follows a directory."""
    snippet = blocks("cartpole", "python")[0]
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
    (shown,) = blocks("README", "toml")
    assert tomllib.loads(shown) == tomllib.loads((box / "cartpole.toml").read_text())


def test_the_shown_settings_are_settings(box: Path, cli: Cli) -> None:
    """Settings that make a trainer's files fit are taken, and the checkpoints go live with all of them."""
    (box / "all.toml").write_text(blocks("cartpole", "toml")[0])
    spec = load_spec(str(box / "all.toml"))
    assert spec.weights.name("actor.net.3.bias") == "3.bias" and spec.weights.name("actor.critic.bias") is None
    assert cli("push", "all.toml", cwd=box).returncode == 66
    stand(box / "all.toml")
    (box / "checkpoints" / "step_2.STABLE").touch()
    assert cli("push", "all.toml", cwd=box).returncode == 65
    assert cli("push", "all.toml", "--prefix", "", cwd=box).returncode == 0


def test_the_shown_store_is_the_example() -> None:
    """The shown spec of an object store is that of the example, word for word in its settings."""
    (shown,) = blocks("s3", "toml")
    example = ROOT / "examples" / "s3" / "net.toml"
    assert tomllib.loads(shown) == tomllib.loads(example.read_text())
    assert str(load_spec(str(example)).checkpoints) == "s3://bucket/run"


def test_the_shown_gate_and_hooks_run(box: Path, cli: Cli) -> None:
    """The settings of gate and hooks are settings: the gate refuses what does not balance, the command runs."""
    pytest.importorskip("gymnasium")
    shown = blocks("cartpole", "toml")[1]
    assert "[hooks]" in shown
    (box / "gated.toml").write_text(shown)
    stand(box / "gated.toml")
    refused = cli("push", "gated.toml", cwd=box)
    assert refused.returncode == 65 and "mean return" in refused.stderr
    assert cli("push", "gated.toml", "--gate", "", "--webhook", "", cwd=box).returncode == 0
    assert (box / "published.log").read_text() == "gated is at version 1\n"


def test_the_shown_figures_are_kept(box: Path, cli: Cli) -> None:
    """The shown table metrics is one, and a push keeps the file that it names, beside the TOML."""
    pytest.importorskip("prometheus_client")
    with (box / "cartpole.toml").open("a") as spec:
        spec.write(blocks("operations", "toml")[0])
    assert load_spec(str(box / "cartpole.toml")).metrics.port == 9464
    stand(box / "cartpole.toml")
    assert cli("push", str(box / "cartpole.toml"), cwd="/").returncode == 0
    assert 'wsync_version{name="cartpole"} 1.0' in (box / "wsync.prom").read_text()


def test_every_command_runs(box: Path, cli: Cli, spawn: Spawn) -> None:
    """Each command of the README does what its comment says, in the order in which it stands there."""
    listed = commands(blocks("README", "console")[2])
    assert len(listed) == 13
    assert cli("push", "cartpole.toml", "--name", "cartpole-canary", cwd=box).returncode == 0
    for program, *arguments in listed:
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


def test_the_looks_of_an_operator_are_as_shown(box: Path, cli: Cli, spawn: Spawn) -> None:
    """Each command that shows what is live runs; the screen that goes on is shown once and stopped."""
    assert cli("push", "cartpole.toml", cwd=box).returncode == 0
    for program, *arguments in commands(block_with("operations", "console", "status --watch")):
        assert program == "wsync"
        if "--watch" in arguments:
            lines = Lines(spawn("-m", "wsync", *arguments, cwd=box))
            assert lines.until("cartpole")
            lines.process.send_signal(signal.SIGINT)
            assert lines.process.wait(DEADLINE) in (0, 130)
        else:
            done = cli(*arguments, cwd=box)
            assert done.returncode == 0 and done.stdout, (arguments, done.stdout, done.stderr)


def test_the_table_has_every_setting(tmp_path: Path, cli: Cli) -> None:
    """The README's table names all settings, with the defaults that `wsync config` tells, and each is an option."""
    (tmp_path / "policy.toml").write_text('policy = "policies:mlp"\n')
    told = json.loads(cli("config", str(tmp_path / "policy.toml"), "--json").stdout)
    standing = {name: about["value"] for name, about in told.items() if about["origin"] == "default"}
    for of_the_command in ("runtime_dir", "state_dir", "log_format"):
        standing.pop(of_the_command, None)
    table = README.partition("| setting and default |")[2].partition("\n\n")[0]
    shown: dict[str, Any] = {}
    for row in table.splitlines()[2:]:
        for setting in re.findall(r"`([^`]*)`", row.split("|")[1]):
            name, equals, default = setting.partition(" = ")
            shown[name] = tomllib.loads(f"value = {default}")["value"] if equals else None
    arguments = {name: shown.pop(name) for name in ("policy", "policy_kwargs", "name", "checkpoints")}
    standing = {name: value for name, value in standing.items() if name not in arguments}
    assert {name: value or None for name, value in shown.items()} == {n: v or None for n, v in standing.items()}
    text = cli("watch", "--help", env={**os.environ, "TERM": "dumb", "COLUMNS": "300"}).stdout
    for name in ["name", *shown]:
        whole = name in ("metrics.port", "metrics.address", "metrics.file") or name.startswith("extras.")
        last = name.replace(".", "-") if whole else name
        flag = "--" + last.rpartition(".")[2].replace("_", "-")
        assert re.search(rf"{flag}\b", text), flag


def shapes(text: str, box: Path) -> list[str]:
    """What was said, with every number, time and path of this machine made alike."""
    text = re.sub(r"\d[\d.,:]*", "#", text.replace(str(box), "/opt/policy"))
    text = re.sub(r"# (?:ms|us|s|min)\b", "# s", text).replace("readers", "reader")
    return [" ".join(line.split()) for line in text.splitlines()]


def test_two_terminals_show_what_is_said(box: Path, spawn: Spawn, cli: Cli) -> None:
    """Watch, trainer, policy and status say what the README shows, apart from numbers."""
    pytest.importorskip("gymnasium")
    one, two = blocks("README", "console")[:2]
    assert commands(one) == [["mkdir", "checkpoints"], ["wsync", "watch", "cartpole.toml"]]
    shutil.rmtree(box / "checkpoints")
    (box / "checkpoints").mkdir()
    stand(box / "cartpole.toml")
    watch = Lines(spawn("-m", "wsync", "watch", "cartpole.toml", cwd=box))
    watch.until("no complete checkpoint")
    (_, *train, _, _, _), (_, *play, _, _, _), *looks = commands(two)
    policy = Lines(spawn(*play, cwd=box))
    for version in (1, 2):
        assert spawn(*train, "--seconds", "0", cwd=box).wait(DEADLINE) == 0
        watch.until(f"version {version}")
        policy.until(f'"version": {version}')
        policy.until('"return"')
    (box / "play.log").write_text("\n".join(policy.seen) + "\n")
    told = ""
    for program, *arguments in looks:
        done = (
            cli(*arguments, cwd=box)
            if program == "wsync"
            else subprocess.run([program, *arguments], cwd=box, capture_output=True, text=True)
        )
        assert done.returncode == 0, done.stderr
        told += done.stdout
    assert shapes(re.sub(r"^\$ .*\n", "", two, flags=re.MULTILINE), box) == shapes(told, box)
    said, shown = (
        {part.strip() for part in re.split(r"(?:\S+ info |# )?cartpole: ", " ".join(shapes(text, box)))[1:]}
        for text in ("\n".join(watch.seen), one)
    )
    assert shown <= said
    for process in (policy.process, watch.process):
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0


def test_the_lines_for_a_gpu_run_where_there_is_none(box: Path, cli: Cli) -> None:
    """The snippet is valid with the policy on the CPU, and the policy has the version."""
    stand(box / "cartpole.toml")
    assert cli("push", "cartpole.toml", cwd=box).returncode == 0
    (snippet,) = blocks("gpu", "python")
    check = "\nassert reader.version == 1 and float(policy[0].weight[0, 0]) == 2\n"
    program = f"{PRELUDE}device = 'cpu'\n{snippet}{check}"
    done = subprocess.run([sys.executable, "-c", program], cwd=box, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr


def test_the_store_commands_run(tmp_path: Path, cli: Cli, bucket: Bucket) -> None:
    """An upload, a look and a push, as the page of the store shows them."""
    shutil.copytree(ROOT / "examples" / "s3", tmp_path, dirs_exist_ok=True)
    (console,) = blocks("s3", "console")
    for program, *arguments in commands(console):
        words = [sys.executable, *([] if program == "python" else ["-m", "wsync"]), *arguments]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE)
        assert done.returncode == 0, (arguments, done.stderr)
    assert json.loads(cli("status", "net", "--json").stdout)["step"] == 500


def test_the_shown_sharing_lets_a_group_read(box: Path, spawn: Spawn, runtime: Path) -> None:
    """The shown watch makes its place and its segment readable by the group, and not by others."""
    ((program, *arguments),) = commands(block_with("operations", "console", "--group policies"))
    assert program == "wsync"
    place = runtime / "cartpole"
    own = grp.getgrgid(os.getegid()).gr_name
    given = [{"policies": own, "/dev/shm/cartpole": str(place)}.get(word, word) for word in arguments]
    watch = spawn("-m", "wsync", *given, cwd=box)
    lines = Lines(watch)
    lines.until("version 1")
    assert [path.stat().st_mode & 0o777 for path in (place, place / "cartpole", place / "cartpole" / "control")] == [
        0o750,
        0o750,
        0o640,
    ]
    watch.send_signal(signal.SIGTERM)
    assert watch.wait(DEADLINE) == 0


def test_the_way_back_is_as_shown(box: Path, cli: Cli) -> None:
    """Each command of an operator in trouble runs, in the order in which the page shows it."""
    stand(box / "cartpole.toml")
    for name in ("best.safetensors", "checkpoints/step_2.safetensors"):
        assert cli("push", "cartpole.toml", name, cwd=box).returncode == 0
    for program, *arguments in commands(block_with("operations", "console", "wsync rollback cartpole --to 1")):
        assert program == "wsync"
        done = cli(*arguments, cwd=box)
        assert done.returncode == 0, (arguments, done.stderr)
        if arguments[0] == "rollback":
            live = json.loads(cli("status", "cartpole", "--json", cwd=box).stdout)
            assert (live["version"], live["step"]) == (3, 1) and live["pin"]


def test_each_shown_bench_measures(box: Path, cli: Cli) -> None:
    """Each call of the bench takes its options; here with little weights and of one case."""
    (console,) = blocks("how-it-works", "console")
    for program, *arguments in commands(console):
        assert program == "wsync"
        small = ("--quick", "--size", "1MiB", "--tensors", "8", "--only", "staging", "--json")
        done = cli(*arguments, *small, cwd=box)
        assert done.returncode == 0, done.stderr
        assert set(json.loads(done.stdout)) == {"box", "settings", "results"}
