"""The weight updater API: what each member does, what is refused before anything is written."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from policies import Tied, mlp
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

import wsync
from wsync import VanillaWeightUpdater, WeightUpdaterBase
from wsync.errors import SpecError


class Collector:
    """A stand-in with what an updater asks of a collector; the real ones are in test_torchrl."""

    version = 0

    def increment_version(self) -> None:
        self.version += 1


class Recorder(WeightUpdaterBase):
    """Says what it was told."""

    def __init__(self, weights: Any = None, workers: list[int | torch.device] | None = None) -> None:
        WeightUpdaterBase.__init__(self)
        self.weights, self.workers = weights, workers
        self.synced: list[tuple[object, object]] = []
        self.asked = 0

    def all_worker_ids(self) -> list[int | torch.device] | None:
        return self.workers

    def _get_server_weights(self) -> Any:
        self.asked += 1
        return self.weights

    def _maybe_map_weights(self, server_weights: Any) -> Any:
        return ("mapped", server_weights)

    def _sync_weights_with_worker(self, *, worker_id: int | torch.device | None = None, server_weights: Any) -> None:
        self.synced.append((worker_id, server_weights))


def filled(mark: float, policy: nn.Module | None = None) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(t, mark) for name, t in (policy or mlp()).state_dict().items()}


def values(policy: nn.Module) -> set[float]:
    return {float(v) for t in policy.state_dict().values() for v in t.flatten()}


def values_of(tensor: torch.Tensor) -> set[float]:
    return {float(v) for v in tensor.detach().flatten()}


def as_module(mark: float) -> nn.Module:
    module = mlp()
    module.load_state_dict(filled(mark))
    return module


SPELLINGS: dict[str, Callable[[float], Any]] = {
    "module": as_module,
    "tensordict": lambda mark: TensorDict.from_module(as_module(mark)).data,
    "tensordict module": lambda mark: TensorDictModule(as_module(mark), ["x"], ["y"]).module,
    "dotted": filled,
    "nested": lambda mark: {
        layer: {name: filled(mark)[f"{layer}.{name}"] for name in ("weight", "bias")} for layer in "02"
    },
    "tuples": lambda mark: {tuple(name.split(".")): tensor for name, tensor in filled(mark).items()},
    "flat tensordict": lambda mark: TensorDict(filled(mark)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_weights_is_taken(spelling: str) -> None:
    """A module, a TensorDict, and a dict however its names are written all reach the trainable policy, in place."""
    policy = mlp()
    addresses = [p.data_ptr() for p in policy.parameters()]
    given = SPELLINGS[spelling](3.0)
    VanillaWeightUpdater.from_policy(policy).push_weights(given)
    assert values(policy) == {3.0}
    assert [p.data_ptr() for p in policy.parameters()] == addresses
    assert all(p.requires_grad for p in policy.parameters())


def test_members_are_attributes_and_keywords_only() -> None:
    """The constructor takes keywords only; what it was given can be read and replaced."""
    weights = TensorDict.from_module(mlp())
    updater = VanillaWeightUpdater(policy_weights=weights)
    assert updater.policy_weights is weights and updater.weight_getter is None
    with pytest.raises(TypeError):
        VanillaWeightUpdater(weights)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="TensorDict"):
        VanillaWeightUpdater(policy_weights={})


def test_from_policy_serves_tensordict_modules_buffers_and_subclasses() -> None:
    """All buffers follow, also those that no checkpoint holds; a subclass gets its own class."""

    class Mine(VanillaWeightUpdater):
        pass

    tied = Tied()
    updater = Mine.from_policy(TensorDictModule(tied, in_keys=["x"], out_keys=["y"]))
    assert type(updater) is Mine
    updater.push_weights({"module.scratch": torch.ones(2), "module.norm.running_mean": torch.ones(3)})
    assert tied.scratch.tolist() == [1.0] * 2 and tied.norm.running_mean.tolist() == [1.0] * 3  # type: ignore[union-attr, operator]


def test_a_subset_leaves_the_rest_and_floats_are_cast() -> None:
    """What does not come stays; another float dtype is cast to the target's; the source is copied, never aliased."""
    policy = as_module(1.0)
    source = torch.full((2,), 5.0, dtype=torch.float64)
    VanillaWeightUpdater.from_policy(policy).push_weights({"2.bias": source})
    source.fill_(9)
    assert values(policy) == {1.0, 5.0}
    assert policy.state_dict()["2.bias"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "tensor", "error", "word"),
    [
        ("2.nope", torch.ones(2), KeyError, "2.nope"),
        ("2.bias", torch.ones(3), ValueError, "2.bias"),
        ("2.bias", torch.ones(1), ValueError, "2.bias"),
        ("2.bias", torch.ones(1, 2), ValueError, "2.bias"),
        ("2.bias", torch.ones(2, dtype=torch.complex64), TypeError, "2.bias"),
        ("2.bias", [1.0, 1.0], TypeError, "2.bias"),
        (7, torch.ones(2), TypeError, "7"),
    ],
)
def test_a_wrong_tensor_is_named_before_anything_is_written(
    name: Any, tensor: Any, error: type[Exception], word: str
) -> None:
    """All or nothing: right tensors beside a wrong one are not written, and the error names the wrong one."""
    policy = as_module(1.0)
    hooks: list[int] = []
    updater = VanillaWeightUpdater.from_policy(policy)
    updater.register_post_hook(lambda: hooks.append(1))
    with pytest.raises(error, match=word):
        updater.push_weights({**filled(2.0), name: tensor})
    assert values(policy) == {1.0} and not hooks


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "meta": lambda: torch.ones(2, device="meta"),
    "sparse": lambda: torch.ones(2).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2)]),
}


