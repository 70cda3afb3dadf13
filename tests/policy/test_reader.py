"""A policy process's side, in one process: attach, refresh, wait, and the two ways to take a version."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import marks, write
from policies import Counting, Tied, mlp, scripted
from processes import DEADLINE, Spawn
from safetensors.torch import save_file
from torch import nn
from trainers import Trainer, addresses, noncontiguous, slot_ranges

import wsync
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import AttachTimeout, LayoutDiffers, SwapRefused, UsageError
from wsync.layout.layout import layout_of
from wsync.policy import reader as reading
from wsync.segment.publishing import publish
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.system import memory


def parametrized() -> nn.Module:
    """``Counting`` as an instance of a class that torch.nn makes of it."""
    policy = Counting()
    policy.scale = nn.Parameter(torch.ones(1))
    return nn.utils.parametrize.register_parametrization(policy, "scale", nn.ReLU()).eval()


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_refresh_takes_each_version_whole(trainer: Trainer, mode: reading.Mode) -> None:
    """After attach and after each refresh the policy has exactly one version's weights, and the reader says which."""
    trainer.push(10)
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        assert (reader.name, reader.mode, reader.version, reader.step) == ("nets", mode, 1, 10)
        assert marks(policy) == {10.0}
        assert reader.refresh() is False
        for version, mark in enumerate((20, 7, 30, 40, 50), start=2):
            trainer.push(mark)
            assert marks(policy) != {float(mark)}
            assert reader.refresh() is True
            assert (reader.version, reader.step, marks(policy)) == (version, mark, {float(mark)})
            assert reader.refresh() is False
        assert policy(torch.ones(4)).shape == (2,)


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (mlp, "swap"),
        (mlp, "copy"),
        (lambda: Tied().eval(), "swap"),
        (lambda: Tied().eval(), "copy"),
        (noncontiguous, "copy"),
    ],
)
def test_every_weight_gets_its_own_bytes(
    runtime: Path, tmp_path: Path, make: Callable[[], nn.Module], mode: reading.Mode
) -> None:
    """Random weights of several dtypes arrive each in its own tensor, as the trainer had them."""
    torch.manual_seed(3)
    trained, policy = make(), make()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    segment = WritableSegment.create("nets", layout_of(policy))
    state = {k: v.contiguous() for k, v in trained.state_dict().items() if k != "head.weight"}
    save_file(state, tmp_path / "weights.safetensors")
    with segment.publishing(), Checkpoint(tmp_path / "weights.safetensors") as checkpoint:
        publish(segment, checkpoint)
    with wsync.attach(policy, "nets", mode=mode):
        for name, tensor in trained.state_dict().items():
            assert torch.equal(policy.state_dict()[name], tensor), name
    assert all(torch.equal(policy.state_dict()[name], tensor) for name, tensor in trained.state_dict().items())


def test_several_versions_behind_takes_the_newest(trainer: Trainer) -> None:
    """A reader that was busy for long goes to the newest at once."""
    trainer.push(1)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="copy") as reader:
        for mark in (2, 3, 4, 5, 6):
            trainer.push(mark)
        assert reader.refresh() and (reader.version, marks(policy)) == (6, {6.0})
        assert not reader.refresh()


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (mlp, "swap"),
        (lambda: mlp().train(), "copy"),
        (lambda: Tied().eval(), "swap"),
        (Tied, "copy"),
        (Counting, "copy"),
        (noncontiguous, "copy"),
        (lambda: nn.Sequential(scripted()).eval(), "copy"),
    ],
    ids=["eval", "training", "tied eval", "tied training", "writes its buffer", "transposed", "scripted part"],
)
def test_auto_takes_swap_only_where_it_is_safe(
    runtime: Path, tmp_path: Path, make: Callable[[], nn.Module], mode: str
) -> None:
    """Left alone, a policy that may write its own tensors is copied into; running it never hits read-only memory."""
    trainer = Trainer(make)
    trainer.push(1)
    policy = make()
    with wsync.attach(policy, "nets") as reader:
        assert reader.mode == mode
        trainer.push(2)
        assert reader.refresh() and marks(policy) == {2.0}
        if isinstance(policy, Counting):
            policy(torch.ones(4))
            assert float(policy.calls) == 3.0


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: mlp().train(), "training mode"),
        (Counting, "'calls'"),
        (noncontiguous, "weight is not contiguous"),
        (parametrized, "'calls'"),
        (scripted, "TorchScript"),
    ],
    ids=["training", "writes its buffer", "transposed", "parametrized", "scripted"],
)
def test_unsafe_swap_is_refused(runtime: Path, make: Callable[[], nn.Module], reason: str) -> None:
    """Asked for where a write would end the process, swap is refused with the reason before anything is made."""
    with pytest.raises(SwapRefused, match=reason) as caught:
        wsync.attach(make(), "nets", mode="swap", timeout=0)
    assert 'mode="copy"' in str(caught.value)
    assert list(runtime.iterdir()) == []


