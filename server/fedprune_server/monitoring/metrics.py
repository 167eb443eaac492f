"""A server's figures for Prometheus. The loop counts; a scrape reads what was counted, and asks the loop nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fedprune import __version__
from fedprune.coordination import Phase
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.state import Progress
from fedprune_server.monitoring.observer import Observer
from fedprune_server.monitoring.round_parts import OF_DEVICES, PARTS, begun, ended
from fedprune_server.monitoring.view import Facts, JobView

STATES = ("working", "idle", "excluded", "offline", "revoked")

_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 14400)
_SHORT = (0.0005, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1, 5)
_STALE = (0, 1, 2, 3, 5, 8, 13, 21, 50)
_FACTS_S, _BLOBS_S = 1.0, 60.0
_SHARE = 0.02
"""Of the loop's time that figures of all devices may take."""


# A series per counter with the time when this process began it: twice the series, and nothing uses them.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """Prometheus metrics of a server's jobs.

    Args:
        folder: The state folder, whose blobs are measured; None for none.
        alerts: Counts open alerts by kind and severity; called from any thread.
        clock: Monotonic clock.
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
        self._blobs_at, self._blobs = -_BLOBS_S, 0

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"fedprune_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"fedprune_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"fedprune_{name}", text, labels, registry=self.registry, buckets=buckets)

        gauge("info", "Always 1; the version is a label", "version").labels(__version__).set(1)
        self.round = gauge("round", "The job's current round", "job")
        self.rounds = gauge("rounds", "Rounds of the job in all", "job")
        self.phase = gauge("phase", "1 for the phase that the job's round is in", "job", "phase")
        self.devices = gauge("devices", "Devices by state", "job", "state")
        self.tasks = gauge("parts", "Devices' parts in the round by how far they are", "job", "progress")
        self.quarantined = gauge("quarantined_devices", "Devices that are not listened to", "job")
        self.broker = gauge("broker_connected", "Whether the broker is connected", "job")
        self.queue = gauge("queue_length", "What waits in the server", "job", "queue")
        self.metric = gauge("model_metric", "The global model's, as the server measured it last", "job", "metric")
        self.closed = counter("rounds_finished", "Rounds that this process has finished", "job")
        self.counted = counter("updates_counted", "Updates that counted in a finished round", "job")
        self.refused = counter("updates_refused", "Parts of finished rounds that came to nothing", "job", "reason")
        self.stale = histogram("staleness_rounds", "Rounds between an update's offer and its use", _STALE, "job")
        self.seconds = histogram("round_part_seconds", "Seconds of a round's parts", _SECONDS, "job", "part")
        self.save = histogram("database_save_seconds", "Seconds that saving a turn's events took", _SHORT, "job")
        self.turn = histogram("loop_turn_seconds", "Seconds of a turn of the loop, without waiting", _SHORT, "job")
        self.totals: dict[str, Facts] = {}
        self.registry.register(_Totals(self))
        if folder is not None:
            gauge("blobs_bytes", "Bytes of blobs in the state folder").set_function(lambda: self._measured(folder))
        if alerts is not None:
            self.registry.register(_Alerts(alerts))

    def watch(self, job: str) -> JobMetrics:
        return JobMetrics(self, job)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _measured(self, folder: Path) -> float:
        """Bytes of blobs, measured once a minute at most."""
        now = self.clock()
        if now - self._blobs_at >= _BLOBS_S:
            self._blobs_at, self._blobs = now, sum(map(_bytes, (folder / "blobs").rglob("*")))
        return float(self._blobs)


