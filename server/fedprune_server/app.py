"""Builds a server from its configuration: the one place where its parts are put together."""

from __future__ import annotations

import logging
import os
import shlex
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from fedprune import __version__
from fedprune.coordination import Phase
from fedprune.coordination import commands as do
from fedprune.core.errors import MissingExtraError
from fedprune.core.text import amount, round_text
from fedprune.output.log_lines import JSON
from fedprune.planning.profile_store import find_profile, profile_names
from fedprune.wire.topics import Topics
from fedprune_server.config.alert_settings import OFF
from fedprune_server.config.network_settings import without_password
from fedprune_server.config.server_config import ReportSettings, ServerConfig
from fedprune_server.devices.crash_store import CrashStore
from fedprune_server.engine.further_jobs import further_configs
from fedprune_server.engine.job_runner import JobRunner
from fedprune_server.engine.runnable_job import DeviceServices, RunnableJob
from fedprune_server.engine.server import Server
from fedprune_server.engine.state_folder import OpenJob, StateFolder
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.executor import divergence
from fedprune_server.executor.background import CommandExecutor
from fedprune_server.executor.helper_processes import with_helpers
from fedprune_server.maintenance.backup_manifest import restore_text
from fedprune_server.messaging.broker.revocations import list_delivery
from fedprune_server.messaging.connection import ServerConnection, open_connection, open_identity
from fedprune_server.messaging.second_server import SecondServerGuard, ServerInstance, second_server_guard
from fedprune_server.messaging.transport import SiteLink
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.display import RoundLines, make_display
from fedprune_server.monitoring.monitor import Monitor
from fedprune_server.monitoring.monitor_record import read_monitor_record
from fedprune_server.monitoring.notification_channels import notification_channels
from fedprune_server.monitoring.notifications import Notifier
from fedprune_server.observation.observer import Observer, TurnEvent
from fedprune_server.observation.snapshot import JobSnapshot
from fedprune_server.ota.store import RolloutStore
from fedprune_server.storage.open_database import open_database
from fedprune_server.transfer.http import web_blobs
from fedprune_server.web.database import CONSOLE_FILE as CONSOLE
from fedprune_server.web.database import ConsoleDatabase
from fedprune_server.web.observer import ConsoleObserver, console_start
from fedprune_server.web.process import ConsoleProcess
from fedprune_server.web.start_checks import check_address_free, check_console
from fedprune_server.web.state.membership_poller import MembershipPoller
from fedprune_server.web.state.order_handler import AdminExecutor, OrderHandler
from fedprune_server.web.state.order_queue import OrderQueue
from fedprune_server.web.state.publisher import StatusPublisher
from fedprune_server.web.state.status_writer import STATUS_FILE, StatusWriter

log = logging.getLogger("fedprune.server")

# OpenTelemetry's own variables: where one is set, traces are sent without a setting of ours.
_TRACE_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


@dataclass(frozen=True)
class StartOptions:
    """How a server is started, apart from its configuration.

    Attributes:
        jobs: Configuration files of further jobs.
        insecure: Do without identity, TLS and signatures, on this machine alone.
        until_finished: End when all jobs are done.
    """

    jobs: Sequence[Path] = ()
    insecure: bool = False
    until_finished: bool = False


@dataclass(frozen=True)
class App:
    """A server that is ready to run.

    Attributes:
        folders: The state folders of its jobs.
        guard: Finds other servers of its identity; None without an identity.
        until_finished: End when all jobs are done.
    """

    server: Server
    folders: Sequence[StateFolder]
    guard: SecondServerGuard | None
    connection: ServerConnection
    until_finished: bool

    def run(self) -> None:
        """Run the server until it is stopped. Raises as `Server.run`, and if another server does."""
        self.server.run(until_finished=self.until_finished)
        for folder in self.folders:
            folder.lease.confirm()
        if self.guard is not None:
            self.guard.confirm()
        totals = [runner.registry.total_traffic for runner in self.server.runners.values()]
        down, up = (amount(sum(total), "bytes") for total in zip(*totals, strict=True))
        log.info("%s of payload to devices and %s from them, over all starts", down, up)


