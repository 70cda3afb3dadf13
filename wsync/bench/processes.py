"""The policy that is measured, and what runs in processes that end with the measurement, also when that is killed.

``python -m wsync.bench.processes SOURCE BYTES TENSORS`` is weighed before and after it has the weights of SOURCE.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file
from torch import nn

from ..policy.attaching import attach

COMMAND = """
import ctypes, signal
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
from wsync.cli.commands import main
main()
"""
"""A script that is ``wsync``, and ends when its parent does."""

BY_HAND = """
import os, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
checkpoints, shared = map(Path, sys.argv[1:])
newest = max(checkpoints.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
save_file(load_file(newest), shared / "weights.new")
os.replace(shared / "weights.new", shared / "weights.safetensors")
"""
"""What one writes without wsync: puts the newest file into shared memory, and checks nothing."""


def make(nbytes: int, tensors: int) -> nn.ParameterList:
    """So many float32 vectors, of ``nbytes`` together."""
    count = max(nbytes // tensors // 4, 1)
    return nn.ParameterList(nn.Parameter(torch.zeros(count)) for _ in range(tensors)).eval()


def weigh(source: str, nbytes: str, tensors: str) -> None:
    """Attaches a policy to a segment, or loads a checkpoint into one; goes on when it is told to."""
    input("imported\n")
    policy = make(int(nbytes), int(tensors))
    if source.endswith(".safetensors"):
        policy.load_state_dict(load_file(source))
        input("loaded\n")
    else:
        with attach(policy, source, mode="swap", timeout=60):
            input("attached\n")


if __name__ == "__main__":
    weigh(*sys.argv[1:])