class JobMetrics(Observer):
    def __init__(self, metrics: Metrics, job: str) -> None:
        self._all, self._job, self._clock = metrics, job, metrics.clock
        self._begun: dict[tuple[str, str], float] = {}
        self._round_at: float | None = None
        self._facts_at = 0.0
        for part in PARTS:
            metrics.seconds.labels(job, part)
        for reason in (kind.value for kind in FailureKind):
            metrics.refused.labels(job, reason)
        for made in (metrics.counted, metrics.closed, metrics.stale, metrics.save, metrics.turn):
            made.labels(job)

    def command(self, command: do.Command, now: float) -> None:
        if (part := begun(command)) is None:
            return
        at = self._clock()
        if isinstance(command, do.Score):
            self._round_at = at
        if isinstance(command, (do.SendOffer, do.PullUpdate)):  # which may be repeated
            self._begun.setdefault(part, at)
        else:
            self._begun[part] = at

    def event(self, event: on.Event, now: float) -> None:
        if (part := ended(event)) is not None:
            since = self._begun.pop(part, None)
            if since is not None:
                self._all.seconds.labels(self._job, part[0]).observe(self._clock() - since)
        elif isinstance(event, (on.UpdateRejected, on.OfferRefused)):
            for name in OF_DEVICES:
                self._begun.pop((name, event.device), None)

    def round_over(self, summary: dict[str, Any], now: float, seen: JobView) -> None:
        job, all_ = self._job, self._all
        all_.closed.labels(job).inc()
        for part in summary["devices"].values():
            if part["progress"] == Progress.FOLDED.value:
                all_.counted.labels(job).inc()
                all_.stale.labels(job).observe(float(part.get("staleness", 0)))
            elif part["reason"]:
                all_.refused.labels(job, part.get("kind") or FailureKind.OTHER.value).inc()
            else:
                all_.refused.labels(job, FailureKind.LATE.value).inc()
        for name, value in summary["metrics"].items():
            if isinstance(value, (int, float)):
                all_.metric.labels(job, name).set(value)
        at = self._clock()
        if self._round_at is not None:
            all_.seconds.labels(job, "round").observe(at - self._round_at)
        self._round_at = at  # an asynchronous job isn't scored every time
        kept = ("train", "pull", "extract")
        self._begun = {k: v for k, v in self._begun.items() if k[0] in kept and k[1] not in summary["devices"]}

    def saved(self, seconds: float) -> None:
        self._all.save.labels(self._job).observe(seconds)

    def turned(self, seconds: Callable[[], float], seen: JobView) -> None:
        """Count a turn, and all devices from time to time."""
        now = self._clock()
        self._all.turned_at = now
        self._all.turn.labels(self._job).observe(seconds())
        if now < self._facts_at:
            return
        self._show(seen.facts())
        self._facts_at = now + max(_FACTS_S, (self._clock() - now) / _SHARE)

    def waiting(self) -> None:
        self._all.turned_at = self._clock()

    def _show(self, facts: Facts) -> None:
        job, all_ = self._job, self._all
        all_.connected = facts.connected
        all_.totals[job] = facts
        all_.round.labels(job).set(facts.round)
        all_.rounds.labels(job).set(facts.rounds)
        for phase in Phase:
            all_.phase.labels(job, phase.value).set(phase.value == facts.phase)
        for state in STATES:
            all_.devices.labels(job, state).set(facts.devices.get(state, 0))
        for progress in Progress:
            all_.tasks.labels(job, progress.value).set(facts.tasks.get(progress.value, 0))
        all_.quarantined.labels(job).set(facts.quarantined)
        all_.broker.labels(job).set(facts.connected)
        for queue, length in facts.queues.items():
            all_.queue.labels(job, queue).set(length)


class _Totals(Collector):
    """Counters that continue over restarts of the server."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> list[CounterMetricFamily]:
        found = CounterMetricFamily(
            "fedprune_bytes", "Payload bytes, over all starts of the server", labels=["job", "direction"]
        )
        for job, facts in list(self._metrics.totals.items()):
            found.add_metric([job, "down"], facts.bytes_down)
            found.add_metric([job, "up"], facts.bytes_up)
        return [found]


class _Alerts(Collector):
    def __init__(self, alerts: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        self._alerts = alerts

    def collect(self) -> list[GaugeMetricFamily]:
        found = GaugeMetricFamily("fedprune_alerts", "Alerts that have not gone", labels=["kind", "severity"])
        for (kind, severity), count in self._alerts().items():
            found.add_metric([kind, severity], count)
        return [found]


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # deleted meanwhile
        return 0
