"""Infinities that belong to a policy, such as masks and bounds, may be pushed from memory; others may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import wsync

INF = float("inf")


class Masked(nn.Module):
    """With a mask and bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mask", torch.triu(torch.full((3, 3), -INF), 1))
        self.eval()


def test_the_policys_own_infinities_are_published(runtime: Path) -> None:
    """As from a checkpoint; other infinities, NaN, and what a policy came to hold while it was trained are refused."""
    policy = Masked()
    with wsync.publisher("nets", policy) as trainer:
        assert trainer.push(1) == 1
        for value in (INF, float("nan")):
            policy.get_buffer("mask")[0, 1] = value
            with pytest.raises(ValueError, match="'mask' holds NaN or infinity"):
                trainer.push(2)
        policy.get_buffer("mask")[0, 1] = -INF
        policy.get_parameter("linear.weight").data.fill_(INF)
        with pytest.raises(ValueError, match=r"'linear\.weight' holds"):
            trainer.push(2)
        policy.get_parameter("linear.weight").data.fill_(2.0)
        assert trainer.push(2) == 2
    with wsync.attach(Masked(), "nets", timeout=0) as reader:
        assert reader.version == 2


def test_a_cast_makes_no_infinity_that_is_accepted(runtime: Path) -> None:
    """What is finite in its own dtype and infinite in the policy's is refused, also where the mask is infinite."""
    updater = wsync.SharedMemoryWeightUpdater("nets", policy=Masked())
    state = {name: tensor.detach().double() for name, tensor in Masked().state_dict().items()}
    updater.push_weights(state)
    state["mask"][0, 1] = -1e300
    with pytest.raises(ValueError, match="'mask' holds NaN or infinity"):
        updater.push_weights(state)
    without = wsync.SharedMemoryWeightUpdater("nets")
    with pytest.raises(ValueError, match="'mask' holds NaN or infinity"):
        without.push_weights(Masked())
    for each in (updater, without):
        each.close()


def test_an_updater_in_this_process_takes_its_targets_infinities() -> None:
    """The same for a policy whose tensors are written in place."""
    policy, given = Masked(), TensorDict.from_module(Masked()).data.clone()
    updater = wsync.VanillaWeightUpdater(policy_weights=TensorDict.from_module(policy), finite=True)
    given["linear", "bias"].fill_(3.0)
    updater.push_weights(given)
    assert policy.get_parameter("linear.bias").eq(3).all()
    given["mask"][2, 0] = -INF
    with pytest.raises(ValueError, match="'mask' holds NaN or infinity"):
        updater.push_weights(given)
