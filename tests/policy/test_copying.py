"""Versions that are copied into a policy's own tensors: every byte of them, and never half of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from policies import mlp
from torch import nn
from trainers import Trainer

import wsync
from wsync.errors import UsageError
from wsync.layout.layout import layout_of
from wsync.policy.reader import PlainReader
from wsync.policy.reader_options import Terms
from wsync.policy.tensors import Attached
from wsync.segment.publishing import publish_tensors
from wsync.segment.writable import WritableSegment

WIDE = (1 << 20) + 7  # elements that torch may share between threads


class Wrapped(torch.Tensor):
    """A tensor that has no bytes of its own, as sharded and quantized ones are."""

    within: torch.Tensor

    @staticmethod
    def __new__(cls, within: torch.Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(cls, within.shape, dtype=within.dtype)
        made.within = within
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*(each.within if isinstance(each, cls) else each for each in args), **(kwargs or {}))


def varied() -> nn.Module:
    """Large, small, empty and scalar tensors, and those that are no plain rows of bytes."""
    policy = nn.Module()
    shapes = [(WIDE,), (3, WIDE), (5,), (), (0, 4), (1 << 15,)]
    for number, shape in enumerate(shapes):
        policy.register_parameter(f"p{number}", nn.Parameter(torch.zeros(shape)))
    policy.register_parameter("transposed", nn.Parameter(torch.zeros(300, 200).t()))
    policy.register_parameter(
        "channels_last", nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    )
    policy.register_buffer("wrapped", Wrapped(torch.zeros(11)))
    policy.register_buffer("negated", torch._neg_view(torch.zeros(12)))
    policy.register_buffer("conjugated", torch.zeros(6, dtype=torch.complex64).conj())
    with torch.inference_mode():
        policy.register_buffer("frozen", torch.zeros(7))
        policy.register_buffer("frozen_transposed", torch.zeros(20, 30).t())
    policy.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    return policy.eval()


def test_every_tensor_is_copied_whole(runtime: Path) -> None:
    """Guards tensors of every form: large and empty ones, strided, lazily negated and of classes of their own."""
    policy = varied()
    segment = WritableSegment.create("nets", layout_of(policy))
    generator = torch.Generator().manual_seed(7)
    for version in (1, 2, 3):
        new = {
            name: (torch.randn(tensor.shape, generator=generator) * (1000 + 7j if tensor.is_complex() else 1000)).to(
                tensor.dtype
            )
            for name, tensor in policy.state_dict().items()
        }
        with segment.publishing():
            publish_tensors(segment, new)
        if version == 1:
            reader = wsync.attach(policy, "nets", mode="copy")
        else:
            assert reader.refresh()
        state = policy.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in new.items())
    assert policy.get_parameter("transposed").stride() == (1, 200)
    reader.close()
    segment.close()


def test_a_tensor_that_is_laid_out_anew_is_copied_by_its_strides(runtime: Path) -> None:
    """Guards against a parameter that was a plain row of bytes when it was attached, and is none any more."""
    policy, trainer = mlp(), Trainer(mlp)
    trainer.push(1)
    with wsync.attach(policy, "nets", mode="copy") as reader:
        weight = policy.get_parameter("0.weight")
        weight.data = torch.zeros(weight.shape[::-1]).t()
        new = {name: torch.rand(tensor.shape) for name, tensor in policy.state_dict().items()}
        with trainer.segment.publishing():
            publish_tensors(trainer.segment, new)
        assert reader.refresh()
        assert all(torch.equal(tensor, new[name]) for name, tensor in policy.state_dict().items())


def test_a_backward_pass_over_a_refresh_is_told(runtime: Path) -> None:
    """Guards against gradients of a mixture: autograd refuses weights that were replaced since the forward pass."""
    policy = mlp()
    trainer = Trainer(mlp)
    trainer.push(1)
    with wsync.attach(policy, "nets", mode="copy") as reader:
        loss = policy(torch.ones(1, 4)).sum()
        trainer.push(2)
        assert reader.refresh()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class Interrupted(Wrapped):
    """Copied by code of its own, in which Ctrl-C comes once."""

    pending = False

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.copy_.default and Interrupted.pending:
            Interrupted.pending = False
            raise KeyboardInterrupt
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_an_interrupt_leaves_no_mixture(runtime: Path) -> None:
    """Guards Ctrl-C amid a version: it is raised when all of the version is there, and the reader goes on."""
    policy = nn.Module().eval()
    policy.register_buffer("first", torch.zeros(5))
    policy.register_buffer("middle", Interrupted(torch.zeros(5)))
    policy.register_buffer("rest", torch.zeros(5))
    segment = WritableSegment.create("nets", layout_of(policy))

    def publish(mark: float) -> None:
        with segment.publishing():
            publish_tensors(segment, {name: torch.full((5,), mark) for name in policy.state_dict()})

    publish(1)
    with wsync.attach(policy, "nets", mode="copy") as reader:
        publish(2)
        Interrupted.pending = True
        with pytest.raises(KeyboardInterrupt):
            reader.refresh()
        assert all(torch.equal(tensor, torch.full((5,), 2.0)) for tensor in policy.state_dict().values())
        publish(3)
        assert reader.refresh()
        assert all(torch.equal(tensor, torch.full((5,), 3.0)) for tensor in policy.state_dict().values())


def test_a_backward_pass_is_told_beside_a_tensor_of_inference_mode(runtime: Path) -> None:
    """Guards graphs of a policy with a buffer that was made in inference mode, where torch counts no writes."""
    policy = mlp()
    with torch.inference_mode():
        policy.register_buffer("made", torch.zeros(2))
    segment = WritableSegment.create("nets", layout_of(policy))
    with segment.publishing():
        publish_tensors(segment, policy.state_dict())
    with wsync.attach(policy, "nets", mode="copy") as reader:
        loss = policy(torch.ones(1, 4)).sum()
        with segment.publishing():
            publish_tensors(segment, {name: torch.ones_like(each) for name, each in policy.state_dict().items()})
        assert reader.refresh() and policy.get_buffer("made").eq(1).all()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_tensor_elsewhere_is_left_to_torch(runtime: Path) -> None:
    """Guards against addresses that are none of this process's: an offloaded parameter is no reason to crash."""
    policy = mlp()
    segment = WritableSegment.create("nets", layout_of(policy))
    with segment.publishing():
        publish_tensors(segment, {name: torch.full_like(each, 3) for name, each in policy.state_dict().items()})
    policy.get_submodule("2").bias = nn.Parameter(torch.zeros(2, device="meta"))
    names = {name: name for name in policy.state_dict()}
    with PlainReader(Attached(policy, segment.layout, names), segment, "copy", Terms()) as reader:
        assert reader.refresh() and policy.get_parameter("0.weight").eq(3).all()


def test_a_tensor_without_bytes_is_refused(runtime: Path) -> None:
    """Guards the tensors before it, which would have the new version without it."""
    policy = mlp()
    segment = WritableSegment.create("nets", layout_of(policy))
    with segment.publishing():
        publish_tensors(segment, policy.state_dict())
    policy.get_parameter("2.bias").data = torch._efficientzerotensor(2)
    with pytest.raises(UsageError, match=r"2\.bias is a tensor of zeros without memory"):
        wsync.attach(policy, "nets", mode="copy")
    segment.close()


def test_what_is_kept_of_a_copied_policy_is_its_own_memory(trainer: Trainer) -> None:
    """Guards what the README says of each mode: here an alias changes with the policy, and a clone does not."""
    trainer.push(1)
    policy = mlp()
    with wsync.attach(policy, "nets", mode="copy") as reader:
        alias, clone = policy.state_dict()["0.bias"], policy.state_dict()["0.bias"].clone()
        trainer.push(2)
        assert reader.refresh() and alias.eq(2).all() and clone.eq(1).all()
