"""Figures for monitoring: what a push or a watch counts, and whether a watch is healthy.

Here they are counted, with nothing but the standard library; ``exposition`` and ``endpoint`` give them to Prometheus
and need its client. Counters come from the outcomes of passes; what is live, how old it is and how far readers lag is
read from the segment at the moment somebody asks. All labels are of bounded number and harmless characters.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .errors import CheckpointRejected, SpecError, WsyncError
from .segment import Segment

if TYPE_CHECKING:
    from .outcome import Outcome

STATUSES = ("published", "current", "pinned", "rejected", "empty", "busy", "failed")
HEALTHY = ("published", "current", "pinned")
"""How a pass ends that saw the source and left live what shall be."""

BUCKETS = ("0.001", "0.005", "0.01", "0.05", "0.1", "0.5", "1.0", "5.0", "10.0", "30.0", "60.0", "300.0", "+Inf")
MAX_READERS = 64
"""Readers that have a figure of their own: those that lag most; ``wsync_readers`` counts all."""

FAMILIES = {
    "wsync_sync_count": ("counter", "status", "Passes, by how they ended."),
    "wsync_sync_duration_seconds": ("histogram", "status", "How long passes took, by how they ended."),
    "wsync_staged_bytes": ("counter", "", "Bytes of weights that went live."),
    "wsync_rejected": ("counter", "reason", "Checkpoints that were refused as they are, once a process."),
    "wsync_hook_runs": ("counter", "hook", "Runs of a hook, those that failed among them."),
    "wsync_hook_failures": ("counter", "hook", "Runs of a hook that failed."),
    "wsync_version": ("gauge", "", "The live version; 0 before the first."),
    "wsync_step": ("gauge", "", "The trainer's step of the live version; none where it has none."),
    "wsync_last_success_timestamp_seconds": (
        "gauge",
        "",
        "When a pass last found the newest checkpoint live or made it so; 0 before.",
    ),
    "wsync_checkpoint_age_seconds": ("gauge", "", "Since the live checkpoint was written."),
    "wsync_readers": ("gauge", "", "Living readers."),
    "wsync_reader_lag_versions": ("gauge", "reader", "Versions that a reader is behind."),
}
"""Name of each family: its kind, its label beside ``name``, and its help."""

_ODD = re.compile(r"[^A-Za-z0-9_.-]")


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
            raise SpecError(f"metrics.port = {self.port} is no port (--metrics-port). Give 1 to 65535, or 0 for any.")
        if self.file and not self.file.endswith(".prom"):
            raise SpecError(
                f"metrics.file = {self.file!r} (--metrics-file): the node exporter reads only names that end in .prom. "
                "Give it such a name."
            )
        if self.max_staleness is not None and not self.max_staleness > 0:
            raise SpecError(f"metrics.max_staleness = {self.max_staleness} is no time. Give seconds above 0.")


class Counted(NamedTuple):
    """What a count is of: its sample's name, the value of its family's label, and the bound of a bucket."""

    sample: str
    label: str = ""
    bound: str = ""


class Figures:
    """What one segment's passes came to, since this process began; safe to tell and to ask from several threads."""

    def __init__(self, name: str, runtime: str | os.PathLike[str] | None = None) -> None:
        self.name, self._runtime = name, runtime
        self._lock = threading.Lock()
        self._counts: dict[Counted, float] = dict.fromkeys(_from_zero(), 0.0)
        self._rejected: set[str] = set()
        self._good = time.monotonic()
        self._success = 0.0

    def tell(self, event: Outcome | WsyncError) -> None:
        """Counts a pass: its outcome, or why it failed."""
        with self._lock:
            if isinstance(event, WsyncError):
                self._add("wsync_sync_count_total", "failed")
                return
            self._add("wsync_sync_count_total", event.status)
            self._observe(event.status, event.seconds)
            if event.status == "published":
                self._add("wsync_staged_bytes_total", amount=event.bytes)
            for refused in (*event.passed_over, event):
                which = refused.identity or refused.reason or ""
                if refused.status == "rejected" and refused.kind and which not in self._rejected:
                    self._rejected.add(which)
                    self._add("wsync_rejected_total", refused.kind)
            if event.status in HEALTHY:
                self._good, self._success = time.monotonic(), time.time()

    def hook(self, kind: str, ok: bool) -> None:
        """Counts a run of a hook, told from its thread."""
        with self._lock:
            self._add("wsync_hook_runs_total", kind)
            self._add("wsync_hook_failures_total", kind, amount=int(not ok))

    def counts(self) -> dict[Counted, float]:
        """All that only grows, by what it is of; buckets are cumulative."""
        with self._lock:
            return dict(self._counts)

    @property
    def last_success(self) -> float:
        """Seconds since the epoch; 0 before the first."""
        return self._success

    def live(self) -> Iterator[tuple[str, str, float]]:
        """Family, label and value of what the segment itself tells at this moment."""
        try:
            segment = Segment.open(self.name, self._runtime)
            try:
                publication, readers = segment.live(), segment.readers()
            finally:
                segment.close()
        except (WsyncError, OSError, ValueError):  # none there, one that is being removed, or one that cannot be read
            yield "wsync_version", "", 0
            return
        version = publication.version if publication else 0
        yield "wsync_version", "", version
        if publication:
            if publication.step is not None:
                yield "wsync_step", "", publication.step
            written = int(publication.identity.rpartition("-")[2] or 0) / 1e9 if publication.source else 0.0
            yield "wsync_checkpoint_age_seconds", "", max(0.0, time.time() - (written or publication.published_at))
        yield "wsync_readers", "", len(readers)
        lags: dict[str, int] = {}
        for reader in readers:  # one process may have several; the one that lags most speaks for it
            label = f"{_ODD.sub('_', reader.process)[:32]}-{reader.pid}"
            lags[label] = max(lags.get(label, 0), version - reader.version)
        for label in sorted(lags, key=lambda label: -lags[label])[:MAX_READERS]:
            yield "wsync_reader_lag_versions", label, lags[label]

    def health(self, max_staleness: float | None) -> tuple[bool, str]:
        """Whether a watch does its work, and in a line why not."""
        version = next(value for family, _, value in self.live() if family == "wsync_version")
        stale = time.monotonic() - self._good
        if not version:
            return False, f"{self.name}: no version yet"
        if max_staleness is not None and stale > max_staleness:
            return False, f"{self.name}: the last good look is {stale:.1f} s ago, {max_staleness:g} s are allowed"
        return True, f"{self.name}: version {version:.0f}"

    def _add(self, sample: str, label: str = "", bound: str = "", amount: float = 1) -> None:
        key = Counted(sample, label, bound)
        self._counts[key] = self._counts.get(key, 0) + amount

    def _observe(self, status: str, seconds: float) -> None:
        sample = "wsync_sync_duration_seconds"
        for bound in BUCKETS:
            self._add(f"{sample}_bucket", status, bound, int(seconds <= float(bound)))
        self._add(f"{sample}_count", status)
        self._add(f"{sample}_sum", status, amount=seconds)


def reasons() -> list[str]:
    """Every reason for which a checkpoint is rejected: the kinds of the classes that say so."""
    kinds, classes = {"incomplete"}, [CheckpointRejected]
    while classes:
        kind = classes.pop()
        kinds.add(kind.kind)
        classes += kind.__subclasses__()
    return sorted(kinds)


def _from_zero() -> list[Counted]:
    """Counters that are there before they count: what begins at 1 is no increase to Prometheus."""
    counted = [Counted("wsync_sync_count_total", status) for status in STATUSES]
    return [
        *counted,
        Counted("wsync_staged_bytes_total"),
        *(Counted(f"wsync_hook_{what}_total", kind) for what in ("runs", "failures") for kind in ("exec", "webhook")),
        *(Counted("wsync_rejected_total", reason) for reason in reasons()),
    ]
