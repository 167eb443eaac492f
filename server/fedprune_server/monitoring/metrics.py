"""A server's metrics for Prometheus. The server's loop counts events; a scrape reads the counts, without the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedprune import __version__
from fedprune.coordination import Phase
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.state import Progress
from fedprune_server.monitoring.round_parts import DEVICE_PARTS, ROUND_PARTS, finished_part, started_part
from fedprune_server.observation.observer import RoundEnded, TurnEnded, TurnEvent, TurnSaved, handle_each
from fedprune_server.observation.snapshot import JobSnapshot

DEVICE_STATE_LABELS = ("working", "idle", "excluded", "offline", "revoked")

# Buckets of histograms: seconds of parts of a round (a pull on the same machine to a night), of turns and database
# writes, and rounds of staleness.
_PART_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 14400)
_TURN_BUCKETS = (0.0005, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1, 5)
_STALENESS_BUCKETS = (0, 1, 2, 3, 5, 8, 13, 21, 50)
# How often the folder of blobs is measured: it takes a system call per file.
_BLOBS_INTERVAL_S = 60.0

# Counting the states of all devices takes a while with 10,000; nobody scrapes more often than once a second.
FIGURES_INTERVAL_S = 1.0


# A series per counter with the time when this process began it: twice the series, and nothing uses them.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """Prometheus metrics of a server's jobs.

    Args:
        folder: The state folder, whose blobs are measured; None to measure none.
        alerts: Counts open alerts by kind and severity; called from any thread.
    """

    def __init__(
        self,
        folder: Path | None = None,
        alerts: Callable[[], Mapping[tuple[str, str], int]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = CollectorRegistry()
        self.clock = clock
        self.turned_at: float | None = None
        self.connected = False
        self._blobs_measured_at, self._last_blob_bytes = -_BLOBS_INTERVAL_S, 0

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"fedprune_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"fedprune_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"fedprune_{name}", text, labels, registry=self.registry, buckets=buckets)

        gauge("info", "Always 1; the version is a label", "version").labels(__version__).set(1)
        self.round = gauge("round", "The job's current round", "job")
        self.rounds = gauge("rounds", "Rounds that the job has in total", "job")
        self.phase = gauge("phase", "1 for the phase that the job's round is in", "job", "phase")
        self.devices = gauge("devices", "Devices by state", "job", "state")
        self.tasks = gauge("parts", "Devices' parts in the current round, by progress", "job", "progress")
        self.quarantined = gauge("quarantined_devices", "Devices in quarantine", "job")
        self.broker = gauge("broker_connected", "Whether the broker is connected", "job")
        self.queue = gauge("queue_length", "Items that wait in the server, by queue", "job", "queue")
        self.metric = gauge(
            "model_metric", "Measurement of the global model by the server's last evaluation", "job", "metric"
        )
        self.closed = counter("rounds_finished", "Rounds that this process has finished", "job")
        self.counted = counter("updates_counted", "Updates that counted in a finished round", "job")
        self.refused = counter(
            "updates_refused", "Parts of finished rounds without an update that counted", "job", "reason"
        )
        stale_text = "Rounds between an update's offer and its use"
        self.stale = histogram("staleness_rounds", stale_text, _STALENESS_BUCKETS, "job")
        self.seconds = histogram("round_part_seconds", "Seconds of a round's parts", _PART_BUCKETS, "job", "part")
        self.save = histogram("database_save_seconds", "Seconds that saving a turn's events took", _TURN_BUCKETS, "job")
        turn_text = "Seconds of a turn of the loop, without waiting"
        self.turn = histogram("loop_turn_seconds", turn_text, _TURN_BUCKETS, "job")
        self.totals: dict[str, tuple[int, int]] = {}
        self._jobs: dict[str, _JobMetrics] = {}
        self.registry.register(_Collected(self._total_bytes))
        if folder is not None:
            gauge("blobs_bytes", "Bytes of blobs in the state folder").set_function(lambda: self._blob_bytes(folder))
        if alerts is not None:
            self.registry.register(_Collected(partial(_alert_counts, alerts)))

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        """Count what has happened, and from time to time all devices."""
        job, now = self._jobs.get(snapshot.name), self.clock()
        if job is None:
            job = self._jobs[snapshot.name] = _JobMetrics(self, snapshot.name)
        self.turned_at, self.connected = now, snapshot.fleet.broker_connected
        handle_each(events, lambda event: job.count(event.payload, event.happened_at))
        # Not while the loop waits for its database: the snapshot's revoked devices are read from there.
        is_turn_over = bool(events) and isinstance(events[-1].payload, TurnEnded)
        if is_turn_over and now >= job.updated_at + FIGURES_INTERVAL_S:
            job.updated_at = now
            job.update_gauges(snapshot)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _total_bytes(self) -> Metric:
        """Bytes over all starts of the server: a `Counter` of the library begins at zero."""
        text = "Payload bytes, over all starts of the server"
        family = CounterMetricFamily("fedprune_bytes", text, labels=["job", "direction"])
        for job, (down, up) in list(self.totals.items()):
            family.add_metric([job, "down"], down)
            family.add_metric([job, "up"], up)
        return family

    def _blob_bytes(self, folder: Path) -> float:
        """Bytes of blobs, measured once a minute at most."""
        time_now = self.clock()
        if time_now - self._blobs_measured_at >= _BLOBS_INTERVAL_S:
            self._blobs_measured_at = time_now
            self._last_blob_bytes = sum(map(_file_bytes, (folder / "blobs").rglob("*")))
        return float(self._last_blob_bytes)


class _JobMetrics:
    """The figures of one job."""

    def __init__(self, metrics: Metrics, job: str) -> None:
        self._metrics, self._job = metrics, job
        self._started_parts: dict[tuple[str, str], float] = {}
        self._round_started_at: float | None = None
        self.updated_at = -FIGURES_INTERVAL_S
        # Series that begin at zero: a rate of one that appears with its first count misses that count.
        for round_part in ROUND_PARTS:
            metrics.seconds.labels(job, round_part)
        for reason in (kind.value for kind in FailureKind):
            metrics.refused.labels(job, reason)
        for metric in (metrics.counted, metrics.closed, metrics.stale, metrics.save, metrics.turn):
            metric.labels(job)

    def count(self, event: object, at: float) -> None:
        """Count something that has happened at a time."""
        if (timed_part := started_part(event)) is not None:
            if isinstance(event, do.Score):
                self._round_started_at = at
            if isinstance(event, (do.SendOffer, do.PullUpdate)):  # a repeated one continues what the first began
                self._started_parts.setdefault(timed_part, at)
            else:
                self._started_parts[timed_part] = at
        elif (timed_part := finished_part(event)) in self._started_parts and timed_part is not None:
            begun_at = self._started_parts.pop(timed_part)
            self._metrics.seconds.labels(self._job, timed_part[0]).observe(max(0.0, at - begun_at))
        match event:
            case on.UpdateRejected() | on.OfferRefused():
                for name in DEVICE_PARTS:
                    self._started_parts.pop((name, event.device), None)
            case TurnSaved():
                self._metrics.save.labels(self._job).observe(event.seconds)
            case TurnEnded():
                self._metrics.turn.labels(self._job).observe(event.seconds)
            case RoundEnded():
                self._count_round(event.summary, at)

    def _count_round(self, summary: Mapping[str, Any], at: float) -> None:
        job, metrics = self._job, self._metrics
        metrics.closed.labels(job).inc()
        for device_part in summary["devices"].values():
            if device_part["progress"] == Progress.FOLDED.value:
                metrics.counted.labels(job).inc()
                metrics.stale.labels(job).observe(float(device_part.get("staleness", 0)))
            elif device_part["reason"]:
                metrics.refused.labels(job, device_part.get("kind") or FailureKind.OTHER.value).inc()
            else:
                metrics.refused.labels(job, FailureKind.LATE.value).inc()
        for name, value in summary["metrics"].items():
            if isinstance(value, (int, float)):
                metrics.metric.labels(job, name).set(value)
        if self._round_started_at is not None:
            metrics.seconds.labels(job, "round").observe(max(0.0, at - self._round_started_at))
        self._round_started_at = at  # an asynchronous job isn't scored every time
        self._started_parts = {
            (kind, device): started_at
            for (kind, device), started_at in self._started_parts.items()
            if kind in ("train", "pull", "extract") and device not in summary["devices"]
        }

    def update_gauges(self, snapshot: JobSnapshot) -> None:
        job, metrics = self._job, self._metrics
        metrics.totals[job] = snapshot.bytes_down, snapshot.bytes_up
        metrics.round.labels(job).set(snapshot.round)
        metrics.rounds.labels(job).set(snapshot.rounds)
        for phase in Phase:
            metrics.phase.labels(job, phase.value).set(phase is snapshot.phase)
        for state in DEVICE_STATE_LABELS:
            metrics.devices.labels(job, state).set(snapshot.device_states.get(state, 0))
        for progress in Progress:
            metrics.tasks.labels(job, progress.value).set(snapshot.parts_by_progress.get(progress, 0))
        metrics.quarantined.labels(job).set(len(snapshot.fleet.quarantines))
        metrics.broker.labels(job).set(snapshot.fleet.broker_connected)
        for queue, length in snapshot.queues.items():
            metrics.queue.labels(job, queue).set(length)


class _Collected(Collector):
    """A metric that a function computes at each scrape."""

    def __init__(self, compute: Callable[[], Metric]) -> None:
        self._compute = compute

    def collect(self) -> list[Metric]:
        return [self._compute()]


def _alert_counts(alerts: Callable[[], Mapping[tuple[str, str], int]]) -> Metric:
    family = GaugeMetricFamily("fedprune_alerts", "Open alerts", labels=["kind", "severity"])
    for labels, count in alerts().items():
        family.add_metric(labels, count)
    return family


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # deleted meanwhile
        return 0
