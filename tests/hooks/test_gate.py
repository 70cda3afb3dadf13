"""Gates: real commands and functions look at staged weights, and what they do not accept is never live."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import NAME, SPEC, marks, write
from others import run_main
from policies import Tied, mlp
from processes import DEADLINE, Cli, Spawn, heard, signal_another_thread
from safetensors import safe_open
from safetensors.torch import load_file

import wsync
from wsync import SharedMemoryWeightUpdater
from wsync.errors import GateRejected, RetryLater, SegmentError, SpecError, UsageError
from wsync.hooks import command, gate
from wsync.layout.layout import layout_of
from wsync.segment.publishing import Staged
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.settings.hook_settings import VARIABLES, Hooks
from wsync.settings.spec import load_spec
from wsync.sync.outcome import Outcome
from wsync.sync.syncer import Syncer

pytestmark = pytest.mark.slow

OPTIONS = {f"WSYNC_{name.upper()}" for name in Hooks.__dataclass_fields__}

Push = Callable[..., Outcome]
Gated = Callable[..., Syncer]

GATES = """
import os
import wsync

def sees(policy):
    with open("seen", "w") as file:
        print(policy.training, {float(x) for t in policy.state_dict().values() for x in t.flatten()}, file=file)
    with __import__("torch").no_grad():
        for tensor in policy.parameters():
            tensor.zero_()
    return "any other word than False"

def refuses(policy):
    print("what it prints")
    raise ValueError("return 20 is \\x1b[31mtoo low")

def later(policy):
    raise wsync.RetryLater("warming up")

def false(policy):
    return False

def exits(policy):
    raise SystemExit(0)

def vanishes(policy):
    print("going", flush=True)
    os._exit(0)

def hangs(policy):
    with open("up", "w") as file:
        file.write("up")
        file.flush()
        os.read(os.open("hold", os.O_RDONLY), 1)

no_function = 42
"""


@pytest.fixture
def runs(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of checkpoints, relative to the current directory, which is the spec's, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "runs").mkdir()
    (tmp_path / "gates.py").write_text(GATES)
    return Path("runs")


@pytest.fixture
def live(runs: Path, layouts_here: None) -> Iterator[WritableSegment]:
    """A segment whose version 1 is ``runs/step_1.safetensors``, weights of mark 1."""
    segment = WritableSegment.create(NAME, layout_of(mlp()), spec=load_spec(SPEC).fingerprint())
    write(runs / "step_1.safetensors", mlp(), 1.0)
    with Syncer(load_spec(SPEC), runs) as syncer:
        assert syncer.once().status == "published"
    yield segment
    segment.close()


@pytest.fixture
def syncer(live: WritableSegment, runs: Path) -> Iterator[Gated]:
    """Makes a syncer of the segment with a gate."""
    made: list[Syncer] = []

    def make(gate: str, **settings: float) -> Syncer:
        made.append(Syncer(replace(load_spec(SPEC), hooks=Hooks(gate=gate, **settings)), runs))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


def mark_of(segment: Segment) -> set[float]:
    return {float(x) for t in load_file(slot_of(segment)).values() for x in t.flatten()}


def slot_of(segment: Segment) -> Path:
    return segment.path / f"slot-{segment.word & 0xFF}.safetensors"


def asked(count: str = "asked") -> int:
    return Path(count).read_text().count("x") if Path(count).exists() else 0


# --- commands


def test_command_sees_the_staged_file(live: WritableSegment, syncer: Gated, runs: Path) -> None:
    """The gate finds a whole safetensors file with the new weights and their step, while the old ones are live."""
    path = write(runs / "step_2.safetensors", mlp(), 2.0)
    took = syncer(
        'cp "$WSYNC_HOOK_STAGED" seen.safetensors; env > seen.env; echo "$WSYNC_HOOK_STAGED" > seen.path'
    ).once()
    assert (took.status, took.version, mark_of(live)) == ("published", 2, {2.0})
    with safe_open("seen.safetensors", "pt") as file:
        metadata = file.metadata()
        assert {float(x) for name in file.keys() for x in file.get_tensor(name).flatten()} == {2.0}  # noqa: SIM118
    assert (metadata["version"], metadata["step"], metadata["source"]) == ("2", "2", str(path.absolute()))
    seen = dict(line.split("=", 1) for line in Path("seen.env").read_text().splitlines() if line.startswith("WSYNC_"))
    assert (seen["WSYNC_HOOK_NAME"], seen["WSYNC_HOOK_STEP"], seen["WSYNC_HOOK_CHECKPOINT"]) == (
        NAME,
        "2",
        str(path.absolute()),
    )
    assert seen.keys() - os.environ.keys() <= set(VARIABLES)


def test_version_is_dated_after_the_gate(
    live: WritableSegment, syncer: Gated, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version is as old as its publish, not as its staging: the gate's own time does not count."""
    now = time.time()
    monkeypatch.setattr("wsync.segment.publishing.time.time", lambda: now + (1000 if Path("done").exists() else 0))
    write(runs / "step_2.safetensors", mlp(), 2.0)
    syncer("touch done").once()
    publication = live.live()
    assert publication and publication.published_at == now + 1000


