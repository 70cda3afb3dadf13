"""The weight sync scheme over a segment, in real collectors of torchrl and beside torchrl's own schemes.

The policy's action is three times the one value that all its weights carry, so that a batch says which weights acted.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import DEADLINE, Spawn
from tensordict import TensorDict
from torch import nn

import wsync

pytest.importorskip("torchrl.collectors")
from collecting import Still, collecting, make_policy, mark_of, marked, versions_of
from torchrl import collectors
from torchrl.envs.llm.transforms import PolicyVersion
from torchrl.weight_update import MultiProcessWeightSyncScheme, SharedMemWeightSyncScheme

from wsync.torchrl import SegmentWeightSyncScheme


def sender(policy: Any, **options: Any) -> SegmentWeightSyncScheme:
    """A connected sender that no collector has."""
    scheme = SegmentWeightSyncScheme("rl", **options)
    scheme.init_on_sender(model_id="policy", model=policy)
    scheme.connect()
    return scheme


def sending(scheme: Any, policy: Any) -> Any:
    """A collector that has this scheme, and its batches."""
    return collecting(policy, track_policy_version=True, weight_sync_schemes={"policy": scheme})


def receiver(policy: Any, **options: Any) -> SegmentWeightSyncScheme:
    """A connected receiver that no collector has."""
    scheme = SegmentWeightSyncScheme("rl", **options)
    scheme.init_on_receiver(model_id="policy", model=policy)
    scheme.connect()
    return scheme


def test_a_collector_sends_and_acts_with_what_it_sent(runtime: Path) -> None:
    """However the weights are spelled, its own policy and everybody else has them, under one version."""
    policy, elsewhere = make_policy(1.0), make_policy()
    scheme = SegmentWeightSyncScheme("rl")
    with (
        sending(scheme, policy) as (collector, batches),
        wsync.attach(elsewhere, "rl", mode="copy") as reader,
    ):
        batch = next(batches)
        assert (mark_of(batch), versions_of(batch), reader.version) == (1.0, {1}, 1)
        new = make_policy(2.0)
        for mark, weights in enumerate((new, TensorDict.from_module(new), new.state_dict()), 2):
            new.load_state_dict(marked(float(mark)))
            collector.update_policy_weights_(weights)
            assert collector.policy_version == mark
            batch = next(batches)
            assert (mark_of(batch), versions_of(batch)) == (float(mark), {mark})
            assert reader.refresh() and reader.version == mark == scheme.version
            assert set(elsewhere.state_dict()["module.weight"].tolist()) == {float(mark)}


def test_what_a_trainer_changes_after_it_sent_stays(runtime: Path) -> None:
    """A collector that shares the trainer's policy never sets it back to what was sent, nor to what others publish."""
    policy = make_policy(1.0)
    scheme = SegmentWeightSyncScheme("rl")
    with sending(scheme, policy) as (collector, batches):
        next(batches)
        collector.update_policy_weights_()
        policy.load_state_dict(marked(2.0))
        wsync.SharedMemoryWeightUpdater("rl").push_weights(marked(9.0))
        batch = next(batches)
        assert (mark_of(batch), versions_of(batch)) == (2.0, {2})


def test_refused_weights_leave_everybody_where_they_were(runtime: Path) -> None:
    """NaN, a wrong shape and an unknown name: the collector raises, and weights and label stay."""
    scheme = SegmentWeightSyncScheme("rl")
    with sending(scheme, make_policy(1.0)) as (collector, batches):
        next(batches)
        for wrong in (marked(float("nan")), {**marked(2.0), "module.weight": torch.ones(3)}, {"other": torch.ones(1)}):
            with pytest.raises((wsync.WsyncError, ValueError, KeyError)):
                collector.update_policy_weights_(wrong)
        batch = next(batches)
        assert (mark_of(batch), versions_of(batch), scheme.version) == (1.0, {1}, 1)


