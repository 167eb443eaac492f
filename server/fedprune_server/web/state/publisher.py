"""Publishes a running server's status for its console: devices, jobs, rounds, rollouts, alerts and log lines.

The server's loop calls it twice a second. Each call collects changes for a few milliseconds, writes them in one
transaction, and leaves the rest to the next call. A failed write is repaired by publishing everything again.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from fedprune.coordination import Phase
from fedprune.core.errors import ProtocolError, StorageError
from fedprune.core.text import one_line
from fedprune.output.log_lines import current_log_context
from fedprune.wire.topics import check_device
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.alerts import Alert
from fedprune_server.observation.observer import DevicesChanged, RoundEnded, TurnEvent, handle_each
from fedprune_server.observation.snapshot import DeviceSnapshot, FleetSnapshot, JobSnapshot
from fedprune_server.web.state import rows
from fedprune_server.web.state.membership_poller import Member, MembershipPoller
from fedprune_server.web.state.records import AlertStatus, LogLine, PublishedJob, Rollouts, Site, StatusRecord
from fedprune_server.web.state.status_writer import StatusWriter, encode_status

# Time of the server's loop that collecting devices may take in each call: 4 % of it, at two calls a second.
COLLECT_BUDGET_S = 0.02

BEAT_INTERVAL_S = 3.0
SWEEP_INTERVAL_S = 2.0
# Finished rounds of each job that are published at the start: enough for charts, and written in a moment.
ROUNDS_PUBLISHED = 500

_DEVICE_BATCH, _MAX_LINES = 50, 50
# Lines of logs that are kept for the next try while the file can't be written; all else can be made again.
_MAX_UNWRITTEN_LINES = 1000


# Lines that wait to be published; of more, the oldest are dropped. The server must not run out of memory if the file
# can't be written.
MAX_WAITING_LINES = 1000

_DEVICE_IN_TEXT = re.compile(r"\bdevice ([A-Za-z0-9][A-Za-z0-9_.-]{0,63})")
_LEVEL_NAMES = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning"}


class LogTap(logging.Handler):
    """Collects lines of the server's log, from any thread.

    `is_device` says whether a name that follows the word "device" in a line is a device's.
    """

    def __init__(self, is_device: Callable[[str], bool]) -> None:
        super().__init__(logging.INFO)
        self._is_device = is_device
        # Lines, and whether the device of each is only read from its text.
        self._lines: deque[tuple[LogLine, bool]] = deque(maxlen=MAX_WAITING_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line, without control characters."""
        try:
            text = one_line(record.getMessage(), 1500)
            facts: dict[str, Any] = {n: v for n, v in current_log_context().items() if n in ("device", "job", "round")}
            device_match = None if "device" in facts else _DEVICE_IN_TEXT.search(text)
            if device_match is not None:
                facts["device"] = device_match[1].rstrip(".")
            try:
                check_device(facts.get("device", "x"))
            except ProtocolError:  # part of a foreign topic, which need not be a device's name
                facts = {}
            level = _LEVEL_NAMES.get(record.levelno, "error")
            line = LogLine(max(0.0, record.created), level, text, **facts)
            self._lines.append((line, device_match is not None))
        except Exception:  # noqa: BLE001 - a line that can't be shown must not stop its author
            self.handleError(record)

    def take(self, most: int) -> list[LogLine]:
        entries = [self._lines.popleft() for _ in range(min(most, len(self._lines)))]
        return [
            replace(line, device=None) if is_guess and not self._is_device(line.device or "") else line
            for line, is_guess in entries
        ]