def test_rejected_is_remembered_and_never_live(live: WritableSegment, syncer: Gated, runs: Path) -> None:
    """Another status rejects with the output as the reason; it is asked once, and again when the file changed."""
    path = write(runs / "step_2.safetensors", mlp(), 2.0)
    pushing = syncer("printf x >> asked; echo return 20 is too low; echo or so >&2; exit 3")
    policy = mlp()
    with wsync.attach(policy, NAME) as reader:
        for _ in range(3):
            told = pushing.once()
            assert (told.status, told.exit_code, told.version, told.step) == ("rejected", 65, 1, 2)
            assert told.reason and "status 3:\n  return 20 is too low\n  or so\n" in told.reason
            assert str(path) in told.reason and "exit 3" in told.reason
            assert not reader.refresh() and marks(policy) == {1.0}
        assert asked() == 1
        write(path, mlp(), 2.5)
        assert pushing.once().status == "rejected"
        assert (asked(), reader.refresh(), live.version) == (2, False, 1)


@pytest.mark.parametrize(
    ("gate", "file", "text"),
    [
        ("gates:check", "gates.py", "def check(policy):\n    return {}"),
        ("more.gates:check", "more/gates.py", "def check(policy):\n    return {}"),
        ("./check >> check.log", "check", "#!/bin/sh\necho asked; {}"),
        ("sh check.sh", "check.sh", "{}"),
        ("python 'check.py' best.json", "check.py", "open('best.json', 'a').write('x'); exit(not {})"),
    ],
)
def test_an_edited_gate_is_asked_again(
    gate: str, file: str, text: str, live: WritableSegment, syncer: Gated, runs: Path
) -> None:
    """A fixed gate is asked at the next pass of the same watch or of a push; what a gate writes changes nothing."""
    Path(file).parent.mkdir(exist_ok=True)
    refuses, accepts = ("False", "True") if file.endswith(".py") else ("exit 1", "exit 0")
    for mark, pushes in ((2.0, False), (3.0, True)):
        Path(file).write_text(text.format(refuses))
        Path(file).chmod(0o755)
        write(runs / "step_2.safetensors", mlp(), mark)
        watch = syncer(gate)
        first, again = watch.once(), watch.once()
        assert (first.status, first.kind, again.status, again.kind) == ("rejected", first.kind, "rejected", "")
        Path(file).write_text(text.format(accepts))
        assert (syncer(gate) if pushes else watch).once().status == "published"
        assert mark_of(live) == {mark}


