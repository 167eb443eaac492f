"""The running server's alerts: it looks once a second, logs what opens and closes, and keeps the open ones in a file.

The loop's thread looks at the jobs and evaluates. A thread of the monitor's own reads databases and certificates, and
writes `alerts.json`, from which `fedprune-server doctor` sees the open alerts and when the loop turned last.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedprune.coordination import Phase
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import has_lock_holder
from fedprune.core.errors import FedpruneError, StorageError, error_reason
from fedprune.core.lock_wait import wait_reason
from fedprune.core.records import decode_record, encode_record
from fedprune.core.text import amount
from fedprune.jobs.state import Progress
from fedprune_server.devices.plan_vs_actual import QUANTITIES
from fedprune_server.monitoring.alert_book import AlertBook, AlertChange
from fedprune_server.monitoring.alert_rules import ALERT_SEVERITIES, evaluate_alerts
from fedprune_server.monitoring.alerts import (
    COUNTED_KINDS,
    CRITICAL,
    HANG_THRESHOLD_S,
    INFO,
    MAX_NAMES_SHOWN,
    WARNING,
    Alert,
)
from fedprune_server.monitoring.participation import AWAY, Participation, find_absent_boards
from fedprune_server.monitoring.round_times import RoundTimes
from fedprune_server.monitoring.site_facts import site_facts
from fedprune_server.monitoring.situation import SiteFacts, Situation, WatchedJob
from fedprune_server.observation.observer import LoopBlocked, RoundEnded, ServerEnding, TurnEvent, handle_each
from fedprune_server.observation.snapshot import FleetSnapshot, JobSnapshot
from fedprune_server.storage.state_folder import LOCK_FILE, run_id

log = logging.getLogger("fedprune.server")

# In the state folder: `doctor` and `status` are other processes, and must work while the server hangs.
ALERTS_FILE = "alerts.json"

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
# Ticks come at a deadline, which floats may put a little before it.
_ROUNDING_S = 1e-3
_LOG_LEVELS = {CRITICAL: logging.ERROR, WARNING: logging.WARNING, INFO: logging.INFO}

# The ratio of measurement to prediction that is an alert. Time may double while another program runs on a board; memory
# doesn't depend on other programs, and a board that needs more than it has is killed.
_EXCESS_LIMITS = {"step_seconds": 2.0, "latency_seconds": 2.0, "peak_memory_bytes": 1.25}


class JobWatch:
    """Counts the events of a job from which its alerts derive.

    Attributes:
        rounds_ended: How many rounds have ended since the start.
    """

    def __init__(self, snapshot: JobSnapshot, folder: Path, participation: Participation) -> None:
        self._snapshot, self._folder, self.participation = snapshot, folder, participation
        self._missed_deadlines = self._empty_rounds = self._closing_updates = self.rounds_ended = 0
        self._asked_at: float | None = None  # the first offer since an update counted
        self._round_times = RoundTimes()
        self._excesses: Mapping[str, str] = prediction_excesses(snapshot)

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        self._snapshot = snapshot
        self.participation.observe(snapshot, events)
        handle_each(events, lambda event: self._count(event.payload, event.happened_at))
        # Once for all events of a turn: the snapshot is of its end.
        has_refusals = any(isinstance(event.payload, (on.OfferRefused, on.UpdateRejected)) for event in events)
        if has_refusals and snapshot.phase is Phase.TRAINING and not snapshot.is_asynchronous:
            refused = snapshot.parts_by_progress.get(Progress.REFUSED, 0)
            self._empty_rounds += 0 < refused == sum(snapshot.parts_by_progress.values())

    def _count(self, event: object, now: float) -> None:
        snapshot = self._snapshot
        match event:
            case do.Close():
                self._closing_updates = len(event.contributions)
            case do.SendOffer() if self._asked_at is None:
                self._asked_at = now
            case on.Folded() | on.Paused():
                self._missed_deadlines = 0
                self._asked_at = now if snapshot.is_asynchronous else None  # others are being asked meanwhile
            case on.Closed() if self._closing_updates and len(event.rejected) >= self._closing_updates:
                self._empty_rounds += 1
            case on.Ticked() if self._asked_at is not None:
                missed = int((now - self._asked_at + _ROUNDING_S) // snapshot.deadline_s)
                self._missed_deadlines = max(self._missed_deadlines, missed)
            case RoundEnded(summary):
                has_counted = any(p["progress"] == Progress.FOLDED.value for p in summary["devices"].values())
                self._empty_rounds = 0 if has_counted else self._empty_rounds + 1
                self.rounds_ended += 1
                self._round_times.note_end(summary["round"], now)
                self._excesses = prediction_excesses(snapshot, self._excesses)

    def watched_job(self) -> WatchedJob:
        """The job as the rules see it."""
        self.participation.update()
        snapshot, away_since = self._snapshot, self.participation.away_since
        needs_boards = snapshot.phase is Phase.WAITING or not snapshot.able_devices
        missing_boards = (
            (name for name in away_since if name not in snapshot.revoked_devices) if needs_boards else iter(())
        )
        return WatchedJob(
            snapshot=snapshot,
            folder=self._folder,
            away_boards=tuple(islice(missing_boards, MAX_NAMES_SHOWN + 1)),
            missed_deadlines=self._missed_deadlines,
            empty_rounds=self._empty_rounds,
            prediction_excesses=self._excesses,
            offline_since=self.participation.offline_since(),
            usual_round_s=self._round_times.usual_s(),
        )


def prediction_excesses(snapshot: JobSnapshot, earlier: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Boards whose time or memory exceeded the prediction by far in their latest round, and by how much.

    Args:
        earlier: The same after the round before. These boards stay until half of the excess is gone.
    """
    excesses = {name: text for name, text in earlier.items() if name in snapshot.devices}
    for name, comparison in snapshot.comparisons.items():
        excesses.pop(name, None)
        for metric, (expected, measured) in comparison.items():
            limit = (1.0 + _EXCESS_LIMITS[metric]) / 2 if name in earlier else _EXCESS_LIMITS[metric]
            if expected and measured and measured > limit * expected:
                title, _, unit = QUANTITIES[metric]
                text = f"{title} {amount(measured, unit)} instead of {amount(expected, unit)}"
                excesses[name] = f"{excesses[name]}, {text}" if name in excesses else text
    return excesses


