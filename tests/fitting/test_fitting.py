"""How a checkpoint fits a policy: selection, names, casts, parts of a policy, and the advice of a refusal."""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import policies
import pytest
import torch
from builders import SUPPORT, write
from hypothesis import given
from hypothesis import settings as at_most
from hypothesis import strategies as st
from safetensors.torch import save_file

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.errors import CheckpointChanged, CheckpointMismatch, NonFiniteWeights, PartialCheckpoint, UsageError
from wsync.fitting import advice
from wsync.fitting.cast import pieces
from wsync.fitting.fit import Fit
from wsync.fitting.header import StoredTensor
from wsync.fitting.plan import Plan, plan_of
from wsync.history.state import State
from wsync.layout.layout import TORCH_DTYPES, Layout, layout_of
from wsync.segment.publishing import publish, rehearse
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import Spec, load_spec
from wsync.sync.syncer import Syncer

FLOATS = ["F16", "BF16", "F32", "F64"]
WRAPPERS = ["actor.", "model.", "policy.", "actor_network.", "base_model.model.",
            "learner.nets.actor."]  # fmt: skip

Tensors = Mapping[str, torch.Tensor]


def save(path: Path, tensors: Tensors) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def read(path: Path, layout: Layout, settings: Fit = Fit()) -> dict[str, torch.Tensor]:  # noqa: B008  (frozen)
    """What reaches the layout's tensors, as tensors."""
    weights = bytearray(b"\xa5" * layout.nbytes)
    with Checkpoint(path) as checkpoint:
        checkpoint.read_into(memoryview(weights), checkpoint.plan(layout, settings), finite=settings.finite)
    return unpack(weights, layout)


def unpack(weights: bytes | bytearray | memoryview, layout: Layout) -> dict[str, torch.Tensor]:
    found = {}
    for entry in layout.tensors:
        dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
        part = bytearray(weights[entry.offset : entry.offset + entry.nbytes])
        flat = torch.frombuffer(part, dtype=dtype) if part else torch.empty(0, dtype=dtype)
        found[entry.name] = flat.view(entry.shape)
    return found


def plan(path: Path, layout: Layout, settings: Fit = Fit()) -> Plan:  # noqa: B008  (frozen)
    with Checkpoint(path) as checkpoint:
        return checkpoint.plan(layout, settings)


def refusal(path: Path, layout: Layout, settings: Fit = Fit()) -> CheckpointMismatch:  # noqa: B008  (frozen)
    with pytest.raises(CheckpointMismatch) as caught:
        plan(path, layout, settings)
    return caught.value


def lay(**tensors: tuple[str, tuple[int, ...]]) -> Layout:
    return Layout.build({name.replace("__", "."): about for name, about in tensors.items()}, {})


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def state() -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in policies.mlp().state_dict().items()}


def under(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


LAYOUT = layout_of(policies.mlp())
EXTRA = {"optimizer.0.exp_avg": torch.full((1000,), torch.nan), "optimizer.step": torch.tensor(7)}


# Selection and names


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace(".", "._orig_mod."),
        lambda name: name.replace(".", "._checkpoint_wrapped_module."),
        lambda name: name.replace(".", "._fsdp_wrapped_module."),
    ],
    ids=["module", "compiled", "both", "compiled within", "activation checkpoints", "fsdp"],
)
def test_what_wraps_modules_is_seen_through(wrap: Callable[[str], str], tmp_path: Path) -> None:
    """Guards checkpoints of compiled and data parallel trainers, and policies that are built so, on either side."""
    own = state()
    held = {wrap(name): tensor for name, tensor in own.items()}
    assert same(read(save(tmp_path / "a", held), LAYOUT), own)
    layout = Layout.build({wrap(e.name): (e.dtype, e.shape) for e in LAYOUT.tensors}, {})
    assert same(read(save(tmp_path / "b", own), layout), held)


def test_what_is_given_twice_is_not_guessed(tmp_path: Path) -> None:
    """Guards against the other of two tensors whose names differ by a wrapper alone."""
    own = state()
    other = {name: tensor + 1 for name, tensor in own.items()}
    path = save(tmp_path / "a", own | under("module.", other))
    assert {row.name for row in refusal(path, LAYOUT).differences} == set(under("module.", own))
    assert same(read(path, LAYOUT, Fit(strict=False)), own)
    refusal(save(tmp_path / "b", under("module.", own) | under("_orig_mod.", other)), LAYOUT)


def test_a_prefix_is_taken_off_and_what_lacks_it_left(tmp_path: Path) -> None:
    """Guards the usual checkpoint of actor and critic: only the actor's weights reach the policy."""
    own, other = state(), state()
    path = save(tmp_path / "a", under("actor.", own) | under("critic.", other) | EXTRA)
    assert same(read(path, LAYOUT, Fit(prefix="actor.")), own)
    assert same(read(path, LAYOUT, Fit(prefix="critic.")), other)