def keeping_a_view() -> nn.Module:
    """With a part that is not persistent, and shows its weights."""
    policy = nn.Embedding(3, 2).eval()
    policy.register_buffer("table", policy.weight.detach().t(), persistent=False)
    return policy


def flat() -> nn.Module:
    """A parameter that has the memory of all, and parts of it."""
    policy = nn.Module().eval()
    policy.all = nn.Parameter(torch.zeros(6))
    policy.first, policy.last = nn.Parameter(policy.all.data[:2]), nn.Parameter(policy.all.data[2:])
    return policy


def halves() -> nn.Module:
    """Parameters that lie in one storage side by side."""
    policy, all_of_them = nn.Module().eval(), torch.zeros(6)
    policy.first, policy.last = nn.Parameter(all_of_them[:2]), nn.Parameter(all_of_them[2:])
    return policy


@pytest.mark.parametrize(("make", "mode"), [(keeping_a_view, "copy"), (flat, "copy"), (halves, "swap")])
def test_auto_leaves_no_view_of_the_weights_behind(
    runtime: Path, tmp_path: Path, make: Callable[[], nn.Module], mode: str
) -> None:
    """Guards what a policy computes from views of its weights: where there are any, its memory stays what it was."""
    trainer = Trainer(make)
    trainer.push(1)
    policy = make()
    with wsync.attach(policy, "nets") as reader:
        assert reader.mode == mode
        trainer.push(2)
        assert reader.refresh() and marks(policy) == {2.0}
        assert all(buffer.eq(2).all() for buffer in policy.buffers())


def test_auto_swaps_the_policy_of_another_reader(trainer: Trainer) -> None:
    """Guards against a second reader that takes the first one's hold on the memory for a view."""
    trainer.push(1)
    policy = mlp()
    with wsync.attach(policy, "nets"), wsync.attach(policy, "nets") as reader:
        assert reader.mode == "swap"


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_is_copied_into(trainer: Trainer, how: str) -> None:
    """Guards modules whose tables of tensors are not Python's, and code that was compiled before the version came."""
    trainer.push(1)
    policy, given = scripted(how), torch.ones(1, 4)
    with wsync.attach(policy, "nets") as reader:
        assert reader.mode == "copy"
        for mark in (2, 3, 4):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
            usual = mlp()
            usual.load_state_dict(policy.state_dict())
            assert torch.equal(policy(given), usual(given))


