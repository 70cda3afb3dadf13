"""Promotes: what is live in one segment goes live in another, with the gate, the hooks and the history of that one."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import mark_of, marks, report, write
from others import run_cli, run_forked
from policies import mlp
from processes import DEADLINE, Spawn, heard
from safetensors.torch import save_file

import wsync
from wsync.cli.options import targets
from wsync.errors import SegmentMissing, SpecError, UsageError
from wsync.fitting.fit import Fit
from wsync.history.rollback import pin_checkpoint, rollback
from wsync.history.state import Event, State
from wsync.layout.layout import Layout, layout_of
from wsync.segment.publication import Publication
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.settings import layout_process
from wsync.settings.spec import Spec, load_spec
from wsync.sync.claim import Watching, WatchLock
from wsync.sync.outcome import Outcome
from wsync.sync.promoting import promote
from wsync.sync.syncer import Syncer
from wsync.updaters.shared_memory import SharedMemoryWeightUpdater

CANARY, MAIN, SPEC = "cartpole-canary", "cartpole", "cartpole.toml"
TOML = 'policy = "policies:mlp"\ncheckpoints = "runs"\n'
Push = Callable[..., Outcome]


@pytest.fixture
def push(runs: Path, layouts_here: None) -> Push:
    """Pushes a checkpoint of one value into a segment, as its spec says."""
    Path(SPEC).write_text(TOML)
    fingerprint = load_spec(SPEC).fingerprint()
    for name in (CANARY, MAIN):
        WritableSegment.create(name, layout_of(mlp()), spec=fingerprint).close()

    def once(name: str, mark: float, weights: Fit = Fit()) -> Outcome:  # noqa: B008  (frozen)
        path = write(runs / f"step_{mark:.0f}.safetensors", mlp(), mark)
        with Syncer(replace(load_spec(SPEC, name=name), weights=weights), path, state=State(name)) as syncer:
            return syncer.once()

    return once


def live(name: str) -> Publication:
    with closing(Segment.open(name)) as segment:
        found = segment.live()
        assert found
        return found


def values(name: str) -> set[float]:
    with closing(Segment.open(name)) as segment:
        return mark_of(segment)


def events(name: str) -> list[Event]:
    with State(name) as state:
        return state.events()


def memory(name: str, mark: float, step: int | None = None, *, finite: bool = True) -> None:
    policy = mlp()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(mark)
    with closing(SharedMemoryWeightUpdater(name, finite=finite)) as updater:
        updater.step = step
        updater.push_weights(policy)


@pytest.mark.parametrize("target", [MAIN, SPEC])
def test_the_live_version_goes_live_in_the_target(push: Push, target: str) -> None:
    """Bytes, step, checkpoint and what tells it apart are the source's; owner, version and history the target's."""
    push(MAIN, 1)
    push(CANARY, 1)
    push(CANARY, 2)
    outcome = promote(CANARY, target)
    assert (outcome.status, outcome.name, outcome.version, outcome.step) == ("published", MAIN, 2, 2)
    one, other = live(CANARY), live(MAIN)
    assert values(MAIN) == {2.0} and one.changed_ns
    assert replace(one, published_at=0.0) == replace(other, published_at=0.0)
    assert events(MAIN)[-1].reason == f"promoted from {CANARY}, version 2"


def test_what_is_live_already_is_not_published_again(push: Push) -> None:
    """Guards the second of two promotes; and the first where one file was fitted into two other sets of weights."""
    push(MAIN, 1)
    push(CANARY, 2)
    assert [promote(CANARY, MAIN).status for _ in range(2)] == ["published", "current"]
    assert live(MAIN).version == 2 and len(events(MAIN)) == 2
    both = {f"{head}.{name}": torch.full_like(t, mark) for head, mark in (("a", 3.0), ("b", 4.0))
            for name, t in mlp().state_dict().items()}  # fmt: skip
    save_file(both, "runs/both.safetensors")
    for prefix, name in (("a.", MAIN), ("b.", CANARY)):
        with Syncer(replace(load_spec(SPEC, name=name), weights=Fit(prefix=prefix)), "runs/both.safetensors") as syncer:
            assert syncer.once().status == "published"
    assert live(MAIN).identity == live(CANARY).identity
    assert promote(CANARY, MAIN).status == "published" and values(MAIN) == {4.0}


def test_a_rollback_goes_back_from_a_promote_and_to_one(push: Push, runs: Path) -> None:
    """Guards the way back by a slot; and by the file, with the settings by which the source took it."""
    push(MAIN, 1)
    save_file({f"a.{name}": torch.full_like(t, 2.0) for name, t in mlp().state_dict().items()}, runs / "a.safetensors")
    spec = replace(load_spec(SPEC, name=CANARY), weights=Fit(prefix="a."))
    with Syncer(spec, runs / "a.safetensors", state=State(CANARY)) as syncer:
        syncer.once()
    promote(CANARY, MAIN)
    with State(MAIN) as state:
        assert rollback(MAIN, None, runtime=None, state=state)[0].step == 1 and values(MAIN) == {1.0}
        WritableSegment.open(MAIN).remove()
        WritableSegment.create(MAIN, layout_of(mlp())).close()
        assert rollback(MAIN, 2, runtime=None, state=state)[0].version == 4 and values(MAIN) == {2.0}


def test_a_mixture_comes_back_from_a_slot_alone(push: Push, runs: Path) -> None:
    """Guards against weights that kept live values of the source, and are in no file, coming back from their file."""
    push(MAIN, 1)
    push(CANARY, 2)
    save_file({"2.bias": torch.full_like(mlp().state_dict()["2.bias"], 9.0)}, runs / "part.safetensors")
    spec = replace(load_spec(SPEC, name=CANARY), weights=Fit(strict=False))
    with Syncer(spec, runs / "part.safetensors", state=State(CANARY)) as syncer:
        assert syncer.once().status == "published"
    assert promote(CANARY, MAIN).version == 2 and values(MAIN) == {2.0, 9.0}
    push(MAIN, 3)
    with State(MAIN) as state:
        assert rollback(MAIN, 2, runtime=None, state=state)[0].version == 4 and values(MAIN) == {2.0, 9.0}
        WritableSegment.open(MAIN).remove()
        WritableSegment.create(MAIN, layout_of(mlp())).close()
        with pytest.raises(wsync.NoCheckpoint, match="kept live values"):
            rollback(MAIN, 2, runtime=None, state=state)


def test_weights_from_memory_are_promoted_and_gone_back_to(push: Push) -> None:
    """Guards versions without a file, which are told apart all the same; ``keep`` keeps copies of them."""
    Path(SPEC).write_text(f"{TOML}keep = 3\n")
    memory(MAIN, 1.0)
    for mark in (2, 3, 3):
        memory(CANARY, float(mark), mark)
        outcome = promote(CANARY, SPEC)
        assert (outcome.status, outcome.step, outcome.checkpoint) == ("published", mark, None)
    assert promote(CANARY, MAIN).status == "current"
    with State(MAIN) as state:
        WritableSegment.open(MAIN).remove()
        WritableSegment.create(MAIN, layout_of(mlp())).close()
        for to in (2, 3):
            assert rollback(MAIN, to, runtime=None, state=state)[0].checkpoint is None and values(MAIN) == {float(to)}
    assert run_cli("log", MAIN)[0] == 0


def test_a_segment_from_memory_takes_a_promote_by_its_name(push: Push) -> None:
    """Guards a target that no spec ever published into: it has neither gate nor owner, before and afterwards."""
    memory(MAIN, 1.0)
    with closing(WritableSegment.open(MAIN)) as segment:
        segment.control.bound = 20
        push(CANARY, 2)
        assert promote(CANARY, MAIN).version == 2 and values(MAIN) == {2.0}
        assert (live(MAIN).owner, live(MAIN).spec, segment.bound) == ("", "", 20)


def test_a_target_without_a_version_is_made_by_its_spec(push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name alone tells neither gate nor slots, so the first promote names the spec; versions go on from the past."""
    push(MAIN, 1)
    push(CANARY, 2)
    WritableSegment.open(MAIN).remove()
    for _ in range(2):
        with pytest.raises(SegmentMissing, match=rf"Name its spec.* as in `wsync promote {CANARY} {SPEC}`"):
            promote(CANARY, MAIN)
        WritableSegment.create(MAIN, layout_of(mlp())).close()
    WritableSegment.open(MAIN).remove()
    assert promote(CANARY, SPEC).version == 2 and values(MAIN) == {2.0}
    assert promote(CANARY, MAIN).status == "current"