def test_an_exact_rename_takes_whole_names_only(tmp_path: Path) -> None:
    """Guards that a rename of one name touches no other that only begins so."""
    path = save(tmp_path / "a", {"w": torch.ones(2), "w.w": torch.zeros(2)})
    found = read(path, lay(new=("F32", (2,)), w__w=("F32", (2,))), Fit(rename={"w": "new"}))
    assert same(found, {"new": torch.ones(2), "w.w": torch.zeros(2)})


def test_a_rename_by_expression_has_groups(tmp_path: Path) -> None:
    """Guards renames of many layers at once."""
    own = state()
    path = save(tmp_path / "a", {f"net.layer{name[0]}/{name[2:]}": tensor for name, tensor in own.items()})
    rename = {r"/^layer(\d+)\/(.+)$/": r"\1.\2"}
    assert same(read(path, LAYOUT, Fit(prefix="net.", rename=rename)), own)


def test_renames_follow_one_another(tmp_path: Path) -> None:
    """Guards that renames are applied in the order in which they are written, each to the last one's result."""
    path = save(tmp_path / "a", {"a": torch.ones(2)})
    assert read(path, lay(c=("F32", (2,))), Fit(rename={"a": "b", "b": "c"}))["c"].tolist() == [1.0, 1.0]


def test_include_and_exclude_are_globs_of_the_policys_names(tmp_path: Path) -> None:
    """Guards that globs apply after prefix and rename, with exclude the stronger."""
    tensors = {"net.a.weight": torch.ones(2), "net.b.weight": torch.ones(2), "net.b.bias": torch.ones(2)}
    path = save(tmp_path / "a", tensors)
    settings = Fit(prefix="net.", rename={"b.bias": "c.weight"}, include=("*.weight",), exclude=("a.*",))
    found = read(path, lay(b__weight=("F32", (2,)), c__weight=("F32", (2,))), settings)
    assert found.keys() == {"b.weight", "c.weight"}
    assert Fit(include=("A.*",)).name("a.x") is None  # case counts


def test_two_names_that_lead_to_one_tensor_are_refused(tmp_path: Path) -> None:
    """Guards that of two tensors for one place none is taken by chance, and both are named."""
    path = save(tmp_path / "a", {"w": torch.ones(2), "old": torch.zeros(2)})
    for settings in (Fit(rename={"old": "w"}), Fit(rename={"/^old$/": "w"}, strict=False), Fit(rename={"/.*/": "w"})):
        caught = refusal(path, lay(w=("F32", (2,))), settings)
        assert any({row.name, row.found.split()[0]} == {"w", "old"} for row in caught.differences)


