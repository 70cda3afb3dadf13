"""What ``[metrics]`` asks of a watch, put together: the figures, their file and their port."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from ..errors import WsyncError
from ..history.outcome import Outcome
from ..settings.spec import Metrics
from .endpoint import Endpoint
from .figures import HEALTHY, Figures, last_success, write

_EVERY = 5.0  # seconds between two writes of the file where passes find nothing new


class Monitor:
    """Counts a watch's passes, serves the figures, and writes them to a file.

    Args:
        name: of the segment.
        runtime: where segments live.
        complain: called, once for each reason in a row, when the file cannot be written.

    Raises:
        UsageError: the port or the file cannot be used.
    """

    def __init__(
        self,
        name: str,
        settings: Metrics,
        runtime: str | os.PathLike[str] | None,
        complain: Callable[[WsyncError], None],
    ) -> None:
        self.figures = Figures(name, runtime)
        self._complain, self._complaint, self._next = complain, "", 0.0
        self._file = Path(settings.file) if settings.file else None
        if self._file:
            self.figures.live.last_success = last_success(self._file, name)
        self.endpoint: Endpoint | None = None
        if settings.port is not None:
            self.endpoint = Endpoint(self.figures, settings.address, settings.port, settings.max_staleness)

    def tell(self, event: Outcome | WsyncError) -> None:
        """Counts a pass: its outcome, or why it failed."""
        self.figures.tell(event)
        quiet = isinstance(event, Outcome) and event.status in HEALTHY and event.status != "published"
        if not quiet or time.monotonic() >= self._next:
            self._write()

    def close(self) -> None:
        if self.endpoint:
            self.endpoint.close()
        self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        self._next = time.monotonic() + _EVERY
        try:
            write(self._file, self.figures.registry)
            self._complaint = ""
        except WsyncError as exc:
            if str(exc) != self._complaint:
                self._complaint = str(exc)
                self._complain(exc)
