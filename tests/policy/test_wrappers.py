"""What wraps a policy is seen through: ``torch.compile``, data parallels, modules that override what torch reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import marks, write
from policies import mlp
from torch import nn
from trainers import Trainer

import wsync
from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import LayoutDiffers, SpecError
from wsync.layout.layout import layout_of
from wsync.segment.publishing import publish
from wsync.segment.writable import WritableSegment

Wrap = Callable[[nn.Module], nn.Module]


class Module(nn.Module):
    """A user's own wrapper, by the name that data parallels use."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Actor(nn.Module):
    """A user's own wrapper, by another name."""

    def __init__(self, actor: nn.Module) -> None:
        super().__init__()
        self.actor = actor


def compiled(policy: nn.Module) -> nn.Module:
    made: nn.Module = torch.compile(policy, backend="eager")  # type: ignore[assignment]
    return made


def compiled_within(policy: nn.Module) -> nn.Module:
    policy[0] = torch.compile(policy[0], backend="eager")  # type: ignore[index, operator]
    return policy


def parallel(policy: nn.Module) -> nn.Module:
    return nn.DataParallel(policy)


def distributed(policy: nn.Module) -> nn.Module:
    """As DistributedDataParallel is without a process group, which a layout does not need."""
    made = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(made)
    made.module = policy
    return made


WRAPS: list[Wrap] = [
    compiled,
    compiled_within,
    parallel,
    distributed,
    lambda policy: compiled(distributed(policy)),
    lambda policy: distributed(compiled(policy)),
    Module,
]
IDS = ["compiled", "compiled within", "parallel", "distributed", "compiled ddp", "ddp of compiled", "module of my own"]


def filled(policy: nn.Module, mark: float) -> nn.Module:
    with torch.no_grad():
        for tensor in policy.parameters():
            tensor.fill_(mark)
    return policy


@pytest.mark.parametrize("given", ["with its policy", "module", "state_dict"])
@pytest.mark.parametrize("ours", [False, True], ids=["its trainer", "its reader"])
@pytest.mark.parametrize("wrap", WRAPS, ids=IDS)
def test_a_wrapper_on_one_side_is_seen_through(wrap: Wrap, ours: bool, given: str, runtime: Path) -> None:
    """Guards trainers that push, and policies that attach, what torch.compile or a data parallel made of them."""
    trained, policy = (mlp(), wrap(mlp()).eval()) if ours else (wrap(mlp()).eval(), mlp())
    updater = wsync.SharedMemoryWeightUpdater("nets", policy=trained if given == "with its policy" else None)
    updater.push_weights(filled(trained, 1.0))
    with wsync.attach(policy, "nets", timeout=0) as reader:
        assert marks(policy) == {1.0} and reader.mode == "swap"
        filled(trained, 2.0)
        updater.push_weights(trained.state_dict() if given == "state_dict" else trained)
        assert reader.refresh() and marks(policy) == {2.0}
        updater.push_weights(filled(mlp(), 3.0))
        assert reader.refresh() and marks(policy) == {3.0}
    updater.close()


@pytest.mark.parametrize("wrap", WRAPS, ids=IDS)
def test_a_vanilla_updater_sees_through_it(wrap: Wrap) -> None:
    """Guards the same where both are in one process."""
    for trained, policy in ((mlp(), wrap(mlp())), (wrap(mlp()), mlp())):
        updater = wsync.VanillaWeightUpdater.from_policy(policy)
        updater.push_weights(filled(trained, 1.0))
        assert marks(policy) == {1.0}
        updater.push_weights(filled(trained, 2.0).state_dict())
        assert marks(policy) == {2.0}


@pytest.mark.parametrize("wrap", WRAPS, ids=IDS)
def test_checkpoints_of_either_kind_reach_a_wrapped_policy(wrap: Wrap, runtime: Path, tmp_path: Path) -> None:
    """Guards specs that build a compiled module, beside trainers that do not, and the reverse."""
    segment = WritableSegment.create("nets", layout_of(wrap(mlp())))
    policy = mlp()
    for mark, trained in enumerate((mlp(), wrap(mlp())), start=1):
        path = write(tmp_path / "step.safetensors", trained, float(mark), mark)
        with segment.publishing(), Checkpoint(path) as checkpoint:
            publish(segment, checkpoint)
        with wsync.attach(policy, "nets"):
            assert marks(policy) == {float(mark)}


