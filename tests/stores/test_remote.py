"""Checkpoints in an object store: chosen, fitted and published as on disk, from ranges of one version of each."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import marks, shards, write
from object_stores import SECRET, Bucket
from policies import Tied, mlp, normed
from processes import DEADLINE, Cli, Lines, Spawn, signal_another_thread
from safetensors.torch import save_file

import wsync
from wsync.checkpoints.files.store_objects import AT_ONCE
from wsync.cli.output.inspected import inspect
from wsync.discovery.newest import Select
from wsync.discovery.weight_getter import CheckpointWeightGetter
from wsync.fitting.fit import Fit
from wsync.layout.layout import layout_of
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec
from wsync.sync.syncer import Syncer

pytestmark = pytest.mark.slow

SPEC, NAME, RUN = "policies:mlp", "policies.mlp", "s3://bucket/run"


@pytest.fixture
def segment(bucket: Bucket) -> Iterator[WritableSegment]:
    """A segment of the policy, made here so that no process has to import torch for it."""
    spec = load_spec(SPEC)
    made = WritableSegment.create(NAME, layout_of(mlp()), spec=spec.fingerprint())
    yield made
    made.close()


def live_marks() -> set[float]:
    policy = mlp()
    with wsync.attach(policy, NAME, mode="copy"):
        return marks(policy)


def report(text: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(text)
    return data


@pytest.mark.parametrize("place", [RUN, "s3://bucket/nothing/here.safetensors", "s3://bucket"])
def test_nothing_there_is_empty(program: Cli, bucket: Bucket, place: str) -> None:
    """No object is no checkpoint yet: 66, as for a directory that is not there."""
    done = program("push", SPEC, place, "--json")
    assert (done.returncode, report(done.stdout)["status"]) == (66, "empty")


@pytest.mark.parametrize("beside", ["step_5.safetensors.STABLE", "step_5.STABLE"])
def test_a_named_object_waits_for_its_marker(bucket: Bucket, segment: WritableSegment, beside: str) -> None:
    """Guards that the marker holds for an object that is named itself, as for a file."""
    bucket.save("run/step_5.safetensors", mlp(), 5.0)
    bucket.put("run/step_50.STABLE", b"")
    spec = replace(load_spec(SPEC), select=Select(marker="STABLE"))
    with Syncer(spec, f"{RUN}/step_5.safetensors") as syncer:
        assert syncer.once().status == "empty"
        bucket.put(f"run/{beside}", b"")
        assert syncer.once().status == "published"


def test_a_marker_that_is_older_than_its_objects_does_not_count(bucket: Bucket, segment: WritableSegment) -> None:
    """Guards a save over the last one in a store: the marker that is left from it counts once it is written again."""
    bucket.put("run/step_5/STABLE", b"")
    written = bucket.written("run/step_5/STABLE")
    bucket.save("run/step_5/model.safetensors", mlp(), 5.0)
    while bucket.written("run/step_5/model.safetensors") == written:  # its times have whole seconds
        bucket.save("run/step_5/model.safetensors", mlp(), 5.0)
    spec = replace(load_spec(SPEC), select=Select(marker="STABLE"))
    for place in (RUN, f"{RUN}/step_5"):
        with Syncer(spec, place) as syncer:
            assert syncer.once().status == "empty"
    bucket.put("run/step_5/STABLE", b"")
    with Syncer(spec, RUN) as syncer:
        assert syncer.once().status == "published"


def test_a_save_over_the_last_one_goes_live_whole(bucket: Bucket, segment: WritableSegment, tmp_path: Path) -> None:
    """Guards a sharded prefix of a store that is overwritten object by object: nothing goes live between two saves."""
    spec = replace(load_spec(SPEC), select=Select(settle=0))
    with Syncer(spec, RUN) as syncer:
        bucket.upload(shards(tmp_path / "old", mlp(), 1.0), "run/latest")
        assert syncer.once().version == 1
        for file in sorted(shards(tmp_path / "new", mlp(), 2.0).iterdir())[:2]:  # the index comes last
            outcome = syncer.once()
            assert (outcome.version, live_marks()) == (1, {1.0}), outcome
            assert outcome.status in ("current", "busy")
            bucket.put(f"run/latest/{file.name}", file.read_bytes())
        bucket.upload(tmp_path / "new", "run/latest")
        assert syncer.once().version == 2
    assert live_marks() == {2.0}


def _tree(root: Path) -> Path:
    """A run directory with all that the choice has to tell apart."""
    policy = mlp()
    for name in ("step_9", "step_10", "other-3", "step_11.tmp", ".hidden", "~old", "x-00001-of-00002"):
        write(root / f"{name}.safetensors", policy, 1.0)
    write(root / "meta.safetensors", policy, 1.0, step=50)
    write(root / "checkpoint-12" / "model.safetensors", policy, 1.0)
    write(root / "checkpoint-13" / "unrelated.safetensors", policy, 1.0)
    write(root / "deep" / "er" / "model.safetensors", policy, 1.0)
    shards(root / "checkpoint-14", policy)
    shards(root / "checkpoint-15", policy)
    (root / "checkpoint-15" / "model-00002-of-00002.safetensors").unlink()
    for marked in ("step_9.STABLE", "checkpoint-14/STABLE", "checkpoint-15/STABLE"):
        (root / marked).touch()
    (root / "log.txt").write_text("said")
    return root


@pytest.mark.parametrize(
    "settings",
    [
        Select(order="name", settle=0),
        Select(order="step", settle=0),
        Select(order="name", settle=0, pattern="*_*"),
        Select(order="name", settle=0, marker="STABLE"),
    ],
    ids=["name", "step", "pattern", "marker"],
)
def test_the_choice_is_that_of_a_directory(bucket: Bucket, tmp_path: Path, settings: Select) -> None:
    """The same files give the same candidates in the same order, on disk and in a store."""
    bucket.upload(_tree(tmp_path / "run"), "run")
    here = CheckpointWeightGetter(tmp_path / "run", select=settings).candidates()
    there = CheckpointWeightGetter(RUN, select=settings).candidates()
    assert [c.path.name for c in there] == [c.path.name for c in here]
    assert len(here) == (2 if settings.marker or settings.pattern != "*" else 6)


def test_a_folder_object_hides_nothing(bucket: Bucket, segment: WritableSegment) -> None:
    """The empty objects that consoles make for folders are neither checkpoints nor in the way of those below."""
    bucket.save("run/checkpoint-1/model.safetensors", mlp(), 1.0)
    for key in ("run/", "run/checkpoint-1/", "run/empty/"):
        url = f"http://127.0.0.1:{bucket.port}/bucket/{key}"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT", data=b"")).close()
    with Syncer(load_spec(SPEC), RUN) as syncer:
        outcome = syncer.once()
    assert (outcome.status, outcome.checkpoint) == ("published", f"{RUN}/checkpoint-1")


@pytest.mark.parametrize("key", ["run//x.safetensors", "run/%1B%5B31mx.safetensors"])
def test_a_name_that_cannot_be_read_is_told(bucket: Bucket, segment: WritableSegment, key: str) -> None:
    """An object whose name nobody can ask for ends the listing: it is named, at once, and nothing moves the cursor."""
    bucket.save("run/step_1.safetensors", mlp(), 1.0)
    url = f"http://127.0.0.1:{bucket.port}/bucket/{key}"
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", data=b"x")).close()
    with Syncer(load_spec(SPEC), RUN) as syncer:
        outcome = syncer.once()
    assert outcome.status == "failed" and outcome.reason and len(bucket.proxy.requests) == 1
    assert "s3://bucket/run/" in outcome.reason and "x.safetensors" in outcome.reason and "\x1b" not in outcome.reason


def test_odd_names_are_read(bucket: Bucket, segment: WritableSegment) -> None:
    """Names with blanks, signs and letters of any kind are found, read and told as they are."""
    for name in ("epoch=3 step=7.safetensors", "a+b#c%20d.safetensors", "größe-雪.safetensors"):
        bucket.save(f"run/{name}", mlp(), 1.0)
        with Syncer(load_spec(SPEC), f"{RUN}/{name}") as syncer:
            outcome = syncer.once(force=True)
        assert (outcome.status, outcome.checkpoint) == ("published", f"{RUN}/{name}")
    assert len(CheckpointWeightGetter(RUN).candidates()) == 3


def test_shards_go_live_together(bucket: Bucket, segment: WritableSegment, tmp_path: Path) -> None:
    """A sharded checkpoint is published from its objects; its index is read once, however often it is looked at."""
    bucket.upload(shards(tmp_path / "a", mlp(), 4.0), "run/checkpoint-1")
    select = Select(settle=0)
    with Syncer(replace(load_spec(SPEC), select=select), RUN) as syncer:
        assert [syncer.once().status for _ in range(3)] == ["published", "current", "current"]
    assert live_marks() == {4.0}
    assert len(bucket.proxy.heads(r"GET .*index\.json")) == 1


def test_shards_of_a_moment_ago_have_to_settle(bucket: Bucket, segment: WritableSegment, tmp_path: Path) -> None:
    """Several objects are written one after another: they wait until they have stood still for ``settle`` seconds."""
    bucket.upload(shards(tmp_path / "a", mlp(), 4.0), "run/checkpoint-1")
    with Syncer(replace(load_spec(SPEC), select=Select(settle=3000)), RUN) as syncer:
        outcome = syncer.once()
    assert outcome.status == "empty" and "must not change for 3000 s" in (outcome.reason or "")


FITS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[dict[str, torch.Tensor]], dict[str, Any]], Fit]] = {
    "plain": (normed, lambda state: state, Fit()),
    "tied": (Tied, lambda state: {k: v.clone() for k, v in state.items()}, Fit()),
    "cast": (mlp, lambda state: {k: v.double() for k, v in state.items()}, Fit(cast=True)),
    "bfloat16": (mlp, lambda state: {k: v.bfloat16() for k, v in state.items()}, Fit(cast=True)),
    "prefix": (
        mlp,
        lambda state: {**{f"actor.{k}": v for k, v in state.items()}, "critic.w": torch.zeros(9)},
        Fit(prefix="actor."),
    ),
    "rename": (mlp, lambda state: {f"net.{k}": v for k, v in state.items()}, Fit(rename={"/^net\\./": ""})),
    "exclude": (mlp, lambda state: {**state, "more.w": torch.zeros(9)}, Fit(exclude=("more.*",))),
    "backwards": (mlp, lambda state: dict(reversed(list(state.items()))), Fit()),
}


@pytest.mark.parametrize("case", FITS)
def test_weights_are_fitted_as_on_disk(bucket: Bucket, tmp_path: Path, case: str, read_by: Callable[..., None]) -> None:
    """Under each setting the getter gives the same tensors from a store as from the file, in chunks of a few bytes."""
    make, stored, fit = FITS[case]
    read_by(chunk=16)
    torch.manual_seed(0)
    policy = make()
    for tensor in policy.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape))
    state = {k: v.detach().contiguous() for k, v in stored(dict(policy.state_dict())).items()}
    save_file(state, tmp_path / "x.safetensors")
    bucket.put("run/x.safetensors", (tmp_path / "x.safetensors").read_bytes())
    layout, results = layout_of(policy), []
    for place in (tmp_path / "x.safetensors", "s3://bucket/run/x.safetensors"):
        checkpoint = CheckpointWeightGetter(place).open_newest()
        assert checkpoint
        with checkpoint:
            weights = bytearray(layout.nbytes)
            checkpoint.read_into(memoryview(weights), checkpoint.plan(layout, fit))
            results.append(bytes(weights))
    assert results[0] == results[1] != bytes(layout.nbytes)


def test_only_what_the_policy_needs_is_asked_for(bucket: Bucket, segment: WritableSegment, tmp_path: Path) -> None:
    """Of a file with a large tensor that the policy does not know, its header and the policy's ranges come."""
    state = {**mlp().state_dict(), "critic.w": torch.zeros(1 << 20)}
    save_file(state, tmp_path / "x.safetensors")
    bucket.put("run/x.safetensors", (tmp_path / "x.safetensors").read_bytes())
    spec = replace(load_spec(SPEC), weights=Fit(exclude=("critic.*",)))
    with Syncer(spec, RUN) as syncer:
        assert syncer.once().status == "published"
    assert bucket.proxy.sent < 100_000