def test_what_is_left_out_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that optimizer state, twice the size of the policy, costs a push neither reads nor refusals."""
    own = state()
    path = save(tmp_path / "a", under("model.", own) | EXTRA)
    got = 0
    preadv, pread = os.preadv, os.pread

    def count(fd: int, buffers: Any, offset: int) -> int:
        nonlocal got
        got += (read := preadv(fd, buffers, offset))
        return read

    for settings in (Fit(prefix="model."), Fit(rename={"/^model./": ""}, exclude=("optimizer.*",)),
                     Fit(rename={"/^model./": ""}, strict=False)):  # fmt: skip
        assert sum(r.nbytes for r in plan(path, LAYOUT, settings).reads) == LAYOUT.nbytes
        got = 0
        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", count)
            patched.setattr(os, "pread", lambda fd, size, at: pread(fd, size, at) if at == 0 else pytest.fail("read"))
            assert same(read(path, LAYOUT, settings), own)
        assert got == LAYOUT.nbytes


# Casts


def samples(dtype: str) -> torch.Tensor:
    """All patterns of 16 bits; of wider dtypes random patterns and the neighbourhood of everything special."""
    random = np.random.default_rng(0)
    if dtype in ("F16", "BF16"):
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(getattr(torch, TORCH_DTYPES[dtype]))
    integer: Any = np.uint32 if dtype == "F32" else np.uint64
    real: Any = np.float32 if dtype == "F32" else np.float64
    wide = random.integers(0, np.iinfo(integer).max, 50_000, dtype=integer)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    brains = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        narrow = np.concatenate([halves, brains, halves * np.float32(1 + 2.0**-11), brains * np.float32(1 + 2.0**-8)])
        near = narrow.astype(real).view(integer)
    every = np.concatenate([wide, near, near + integer(1), near - integer(1)])
    return torch.from_numpy(every.view(real).copy())


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize(("source", "target"), [(s, t) for s in FLOATS for t in FLOATS if s != t])
def test_casts_are_those_of_torch(source: str, target: str, tmp_path: Path) -> None:
    """Guards each pair of dtypes: rounding, overflow and subnormals to the bit, and NaN stays NaN."""
    values = samples(source)
    expected = values.to(getattr(torch, TORCH_DTYPES[target]))
    layout = lay(w=(target, tuple(values.shape)))
    found = read(save(tmp_path / "a", {"w": values}), layout, Fit(cast=True, finite=False))["w"]
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    differ = (bits_of(found) != bits_of(expected)) & ~nan
    assert not differ.any(), (values[differ][:5], found[differ][:5], expected[differ][:5])


@pytest.mark.parametrize(("source", "target"), [("F8_E4M3", "F32"), ("F32", "F8_E5M2"), ("F8_E5M2", "BF16")])
def test_casts_of_eight_bits_are_those_of_torch(source: str, target: str, tmp_path: Path) -> None:
    """Guards the pairs that are left to torch."""
    values = torch.linspace(-8, 8, 33).to(getattr(torch, TORCH_DTYPES[source]))
    expected = values.to(getattr(torch, TORCH_DTYPES[target]))
    found = read(save(tmp_path / "a", {"w": values}), lay(w=(target, (33,))), Fit(cast=True))["w"]
    assert found.dtype == expected.dtype and torch.equal(found.float(), expected.float())


@pytest.mark.parametrize(
    ("value", "source", "target"),
    [(70_000.0, "F32", "F16"), (-1e300, "F64", "F32"), (3.4e38, "F32", "F16"), (1e300, "F64", "BF16"),
     (torch.finfo(torch.float32).max, "F32", "BF16"), (3e38, "BF16", "F16"), (1e30, "F32", "F8_E5M2"),
     (465.0, "F32", "F8_E4M3"), (-1e300, "F64", "F8_E4M3"), (3e4, "F16", "F8_E4M3"),
     (float("inf"), "F32", "F8_E4M3"), (-float("inf"), "F64", "F8_E4M3"), (float("inf"), "F8_E5M2", "F8_E4M3")],
)  # fmt: skip
def test_what_the_policys_dtype_cannot_hold_is_refused(value: float, source: str, target: str, tmp_path: Path) -> None:
    """Guards that an overflow in a cast, or an infinity, never goes live as anything, and that its tensor is named."""
    values = torch.full((3,), value, dtype=getattr(torch, TORCH_DTYPES[source]))
    path = save(tmp_path / "a", {"w": values, "v": torch.zeros(3)})
    layout = lay(w=(target, (3,)), v=("F32", (3,)))
    overflows = math.isfinite(value)
    with pytest.raises(NonFiniteWeights, match="too large for the dtype" if overflows else "NaN or infinity") as caught:
        read(path, layout, Fit(cast=True))
    found = f"beyond it, as {source}" if overflows else "NaN or infinity"
    assert [(row.name, row.found) for row in caught.value.differences] == [("w", found)]
    save(path, {"w": values, "v": torch.tensor([0.0, 0.0, torch.nan])})
    with pytest.raises(NonFiniteWeights, match="holds NaN or infinity in 2 of its tensors"):
        read(path, layout, Fit(cast=True))
    save(path, {"w": torch.full_like(values, torch.nan), "v": torch.zeros(3)})
    with pytest.raises(NonFiniteWeights, match="holds NaN or infinity in 1 of its tensors"):
        read(path, layout, Fit(cast=True))


def test_a_cast_goes_on_across_pieces(tmp_path: Path, in_pieces: Callable[[int], None]) -> None:
    """Guards that tensors larger than one read are converted as a whole, also where their sizes differ."""
    values = {"a": torch.randn(1001, dtype=torch.float64), "b": torch.randn(333).bfloat16(), "c": torch.randn(500)}
    path = save(tmp_path / "a", values)
    in_pieces(64)
    found = read(path, lay(a=("F32", (1001,)), b=("F32", (333,)), c=("F32", (500,))), Fit(cast=True))
    assert same(found, {name: value.float() for name, value in values.items()})


def test_neighbours_are_cast_as_one() -> None:
    """Counts what a cast of many small tensors costs: a piece for those in a row, not one for each."""
    layout = Layout.build({f"{n:04}": ("BF16", (100,)) for n in range(2000)}, {})
    stored = [StoredTensor(e.name, "F32", (100,), 64 + 2 * e.offset, 400) for e in layout.tensors]
    found = list(pieces(zip(stored, layout.tensors, strict=True), 1 << 18))
    assert len(found) == 4 and sum(piece.nbytes for piece in found) == 800_000
    assert [piece.offset for piece in found] == [0, 1 << 17, 2 << 17, 3 << 17]


def test_a_file_that_is_cut_inside_an_element_of_a_cast_has_changed(tmp_path: Path) -> None:
    """Guards against an error of numpy's where a file loses its end between the plan and the cast."""
    path, layout = save(tmp_path / "a", {"w": torch.ones(100)}), lay(w=("BF16", (100,)))
    with Checkpoint(path) as checkpoint:
        todo = checkpoint.plan(layout, Fit(cast=True))
        os.truncate(path, path.stat().st_size - 6)
        with pytest.raises(CheckpointChanged):
            checkpoint.read_into(memoryview(bytearray(layout.nbytes)), todo)


