"""Publishing through the updater API: from a trainer's memory, and from checkpoints, into a segment."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import marks, write
from policies import Tied, mlp
from processes import DEADLINE
from tensordict import TensorDict

import wsync
from wsync import CheckpointWeightGetter, SharedMemoryWeightUpdater
from wsync.errors import NoCheckpoint, NonFiniteWeights, SegmentMissing
from wsync.layout.layout import layout_of
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment


def filled(mark: float, policy: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(t, mark) for name, t in (policy or mlp()).state_dict().items()}


def test_a_trainers_weights_reach_a_policy_with_no_file(runtime: Path) -> None:
    """push_weights(policy) makes the segment, publishes from memory with the step set, and the policy follows."""
    trained, running = mlp(), mlp()
    updater = SharedMemoryWeightUpdater("box", policy=trained)
    updater.step = 7
    updater.push_weights(trained)
    with wsync.attach(running, "box", timeout=DEADLINE) as reader:
        assert (reader.version, reader.step) == (1, 7)
        assert torch.equal(running.get_parameter("0.weight"), trained.get_parameter("0.weight"))
        updater.push_weights(filled(2.0))
        assert reader.refresh() and marks(running) == {2.0}


@pytest.mark.parametrize(
    ("step", "plain"),
    [(np.int64(500), 500), (torch.tensor(500), 500), (torch.tensor([-3]), -3), ((1 << 63) - 1, (1 << 63) - 1)],
)
def test_a_step_is_stored_as_a_plain_number(step: Any, plain: int, runtime: Path) -> None:
    """Guards that a trainer may give the counter that it has: what is live can be read by all, to the bounds."""
    updater = SharedMemoryWeightUpdater("steps", policy=mlp())
    updater.step = step
    updater.push_weights(filled(1.0))
    assert updater.published and type(updater.published.step) is int
    live = Segment.open("steps").live()
    assert live and live.step == plain == updater.published.step
    with wsync.attach(mlp(), "steps", timeout=DEADLINE) as reader:
        assert reader.step == plain


@pytest.mark.parametrize(
    ("step", "error"),
    [(True, TypeError), (1.5, TypeError), (np.float32(2), TypeError), (np.True_, TypeError),
     (torch.tensor(1.5), TypeError), (torch.tensor([1, 2]), TypeError), ("7", TypeError), (1 << 63, ValueError),
     (-1 << 63, ValueError)],
)  # fmt: skip
def test_a_step_that_no_reader_could_read_is_refused(step: Any, error: type[Exception], runtime: Path) -> None:
    """Guards against a live version whose header says no step: every reader would take its segment for damaged."""
    updater = SharedMemoryWeightUpdater("steps", policy=mlp())
    updater.push_weights(filled(1.0))
    with wsync.attach(policy := mlp(), "steps", timeout=DEADLINE) as reader:
        updater.step = step
        with pytest.raises(error, match="step"):
            updater.push_weights(filled(2.0))
        assert not reader.refresh() and reader.version == 1 and marks(policy) == {1.0}
        updater.step = 2
        updater.push_weights(filled(2.0))
        assert reader.refresh() and (reader.version, reader.step) == (2, 2)


def test_tied_policies_and_buffers_are_published_whole(runtime: Path) -> None:
    """A module gives its parameters and the buffers that persist, ties once; scratch buffers stay at home."""
    trained, running = Tied().eval(), Tied().eval()
    trained.load_state_dict(filled(3.0, trained))
    SharedMemoryWeightUpdater("tied", policy=trained).push_weights(trained)
    with wsync.attach(running, "tied", timeout=DEADLINE):
        assert marks(running) == {3.0} and running.head.weight is running.embedding.weight


@pytest.mark.parametrize("standing", [True, False])
def test_scratch_buffers_of_a_tensordict_stay_at_home_too(standing: bool, runtime: Path) -> None:
    """Guards that TensorDict.from_module(policy), which collectors push, is taken as the policy itself is."""
    trained, running = Tied().eval(), Tied().eval()
    trained.load_state_dict(filled(3.0, trained))
    updater = SharedMemoryWeightUpdater("scratch", policy=trained)
    if standing:
        updater.make_segment()
    for weights in (TensorDict.from_module(trained), TensorDict.from_module(trained).data):
        updater.push_weights(weights)
    with wsync.attach(running, "scratch", timeout=DEADLINE) as reader:
        assert reader.version == 2 and marks(running) == {3.0}
    with pytest.raises(KeyError, match=r"'norm\.scratch' is unknown"):
        updater.push_weights({**filled(3.0, trained), "norm.scratch": torch.zeros(2)})


def test_hooks_run_only_when_a_version_was_published(runtime: Path, tmp_path: Path) -> None:
    """Nothing new, an empty dict, no worker and a refusal run none."""
    policy, ran = mlp(), []
    getter = CheckpointWeightGetter(tmp_path)
    updater = SharedMemoryWeightUpdater("hooks", policy=policy, weight_getter=getter)
    updater.register_post_hook(lambda: ran.append(updater.published and updater.published.version))
    with pytest.raises(NoCheckpoint):
        updater.push_weights()
    write(tmp_path / "step_1.safetensors", policy, 1.0, 1)
    updater.push_weights()
    updater.push_weights()
    updater.push_weights({})
    updater.push_weights(worker_ids=[])
    write(tmp_path / "step_2.safetensors", policy, float("nan"), 2)
    with pytest.raises(NonFiniteWeights):
        updater.push_weights()
    assert ran == [1]
    write(tmp_path / "step_3.safetensors", policy, 3.0, 3)
    updater.push_weights()
    assert ran == [1, 2] and updater.published and updater.published.step == 3


@pytest.mark.parametrize(
    ("given", "error", "word"),
    [
        ({"2.bias": torch.ones(2)}, KeyError, "0.bias"),
        ({**filled(1.0), "more": torch.ones(1)}, KeyError, "more"),
        ({**filled(1.0), "2.bias": torch.ones(1)}, ValueError, "2.bias"),
        ({**filled(1.0), "2.bias": torch.ones(2, dtype=torch.complex64)}, TypeError, "2.bias"),
        ({**filled(1.0), "2.bias": torch.tensor([1.0, float("inf")])}, ValueError, "2.bias"),
        ({**filled(1.0), "2.bias": torch.tensor([1.0, 1e300], dtype=torch.float64)}, ValueError, "2.bias"),
        ("weights", TypeError, "TensorDict"),
    ],
)
def test_what_does_not_fit_is_refused_and_what_was_live_stays(
    given: Any, error: type[Exception], word: str, runtime: Path
) -> None:
    """Strict and finite by default; an infinity that the cast to the slot's dtype makes counts as one."""
    updater = SharedMemoryWeightUpdater("strict", policy=mlp())
    updater.push_weights(filled(1.0))
    with pytest.raises(error, match=word):
        updater.push_weights(given)
    assert updater.segment is not None and updater.segment.version == 1
    running = mlp()
    with wsync.attach(running, "strict", timeout=DEADLINE):
        assert marks(running) == {1.0}


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_an_infinity_does_not_hide_in_a_dtype_that_has_none(source: torch.dtype, runtime: Path) -> None:
    """Guards that infinity, which torch casts to the largest number of this eight-bit float, is refused as itself."""
    policy = torch.nn.Module()
    policy.register_buffer("w", torch.ones(3).to(torch.float8_e4m3fn))
    updater = SharedMemoryWeightUpdater("eight", policy=policy)
    with pytest.raises(ValueError, match="'w' holds NaN or infinity"):
        updater.push_weights({"w": torch.tensor([1.0, 2.0, float("-inf")]).to(source)})
    updater.push_weights({"w": torch.tensor([1.0, 2.0, 3.0]).to(source)})
    assert updater.published and updater.published.version == 1


