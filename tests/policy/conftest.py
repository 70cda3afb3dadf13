"""What the tests of a policy's process share."""

from __future__ import annotations

from pathlib import Path

import pytest
from devices import LateDevice
from policies import mlp
from trainers import Trainer

from wsync.policy import attaching


@pytest.fixture
def trainer(runtime: Path) -> Trainer:
    """A segment for ``mlp`` with nothing in it yet."""
    return Trainer(mlp)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LateDevice:
    """What every policy of the test lies on."""
    device = LateDevice()
    monkeypatch.setattr(attaching, "_device_of", lambda policy: device)
    return device