@pytest.mark.parametrize("mode", ["auto", "swap", "copy"])
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda last: last.to("meta"), "2.weight is on the meta device.*to_empty"),
        (lambda last: setattr(last, "bias", nn.Parameter(torch.zeros(1).expand(2))), "2.bias is an expanded tensor"),
    ],
    ids=["meta", "expanded"],
)
def test_tensors_without_memory_of_their_own_are_refused(
    trainer: Trainer, mode: reading.Mode, spoil: Callable[[nn.Module], object], told: str
) -> None:
    """Guards against a version that reaches some of the tensors alone: it is refused before the first is written."""
    trainer.push(1)
    policy = mlp()
    spoil(policy.get_submodule("2"))
    before = policy.get_parameter("0.weight").tolist()
    with pytest.raises(UsageError, match=told):
        wsync.attach(policy, "nets", mode=mode)
    assert policy.get_parameter("0.weight").tolist() == before


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_tied_weights_stay_tied(runtime: Path, mode: reading.Mode) -> None:
    """Both names of a tied pair move together and are one storage, during and after."""
    trainer = Trainer(Tied)
    trainer.push(1)
    policy = Tied().eval()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        for mark in (2, 3):
            trainer.push(mark)
            assert reader.refresh() and marks(policy) == {float(mark)}
            assert policy.head.weight is policy.embedding.weight
    assert policy.head.weight.data_ptr() == policy.embedding.weight.data_ptr()
    assert float(policy.get_buffer("scratch").sum()) == 0  # what is not persistent is not ours


class TwoNames(nn.Module):
    """Two parameter objects over one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(3))
        self.second = nn.Parameter(self.first.data)


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_shared_storage_of_two_parameters_stays_shared(runtime: Path, mode: reading.Mode) -> None:
    """Also two parameters that only share their storage share it after close: a later write reaches both."""
    trainer = Trainer(TwoNames)
    trainer.push(1)
    policy = TwoNames().eval()
    with wsync.attach(policy, "nets", mode=mode):
        assert policy.first.data_ptr() == policy.second.data_ptr()
    assert policy.first.data_ptr() == policy.second.data_ptr()


def test_swap_moves_no_bytes(trainer: Trainer) -> None:
    """Swapped tensors lie in the mapping of the live slot, and are the objects that they were."""
    trainer.push(1)
    policy, seen = mlp(), set()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        parameters = list(policy.parameters())
        for mark in range(2, 8):
            trainer.push(mark)
            assert reader.refresh()
            live = trainer.segment.word & 0xFF
            mapped = slot_ranges(trainer.segment, f"slot-{live}.safetensors")
            assert all(any(address in part for part in mapped) for address in addresses(policy))
            seen.add(live)
        assert len(seen) > 1
        assert all(a is b for a, b in zip(parameters, policy.parameters(), strict=True))


def test_copy_keeps_addresses(trainer: Trainer) -> None:
    """Copied weights arrive at the addresses that the policy had before it was attached."""
    policy = mlp().train()
    before = addresses(policy)
    trainer.push(1)
    with wsync.attach(policy, "nets") as reader:
        trainer.push(2)
        assert reader.refresh() and addresses(policy) == before
    assert addresses(policy) == before and marks(policy) == {2.0}


def test_swap_leases_one_slot_and_copy_none(trainer: Trainer) -> None:
    """At rest a swapping reader holds back its one slot, and a copying one nothing."""
    trainer.push(1)
    swapped, copied = wsync.attach(mlp(), "nets", mode="swap"), wsync.attach(mlp(), "nets", mode="copy")
    for mark in range(2, 6):
        trainer.push(mark)
        swapped.refresh()
        copied.refresh()
        slots = {r.mode: r.slots for r in trainer.segment.readers()}
        assert slots == {"swap": (trainer.segment.word & 0xFF,), "copy": ()}
    swapped.close()
    copied.close()


def test_idle_refresh_is_one_load(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing new a refresh looks at the WORD once and touches neither lock nor file."""
    trainer.push(1)
    with wsync.attach(mlp(), "nets") as reader:
        word = reader._words[reading._WORD]
        loads: list[int] = []

        class Words:
            def __getitem__(self, index: int) -> int:
                loads.append(index)
                return word

        with monkeypatch.context() as patch:
            patch.setattr(reader, "_words", Words())
            patch.setattr(Segment, "lease", lambda _: pytest.fail("a lease for nothing"))
            assert [reader.refresh() for _ in range(5)] == [False] * 5
        assert loads == [reading._WORD] * 5


