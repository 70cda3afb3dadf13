"""The layout: the same order, bytes and tied names as safetensors gives a policy, read from any device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import policies
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from wsync.errors import SpecError
from wsync.layout.layout import TORCH_DTYPES, Layout, layout_of, named_tensors

Make = Callable[[], nn.Module]


class Holder(nn.Module):
    """Whatever tensors it is given, as buffers."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class SharedStorage(nn.Module):
    """Two distinct Parameter objects over one storage, which no ``is`` would find."""

    def __init__(self) -> None:
        super().__init__()
        self.z_first = nn.Linear(3, 3, bias=False)
        self.a_second = nn.Linear(3, 3, bias=False)
        self.a_second.weight = nn.Parameter(self.z_first.weight.detach())


class Deep(nn.Module):
    """Names whose order differs between sorting whole names and walking the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.ModuleDict({"10": nn.Linear(2, 2), "9": nn.Linear(2, 2)})
        self.a_ = nn.Linear(2, 1)
        self.a = nn.ModuleList([nn.BatchNorm1d(2), nn.Linear(2, 2, dtype=torch.float64)])
        self.B = nn.Parameter(torch.zeros(()))


def all_dtypes() -> nn.Module:
    """One buffer of each dtype that torch and safetensors share."""
    return Holder(
        **{f"x_{attribute}": torch.empty(3, dtype=getattr(torch, attribute)) for attribute in TORCH_DTYPES.values()}
    )


ARCHITECTURES: list[Make] = [policies.mlp, policies.Tied, policies.Counting, SharedStorage, Deep, all_dtypes]


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, read here by hand."""
    content = path.read_bytes()
    table: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    table.pop("__metadata__", None)
    return table


@pytest.mark.parametrize("make", ARCHITECTURES)
def test_a_layout_is_what_save_model_writes(make: Make, tmp_path: Path) -> None:
    """Guards that names, order, dtypes, shapes and offsets equal those of the official writer's file."""
    policy = make()
    save_model(policy, str(tmp_path / "policy.safetensors"))
    ours = [(e.name, e.dtype, list(e.shape), [e.offset, e.offset + e.nbytes]) for e in layout_of(policy).tensors]
    stored = header(tmp_path / "policy.safetensors")
    assert ours == [(name, t["dtype"], t["shape"], t["data_offsets"]) for name, t in stored.items()]


def test_save_file_gives_the_same_order(tmp_path: Path) -> None:
    """Guards that a state_dict saved without ties lies in the file as in the layout, scalars and empties too."""
    state = {
        "b": torch.zeros(3, dtype=torch.bool),
        "a": torch.zeros((), dtype=torch.float64),
        "c": torch.zeros(0, 4),
        "a10": torch.zeros(2),
        "a9": torch.zeros(2),
        "Z": torch.zeros(2),
        "é": torch.zeros(2),
    }
    save_file(state, tmp_path / "state.safetensors")
    assert [e.name for e in layout_of(Holder(**state)).tensors] == list(header(tmp_path / "state.safetensors"))


@pytest.mark.parametrize("make", ARCHITECTURES)
def test_offsets_leave_no_gap_and_are_aligned(make: Make) -> None:
    """Guards that tensors follow each other without gaps, each aligned to its own element."""
    layout = layout_of(make())
    end = 0
    for entry in layout.tensors:
        assert entry.offset == end
        assert entry.offset % getattr(torch, TORCH_DTYPES[entry.dtype]).itemsize == 0
        end += entry.nbytes
    assert layout.nbytes == end


@pytest.mark.parametrize("make", ARCHITECTURES)
def test_the_meta_device_gives_the_same_layout(make: Make) -> None:
    """Guards that reading a layout needs no byte of a weight, and that ties are seen without them."""
    with torch.device("meta"):
        abstract = make()
    assert all(tensor.is_meta for _, tensor in named_tensors(abstract))
    assert layout_of(abstract) == layout_of(make())


def test_tied_weights_are_stored_once() -> None:
    """Guards that one storage under two names takes its bytes once, under the first name in sorted order."""
    layout = layout_of(policies.Tied())
    tied = [e for e in layout.tensors if e.aliases]
    assert [(e.name, e.aliases) for e in tied] == [("embedding.weight", ("head.weight",))]
    assert "head.weight" not in {e.name for e in layout.tensors}


def test_two_parameters_over_one_storage_are_tied() -> None:
    """Guards that ties are found by storage, not by the identity of the Parameter objects."""
    policy = SharedStorage()
    assert policy.a_second.weight is not policy.z_first.weight
    (entry,) = layout_of(policy).tensors
    assert entry.names == ("a_second.weight", "z_first.weight")


def test_a_shared_module_is_tied_under_all_its_names() -> None:
    """Guards that one submodule under three names gives one entry with two aliases, its buffers included."""
    norm = nn.BatchNorm1d(2)
    layout = layout_of(nn.ModuleDict({"c": norm, "a": norm, "b": norm}))
    assert [e.name.split(".")[0] for e in layout.tensors] == ["a"] * 5
    mean = next(e for e in layout.tensors if e.name == "a.running_mean")
    assert mean.aliases == ("b.running_mean", "c.running_mean")