@contextmanager
def build_app(
    config: ServerConfig,
    options: StartOptions,
    stopping: threading.Event,
    folder: StateFolder | None = None,
    observers: Sequence[Observer] = (),
) -> Iterator[App]:
    """A server with its connections, open and ready to run; closed in reverse order at the end.

    Args:
        config: The configuration of the server and its first job.
        stopping: Ends the server's loop when set: by a signal, or since another server has taken over.
        folder: The state folder, if the caller has opened it already.
        observers: Observers in addition to those that are configured.

    Raises `FedpruneError` if a part of the configuration can't be used, or another server runs on the same state.
    """
    with ExitStack() as stack:
        check_console(config)
        notification_channels(config.alerts)
        identity = stack.enter_context(open_identity(config, insecure=options.insecure))
        folder = folder or stack.enter_context(StateFolder(config.state, config.database, stopping=stopping))
        if identity is not None:
            identity.use_database(folder.storage.database)
        if copy := restore_text(config.state):
            log.info("%s was %s", config.state, copy)
        profiles = _checked_profile_folders(config)
        crashes = stack.enter_context(CrashStore(config.state))
        alerts = AlertBook(read_monitor_record(config.state).alerts)
        exporters = [*_metrics_observers(stack, config, folder, alerts), *_trace_observers(stack, config)]
        jobs = _prepare_jobs(stack, config, options, folder, stopping)
        connection = stack.enter_context(open_connection(config, identity))
        if connection.broker is not None:
            log.info("embedded broker: %s on %s:%d", connection.broker.program, config.host, connection.broker.port)
        # Before the ports of blobs and console are opened: if another server of this identity has them, the error says
        # so. Until here, a copy that was started by mistake has changed nothing outside its own folder.
        guard = None
        if identity is not None:
            instance = ServerInstance(config.state, folder.lease.shared, owns_broker=connection.broker is not None)
            guard = stack.enter_context(second_server_guard(connection.url, identity, config.ca, instance, stopping))
            guard.enter()
        services = DeviceServices(
            rollouts=None if identity is None else RolloutStore(config.state, folder.storage.database),
            members=None if identity is None else identity.store.members,
            crashes=crashes,
            blobs=stack.enter_context(web_blobs(config, identity, connection.link.wake)),
        )
        site = SiteLink(connection.wire, Topics(connection.site), connection.quarantine, config.max_packet)
        runners = _make_runners(config, jobs, site, services, profiles)
        # A table for a single job at a terminal; made before the first log lines, which scroll by above it.
        display = RoundLines() if len(jobs) > 1 or config.log_format == JSON else make_display()
        for job in jobs:
            job.log_start()
        if identity is not None:
            stack.enter_context(list_delivery(config.on_revocation, config.state, identity.authority.crl_path))
        for line in chain.from_iterable(job.opened.setting_changes for job in jobs):
            log.warning("setting changed since the last start: %s", line)
        all_observers = [
            display,
            *exporters,
            *(_NextSteps(job, until_finished=options.until_finished) for job in jobs),
            *_tracker_observers(stack, jobs),
            stack.enter_context(monitoring(config, {job.opened.job.name: job.config.state for job in jobs}, alerts)),
            *_console_observers(stack, config, connection, identity, runners, alerts),
            *observers,
        ]
        server = Server(runners, site, connection.broker, stopping, config.connected, all_observers)
        connection.start()
        for job in jobs:
            job.folder.save_job(job.opened)  # only now: a broker that can't be reached is not stored for the next start
        yield App(server, [job.folder for job in jobs], guard, connection, options.until_finished)


def _make_runners(
    config: ServerConfig,
    jobs: Sequence[_PreparedJob],
    site: SiteLink,
    services: DeviceServices,
    profiles: Sequence[Path],
) -> list[JobRunner]:
    """The runners of all jobs over one connection; blobs are served to the devices of each."""
    # The first runner also handles what concerns no job, such as releases and crashes.
    further_services = DeviceServices(blobs=services.blobs)
    runners = [
        JobRunner(
            job.runnable(),
            site,
            services if job is jobs[0] else further_services,
            profiles=profiles,
            max_devices=config.max_devices,
        )
        for job in jobs
    ]
    services.blobs.serve([runner.served_job for runner in runners])
    return runners