def test_a_collector_follows_a_sender_that_it_does_not_know(runtime: Path) -> None:
    """Receivers come late, skip versions, and label with the version that acted, not with a count of their own."""
    policy, trained, seen = make_policy(), make_policy(1.0), list[int]()
    trainer = sender(trained)
    trained.load_state_dict(marked(2.0))
    trainer.send()
    scheme = SegmentWeightSyncScheme("rl")
    hook = {"pre_collect_hook": lambda: seen.append(scheme.version)}
    with collecting(policy, track_policy_version=True, **hook) as (collector, batches):
        collector.register_scheme_receiver({"policy": scheme})
        batch = next(batches)
        assert (mark_of(batch), versions_of(batch)) == (2.0, {2})
        trainer.send(make_policy(3.0))
        trainer.send(make_policy(4.0))
        late = make_policy()
        assert receiver(late).version == 4 and set(late.state_dict()["module.weight"].tolist()) == {4.0}
        batch = next(batches)
        assert (mark_of(batch), versions_of(batch), seen) == (4.0, {4}, [2, 2])
        assert versions_of(next(batches)) == {4}


def test_a_receiver_without_a_collector_asks_when_it_likes(runtime: Path) -> None:
    """``receive`` gives the weights once, and None where nothing is new, after it waited as long as it may."""
    trainer, policy = sender(make_policy(1.0)), make_policy()
    scheme = receiver(policy)
    assert scheme.receive() is None and scheme.receive(timeout=0.01) is None
    trainer.send(make_policy(2.0))
    taken = scheme.receive(timeout=DEADLINE)
    assert taken["module", "weight"].tolist() == [2.0, 2.0] == policy.module.weight.tolist()
    assert scheme.receive() is None
    other = make_policy()
    scheme.model = other  # as torchrl's workers do, whose collector copies the policy to another device
    assert scheme.receive() is not None and other.module.weight.tolist() == [2.0, 2.0]
    scheme.shutdown()
    trainer.shutdown()
    trainer.shutdown()


def test_a_collector_that_makes_uuids_keeps_them(runtime: Path) -> None:
    """A label of another kind would not fit the specification of the collector's frames."""
    scheme = SegmentWeightSyncScheme("rl")
    with collecting(
        make_policy(1.0), track_policy_version=PolicyVersion("uuid"), weight_sync_schemes={"policy": scheme}
    ) as (collector, batches):
        first = next(batches)["next", "policy_version"]
        collector.update_policy_weights_()
        assert next(batches)["next", "policy_version"] != first and isinstance(collector.policy_version, str)


def test_unconnected_sides_and_empty_hands_are_told_what_to_do(runtime: Path) -> None:
    """Each message names the call that is missing."""
    scheme = SegmentWeightSyncScheme("rl", timeout=0.1)
    with pytest.raises(RuntimeError, match="init_on_sender"):
        scheme.send(make_policy())
    with pytest.raises(RuntimeError, match="init_on_receiver"):
        scheme.receive()
    with pytest.raises(wsync.UsageError, match="nothing to send"):
        scheme.init_on_sender(model_id="policy")
    with pytest.raises(wsync.AttachTimeout, match="no version"):
        policy = make_policy()
        scheme.init_on_receiver(model_id="policy", model=policy)
        scheme.connect()


