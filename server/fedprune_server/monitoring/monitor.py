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
from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import held
from fedprune.core.errors import FedpruneError, StorageError, reason
from fedprune.core.lock_wait import wait_reason
from fedprune.core.records import read, write
from fedprune.core.text import amount
from fedprune.jobs.state import Progress
from fedprune_server.devices.plan_vs_actual import QUANTITIES
from fedprune_server.monitoring.alert_book import AlertBook, AlertChange
from fedprune_server.monitoring.alert_rules import ALERT_SEVERITIES, evaluate_alerts
from fedprune_server.monitoring.alerts import (
    COUNTED,
    CRITICAL,
    HANG_THRESHOLD_S,
    INFO,
    MAX_NAMES_SHOWN,
    WARNING,
    Alert,
)
from fedprune_server.monitoring.participation import (
    AWAY,
    Participation,
    find_absent_boards,
)
from fedprune_server.monitoring.round_times import RoundTimes
from fedprune_server.monitoring.site_facts import site_facts
from fedprune_server.monitoring.situation import SiteFacts, Situation, WatchedJob
from fedprune_server.observation.observer import LoopWaits, RoundEnded, ServerEnds, TurnEvent, handle_each
from fedprune_server.observation.snapshot import FleetSnapshot, JobSnapshot
from fedprune_server.storage.state_folder import LOCK, run_id

log = logging.getLogger("fedprune.server")

# In the state folder: `doctor` and `status` are other processes, and must work while the server hangs.
FILE = "alerts.json"

# How often alerts are evaluated: their delays are seconds to minutes.
LOOK_INTERVAL_S = 1.0

# How often the state folder's facts are read, and the open alerts written; both also happen at once when an alert
# changes. Reading takes a while with many boards. The file's readers learn from it whether the loop still turns.
FACTS_INTERVAL_S = 5.0

# Seconds for which the loop may wait for its database before that is an alert. Transactions of commands and of the
# console are shorter, also on a slow disk.
WAITS_S = 10.0

# An error that lasts is logged once a minute.
_COMPLAIN_S = 60.0
# Ticks come at a deadline, which floats may put a little before it.
_ROUNDING_S = 1e-3
_LEVELS = {CRITICAL: logging.ERROR, WARNING: logging.WARNING, INFO: logging.INFO}

# The ratio of measurement to prediction that is an alert. Time may double while another program runs on a board; memory
# doesn't depend on other programs, and a board that needs more than it has is killed.
_FAR_OFF = {"step_seconds": 2.0, "latency_seconds": 2.0, "peak_memory_bytes": 1.25}