@dataclass(frozen=True)
class _PreparedJob:
    """A job that is read from its state folder, with the worker that computes for it."""

    config: ServerConfig
    folder: StateFolder
    opened: OpenJob
    worker: CommandExecutor

    def runnable(self) -> RunnableJob:
        opened, config = self.opened, self.config
        return RunnableJob(
            opened.job,
            opened.model.architecture,
            opened.state,
            self.folder.storage,
            self.folder.store,
            self.worker,
            opened.model.frozen,
            keep=config.keep,
            pulls=config.pulls,
            weight=config.weight,
            prefix=opened.worker.prefix,
        )

    def log_start(self) -> None:
        """Log the job's model and progress at the start."""
        opened = self.opened
        for note in opened.model.notes:
            log.info("model: %s", note)
        log.info(
            "job %s, round %s, state in %s, %d groups of channels, %s",
            opened.job.name,
            round_text(opened.state.round, opened.job.rounds),
            self.config.state,
            len(opened.model.architecture.groups),
            "finished in its last run"
            if opened.state.phase is Phase.FINISHED and opened.state.round < opened.job.rounds
            else opened.state.phase.value,
        )


class _NextSteps:
    """Logs the next steps with a finished job: export its model, and end the server."""

    def __init__(self, job: _PreparedJob, *, until_finished: bool) -> None:
        self._job, self._until_finished = job, until_finished

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        opened, config = self._job.opened, self._job.config
        if snapshot.name != opened.job.name or not any(isinstance(e.payload, do.Finish) for e in events):
            return
        uncalibrated = divergence.is_uncalibrated(
            opened.model.architecture, opened.job.recipe, config.calibration, opened.model.frozen
        )
        if spoilt := divergence.diagnose_history(snapshot.history, opened.job.to_dict(), uncalibrated=uncalibrated):
            log.warning("%s", spoilt)
        state = shlex.quote(str(config.state))
        code = f" --allow {shlex.quote(opened.job.strategy)}" if ":" in opened.job.strategy else ""
        log.info("to take the model out: fedprune-server export-model --state %s --out global.onnx%s", state, code)
        if not self._until_finished:
            log.info(
                "the server keeps running, so that boards that connect later learn that the job is finished. "
                "Ctrl-C ends it; with --until-finished it ends by itself. "
                "For more rounds, start it again with a higher --rounds. If a total of the job has ended it, such as "
                "total_bytes, raise that."
            )


def _checked_profile_folders(config: ServerConfig) -> tuple[Path, ...]:
    """Folders of hardware profiles in addition to the shipped profiles. Raises `ProfileError` if a profile is broken:
    that ends the start, instead of a round in which a board needs it."""
    folders = () if config.profiles is None else (config.profiles,)
    for name in profile_names(folders) if folders else ():
        find_profile(name, folders)
    return folders


def _prepare_jobs(
    stack: ExitStack, config: ServerConfig, options: StartOptions, folder: StateFolder, stopping: threading.Event
) -> list[_PreparedJob]:
    """The server's jobs; the first one is in the state folder itself, each further one in a folder of its own."""
    configs = [config, *further_configs(config, options.jobs)]
    jobs = []
    for job_config in configs:
        job_folder = folder
        if job_config.state != config.state:
            job_folder = stack.enter_context(StateFolder(job_config.state, job_config.database, stopping=stopping))
        opened = job_folder.read_job(job_config, f"{job_config.job.name}: " if len(configs) > 1 else "")
        worker = stack.enter_context(with_helpers(opened.worker, job_config.workers, job_config.workers_url))
        jobs.append(_PreparedJob(job_config, job_folder, opened, worker))
    return jobs


def _tracker_observers(stack: ExitStack, jobs: Sequence[_PreparedJob]) -> Iterator[Observer]:
    """The observers that write jobs' rounds to experiment trackers, if any are configured."""
    for job in jobs:
        if job.config.tracker_targets:
            from fedprune_server.monitoring.job_tracker import JobTracker

            opened, store = job.opened, job.folder.store.local()
            tracker = JobTracker(
                job.config.tracker_targets, opened.job, opened.model, job.config.state, store, opened.state.history
            )
            stack.callback(tracker.close)
            yield tracker


def _metrics_observers(
    stack: ExitStack, config: ServerConfig, folder: StateFolder, alerts: AlertBook
) -> Iterator[Observer]:
    """The observer that exports metrics over HTTP, if it is configured."""
    if config.metrics_address is not None:
        with _extra_needed("metrics", "console"):
            from fedprune_server.monitoring.http import serve_metrics
            from fedprune_server.monitoring.metrics import Metrics
        metrics = Metrics(config.state, alerts.counts)
        ready = {"database": folder.lease.trouble, "broker": lambda: "" if metrics.connected else "not connected"}
        stack.enter_context(serve_metrics(config.metrics_address, metrics, ready, config.console_host_names))
        yield metrics


