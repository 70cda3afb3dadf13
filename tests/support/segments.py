"""A segment of its own for tests of the protocol, and pushes into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from builders import write
from policies import mlp

from wsync.checkpoints.checkpoint import Checkpoint
from wsync.layout.layout import layout_of
from wsync.segment.publication import Publication
from wsync.segment.publishing import publish
from wsync.segment.writable import WritableSegment

LAYOUT = layout_of(mlp())
Push = Callable[..., Publication]


@pytest.fixture
def segment(runtime: Path) -> WritableSegment:
    """A segment of three slots with nothing in it, opened as the publisher does."""
    return WritableSegment.create("nets", LAYOUT)


@pytest.fixture
def push(segment: WritableSegment, tmp_path: Path) -> Push:
    """Publishes a checkpoint whose every weight is ``mark``."""

    def run(mark: float, step: int | None = None) -> Publication:
        path = write(tmp_path / "weights.safetensors", mlp(), mark, step)
        with segment.publishing(), Checkpoint(path) as checkpoint:
            return publish(segment, checkpoint)

    return run


def slot_file(segment: WritableSegment, slot: int) -> Path:
    return segment.path / f"slot-{slot}.safetensors"
