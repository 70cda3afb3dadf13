"""Metrics for monitoring, by the official Prometheus client.

A watch counts the outcomes of its passes. What is live, how old it is and how far readers lag is read from the segment
at each request. The number of labels and their characters are limited.

A push from cron does not live long enough to count: its file says what is live and how the last run ended.

The client library takes a tenth of a second to import, so this module is loaded only if metrics are asked for.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointRejected, UsageError, WsyncError
from ..segment.publication import Publication
from ..segment.reader_records import ReaderRecord
from ..segment.segment import Segment
from ..sync.outcome import EXIT_CODES, Outcome

try:
    import prometheus_client as client
    from prometheus_client.core import GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as exc:
    raise UsageError(
        f"figures need the package prometheus-client, which cannot be imported ({exc}). Run "
        "pip install 'wsync[metrics]', or leave --metrics-port and --metrics-file out."
    ) from exc

client.disable_created_metrics()  # type: ignore[no-untyped-call]

STATUSES = tuple(status for status in EXIT_CODES if status != "checked")
HEALTHY = ("published", "current", "pinned")
"""The statuses of passes that found the right version live, or put it live."""

HOOKS = ("exec", "webhook")
MAX_READERS = 64
"""Most readers with a metric of their own, those that lag most; ``wsync_readers`` counts all."""

_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300)  # seconds
_ODD = re.compile(r"[^A-Za-z0-9_.-]")


class Live(Collector):
    """The gauges of one segment, read from it when they are collected.

    Attributes:
        last_success: when a pass last found or put the right version live, in seconds since the epoch; 0 before.
        to_all_readers: seconds until all readers had a version that this watch published, for the last one; or None.
    """

    def __init__(self, name: str, runtime: str | os.PathLike[str] | None = None) -> None:
        self.name, self._runtime, self.last_success = name, runtime, 0.0
        self.to_all_readers: float | None = None

    def look(self) -> tuple[Publication | None, list[ReaderRecord]] | None:
        """What is live, and its readers; None if the segment is absent or cannot be read."""
        try:
            segment = Segment.open(self.name, self._runtime)
            try:
                return segment.live(), segment.readers()
            finally:
                segment.close()
        except (WsyncError, OSError, ValueError):
            return None

    def collect(self) -> Iterator[Metric]:
        looked = self.look()
        live, readers = looked or (None, [])
        version = live.version if live else 0
        yield self.gauge("version", "The live version; 0 before the first.", version)
        yield self.gauge(
            "step", "The trainer's step of the live version; no sample if it has no step.", live.step if live else None
        )
        yield self.gauge(
            "last_success_timestamp_seconds",
            "When a pass last found the newest checkpoint live or put it live; 0 before.",
            self.last_success,
        )
        age = None
        if live:
            written = int(live.identity.rpartition("-")[2] or 0) / 1e9 if live.checkpoint else 0.0
            age = max(0.0, time.time() - (written or live.published_at))
        yield self.gauge("checkpoint_age_seconds", "Since the live checkpoint was written.", age)
        yield self.gauge("readers", "Living readers.", len(readers) if looked else None)
        text = "From the last publish that all readers have until the last of them had it; no sample before."
        yield self.gauge("time_to_all_readers_seconds", text, self.to_all_readers)
        lags: dict[str, int] = {}
        for reader in readers:  # one process may have several; the one that lags most speaks for it
            label = f"{_ODD.sub('_', reader.process)[:32]}-{reader.pid}"
            lags[label] = max(lags.get(label, 0), version - reader.version)
        text = "Versions that a reader is behind."
        lag = GaugeMetricFamily("wsync_reader_lag_versions", text, labels=["name", "reader"])
        for label in sorted(lags, key=lambda label: -lags[label])[:MAX_READERS]:
            lag.add_metric([self.name, label], lags[label])
        yield lag

    def gauge(self, what: str, text: str, value: float | None) -> Metric:
        """A gauge of this segment; it has no sample if the value is None."""
        gauge = GaugeMetricFamily(f"wsync_{what}", text, labels=["name"])
        if value is not None:
            gauge.add_metric([self.name], value)
        return gauge


class Figures:
    """Counts the outcomes of one watch's passes.

    Attributes:
        live: the gauges of the segment.
        registry: all metrics, gauges and counters.
    """

    def __init__(self, name: str, runtime: str | os.PathLike[str] | None = None) -> None:
        self.name, self.live, self.registry = name, Live(name, runtime), client.CollectorRegistry()
        self.registry.register(self.live)
        self._refused: set[str] = set()
        self._good = time.monotonic()

        def counter(family: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> client.Counter:
            made = client.Counter(family, text, ["name", label] if label else ["name"], registry=self.registry)
            for value in [[value] for value in values] if label else [[]]:
                made.labels(name, *value)  # start at zero: Prometheus sees no increase in a counter that begins at 1
            return made

        self._passes = counter("wsync_sync_count", "Passes, by how they ended.", "status", STATUSES)
        self._seconds = client.Histogram(
            "wsync_sync_duration_seconds",
            "How long passes took, by how they ended.",
            ["name", "status"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._bytes = counter("wsync_staged_bytes", "Bytes of weights that went live.")
        self._rejected = counter(
            "wsync_rejected", "Rejected checkpoints, each counted once in a process.", "reason", reasons()
        )
        self._runs = counter("wsync_hook_runs", "Runs of a hook, including failed ones.", "hook", HOOKS)
        self._failures = counter("wsync_hook_failures", "Runs of a hook that failed.", "hook", HOOKS)

    def tell(self, event: Outcome | WsyncError) -> None:
        """Counts a pass: its outcome, or why it failed."""
        if isinstance(event, WsyncError):
            self._passes.labels(self.name, "failed").inc()
            return
        self._passes.labels(self.name, event.status).inc()
        self._seconds.labels(self.name, event.status).observe(event.seconds)
        if event.status == "published":
            self._bytes.labels(self.name).inc(event.bytes)
        for refused in (*event.passed_over, event):
            which = refused.identity or refused.reason or ""
            if refused.status == "rejected" and refused.kind and which not in self._refused:
                self._refused.add(which)
                self._rejected.labels(self.name, refused.kind).inc()
        if event.status in HEALTHY:
            self._good, self.live.last_success = time.monotonic(), time.time()

    def hook(self, kind: str, ok: bool) -> None:
        """Counts a run of a hook; called from the hook's thread."""
        self._runs.labels(self.name, kind).inc()
        self._failures.labels(self.name, kind).inc(not ok)

    def health(self, max_staleness: float | None) -> tuple[bool, str]:
        """Whether a version is live and the last good pass at most so many seconds ago; and a line that says why."""
        live, _ = self.live.look() or (None, [])
        stale = time.monotonic() - self._good
        if not live:
            return False, f"{self.name}: no version yet"
        if max_staleness is not None and stale > max_staleness:
            return False, f"{self.name}: the last good look is {stale:.1f} s ago, {max_staleness:g} s are allowed"
        return True, f"{self.name}: version {live.version}"