def _trace_observers(stack: ExitStack, config: ReportSettings) -> Iterator[Observer]:
    """The observer that exports traces, if they are configured here or by OpenTelemetry's variables."""
    if config.traces != OFF or any(os.environ.get(name) for name in _TRACE_VARIABLES):
        with _extra_needed("traces", "tracing"):
            from fedprune_server.monitoring.traces import Traces, span_tracer
        yield Traces(stack.enter_context(span_tracer(None if config.traces == OFF else config.traces)))


@contextmanager
def _extra_needed(feature: str, extra: str) -> Iterator[None]:
    """Turn the import of a missing package into an error that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fedprune"):  # a fault of ours, which no extra would mend
            raise
        raise MissingExtraError(f"{feature} need {error.name}, which is not installed", extra=extra) from error


@contextmanager
def monitoring(config: ServerConfig, folders: Mapping[str, Path], alerts: AlertBook) -> Iterator[Monitor]:
    """The monitor of a server: it logs alerts, sends notifications, and keeps a book for console and metrics.

    `folders` are the state folders of the jobs, by the jobs' names. Raises `ConfigError` if a secret's file of [alerts]
    can't be used.
    """
    # With pace steering, boards are away for most of the time by design: rounds without them are no alert.
    away_rounds = 0 if config.connected else config.alerts.away_rounds
    monitor = Monitor(config.state, config.server_settings(), folders, book=alerts, away_rounds=away_rounds)
    with ExitStack() as stack:
        notified = read_monitor_record(config.state).notified_alerts
        notifier = Notifier(config.alerts, config.site, monitor.open_alerts, lambda: not monitor.is_hanging, notified)
        monitor.notified_alerts = notifier.notified_alerts
        # Closed in reverse order: the monitor records the notifier's last messages.
        stack.callback(monitor.close)
        stack.callback(notifier.close)
        monitor.start()
        yield monitor


def _console_observers(
    stack: ExitStack,
    config: ServerConfig,
    connection: ServerConnection,
    identity: IdentityFolder | None,
    runners: Sequence[JobRunner],
    alerts: AlertBook,
) -> Iterator[Observer]:
    """The console, if there is one, of a server whose settings `check_console` has checked."""
    if config.console_address is None:
        return
    address, port = config.console_address
    check_address_free(address, port)
    from fedprune_server.web.auth.accounts import Accounts  # needs the extra

    database = stack.enter_context(ConsoleDatabase(config.state / CONSOLE))
    orders = OrderQueue(database)
    members = rollouts = executor = None
    if identity is not None:
        read_only_database = stack.enter_context(open_database(config.state, config.database, read_only=True))
        members = IdentityStore(read_only_database)
        executor = AdminExecutor(config.state, config.console_releases, orders.answer)
        rollouts = RolloutStore(config.state, read_only_database, read_only=True)
    poller = MembershipPoller(members, rollouts, tuple if executor is None else executor.release_names)
    stack.callback(poller.close)
    poller.start()
    if len(Accounts(database)) == 0:
        log.warning(
            "no operator can log in to the console yet: fedprune-server operators add NAME --role admin --state %s",
            config.state,
        )
    writer = stack.enter_context(StatusWriter(config.state / STATUS_FILE))
    site_facts = {
        "version": __version__,
        "site": connection.site,
        "started_at": time.time(),
        "broker": without_password(connection.url),
        "database": without_password(config.database or "sqlite").partition("?")[0],
        "blobs": config.blobs,
        "insecure": identity is None,
    }
    publisher = StatusPublisher(site_facts, writer, poller=poller, alerts=alerts)
    handler = OrderHandler(
        orders, publisher, {runner.job.name: runner for runner in runners}, connection.quarantine,
        config.state, executor, allowed=config.console_orders,
    )  # fmt: skip
    observer = ConsoleObserver(publisher, handler, ConsoleProcess(console_start(config, address, port)))
    stack.callback(observer.close)
    logger = logging.getLogger("fedprune")
    logger.addHandler(publisher.tap)
    stack.callback(logger.removeHandler, publisher.tap)
    yield observer
