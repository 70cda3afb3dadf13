"""The policies that are measured, and the processes that attach, load, or publish them.

``python -m wsync.bench_policy ROLE …`` is one such process. It says a line at each stage and waits for one in between.
Those that publish load no torch, which takes two seconds of a processor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING

from . import memory

if TYPE_CHECKING:
    from torch import nn


def make(nbytes: int, tensors: int) -> nn.ParameterList:
    """So many float32 vectors, of ``nbytes`` together."""
    import torch
    from torch import nn

    count = max(nbytes // tensors // 4, 1)
    return nn.ParameterList(nn.Parameter(torch.zeros(count)) for _ in range(tensors)).eval()


def layers(nbytes: int, tensors: int) -> nn.Sequential:
    """Linear layers of one width, a weight and a bias each, of some ``nbytes`` together."""
    from torch import nn

    number = max(tensors // 2, 1)
    width = max(isqrt(nbytes // number // 4), 1)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(number))).eval()


def reader(name: str, nbytes: str, tensors: str) -> None:
    """Attaches, and goes on having the weights."""
    from .attaching import attach

    _stage("imported")
    with attach(make(int(nbytes), int(tensors)), name, mode="swap", timeout=60):
        _stage("attached")


def loader(path: str, nbytes: str, tensors: str) -> None:
    """Loads the file into a policy of its own."""
    import safetensors.torch

    from . import attaching  # noqa: F401  (what the other one imports, too)

    _stage("imported")
    policy = make(int(nbytes), int(tensors))
    policy.load_state_dict(safetensors.torch.load_file(path))
    _stage("loaded")


def giver(name: str, path: str) -> None:
    """Publishes a checkpoint each time that it is asked to."""
    from .checkpoint import Checkpoint
    from .publisher import publish
    from .segment import Segment

    segment = Segment.open(name, write=True)
    with Checkpoint(Path(path)) as checkpoint:
        while True:
            with segment.publishing():
                publish(segment, checkpoint)
            _stage("published")


def publisher(name: str, path: str) -> None:
    """Publishes a checkpoint again and again, as fast as it can, until it is ended."""
    from .checkpoint import Checkpoint
    from .errors import SegmentBusy
    from .publisher import publish
    from .segment import Segment

    segment = Segment.open(name, write=True)
    told = False
    while True:
        try:
            with segment.publishing(), Checkpoint(Path(path)) as checkpoint:
                publish(segment, checkpoint)
        except SegmentBusy:  # a reader is late
            continue
        if not told:
            print("published", flush=True)
            told = True


def _stage(word: str) -> None:
    print(word, flush=True)
    if not sys.stdin.readline():
        sys.exit(1)


if __name__ == "__main__":
    roles: dict[str, Callable[..., None]] = {"reader": reader, "loader": loader, "giver": giver, "publisher": publisher}
    memory.alone = True  # as on the command line
    roles[sys.argv[1]](*sys.argv[2:])