class StatusPublisher:
    """Publishes the status of jobs, as they were seen last.

    Attributes:
        tap: Collects lines of the server's log.
    """

    def __init__(
        self,
        site: Mapping[str, Any],
        writer: StatusWriter,
        *,
        poller: MembershipPoller | None = None,
        alerts: AlertBook | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs: dict[str, JobSnapshot] = {}
        self._fleet = FleetSnapshot()
        self._site, self._writer = dict(site), writer
        self._poller = poller or MembershipPoller()
        self._alerts = alerts or AlertBook()
        self._clock, self._monotonic = clock, monotonic
        self.tap = LogTap(lambda device: device in self._published_hashes or device in self._pending)
        self._faults: list[str] = []  # what can't be written as JSON, for the error that `publish` raises at its end
        self._quarantined: set[str] = set()
        self._last_job_of: dict[str, str] = {}  # of devices, which no job may have now
        self._pending: dict[str, None] = {}  # devices whose rows may have changed, in the order of the changes
        self._published_hashes: dict[str, int] = {}  # of devices' rows as JSON: the rows of a large fleet take memory
        self._statuses: dict[str, StatusRecord] = {}  # as they were published
        self._open_alerts: dict[tuple[str, float], Alert] = {}  # as they were published, by key and beginning
        self._records: list[StatusRecord] = []  # queued for the next call
        self._unwritten: list[StatusRecord] = []
        self._needs_all = True
        self._has_polled = self._was_complete = False  # whether the file says that it has all devices
        self._beat_at = self._sweep_at = 0.0
        # By job the end of its last round, and the bytes to and from devices until then.
        self._round_ends: dict[str, tuple[float | None, tuple[int, int]]] = {}
        self._rollouts: tuple[dict[str, Any], ...] = ()

    def mark_changed(self, devices: Iterable[str]) -> None:
        for name in devices:
            self._pending.setdefault(name)

    def queue(self, *records: StatusRecord) -> None:
        self._records += records

    def note(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        """Note the events of a job, for the next call of `publish`."""
        name = snapshot.name
        if name not in self._jobs:
            last_round_at = snapshot.history[-1]["at"] if snapshot.history else None
            self._round_ends[name] = (last_round_at, (snapshot.bytes_down, snapshot.bytes_up))
            self._needs_all = True
        self._jobs[name], self._fleet = snapshot, snapshot.fleet
        handle_each(events, lambda event: self._handle(name, event))

    def _handle(self, job: str, event: TurnEvent) -> None:
        match event.payload:
            case DevicesChanged(names):
                self.mark_changed(names)
            case RoundEnded(summary, down, up):
                last_round_at, last_bytes = self._round_ends[job]
                bytes_since = max(0, down - last_bytes[0]), max(0, up - last_bytes[1])
                self._round_ends[job] = (summary["at"], (down, up))
                self.queue(rows.finished_round_record(job, summary, last_round_at, bytes_since))

    def job_of(self, device: str) -> str | None:
        """The job that has a device, or had it last; None if none had it."""
        return self._fleet.job_of_device.get(device) or self._last_job_of.get(device)

    def publish(self) -> None:
        """Write what has changed; after a failed write, everything. Raises `StorageError` if some of it can't be."""
        now = self._monotonic()
        if self._needs_all:
            self._queue_everything()
        self._poll(now)
        self._collect_records()
        pending, self._records = self._records, []
        records = [(r, text) for r in pending if (text := self._encode(r, f"{r.kind} {r.scope}")) is not None]
        devices = self._collect_devices(now + COLLECT_BUDGET_S)
        becomes_complete = self._has_polled and not self._pending and not self._was_complete
        if records or devices or becomes_complete or now >= self._beat_at:
            self._beat_at = now + BEAT_INTERVAL_S
            try:
                self._writer.write(records, devices, at=self._clock(), is_complete=becomes_complete)
            except StorageError:
                self._needs_all = True
                self._unwritten = [r for r, _ in records if r.kind == "log"][-_MAX_UNWRITTEN_LINES:]
                raise
            self._unwritten = []
            self._was_complete = self._was_complete or becomes_complete
        if self._faults:
            faults, self._faults = self._faults, []
            raise StorageError(f"the console doesn't show {faults[0]}")

    def _queue_everything(self) -> None:
        """Queue everything, at the start and after a failed write."""
        self._writer.clear()
        self._needs_all = self._was_complete = False
        self._published_hashes.clear()
        self._statuses.clear()
        self._records = list(self._unwritten)
        self._open_alerts.clear()
        for name, job in self._jobs.items():
            last_round_at: float | None = None
            for summary in job.history[-ROUNDS_PUBLISHED:]:
                self.queue(rows.finished_round_record(name, summary, last_round_at, None))
                last_round_at = summary["at"]
            self.mark_changed(job.devices)
        self.mark_changed(self._poller.member_names)

    def _poll(self, now: float) -> None:
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_INTERVAL_S
            quarantined = set(self._fleet.quarantines)
            self.mark_changed(quarantined | self._quarantined)
            self._quarantined = quarantined
        poll_result = self._poller.latest()
        if poll_result is not None:
            self._has_polled = True
            self.mark_changed(poll_result.changed_devices)
            self._rollouts = self._rollouts if poll_result.rollouts is None else poll_result.rollouts
            if self._poller.has_releases:
                self._add_changed("rollouts", Rollouts(self._rollouts, poll_result.releases))

    def _collect_records(self) -> None:
        site = Site(**self._site, jobs=tuple(self._jobs), connected=self._fleet.broker_connected)
        self._add_changed("site", site)
        for name, job in self._jobs.items():
            self.mark_changed(job.devices_with_traffic)
            self._add_changed(f"job {name}", _published_job(job))
        self._add_alerts()
        self.queue(*self.tap.take(_MAX_LINES))

    def _add_alerts(self) -> None:
        alerts = {(alert.key, alert.since): alert for alert in self._alerts.open_alerts}
        for key in self._open_alerts.keys() - alerts.keys():
            self.queue(_alert_status(self._open_alerts.pop(key), self._clock()))
        for key, alert in alerts.items():  # texts may change without a change of severity
            if self._open_alerts.get(key) != alert:
                self._open_alerts[key] = alert
                self.queue(_alert_status(alert))

    def _add_changed(self, name: str, record: StatusRecord) -> None:
        if self._statuses.get(name) != record:
            self._statuses[name] = record
            self.queue(record)

    def _encode(self, body: StatusRecord | dict[str, Any], name: str) -> str | None:
        try:
            return encode_status(body)
        except ValueError as error:
            self._faults.append(f"{name}: {error}")
            return None

    def _collect_devices(self, deadline: float) -> dict[str, str | None]:
        """JSON of changed devices' rows, as many as there is time for; None for those that are gone."""
        texts: dict[str, str | None] = {}
        while self._pending:
            for name in list(islice(self._pending, _DEVICE_BATCH)):
                del self._pending[name]
                row = self._device_row(name)
                if row is None:
                    if self._published_hashes.pop(name, None) is not None:
                        texts[name] = None
                    continue
                text = self._encode(row, f"device {name}")
                # Hashes, not texts: the file has the texts already.
                if text is not None and self._published_hashes.get(name) != hash(text):
                    self._published_hashes[name], texts[name] = hash(text), text
            if self._monotonic() >= deadline:
                break
        return texts

    def _device_row(self, name: str) -> dict[str, Any] | None:
        member = self._poller.member(name)
        devices = {
            job: device for job, snapshot in self._jobs.items() if (device := snapshot.devices.get(name)) is not None
        }
        if not devices and member is None:
            return None
        job = self.job_of(name)
        if job not in devices or not devices[job].takes_part:
            job = next((j for j, device in devices.items() if device.takes_part), job)
        if job is not None:
            self._last_job_of[name] = job
        connected = name in self._fleet.connected_devices
        unknown = DeviceSnapshot(name=name, takes_part=False, online=False, connected=connected, activity="unknown")
        device = devices.get(job or "", next(iter(devices.values()), unknown))
        snapshot = self._jobs.get(job or "")
        return rows.device_row(
            device,
            job=job if device.takes_part else None,
            ended=int(snapshot.history[-1]["round"]) if snapshot is not None and snapshot.history else 0,
            member=member or Member("revoked"),
            traffic=(sum(d.bytes_down for d in devices.values()), sum(d.bytes_up for d in devices.values())),
            heard_at=max((d.last_message_at for d in devices.values() if d.last_message_at is not None), default=None),
            quarantine=self._fleet.quarantines.get(name),
            update=self._poller.release_report(name),
        )


def _published_job(job: JobSnapshot) -> PublishedJob:
    return PublishedJob(
        name=job.name,
        round=job.round,
        rounds=job.rounds,
        phase=job.phase.value,
        deadline_at=None if job.phase is Phase.FINISHED else job.closes_at,
        paused=job.is_paused,
        metrics=dict(list(job.metrics.items())[:64]),
        strategy=job.strategy[:200],
        model_digest=job.model,
        parts={k.value: n for k, n in job.parts_by_progress.items() if n},
        parameters=job.parameters,
    )


def _alert_status(alert: Alert, closed_at: float | None = None) -> AlertStatus:
    text = one_line(alert.text, 1000)
    return AlertStatus(
        f"{alert.key[:100]}@{alert.since:.0f}", alert.since, alert.kind, alert.severity, alert.device, alert.job,
        text, closed_at,
    )  # fmt: skip
