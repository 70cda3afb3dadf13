"""What tests build: checkpoints that carry a mark, and how the mark is read back."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from wsync.segment.segment import Segment

SUPPORT = Path(__file__).parent  # where the specs of the tests find ``policies``
TESTS = SUPPORT.parent
ROOT = TESTS.parent
SPEC, NAME = "policies:mlp", "policies.mlp"


def write(path: Path, policy: torch.nn.Module, mark: float | None = None, step: int | None = None) -> Path:
    """Writes a policy's checkpoint as a careful trainer does (whole, then renamed), every weight set to ``mark``."""
    state = {name: tensor.detach().clone() for name, tensor in policy.state_dict().items()}
    if mark is not None:
        state = {name: torch.full_like(tensor, mark) for name, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(state, temporary, metadata=None if step is None else {"step": str(step)})
    temporary.rename(path)
    return path


def raw(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """Writes a safetensors file as given, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def shards(folder: Path, policy: torch.nn.Module, mark: float = 1.0) -> Path:
    """A checkpoint in two shards with an index."""
    state = {name: torch.full_like(tensor, mark) for name, tensor in policy.state_dict().items()}
    folder.mkdir(parents=True)
    halves = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    table = {name: halves[at % 2] for at, name in enumerate(state)}
    for half in halves:
        save_file({name: tensor for name, tensor in state.items() if table[name] == half}, folder / half)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def marks(policy: torch.nn.Module) -> set[float]:
    """The distinct values among a policy's weights: exactly one where a version is whole."""
    return {float(value) for tensor in policy.state_dict().values() for value in tensor.flatten().unique()}


def mark_of(segment: Segment) -> set[float]:
    """The distinct values among the live weights of a segment."""
    slot = segment.word & 0xFF
    return {float(x) for t in load_file(segment.path / f"slot-{slot}.safetensors").values() for x in t.flatten()}


def report(result: CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON object on stdout."""
    assert result.stdout.count("\n") == 1, result.stdout + result.stderr
    data: dict[str, Any] = json.loads(result.stdout)
    return data