class Wide(nn.Module):
    """A tied pair, and buffers that persist or do not: with a mark in all that is saved, it acts like ``Sum``."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("offset", torch.zeros(1))
        self.register_buffer("share", torch.full((1,), 0.5), persistent=False)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        offset, share = self.get_buffer("offset"), self.get_buffer("share")
        mean: torch.Tensor = (self.one(observation) + self.two(observation)) * share
        return mean + offset


def wide() -> Any:
    return make_policy(1.0, Wide)


def multi(scheme: Any, policy: Any, workers: int = 1, **more: Any) -> Any:
    return collectors.MultiSyncCollector(
        [Still] * workers,
        policy,
        frames_per_batch=4 * workers,
        total_frames=-1,
        cat_results=0,
        use_buffers=True,
        weight_sync_schemes={"policy": scheme},
        track_policy_version=True,
        auto_register_policy_transforms=False,
        **more,
    )


def side_by_side() -> None:
    """What a test below runs in a process of its own: torchrl's schemes and ours give their workers the same."""
    said: dict[str, Any] = {}
    for make in (SharedMemWeightSyncScheme, MultiProcessWeightSyncScheme, lambda: SegmentWeightSyncScheme("rl")):
        policy, scheme = wide(), make()
        collector, seen = multi(scheme, policy), []
        batches = iter(collector)
        try:
            for mark in (1.0, 2.0, 3.0):
                if mark > 1:
                    new = wide()
                    new.load_state_dict(marked(mark, new))
                    collector.update_policy_weights_(new if mark == 2 else TensorDict.from_module(new))
                batch = next(batches)
                seen.append([mark_of(batch), *versions_of(batch)])
        finally:
            collector.shutdown()
        said[type(scheme).__name__] = seen
    print(json.dumps(said))


def killed_and_late() -> None:
    """What a test below runs in a process of its own: two workers, one is killed; one more comes late."""
    trained, outside = wide(), wide()
    collector = multi(scheme := SegmentWeightSyncScheme("rl"), trained, workers=2)
    batch = next(iter(collector))
    workers = set(batch["process"].flatten().tolist())
    with wsync.attach(outside, "rl", mode="copy") as reader:
        os.kill(collector.procs[0].pid, signal.SIGKILL)
        collector.procs[0].join(DEADLINE)
        trained.load_state_dict(marked(2.0, trained))
        began = time.monotonic()
        for _ in range(5):
            collector.update_policy_weights_()
        seconds = time.monotonic() - began
        refreshed = reader.refresh()
    for process in collector.procs:  # torchrl's shutdown waits for the dead one
        process.kill()
    late = multi(SegmentWeightSyncScheme("rl"), None, policy_factory=[wide])
    batch = next(iter(late))
    said = [len(workers), mark_of(batch), *versions_of(batch), scheme.version, refreshed, seconds < 1]
    late.shutdown()
    acted = mark_of({"action": outside(TensorDict(observation=torch.ones(2)))["action"].detach()})
    print(json.dumps([*said, acted]), flush=True)
    os._exit(0)  # past the end of the first collector, which waits for its dead worker


def in_a_process(what: str, spawn: Spawn) -> Any:
    """What a function of this module prints, run in a process of its own: torchrl changes process-wide settings."""
    process = spawn("-c", f"from tests.updaters.test_scheme import {what} as it; it()", start_new_session=True)
    try:
        out, err = process.communicate(timeout=2 * DEADLINE)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # the workers with it
        raise
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_workers_get_what_torchrls_own_schemes_give_them(spawn: Spawn) -> None:
    """Weights and labels of each batch, with tied tensors and a buffer that is not saved; versions begin at one."""
    said = in_a_process("side_by_side", spawn)
    assert said["SegmentWeightSyncScheme"] == [[1.0, 1], [2.0, 2], [3.0, 3]]
    for name in ("SharedMemWeightSyncScheme", "MultiProcessWeightSyncScheme"):
        marks, labels = zip(*said[name], strict=True)
        assert (marks, [label - labels[0] for label in labels]) == ((1.0, 2.0, 3.0), [0, 1, 2])


@pytest.mark.slow
def test_a_killed_worker_keeps_nobody_waiting_and_a_late_one_has_the_newest(spawn: Spawn) -> None:
    """The sender goes on at once; a collector without a policy of its own publishes nothing and follows."""
    assert in_a_process("killed_and_late", spawn) == [2, 2.0, 6, 6, True, True, 2.0]