def test_next_newest_is_tried_after_a_rejection(live: WritableSegment, syncer: Gated, runs: Path) -> None:
    """Where the gate does not want the newest, the one before it goes live, and the newest is told as refused."""
    write(runs / "step_2.safetensors", mlp(), 2.0)
    write(runs / "step_3.safetensors", mlp(), 3.0)
    took = syncer("test $WSYNC_HOOK_STEP != 3").once()
    assert (took.status, took.step, mark_of(live)) == ("published", 2, {2.0})
    assert [(each.status, each.step) for each in took.passed_over] == [("rejected", 3)]


def test_75_tries_the_same_later(live: WritableSegment, syncer: Gated, runs: Path) -> None:
    """Status 75 is busy, not remembered, and nothing older goes live in its place; accepted later it does."""
    write(runs / "step_2.safetensors", mlp(), 2.0)
    write(runs / "step_3.safetensors", mlp(), 3.0)
    pushing = syncer("printf x >> asked; test -e ready && exit 0; echo not yet; exit 75")
    for count in (1, 2):
        told = pushing.once()
        assert (told.status, told.exit_code, told.step, told.version) == ("busy", 75, 3, 1)
        assert told.reason and "not yet" in told.reason
        assert (asked(), mark_of(live)) == (count, {1.0})
    Path("ready").touch()
    assert (pushing.once().status, mark_of(live)) == ("published", {3.0})


def test_ended_by_a_signal_rejects(live: WritableSegment, syncer: Gated, runs: Path) -> None:
    """A gate that is killed has accepted nothing, and the reason names the signal."""
    write(runs / "step_2.safetensors", mlp(), 2.0)
    told = syncer("kill -9 $$").once()
    assert told.status == "rejected" and told.reason and "SIGKILL" in told.reason and live.version == 1