def test_layouts_that_differ_are_refused_with_a_table(push: Push) -> None:
    """Nothing of another architecture goes live, and the table says what is expected and what is there."""
    push(MAIN, 1)
    WritableSegment.open(CANARY).remove()
    WritableSegment.create(CANARY, layout_of(mlp(16))).close()
    with closing(SharedMemoryWeightUpdater(CANARY)) as updater:
        updater.push_weights(mlp(16))
    outcome = promote(CANARY, MAIN)
    assert (outcome.status, outcome.exit_code, outcome.version) == ("failed", 1, 1)
    assert ("0.bias", "F32 [8]", "F32 [16]") in [(d.name, d.expected, d.found) for d in outcome.differences]
    assert values(MAIN) == {1.0} and events(MAIN)[-1].kind == "failure"


def test_what_cannot_be_promoted_is_refused(push: Push) -> None:
    """Nothing live is 66; one segment for both, a spec that is gone and an impossible name are usage."""
    push(MAIN, 1)
    outcome = promote(CANARY, MAIN)
    assert outcome.exit_code == 66 and "nothing is live" in (outcome.reason or "")
    for target in (MAIN, SPEC):
        with pytest.raises(UsageError, match="itself"):
            promote(MAIN, target)
    with pytest.raises(SegmentMissing, match="absent"):
        promote("absent", MAIN)
    with pytest.raises(UsageError):
        promote("../absent", MAIN)
    push(CANARY, 2)
    Path(SPEC).rename("moved.toml")
    with pytest.raises(SpecError, match=SPEC):  # its gate is not passed over
        promote(CANARY, MAIN)