@pytest.mark.filterwarnings("ignore")  # of torch, about what it will leave out one day
@pytest.mark.parametrize("kind", ODD)
def test_what_cannot_be_copied_is_named_before_anything_is_written(kind: str) -> None:
    """Guards all or nothing against a source on which the copy itself would fail, after the tensors before it."""
    policy = as_module(1.0)
    with pytest.raises(TypeError, match=f"given is a '2.bias' that is .*{kind}"):
        VanillaWeightUpdater.from_policy(policy).push_weights({**filled(2.0), "2.bias": ODD[kind]()})
    assert values(policy) == {1.0}


@pytest.mark.parametrize("bias", [torch.zeros(1).expand(2), torch.zeros(2, device="meta")])
def test_a_policys_tensor_that_cannot_be_written_is_named(bias: torch.Tensor) -> None:
    """Guards the same where the policy's own tensor has no place for each value."""
    policy = as_module(1.0)
    first = policy.get_parameter("0.weight")
    policy[2].bias = nn.Parameter(bias)  # type: ignore[index]
    with pytest.raises(TypeError, match="policy has a '2.bias'"):
        VanillaWeightUpdater.from_policy(policy).push_weights(filled(2.0))
    assert values_of(first) == {1.0}


def test_a_policy_made_in_inference_mode_is_written_whole() -> None:
    """Guards against a push that stops at the first tensor that is written in inference mode alone."""
    policy = as_module(1.0)
    with torch.inference_mode():
        policy[2].bias = nn.Parameter(torch.zeros(2))  # type: ignore[index]
    VanillaWeightUpdater.from_policy(policy).push_weights(filled(2.0))
    assert values(policy) == {2.0}


def test_a_float_for_an_int_is_refused() -> None:
    """A float in the place of a counter would be cut off."""
    updater = VanillaWeightUpdater.from_policy(Tied())
    with pytest.raises(TypeError, match="num_batches_tracked"):
        updater.push_weights({"norm.num_batches_tracked": torch.tensor(1.5)})
    updater.push_weights({"norm.num_batches_tracked": torch.tensor(3, dtype=torch.int32)})
    assert updater.policy_weights["norm", "num_batches_tracked"].tolist() == 3


INTS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("source", INTS)
@pytest.mark.parametrize("target", INTS)
def test_integers_never_wrap(source: torch.dtype, target: torch.dtype) -> None:
    """Guards against a counter that becomes another number: each value of the dtype that comes has to fit."""
    policy = nn.Module()
    policy.register_buffer("count", torch.zeros(2, dtype=target))
    ends = torch.iinfo(source).min, torch.iinfo(source).max
    fits = torch.iinfo(target).min <= ends[0] and ends[1] <= torch.iinfo(target).max
    with contextlib.nullcontext() if fits else pytest.raises(TypeError, match="'count'"):
        VanillaWeightUpdater.from_policy(policy).push_weights({"count": torch.tensor(ends, dtype=source)})
    assert tuple(policy.get_buffer("count").tolist()) == (ends if fits else (0, 0))