def test_another_architecture_is_refused_with_a_table(trainer: Trainer) -> None:
    """A policy that does not fit is told which tensors differ, and stays as it was."""
    trainer.push(1)
    policy = mlp(hidden=16)
    before = addresses(policy)
    with pytest.raises(LayoutDiffers) as caught:
        wsync.attach(policy, "nets")
    rows = [line.split() for line in str(caught.value).splitlines()]
    assert ["tensor", "expected", "found"] in rows
    assert ["0.bias", "F32", "[16]", "F32", "[8]"] in rows
    assert addresses(policy) == before and trainer.segment.readers() == []


def test_timeout_is_its_own_error(trainer: Trainer) -> None:
    """No version in time is a TimeoutError that says what to start, and leaves no reader behind."""
    for timeout in (0, 0.02):
        with pytest.raises(AttachTimeout, match="wsync watch") as caught:
            wsync.attach(mlp(), "nets", timeout=timeout)
        assert isinstance(caught.value, TimeoutError)
    assert trainer.segment.readers() == []


@pytest.mark.parametrize("wrong", ["../x", math.nan])
@pytest.mark.parametrize("argument", ["mode", "policy", "name", "timeout"])
def test_wrong_arguments_are_usage_errors(runtime: Path, argument: str, wrong: object) -> None:
    """What cannot be right is said at once, before a segment is made for it."""
    arguments = {"policy": mlp(), "name": "nets", "mode": "auto"} | {argument: wrong}
    with pytest.raises(UsageError):
        wsync.attach(**arguments)  # type: ignore[arg-type]
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize("given", [{"exclude": None}, {"exclude": [5]}, {"runtime_dir": 5}])
def test_arguments_of_a_wrong_kind_are_usage_errors(runtime: Path, given: Any) -> None:
    """Guards a message that names the argument or the value, not Python's TypeError from deep inside."""
    with pytest.raises(UsageError, match="exclude=|5 is not a path"):
        wsync.attach(mlp(), "nets", timeout=0, **given)
    assert list(runtime.iterdir()) == []


def test_an_unknown_way_to_treat_users_is_refused(trainer: Trainer) -> None:
    """Guards a misspelt "skip", which waited; the policy keeps its version."""
    trainer.push(1)
    with wsync.attach(mlp(), "nets") as reader:
        trainer.push(2)
        with pytest.raises(UsageError, match="users='skp'"):
            reader.refresh(users="skp")  # type: ignore[arg-type]
        assert reader.version == 1 and reader.refresh(users="skip")


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set when a reader goes to sleep; its naps are long, so that only a wake-up ends them in time."""
    event = threading.Event()

    def sleep_on(address: int, expected: int, seconds: float) -> None:
        event.set()
        memory.sleep_on(address, expected, seconds, DEADLINE)

    monkeypatch.setattr(reading, "sleep_on", sleep_on)
    yield event
    event.set()


def test_attach_makes_the_segment_and_waits(runtime: Path, asleep: threading.Event) -> None:
    """A policy that comes first makes the segment, sleeps, and starts with the first version."""

    def publisher() -> None:
        asleep.wait(DEADLINE)
        Trainer(mlp).push(5)

    thread = threading.Thread(target=publisher)
    thread.start()
    policy = mlp()
    with wsync.attach(policy, "nets", timeout=2 * DEADLINE) as reader:
        assert (reader.version, reader.step, marks(policy)) == (1, 5, {5.0})
    thread.join()


def test_wait_is_woken_by_a_publish_of_another_process(
    trainer: Trainer, asleep: threading.Event, spawn: Spawn, tmp_path: Path
) -> None:
    """A sleeper is woken by the publish itself, long before it would look on its own; refresh then takes it."""
    trainer.push(1)
    script = (
        "import sys\n"
        "from wsync.checkpoints.checkpoint import Checkpoint\n"
        "from wsync.segment.publishing import publish\n"
        "from wsync.segment.writable import WritableSegment\n"
        "segment = WritableSegment.open('nets')\n"
        "sys.stdin.readline()\n"
        "with segment.publishing(), Checkpoint(sys.argv[1]) as checkpoint: publish(segment, checkpoint)\n"
    )
    publisher = spawn("-c", script, str(write(tmp_path / "next.safetensors", mlp(), 2.0, 2)), stdin=-1)
    stdin = publisher.stdin
    assert stdin

    def go() -> None:
        asleep.wait(DEADLINE)
        stdin.write("go\n")
        stdin.flush()

    with wsync.attach(mlp(), "nets") as reader:
        thread = threading.Thread(target=go)
        started = time.monotonic()
        thread.start()
        assert reader.wait(2 * DEADLINE) is True
        assert time.monotonic() - started < DEADLINE / 2
        thread.join()
        assert reader.version == 1 and reader.wait(0) is True
        assert reader.refresh() and (reader.version, reader.step) == (2, 2)


def test_wait_ends_at_its_timeout(trainer: Trainer) -> None:
    """Nothing new is False, and after the time that was asked for."""
    trainer.push(1)
    with wsync.attach(mlp(), "nets") as reader:
        started = time.monotonic()
        assert reader.wait(0.03) is False
        assert time.monotonic() - started >= 0.03
        assert reader.wait(0) is False
        with pytest.raises(UsageError, match="timeout=nan"):
            reader.wait(math.nan)


def test_lease_that_fails_leaves_the_policy(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no lease is to be had a refresh is False and the weights stay; the next one tries again."""
    trainer.push(1)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        trainer.push(2)
        with monkeypatch.context() as patch:
            patch.setattr(Segment, "lease", lambda _: None)
            assert reader.refresh() is False and marks(policy) == {1.0}
        assert reader.refresh() is True and marks(policy) == {2.0}