@pytest.mark.parametrize("target", [MAIN, SPEC])
@pytest.mark.parametrize(("status", "code"), [(1, 65), (75, 75), (0, 0)])
def test_the_targets_gate_is_asked(push: Push, target: str, status: int, code: int) -> None:
    """It sees the staged weights under the target's name, and what it refuses is not live; it is asked each time."""
    push(MAIN, 1)
    push(CANARY, 2)
    gate = f"echo $WSYNC_HOOK_NAME $WSYNC_HOOK_STEP >> asked; exit {status}"
    Path(SPEC).write_text(f"{TOML}[hooks]\ngate = '{gate}'\nexec = 'echo >> hooked'\n")
    for again in (1, 2):
        outcome = promote(CANARY, target)
        assert outcome.exit_code == code and (outcome.step, outcome.name) == (2, MAIN)
        assert Path("asked").read_text() == f"{MAIN} 2\n" * (again if code else 1)
    assert Path("hooked").exists() is (code == 0) and values(MAIN) == {1.0 if code else 2.0}
    assert {event.kind for event in events(MAIN)} == {"publish", "gate"}


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_pin_of_the_target_holds(push: Push, meanwhile: bool) -> None:
    """What an operator keeps live stays live, also where it is pinned while the gate looks; the way out is told."""
    push(MAIN, 1)
    push(CANARY, 2)
    Path(SPEC).write_text(f"{TOML}[hooks]\ngate = 'touch asked; {sys.executable} -m wsync pin {MAIN}'\n")
    if not meanwhile:
        with State(MAIN) as state:
            pin_checkpoint(MAIN, None, runtime=None, state=state)
    outcome = promote(CANARY, MAIN)
    assert outcome.exit_code == 75 and f"`wsync unpin {MAIN}`" in (outcome.reason or "") and values(MAIN) == {1.0}
    assert Path("asked").exists() is meanwhile


def test_another_spec_takes_the_target_over_only_if_told(push: Push) -> None:
    """Guards the owner of what is live: a spec that is named must be that one, and a name changes no owner."""
    push(MAIN, 1)
    push(CANARY, 2)
    Path("other").mkdir()
    other = Path("other", SPEC)
    other.write_text(TOML)
    with pytest.raises(UsageError, match=rf"{SPEC}.*other/{SPEC}.*--take-over"):
        promote(CANARY, str(other))
    assert values(MAIN) == {1.0}
    assert promote(CANARY, str(other), take_over=True).version == 2 and live(MAIN).owner == str(other.absolute())
    push(CANARY, 3)
    assert promote(CANARY, MAIN).version == 3 and live(MAIN).owner == str(other.absolute())


def test_a_spec_of_another_policy_is_refused(push: Push) -> None:
    """Guards what a version says of the policy that it is for: the spec's own, which the segment was not made for."""
    push(MAIN, 1)
    push(CANARY, 2)
    Path(SPEC).write_text(f"{TOML}[policy_kwargs]\nhidden = 16\n")
    outcome = promote(CANARY, SPEC)
    assert outcome.status == "failed" and outcome.differences and values(MAIN) == {1.0}


def test_a_target_checks_what_its_source_did_not(push: Push) -> None:
    """NaN that the source's publisher let through is not for a spec that refuses it."""
    push(MAIN, 1)
    memory(CANARY, float("nan"), finite=False)
    outcome = promote(CANARY, SPEC)
    assert outcome.exit_code == 65 and CANARY in (outcome.reason or "") and outcome.differences
    assert values(MAIN) == {1.0}
    Path(SPEC).write_text(f"{TOML}[weights]\nfinite = false\n")
    assert promote(CANARY, SPEC).status == "published"


def test_a_busy_target_is_tried_later(push: Push) -> None:
    """Guards the lock of another publisher of the target; that of the source's publisher keeps nobody from reading."""
    push(MAIN, 1)
    push(CANARY, 2)
    with closing(WritableSegment.open(CANARY)) as source, source.publishing():
        with closing(WritableSegment.open(MAIN)) as target, target.publishing():
            assert promote(CANARY, MAIN).exit_code == 75
        assert promote(CANARY, MAIN).exit_code == 0