def test_timeout_ends_the_whole_group(
    live: WritableSegment,
    syncer: Gated,
    runs: Path,
    fifo: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gate that takes too long has rejected, and nothing that it started is left, even what ignores SIGTERM."""
    monkeypatch.setattr(command, "GRACE", 0.2)
    up = fifo("up")
    write(runs / "step_2.safetensors", mlp(), 2.0)
    stubborn = 'trap "" TERM; echo up; sleep 99'
    told = syncer(f"sh -c '{stubborn}' > up & sh -c '{stubborn}'", gate_timeout=1.5).once()
    assert told.status == "rejected" and told.reason and "took longer than 1.5 s: up" in told.reason
    assert (heard(up), heard(up)) == (b"up\n", b"")
    assert live.version == 1


def test_timeout_ends_sessions_of_their_own(
    live: WritableSegment,
    syncer: Gated,
    runs: Path,
    fifo: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a gate started in another session, and whose parent is gone, outlives the gate's time no more than it."""
    monkeypatch.setattr(command, "GRACE", 0.2)
    up = fifo("up")
    write(runs / "step_2.safetensors", mlp(), 2.0)
    gate = "exec > up 2>&1; (setsid sh -c 'trap \"\" TERM; echo up; sleep 99' &); sleep 99"
    told = syncer(gate, gate_timeout=1).once()
    assert told.status == "rejected" and "took longer than 1 s" in (told.reason or "")
    assert heard(up) == b"up\n" and heard(up) == b""


CHANGES = {
    "view": '(echo x > "$WSYNC_HOOK_STAGED") && touch done',
    "view-cut": '(: > "$WSYNC_HOOK_STAGED") && touch done',
    "view-removed": 'rm -f "$WSYNC_HOOK_STAGED" && touch done',
    "written": "for slot in {}; do printf x | dd of=$slot bs=1 seek=9000 conv=notrunc; done",
    "written-and-refused": "for slot in {}; do printf x | dd of=$slot bs=1 seek=9000 conv=notrunc; done; exit 1",
    "cut": "for slot in {}; do : > $slot; done",
    "lengthened": "for slot in {}; do echo x >> $slot; done",
    "unlinked": "rm {}",
    "replaced": "for slot in {}; do cp $slot other; mv other $slot; done",
    "control": 'printf x | dd of="$WSYNC_RUNTIME_DIR/$WSYNC_HOOK_NAME/control" conv=notrunc',
    "gone": 'rm -r "$WSYNC_RUNTIME_DIR/$WSYNC_HOOK_NAME"',
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_goes_live_is_what_the_gate_was_shown(
    live: WritableSegment, syncer: Gated, runs: Path, change: str
) -> None:
    """A gate cannot change what it is shown; where it finds the slot itself and changes that, nothing goes live."""
    spare = " ".join(str(live.path / f"slot-{slot}.safetensors") for slot in (1, 2))
    write(runs / "step_2.safetensors", mlp(), 2.0)
    pushing = syncer(f"({CHANGES[change].format(spare)}){'' if change.endswith('refused') else '; true'}")
    if change.startswith("view"):
        assert pushing.once().version == 2 and not Path("done").exists() and mark_of(live) == {2.0}
        return
    word = live.word
    with pytest.raises(SegmentError, match="the gate looked at"):
        pushing.once()
    assert live.word == word
    if change not in ("unlinked", "replaced", "control", "gone"):  # the segment is whole
        with Syncer(load_spec(SPEC), runs) as again:
            assert again.once().status == "published"
        assert mark_of(Segment.open(NAME)) == {2.0}  # where a spare slot was cut, the segment is made anew


def test_sigterm_comes_first(live: WritableSegment, syncer: Gated, runs: Path) -> None:
    """A gate whose time is up may clean up: its handler of SIGTERM runs, and its shell's end does not cut it short."""
    write(runs / "step_2.safetensors", mlp(), 2.0)
    inner = 'trap "sleep 0.2; touch cleaned; exit" TERM; echo up; for i in $(seq 999); do sleep 0.05; done'
    told = syncer(f"sh -c '{inner}'; true", gate_timeout=1.0).once()
    assert told.status == "rejected" and Path("cleaned").exists()


def test_background_child_holds_nobody_up(
    live: WritableSegment, syncer: Gated, runs: Path, fifo: Callable[[str], int]
) -> None:
    """What a gate leaves running keeps its pipe open, and is not waited for."""
    fifo("hold")
    hold = os.open("hold", os.O_WRONLY)
    write(runs / "step_2.safetensors", mlp(), 2.0)
    took = syncer("(read x < hold) & echo fine", gate_timeout=DEADLINE).once()
    assert took.status == "published" and took.seconds < DEADLINE / 2
    os.close(hold)


def test_a_gate_that_closes_its_output_is_waited_for(
    live: WritableSegment, syncer: Gated, runs: Path, fifo: Callable[[str], int]
) -> None:
    """The end of the output is not the end of the gate: its status counts."""
    write(runs / "step_2.safetensors", mlp(), 2.0)
    told = syncer("exec > /dev/null 2>&1; sleep 0.3; exit 1").once()
    assert told.status == "rejected" and told.reason and "status 1, without a word" in told.reason


def test_output_is_bounded_and_harmless(live: WritableSegment, syncer: Gated, runs: Path) -> None:
    """Of a flood the end is kept, and nothing of it reaches the terminal as a control character."""
    write(runs / "step_2.safetensors", mlp(), 2.0)
    told = syncer("yes tick | head -c 200000000; printf '\\033[31mred\\007 \\342\\200\\256bad\\377'; exit 1").once()
    assert told.reason and len(told.reason) < 3000 and told.reason.count("\n") < 25
    assert "\\x1b[31mred\\x07 \\u202ebad\ufffd" in told.reason
    assert all(c.isprintable() or c == "\n" for c in told.reason)
    assert told.reason.endswith("\nThe checkpoint stays rejected until it or the gate changes.")


def test_gate_may_call_wsync(
    live: WritableSegment, runs: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch, syncer: Gated
) -> None:
    """Also where the runtime directory was no variable: status of the name that it was given says what is live."""
    monkeypatch.delenv("WSYNC_RUNTIME_DIR")
    for option in ("WSYNC_GATE", "WSYNC_EXEC", "WSYNC_WEBHOOK"):
        monkeypatch.setenv(option, "exit 1")
    write(runs / "step_2.safetensors", mlp(), 2.0)
    look = f'env > seen.env; {sys.executable} -m wsync status "$WSYNC_HOOK_NAME" --json > seen.json'
    with Syncer(replace(load_spec(SPEC), hooks=Hooks(gate=look)), runs, runtime=runtime) as pushing:
        assert pushing.once().status == "published"
    seen = json.loads(Path("seen.json").read_text())
    assert (seen["name"], seen["version"], seen["step"]) == (NAME, 1, 1)
    assert not {line.partition("=")[0] for line in Path("seen.env").read_text().splitlines()} & OPTIONS


def test_gate_and_hook_get_what_the_publisher_was_given(segment: WritableSegment, runs: Path, program: Cli) -> None:
    """Nothing that wsync, or Python, sets for itself, and no option of the push; what Kubernetes sets stays."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    service = {"WSYNC_METRICS_PORT": "tcp://10.0.0.2:9464"}
    kept = {name: os.environ[name] for name in ("PYTHONPATH", "WSYNC_RUNTIME_DIR", "WSYNC_STATE_DIR")}
    kept |= service | {"PATH": os.environ["PATH"], "ODD": "a=b\n", "NOT": "\udcff"}
    options = {"KEEP": "3", "NAME": NAME, "SLOTS": "4", "FORCE": "1", "HOOK_VERSION": "9", "GATE": "env -0 > gate"}
    given = {f"WSYNC_{name}": value for name, value in options.items()}
    done = program("push", SPEC, "runs", "--exec", "env -0 > exec", env={**kept, **given})
    assert done.returncode == 0, done.stderr
    for file in ("gate", "exec"):
        pairs = [pair.partition("=") for pair in os.fsdecode(Path(file).read_bytes()).split("\0") if pair]
        seen = {name: value for name, _, value in pairs if not name.startswith("WSYNC_HOOK_")}
        assert {name: value for name, value in seen.items() if name not in ("PWD", "_", "SHLVL", "OLDPWD")} == kept
        assert {name for name, _, _ in pairs} - seen.keys() <= set(VARIABLES)
    assert "WSYNC_HOOK_VERSION=9" not in Path("gate").read_text(errors="replace")


def test_a_hook_pushes_another_policy_into_its_own_segment(segment: WritableSegment, runs: Path, cli: Cli) -> None:
    """What a hook calls goes by its own spec: neither the name nor other variables of the outer push act on it."""
    write(runs / "step_1.safetensors", mlp(), 1.0)
    Path("critic.toml").write_text('policy = "policies:mlp"\ncheckpoints = "runs"\n')
    WritableSegment.create("critic", layout_of(mlp()), spec=load_spec("critic.toml").fingerprint()).close()
    push = f"{sys.executable} -m wsync push critic.toml"
    outer = {"WSYNC_NAME": NAME, "WSYNC_PATTERN": "step_*", "WSYNC_FORCE": "1", "WSYNC_DRY_RUN": "0"}
    for _ in range(2):
        done = cli("push", SPEC, "runs", "--exec", push, env={**os.environ, **outer})
        assert done.returncode == 0 and not done.stderr, done.stderr
    critic = Segment.open("critic")
    assert (segment.version, critic.version) == (2, 1)
    critic.close()


def test_gate_and_hook_find_the_state(segment: WritableSegment, runs: Path, cli: Cli, tmp_path: Path) -> None:
    """Also where its directory was no variable: a hook may look at the log, pin, or roll back what it dislikes."""
    env = {name: value for name, value in os.environ.items() if name != "WSYNC_STATE_DIR"}
    env["XDG_STATE_HOME"] = str(tmp_path / "elsewhere")
    write(runs / "step_1.safetensors", mlp(), 1.0)
    call = f'{sys.executable} -m wsync log "$WSYNC_HOOK_NAME" --json'
    arguments = ("--state-dir", "kept", "--gate", f"{call} > gate.json", "--exec", f"{call} > exec.json")
    for _ in range(2):
        assert cli("push", SPEC, "runs", "--force", *arguments, env=env).returncode == 0
    told = [[event["kind"] for event in json.loads(Path(f).read_text())["events"]] for f in ("gate.json", "exec.json")]
    assert told == [["gate", "publish"], ["gate", "publish"] * 2]


def test_command_runs_beside_the_spec(runs: Path, cli: Cli) -> None:
    """The command of a TOML runs in its directory, wherever the push was started."""
    Path("box").mkdir()
    Path("box/gate.sh").write_text('echo "$WSYNC_HOOK_NAME" > seen\n')
    Path("box/actor.toml").write_text(
        'policy = "policies:mlp"\ncheckpoints = "../runs"\n[hooks]\ngate = "sh gate.sh"\ngate_timeout = 50\n'
    )
    write(runs / "step_1.safetensors", mlp(), 1.0)
    WritableSegment.create("actor", layout_of(mlp()), spec=load_spec("box/actor.toml").fingerprint()).close()
    assert cli("push", "box/actor.toml").returncode == 0
    assert Path("box/seen").read_text() == "actor\n"


def test_killed_publisher_leaves_the_live_version_and_no_gate(
    live: WritableSegment, runs: Path, spawn: Spawn, cli: Cli, fifo: Callable[[str], int]
) -> None:
    """Killed while its gate runs a publisher has published nothing, and all that the gate started ends with it."""
    up, word = fifo("up"), live.word
    write(runs / "step_2.safetensors", mlp(), 2.0)
    gate = "exec > up; setsid sh -c 'trap \"\" TERM; echo up; sleep 99' & sleep 99"
    publisher = spawn("-m", "wsync", "push", SPEC, "runs", "--gate", gate)
    policy = mlp()
    with wsync.attach(policy, NAME) as reader:
        assert heard(up) == b"up\n"
        assert cli("push", SPEC, "runs").returncode == 75
        assert not reader.refresh() and live.word == word
        publisher.kill()
        publisher.wait()
        assert not reader.refresh() and (live.word, mark_of(live)) == (word, {1.0})
        assert cli("push", SPEC, "runs").returncode == 0
        assert reader.refresh() and marks(policy) == {2.0}
    assert heard(up) == b""


@pytest.mark.parametrize(("command", "code"), [("push", 143), ("watch", 0)])
def test_stopped_ends_its_gate(
    live: WritableSegment, runs: Path, spawn: Spawn, fifo: Callable[[str], int], command: str, code: int
) -> None:
    """SIGTERM to a push or a watch ends the gate that it waits for, and nothing is published."""
    up = fifo("up")
    write(runs / "step_2.safetensors", mlp(), 2.0)
    publisher = spawn("-m", "wsync", command, SPEC, "runs", "--gate", "exec > up; echo up; sleep 99")
    assert heard(up) == b"up\n"
    signal_another_thread(publisher.pid, signal.SIGTERM)
    assert publisher.wait(DEADLINE) == code
    assert heard(up) == b"" and live.version == 1


# --- functions


def test_function_gets_the_real_policy(runs: Path) -> None:
    """In eval mode with the staged weights in it, ties among them; what it does to them does not reach the slot."""
    spec = replace(load_spec("policies:Tied"), hooks=Hooks(gate="gates:sees"))
    segment = WritableSegment.create(spec.name, layout_of(Tied()), spec=spec.fingerprint())
    policy = Tied()
    source = write(runs / "step_1.safetensors", policy, 2.0)
    with Syncer(spec, source) as pushing:
        took = pushing.once()
        assert took.status == "published", took
    assert Path("seen").read_text() == "False {2.0}\n"
    assert mark_of(segment) == {2.0}
    segment.close()


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("refuses", "rejected", ["ValueError: return 20 is \\x1b[31mtoo low", "gates.py:1"]),
        ("later", "busy", ["warming up"]),
        ("vanishes", "rejected", ["without a verdict: going"]),
    ],
)
def test_function_in_its_process(
    live: WritableSegment, runs: Path, syncer: Gated, name: str, status: str, words: list[str]
) -> None:
    """An exception rejects with its text and line, RetryLater is later, and a process without a verdict rejects."""
    write(runs / "step_2.safetensors", mlp(), 2.0)
    pushing = syncer(f"gates:{name}")
    told = pushing.once()
    assert (told.status, live.version, mark_of(live)) == (status, 1, {1.0})
    assert told.reason and all(word in told.reason for word in words), told.reason
    assert bool(pushing.record.refusals(())) == (status == "rejected")


@pytest.fixture
def staged(live: WritableSegment) -> Staged:
    return Staged(path=slot_of(live), name=NAME, extras={}, version=2, step=2, checkpoint="there/step_2.safetensors")


@pytest.mark.parametrize(
    ("name", "verdict", "word"),
    [
        ("sees", "accept", ""),
        ("false", "reject", "returned False"),
        ("exits", "reject", "SystemExit: 0"),
        ("nowhere", "error", "no attribute 'nowhere'"),
        ("no_function", "error", "is a int"),
    ],
)
def test_verdicts(staged: Staged, name: str, verdict: str, word: str) -> None:
    """Any return accepts but False; to exit is not to accept; what cannot be asked is an error of the settings."""
    sys.modules.pop("gates", None)
    try:
        told, why = gate._judge(replace(load_spec(SPEC), hooks=Hooks(gate=f"gates:{name}")), staged)
    except SpecError as exc:
        told, why = "error", str(exc)
    assert told == verdict and word in why


def test_policy_of_another_shape_is_not_asked(staged: Staged) -> None:
    """A policy that is built otherwise than its segment is told as that, before anything is copied."""
    with pytest.raises(SpecError, match="other tensors"):
        gate.load(mlp(hidden=3), staged.path)
    with pytest.raises(SpecError, match="other tensors"):
        gate.load(mlp().to(torch.float64), staged.path)


def test_missing_function_is_usage(live: WritableSegment, runs: Path, cli: Cli) -> None:
    """A gate that cannot be imported is a wrong setting, and no word about the checkpoint."""
    write(runs / "step_2.safetensors", mlp(), 2.0)
    result = cli("push", SPEC, "runs", "--gate", "gates:refuse")
    assert result.returncode == 2 and "'refuses'" in result.stderr and "Traceback" not in result.stderr
    assert live.version == 1


def test_function_dies_with_its_publisher(
    live: WritableSegment, runs: Path, spawn: Spawn, fifo: Callable[[str], int]
) -> None:
    """A publisher that is killed takes the process of its gate's function along; what was live stays."""
    up, _ = fifo("up"), fifo("hold")
    hold = os.open("hold", os.O_WRONLY)
    write(runs / "step_2.safetensors", mlp(), 2.0)
    publisher = spawn("-m", "wsync", "push", SPEC, "runs", "--gate", "gates:hangs")
    assert heard(up) == b"up"
    publisher.kill()
    assert heard(up) == b"" and live.version == 1
    os.close(hold)


# --- settings


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("gates:returns", True),
        ("package.module:Class.method", True),
        ("gates", False),
        ("./gates:returns", False),
        ("gates:returns now", False),
        ("check:1", False),
        ("true:\n", False),
    ],
)
def test_function_is_told_from_command(text: str, function: bool) -> None:
    """Names, dots and one colon are a function; anything else is for the shell."""
    assert Hooks(gate=text).gate_is_function is function


