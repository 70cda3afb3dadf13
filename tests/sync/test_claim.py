"""Two specs of one name: what one published the other does not replace without a word."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from builders import write
from policies import mlp
from processes import Cli, Lines, Spawn

from wsync.errors import UsageError
from wsync.history.rollback import rollback
from wsync.history.state import State
from wsync.layout.layout import layout_of
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec
from wsync.sync.claim import watch_of
from wsync.sync.syncer import Syncer
from wsync.updaters.shared_memory import SharedMemoryWeightUpdater

Push = Callable[..., int]


@pytest.fixture
def push(runs: Path, layouts_here: None) -> Push:
    """One pass of a spec in this process; returns the version that is live afterwards."""

    def once(spec: str, place: str | None = None, *, take_over: bool = False, follows: bool = False) -> int:
        role: Any = "watch" if follows else "push"
        with Syncer(load_spec(spec), place, state=State("policy"), role=role, take_over=take_over) as syncer:
            return syncer.once().version

    for run, mark in (("runA", 1), ("runB", 2)):
        Path(run).mkdir()
        Path(run, "policy.toml").write_text('policy = "policies:mlp"\ncheckpoints = "ckpt"\n')
        write(Path(run, "ckpt", f"step_{mark}.safetensors"), mlp(), float(mark))
    WritableSegment.create("policy", layout_of(mlp()), spec=load_spec("runA/policy.toml").fingerprint()).close()
    return once


def live() -> int:
    with closing(Segment.open("policy")) as segment:
        return segment.version


def test_another_spec_of_that_name_is_refused(push: Push) -> None:
    """The message names both, and the two ways out; with one of them the segment has a new owner."""
    assert push("runA/policy.toml") == 1
    with pytest.raises(UsageError, match=r"runA/policy.toml.*runB/policy.toml.*--name.*--take-over"):
        push("runB/policy.toml")
    assert live() == 1
    assert push("runB/policy.toml", take_over=True) == 2
    assert push("runB/policy.toml") == 2
    with pytest.raises(UsageError, match="take-over"):
        push("runA/policy.toml")


def test_another_place_of_that_spec_is_refused_unless_one_checkpoint_is_named(push: Push) -> None:
    """A push may name a checkpoint from elsewhere, which changes no place; who follows another place is refused."""
    spec = "runA/policy.toml"
    assert push(spec) == 1
    for follows in (False, True):
        with pytest.raises(UsageError, match=r"runA/ckpt.*runB/ckpt"):
            push(spec, "runB/ckpt", follows=follows)
    best = str(write(Path("best.safetensors"), mlp(), 5.0))
    with pytest.raises(UsageError, match="take-over"):
        push(spec, best, follows=True)
    assert push(spec, best) == 2
    write(Path("runA/ckpt/step_9.safetensors"), mlp(), 9.0)
    assert push(spec) == 3
    assert push(spec, "runB/ckpt", take_over=True) == 4
    write(Path("runC/step_1.safetensors"), mlp(), 1.0)
    Path(spec).write_text(Path(spec).read_text().replace('"ckpt"', '"../runC"'))
    assert push(spec, follows=True) == 5  # who edits the spec means it


def test_what_nobody_owns_is_anybodys(push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights from memory have no owner; a file that was pushed first has no place; other paths of one file are one."""
    with closing(SharedMemoryWeightUpdater("policy")) as updater:
        updater.push_weights(mlp())
        assert push("runA/policy.toml") == 2
        updater.push_weights(mlp())
    assert push("runB/policy.toml") == 4
    Path("link").symlink_to("runB")
    write(Path("runB/ckpt/step_9.safetensors"), mlp(), 9.0)
    assert push("link/policy.toml") == 5
    monkeypatch.chdir("runB")
    Path("policy.toml").write_text(Path("policy.toml").read_text() + "keep = 1\n")
    write(Path("ckpt/step_10.safetensors"), mlp(), 10.0)
    assert push("policy.toml") == 6


def test_a_rollback_changes_no_owner(push: Push) -> None:
    """What is gone back to stays its owner's, whether it comes from a slot or from its file."""
    push("runA/policy.toml")
    for mark in (3, 4, 5, 6):
        write(Path(f"runA/ckpt/step_{mark}.safetensors"), mlp(), float(mark))
        push("runA/policy.toml")
    with State("policy") as state:
        for version in (4, 2):
            rollback("policy", version, runtime=None, state=state)
    with State("policy") as state:
        state.pin_file.write(None)
    with pytest.raises(UsageError, match=r"runA/policy.toml"):
        push("runB/policy.toml")