def test_ranges_come_many_at_a_time(bucket: Bucket, segment: WritableSegment, read_by: Callable[..., None]) -> None:
    """As many ranges as allowed are under way together, and never more."""
    read_by(chunk=8)
    bucket.save("run/x.safetensors", mlp(), 1.0)
    together = threading.Barrier(AT_ONCE)
    bucket.proxy.arm(r"GET \S*x\.safetensors", times=1)  # the header's
    bucket.proxy.arm(r"GET \S*x\.safetensors", before=lambda: together.wait(DEADLINE), times=AT_ONCE)
    with Syncer(load_spec(SPEC), RUN) as syncer:
        assert syncer.once().status == "published"
    assert not together.broken and bucket.proxy.most == AT_ONCE


def test_steps_are_looked_up_many_at_a_time(bucket: Bucket) -> None:
    """Where the step orders, the headers of all candidates come together, and each once."""
    for step in range(AT_ONCE + 1):
        bucket.save(f"run/at_{100 - step}.safetensors", mlp(), 1.0, step)
    bucket.proxy.arm(r"GET \S*at_100", times=1)  # of the newest by its name, which tells that names do not count
    together = threading.Barrier(AT_ONCE)
    bucket.proxy.arm(r"GET \S*at_", before=lambda: together.wait(DEADLINE), times=AT_ONCE)
    getter = CheckpointWeightGetter(RUN, select=Select(order="step"))
    for _ in range(2):
        assert [c.step for c in getter.candidates()] == list(reversed(range(AT_ONCE + 1)))
    assert not together.broken and len(bucket.proxy.heads("GET .*at_")) == AT_ONCE + 1