class Monitor:
    """Evaluates a server's alerts once a second.

    Args:
        server: Settings of the table [server].
        folders: The state folders of the server's jobs, by the jobs' names.
        book: Open alerts; None for what the last run left open.
        away_rounds: Rounds that end without a board that isn't connected until it is an alert; 0 for never.
        clock: Seconds since 1970.
        monotonic: The monotonic clock.

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
        self._site_is_unknown = False  # it couldn't be read: alerts about it may have begun before, and don't close
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
        """Read the site's facts, and start the thread that reads them again and again and writes the open alerts."""
        self.read_site()  # before the first evaluation, which would close the earlier run's alerts about the site
        self._thread = threading.Thread(target=self._run, name="fedprune-alerts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; open alerts stay in the file."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_LOG_INTERVAL_S)
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
        if ServerEnding in kinds:  # what ends the server (a full disk, a successor) is an alert, too
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
            waits_for: What the loop waits for. Then nothing else is read, since that would wait for the same database,
                so that no other alert opens or closes.
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
        for change in changes:
            _log_change(change)
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
        recorded = MonitorRecord(
            self._turned_at, book.open_alerts, self.notified_alerts(), free, self._run_id, book.closing_keys
        )
        try:
            write_atomically(self._folder / ALERTS_FILE, encode_record(recorded), private=True)
        except (FedpruneError, OSError) as error:
            self._log_failure(error)

    def _log_failure(self, error: Exception) -> None:
        now = self._monotonic()
        if self._next_log_at is None or now >= self._next_log_at:
            self._next_log_at = now + _LOG_INTERVAL_S
            text = error if isinstance(error, FedpruneError) else f"{type(error).__name__}: {error_reason(error)}"
            log.error("alerts can't be worked out or written: %s", text)


@dataclass(frozen=True)
class MonitorRecord:
    """The last record of the monitor of a folder's server, as `alerts.json` has it.

    Attributes:
        run_id: Which run of the server it was (`storage.state_folder.run_id`).
        turned_at: The last turn of the server's loop, in seconds since 1970; None if nothing was written, or the file
            is damaged.
        alerts: Its open alerts.
        notified_alerts: Alerts whose opening was notified, but not their end.
        free_boards: The boards that are connected and at none of its jobs.
        closing_keys: Keys of open alerts whose cause has gone, and which close unless it comes again.
    """

    turned_at: float | None = None
    alerts: Sequence[Alert] = ()
    notified_alerts: Sequence[Alert] = ()
    free_boards: frozenset[str] = frozenset()
    run_id: str = ""
    closing_keys: frozenset[str] = frozenset()

    @property
    def current_alerts(self) -> list[Alert]:
        """Open alerts whose cause lasts, for those who ask what is wrong now."""
        return [alert for alert in self.alerts if alert.key not in self.closing_keys]


def read_running_monitor(folder: Path) -> MonitorRecord:
    """The record of a running server's monitor, some seconds old; empty if none runs, or it is still starting."""
    recorded = read_monitor_record(folder) if has_lock_holder(folder / LOCK_FILE) else MonitorRecord()
    return recorded if recorded.run_id == run_id(folder) else MonitorRecord()


def read_monitor_record(folder: Path) -> MonitorRecord:
    """The last record of a folder's monitor, which is old if its server has ended."""
    try:
        recorded = decode_record(MonitorRecord, (folder / ALERTS_FILE).read_bytes(), ALERTS_FILE, StorageError)
    except (OSError, StorageError):
        return MonitorRecord()
    known_alerts = [a for a in recorded.alerts if a.severity in ALERT_SEVERITIES.get(a.kind, ())]
    return replace(recorded, alerts=known_alerts)


def _log_change(change: AlertChange) -> None:
    alert = change.alert
    if change.closed_at is None:
        log.log(_LOG_LEVELS[alert.severity], "alert: %s", alert.text)
    else:
        log.info("the alert is over: %s", alert.what)