class JobWatch:
    """Counts the events of a job from which its alerts derive.

    Attributes:
        rounds_ended: How many rounds have ended since the start.
    """

    def __init__(self, snapshot: JobSnapshot, folder: Path, participation: Participation) -> None:
        self._seen, self._folder, self.participation = snapshot, folder, participation
        self._missed = self._empty = self._closing = self.rounds_ended = 0
        self._asked_at: float | None = None  # the first offer since an update counted
        self._round_times = RoundTimes()
        self._off: Mapping[str, str] = off_by_far(snapshot)

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        self._seen = snapshot
        self.participation.observe(snapshot, events)
        handle_each(events, lambda event: self._count(event.what, event.at))
        # Once for all events of a turn: the snapshot is of its end.
        has_refusals = any(isinstance(event.what, (on.OfferRefused, on.UpdateRejected)) for event in events)
        if has_refusals and snapshot.phase is Phase.TRAINING and not snapshot.is_asynchronous:
            refused = snapshot.parts.get(Progress.REFUSED, 0)
            self._empty += 0 < refused == sum(snapshot.parts.values())

    def _count(self, event: object, now: float) -> None:
        snapshot = self._seen
        match event:
            case do.Close():
                self._closing = len(event.contributions)
            case do.SendOffer() if self._asked_at is None:
                self._asked_at = now
            case on.Folded() | on.Paused():
                self._missed = 0
                self._asked_at = now if snapshot.is_asynchronous else None  # others are being asked meanwhile
            case on.Closed() if self._closing and len(event.rejected) >= self._closing:
                self._empty += 1
            case on.Ticked() if self._asked_at is not None:
                missed = int((now - self._asked_at + _ROUNDING_S) // snapshot.deadline_s)
                self._missed = max(self._missed, missed)
            case RoundEnded(summary):
                has_counted = any(p["progress"] == Progress.FOLDED.value for p in summary["devices"].values())
                self._empty = 0 if has_counted else self._empty + 1
                self.rounds_ended += 1
                self._round_times.note_end(summary["round"], now)
                self._off = off_by_far(snapshot, self._off)

    def job(self) -> WatchedJob:
        """The job as the rules see it."""
        self.participation.look()
        snapshot, away_since = self._seen, self.participation.away_since
        is_short = snapshot.phase is Phase.WAITING or not snapshot.able_devices
        missing_boards = (name for name in away_since if name not in snapshot.revoked) if is_short else iter(())
        return WatchedJob(
            seen=snapshot,
            folder=self._folder,
            away=tuple(islice(missing_boards, MAX_NAMES_SHOWN + 1)),
            missed=self._missed,
            empty=self._empty,
            off=self._off,
            offline_since=self.participation.offline_since(),
            usual_round_s=self._round_times.usual_s(),
        )


def off_by_far(snapshot: JobSnapshot, earlier: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Boards whose time or memory exceeded the prediction by far in their latest round, and by how much.

    Args:
        earlier: The same after the round before. These boards stay until half of the excess is gone.
    """
    excesses = {name: text for name, text in earlier.items() if name in snapshot.devices}
    for name, comparison in snapshot.compared.items():
        excesses.pop(name, None)
        for metric, (expected, measured) in comparison.items():
            limit = (1.0 + _FAR_OFF[metric]) / 2 if name in earlier else _FAR_OFF[metric]
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
        notified: Returns the alerts of which a notification was sent; called on the monitor's thread.
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
        self._free_seen: list[str] = []
        self._free_at = 0.0
        self.notified: Callable[[], Sequence[Alert]] = tuple
        self._clock, self._monotonic = clock, monotonic
        self.book = AlertBook(read_recorded(folder).alerts) if book is None else book
        self._restored = self.book.open
        self._away = {a.device: a.since for a in self.book.open if a.kind == AWAY and a.device is not None}
        self._site: SiteFacts | None = None
        self._site_is_unknown = False  # it couldn't be read: alerts about it may have begun before, and don't close
        self._next_at = 0.0
        self._waits_since: float | None = None  # for the database, within a turn of the loop
        self._complain_at: float | None = None
        self._turned_at, self._seen_at = clock(), monotonic()
        self._over, self._wake = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def hangs(self) -> bool:
        """Whether the loop hangs; may be called from any thread."""
        return self._monotonic() - self._seen_at > HANG_THRESHOLD_S

    def open(self) -> list[Alert]:
        """All open alerts, including a hanging loop; may be called from any thread."""
        if not self.hangs:
            return self.book.open
        hanging = Situation(self._folder, turned_s=self._monotonic() - self._seen_at)
        return [*evaluate_alerts(hanging, self._clock()), *self.book.open]

    def start(self) -> None:
        """Read the site's facts, and start the thread that reads them again and again and writes the open alerts."""
        self.read_site()  # before the first evaluation, which would close the earlier run's alerts about the site
        self._thread = threading.Thread(target=self._run, name="fedprune-alerts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; open alerts stay in the file."""
        self._over.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_COMPLAIN_S)
            self._write()

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        """Count what has happened, and evaluate once a second, once all jobs were seen."""
        watch = self._watches.get(snapshot.name)
        if watch is None:
            participation = Participation(snapshot, self._away_rounds, self._away, self._clock)
            watch = self._watches[snapshot.name] = JobWatch(snapshot, self._folders[snapshot.name], participation)
        watch.observe(snapshot, events)
        self._fleet = snapshot.fleet
        now, kinds = self._monotonic(), {type(event.what) for event in events}
        self._turned_at, self._seen_at = self._clock(), now
        if do.Finish in kinds:
            self._next_at = 0.0  # at once: alerts about the job are over, and the server may end with it
        if len(self._watches) < len(self._folders):
            return
        if ServerEnds in kinds:  # what ends the server (a full disk, a successor) is an alert, too
            self.read_site()
            self.look(closes=False)
        elif LoopWaits in kinds:
            self._waits_since = now if self._waits_since is None else self._waits_since
            if now >= self._next_at and now - self._waits_since >= WAITS_S:
                self._next_at = now + LOOK_INTERVAL_S
                self.look(wait_reason())
        else:
            self._waits_since = None
            if now >= self._next_at:
                self._next_at = now + LOOK_INTERVAL_S
                self.look()

    def look(self, waits_for: str = "", *, closes: bool = True) -> None:
        """Evaluate the alerts.

        Args:
            waits_for: What the loop waits for. Then nothing else is read, since that would wait for the same database,
                so that no other alert opens or closes.
            closes: Whether alerts may close. At the server's end their causes may be hidden, and aren't gone.
        """
        unix_now, now = self._clock(), self._monotonic()
        if not waits_for and now >= self._free_at:  # not at every look: it takes a while with many boards
            self._free_at, fleet = now + FACTS_INTERVAL_S, self._fleet
            self._free_seen = sorted(set(fleet.connected) - fleet.jobs.keys()) if fleet.several_jobs else []
        situation = Situation(self._folder, waits_for=waits_for) if waits_for else self._situation()
        alerts = evaluate_alerts(situation, unix_now)
        if waits_for or not closes or self._site_is_unknown:
            alerts = [*self.book.open, *alerts]
        else:
            alerts = [*self._carried_alerts(situation.jobs), *alerts]
        closing = self.book.closing
        changes = self.book.update(alerts, now, unix_now)
        for change in changes:
            _log(change)
        if changes or self.book.closing != closing:
            self._wake.set()

    def _carried_alerts(self, jobs: Sequence[WatchedJob]) -> list[Alert]:
        """Alerts of the server's last run that stay open because this run can't judge them yet.

        They are about jobs of which no round has ended since the start. The counts behind them were not stored.
        """
        if self._restored:
            names = [job.seen.name for job in jobs if not job.seen.finished]
            unproven = {name for name in names if not self._watches[name].rounds_ended}
            subjects = {*unproven, None} if unproven else set()  # some are about a board, whatever its job
            self._restored = [a for a in self._restored if a.kind in COUNTED and (a.job or None) in subjects]
        return self._restored

    def read_site(self) -> None:
        """Read the facts of the state folder; unreadable ones stay as they were."""
        try:
            self._site = site_facts(self._folder, self._server, earlier=self._site)
            self._site_is_unknown = False
        except Exception as error:  # noqa: BLE001 - as above
            self._site_is_unknown = self._site is None
            self._complain(error)

    def _situation(self) -> Situation:
        jobs, fleet = [watch.job() for watch in self._watches.values()], self._fleet
        participations = (watch.participation for watch in self._watches.values())
        return Situation(
            self._folder,
            jobs,
            len(fleet.connected) if fleet.several_jobs else jobs[0].seen.able_devices,
            broker="" if fleet.broker_connected else "there is no connection to the broker",
            absences=find_absent_boards(participations, fleet, self._clock()),
            floods_joins=fleet.floods_joins,
            site=self._site,
            open=self.book.severities,
        )

    def _run(self) -> None:
        self._write()
        while True:
            self._wake.wait(FACTS_INTERVAL_S)
            self._wake.clear()
            if self._over.is_set():
                return
            self.read_site()
            self._write()

    def _write(self) -> None:
        book, free = self.book, frozenset(self._free_seen)
        recorded = Recorded(self._turned_at, book.open, self.notified(), free, self._run_id, book.closing)
        try:
            write_whole(self._folder / FILE, write(recorded), private=True)
        except (FedpruneError, OSError) as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        now = self._monotonic()
        if self._complain_at is None or now >= self._complain_at:
            self._complain_at = now + _COMPLAIN_S
            text = error if isinstance(error, FedpruneError) else f"{type(error).__name__}: {reason(error)}"
            log.error("alerts can't be worked out or written: %s", text)


@dataclass(frozen=True)
class Recorded:
    """The last record of the monitor of a folder's server, as `alerts.json` has it.

    Attributes:
        run: Which run of the server it was (`storage.state_folder.run_id`).
        turned_at: The last turn of the server's loop, in seconds since 1970; None if nothing was written, or the file
            is damaged.
        alerts: Its open alerts.
        notified: Alerts whose opening was notified, but not their end.
        free: The boards that are connected and at none of its jobs.
        closing: Keys of open alerts whose cause has gone, and which close unless it comes again.
    """

    turned_at: float | None = None
    alerts: Sequence[Alert] = ()
    notified: Sequence[Alert] = ()
    free: frozenset[str] = frozenset()
    run: str = ""
    closing: frozenset[str] = frozenset()

    @property
    def current_alerts(self) -> list[Alert]:
        """Open alerts whose cause lasts, for those who ask what is wrong now."""
        return [alert for alert in self.alerts if alert.key not in self.closing]


def read_live(folder: Path) -> Recorded:
    """The record of a running server's monitor, some seconds old; empty if none runs, or it is still starting."""
    recorded = read_recorded(folder) if held(folder / LOCK) else Recorded()
    return recorded if recorded.run == run_id(folder) else Recorded()


def read_recorded(folder: Path) -> Recorded:
    """The last record of a folder's monitor, which is old if its server has ended."""
    try:
        recorded = read(Recorded, (folder / FILE).read_bytes(), FILE, StorageError)
    except (OSError, StorageError):
        return Recorded()
    known_alerts = [a for a in recorded.alerts if a.severity in ALERT_SEVERITIES.get(a.kind, ())]
    return replace(recorded, alerts=known_alerts)


def _log(change: AlertChange) -> None:
    alert = change.alert
    if change.closed_at is None:
        log.log(_LEVELS[alert.severity], "alert: %s", alert.text)
    else:
        log.info("the alert is over: %s", alert.what)