def test_parts_of_one_storage_are_not_tied() -> None:
    """Guards that two different windows on one storage stay two tensors."""
    whole = torch.zeros(8)
    layout = layout_of(Holder(left=whole[:4], right=whole[4:], short=whole[:2], row=whole[:4].view(1, 4)))
    assert [(e.name, e.aliases) for e in layout.tensors] == [("left", ()), ("right", ()), ("row", ()), ("short", ())]


def test_empty_tensors_are_never_tied() -> None:
    """Guards that tensors of no bytes, which share an address easily, are not taken for one another."""
    whole = torch.zeros(4)
    layout = layout_of(Holder(a=whole[:0], b=whole[:0]))
    assert [e.name for e in layout.tensors] == ["a", "b"]


def test_only_persistent_buffers_are_there() -> None:
    """Guards that a layout holds what state_dict() holds: persistent buffers, and no others."""
    policy = policies.Tied()
    names = {name for entry in layout_of(policy).tensors for name in entry.names}
    assert names == policy.state_dict().keys()
    assert "norm.running_mean" in names and "scratch" not in names


VARIANTS: dict[str, tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]] = {
    "as it is": ({"a": ("F32", (2, 3)), "b": ("F32", (2, 3))}, {"c": "a"}),
    "a name": ({"a": ("F32", (2, 3)), "B": ("F32", (2, 3))}, {"c": "a"}),
    "a dtype": ({"a": ("F32", (2, 3)), "b": ("I32", (2, 3))}, {"c": "a"}),
    "a shape": ({"a": ("F32", (2, 3)), "b": ("F32", (3, 2))}, {"c": "a"}),
    "no tie": ({"a": ("F32", (2, 3)), "b": ("F32", (2, 3)), "c": ("F32", (2, 3))}, {}),
    "another tie": ({"a": ("F32", (2, 3)), "b": ("F32", (2, 3))}, {"c": "b"}),
    "a further alias": ({"a": ("F32", (2, 3)), "b": ("F32", (2, 3))}, {"c": "a", "d": "a"}),
}


def test_digests_differ_where_layouts_do() -> None:
    """Guards that name, dtype, shape and ties each reach the digest."""
    digests = {label: Layout.build(*variant).digest for label, variant in VARIANTS.items()}
    assert len(set(digests.values())) == len(VARIANTS), digests


def test_equal_architectures_have_equal_digests() -> None:
    """Guards that the digest covers the architecture alone: no values, no order of definition."""
    assert layout_of(policies.mlp()).digest == layout_of(policies.mlp()).digest
    tensors, ties = VARIANTS["a further alias"]
    backwards = Layout.build(dict(reversed(tensors.items())), dict(reversed(ties.items())))
    assert backwards.digest == Layout.build(tensors, ties).digest


@pytest.mark.parametrize("make", ARCHITECTURES)
def test_a_layout_survives_json(make: Make) -> None:
    """Guards that what a segment's layout.json holds gives the same layout again."""
    layout = layout_of(make())
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert again.digest == layout.digest


@pytest.mark.parametrize(
    ("variant", "rows"),
    [
        ("as it is", []),
        ("a name", [("B", "absent", "F32 [2, 3]"), ("b", "F32 [2, 3]", "absent")]),
        ("a dtype", [("b", "F32 [2, 3]", "I32 [2, 3]")]),
        ("a shape", [("b", "F32 [2, 3]", "F32 [3, 2]")]),
        ("no tie", [("a", "tied to c", "not tied"), ("c", "tied to a", "not tied")]),
        (
            "another tie",
            [("a", "tied to c", "not tied"), ("b", "not tied", "tied to c"), ("c", "tied to a", "tied to b")],
        ),
    ],
)
def test_differences_name_each_tensor(variant: str, rows: list[tuple[str, str, str]]) -> None:
    """Guards the table that tells two architectures apart: one sorted row a name, expected and found."""
    here, there = Layout.build(*VARIANTS["as it is"]), Layout.build(*VARIANTS[variant])
    assert [(d.name, d.expected, d.found) for d in here.differences(there)] == rows


def test_a_lazy_module_is_refused() -> None:
    """Guards that a module without shapes yet is a SpecError that names the tensor and the way out."""
    with pytest.raises(SpecError, match=r"(?s)weight.*lazy module once"):
        layout_of(nn.LazyLinear(3))


def test_a_lazy_module_that_ran_is_taken() -> None:
    """Guards that the advice of the refusal works."""
    policy = nn.LazyLinear(3)
    policy(torch.zeros(1, 2))
    assert {e.name: e.shape for e in layout_of(policy).tensors} == {"weight": (3, 2), "bias": (3,)}


def test_a_dtype_that_no_file_can_hold_is_refused() -> None:
    """Guards that a dtype outside safetensors is a SpecError that names tensor and dtype."""
    with pytest.raises(SpecError, match=r"'odd'.*torch\.complex128"):
        layout_of(Holder(odd=torch.zeros(1, dtype=torch.complex128)))


def test_a_sparse_tensor_is_refused() -> None:
    """Guards that a tensor without one storage of its own is a SpecError, not an error of torch."""
    with pytest.raises(SpecError, match="'odd'"):
        layout_of(Holder(odd=torch.zeros(2, 2).to_sparse()))


def test_a_policy_without_tensors_is_refused() -> None:
    """Guards that there is something to keep in step."""
    policy = nn.Sequential(nn.Tanh())
    policy.register_buffer("scratch", torch.zeros(1), persistent=False)
    with pytest.raises(SpecError, match="neither parameters nor persistent buffers"):
        layout_of(policy)