# What is derived from weights


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_policy_inside_autocast_acts_on_the_new_weights(trainer: Trainer, mode: reading.Mode) -> None:
    """Guards against the casts of older weights, which autocast keeps until its block ends."""
    trainer.push(1)
    policy, seen = mlp(), []
    policy.requires_grad_(True)  # autocast keeps the casts of such weights alone
    with wsync.attach(policy, "nets", mode=mode) as reader, torch.autocast("cpu", dtype=torch.bfloat16):
        for version in (1, 2, 3):
            seen.append(policy(torch.ones(1, 4)).detach().float())
            trainer.push(version + 1)
            assert reader.refresh()
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_cached_parametrization_is_made_anew(runtime: Path, mode: reading.Mode) -> None:
    """Guards against the values that ``parametrize.cached()`` keeps while its block runs."""

    def make() -> nn.Module:
        policy = nn.Linear(2, 2, bias=False)
        return nn.utils.parametrize.register_parametrization(policy, "weight", Doubled()).eval()

    trainer, policy = Trainer(make), make()
    trainer.push(1)
    with wsync.attach(policy, "nets", mode=mode) as reader, nn.utils.parametrize.cached():
        for version in (1, 2):
            assert policy(torch.ones(1, 2)).unique().tolist() == [4.0 * version]
            trainer.push(version + 1)
            assert reader.refresh()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_cache_keyed_by_address_and_version_is_not_taken_for_current(
    trainer: Trainer, mode: reading.Mode, frozen: bool
) -> None:
    """Guards modules that keep something derived from a weight until its address or its version changes."""
    trainer.push(1)
    policy = mlp().requires_grad_(not frozen)
    kept: dict[tuple[str, int, int], torch.Tensor] = {}
    with wsync.attach(policy, "nets", mode=mode) as reader:
        for mark in range(1, 9):  # the slots come round several times
            for name, weight in policy.named_parameters():
                derived = kept.setdefault((name, weight.data_ptr(), weight._version), weight.detach().clone())
                assert torch.equal(derived, weight)
            trainer.push(mark + 1)
            assert reader.refresh()
