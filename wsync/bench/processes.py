"""The policy that is measured, and the processes that attach it, load it, publish it, or watch.

``python -m wsync.bench.processes ROLE …`` is one such process. It says a line at each stage and goes on when it gets
one. It ends with the measurement, also when that is killed.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable
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


def reader(name: str, nbytes: str, tensors: str) -> None:
    """Attaches, and goes on having the weights."""
    from ..attaching import attach

    _stage("imported")
    with attach(make(int(nbytes), int(tensors)), name, mode="swap", timeout=60):
        _stage("attached")


def loader(path: str, nbytes: str, tensors: str) -> None:
    """Loads the file into a policy of its own."""
    from safetensors.torch import load_file

    from .. import attaching  # noqa: F401  (so that both kinds of processes begin with the same imports)

    _stage("imported")
    policy = make(int(nbytes), int(tensors))
    policy.load_state_dict(load_file(path))
    _stage("loaded")


def publisher(name: str, path: str) -> None:
    """Publishes a checkpoint each time that it is asked to."""
    from ..checkpoint import open_checkpoint
    from ..publisher import publish
    from ..segment import Segment

    segment = Segment.open(name, write=True)
    with open_checkpoint(path) as checkpoint:
        while True:
            with segment.publishing():
                publish(segment, checkpoint)
            _stage("published")


def watch(spec: str) -> None:
    """``wsync watch``."""
    from ..cli import main

    sys.argv = ["wsync", "watch", spec, "--log-format", "json"]
    main()


def _stage(word: str) -> None:
    print(word, flush=True)
    if not sys.stdin.readline():
        sys.exit(1)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    roles: dict[str, Callable[..., None]] = {"reader": reader, "loader": loader, "publisher": publisher, "watch": watch}
    roles[sys.argv[1]](*sys.argv[2:])
