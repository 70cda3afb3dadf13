"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import NAME, SPEC, write
from policies import mlp

from wsync.layout.layout import layout_of
from wsync.segment.writable import WritableSegment
from wsync.settings.spec import load_spec
from wsync.sync.syncer import Syncer


@pytest.fixture
def live(runs: Path) -> Iterator[WritableSegment]:
    """A segment whose version 1 is ``runs/step_10.safetensors``, weights of mark 1, as a push leaves it."""
    write(runs / "step_10.safetensors", mlp(), 1.0)
    spec = load_spec(SPEC)
    WritableSegment.create(NAME, layout_of(mlp()), spec=spec.fingerprint()).close()  # here, since torch is here already
    with Syncer(spec, runs) as syncer:
        assert syncer.once().status == "published"
    segment = WritableSegment.open(NAME)
    yield segment
    segment.close()
