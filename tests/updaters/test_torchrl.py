"""Real collectors of torchrl take our updaters as their own, and their policies follow.

The policy's action is three times the one value that all its weights carry, so that a batch says which weights acted.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ROOT, write
from processes import DEADLINE, Spawn
from tensordict import TensorDict

import wsync

pytest.importorskip("torchrl.collectors")
from collecting import Still, collecting, make_policy, mark_of, marked, plain, versions_of
from torchrl import collectors

pytestmark = [
    pytest.mark.slow,
    # torchrl says so of every weight updater that a collector is given, its own as well
    pytest.mark.filterwarnings("ignore:Using WeightUpdaterBase is deprecated:DeprecationWarning"),
]

EXAMPLE = ROOT / "examples" / "torchrl_collector.py"

MAKE = """
import sys, warnings
import torch, wsync
def make():
    return wsync.VanillaWeightUpdater.from_policy(torch.nn.Linear(2, 1)), wsync.SharedMemoryWeightUpdater("name")
"""
IMPORT = """
with warnings.catch_warnings(action="ignore"):  # what torchrl says of its own updaters
    import torchrl.collectors
"""
CHECK = """
base = torchrl.collectors.WeightUpdaterBase
assert [isinstance(updater, base) for updater in updaters] == [True] * len(updaters)  # before any other is made
class Own(wsync.VanillaWeightUpdater):
    pass
updaters = (*make(), Own.from_policy(torch.nn.Linear(2, 1)))
assert [isinstance(updater, base) for updater in updaters] == [True] * 3
assert [isinstance(other, base) for other in (object(), make, Own, 1)] == [False] * 4
assert base not in Own.__mro__
"""
ORDERS = {
    "wsync first": MAKE + "updaters = make()\nassert 'torchrl' not in sys.modules\n" + IMPORT + CHECK,
    "torchrl first": "import warnings\n" + IMPORT + MAKE + "updaters = ()\n" + CHECK,
}


def put(path: Path, mark: float, mtime: int) -> None:
    """A checkpoint whose weights all carry a mark, as old as that."""
    os.utime(write(path, make_policy(), mark), (mtime, mtime))


@pytest.mark.parametrize("order", ORDERS)
def test_an_updater_is_one_of_torchrls_in_either_order(order: str, spawn: Spawn) -> None:
    """isinstance decides whether a collector uses or drops it; nothing is inherited, so torchrl warns of nothing."""
    process = spawn("-W", "error", "-c", ORDERS[order])
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err


def test_a_collector_takes_the_very_updater() -> None:
    """A collector that takes it for a factory calls it, and registers something else or nothing."""
    policy = make_policy()
    updater = wsync.VanillaWeightUpdater.from_policy(policy)
    with collecting(policy, weight_updater=updater) as (collector, _):
        assert collector.weight_updater is updater
        assert updater.collector is collector


SPELLINGS: dict[str, Callable[[Any], Any]] = {
    "module": lambda policy: policy,
    "TensorDict": lambda policy: TensorDict.from_module(policy),
    "TensorDict of data": lambda policy: TensorDict.from_module(policy).data.clone(),
    "nested dict": lambda policy: TensorDict.from_module(policy).to_dict(),
    "state_dict": lambda policy: policy.state_dict(),
}


def test_pushed_weights_act_from_the_next_batch() -> None:
    """Through the collector or the updater, however the weights are spelled, parameters and buffers, mid-collection."""
    policy = make_policy(1.0)
    updater = wsync.VanillaWeightUpdater.from_policy(policy)
    with collecting(policy, weight_updater=updater) as (collector, batches):
        assert mark_of(next(batches)) == 1.0
        pushes = [updater.push_weights, collector.update_policy_weights_]
        for mark, (push, spell) in enumerate(((p, s) for p in pushes for s in SPELLINGS.values()), 2):
            push(spell(make_policy(mark)))
            assert mark_of(next(batches)) == mark
        collector.update_policy_weights_(weights=marked(-1.0))
        assert mark_of(next(batches)) == -1.0
        collector.update_policy_weights_(policy=make_policy(-2.0))
        assert mark_of(next(batches)) == -2.0
        assert all(parameter.requires_grad for parameter in policy.parameters())


def test_versions_label_the_batches_that_they_acted_in() -> None:
    """The hook moves the collector's version at each push; torchrl adds one of its own to its own entry point."""
    policy = make_policy(1.0)
    updater = wsync.VanillaWeightUpdater.from_policy(policy)
    with collecting(policy, weight_updater=updater, track_policy_version=True) as (collector, batches):
        assert versions_of(next(batches)) == {0}
        updater.push_weights(marked(2.0))
        assert versions_of(next(batches)) == {0}  # nobody asked for more
        collector.update_policy_weights_(marked(3.0))
        assert versions_of(next(batches)) == {1}
        updater.register_post_hook(updater.increment_version)
        updater.push_weights(marked(4.0))
        batch = next(batches)
        assert (versions_of(batch), mark_of(batch), collector.policy_version) == ({2}, 4.0, 2)
        collector.update_policy_weights_(marked(5.0))
        batch = next(batches)
        assert (versions_of(batch), mark_of(batch), collector.policy_version) == ({4}, 5.0, 4)