def test_nan_is_refused_once(program: Cli, bucket: Bucket, segment: WritableSegment) -> None:
    """What is not finite is rejected with 65, and what was refused is known again by its ETag."""
    bucket.save("run/x.safetensors", mlp(), float("nan"))
    done = [program("push", SPEC, RUN, "--json") for _ in range(2)]
    assert [d.returncode for d in done] == [65, 65]
    before = len(bucket.proxy.heads("GET .*x.safetensors"))
    assert program("push", SPEC, RUN).returncode == 65
    assert len(bucket.proxy.heads("GET .*x.safetensors")) == before, "nothing of it is read again"


def test_a_gate_and_a_hook_get_the_url(program: Cli, bucket: Bucket, tmp_path: Path) -> None:
    """Gate and hook run as for a file, and are told the URL."""
    bucket.save("run/step_3.safetensors", mlp(), 1.0, 3)
    (tmp_path / "p.toml").write_text(
        f'policy = "policies:mlp"\ncheckpoints = "{RUN}"\n[hooks]\ngate = "echo $WSYNC_HOOK_CHECKPOINT > gate"\n'
        'exec = "echo $WSYNC_HOOK_CHECKPOINT > hook"\n'
    )
    WritableSegment.create("p", layout_of(mlp()), spec=load_spec(str(tmp_path / "p.toml")).fingerprint()).close()
    done = program("push", str(tmp_path / "p.toml"))
    assert done.returncode == 0, done.stderr
    told = {(tmp_path / name).read_text().strip() for name in ("gate", "hook")}
    assert told == {f"{RUN}/step_3.safetensors"}


