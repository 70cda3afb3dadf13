"""What ``[metrics]`` asks for, put together: the figures, their file and their port.

Loaded only where a file or a port is asked for, because the client library takes a tenth of a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from .endpoint import Endpoint
from .errors import WsyncError
from .exposition import TextFile
from .metrics import Figures, Metrics
from .outcome import Outcome


class Monitor:
    """Counts passes, and gives the figures to whoever was asked for.

    Args:
        name: of the segment.
        runtime: where segments live.
        complain: called, once for each reason in a row, where the file cannot be written; the weights go first.
        serve: open the port, which a single push does not.

    Raises:
        UsageError: the port or the file cannot be used.
    """

    def __init__(
        self,
        name: str,
        settings: Metrics,
        runtime: str | os.PathLike[str] | None,
        complain: Callable[[WsyncError], None],
        *,
        serve: bool,
    ) -> None:
        self.figures = Figures(name, runtime)
        self._complain, self._complaint = complain, ""
        self._file = TextFile(settings.file, self.figures) if settings.file else None
        self.endpoint: Endpoint | None = None
        if serve and settings.port is not None:
            self.endpoint = Endpoint(self.figures, settings.address, settings.port, settings.max_staleness)

    def tell(self, event: Outcome | WsyncError) -> None:
        """Counts a pass: its outcome, or why it failed."""
        self.figures.tell(event)
        if self._file:
            self._save(lambda file: file.tell(event))

    def close(self) -> None:
        if self.endpoint:
            self.endpoint.close()
        if self._file:
            self._save(TextFile.save)

    def _save(self, save: Callable[[TextFile], None]) -> None:
        assert self._file
        try:
            save(self._file)
            self._complaint = ""
        except WsyncError as exc:
            if str(exc) != self._complaint:
                self._complaint = str(exc)
                self._complain(exc)
