"""What a configuration wants to have watched, put together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from fedprune.core.errors import MissingExtraError
from fedprune_server.config.alert_settings import OFF
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.alerts import OtherServer
from fedprune_server.monitoring.monitor import Monitor, read_notified
from fedprune_server.monitoring.notifications import Notifier
from fedprune_server.monitoring.observer import Observer, Observers
from fedprune_server.monitoring.view import JobView

Alerts = Callable[[], Mapping[tuple[str, str], int]]


class WatchedJob(Protocol):
    """A job that observers can join."""

    observers: Observers

    @property
    def view(self) -> JobView:
        """What there is to see."""


Watcher = Callable[[str], list[Observer]]
"""Gives those who look on at a job, by its name."""

_ENVIRONMENT = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


@contextmanager
def watching(
    config: ServerConfig, ready: dict[str, Callable[[], str]], alerts: Alerts | None = None
) -> Iterator[Watcher]:
    """Observers for a server's jobs: metrics and spans, as far as they are configured.

    Args:
        config: The configuration.
        ready: By name what must be so for the server to be ready; more may be put in later.
        alerts: Counts alerts by kind and severity; None without metrics of them.

    Raises:
        ConfigError: The address of `metrics` can't be listened on.
        MissingExtraError: A package is missing.
    """
    makers: list[Callable[[str], Observer]] = []
    with ExitStack() as stack:
        place = config.metrics_place
        if place is not None:
            try:
                from fedprune_server.monitoring.http import served
                from fedprune_server.monitoring.metrics import Metrics
            except ModuleNotFoundError as error:
                raise _missing("metrics", "console", error) from error
            metrics = Metrics(config.state, alerts)
            ready["broker"] = lambda: "" if metrics.connected else "not connected"
            stack.enter_context(served(place, metrics, ready))
            makers.append(metrics.watch)
        if config.traces != OFF or any(os.environ.get(name) for name in _ENVIRONMENT):
            try:
                from fedprune_server.monitoring.traces import JobTraces, traced
            except ModuleNotFoundError as error:
                raise _missing("traces", "tracing", error) from error
            tracer = stack.enter_context(traced(None if config.traces == OFF else config.traces))
            makers.append(lambda job: JobTraces(tracer, job))
        yield lambda job: [make(job) for make in makers]


@contextmanager
def monitoring(
    config: ServerConfig,
    jobs: Sequence[tuple[WatchedJob, Path]],
    book: AlertBook,
    here: Callable[[], int] | None = None,
    others: Callable[[], Sequence[OtherServer]] = tuple,
) -> Iterator[Monitor]:
    """Alerts of a server: logged, notified, and kept in a book for console and metrics.

    Args:
        config: The configuration.
        jobs: The jobs and their state folders.
        book: The book.
        here: Says how many boards are connected, of several jobs.
        others: Says which other servers of this identity were heard.

    Raises:
        ConfigError: A secret's file of [alerts] can't be used.
    """
    views = [(job.view, folder) for job, folder in jobs]
    monitor = Monitor(config.state, config.server_settings(), views, here=here, others=others, book=book)
    for job, _ in jobs:
        job.observers.join(monitor.watches[job.view.job.name])
    jobs[0][0].observers.join(monitor)
    notified = read_notified(config.state)
    with ExitStack() as stack:
        notifier = Notifier(config.alerts, config.site, monitor.open, lambda: not monitor.hangs, notified)
        monitor.notified = notifier.notified
        stack.callback(monitor.close)  # after the notifier's last messages, which it writes down
        stack.callback(notifier.close)
        monitor.start()
        yield monitor


def _missing(what: str, extra: str, error: ModuleNotFoundError) -> MissingExtraError:
    if (error.name or "").startswith("fedprune"):
        raise error
    return MissingExtraError(f"{what} need {error.name}, which is not installed", extra=extra)
