"""A policy on a device, with the device's part played on the CPU: copies that land late, two buffers, leases."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import marks
from devices import LateDevice
from policies import Counting, Tied, every_dtype, mlp
from processes import DEADLINE
from safetensors.torch import save_file
from torch import nn
from trainers import Trainer, addresses, leased, noncontiguous

import wsync
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import LayoutDiffers, SwapRefused, UsageError
from wsync.layout.layout import layout_of
from wsync.policy import attaching
from wsync.policy import reader as reading
from wsync.segment.publishing import publish, publish_tensors
from wsync.segment.writable import WritableSegment

MODES = [("swap", "device"), ("copy", "device"), ("copy", "none")]


@pytest.fixture
def trainer(trainer: Trainer) -> Trainer:
    """A segment for ``mlp`` whose version 1 has the mark 1."""
    trainer.push(1)
    return trainer


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_step_never_waits_for_the_bus(trainer: Trainer, device: LateDevice, mode: reading.Mode) -> None:
    """refresh says False, and the policy keeps its version, until the copy is done; then the new one is in, whole."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        assert (reader.version, reader.step, marks(policy), reader.mode) == (1, 1, {1.0}, mode)
        assert not reader.refresh()
        for version in range(2, 7):
            trainer.push(version * 10)
            before = marks(policy)
            for _ in range(100):
                assert reader.refresh() is False
                assert marks(policy) == before and reader.version == version - 1
            device.land()
            assert marks(policy) == before
            assert reader.refresh() is True
            assert (reader.version, reader.step, marks(policy)) == (version, version * 10, {version * 10.0})
            assert reader.refresh() is False


@pytest.mark.parametrize(("mode", "staging"), MODES)
def test_extras_come_in_with_their_version(
    trainer: Trainer, device: LateDevice, mode: reading.Mode, staging: attaching.Staging
) -> None:
    """While a copy is under way the policy has the extras of the version on which it acts."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode, staging=staging) as reader:
        for mark in (2, 3):
            before, state = reader.extras, {name: torch.full_like(t, mark) for name, t in policy.state_dict().items()}
            with trainer.segment.publishing():
                publish_tensors(trainer.segment, state, extras={"mark": b"%d" % mark})
            if staging == "device":
                assert not reader.refresh() and reader.extras == before and marks(policy) == {mark - 1.0}
                device.land()
            assert reader.refresh() and reader.extras == {"mark": b"%d" % mark} and marks(policy) == {float(mark)}


def test_a_version_is_one_copy_of_its_bytes(trainer: Trainer, device: LateDevice) -> None:
    """One contiguous copy over the bus a version, however many tensors there are, and not one byte more."""
    with wsync.attach(mlp(), "nets", mode="copy") as reader:
        for mark in (2, 3, 4):
            trainer.push(mark)
            assert reader.refresh(wait=True)
        assert len(device.flights) == 4
        for flight in device.flights:
            assert [t.numel() for t in flight.targets] == [s.numel() for s in flight.sources]
            assert [t.numel() for t in flight.targets] == [trainer.segment.layout.nbytes]


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_the_lease_lasts_until_the_copy_is_done(trainer: Trainer, device: LateDevice, mode: reading.Mode) -> None:
    """The slot is not written while the bus reads it, whoever publishes what, and is free afterwards."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        assert leased(trainer.segment) == []
        trainer.push(2)
        slot = trainer.segment.word & 0xFF
        assert not reader.refresh()
        (record,) = trainer.segment.readers()
        assert leased(trainer.segment) == [slot] == list(record.slots)
        for mark in range(3, 9):
            trainer.push(mark)
        assert leased(trainer.segment) == [slot]
        device.land()
        assert reader.refresh() and marks(policy) == {2.0}
        assert leased(trainer.segment) == [] and reader.version == 2
        assert not reader.refresh()
        device.land()
        assert reader.refresh() and (reader.version, marks(policy)) == (8, {8.0})