def test_a_partial_update_keeps_the_live_values(runtime: Path) -> None:
    """Without strict, what does not come is what is live, also when the spare slot held an older version."""
    updater = SharedMemoryWeightUpdater("part", policy=mlp(), strict=False)
    with pytest.raises(KeyError, match="live"):
        updater.push_weights({"2.bias": torch.ones(2)})
    for mark in (1.0, 2.0, 3.0, 4.0):
        updater.push_weights(filled(mark))
    updater.push_weights({"2.bias": torch.full((2,), 9.0)})
    running = mlp()
    with wsync.attach(running, "part", timeout=DEADLINE):
        assert marks(running) == {4.0, 9.0} and running.get_parameter("2.bias").tolist() == [9.0, 9.0]


def test_a_subclass_that_maps_gets_tensors_to_map(runtime: Path, tmp_path: Path) -> None:
    """The overridable step works on checkpoints too, at the price of torch."""

    class Doubling(SharedMemoryWeightUpdater):
        def _maybe_map_weights(self, server_weights: Any) -> Any:
            return server_weights.apply(lambda tensor: tensor * 2)

    write(tmp_path / "step_1.safetensors", mlp(), 1.0, 1)
    Doubling("map", policy=mlp(), weight_getter=CheckpointWeightGetter(tmp_path)).push_weights()
    running = mlp()
    with wsync.attach(running, "map", timeout=DEADLINE):
        assert marks(running) == {2.0}


def test_a_segment_needs_somebody_who_knows_its_layout(runtime: Path, tmp_path: Path) -> None:
    """A checkpoint alone does not say what is tied; weights from memory do, and so does an attached policy."""
    write(tmp_path / "step_1.safetensors", mlp(), 1.0, 1)
    updater = SharedMemoryWeightUpdater("who", weight_getter=CheckpointWeightGetter(tmp_path))
    with pytest.raises(SegmentMissing, match="policy="):
        updater.push_weights()
    WritableSegment.create("who", wsync.SharedMemoryWeightUpdater("other", policy=mlp()).make_segment().layout).close()
    updater.push_weights()
    assert updater.published and updater.published.version == 1


