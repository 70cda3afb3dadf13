"""The settings of ``[metrics]``, which every command reads; what counts and serves figures is in ``figures``."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SpecError


@dataclass(frozen=True, slots=True)
class Metrics:
    """Where figures go: the settings of ``[metrics]``.

    Attributes:
        port: of ``/metrics`` and ``/healthz``; 0 takes any free one, None serves neither.
        address: on which that port listens.
        file: for the node exporter's textfile collector, absolute or relative to the current directory; empty for none.
        max_staleness: seconds since the last pass that found the newest checkpoint live or made it so, after which
            a watch is unhealthy; None for never. A trainer that is done makes nothing stale; a newest checkpoint that
            is refused, a source that is gone and a loop that hangs do. It must be above ``poll``, and is best above
            what staging takes.
    """

    port: int | None = None
    address: str = "127.0.0.1"
    file: str = ""
    max_staleness: float | None = None

    def __post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port <= 65_535:
            raise SpecError(
                f"metrics.port = {self.port} is not a port (--metrics-port). Give 1 to 65535, or 0 for any free port."
            )
        if self.file and not self.file.endswith(".prom"):
            raise SpecError(
                f"metrics.file = {self.file!r} (--metrics-file): the node exporter reads only names that end in .prom. "
                "Give it such a name."
            )
        if self.max_staleness is not None and not self.max_staleness > 0:
            raise SpecError(f"metrics.max_staleness = {self.max_staleness} is not a valid time. Give seconds above 0.")