@pytest.mark.parametrize(("mode", "staging"), MODES)
def test_who_wants_it_now_waits(
    trainer: Trainer, device: LateDevice, mode: reading.Mode, staging: attaching.Staging
) -> None:
    """refresh(wait=True) gives the newest version at once, also past one that is on its way."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode, staging=staging) as reader:
        trainer.push(2)
        assert reader.refresh(wait=True) and marks(policy) == {2.0}
        trainer.push(3)
        reader.refresh()
        trainer.push(4)
        assert reader.refresh(wait=True) and (reader.version, marks(policy)) == (4, {4.0})
        assert not reader.refresh(wait=True)
        assert leased(trainer.segment) == []


def test_without_staging_there_is_no_second_copy(trainer: Trainer, device: LateDevice) -> None:
    """With staging="none" nothing is allocated, addresses stay, and a version is in when refresh says so."""
    policy = mlp()
    before = addresses(policy)
    with wsync.attach(policy, "nets", staging="none") as reader:
        trainer.push(2)
        assert reader.refresh() is True and marks(policy) == {2.0}
        assert reader.mode == "copy" and addresses(policy) == before
        assert device.buffers == [] and leased(trainer.segment) == []


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_there_is_one_more_copy_of_the_weights_and_no_third(
    trainer: Trainer, device: LateDevice, mode: reading.Mode
) -> None:
    """In copy addresses stay, with one buffer; in swap the policy goes back and forth between two."""
    policy = mlp()
    own = addresses(policy)
    with wsync.attach(policy, "nets", mode=mode) as reader:
        seen = []
        for mark in range(2, 8):
            trainer.push(mark)
            assert reader.refresh(wait=True)
            seen.append(tuple(addresses(policy)))
        nbytes = trainer.segment.layout.nbytes
        if mode == "copy":
            assert set(seen) == {tuple(own)} and device.buffers == [nbytes]
        else:
            assert len(set(seen)) == 2 and seen[0] == seen[2] and device.buffers == [nbytes] * 2
            assert device.trims == [1]  # between the two, when the policy's own weights are gone


@pytest.mark.parametrize(("mode", "staging"), MODES)
def test_every_weight_gets_its_own_bytes(
    runtime: Path, tmp_path: Path, device: LateDevice, mode: reading.Mode, staging: attaching.Staging
) -> None:
    """Random weights of several dtypes, buffers and tied ones arrive each in its own tensor, and ties stay."""
    torch.manual_seed(3)
    trained, policy = Tied().eval(), Tied().eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        trained.norm.running_mean.copy_(torch.randn(3))  # type: ignore[union-attr]
    segment = WritableSegment.create("nets", layout_of(policy))
    save_file({k: v for k, v in trained.state_dict().items() if k != "head.weight"}, tmp_path / "weights.safetensors")
    with segment.publishing(), Checkpoint(tmp_path / "weights.safetensors") as checkpoint:
        publish(segment, checkpoint)
    for _ in range(2):
        with wsync.attach(policy, "nets", mode=mode, staging=staging):
            assert policy.head.weight is policy.embedding.weight
        for name, tensor in trained.state_dict().items():
            assert torch.equal(policy.state_dict()[name], tensor), name


@pytest.mark.parametrize(("mode", "staging"), MODES)
def test_every_dtype_of_a_checkpoint_arrives(
    runtime: Path,
    tmp_path: Path,
    device: LateDevice,
    monkeypatch: pytest.MonkeyPatch,
    mode: reading.Mode,
    staging: attaching.Staging,
) -> None:
    """Also those for which a GPU has no kernel that copies many tensors at once: small floats, unsigned integers."""
    copy = torch._foreach_copy_
    known = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64}
    known |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}

    def as_on_a_gpu(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        for tensor in (*targets, *sources):
            if tensor.dtype not in known:
                raise NotImplementedError(f'"foreach_tensor_copy" not implemented for {tensor.dtype}')
        copy(targets, sources)

    trained, policy = every_dtype(1), every_dtype(5)
    segment = WritableSegment.create("nets", layout_of(policy))
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    with segment.publishing(), Checkpoint(tmp_path / "weights.safetensors") as checkpoint:
        publish(segment, checkpoint)
    if staging == "device":
        monkeypatch.setattr(torch, "_foreach_copy_", as_on_a_gpu)
    with wsync.attach(policy, "nets", mode=mode, staging=staging):
        for name, tensor in trained.state_dict().items():
            assert policy[name].tolist() == tensor.tolist(), name


def test_transposed_weights_are_copied_in_their_own_order(runtime: Path, tmp_path: Path, device: LateDevice) -> None:
    """A parameter that lies transposed on the device gets its values through the buffer, and not without one."""
    trainer = Trainer(noncontiguous)
    path = tmp_path / "weights.safetensors"
    weight = torch.arange(15.0).reshape(5, 3)
    save_file({"weight": weight, "bias": torch.zeros(5)}, path)
    with trainer.segment.publishing(), Checkpoint(path) as checkpoint:
        publish(trainer.segment, checkpoint)
    policy = noncontiguous()
    with wsync.attach(policy, "nets"):
        assert torch.equal(policy.get_parameter("weight"), weight)
    with pytest.raises(UsageError, match="weight is not contiguous"):
        wsync.attach(noncontiguous(), "nets", staging="none")
    assert trainer.segment.readers() == []


def test_a_kept_tensor_keeps_its_bytes(trainer: Trainer, device: LateDevice) -> None:
    """In swap, a buffer that a tensor of the user's still points into is not written again, and goes with it."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode="swap") as reader:
        kept = policy.state_dict()["0.weight"]
        for mark in range(2, 8):
            trainer.push(mark)
            assert reader.refresh(wait=True) and marks(policy) == {float(mark)}
        assert kept.unique().tolist() == [1.0]
        assert len(device.buffers) == 3


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_backward_pass_over_a_refresh_is_told(
    runtime: Path, tmp_path: Path, device: LateDevice, mode: reading.Mode
) -> None:
    """Guards against gradients of a mixture: autograd refuses weights that were replaced since the forward pass."""

    def make() -> nn.Module:
        return nn.LayerNorm(4).eval()

    trainer, policy = Trainer(make), make()
    trainer.push(1)
    with wsync.attach(policy, "nets", mode=mode) as reader:
        loss = policy(torch.arange(4.0).requires_grad_()).sum()
        trainer.push(2)
        assert reader.refresh(wait=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_wait_sleeps_until_the_copy_is_done(trainer: Trainer, device: LateDevice) -> None:
    """wait is False while a version is under way and time is up, and True when refresh would take it."""
    policy = mlp()
    with wsync.attach(policy, "nets") as reader:
        assert not reader.wait(0)
        trainer.push(2)
        assert reader.wait(0) and not reader.refresh()
        assert not reader.wait(0) and not reader.wait(0.001)
        started = threading.Event()

        def land() -> None:
            started.wait(DEADLINE)
            device.land()

        thread = threading.Thread(target=land)
        thread.start()
        started.set()
        assert reader.wait(DEADLINE) and reader.refresh() and marks(policy) == {2.0}
        thread.join()
        assert not reader.wait(0)


@pytest.mark.parametrize(("mode", "staging"), MODES)
def test_no_version_is_taken_into_a_graph(
    trainer: Trainer, device: LateDevice, mode: reading.Mode, staging: attaching.Staging
) -> None:
    """While a CUDA graph is captured a new version is refused with the reason, and the copy under way goes on."""
    policy = mlp()
    device.captured = True
    with pytest.raises(UsageError, match="between replays"):
        wsync.attach(policy, "nets", mode=mode, staging=staging)
    assert trainer.segment.readers() == [] and leased(trainer.segment) == [] and not device.flights
    device.captured = False
    with wsync.attach(policy, "nets", mode=mode, staging=staging) as reader:
        trainer.push(2)
        if staging == "device":
            assert not reader.refresh()
        device.captured = True
        for act in (reader.refresh, reader.wait):
            with pytest.raises(UsageError, match="between replays"):
                act()
        assert marks(policy) == {1.0}
        device.captured = False
        assert reader.refresh(wait=True) and marks(policy) == {2.0}


def test_auto_copies_on_a_device(trainer: Trainer, device: LateDevice) -> None:
    """What remembers addresses cannot be seen, so that swap is only taken where it is asked for."""
    for mode, taken in (("auto", "copy"), ("copy", "copy"), ("swap", "swap")):
        with wsync.attach(mlp(), "nets", mode=mode) as reader:  # type: ignore[arg-type]
            assert reader.mode == taken


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: mlp().train(), "training mode"),
        (Counting, "calls"),
        (noncontiguous, "not contiguous"),
    ],
)
def test_unsafe_swap_is_refused(runtime: Path, device: LateDevice, make: Callable[[], nn.Module], reason: str) -> None:
    """mode="swap" is refused on a device where it is on the CPU, with the reason."""
    with pytest.raises(SwapRefused, match=reason):
        wsync.attach(make(), "nets", mode="swap", timeout=0)


