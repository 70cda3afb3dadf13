"""The files of examples/operations say what is true, and work as far as this machine can tell."""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import time
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
from builders import ROOT, SUPPORT, write
from policies import mlp
from processes import DEADLINE, Cli

pytestmark = pytest.mark.slow

OPERATIONS = ROOT / "examples" / "operations"


def yaml_of(name: str) -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML, of the extra test, is not installed")
    return yaml.safe_load((OPERATIONS / name).read_text())


def check_options(cli: Cli, arguments: list[str]) -> None:
    """Fails where a wsync command line has an option that the command does not know."""
    program, command, *rest = arguments
    assert program.endswith("wsync")
    text = cli(command, "--help", env={**os.environ, "TERM": "dumb", "COLUMNS": "300"}).stdout
    given = [word for word in rest if word.startswith("--")]
    assert given and all(re.search(rf"{word}\b", text) for word in given), (given, text)


def unit(name: str = "wsync@.service") -> RawConfigParser:
    parser = RawConfigParser(strict=False, comment_prefixes=("#",), delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(OPERATIONS / name)
    return parser


@pytest.mark.parametrize("name", ["wsync@.service", "wsync-push@.service", "wsync-push@.timer"])
def test_systemd_takes_the_unit(name: str, tmp_path: Path) -> None:
    """systemd-analyze finds nothing wrong, once the program and the user that it names are there."""
    if not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("systemd-analyze is not installed")
    program = tmp_path / "wsync"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    me = pwd.getpwuid(os.getuid()).pw_name
    for file in OPERATIONS.glob("wsync*@.*"):
        text = file.read_text()
        text = text.replace("/opt/policy/.venv/bin/wsync", str(program)).replace("User=policy", f"User={me}")
        (tmp_path / file.name.replace("@", "@cartpole")).write_text(text.replace("/opt/policy", str(tmp_path)))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(tmp_path / name.replace("@", "@cartpole"))],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "wsync" in line]
    assert (done.returncode, ours) == (0, [])


