"""Readers that are no torch modules: numpy views of a leased version, JAX, ONNX Runtime, and a program in C."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import ROOT
from policies import Tied, mlp
from processes import DEADLINE, Lines, Spawn
from safetensors import safe_open

import wsync
from wsync.layout.layout import TORCH_DTYPES, layout_of
from wsync.segment.segment import Segment
from wsync.segment.writable import WritableSegment, remove

READERS = ROOT / "examples" / "readers"

FOLLOW = """
import sys, wsync
for held in wsync.follow("policy"):
    print(held.version, held.step, *sorted({float(array.flat[0]) for array in held.values()}), flush=True)
    assert "torch" not in sys.modules
"""


def publish(mark: float, step: int | None = None, policy: Any = None, name: str = "policy") -> Any:
    policy = mlp() if policy is None else policy
    with torch.no_grad():
        for tensor in policy.state_dict().values():
            tensor.fill_(mark)
    with wsync.publisher(name, policy) as publisher:
        publisher.push(step)
    return policy


def test_a_leased_version_is_arrays_and_a_file(runtime: Path) -> None:
    """Version, step, every name of a tied tensor, bfloat16, a scalar; read-only, and the slot is a safetensors file."""
    policy = publish(2.0, 7, Tied())
    with wsync.lease("policy") as held:
        assert (held.version, held.step, len(held)) == (1, 7, len(policy.state_dict()))
        for name, tensor in policy.state_dict().items():
            assert held[name].shape == tuple(tensor.shape) and (held[name] == 2).all()
        assert held["low"].dtype.name == "bfloat16" and held["norm.num_batches_tracked"].dtype == np.int64
        assert not held["low"].flags.writeable
        with safe_open(held.path, "numpy") as file:
            assert (file.get_tensor("norm.weight") == held["norm.weight"]).all()
        with pytest.raises(KeyError):
            held["absent"]
        (reader,) = Segment.open("policy").readers()
        assert (reader.version, len(reader.slots)) == (1, 1)
    with pytest.raises(wsync.UsageError, match="inside the block"):
        held["low"]
    assert not Segment.open("policy").readers()


def test_every_dtype_is_an_array(runtime: Path) -> None:
    """Each dtype that a segment can hold has the values that torch has for it."""
    raw = torch.tensor([0, 1], dtype=torch.uint8).repeat(24)
    policy = torch.nn.ParameterDict(
        {name: torch.nn.Parameter(raw.view(getattr(torch, dtype)), False) for name, dtype in TORCH_DTYPES.items()}
    )
    with wsync.publisher("policy", policy) as publisher:
        publisher.push()
    with wsync.lease("policy") as held:
        for name, tensor in policy.named_parameters():
            assert held[name].tobytes() == tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
            assert held[name].itemsize == tensor.itemsize


def test_a_kept_array_never_changes(runtime: Path) -> None:
    """What outlives its block keeps its slot from being written; when it is gone, the slot is free again."""
    publish(1.0)
    with wsync.lease("policy") as held:
        kept = held["0.weight"]
    for mark in range(2, 8):
        publish(float(mark))
    assert (kept == 1).all() and [r.version for r in Segment.open("policy").readers()] == [1]
    del kept
    assert not Segment.open("policy").readers()


def test_a_segment_without_a_version_is_told_of(runtime: Path) -> None:
    """A missing segment and one that is empty each say what to do."""
    with pytest.raises(wsync.SegmentError, match="no segment"), wsync.lease("policy"):
        pass
    WritableSegment.create("policy", layout_of(mlp())).close()
    with pytest.raises(wsync.AttachTimeout, match="has no version"), wsync.lease("policy", timeout=0.01):
        pass


def test_a_process_without_torch_follows(runtime: Path, spawn: Spawn) -> None:
    """Each newest version, also when the segment was removed and made again; killed, it leaves no lease behind."""
    publish(1.0, 10)
    process = spawn("-c", FOLLOW)
    lines = Lines(process)
    assert lines.next() == "1 10 1.0"
    publish(2.0, 20)
    assert lines.next() == "2 20 2.0"
    remove("policy")
    publish(3.0)
    assert lines.next() == "1 None 3.0"
    process.kill()
    process.wait(DEADLINE)
    assert not Segment.open("policy").readers()


def test_followed_versions_are_given_back(runtime: Path) -> None:
    """A version that a follower still has in hand is let go when it asks for the next, and when it stops."""
    publish(1.0)
    with closing(wsync.follow("policy")) as versions:
        first = next(versions)
        publish(2.0)
        second = next(versions)
        assert second.version == 2 and [r.version for r in Segment.open("policy").readers()] == [2]
        with pytest.raises(wsync.UsageError):
            first["0.weight"]
    assert (second.version, Segment.open("policy").readers()) == (2, [])


def test_the_pages_snippets_run(runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines of the examples' page, as they stand; the endless one for one version."""
    publish(1.0, 5, name="cartpole")
    one, endless = re.findall(r"^```python\n((?s:.*?))^```$", (READERS / "README.md").read_text(), re.MULTILINE)
    exec(one, {})
    exec(endless + "    break\n", {})
    assert capsys.readouterr().out.splitlines()[0].startswith("1 5 ")


def test_jax_takes_a_version(runtime: Path) -> None:
    """The page's line for JAX: arrays on its device with the weights' values, bfloat16 among them."""
    jnp = pytest.importorskip("jax.numpy")
    publish(3.0, policy=Tied())
    with wsync.lease("policy") as held:
        arrays = {name: jnp.array(array) for name, array in held.items()}
    publish(4.0, policy=Tied())
    assert arrays["low"].dtype == jnp.bfloat16 and all((array == 3).all() for array in arrays.values())


def test_onnx_runtime_takes_a_version(runtime: Path) -> None:
    """A model whose weights are inputs acts with those of the lease."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    shapes = {"x": [1, 4], "weight": [2, 4], "bias": [2]}
    graph = helper.make_graph(
        [helper.make_node("Gemm", list(shapes), ["y"], transB=1)],
        "linear",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("y", kind, [1, 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    publish(3.0, policy=torch.nn.Linear(4, 2))
    with wsync.lease("policy") as held:
        (action,) = session.run(None, {"x": np.ones((1, 4), np.float32), **held})
    assert action.tolist() == [[15.0, 15.0]]


def test_a_program_in_c_maps_a_slot(runtime: Path, tmp_path: Path) -> None:
    """The example compiles without a warning, and reads version, weights and header; it says where there is none."""
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    program = tmp_path / "reader"
    subprocess.run([compiler, "-Wall", "-Wextra", "-Werror", "-O2", "-o", program, READERS / "reader.c"], check=True)
    publish(2.0)
    done = subprocess.run([program, runtime / "policy"], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    figures, header = done.stdout.split("\n", 1)
    with wsync.lease("policy") as held:
        weights = b"".join(array.tobytes() for array in held.values())
        assert [*map(int, figures.split())] == [1, len(weights), sum(weights)]
        assert set(json.loads(header)) - {"__metadata__"} == set(held)
    assert subprocess.run([program, runtime], capture_output=True, timeout=DEADLINE).returncode == 1


def test_leasing_imports_no_torch(runtime: Path) -> None:
    """A reader that is no torch module must not pay for one."""
    publish(1.0)
    code = "import sys, wsync\nwith wsync.lease('policy') as held: held['0.weight']\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE)
