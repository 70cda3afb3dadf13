"""The policy that is measured, and the processes that attach it, load it, or watch.

``python -m wsync.bench.processes ROLE …`` is one such process. It prints a line at each stage and goes on when it gets
one. It ends with the measurement, also when that is killed.
"""

from __future__ import annotations

import ctypes
import runpy
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def make(nbytes: int, tensors: int) -> nn.ParameterList:
    """So many float32 vectors, of ``nbytes`` together."""
    import torch
    from torch import nn

    count = max(nbytes // tensors // 4, 1)
    return nn.ParameterList(nn.Parameter(torch.zeros(count)) for _ in range(tensors)).eval()


def weigh(source: str, nbytes: str, tensors: str) -> None:
    """Attaches a policy to a segment, or loads a checkpoint into one."""
    from safetensors.torch import load_file

    from ..policy.attaching import attach

    _stage("imported")
    policy = make(int(nbytes), int(tensors))
    if source.endswith(".safetensors"):
        policy.load_state_dict(load_file(source))
        _stage("loaded")
    else:
        with attach(policy, source, mode="swap", timeout=60):
            _stage("attached")


def watch(spec: str) -> None:
    """``wsync watch``."""
    sys.argv = ["wsync", "watch", spec, "--log-format", "json"]
    runpy.run_module("wsync", run_name="__main__")


def _stage(word: str) -> None:
    print(word, flush=True)
    if not sys.stdin.readline():
        sys.exit(1)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if sys.argv[1] == "watch":
        watch(sys.argv[2])
    else:
        weigh(*sys.argv[2:])