@pytest.mark.parametrize("arguments", [{"mode": "swap", "staging": "none"}, {"staging": "host"}])
def test_wrong_staging_is_a_usage_error(runtime: Path, arguments: dict[str, str]) -> None:
    """A staging that is none, or has no meaning with the mode, is told."""
    with pytest.raises(UsageError, match="staging"):
        wsync.attach(mlp(), "nets", **arguments)  # type: ignore[arg-type]


def test_another_dtype_is_refused_with_a_table(trainer: Trainer, device: LateDevice) -> None:
    """A bfloat16 policy over a float32 slot is refused: it is the publisher who casts, once for all readers."""
    with pytest.raises(LayoutDiffers, match=r"(?s)0.weight.*BF16.*F32"):
        wsync.attach(mlp().bfloat16(), "nets")
    assert trainer.segment.readers() == []


MOVES: dict[str, Callable[[nn.Module], object]] = {
    "to another dtype": lambda policy: policy.half(),
    "to another place": lambda policy: policy.to("meta"),
    "replaced": lambda policy: setattr(policy.get_submodule("0"), "weight", nn.Parameter(torch.zeros(8, 4))),
}


@pytest.mark.parametrize("how", MOVES)
def test_a_policy_that_was_moved_is_told_so(trainer: Trainer, device: LateDevice, how: str) -> None:
    """After .to() and the like a new version is refused with the reason, leases nothing, and close still works."""
    policy = mlp()
    reader = wsync.attach(policy, "nets")
    MOVES[how](policy)
    assert not reader.refresh()
    trainer.push(2)
    for _ in range(3):
        with pytest.raises(UsageError, match=r"0.weight is another tensor .* or was moved"):
            reader.refresh()
    assert leased(trainer.segment) == []
    reader.close()
    assert trainer.segment.readers() == [] and device.locked == {}