def test_a_push_beside_a_watch_says_that_it_will_be_undone(push: Push, cli: Cli, spawn: Spawn) -> None:
    """The push of an older file names the watch and the pin; that of the watch's own newest file says nothing."""
    old, new = write(Path("runA/ckpt/step_0.safetensors"), mlp(), 0.0), Path("runA/ckpt/step_1.safetensors")
    os.utime(old, (1e9, 1e9))
    watch = spawn("-m", "wsync", "watch", "runA/policy.toml", "--poll", "3600", "--log-format", "plain")
    said = Lines(watch)
    said.until("version 1,")
    pushed = cli("push", "runA/policy.toml", str(old))
    assert pushed.returncode == 0 and f"(pid {watch.pid}" in pushed.stderr and "`wsync pin policy`" in pushed.stderr
    again = cli("push", "runA/policy.toml", str(new))
    assert again.returncode == 0 and not again.stderr, again.stderr
    other = Lines(spawn("-m", "wsync", "watch", "runA/policy.toml", "--poll", "0.1", "--log-format", "plain"))
    assert f"pid {watch.pid}" in other.until("busy") and "waits until" in other.seen[-1]
    refused = cli("watch", "runB/policy.toml")
    assert refused.returncode == 2 and "--take-over" in refused.stderr
    watch.kill()
    write(Path("runA/ckpt/step_7.safetensors"), mlp(), 7.0)
    other.until("step_7")


def test_a_watch_that_may_take_over_may_still_do_so_after_sighup(push: Push, spawn: Spawn) -> None:
    """Guards --take-over until the first checkpoint comes, which may be long after the TOML was read again."""
    assert push("runA/policy.toml") == 1
    for file in Path("runB/ckpt").iterdir():
        file.unlink()
    watch = spawn("-m", "wsync", "watch", "runB/policy.toml", "--take-over", "--poll", "0.1", "--log-format", "plain")
    said = Lines(watch)
    said.until("watching")
    watch.send_signal(signal.SIGHUP)
    said.until("SIGHUP")
    write(Path("runB/ckpt/step_9.safetensors"), mlp(), 9.0)
    said.until("version 2, step 9")


def test_a_watch_holds_the_segment_that_it_makes(push: Push) -> None:
    """Guards the first version of a watch: whoever publishes beside it is told so at once, and not a pass later."""
    with closing(WritableSegment.open("policy")) as before:
        before.remove()
    with Syncer(load_spec("runA/policy.toml"), state=State("policy"), role="watch") as syncer:
        assert syncer.once().version == 1
        with closing(Segment.open("policy")) as segment:
            watching = watch_of(segment)
            assert watching and (watching.pid, Path(watching.place)) == (os.getpid(), Path("runA/ckpt").resolve())


def test_cron_is_told_once_what_a_watch_will_undo_and_that_a_place_is_gone(
    push: Push, cli: Cli, spawn: Spawn, tmp_path: Path
) -> None:
    """Guards `push --quiet`: a version that does not last, and a place that went away, are new problems."""
    write(Path("other.safetensors"), mlp(), 5.0)
    watch = spawn("-m", "wsync", "watch", "runA/policy.toml", "--poll", "3600", "--log-format", "plain")
    Lines(watch).until("version 1,")
    said = [cli("push", "runA/policy.toml", "other.safetensors", "--quiet", "--force").stderr for _ in range(2)]
    assert "`wsync pin policy`" in said[0] and not said[1]
    watch.kill()
    watch.wait()
    Path("runA/ckpt").rename("runA/aside")
    told = [cli("push", "runA/policy.toml", "--quiet") for _ in range(2)]
    assert [each.returncode for each in told] == [66, 66] and "there is no" in told[0].stderr and not told[1].stderr


@pytest.mark.slow
def test_take_over_is_an_option_of_push_and_watch(push: Push, cli: Cli, spawn: Spawn) -> None:
    """With the option the one that is started publishes, and the one that was there is told."""
    push("runA/policy.toml")
    assert cli("push", "runB/policy.toml").returncode == 2
    assert cli("push", "runB/policy.toml", "--take-over").returncode == 0
    watch = Lines(spawn("-m", "wsync", "watch", "runA/policy.toml", "--take-over", "--log-format", "plain"))
    watch.until("version 3,")
    assert cli("push", "runB/policy.toml", env={**os.environ, "WSYNC_TAKE_OVER": "1"}).returncode == 0
    assert "runB/policy.toml" in watch.until("error") and live() == 4
