"""The figures as Prometheus reads them: a registry of their own, and a file for the node exporter.

The only place, with ``endpoint``, that needs prometheus_client; it is imported where somebody asked for figures.

The file is what a cron job needs: each run reads it, adds what it counted, and puts the sum in its place, under a lock
on its directory, so that counters go on from run to run, and a push beside a watch loses nothing. It holds the figures
of one segment.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import UsageError, WsyncError
from .metrics import BUCKETS, FAMILIES, HEALTHY, Counted, Figures
from .outcome import Outcome

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.parser import text_string_to_metric_families
except ImportError as exc:
    raise UsageError(
        f"figures need the package prometheus-client, which cannot be imported ({exc}). Run "
        "pip install 'wsync[metrics]', or leave --metrics-port and --metrics-file out."
    ) from exc

_EVERY = 5.0  # seconds between two writes of the file where passes find nothing new
_PATIENCE = 2.0  # seconds that another process may hold the file


class Collector:
    """The figures of one segment, as families of the official client, made when they are asked for."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        return families(self._figures, self._figures.counts(), self._figures.last_success)


def registry_of(figures: Figures) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(Collector(figures))
    return registry


def exposed(registry: CollectorRegistry, accept: str) -> tuple[str, bytes]:
    """The content type that a client with this ``Accept`` takes, and all figures in it."""
    encode, kind = choose_encoder(accept)
    return kind, encode(registry)


def families(figures: Figures, counts: Mapping[Counted, float], last_success: float) -> Iterator[Metric]:
    """Every family of ``FAMILIES`` with its samples."""
    gauges = [*figures.live(), ("wsync_last_success_timestamp_seconds", "", last_success)]
    for family, (kind, label, text) in FAMILIES.items():
        labels = ["name", label] if label else ["name"]
        if kind == "gauge":
            gauge = GaugeMetricFamily(family, text, labels=labels)
            for name, value, number in gauges:
                if name == family:
                    gauge.add_metric([figures.name, value][: len(labels)], number)
            yield gauge
        elif kind == "counter":
            counter = CounterMetricFamily(family, text, labels=labels)
            for count, number in sorted(counts.items()):
                if count.sample == f"{family}_total":
                    counter.add_metric([figures.name, count.label][: len(labels)], number)
            yield counter
        else:
            histogram = HistogramMetricFamily(family, text, labels=labels)
            for value in sorted({count.label for count in counts if count.sample == f"{family}_count"}):
                buckets = [(bound, counts.get(Counted(f"{family}_bucket", value, bound), 0.0)) for bound in BUCKETS]
                histogram.add_metric([figures.name, value], buckets, counts.get(Counted(f"{family}_sum", value), 0.0))
            yield histogram


class TextFile:
    """A ``.prom`` file that figures are added to.

    Raises:
        UsageError: the file holds something else, or the figures of another segment; or it cannot be written there.
    """

    def __init__(self, path: str | os.PathLike[str], figures: Figures) -> None:
        self.path, self._figures = Path(path).absolute(), figures
        self._saved: dict[Counted, float] = {}
        self._next = 0.0
        self._read()
        if not os.access(self.path.parent, os.W_OK | os.X_OK):
            raise UsageError(
                f"{self.path} cannot be written: its directory is not there, or not this user's to write. Make it, or "
                "name another with --metrics-file."
            )

    def tell(self, event: Outcome | WsyncError) -> None:
        """Saves at once after what is worth telling, and now and then after passes that found nothing new.

        Raises:
            WsyncError: the file cannot be written; what was counted goes into the next write.
        """
        quiet = isinstance(event, Outcome) and event.status in HEALTHY and event.status != "published"
        if not quiet or time.monotonic() >= self._next:
            self.save()

    def save(self) -> None:
        """Adds what was counted since the last time, and replaces the gauges.

        Raises:
            WsyncError: the file cannot be written; what was counted goes into the next write.
        """
        counts = self._figures.counts()
        try:
            with _lock(self.path.parent):
                before, success = self._read()
                for count, number in counts.items():
                    before[count] = before.get(count, 0.0) + number - self._saved.get(count, 0.0)
                registry = CollectorRegistry()
                registry.register(_Families(families(self._figures, before, max(success, self._figures.last_success))))
                _replace(self.path, generate_latest(registry))
        except OSError as exc:
            raise WsyncError(
                f"the figures cannot be written to {self.path} ({exc.strerror or exc}). The weights are not concerned; "
                "what was counted goes into the next write."
            ) from exc
        self._saved, self._next = counts, time.monotonic() + _EVERY

    def _read(self) -> tuple[dict[Counted, float], float]:
        """Counts, and the last success, that the file holds; nothing where there is no file."""
        counts: dict[Counted, float] = {}
        success = 0.0
        try:
            found = list(text_string_to_metric_families(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return counts, success
        except OSError as exc:
            raise UsageError(f"{self.path} cannot be read ({exc.strerror}). Name another file, or mend it.") from exc
        except Exception as exc:  # the parser has no error of its own
            raise self._foreign(f"it is not figures ({exc})") from exc
        for sample in (sample for family in found for sample in family.samples):
            if sample.name.rpartition("_")[0] not in FAMILIES and sample.name not in FAMILIES:
                raise self._foreign(f"it holds {sample.name}")
            if sample.labels.get("name") != self._figures.name:
                raise self._foreign(f"it holds the figures of {sample.labels.get('name')!r}")
            if sample.name == "wsync_last_success_timestamp_seconds":
                success = sample.value
            elif sample.name not in FAMILIES:
                label = next((value for key, value in sample.labels.items() if key not in ("name", "le")), "")
                counts[Counted(sample.name, label, sample.labels.get("le", ""))] = sample.value
        return counts, success

    def _foreign(self, what: str) -> UsageError:
        return UsageError(
            f"{self.path} is not the figures of segment {self._figures.name!r}: {what}. Give each segment a file of "
            "its own with --metrics-file, or remove this one."
        )


class _Families:
    """Families that were made already, as a collector."""

    def __init__(self, made: Iterable[Metric]) -> None:
        self._made = list(made)

    def collect(self) -> list[Metric]:
        return self._made


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Keeps others that add to a file of this directory out; never waits for long."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _replace(path: Path, data: bytes) -> None:
    """Puts a file in place whole, readable by the node exporter's user; its temporary is no name that one reads."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a run that was killed; ours now, under the lock
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, 0o644)
            file.write(data)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
