"""What the tests of a pass and of its schedule share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

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


@pytest.fixture
def hours_later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Sets this process's clock two hours ahead; files keep their times, which only the kernel's clock sets."""
    now = time.time
    return lambda: monkeypatch.setattr(time, "time", lambda: now() + 7200)
