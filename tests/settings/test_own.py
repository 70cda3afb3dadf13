"""Tensors that a spec leaves to each process: neither its checkpoints nor its segment have them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from others import run_main
from policies import Tied, mlp
from safetensors.torch import save_file
from torch import nn

import wsync
from wsync.errors import LayoutDiffers, UsageError
from wsync.fitting.fit import Fit
from wsync.hooks import gate
from wsync.layout.layout import layout_of
from wsync.layout.module import followed
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec
from wsync.settings.user_code import read_layout

POLICY = """
import torch
from torch import nn

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.register_buffer("eps", torch.zeros(2))
        self.eval()
"""
TOML = """
policy = "noisy_policy:Noisy"
name = "noisy"
checkpoints = "runs"
[weights]
own = ["*eps"]
[hooks]
gate = "noisy_policy:accept"
"""
namespace: dict[str, type[nn.Module]] = {}
exec(POLICY, namespace)
Noisy = namespace["Noisy"]


@pytest.fixture
def spec(runs: Path) -> str:
    Path("noisy_policy.py").write_text(POLICY + "def accept(policy):\n    return policy.eps.eq(0).all()\n")
    Path("noisy.toml").write_text(TOML)
    return "noisy.toml"


def save(directory: Path, mark: float, *more: str) -> None:
    state = {"net.weight": torch.full((2, 2), mark), "net.bias": torch.full((2,), mark)}
    save_file({**state, **{name: torch.ones(2) for name in more}}, directory / f"step_{mark:.0f}.safetensors")


@pytest.mark.slow
def test_what_is_its_own_is_in_no_checkpoint_and_no_segment(spec: str, runs: Path) -> None:
    """A push with a gate, a reader with the same globs; a checkpoint may still have the tensors, also as DDP saves."""
    save(runs, 1.0)
    code, _, err = run_main("push", spec)
    assert code == 0, err
    with closing(Segment.open("noisy")) as segment:
        assert {entry.name for entry in segment.layout.tensors} == {"net.weight", "net.bias"}
    policy = Noisy()
    policy.get_buffer("eps").fill_(7)
    with pytest.raises(LayoutDiffers, match=r'attach it with exclude=\["eps"\]\. Else'):
        wsync.attach(policy, "noisy", timeout=0)
    with wsync.attach(policy, "noisy", exclude=["eps"], timeout=0) as reader:
        for mark, name in ((2.0, "eps"), (3.0, "module.eps")):
            save(runs, mark, name)
            code, _, err = run_main("push", spec)
            assert code == 0, err
            assert reader.refresh() and policy.get_parameter("net.bias").tolist() == [mark, mark]
        assert policy.get_buffer("eps").tolist() == [7, 7]


def test_a_segment_that_has_them_is_told_from_the_spec(spec: str, runs: Path) -> None:
    """A reader that attached without ``exclude`` made the segment: the push says what its readers should do."""
    WritableSegment.create("noisy", layout_of(Noisy())).close()
    save(runs, 1.0)
    code, _, err = run_main("push", spec)
    assert code != 0 and "wsync rm noisy" in err and 'exclude=["*eps"]' in err


def test_the_fingerprint_covers_them(spec: str) -> None:
    """A segment that was made before the setting is compared again; a spec without it keeps its fingerprint."""
    with_own = load_spec(spec)
    Path(spec).write_text(Path(spec).read_text().replace('own = ["*eps"]', ""))
    assert load_spec(spec).fingerprint() != with_own.fingerprint()
    assert {entry.name for entry in read_layout(with_own).tensors} == {"net.weight", "net.bias"}


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (["*.epz"], "weights.own: '.*epz' matches no"),
        (["head.*"], r"weights.own names head\.weight, which is tied to .*Name both"),
        (["*"], "names every tensor"),
    ],
)
def test_globs_that_cannot_be_meant_are_refused(own: list[str], told: str) -> None:
    """Guards against a typing error, a tie of which one half is left out, and a segment of nothing."""
    with pytest.raises(UsageError, match=told):
        followed(Tied(), own, "weights.own")


def test_a_tie_by_shared_memory_is_seen() -> None:
    """A view that is another object than the tensor that it is tied to."""
    policy = mlp()
    policy.register_buffer("alias", policy.get_parameter("2.bias").detach().view(2))
    with pytest.raises(UsageError, match=r"alias, which is tied to 2\.bias"):
        followed(policy, ["alias"], "exclude")
    assert "alias" not in dict(followed(policy, ["alias", "2.bias"], "exclude"))


def test_wrapped_names_are_matched_as_the_policy_has_them() -> None:
    """Guards checkpoints whose names have what wraps modules."""
    fit = Fit(own=("net.eps",))
    assert fit.name("net._orig_mod.eps") is None and fit.name("net.eps") is None
    assert fit.name("net.weight") == "net.weight"


def test_a_gate_looks_at_a_policy_with_its_own(tmp_path: Path) -> None:
    """The policy that is built for a gate keeps what it was built with."""
    save(tmp_path, 4.0)
    policy = Noisy()
    gate.load(policy, tmp_path / "step_4.safetensors", ["*eps"])
    assert policy.get_buffer("eps").eq(0).all() and policy.get_parameter("net.bias").eq(4).all()