def test_a_cast_scalar_and_an_empty_tensor(tmp_path: Path) -> None:
    """Guards the smallest shapes."""
    path = save(tmp_path / "a", {"s": torch.tensor(1.5), "e": torch.zeros(0, 3)})
    found = read(path, lay(s=("F16", ()), e=("BF16", (0, 3))), Fit(cast=True))
    assert found["s"].item() == 1.5 and found["e"].shape == (0, 3)


@pytest.mark.parametrize(("source", "target"), [(torch.int64, "F32"), (torch.float32, "I64"), (torch.bool, "F32"),
                                                (torch.bool, "I64"), (torch.uint8, "F16")])  # fmt: skip
def test_no_kind_of_number_becomes_another(source: torch.dtype, target: str, tmp_path: Path) -> None:
    """Guards that no integer becomes a float, nor the reverse, and that no setting is promised to do it."""
    path = save(tmp_path / "a", {"w": torch.zeros(3, dtype=source)})
    for settings in (Fit(), Fit(cast=True)):
        assert "cast =" not in refusal(path, lay(w=(target, (3,))), settings).message


def test_floats_are_not_cast_unasked(tmp_path: Path) -> None:
    """Guards that precision is never lost in silence."""
    path = save(tmp_path / "a", {"w": torch.zeros(3, dtype=torch.float64)})
    assert "cast = true" in refusal(path, lay(w=("F32", (3,)))).message


