"""State that no version changes: refused by name, or told once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from builders import write
from others import run_cli
from policies import mlp
from torch import nn

import wsync
from wsync.errors import SpecError, UsageError
from wsync.layout.module import check_extra_state


class Extra(nn.Linear):
    """Keeps a number beside its weights."""

    kept: Any = 3

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


def extra() -> nn.Module:
    return nn.Sequential(Extra(2, 2)).eval()


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of all that torch.ao makes, in newer torch
        made: nn.Module = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
            nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)).eval(), {nn.Linear}
        )
    return made


@pytest.mark.parametrize(
    ("make", "name"), [(extra, r"0\._extra_state \(int\)"), (quantised, r"1\._packed_params\._packed_params \(tuple\)")]
)
def test_state_that_no_version_changes_is_refused_by_name(
    make: Callable[[], nn.Module], name: str, runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards a policy of which a part would stay old without a word, in attach and in a push."""
    with pytest.raises(SpecError, match=name):
        wsync.attach(make(), "nets", timeout=0)
    with pytest.raises(SpecError, match=name):
        wsync.SharedMemoryWeightUpdater("nets").push_weights(make())
    assert list(runtime.iterdir()) == []
    trained = make()
    updater = wsync.SharedMemoryWeightUpdater("nets", extra_state="ignore")
    with caplog.at_level(logging.WARNING, "wsync"):
        updater.push_weights(trained)
        updater.push_weights(trained)
    assert len(caplog.messages) == 1
    with wsync.attach(make(), "nets", extra_state="ignore") as reader:
        assert reader.version == 2
    assert len(caplog.messages) == 2
    updater.close()


@pytest.mark.slow
def test_a_spec_says_that_it_may_stay_as_it_is(
    runtime: Path, tmp_path: Path, layouts_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards ``weights.extra_state``: a push refuses such a policy by name, or publishes."""
    monkeypatch.chdir(tmp_path)
    Path("kept.py").write_text(
        "from torch import nn\n\nclass Kept(nn.Linear):\n    def __init__(self):\n        super().__init__(2, 2)\n\n"
        "    def get_extra_state(self):\n        return 3\n\n    def set_extra_state(self, state):\n        pass\n"
    )
    write(Path("step_1.safetensors"), nn.Linear(2, 2))
    push = ("push", "kept:Kept", "step_1.safetensors", "--name", "kept")
    code, _, told = run_cli(*push)
    assert code == 2 and "_extra_state (int)" in told and list(runtime.iterdir()) == []
    code, _, told = run_cli(*push, "--extra-state", "ignor")
    assert code == 2 and "weights.extra_state = 'ignor'" in told
    code, out, told = run_cli(*push, "--extra-state", "ignore")
    assert code == 0 and "version 1" in out and told.count("_extra_state (int)") <= 1


@pytest.mark.parametrize("nothing", [None, torch.empty(0)])
def test_extra_state_that_is_empty_is_none(nothing: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards modules that have the methods and nothing to keep."""
    monkeypatch.setattr(Extra, "kept", nothing)
    check_extra_state(extra(), "refuse")


def test_another_word_is_refused() -> None:
    """Guards against a typing error that would ignore."""
    with pytest.raises(SpecError, match="neither"):
        check_extra_state(mlp(), "ignored")


def test_weights_folded_into_code_are_refused(runtime: Path) -> None:
    """Guards against code that was compiled with freezing, which acts on the weights that it was compiled with."""
    config = pytest.importorskip("torch._inductor.config")
    with config.patch(freezing=True), pytest.raises(SpecError, match="freezing"):
        wsync.attach(torch.compile(mlp(), backend="eager"), "nets", timeout=0)  # type: ignore[arg-type]
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize("mode", ["swap", "copy"])
@pytest.mark.parametrize("made", ["before", "after"])
def test_a_program_exported_in_this_process_follows(runtime: Path, mode: Literal["swap", "copy"], made: str) -> None:
    """Guards programs of ``torch.export``: they hold the policy's own tensors, and see each version."""
    policy, observation = mlp().eval(), torch.ones(1, 4)
    updater = wsync.SharedMemoryWeightUpdater("nets", policy=mlp())
    updater.push_weights(mlp())
    exported = torch.export.export(policy, (observation,)).module() if made == "before" else None
    with wsync.attach(policy, "nets", mode=mode, timeout=5) as reader:
        exported = exported or torch.export.export(policy, (observation,)).module()
        new = mlp()
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.fill_(0.5)
        updater.push_weights(new)
        assert reader.refresh()
        assert torch.equal(exported(observation), new(observation))


@pytest.mark.parametrize("mode", ["swap", "copy"])
def test_adapters_that_peft_merged_are_refused(mode: Literal["swap", "copy"], runtime: Path) -> None:
    """Guards a flag that no tensor shows: a version would replace the merged weights, and adapters would not act."""
    peft: Any = pytest.importorskip("peft")

    def lora() -> Any:
        return peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["0", "2"])).eval()

    trained, policy, merged = lora(), lora(), lora()
    merged.merge_adapter()
    with closing(wsync.SharedMemoryWeightUpdater("nets", policy=trained)) as updater:
        updater.push_weights(trained)
        with pytest.raises(UsageError, match="adapters are merged into the weights.*unmerge_adapter"):
            wsync.attach(merged, "nets", mode=mode)
        with wsync.attach(policy, "nets", mode=mode) as reader:
            trained.merge_adapter()
            with pytest.raises(UsageError, match="adapters are merged"):
                updater.push_weights(trained)
            trained.unmerge_adapter()
            policy.merge_adapter()
            updater.push_weights(trained)
            with pytest.raises(UsageError, match="adapters are merged"):
                reader.refresh()
            policy.unmerge_adapter()
            given = torch.ones(1, 4)
            assert reader.refresh() and torch.equal(policy(given), trained(given))


def test_an_expanded_tensor_is_refused_by_a_push(tmp_path: Path, runtime: Path, layouts_here: None) -> None:
    """Guards a policy that no reader could attach: the push says so, and not each reader."""
    (tmp_path / "odd.py").write_text(
        "import torch\n\ndef policy():\n    net = torch.nn.Linear(2, 2)\n"
        "    net.register_buffer('scale', torch.ones(1).expand(3))\n    return net\n"
    )
    (tmp_path / "odd.toml").write_text('policy = "odd:policy"\n')
    net = nn.Linear(2, 2)
    net.register_buffer("scale", torch.ones(3))
    file = write(tmp_path / "step_1.safetensors", net)
    code, _, told = run_cli("push", str(tmp_path / "odd.toml"), str(file))
    assert code == 2 and "scale is an expanded tensor" in told, told