@pytest.mark.parametrize(
    ("make", "pushed", "told"),
    [
        (lambda: Actor(mlp()), mlp, r"give the part inside, policy\.actor\."),
        (mlp, lambda: Actor(mlp()), r"the publisher should give the part inside, policy\.actor\."),
    ],
)
def test_names_that_differ_by_a_prefix_are_no_reason_to_remove(
    make: Callable[[], nn.Module], pushed: Callable[[], nn.Module], told: str, runtime: Path
) -> None:
    """Guards a segment that others use, where this policy is only wrapped otherwise."""
    wsync.SharedMemoryWeightUpdater("nets").push_weights(pushed())
    with pytest.raises(LayoutDiffers, match=told) as caught:
        wsync.attach(make(), "nets", timeout=0)
    assert "wsync rm" not in str(caught.value)


class Narrow(nn.Module):
    """Overrides what torch reads by methods that take fewer arguments, as torchrl's LossModule does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:  # type: ignore[override]
        yield from ()

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:  # type: ignore[override]
        yield "", self

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:  # type: ignore[override]
        yield from ()


def test_overridden_readers_of_tensors_do_no_harm(runtime: Path) -> None:
    """Guards policies that show other tensors in ``named_parameters`` than ``state_dict`` has."""
    trainer, policy = Trainer(Narrow), Narrow().eval()
    trainer.push(1)
    with wsync.attach(policy, "nets", mode="copy"):
        assert marks(policy) == {1.0}


def test_a_loss_module_of_torchrl_is_a_policy(runtime: Path) -> None:
    """Guards actor, critic and their targets in one module, whose ``named_parameters`` takes fewer arguments."""
    nets, objectives = pytest.importorskip("torchrl.modules"), pytest.importorskip("torchrl.objectives")
    from tensordict.nn import TensorDictModule

    def make() -> nn.Module:
        actor = TensorDictModule(nn.Linear(2, 2), in_keys=["observation"], out_keys=["action"])
        value = nets.ValueOperator(
            nets.MLP(in_features=4, out_features=1, num_cells=[8]), in_keys=["observation", "action"]
        )
        loss: nn.Module = objectives.DDPGLoss(actor_network=actor, value_network=value, delay_actor=True)
        return loss

    trained, policy = make(), make()
    updater = wsync.SharedMemoryWeightUpdater("loss", policy=trained)
    updater.push_weights(trained)
    with wsync.attach(policy, "loss", timeout=0) as reader:
        for _ in range(2):
            ours, theirs = policy.state_dict(), trained.state_dict()
            assert len(ours) == 12 and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
            with torch.no_grad():
                for tensor in trained.state_dict().values():
                    tensor.add_(1)
            updater.push_weights(trained)
            assert reader.refresh()
    updater.close()


class Failing(nn.Module):
    """Its own code fails while its tensors are read."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))
        del self.__dict__["_non_persistent_buffers_set"]

    def __getattr__(self, name: str) -> Any:
        if name == "_non_persistent_buffers_set":
            raise KeyError("the registry is empty")
        return super().__getattr__(name)


def test_an_exception_of_the_policy_is_shown(runtime: Path, tmp_path: Path) -> None:
    """Guards against a raw error out of the user's own code: it is told as the policy's, in attach and in a push."""
    broken = Failing()
    for read in (
        lambda: wsync.attach(broken, "nets", timeout=0),
        lambda: wsync.SharedMemoryWeightUpdater("nets", policy=broken).push_weights(broken),
    ):
        with pytest.raises(SpecError, match=r"\(Failing\) cannot be read: KeyError: 'the registry is empty'"):
            read()
    assert list(runtime.iterdir()) == []
