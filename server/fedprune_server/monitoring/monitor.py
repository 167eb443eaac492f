"""Evaluates a running server's alerts once a second, logs those that open or close, and writes the open ones to a file.

The server's loop calls `Monitor.observe`, which counts and evaluates. A thread of the monitor's own reads databases and
certificates, and writes the file (`monitor_record`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprune.coordination import commands as do
from fedprune.core.atomic_file import write_atomically
from fedprune.core.errors import FedpruneError, error_reason
from fedprune.core.lock_wait import wait_reason
from fedprune.core.records import encode_record
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.alert_rules import evaluate_alerts
from fedprune_server.monitoring.alerts import (
    COUNTED_KINDS,
    CRITICAL,
    HANG_THRESHOLD_S,
    INFO,
    WARNING,
    Alert,
    fold_alerts,
)
from fedprune_server.monitoring.job_watch import JobWatch
from fedprune_server.monitoring.monitor_record import ALERTS_FILE, MonitorRecord, read_monitor_record
from fedprune_server.monitoring.participation import AWAY, Participation, find_absent_boards
from fedprune_server.monitoring.site_facts import site_facts
from fedprune_server.monitoring.situation import SiteFacts, Situation, WatchedJob
from fedprune_server.observation.observer import LoopBlocked, ServerEnding, TurnEvent
from fedprune_server.observation.snapshot import FleetSnapshot, JobSnapshot
from fedprune_server.storage.folder_lock import run_id

log = logging.getLogger("fedprune.server")

# How often alerts are evaluated: their delays are seconds to minutes.
EVALUATION_INTERVAL_S = 1.0

# How often the state folder's facts are read, and the open alerts written; both also happen at once when an alert
# changes. Reading takes a while with many boards. The file's readers learn from it whether the loop still turns.
FACTS_INTERVAL_S = 5.0

# Seconds for which the loop may wait for its database before that is an alert. Transactions of commands and of the
# console are shorter, also on a slow disk.
DATABASE_WAIT_LIMIT_S = 10.0

# An error that lasts is logged once a minute.
_LOG_INTERVAL_S = 60.0
# Seconds for which the server's end waits for the thread, which may be reading a database.
_CLOSE_LIMIT_S = 60.0
_LOG_LEVELS = {CRITICAL: logging.ERROR, WARNING: logging.WARNING, INFO: logging.INFO}


class Monitor:
    """Evaluates a server's alerts once a second.

    Args:
        server: Settings of the table [server].
        folders: The state folders of the server's jobs, by the jobs' names.
        book: Open alerts; None for what the last run left open.
        away_rounds: An alert opens after this many rounds without a board that isn't connected; 0 for never.

    Attributes:
        notified_alerts: Returns the alerts of which a notification was sent; called on the monitor's thread.
    """

    def __init__(
        self,
        folder: Path,
        server: Mapping[str, Any],
        folders: Mapping[str, Path],
        *,
        book: AlertBook | None = None,
        away_rounds: int = 0,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._server, self._folders = folder, server, folders
        self._run_id = run_id(folder)
        self._watches: dict[str, JobWatch] = {}
        self._fleet = FleetSnapshot()
        self._away_rounds = away_rounds
        self._free_boards: list[str] = []
        self._next_free_boards_at = 0.0
        self.notified_alerts: Callable[[], Sequence[Alert]] = tuple
        self._clock, self._monotonic = clock, monotonic
        self.book = AlertBook(read_monitor_record(folder).alerts) if book is None else book
        self._former_alerts = self.book.open_alerts
        self._away_since = {a.device: a.since for a in self.book.open_alerts if a.kind == AWAY and a.device is not None}
        self._site: SiteFacts | None = None
        # It couldn't be read: alerts about it may have begun before, and don't close.
        self._site_is_unknown = False
        self._next_at = 0.0
        self._waits_since: float | None = None  # for the database, within a turn of the loop
        self._next_log_at: float | None = None
        # The loop's last turn, by both clocks: the file's readers need a date, `is_hanging` a clock that never jumps.
        self._turned_at, self._observed_at = clock(), monotonic()
        self._stopping, self._wake = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_hanging(self) -> bool:
        """Whether the loop hangs; may be called from any thread."""
        return self._monotonic() - self._observed_at > HANG_THRESHOLD_S

    def open_alerts(self) -> list[Alert]:
        """All open alerts, including a hanging loop; may be called from any thread."""
        if not self.is_hanging:
            return self.book.open_alerts
        hanging = Situation(self._folder, since_turn_s=self._monotonic() - self._observed_at)
        return [*evaluate_alerts(hanging, self._clock()), *self.book.open_alerts]

    def start(self) -> None:
        """Read the site's facts, and start the thread that reads them every few seconds and writes the open alerts."""
        self.read_site()  # before the first evaluation, which would close the earlier run's alerts about the site
        self._thread = threading.Thread(target=self._run, name="fedprune-alerts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; open alerts stay in the file."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_LIMIT_S)
            self._write()

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        """Count what has happened, and evaluate once a second, once all jobs were seen."""
        watch = self._watches.get(snapshot.name)
        if watch is None:
            participation = Participation(snapshot, self._away_rounds, self._away_since, self._clock)
            watch = self._watches[snapshot.name] = JobWatch(snapshot, self._folders[snapshot.name], participation)
        watch.observe(snapshot, events)
        self._fleet = snapshot.fleet
        now, kinds = self._monotonic(), {type(event.payload) for event in events}
        self._turned_at, self._observed_at = self._clock(), now
        if do.Finish in kinds:
            self._next_at = 0.0  # at once: alerts about the job are over, and the server may end with it
        if len(self._watches) < len(self._folders):
            return
        if ServerEnding in kinds:  # the cause of the end (a full disk, a successor) is an alert, too
            self.read_site()
            self.evaluate(closes=False)
        elif LoopBlocked in kinds:
            self._waits_since = now if self._waits_since is None else self._waits_since
            if now >= self._next_at and now - self._waits_since >= DATABASE_WAIT_LIMIT_S:
                self._next_at = now + EVALUATION_INTERVAL_S
                self.evaluate(wait_reason())
        else:
            self._waits_since = None
            if now >= self._next_at:
                self._next_at = now + EVALUATION_INTERVAL_S
                self.evaluate()

    def evaluate(self, waits_for: str = "", *, closes: bool = True) -> None:
        """Evaluate the alerts.

        Args:
            waits_for: What the loop waits for. Then nothing else is read, since that would wait for the same database:
                no other alert opens or closes.
            closes: Whether alerts may close. At the server's end their causes may be hidden, and aren't gone.
        """
        unix_now, now = self._clock(), self._monotonic()
        # Not at every evaluation: it takes a while with many boards.
        if not waits_for and now >= self._next_free_boards_at:
            self._next_free_boards_at, fleet = now + FACTS_INTERVAL_S, self._fleet
            free = set(fleet.connected_devices) - fleet.job_of_device.keys() if fleet.has_several_jobs else ()
            self._free_boards = sorted(free)
        situation = Situation(self._folder, waits_for=waits_for) if waits_for else self._situation()
        alerts = evaluate_alerts(situation, unix_now)
        if waits_for or not closes or self._site_is_unknown:
            alerts = [*self.book.open_alerts, *alerts]
        else:
            alerts = [*self._carried_alerts(situation.jobs), *alerts]
        closing = self.book.closing_keys
        changes = self.book.update(alerts, now, unix_now)
        for alert in fold_alerts(change.alert for change in changes if change.closed_at is None):
            log.log(_LOG_LEVELS[alert.severity], "alert: %s", alert.text)
        for alert in fold_alerts(change.alert for change in changes if change.closed_at is not None):
            log.info("the alert is over: %s", alert.what)
        if changes or self.book.closing_keys != closing:
            self._wake.set()

    def _carried_alerts(self, jobs: Sequence[WatchedJob]) -> list[Alert]:
        """Alerts of the server's last run that stay open because this run can't judge them yet.

        They are about jobs of which no round has ended since the start. The counts behind them were not stored.
        """
        if self._former_alerts:
            names = [job.snapshot.name for job in jobs if not job.snapshot.is_finished]
            unproven = {name for name in names if not self._watches[name].rounds_ended}
            subjects = {*unproven, None} if unproven else set()  # some are about a board, whatever its job
            counted = (a for a in self._former_alerts if a.kind in COUNTED_KINDS)
            self._former_alerts = [a for a in counted if (a.job or None) in subjects]
        return self._former_alerts

    def read_site(self) -> None:
        """Read the facts of the state folder; unreadable ones stay as they were."""
        try:
            self._site = site_facts(self._folder, self._server, earlier=self._site)
            self._site_is_unknown = False
        except Exception as error:  # noqa: BLE001 - as above
            self._site_is_unknown = self._site is None
            self._log_failure(error)

    def _situation(self) -> Situation:
        jobs, fleet = [watch.watched_job() for watch in self._watches.values()], self._fleet
        participations = (watch.participation for watch in self._watches.values())
        return Situation(
            self._folder,
            jobs,
            len(fleet.connected_devices) if fleet.has_several_jobs else jobs[0].snapshot.able_devices,
            broker_problem="" if fleet.broker_connected else "there is no connection to the broker",
            absences=find_absent_boards(participations, fleet, self._clock()),
            flooding_client=fleet.flooding_client,
            site=self._site,
            open_severities=self.book.open_severities,
        )

    def _run(self) -> None:
        self._write()
        while True:
            self._wake.wait(FACTS_INTERVAL_S)
            self._wake.clear()
            if self._stopping.is_set():
                return
            self.read_site()
            self._write()

    def _write(self) -> None:
        book, free = self.book, frozenset(self._free_boards)
        record = MonitorRecord(
            self._turned_at, book.open_alerts, self.notified_alerts(), free, self._run_id, book.closing_keys
        )
        try:
            write_atomically(self._folder / ALERTS_FILE, encode_record(record), private=True)
        except (FedpruneError, OSError) as error:
            self._log_failure(error)

    def _log_failure(self, error: Exception) -> None:
        now = self._monotonic()
        if self._next_log_at is None or now >= self._next_log_at:
            self._next_log_at = now + _LOG_INTERVAL_S
            text = error if isinstance(error, FedpruneError) else f"{type(error).__name__}: {error_reason(error)}"
            log.error("alerts can't be worked out or written: %s", text)