def test_the_walk_from_nothing_names_what_is_there(cli: Cli) -> None:
    """Each file that it copies is in the examples, each unit that it starts is one of them, and the push is ours."""
    page = (OPERATIONS / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    for words in lines:
        if words[0] == "cp":
            assert all((OPERATIONS / file).is_file() for file in words[1:-1]), words
        if words[0] == "systemctl" and words[1] != "daemon-reload":
            template = re.sub("@[a-z]+", "@", words[-1])
            assert (OPERATIONS / (template if "." in template else f"{template}.service")).is_file(), words
    assert sum(words[0] == "cp" for words in lines) == 2
    service = unit("wsync-push@.service")["Service"]
    assert service["Type"] == "oneshot" and service["SuccessExitStatus"] == "66 75"
    check_options(cli, shlex.split(service["ExecStart"]))


def test_the_unit_uses_what_the_watch_speaks(cli: Cli) -> None:
    """Notify, watchdog and reload are those that test_service.py tests, and its options are the watch's."""
    service = unit()["Service"]
    assert service["Type"] == "notify" and float(service["WatchdogSec"]) > 30
    assert service["TimeoutStartSec"] == "infinity" and "-HUP $MAINPID" in service["ExecReload"]
    assert service["ReadWritePaths"] == "/dev/shm" and "PrivateIPC" not in service and "DynamicUser" not in service
    check_options(cli, shlex.split(service["ExecStart"]))


def test_the_crontab_line_runs_in_crons_bare_environment(tmp_path: Path, runtime: Path) -> None:
    """cron's shell pushes, leaves figures, is silent while all is as it was, and says each new trouble once."""
    pytest.importorskip("prometheus_client")
    lines = [line for line in (OPERATIONS / "crontab").read_text().splitlines() if line and not line.startswith("#")]
    assignment, line = lines
    (shown,) = re.findall(r"^```crontab\n(.*)\n```$", (OPERATIONS / "README.md").read_text(), re.MULTILINE)
    assert assignment.startswith("MAILTO=") and line.startswith(f"{shown} --metrics-file ")
    assert line.split()[:5] == ["*"] * 5 and "%" not in line  # which cron would take for a line break
    box = tmp_path / "opt"
    (box / "bin").mkdir(parents=True)
    program = box / "bin" / "wsync"
    program.write_text(f'#!/bin/sh\nexec env PYTHONPATH={SUPPORT}:{ROOT} {sys.executable} -m wsync "$@"\n')
    program.chmod(0o755)
    (box / "cartpole.toml").write_text('policy = "policies:mlp"\ncheckpoints = "runs"\n')
    (box / "runs").mkdir()
    command = line.split(maxsplit=5)[5]
    for real, here in (
        ("/opt/policy/.venv/bin/wsync", str(program)),
        ("/opt/policy", str(box)),
        ("/var/lib/node_exporter", str(tmp_path)),
        (" push ", f" push --runtime-dir {runtime} --state-dir {tmp_path / 'state'} "),
    ):
        assert real in command
        command = command.replace(real, here)
    bare = {"HOME": str(tmp_path), "LOGNAME": "policy", "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"}

    def run() -> tuple[int, str]:
        done = subprocess.run(
            ["/bin/sh", "-c", command], env=bare, cwd=tmp_path, timeout=DEADLINE, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr  # which cron mails

    def save(step: int, mark: float, *, seconds_ago: float = 0.0, cut: int = 0) -> None:
        data = write(tmp_path / "whole.safetensors", mlp(), mark, step).read_bytes()
        (tmp_path / "cut").write_bytes(data[: len(data) - cut])
        os.utime(tmp_path / "cut", (time.time() - seconds_ago,) * 2)
        (tmp_path / "cut").rename(box / "runs" / f"step_{step}.safetensors")

    figures = tmp_path / "wsync_cartpole.prom"
    assert run() == (0, "")
    assert 'wsync_last_run_exit_code{name="cartpole"} 66.0' in figures.read_text()
    save(1, 1.0, seconds_ago=2000)
    assert [run(), run()] == [(0, "")] * 2
    assert 'wsync_version{name="cartpole"} 1.0' in figures.read_text()
    assert 'wsync_last_run_exit_code{name="cartpole"} 0.0' in figures.read_text()

    def trouble(*words: str) -> None:
        """It is mailed, once."""
        mail = run()[1]
        assert all(word in mail for word in words), mail
        assert run()[1] == ""

    save(2, float("nan"), seconds_ago=1500)
    trouble("step_2.safetensors", "NaN")
    assert 'wsync_last_run_exit_code{name="cartpole"} 65.0' in figures.read_text()
    save(3, 3.0, seconds_ago=1000, cut=8)
    trouble("step_3.safetensors", "incomplete")
    good = (box / "cartpole.toml").read_text()
    (box / "cartpole.toml").write_text("nonsense")
    trouble("not TOML")
    (box / "cartpole.toml").write_text(good)
    save(4, 4.0)
    assert run() == (0, "")
    (box / "cartpole.toml").write_text("nonsense")
    trouble("not TOML")
    program.write_text("#!/bin/sh\nkill -9 $$\n")  # as the system does where memory runs out
    assert "(exit 137)" in run()[1]
    program.unlink()
    assert "not found" in run()[1]


def test_the_sidecar_shares_one_memory_with_the_policy(cli: Cli) -> None:
    """Both containers have the volume in memory and the runtime directory on it; probes reach what is served."""
    pod = yaml_of("sidecar.yaml")["spec"]
    (memory,) = (volume for volume in pod["volumes"] if volume.get("emptyDir", {}).get("medium") == "Memory")
    assert memory["emptyDir"]["sizeLimit"]
    containers = {container["name"]: container for container in pod["containers"]}
    places = set()
    for container in (containers["policy"], containers["wsync"]):
        (mount,) = (m for m in container["volumeMounts"] if m["name"] == memory["name"])
        assert not mount.get("readOnly")  # a reader writes its record, and its lock
        (place,) = (each["value"] for each in container["env"] if each["name"] == "WSYNC_RUNTIME_DIR")
        assert place.startswith(f"{mount['mountPath']}/")
        places.add(place)
        assert "securityContext" not in container or "runAsUser" not in container["securityContext"]
    assert len(places) == 1 and pod["securityContext"]["runAsUser"]
    watch = containers["wsync"]
    arguments = [*watch["command"], *watch["args"]]
    check_options(cli, arguments)
    port = watch["ports"][0]
    assert arguments[arguments.index("--metrics-port") + 1] == str(port["containerPort"])
    assert arguments[arguments.index("--metrics-address") + 1] == "0.0.0.0"  # the kubelet is outside the pod
    probes = {kind: watch[kind]["httpGet"] for kind in ("readinessProbe", "livenessProbe")}
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert (probes["readinessProbe"]["path"], probes["livenessProbe"]["path"]) == ("/healthz", "/metrics")


def exposed(tmp_path: Path) -> set[str]:
    """The names of all metrics of a watch and of a push."""
    pytest.importorskip("prometheus_client")
    from wsync.service.metrics import Figures, RunFigures

    families = [*Figures("actor").registry.collect(), *RunFigures("actor", tmp_path / "actor.prom").collect()]
    return {f"{family.name}_total" if family.type == "counter" else family.name for family in families}


def check_query(query: str, there: set[str]) -> set[str]:
    """Every metric, label and status of a query is one that is exposed; returns the metrics."""
    from wsync.service.metrics import STATUSES

    metrics = set(re.findall(r"\bwsync_\w+", query))
    assert metrics and {metric.removesuffix("_bucket") for metric in metrics} <= there, query
    labels = re.findall(r"(\w+)=~?\"", query)
    labels += [word for group in re.findall(r"by \(([^)]*)\)", query) for word in group.split(", ")]
    assert {*labels} <= {"name", "le", "status", "reason", "reader", "hook"}, query
    assert {*re.findall(r'status="(\w+)"', query)} <= {*STATUSES}, query
    return metrics


def test_each_alert_is_on_figures_that_there_are(tmp_path: Path) -> None:
    """Every metric that a rule names, and every label and status, is one that is exposed."""
    there = exposed(tmp_path)
    rules = [rule for group in yaml_of("alerts.yaml")["groups"] for rule in group["rules"]]
    assert len(rules) > 5 and len({rule["alert"] for rule in rules}) == len(rules)
    named = set()
    for rule in rules:
        named |= check_query(rule["expr"], there)
        assert rule["annotations"]["summary"] and rule["labels"]["severity"]
        used = re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])
        assert {*used} <= {"name", "reason", "reader", "hook"}, rule
    assert len(named) > 5


def test_each_panel_of_the_dashboard_is_on_figures_that_there_are(tmp_path: Path) -> None:
    """What Grafana draws is exposed, each panel has a place of its own, and its legend names labels of its query."""
    there, board = exposed(tmp_path), json.loads((OPERATIONS / "grafana.json").read_text())
    panels, named = board["panels"], set()
    assert len({panel["id"] for panel in panels}) == len({str(panel["gridPos"]) for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"]["uid"] == "${source}" and panel["title"]
        for target in panel["targets"]:
            named |= check_query(target["expr"], there)
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= {
                "name",
                "reason",
                "reader",
                "status",
                "hook",
            }
    (variable,) = (each for each in board["templating"]["list"] if each["type"] == "query")
    check_query(variable["query"], there)
    assert len(named) > 9


def test_promtool_takes_the_rules() -> None:
    """Prometheus' own checker, where it is there, finds the expressions right."""
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool is not installed")
    done = subprocess.run([promtool, "check", "rules", str(OPERATIONS / "alerts.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
