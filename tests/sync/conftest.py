"""What the tests of a pass and of its schedule share."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from processes import DEADLINE


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    """A stop that is set after the deadline at the latest."""
    event = threading.Event()
    timer = threading.Timer(DEADLINE, event.set)
    timer.start()
    yield event
    timer.cancel()
    timer.join()