def test_a_watch_takes_what_comes(spawn: Spawn, bucket: Bucket, segment: WritableSegment) -> None:
    """A watch of a URL looks again by its clock, publishes what is new, and ends on a signal."""
    bucket.save("run/step_1.safetensors", mlp(), 1.0, 1)
    watch = spawn("-m", "wsync", "watch", SPEC, RUN, "--poll", "0.1")
    lines = Lines(watch)
    assert f"watching {RUN}" in lines.next()
    lines.until("version 1, step 1")
    bucket.save("run/step_2.safetensors", mlp(), 2.0, 2)
    lines.until("version 2, step 2", "step_2.safetensors")
    watch.send_signal(signal.SIGTERM)
    lines.rest()
    assert watch.returncode == 0
    assert SECRET not in "\n".join(lines.seen)


def ticks_of(pid: int) -> int:
    """The processor's time that it took, in hundredths of a second."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


def test_a_signal_that_another_thread_gets_ends_the_wait_for_the_clock(
    spawn: Spawn, bucket: Bucket, segment: WritableSegment
) -> None:
    """Guards a watch of a store, which nothing but its clock wakes, and that a day from now."""
    bucket.save("run/step_1.safetensors", mlp(), 1.0, 1)
    watch = spawn("-m", "wsync", "watch", SPEC, RUN, "--poll", "86400")
    lines = Lines(watch)
    lines.until("version 1, step 1")
    used = -1
    while (now := ticks_of(watch.pid)) != used:  # not yet at rest
        used = now
        time.sleep(0.5)
    signal_another_thread(watch.pid, signal.SIGTERM)
    lines.rest()
    assert watch.returncode == 0


@pytest.mark.parametrize("request_", ["list-type", r"GET \S*step_2[\s\S]*bytes=(?!0-)"], ids=["listing", "range"])
def test_a_stop_waits_for_no_store(
    spawn: Spawn, program: Cli, bucket: Bucket, segment: WritableSegment, request_: str
) -> None:
    """A signal ends a watch while a store does not answer, without a word of failure; what is live stays live."""
    bucket.save("run/step_1.safetensors", mlp(), 1.0, 1)
    watch = spawn("-m", "wsync", "watch", SPEC, RUN, "--poll", "0.1")
    lines = Lines(watch)
    lines.until("version 1, step 1")
    reached = threading.Event()

    def hang() -> None:
        reached.set()
        bucket.proxy.closed.wait()

    bucket.proxy.arm(request_, before=hang, times=1000)
    bucket.save("run/step_2.safetensors", mlp(), 2.0, 2)
    assert reached.wait(DEADLINE)
    watch.send_signal(signal.SIGTERM)
    lines.rest()
    assert watch.returncode == 0 and "version 1 stays live" in lines.seen[-1]
    assert not [line for line in lines.seen if "fail" in line or "error" in line]
    assert '"failure"' not in program("log", NAME, "--json").stdout


def test_an_interrupt_ends_a_push_that_waits_for_a_store(
    spawn: Spawn, bucket: Bucket, segment: WritableSegment
) -> None:
    """Ctrl-C is not held up by a store that does not answer."""
    reached = threading.Event()

    def hang() -> None:
        reached.set()
        bucket.proxy.closed.wait()

    bucket.proxy.arm("list-type", before=hang, times=1000)
    push = spawn("-m", "wsync", "push", SPEC, RUN)
    assert reached.wait(DEADLINE)
    push.send_signal(signal.SIGINT)
    assert "Traceback" not in push.communicate(timeout=DEADLINE)[1]
    assert push.returncode


def test_a_terminal_shows_a_bar(spawn: Spawn, bucket: Bucket, segment: WritableSegment) -> None:
    """A push of a URL on a terminal shows bytes and rate while it reads; without one stderr stays empty."""
    bucket.save("run/step_1.safetensors", mlp(), 1.0, 1)
    ours, theirs = os.openpty()
    push = spawn("-m", "wsync", "push", SPEC, RUN, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    assert push.wait(DEADLINE) == 0
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "232/232 bytes" in shown
    quiet = spawn("-m", "wsync", "push", SPEC, RUN, "--force")
    assert quiet.communicate(timeout=DEADLINE)[1] == ""


def test_a_store_is_looked_at_less_often(tmp_path: Path) -> None:
    """Between two looks at a store there are ten seconds, unless the spec says otherwise; at a directory one."""
    toml = tmp_path / "p.toml"
    for place, table, poll in (
        ("run", "", 1.0),
        (RUN, "", 10.0),
        (RUN, "[watch]\npoll = 1\n", 1.0),
        ("file:///x", "", 1.0),
    ):
        toml.write_text(f'policy = "a:b"\ncheckpoints = "{place}"\n{table}')
        assert load_spec(str(toml)).poll == poll
    assert load_spec(str(toml), checkpoints=RUN).poll == load_spec("a:b", checkpoints=RUN).poll == 10.0
    assert load_spec("a:b", checkpoints="run").poll == load_spec("a:b").poll == 1.0


def test_inspect_looks_into_a_store(bucket: Bucket, program: Cli, tmp_path: Path) -> None:
    """A URL's candidates are listed as a directory's are, and one of them is described, from its header alone."""
    bucket.upload(_tree(tmp_path / "run"), "run")
    there, here = inspect(RUN), inspect(tmp_path / "run")
    assert {c["path"].rpartition("/")[2]: c["complete"] for c in there["candidates"]} == {
        c["path"].rpartition("/")[2]: c["complete"] for c in here["candidates"]
    }
    done = program("inspect", f"{RUN}/step_9.safetensors", "--json")
    one = report(done.stdout)
    assert (done.returncode, one["path"], len(one["tensors"])) == (0, f"{RUN}/step_9.safetensors", 4)
    missing = program("inspect", f"{RUN}/nothing.safetensors")
    assert missing.returncode == 66 and "Traceback" not in missing.stderr


def test_a_url_can_be_pinned_and_gone_back_to(bucket: Bucket, program: Cli, segment: WritableSegment) -> None:
    """A pin holds an object of the store, and a rollback finds one again that is as it was."""
    for step in (1, 2):
        bucket.save(f"run/step_{step}.safetensors", mlp(), float(step), step)
        assert program("push", SPEC, f"{RUN}/step_{step}.safetensors").returncode == 0
    assert program("pin", NAME, f"{RUN}/step_1.safetensors").returncode == 0
    assert report(program("push", SPEC, RUN, "--json").stdout)["step"] == 1
    assert live_marks() == {1.0}
    assert program("unpin", NAME).returncode == 0
    for slot in Path(os.environ["WSYNC_RUNTIME_DIR"], NAME).glob("slot-*"):
        assert slot.exists()
    done = program("rollback", NAME, "--to", "2")
    assert done.returncode == 0, done.stderr
    assert live_marks() == {2.0}


def test_an_adapter_is_merged_from_a_store(bucket: Bucket, tmp_path: Path) -> None:
    """A PEFT adapter and its base, both in a store, give the weights that they give on disk."""
    torch.manual_seed(0)
    policy = torch.nn.Sequential(torch.nn.Linear(4, 3))
    write(tmp_path / "base.safetensors", policy)
    folder = tmp_path / "adapter"
    folder.mkdir()
    halves = {"lora_A": torch.randn(2, 4), "lora_B": torch.randn(3, 2)}
    save_file(
        {f"base_model.model.0.{name}.weight": tensor for name, tensor in halves.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, "r": 2}))
    bucket.upload(folder, "run/adapter")
    bucket.put("base.safetensors", (tmp_path / "base.safetensors").read_bytes())
    layout, results = layout_of(policy), []
    for place, base in (
        (folder, str(tmp_path / "base.safetensors")),
        (f"{RUN}/adapter", "s3://bucket/base.safetensors"),
        (f"{RUN}/adapter/adapter_model.safetensors", "s3://bucket/base.safetensors"),
    ):
        getter = CheckpointWeightGetter(place)
        checkpoint = getter.open_newest()
        assert checkpoint and [c.identity for c in getter.candidates()] == [checkpoint.identity]
        with checkpoint:
            weights = bytearray(layout.nbytes)
            checkpoint.read_into(memoryview(weights), checkpoint.plan(layout, Fit(base=base)))
            results.append(bytes(weights))
    assert results[0] == results[1] == results[2]