@pytest.mark.parametrize("given", ["weights", 3, [torch.ones(2)], torch.ones(2)])
def test_a_wrong_kind_says_what_is_taken(given: Any) -> None:
    """The message names TensorDict, not an attribute that is missing somewhere."""
    with pytest.raises(TypeError, match="TensorDict"):
        VanillaWeightUpdater.from_policy(mlp()).push_weights(given)


def test_one_path_under_two_spellings_is_refused() -> None:
    """Which of the two would win is nobody's guess."""
    with pytest.raises(ValueError, match="twice"):
        VanillaWeightUpdater.from_policy(mlp()).push_weights({"2.bias": torch.ones(2), "2": {"bias": torch.zeros(2)}})


def test_strict_and_finite_are_there_on_demand() -> None:
    """Off by default; with them a missing name, NaN or infinity leaves the policy as it was."""
    policy = as_module(1.0)
    weights = TensorDict.from_module(policy)
    loose = VanillaWeightUpdater(policy_weights=weights)
    tight = VanillaWeightUpdater(policy_weights=weights, strict=True, finite=True)
    with pytest.raises(KeyError, match="0.bias"):
        tight.push_weights({"2.bias": torch.ones(2)})
    with pytest.raises(ValueError, match="2.bias"):
        tight.push_weights({**filled(2.0), "2.bias": torch.tensor([1.0, float("nan")])})
    assert values(policy) == {1.0}
    tight.push_weights(filled(2.0))
    loose.push_weights({"2.bias": torch.tensor([1.0, float("inf")])})
    assert values(policy) == {2.0, 1.0, float("inf")}