@pytest.mark.parametrize("mode", ["swap", "copy"])
@pytest.mark.parametrize("how", MOVES)
def test_a_policy_that_was_moved_under_a_copy_is_told_so(
    trainer: Trainer, device: LateDevice, mode: reading.Mode, how: str
) -> None:
    """Moved while a version is under way, it is left where it is, and told so when that lands."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        trainer.push(2)
        assert not reader.refresh()
        MOVES[how](policy)
        now = [(tensor.device, tensor.dtype) for tensor in policy.state_dict().values()]
        device.land()
        for _ in range(2):
            with pytest.raises(UsageError, match="or was moved"):
                reader.refresh()
        assert leased(trainer.segment) == [] and reader.version == 1
        assert [(tensor.device, tensor.dtype) for tensor in policy.state_dict().values()] == now


@pytest.mark.parametrize(("mode", "staging"), MODES)
@pytest.mark.parametrize("built_so", [False, True])
def test_inference_mode(
    trainer: Trainer, device: LateDevice, mode: reading.Mode, staging: attaching.Staging, built_so: bool
) -> None:
    """Attached and refreshed in inference mode a policy gets its versions, and is as trainable as it was."""
    with torch.inference_mode(built_so):
        policy = mlp()
    if built_so and mode == "swap":
        with pytest.raises(SwapRefused, match="inference mode"):
            wsync.attach(policy, "nets", mode=mode)
        return
    with torch.inference_mode(), wsync.attach(policy, "nets", mode=mode, staging=staging) as reader:
        for mark in (2, 3, 4):
            trainer.push(mark)
            assert reader.refresh(wait=True) and marks(policy) == {float(mark)}
    assert all(p.is_inference() == built_so for p in policy.parameters())
    if not built_so:
        policy(torch.ones(4)).sum().backward()
    trainer.push(5)
    with wsync.attach(policy, "nets", mode=mode, staging=staging):
        assert marks(policy) == {5.0}


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_a_cpu_policy_that_was_moved_is_told_so(trainer: Trainer, mode: reading.Mode) -> None:
    """A policy attached on the CPU and moved to a device afterwards is not left behind, or torn, in silence."""
    policy = mlp()
    with wsync.attach(policy, "nets", mode=mode) as reader:
        held = leased(trainer.segment)
        moved = policy.to("meta")
        trainer.push(2)
        with pytest.raises(UsageError, match=r"0.weight .* on meta.*attach again"):
            reader.refresh()
        assert leased(trainer.segment) == held and moved.get_parameter("0.weight").is_meta


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_no_version_is_torn_under_a_storm(trainer: Trainer, device: LateDevice, mode: reading.Mode) -> None:
    """Publishes as fast as they go, and copies that land at any moment: each step acts on exactly the version told."""
    policy, stop = mlp(), threading.Event()
    seen = set()

    def storm() -> None:
        mark = 2
        while not stop.is_set():
            mark = trainer.push(mark) + 1

    thread = threading.Thread(target=storm)
    with wsync.attach(policy, "nets", mode=mode) as reader:
        thread.start()
        try:
            for step in range(100_000):
                if step % 7 == 0:
                    device.land()
                reader.refresh()
                assert marks(policy) == {float(reader.step or 0)}
                seen.add(reader.version)
                if len(seen) > 30:
                    break
        finally:
            stop.set()
            thread.join()
    assert len(seen) > 30