def test_a_refused_push_leaves_the_policy_and_its_version() -> None:
    """A wrong tensor beside a right one: the collector raises, and what acted before acts on."""
    policy = make_policy(1.0)
    updater = wsync.VanillaWeightUpdater.from_policy(policy)
    updater.register_post_hook(updater.increment_version)
    with collecting(policy, weight_updater=updater, track_policy_version=True) as (collector, batches):
        next(batches)
        with pytest.raises(ValueError, match="module.weight"):
            collector.update_policy_weights_({"module.offset": torch.ones(1), "module.weight": torch.ones(3)})
        batch = next(batches)
        assert (versions_of(batch), mark_of(batch)) == ({0}, 1.0)


def test_a_second_collector_is_refused() -> None:
    """One updater serves one policy; the first collector keeps it."""
    policy = make_policy(1.0)
    updater = wsync.VanillaWeightUpdater.from_policy(policy)
    with collecting(policy, weight_updater=updater) as (collector, batches):
        with pytest.raises(RuntimeError, match="another collector"), collecting(make_policy(), weight_updater=updater):
            pass
        assert updater.collector is collector
        updater.push_weights(marked(2.0))
        assert mark_of(next(batches)) == 2.0


UPDATERS: dict[str, Callable[[Any, Any], Any]] = {
    "ours": lambda getter, policy: wsync.VanillaWeightUpdater(
        weight_getter=getter, policy_weights=TensorDict.from_module(policy)
    ),
    "torchrl's": lambda getter, policy: collectors.VanillaWeightUpdater(
        weight_getter=getter, policy_weights=TensorDict.from_module(policy).data
    ),
}


@pytest.mark.parametrize("make", UPDATERS.values(), ids=UPDATERS)
@pytest.mark.parametrize("only_new", [False, True])
def test_an_update_without_weights_takes_the_newest_checkpoint(
    make: Callable[[Any, Any], Any], only_new: bool, tmp_path: Path
) -> None:
    """The getter serves torchrl's updater as well as ours; with nothing new, what acted before acts on."""
    policy = make_policy(1.0)
    updater = make(wsync.CheckpointWeightGetter(tmp_path, only_new=only_new), policy)
    with collecting(policy, weight_updater=updater) as (collector, batches):
        with pytest.raises(wsync.CheckpointError):
            collector.update_policy_weights_()
        assert mark_of(next(batches)) == 1.0
        put(tmp_path / "a.safetensors", 2.0, 10)
        put(tmp_path / "b.safetensors", 3.0, 20)
        for _ in range(2):
            collector.update_policy_weights_()
            assert mark_of(next(batches)) == 3.0
        put(tmp_path / "c.safetensors", 4.0, 30)
        collector.update_policy_weights_()
        assert mark_of(next(batches)) == 4.0


def test_a_collectors_update_publishes_to_every_attached_policy(runtime: Path) -> None:
    """Inside a collector, a segment's updater publishes the trainer's policy; the collector's own follows by a hook."""
    policy, elsewhere = make_policy(1.0), make_policy()
    updater = wsync.SharedMemoryWeightUpdater("rl", policy=policy)
    updater.push_weights(policy)
    with (
        contextlib.closing(updater),
        wsync.attach(policy, "rl", mode="copy") as reader,
        wsync.attach(elsewhere, "rl", mode="copy") as other,
        collecting(policy, weight_updater=updater, track_policy_version=True) as (collector, batches),
    ):
        assert collector.weight_updater is updater and updater.collector is collector
        updater.register_post_hook(reader.refresh)
        assert mark_of(next(batches)) == 1.0
        collector.update_policy_weights_(make_policy(2.0))
        batch = next(batches)
        assert (mark_of(batch), versions_of(batch), reader.version) == (2.0, {1}, 2)
        assert other.refresh() and set(elsewhere.state_dict()["module.weight"].tolist()) == {2.0}