@pytest.mark.parametrize("other", ["equal", "different"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_two_copies_of_a_tied_tensor_are_compared_as_cast(
    other: str, dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    """Guards ties across a cast: copies that are one in the policy's dtype fit, others do not."""
    values = torch.randn(6).bfloat16().float()
    twin = values.clone()
    if other == "different":
        twin[5] += 1.0
    path = save(tmp_path / "a", {"a": values.to(dtypes[0]), "b": twin.to(dtypes[1])})
    layout = Layout.build({"a": ("BF16", (6,))}, {"b": "a"})
    if other == "different":
        with pytest.raises(CheckpointMismatch, match="b and a"):
            read(path, layout, Fit(cast=True))
    else:
        assert torch.equal(read(path, layout, Fit(cast=True))["a"], values.bfloat16())


# A part of the policy


def live(segment: WritableSegment) -> dict[str, torch.Tensor]:
    weights = segment.live_weights()
    assert weights is not None
    return unpack(bytes(weights), segment.layout)


def test_a_part_keeps_the_live_values_of_the_rest(tmp_path: Path, runtime: Path) -> None:
    """Guards partial updates, also in another dtype: what comes is new, and what does not is as it was."""
    layout = lay(a=("F32", (3,)), b=("BF16", (5,)), c=("F32", (2,)))
    first = {"a": torch.randn(3), "b": torch.randn(5).bfloat16(), "c": torch.randn(2)}
    with closing(WritableSegment.create("part", layout)) as segment, segment.publishing():
        with Checkpoint(save(tmp_path / "first", first)) as checkpoint:
            publish(segment, checkpoint)
        for number in range(4):  # through each of the slots
            news = {"b": torch.full((5,), float(number)), "unknown": torch.ones(2)}
            with Checkpoint(save(tmp_path / f"{number}", news)) as checkpoint:
                with pytest.raises(CheckpointMismatch):
                    publish(segment, checkpoint, fit=Fit(cast=True))
                rehearse(layout, checkpoint, segment, fit=Fit(cast=True, strict=False))
                publish(segment, checkpoint, fit=Fit(cast=True, strict=False))
            assert same(live(segment), first | {"b": news["b"].bfloat16()})


def test_a_part_with_nothing_live_is_refused(tmp_path: Path, runtime: Path) -> None:
    """Guards that weights nobody ever wrote do not go live beside those that came."""
    own = state()
    path = save(tmp_path / "a", {"0.weight": own["0.weight"]})
    with (
        closing(WritableSegment.create("part", LAYOUT)) as segment,
        segment.publishing(),
        Checkpoint(path) as checkpoint,
    ):
        with pytest.raises(PartialCheckpoint, match="2.bias"):
            publish(segment, checkpoint, fit=Fit(strict=False))
        with pytest.raises(PartialCheckpoint, match="2.bias"):
            rehearse(LAYOUT, checkpoint, None, fit=Fit(strict=False))
        assert segment.version == 0


def test_a_part_waits_for_a_whole_one(tmp_path: Path, runtime: Path) -> None:
    """Guards that a part which came before anything was live is not refused for ever, and is no complete checkpoint."""
    spec = Spec("policies:mlp", "part", SUPPORT, weights=Fit(strict=False))
    (tmp_path / "runs").mkdir()
    part = save(tmp_path / "runs" / "step_2.safetensors", {"2.bias": torch.ones(2)})
    with closing(WritableSegment.create("part", LAYOUT, spec=spec.fingerprint())), State("part") as state:
        with Syncer(spec, part.parent, state=state) as syncer:
            alone = syncer.once()
            assert (alone.status, alone.exit_code, len(alone.differences)) == ("empty", 66, 3)
            whole = write(part.with_name("step_1.safetensors"), policies.mlp())
            os.utime(whole, (1e9, 1e9))
            first = syncer.once()
            assert (first.step, [each.step for each in first.passed_over]) == (1, [2])
        with Syncer(spec, part.parent, state=state) as again:
            assert [again.once().status, again.once().status] == ["published", "current"]
            assert again.standing.segment and torch.equal(live(again.standing.segment)["2.bias"], torch.ones(2))
        assert [event.kind for event in state.events()] == ["publish", "publish"]


def test_a_whole_one_with_others_beside_fits_without_strict(tmp_path: Path, runtime: Path) -> None:
    """Guards that strict = false also takes the first version, where all of it comes."""
    own = state()
    path = save(tmp_path / "a", own | EXTRA)
    with (
        closing(WritableSegment.create("part", LAYOUT)) as segment,
        segment.publishing(),
        Checkpoint(path) as checkpoint,
    ):
        publish(segment, checkpoint, fit=Fit(strict=False))
        assert same(live(segment), own)


def test_a_file_that_holds_nothing_of_the_policy_is_refused(tmp_path: Path) -> None:
    """Guards that a checkpoint of another policy is not a partial update of nothing."""
    caught = refusal(save(tmp_path / "a", EXTRA), LAYOUT, Fit(strict=False))
    assert len(caught.differences) == 4


def test_a_part_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Guards that strict = false forgives absence and nothing else."""
    own = state()
    own["0.weight"] = torch.zeros(1, 1)
    assert [r.name for r in refusal(save(tmp_path / "a", own), LAYOUT, Fit(strict=False)).differences] == ["0.weight"]


# Advice


def advised(message: str) -> dict[str, Any]:
    """The settings that a message names, as TOML has them."""
    found = re.search(r"fit with the settings? (.+) in \[weights\]\.", message)
    assert found, message
    table = tomllib.loads("\n".join(re.split(r" and (?=\w+ = )", found[1])))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}


def follow(path: Path, layout: Layout, settings: dict[str, Any] | None = None) -> tuple[dict[str, Any], Plan]:
    """Does exactly what the refusal says; the plan comes out only if that makes it fit."""
    advice = advised(refusal(path, layout, Fit(**settings or {})).message)
    return advice, plan(path, layout, Fit(**{**(settings or {}), **advice}))


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_a_wrapped_checkpoint_is_told_its_prefix(prefix: str, tmp_path: Path) -> None:
    """Guards the advice for what DDP, torch.compile, an actor-critic and others put before the names."""
    own = state()
    path = save(tmp_path / "a", under(prefix, own))
    assert follow(path, LAYOUT)[0] == {"prefix": prefix}
    assert same(read(path, LAYOUT, Fit(prefix=prefix)), own)


@pytest.mark.parametrize("prefix", WRAPPERS[:7])
def test_a_wrapped_policy_is_told_the_rename(prefix: str, tmp_path: Path) -> None:
    """Guards the reverse: the policy is the wrapped one, and its trainer saved what is inside."""
    own = state()
    path = save(tmp_path / "a", own)
    layout = Layout.build({prefix + e.name: (e.dtype, e.shape) for e in LAYOUT.tensors}, {})
    advice, _ = follow(path, layout)
    assert same(read(path, layout, Fit(**advice)), under(prefix, own))


def test_an_exclude_of_many_is_advised_whole(tmp_path: Path) -> None:
    """Guards that advice works where a dozen others lie beside the policy."""
    path = save(tmp_path / "a", state() | {f"other{number}.w": torch.ones(1) for number in range(12)})
    follow(path, LAYOUT)


def test_advice_adds_to_an_exclude_that_is_there(tmp_path: Path) -> None:
    """Guards that following the advice to the letter does not lose the globs that were set."""
    path = save(tmp_path / "a", state() | {"critic.w": torch.ones(1), "target.w": torch.ones(1)})
    follow(path, LAYOUT, {"exclude": ("target.*",)})


def test_advice_adds_to_a_rename_that_is_there(tmp_path: Path) -> None:
    """Guards the same for renames."""
    own = state()
    own["last.bias"] = own.pop("2.bias")
    layout = Layout.build({f"net.{e.name}": (e.dtype, e.shape) for e in LAYOUT.tensors}, {})
    follow(save(tmp_path / "a", own), layout, {"rename": {"last.bias": "2.bias"}})


def named(**tensors: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.ones(shape) for name, shape in tensors.items()}


TIED = Layout.build({"embed.weight": ("F32", (3,)), "body.bias": ("F32", (2,))}, {"head.weight": "embed.weight"})
DEEP = lay(net__0__weight=("F32", (3,)), net__0__bias=("F32", (2,)))
COMBINATIONS: dict[str, tuple[Tensors, Layout, dict[str, Any], dict[str, Any]]] = {
    "another precision": ({n: t.bfloat16() for n, t in state().items()}, LAYOUT, {}, {"cast": True}),
    "a wrapper, and others beside it": (under("actor.", state()) | named(critic__w=(1,)) | EXTRA, LAYOUT, {},
                                        {"prefix": "actor."}),
    "others beside it": (state() | named(critic__w=(1,)), LAYOUT, {}, {"exclude": ("critic.*",)}),
    "a prefix where a cast is set": (under("actor.", state()), LAYOUT, {"cast": True}, {"prefix": "actor."}),
    "a prefix that nothing has": (state(), LAYOUT, {"prefix": "actor."}, {"prefix": ""}),
    "a prefix and others below it": (
        under("model.", state() | named(value_head__w=(1,))) | EXTRA,
        LAYOUT,
        {},
        {"prefix": "model.", "exclude": ("value_head.*",)},
    ),
    "others below a prefix that is set, and a cast": (
        under("actor.", {n: t.half() for n, t in state().items()} | named(value__w=(1,))),
        LAYOUT,
        {"prefix": "actor."},
        {"exclude": ("value.*",), "cast": True},
    ),
    "others amid the policy's": (
        named(net__0__weight=(3,), net__0__bias=(2,), net__0__scale=(1,), net__aux__w=(1,), net=(1,)),
        DEEP,
        {},
        {"exclude": ("net", "net.0.scale", "net.aux.*")},
    ),
    "others whose names are like globs": (state() | {"a[0].w": torch.ones(1), "b*": torch.ones(1)}, LAYOUT, {},
                                          {"exclude": ("a[[]0].*", "b[*]")}),
    "many others": (state() | {f"o{n}.w": torch.ones(1) for n in range(99)}, LAYOUT, {}, {"include": ("0.*", "2.*")}),
    "wrappers within and before": (
        {f"actor.{name.replace('.', '._orig_mod.')}": tensor.double() for name, tensor in state().items()} | EXTRA,
        LAYOUT,
        {},
        {"prefix": "actor.", "cast": True},
    ),
    "one wrapper for another": (
        under("model.", named(weight=(3,), bias=(2,))),
        DEEP,
        {},
        {"prefix": "model.", "rename": {"/^/": "net.0."}},
    ),
    "a rename that is set and a prefix": (
        {f"model.layer{name}": tensor for name, tensor in state().items()},
        LAYOUT,
        {"rename": {"/^layer/": ""}},
        {"prefix": "model."},
    ),
    "a tie under its other name": (named(m__head__weight=(3,), m__body__bias=(2,)), TIED, {}, {"prefix": "m."}),
    "a part, cast": ({"0.weight": state()["0.weight"].half()}, LAYOUT, {"strict": False}, {"cast": True}),
}  # fmt: skip


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_advice_is_true_in_combinations(kind: str, tmp_path: Path) -> None:
    """Guards that what is advised makes it fit where several settings are needed at once, and is the one expected."""
    tensors, layout, settings, expected = COMBINATIONS[kind]
    assert follow(save(tmp_path / "a", tensors), layout, settings)[0] == expected


@at_most(max_examples=150, deadline=None)
@given(data=st.data())
def test_advice_is_true_whatever_was_done_to_the_names(data: st.DataObject) -> None:
    """Guards that no setting is ever promised that does not make it fit, and that single changes are always found."""
    words = st.sampled_from(["actor.", "module.", "model.", "x.", "0.", "a.b.", "critic.", "_orig_mod."])
    layout = layout_of(policies.mlp())
    if data.draw(st.booleans()):
        wrapper = data.draw(words)
        layout = Layout.build({wrapper + e.name: (e.dtype, e.shape) for e in layout.tensors}, {})
    held = {e.name: (e.dtype, e.shape) for e in layout.tensors}
    done = data.draw(
        st.lists(st.sampled_from(["prefix", "strip", "inner", "extra", "half", "lose", "twice"]), max_size=4)
    )
    for what in done:
        if what == "prefix":
            word = data.draw(words)
            held = {word + name: about for name, about in held.items()}
        elif what == "strip":
            held = {name.partition(".")[2] or name: about for name, about in held.items()}
        elif what == "inner":
            held = {name.replace(".", "._orig_mod."): about for name, about in held.items()}
        elif what == "extra":
            held |= {data.draw(words) + name: ("F32", (1,)) for name in ("w", "0.bias")}
        elif what == "half":
            held = {name: ("F16", shape) for name, (_, shape) in held.items()}
        elif what == "lose":
            held = dict(list(held.items())[1:])
        else:
            held |= {data.draw(words) + name: about for name, about in held.items()}
    stored = {name: StoredTensor(name, dtype, shape, 0, 0) for name, (dtype, shape) in held.items()}
    given: dict[str, Any] = {
        "prefix": data.draw(st.sampled_from(["", "", "actor.", "module."])),
        "rename": data.draw(st.sampled_from([{}, {}, {"/^a\\./": "b."}, {"/^actor\\./": ""}])),
        "exclude": data.draw(st.sampled_from([(), (), ("critic.*",)])),
        "strict": data.draw(st.sampled_from([True, True, False])),
    }
    try:
        plan_of(stored, layout, Fit(**given), Path("a"))
    except CheckpointMismatch as exc:
        if "fit with" in exc.message:
            plan_of(stored, layout, Fit(**{**given, **advised(exc.message)}), Path("a"))
        else:
            alone = done in (["prefix"], ["half"], ["inner"])
            assert not alone or not given["strict"] or any(given[name] for name in ("prefix", "rename", "exclude"))


def test_a_part_is_told_what_strict_would_do(tmp_path: Path) -> None:
    """Guards that partial updates are named where they are possible, and only there."""
    own = state()
    del own["2.bias"]
    path = save(tmp_path / "a", own)
    assert "strict = false (--no-strict) takes 3 of 4" in refusal(path, LAYOUT).message
    assert "strict" not in refusal(path, LAYOUT, Fit(partial=False)).message
    with pytest.raises(PartialCheckpoint, match="1 of 4 tensors are missing, and nothing is live"):
        plan(path, LAYOUT, Fit(strict=False, partial=False))
    own["0.weight"] = torch.ones(1)
    assert "strict" not in refusal(save(path, own), LAYOUT).message
    refusal(path, LAYOUT, Fit(strict=False, partial=False))  # what comes does not fit, whatever is live


@pytest.mark.slow
def test_a_hostile_header_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a megabyte of names, each of which could be the policy's under another prefix."""
    names = [f"{number:x}.{LAYOUT.tensors[0].name}" for number in range(20_000)]
    stored = {name: StoredTensor(name, "F32", (0,), 0, 0) for name in names}
    trials: list[Fit] = []
    real = vars(advice)["match"]

    def count(tensors: Mapping[str, StoredTensor], layout: Layout, settings: Fit) -> Any:
        trials.append(settings)
        return real(tensors, layout, settings)

    monkeypatch.setattr(advice, "match", count)
    for settings in (Fit(), Fit(rename={"a": "b"}), Fit(prefix="x")):
        with pytest.raises(CheckpointMismatch):
            plan_of(stored, LAYOUT, settings, Path("a"))
    assert len(trials) < 100
    trials.clear()
    stored = {f"{number:x}.w": StoredTensor(f"{number:x}.w", "F32", (number,), 0, 0) for number in range(20_000)}
    with pytest.raises(CheckpointMismatch, match="fit with"):
        plan_of(stored, lay(w=("F32", (3,))), Fit(), Path("a"))
    assert len(trials) < 100
    counts = []
    for most in (0, len(stored) * 100):
        trials.clear()
        advice.advice(stored, LAYOUT, Fit(rename={"a": "b"}), most)
        counts.append(len(trials))
    assert counts[0] < counts[1]


def test_advice_counts_others_under_the_prefix(tmp_path: Path) -> None:
    """Guards that a prefix is not promised to do where a value head lies under it as well."""
    own = state() | {"value.w": torch.ones(1)}
    caught = refusal(save(tmp_path / "a", under("module.", own)), LAYOUT)
    if "fit with" in caught.message:
        plan(tmp_path / "a", LAYOUT, Fit(**advised(caught.message)))


@pytest.mark.parametrize("settings", [{"prefix": "actor."}, {"include": ("*",)}, {"exclude": ("x",)}])
def test_advice_names_a_setting_or_says_that_there_is_none(settings: dict[str, Any], tmp_path: Path) -> None:
    """Guards against "all tensors fit with the settings" that are set already, in a refusal."""
    prefix = settings.get("prefix", "")
    path = save(tmp_path / "a", under(prefix, state() | {"value.w": torch.ones(1)}))
    caught = refusal(path, LAYOUT, Fit(**settings))
    if "fit with" in caught.message:
        plan(path, LAYOUT, Fit(**{**settings, **advised(caught.message)}))


@pytest.mark.parametrize("prefix", ['a"b.', "a\\b.", "a'b.", "a\nb."])
def test_advice_is_toml_whatever_the_names(prefix: str, tmp_path: Path) -> None:
    """Guards that a name from a checkpoint is quoted as TOML quotes it."""
    assert follow(save(tmp_path / "a", under(prefix, state())), LAYOUT)[0] == {"prefix": prefix}


@pytest.mark.parametrize("kind", ["shape", "missing", "foreign", "integers"])
def test_nothing_is_advised_that_would_not_help(kind: str, tmp_path: Path) -> None:
    """Guards that no setting is promised for a checkpoint that does not fit under any."""
    own = state()
    if kind == "shape":
        own["0.weight"] = torch.ones(4, 8)
    elif kind == "missing":
        del own["2.bias"]
    elif kind == "foreign":
        own = {"x": torch.ones(2)}
    else:
        own["2.bias"] = torch.ones(2, dtype=torch.int64)
    for prefix in ("", "module."):
        message = refusal(save(tmp_path / f"{prefix}a", under(prefix, own)), LAYOUT).message
        assert "fit with" not in message and "stays refused" in message


def test_a_message_about_many_tensors_stays_short(tmp_path: Path) -> None:
    """Guards that thousands of differences do not fill a screen."""
    caught = refusal(save(tmp_path / "a", {f"t{number}.w": torch.ones(1) for number in range(3000)}), LAYOUT)
    assert len(str(caught).splitlines()) < 30 and len(caught.message) < 1000


# TOML


def test_the_tables_reach_the_pass(tmp_path: Path, runtime: Path, layouts_here: None) -> None:
    """Guards the whole way of [select] and [weights], from the file to the published bytes."""
    own = {name: tensor.double() for name, tensor in state().items()}
    last = own.pop("2.bias")
    stored = under("actor.", {**own, "last/bias": last, "hidden.w": torch.ones(2)}) | EXTRA
    runs = tmp_path / "runs"
    runs.mkdir()
    for name, mtime in (("keep_2.safetensors", 10), ("keep_1.safetensors", 20), ("keep_3.safetensors", 30),
                        ("drop_9.safetensors", 40)):  # fmt: skip
        save(runs / name, stored)
        os.utime(runs / name, (mtime, mtime))
    for name in ("keep_1", "keep_2", "drop_9"):
        (runs / f"{name}.DONE").touch()
    spec = tmp_path / "cartpole.toml"
    spec.write_text(
        """
        policy = "policies:mlp"
        checkpoints = "runs"
        [select]
        pattern = "keep_*"
        order = "step"
        marker = "DONE"
        settle = 0
        [weights]
        prefix = "actor."
        rename = { '/^last.(\\w+)$/' = '2.\\1' }
        include = ["[02].*", "hidden.*"]
        exclude = ["hidden.*"]
        cast = true
        """
    )
    with Syncer(load_spec(str(spec))) as syncer:
        outcome = syncer.once()
        assert (outcome.status, outcome.step) == ("published", 2)
        assert outcome.checkpoint == str(runs / "keep_2.safetensors")
        assert syncer.standing.segment is not None
        expected = {name: tensor.float() for name, tensor in {**own, "2.bias": last}.items()}
        assert same(live(syncer.standing.segment), expected)
        assert syncer.once().status == "current"


def test_finite_and_strict_of_the_toml_reach_the_pass(tmp_path: Path, runtime: Path, layouts_here: None) -> None:
    """Guards the two settings that loosen a check: both are only off where the spec says so."""
    policy = policies.mlp()
    write(tmp_path / "runs" / "step_1.safetensors", policy, float("nan"))
    spec = tmp_path / "a.toml"
    base = 'policy = "policies:mlp"\ncheckpoints = "runs"\n'
    WritableSegment.create("a", LAYOUT).close()
    for text, status in (("", "rejected"), ("[weights]\nfinite = false", "published")):
        spec.write_text(base + text)
        with Syncer(load_spec(str(spec))) as syncer:
            assert syncer.once().status == status
    save(tmp_path / "runs" / "step_2.safetensors", {"2.bias": torch.ones(2)})
    for text, status in (("", "rejected"), ("[weights]\nfinite = false\nstrict = false", "published")):
        spec.write_text(base + text)
        with Syncer(load_spec(str(spec))) as syncer:
            assert syncer.once().status == status


@pytest.mark.parametrize(
    "text",
    [
        "[select]\norder = 'size'",
        "[select]\nsettle = -1",
        "[select]\nsettle = 1e9",
        "[select]\nsettle = nan",
        "[select]\nsettle = true",
        "[select]\nmarker = 'a/b'",
        "[select]\nmarker = '..'",
        "[select]\npattern = 3",
        "[select]\npatern = '*'",
        "select = 3",
        "[weights]\ncast = 'yes'",
        "[weights]\nstrict = 1",
        "[weights]\nprefix = []",
        "[weights]\ninclude = '*'",
        "[weights]\nexclude = [1]",
        "[weights]\nrename = ['a']",
        "[weights]\nrename = { a = 1 }",
        "[weights]\nrename = { '/(/' = 'x' }",
        pytest.param("[weights]\nrename = { '/(a)/' = '\\2' }"),
        pytest.param("[weights]\nrename = { '/(a)/' = '\\g<x' }"),
        "[weights]\npartial = false",
        '[weights]\nbase = "a\\u0000b"',
        'checkpoints = "a\\u0000b"',
        "weights = []",
    ],
)
def test_wrong_values_are_told_before_anything_is_done(text: str, tmp_path: Path) -> None:
    """Guards that a wrong setting ends with exit code 2, and does not wait for a checkpoint to show."""
    spec = tmp_path / "a.toml"
    spec.write_text(f'policy = "policies:mlp"\n{text}\n' if "[" in text[:1] else f'{text}\npolicy = "policies:mlp"\n')
    with pytest.raises(UsageError) as caught:
        load_spec(str(spec))
    assert caught.value.exit_code == 2 and not isinstance(caught.value.__cause__, AssertionError)