def test_a_removed_segment_is_made_again(runtime: Path, tmp_path: Path) -> None:
    """A trainer that pushes on after `wsync rm` publishes into a new segment, whose versions go on from its last."""
    updater = SharedMemoryWeightUpdater("again", policy=mlp())
    for mark in (1.0, 2.0, 3.0):
        updater.push_weights(filled(mark))
    running = mlp()
    with wsync.attach(running, "again", timeout=DEADLINE) as reader:
        WritableSegment.open("again").remove()
        updater.push_weights(filled(4.0))
        assert Segment.open("again").version == 4
        assert reader.wait(DEADLINE) and reader.refresh() and reader.version == 4 and marks(running) == {4.0}
    WritableSegment.open("again").remove()
    updater.weight_getter = CheckpointWeightGetter(write(tmp_path / "step_5.safetensors", mlp(), 5.0, 5))
    updater.push_weights()
    assert Segment.open("again").version == 5


def test_the_first_version_follows_the_last_on_record(runtime: Path) -> None:
    """Guards that ``last_version`` holds for weights from memory as it does for checkpoints."""
    updater = SharedMemoryWeightUpdater("after", policy=mlp())
    updater.last_version = 41
    updater.push_weights(filled(1.0))
    assert updater.published and updater.published.version == 42 == Segment.open("after").version


def test_a_checkpoint_goes_into_the_slot_without_torch(runtime: Path, tmp_path: Path) -> None:
    """The updater with a CheckpointWeightGetter imports neither torch nor tensordict, as the command line needs it."""
    write(tmp_path / "step_1.safetensors", mlp(), 1.0, 1)
    SharedMemoryWeightUpdater("light", policy=mlp()).make_segment()
    script = (
        "import sys, wsync\n"
        "updater = wsync.SharedMemoryWeightUpdater('light', weight_getter=wsync.CheckpointWeightGetter(sys.argv[1]))\n"
        "updater.push_weights()\n"
        "assert updater.published.version == 1\n"
        "assert not {'torch', 'tensordict'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr


def test_readers_learn_at_once_that_a_deleted_segment_is_made_anew(runtime: Path) -> None:
    """Guards against a reader of a segment that was deleted by hand staying behind when its publisher comes again."""
    policy = mlp()
    with contextlib.closing(wsync.SharedMemoryWeightUpdater("nets", policy=mlp())) as updater:
        updater.push_weights(mlp())
        with wsync.attach(policy, "nets") as reader:
            shutil.rmtree(runtime / "nets")
            trained = mlp()
            updater.push_weights(trained)
            assert reader.refresh()
            assert torch.equal(next(policy.parameters()), next(trained.parameters()))


def test_a_push_that_failed_half_way_leaves_no_hook_for_the_next(runtime: Path) -> None:
    """Guards against hooks that tell of a version that the push before published, and this one did not."""

    class Failing(wsync.SharedMemoryWeightUpdater):
        def _sync_weights_with_worker(self, *, worker_id: Any = None, server_weights: Any) -> None:
            if worker_id == 1:
                raise RuntimeError("the second worker")
            super()._sync_weights_with_worker(worker_id=worker_id, server_weights=server_weights)

    told: list[int] = []
    with contextlib.closing(Failing("nets", policy=mlp())) as updater:
        updater.register_post_hook(lambda: told.append(1))
        with pytest.raises(RuntimeError, match="the second worker"):
            updater.push_weights(mlp(), worker_ids=[0, 1])
        updater.push_weights()
        assert told == []


def test_an_updater_can_be_pickled_with_its_policy(runtime: Path) -> None:
    """Guards those that are sent to another process: the twin makes the segment, and goes on with the versions."""
    updater = SharedMemoryWeightUpdater("sent", policy=Tied())
    twin = pickle.loads(pickle.dumps(updater))
    twin.push_weights(filled(1.0, Tied()))
    assert Segment.open("sent").layout.digest == layout_of(Tied()).digest
    later = pickle.loads(pickle.dumps(twin))
    WritableSegment.open("sent").remove()
    later.push_weights(filled(2.0, Tied()))
    assert Segment.open("sent").version == 2


@pytest.mark.slow
def test_an_updater_that_is_dropped_keeps_no_descriptor(runtime: Path) -> None:
    """Guards a trainer that makes an updater for each push: a process has a thousand descriptors."""

    def push() -> None:
        SharedMemoryWeightUpdater("dropped", policy=mlp()).push_weights(filled(1.0))
        gc.collect()

    push()
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        push()
    assert len(os.listdir("/proc/self/fd")) <= len(before)  # fewer where an earlier test's were closed meanwhile