@pytest.mark.parametrize("mode", ["copy", "swap"])
def test_a_collector_with_an_attached_policy_needs_no_updater(mode: Any, runtime: Path) -> None:
    """Beside a trainer that publishes, a collector refreshes before each batch through torchrl's own hook."""
    trainer = wsync.SharedMemoryWeightUpdater("rl")
    trainer.push_weights(make_policy(1.0, plain))
    policy = make_policy(0.0, plain)
    with (
        contextlib.closing(trainer),
        wsync.attach(policy, "rl", mode=mode) as reader,
        collecting(policy, pre_collect_hook=reader.refresh) as (_, batches),
    ):
        assert (mark_of(next(batches)), reader.version) == (1.0, 1)
        trainer.push_weights(make_policy(2.0, plain))
        assert (mark_of(next(batches)), reader.version) == (2.0, 2)


def two_workers() -> None:
    """What the test below runs in a process of its own: torchrl changes process-wide settings for its workers."""
    policy = make_policy(1.0)
    updater = wsync.VanillaWeightUpdater.from_policy(policy)
    updater.register_post_hook(updater.increment_version)
    collector = collectors.MultiSyncCollector(
        [Still, Still],
        policy,
        frames_per_batch=8,
        total_frames=-1,
        cat_results=0,
        use_buffers=True,
        weight_updater=updater,
        track_policy_version=True,
        auto_register_policy_transforms=False,
    )
    seen: list[Any] = []
    try:
        batches = iter(collector)

        def look() -> None:
            batch = next(batches)
            seen.append([mark_of(batch), batch.numel(), collector.policy_version])
            assert len({os.getpid(), *batch["process"].flatten().tolist()}) == 3

        assert collector.weight_updater is updater and updater.collector is collector
        look()
        collector.update_policy_weights_(make_policy(2.0))
        look()
        updater.push_weights(marked(3.0))
        look()
        collector.update_policy_weights_(TensorDict(marked(4.0)).unflatten_keys("."), worker_ids=[0, 1])
        look()
    finally:
        collector.shutdown()
    print(json.dumps({"seen": seen, "exits": [process.exitcode for process in collector.procs]}))


def test_the_workers_of_a_multi_process_collector_follow(spawn: Spawn) -> None:
    """Two real processes play on the policy's shared memory: one write there, by whichever worker ids, serves both.

    The version that moves is the parent's: torchrl labels a worker's frames with the worker's own count, which no
    weight updater moves, its own included.
    """
    process = spawn("-c", "from tests.updaters.test_torchrl import two_workers; two_workers()", start_new_session=True)
    try:
        out, err = process.communicate(timeout=DEADLINE)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # the workers with it
        raise
    assert process.returncode == 0, err
    said = json.loads(out.splitlines()[-1])
    assert said["seen"] == [[1.0, 8, 0], [2.0, 8, 1], [3.0, 8, 2], [4.0, 8, 3]]
    assert said["exits"] == [0, 0]


def test_the_example_follows_its_trainer(tmp_path: Path, spawn: Spawn) -> None:
    """The newest checkpoint acts at the end, the reward has climbed, and the temporary directory is gone."""
    process = spawn(str(EXAMPLE), env={**os.environ, "TMPDIR": str(tmp_path)})
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    lines = re.findall(r"^version +(\d+)   step +(\d+)   mean reward +(-?[\d.]+)$", out, re.MULTILINE)
    assert len(lines) == len(out.splitlines())
    versions, steps, rewards = ([float(line[i]) for line in lines] for i in range(3))
    assert versions == [*range(len(lines))]
    assert steps == sorted(steps) and len(set(steps)) > 2 and (steps[0], steps[-1]) == (0, 300)
    assert rewards[0] < -1 < -0.2 < rewards[-1]
    assert not list(tmp_path.glob("wsync-torchrl-*"))


def test_the_example_says_how_to_install_torchrl(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without torchrl: one line with the command, status 2, no traceback."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchrl"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert re.fullmatch(r"torchrl\S* not found; install with: pip install 'wsync\[torchrl\]'\n", err)