def test_a_promote_beside_a_watch_says_that_it_will_be_undone(push: Push) -> None:
    """The message names the watch and the pin; without a watch there is no message."""
    push(MAIN, 1)
    push(CANARY, 2)
    lock = WatchLock(Watching(42, "/specs/cartpole.toml", "/runs"))
    with closing(lock), closing(WritableSegment.open(MAIN)) as segment:
        lock.hold(segment)
        warning = promote(CANARY, MAIN).warning or ""
    assert "(pid 42, checkpoints in /runs)" in warning and f"`wsync pin {MAIN}`" in warning
    push(CANARY, 3)
    assert promote(CANARY, MAIN).warning is None


def test_a_reader_follows_and_the_sources_stays(push: Push) -> None:
    """A policy that is attached to the target has the promoted version at its next step, whole."""
    push(MAIN, 1)
    push(CANARY, 2)
    policy, canary = mlp(), mlp()
    with wsync.attach(policy, MAIN) as reader, wsync.attach(canary, CANARY) as other:
        assert promote(CANARY, MAIN).readers == 1
        assert reader.refresh() and (reader.version, reader.step, marks(policy)) == (2, 2, {2.0})
        assert not other.refresh() and marks(canary) == {2.0}


def test_a_publish_into_the_source_meanwhile_changes_nothing(push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the lease: the version that was live as the promote began goes live, however many came since."""
    push(CANARY, 2)
    WritableSegment.open(MAIN).remove()

    def slowly(spec: Spec) -> Layout:
        for mark in (3.0, 4.0, 5.0, 6.0):
            memory(CANARY, mark)
        return layout_of(mlp())

    monkeypatch.setattr(layout_process, "layout_of_spec", slowly)
    assert promote(CANARY, SPEC).step == 2 and values(MAIN) == {2.0} and values(CANARY) == {6.0}


def test_no_lease_is_left_and_none_is_held_by_a_gate(push: Push) -> None:
    """The source's slots are free again once the bytes are in the target, while the gate still looks."""
    push(MAIN, 1)
    push(CANARY, 2)
    with closing(WritableSegment.open(CANARY)) as segment:
        slot = segment.path / f"slot-{segment.word & 0xFF}.safetensors"
    Path(SPEC).write_text(f"{TOML}[hooks]\ngate = 'flock --nonblock {slot} true'\n")
    assert promote(CANARY, MAIN).status == "published"


def test_killed_in_the_middle_it_has_published_nothing(push: Push, spawn: Spawn, fifo: Callable[[str], int]) -> None:
    """What was live stays live, and the next promote finds every lock free."""
    push(MAIN, 1)
    push(CANARY, 2)
    asked = fifo("asked")
    Path(SPEC).write_text(f"{TOML}[hooks]\ngate = 'echo asked > asked; sleep 60'\n")
    process = spawn("-m", "wsync", "promote", CANARY, MAIN)
    assert heard(asked) == b"asked\n"
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE)
    assert values(MAIN) == {1.0} and live(MAIN).version == 1 and len(events(MAIN)) == 1
    Path(SPEC).write_text(TOML)
    assert promote(CANARY, MAIN).version == 2 and values(MAIN) == {2.0}


def test_the_command_says_what_it_did(push: Push) -> None:
    """One line, or one JSON object, for what went live, what is current and what failed; the exit codes are those."""
    push(MAIN, 1)
    push(CANARY, 2)
    done = run_forked("promote", CANARY, SPEC)
    assert done.returncode == 0 and done.stdout.startswith(f"{MAIN}: version 2, step 2, step_2.safetensors, ")
    told = report(run_forked("promote", CANARY, MAIN, "--json"))
    assert (told["status"], told["version"], told["step"], Path(told["checkpoint"]).name) == (
        "current", 2, 2, "step_2.safetensors"
    )  # fmt: skip
    failed = run_forked("promote", "absent", MAIN, "--json")
    assert failed.returncode == 1 and report(failed)["status"] == "failed" and "absent" in report(failed)["reason"]
    refused = run_forked("promote", MAIN, MAIN)
    assert refused.returncode == 2 and "itself" in refused.stderr and not refused.stdout
    log = json.loads(run_forked("log", MAIN, "--json").stdout)["events"]
    assert log[-1]["reason"] == f"promoted from {CANARY}, version 1"


def test_segments_and_specs_are_completed(push: Push) -> None:
    """What a promote goes to is a segment or a TOML."""
    assert targets("cart") == [MAIN, CANARY, SPEC]