class RunFigures(Live):
    """The file that a push from cron writes for the node exporter: what is live, and how the last run ended.

    Raises:
        UsageError: the file has other contents, such as another segment's metrics; or it cannot be written.
    """

    def __init__(self, name: str, path: str | os.PathLike[str], runtime: str | os.PathLike[str] | None = None) -> None:
        super().__init__(name, runtime)
        self._path, self._began, self._exit_code = Path(path), time.monotonic(), 0
        self._failures = dict.fromkeys(HOOKS, 0)
        self.last_success = last_success(self._path, name)

    def hook(self, kind: str, ok: bool) -> None:
        """Counts a run of a hook; called from the hook's thread."""
        self._failures[kind] += not ok

    def write(self, event: Outcome | WsyncError) -> None:
        """Writes the file at the end of a run, with the run's outcome or error.

        Raises:
            WsyncError: the file cannot be written.
        """
        self._exit_code = event.exit_code
        if isinstance(event, Outcome) and event.status in HEALTHY:
            self.last_success = time.time()
        write(self._path, self)

    def collect(self) -> Iterator[Metric]:
        yield from super().collect()
        yield self.gauge("last_run_timestamp_seconds", "When the last run ended.", time.time())
        yield self.gauge("last_run_duration_seconds", "How long the last run took.", time.monotonic() - self._began)
        yield self.gauge("last_run_exit_code", "Exit code of the last run.", self._exit_code)
        text = "Runs of a hook in the last run that failed."
        failures = GaugeMetricFamily("wsync_last_run_hook_failures", text, labels=["name", "hook"])
        for kind, number in self._failures.items():
            failures.add_metric([self.name, kind], number)
        yield failures


def write(path: Path, figures: Collector) -> None:
    """Replaces a file of metrics as a whole, readable by the node exporter's user.

    Raises:
        WsyncError: the file cannot be written.
    """
    try:
        client.write_to_textfile(str(path), figures)
        path.chmod(0o644)  # cron's umask may be anything
    except OSError as exc:
        raise WsyncError(
            f"the figures cannot be written to {path} ({exc.strerror or exc}). The weights are not affected. Check "
            "that its directory exists, is writable, and has room."
        ) from exc


def last_success(path: Path, name: str) -> float:
    """Reads the time of the last success from a file of metrics, in seconds since the epoch; 0 if it has no such time.

    Raises:
        UsageError: the file has other contents than the metrics of this segment, or cannot be read or written.
    """
    success = 0.0
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if not line.startswith("#"):
                family, labels, value = re.split(r"[{}]", line)
                if not family.startswith("wsync_") or f'name="{name}"' not in labels.split(","):
                    raise ValueError
                if family == "wsync_last_success_timestamp_seconds":
                    success = float(value)
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise UsageError(f"{path} cannot be read ({exc.strerror}). Name another file with --metrics-file.") from exc
    except ValueError:
        raise UsageError(
            f"{path} is not a file with figures of segment {name!r}. Give each segment a file of its own "
            "with --metrics-file, or remove this one."
        ) from None
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"{path} cannot be written: its directory is missing, or this user may not write there. Make it, or name "
            "another with --metrics-file."
        )
    return success


def reasons() -> tuple[str, ...]:
    """Every reason for a rejection: ``kind`` of each error class."""
    kinds, classes = {"incomplete"}, [CheckpointRejected]
    while classes:
        kind = classes.pop()
        kinds.add(kind.kind)
        classes += kind.__subclasses__()
    return tuple(sorted(kinds))