def test_options_and_variables(live: WritableSegment, runs: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """--gate, or its variable, is the TOML's; the exit code is 65 or 75, and the empty gate is none."""
    write(runs / "step_2.safetensors", mlp(), 2.0)
    Path("actor.toml").write_text(
        f'policy = "{SPEC}"\nname = "{NAME}"\ncheckpoints = "runs"\n[hooks]\ngate = "exit 1"\n'
    )
    monkeypatch.setenv("WSYNC_TAKE_OVER", "1")  # what is live came from the import string
    rejected = cli("push", "actor.toml", "--json")
    assert (rejected.returncode, json.loads(rejected.stdout)["status"]) == (65, "rejected")
    later = cli("push", "actor.toml", env={**os.environ, "WSYNC_GATE": "exit 75"})
    assert later.returncode == 75 and "at the next pass" in later.stderr
    late = cli("push", "actor.toml", "--gate", "sleep 60", "--gate-timeout", "0.1")
    assert late.returncode == 65 and "took longer than 0.1 s" in late.stderr
    assert live.version == 1
    assert cli("push", "actor.toml", "--gate", "").returncode == 0


def test_dry_run_says_that_it_did_not_ask(live: WritableSegment, runs: Path) -> None:
    """A rehearsal has no slot to look at: it says that the gate was left out."""
    write(runs / "step_2.safetensors", mlp(), 2.0)
    code, out, _ = run_main("push", SPEC, "runs", "--gate", "touch asked; exit 1", "--dry-run")
    assert code == 0 and "the gate was not asked" in out and not Path("asked").exists()


def test_publisher_with_a_function_imports_no_torch(live: WritableSegment, runs: Path, program: Cli) -> None:
    """The user's function brings torch into its own process, never into the publisher's."""
    write(runs / "step_2.safetensors", mlp(), 2.0)
    result = program("push", SPEC, "runs", "--gate", "gates:sees", env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 0 and "wsync.hooks.gate" in result.stderr
    assert not {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()} & {"torch", "gates", "policies"}


def test_updater_takes_a_gate(live: WritableSegment) -> None:
    """A library's gate is any callable: it sees weights from memory, too, and its error is the push's."""
    updater = SharedMemoryWeightUpdater(NAME)
    seen: list[Staged] = []

    def refuse(staged: Staged) -> None:
        seen.append(staged)
        raise GateRejected("no")

    updater.gate = refuse
    weights = {name: torch.full_like(tensor, 2.0) for name, tensor in mlp().state_dict().items()}
    with pytest.raises(GateRejected):
        updater.push_weights(weights)
    assert (live.version, mark_of(live)) == (1, {1.0})
    assert (seen[0].version, seen[0].step, seen[0].checkpoint) == (2, None, "")
    updater.gate = seen.append
    updater.push_weights(weights)
    assert (seen[1].path, mark_of(live)) == (slot_of(live), {2.0})
    updater.close()


def test_retry_later_is_public() -> None:
    """A user's gate raises what ``wsync`` itself has under this name."""
    assert wsync.RetryLater is RetryLater and RetryLater.exit_code == 75


@pytest.mark.parametrize(
    "settings",
    [
        {"gate_timeout": 0.0},
        {"exec_timeout": -1.0},
        {"exec_backoff": float("nan")},
        {"webhook_timeout": 1e9},
        {"gate": "a\0b"},
        {"webhook": "file:///etc/passwd?secret"},
        {"webhook": "http://?secret"},
        {"webhook": "http://host:port/secret"},
        {"webhook": "http://host/ secret"},
        {"webhook": "ftp://host/secret"},
        {"webhook_method": "PO ST"},
        {"webhook_success_status": 99},
    ],
)
def test_wrong_settings_are_usage_errors(settings: dict[str, object]) -> None:
    """Each names the setting, and no URL is shown."""
    with pytest.raises(UsageError, match=next(iter(settings))) as caught:
        Hooks(**settings)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value).replace("a secret", "")