@pytest.mark.parametrize("target", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_finite_looks_at_what_a_cast_makes(value: float, target: torch.dtype) -> None:
    """Guards that neither what comes nor what is written is NaN or infinity, in dtypes of eight bits too."""
    policy = nn.Module()
    policy.register_buffer("w", torch.ones(2).to(target))
    updater = VanillaWeightUpdater.from_policy(policy)
    updater.finite = True
    held = value == 1e30 and target == torch.float8_e4m3fn  # as its largest number
    with contextlib.nullcontext() if held else pytest.raises(ValueError, match="'w' holds NaN"):
        updater.push_weights({"w": torch.tensor([2.0, value])})
    assert policy.get_buffer("w").float().tolist() == ([2.0, 448.0] if held else [1.0, 1.0])


def test_tied_weights_move_together_and_must_agree() -> None:
    """One storage under two names: either name moves both, two different values are refused."""
    policy = Tied()
    updater = VanillaWeightUpdater.from_policy(policy)
    updater.push_weights({"head.weight": torch.full((5, 3), 4.0)})
    assert values_of(policy.embedding.weight) == {4.0} and policy.head.weight is policy.embedding.weight
    both = {"head.weight": torch.ones(5, 3), "embedding.weight": torch.zeros(5, 3)}
    with pytest.raises(ValueError, match="embedding.weight"):
        updater.push_weights(both)
    assert values_of(policy.embedding.weight) == {4.0}


@pytest.mark.parametrize("weights", [TensorDict.from_module, lambda policy: TensorDict.from_module(policy).data])
def test_one_name_of_a_tie_is_all_of_it(weights: Callable[[nn.Module], TensorDict]) -> None:
    """Guards that strict takes what ``save_model`` writes, which leaves the other names out; a tie is one of memory."""
    policy = Tied()
    updater = VanillaWeightUpdater(policy_weights=weights(policy), strict=True)
    given = {**filled(3.0, policy), "scratch": torch.ones(2)}
    del given["head.weight"]
    updater.push_weights(given)
    assert values(policy) == {3.0} and policy.head.weight is policy.embedding.weight
    with pytest.raises(ValueError, match="embedding.weight"):
        updater.push_weights({**given, "head.weight": torch.zeros(5, 3)})
    del given["embedding.weight"]
    with pytest.raises(KeyError, match=r"2 tensors are missing: embedding\.weight, head\.weight"):
        updater.push_weights(given)


def test_the_policys_own_tensors_may_be_the_source() -> None:
    """Swapping two of a policy's own tensors reads each before it is overwritten."""
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    updater = VanillaWeightUpdater.from_policy(nn.ModuleDict({"a": a, "b": b}))
    updater.push_weights({"a.bias": torch.full((3,), 1.0), "b.bias": torch.full((3,), 2.0)})
    updater.push_weights({"a.bias": b.bias, "b.bias": a.bias})
    assert a.bias.tolist() == [2.0] * 3 and b.bias.tolist() == [1.0] * 3


@pytest.mark.parametrize("getter", [None, lambda: None, dict])
def test_nothing_to_push_writes_nothing_and_runs_the_hooks(getter: Callable[[], Any] | None) -> None:
    """No getter, a getter that gives None, an empty dict: code written for torchrl counts on the hooks."""
    policy, ran = as_module(1.0), []
    updater = VanillaWeightUpdater(weight_getter=getter, policy_weights=TensorDict.from_module(policy))
    updater.register_post_hook(lambda: ran.append(1))
    assert updater.push_weights() is None  # type: ignore[func-returns-value]
    assert values(policy) == {1.0} and ran == [1]


def test_the_getter_is_called_once_and_only_when_nothing_is_given() -> None:
    """However many workers there are."""
    recorder = Recorder("weights", [0, 1, 2])
    recorder.push_weights()
    assert recorder.asked == 1
    recorder.push_weights({"given": torch.ones(1)})
    assert recorder.asked == 1 and len(recorder.synced) == 6


@pytest.mark.parametrize(
    ("ids", "served"),
    [
        (None, [None]),
        ([], []),
        (3, [3]),
        (torch.device("cpu"), [torch.device("cpu")]),
        ([0, 1], [0, 1]),
        ((torch.device("cpu"), 1), [torch.device("cpu"), 1]),
    ],
)
def test_each_worker_is_served_once_with_mapped_weights(ids: Any, served: list[Any]) -> None:
    """None is the one worker without an id, one id is one worker, [] is none; weights come mapped; hooks run once."""
    recorder, ran = Recorder("weights"), []
    recorder.register_post_hook(lambda: ran.append(1))
    recorder(worker_ids=ids)
    assert recorder.synced == [(worker, ("mapped", "weights")) for worker in served]
    assert ran == [1]


def test_known_workers_are_served_by_default_and_wrong_ids_are_refused() -> None:
    """all_worker_ids() stands in for None; a string is not a list of workers."""
    recorder = Recorder("weights", [4, 5])
    recorder.push_weights()
    assert [worker for worker, _ in recorder.synced] == [4, 5]
    with pytest.raises(TypeError, match="worker_ids"):
        recorder.push_weights(worker_ids="01")  # type: ignore[arg-type]
    assert VanillaWeightUpdater.from_policy(mlp()).all_worker_ids() is None


def test_hooks_run_in_order_after_the_weights_and_not_after_an_error() -> None:
    """A getter or sync that raises runs none; a hook that raises stops those behind it, the weights being in."""
    policy, seen = as_module(1.0), []
    updater = VanillaWeightUpdater.from_policy(policy)
    updater.register_post_hook(lambda: seen.append(("first", values(policy))))
    updater.register_post_hook(lambda: seen.append(("second", values(policy))))
    assert len(updater.post_hooks) == 2
    updater.push_weights(filled(2.0))
    assert seen == [("first", {2.0}), ("second", {2.0})]

    def fail() -> None:
        raise OSError("no weights today")

    updater.weight_getter = fail
    with pytest.raises(OSError, match="today"):
        updater.push_weights()
    assert len(seen) == 2
    updater.post_hooks.insert(1, fail)
    with pytest.raises(OSError, match="today"):
        updater.push_weights(filled(3.0))
    assert seen[2:] == [("first", {3.0})] and values(policy) == {3.0}


def test_one_collector_is_held_weakly_and_its_version_moves() -> None:
    """None when unset or gone; a second is refused, the same again is fine; its version moves on demand only."""
    updater = VanillaWeightUpdater.from_policy(mlp())
    assert updater.collector is None
    with pytest.raises(RuntimeError, match="collector"):
        updater.increment_version()
    collector, other = Collector(), Collector()
    updater.register_collector(collector)
    updater.register_collector(collector)
    with pytest.raises(RuntimeError, match="another"):
        updater.register_collector(other)
    assert updater.collector is collector
    updater.push_weights(filled(1.0))
    assert collector.version == 0
    updater.register_post_hook(updater.increment_version)
    updater.push_weights(filled(1.0))
    assert collector.version == 1
    del collector
    gc.collect()
    assert updater.collector is None
    with pytest.raises(RuntimeError, match="collector"):
        updater.increment_version()
    updater.register_collector(other)


def test_init_does_nothing_and_a_base_without_a_sync_says_so() -> None:
    """The defaults of the base class."""
    assert WeightUpdaterBase().init(1, two=3) is None  # type: ignore[func-returns-value]
    assert WeightUpdaterBase.from_policy(mlp()) is None
    with pytest.raises(NotImplementedError, match="WeightUpdaterBase"):
        WeightUpdaterBase().push_weights({"a": torch.ones(1)})


def test_a_subclass_has_no_init_to_call() -> None:
    """Guards those that were written for torchrl, whose bases work without: hooks, collector, pushes and pickling."""

    class Plain(WeightUpdaterBase):
        def __init__(self, synced: list[object]) -> None:
            self.synced = synced

        def _sync_weights_with_worker(self, *, worker_id: Any = None, server_weights: Any) -> None:
            self.synced.append(server_weights)

    class InPlace(VanillaWeightUpdater):
        def __init__(self, policy: nn.Module) -> None:
            self.weight_getter, self.policy_weights = None, TensorDict.from_module(policy)

    policy, seen = as_module(1.0), []
    synced: list[object] = []
    plain, in_place, collector = Plain(synced), InPlace(policy), Collector()
    for updater in (plain, in_place):
        assert updater.post_hooks == [] and updater.collector is None
        updater.register_collector(collector)
        updater.register_post_hook(lambda: seen.append(1))
        updater.push_weights(filled(2.0))
        assert copy.copy(updater).collector is None
    assert len(synced) == 1 and values(policy) == {2.0} and len(seen) == 2


def test_pushes_from_two_threads_do_not_mix() -> None:
    """Each push's hooks see the weights of that very push."""
    policy, seen = mlp(), []
    updater = VanillaWeightUpdater.from_policy(policy)
    updater.register_post_hook(lambda: seen.append(values(policy)))
    start = threading.Barrier(2)

    def push(mark: float) -> None:
        start.wait()
        for _ in range(50):
            updater.push_weights(filled(mark))

    threads = [threading.Thread(target=push, args=(mark,)) for mark in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 100 and all(len(marks) == 1 for marks in seen)


def test_an_updater_can_be_pickled_without_its_collector() -> None:
    """Multi-process collectors may send one to another process."""
    updater = VanillaWeightUpdater.from_policy(as_module(1.0))
    updater.register_collector(collector := Collector())
    twin = pickle.loads(pickle.dumps(updater))
    twin.push_weights(filled(2.0))
    assert twin.collector is None and updater.collector is collector


def test_a_policy_in_training_mode_keeps_training() -> None:
    """Weights come in between a backward pass and the optimiser's step; gradients and the optimiser's tensors stay."""
    policy = mlp().train()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    policy(torch.ones(1, 4)).sum().backward()
    VanillaWeightUpdater.from_policy(policy).push_weights(filled(1.0))
    bias = policy.get_parameter("2.bias")
    assert bias.grad is not None
    expected = torch.ones(2) - bias.grad
    optimizer.step()
    assert torch.equal(bias, expected)


def test_the_names_are_there_for_users() -> None:
    """The package exports what the README names."""
    for name in wsync.__all__:
        assert getattr(wsync, name) is not None


def test_an_updater_inside_autocast_leaves_no_old_cast() -> None:
    """Guards a policy that is updated and asked within one autocast block, whose casts autocast keeps."""
    policy = nn.Linear(2, 2, bias=False)
    updater = VanillaWeightUpdater.from_policy(policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for mark in (1.0, 2.0):
            updater.push_weights({"weight": torch.full((2, 2), mark)})
            assert policy(torch.ones(1, 2)).unique().tolist() == [2 * mark]


class Counting(nn.Linear):
    """Keeps a number beside its weights."""

    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: int) -> None:
        pass


def test_state_that_no_update_changes_is_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    """Guards a policy of which a part would stay old without a word: the one that is written and the one pushed."""
    policy, plain = nn.Sequential(Counting(2, 2)), nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(SpecError, match=r"0\._extra_state \(int\)"):
        VanillaWeightUpdater.from_policy(policy)
    with pytest.raises(SpecError, match=r"0\._extra_state \(int\)"):
        VanillaWeightUpdater.from_policy(plain).push_weights(policy)
    updater = VanillaWeightUpdater.from_policy(policy, extra_state="ignore")
    for mark in (1.0, 2.0):
        updater.push_weights(filled(mark, plain))
        assert values_of(next(policy.parameters())) == {mark}
    updater.push_weights(policy)
    assert caplog.text.count("0._extra_state (int)") == 1
