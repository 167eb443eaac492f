"""The publisher of a running server's status for its console: devices, jobs, rounds, rollouts, alerts and log lines.

The server's loop calls it twice a second. What has changed is written in one transaction, for which a few milliseconds
are collected; the rest waits for the next call. A failed write is repaired by publishing everything again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from fedprune.core.errors import StorageError
from fedprune.core.text import one_line
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.alerts import Alert
from fedprune_server.observation.observer import DevicesChanged, RoundEnded, TurnEvent, handle_each
from fedprune_server.observation.snapshot import DeviceSnapshot, FleetSnapshot, JobSnapshot
from fedprune_server.web.state import rows
from fedprune_server.web.state.logs import LogTap
from fedprune_server.web.state.membership_poller import Member, MembershipPoller
from fedprune_server.web.state.records import AlertStatus, PublishedJob, Record, Rollouts, Site
from fedprune_server.web.state.status import StatusWriter, encoded

# Time of the server's loop that collecting devices may take in each call: 4 % of it, at two calls a second.
BUDGET_S = 0.02

BEAT_S = 3.0
SWEEP_S = 2.0
# Finished rounds of each job that are published at the start: enough for charts, and written in a moment.
ROUNDS_PUBLISHED = 500

_BATCH, _LINES = 50, 50
# Lines of logs that are kept for the next try while the file can't be written; all else can be made again.
_UNWRITTEN = 1000


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
        self.tap = LogTap(self._knows)
        self._faults: list[str] = []
        self._held: set[str] = set()
        self._of: dict[str, str] = {}
        self._pending: dict[str, None] = {}
        self._published: dict[str, int] = {}
        self._statuses: dict[str, Record] = {}
        self._open_alerts: dict[tuple[str, float], Alert] = {}  # as they were published, by key and beginning
        self._records: list[Record] = []
        self._unwritten: list[Record] = []
        self._stale = True
        self._looked = self._whole = False
        self._beat_at = self._sweep_at = 0.0
        self._before: dict[str, tuple[float | None, tuple[int, int]]] = {}
        self._rollouts: tuple[dict[str, Any], ...] = ()

    def changed(self, devices: Iterable[str]) -> None:
        for name in devices:
            self._pending.setdefault(name)

    def add(self, *records: Record) -> None:
        self._records += records

    def note(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        """Note the events of a job, for the next call of `publish`."""
        name = snapshot.name
        if name not in self._jobs:
            last_round_at = snapshot.history[-1]["at"] if snapshot.history else None
            self._before[name] = (last_round_at, (snapshot.bytes_down, snapshot.bytes_up))
            self._stale = True
        self._jobs[name], self._fleet = snapshot, snapshot.fleet
        handle_each(events, lambda event: self._handle(name, event))

    def _handle(self, job: str, event: TurnEvent) -> None:
        match event.what:
            case DevicesChanged(names):
                self.changed(names)
            case RoundEnded(summary, down, up):
                last_round_at, last_bytes = self._before[job]
                bytes_since = max(0, down - last_bytes[0]), max(0, up - last_bytes[1])
                self._before[job] = (summary["at"], (down, up))
                self.add(rows.finished_round(job, summary, last_round_at, bytes_since))

    def job_of(self, device: str) -> str | None:
        """The job that has a device, or had it last; None if none had it."""
        return self._fleet.jobs.get(device) or self._of.get(device)

    def publish(self) -> None:
        """Write what has changed; after a failed write, everything.

        Raises:
            StorageError: The file can't be written, or some of what has changed can't.
        """
        now = self._monotonic()
        if self._stale:
            self._begin()
        self._look(now)
        self._collect_records()
        records = list(self._encoded())
        devices = self._collect_devices(now + BUDGET_S)
        is_complete = self._looked and not self._pending and not self._whole
        if records or devices or is_complete or now >= self._beat_at:
            self._beat_at = now + BEAT_S
            try:
                self._writer.write(records, devices, at=self._clock(), whole=is_complete)
            except StorageError:
                self._stale = True
                self._unwritten = [r for r, _ in records if r.kind == "log"][-_UNWRITTEN:]
                raise
            self._unwritten = []
            self._whole = self._whole or is_complete
        if self._faults:
            faults, self._faults = self._faults, []
            raise StorageError(f"the console doesn't show {faults[0]}")

    def _begin(self) -> None:
        """Publish everything from now on."""
        self._writer.clear()
        self._stale = self._whole = False
        self._published.clear()
        self._statuses.clear()
        self._records = list(self._unwritten)
        self._open_alerts.clear()
        for name, job in self._jobs.items():
            last_round_at: float | None = None
            for summary in job.history[-ROUNDS_PUBLISHED:]:
                self.add(rows.finished_round(name, summary, last_round_at, None))
                last_round_at = summary["at"]
            self.changed(job.devices)
        self.changed(self._poller.names)

    def _look(self, now: float) -> None:
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_S
            quarantined = set(self._fleet.quarantined)
            self.changed(quarantined | self._held)
            self._held = quarantined
        poll_result = self._poller.latest()
        if poll_result is not None:
            self._looked = True
            self.changed(poll_result.changed)
            self._rollouts = self._rollouts if poll_result.rollouts is None else poll_result.rollouts
            if self._poller.has_releases:
                self._add_changed("rollouts", Rollouts(self._rollouts, poll_result.releases))

    def _collect_records(self) -> None:
        site = Site(**self._site, jobs=tuple(self._jobs), connected=self._fleet.broker_connected)
        self._add_changed("site", site)
        for name, job in self._jobs.items():
            self.changed(job.with_traffic)
            self._add_changed(f"job {name}", _job(job))
        self._add_alerts()
        self.add(*self.tap.take(_LINES))

    def _add_alerts(self) -> None:
        alerts = {(alert.key, alert.since): alert for alert in self._alerts.open}
        for key in self._open_alerts.keys() - alerts.keys():
            self.add(_alert(self._open_alerts.pop(key), self._clock()))
        for key, alert in alerts.items():  # texts may change without a change of severity
            if self._open_alerts.get(key) != alert:
                self._open_alerts[key] = alert
                self.add(_alert(alert))

    def _knows(self, device: str) -> bool:
        """Whether a device of this name is published, or about to be."""
        return device in self._published or device in self._pending

    def _add_changed(self, name: str, record: Record) -> None:
        if self._statuses.get(name) != record:
            self._statuses[name] = record
            self.add(record)

    def _encoded(self) -> Iterator[tuple[Record, str]]:
        records, self._records = self._records, []
        for record in records:
            if (text := self._text(record, f"{record.kind} {record.scope}")) is not None:
                yield record, text

    def _text(self, body: Record | dict[str, Any], name: str) -> str | None:
        try:
            return encoded(body)
        except ValueError as error:
            self._faults.append(f"{name}: {error}")
            return None

    def _collect_devices(self, deadline: float) -> dict[str, str | None]:
        """JSON of changed devices' rows, as many as there is time for; None for those that are gone."""
        texts: dict[str, str | None] = {}
        while self._pending:
            for name in list(islice(self._pending, _BATCH)):
                del self._pending[name]
                row = self._row(name)
                if row is None:
                    if self._published.pop(name, None) is not None:
                        texts[name] = None
                    continue
                text = self._text(row, f"device {name}")
                # Hashes, not texts: the file has these already.
                text_hash = hash(text)
                if text is not None and self._published.get(name) != text_hash:
                    self._published[name], texts[name] = text_hash, text
            if self._monotonic() >= deadline:
                break
        return texts

    def _row(self, name: str) -> dict[str, Any] | None:
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
            self._of[name] = job
        device = devices.get(job or "", next(iter(devices.values()), None)) or DeviceSnapshot(
            name=name, takes_part=False, online=False, connected=name in self._fleet.connected, activity="unknown"
        )
        snapshot = self._jobs.get(job or "")
        return rows.device_row(
            device,
            job=job if device.takes_part else None,
            ended=int(snapshot.history[-1]["round"]) if snapshot is not None and snapshot.history else 0,
            member=member or Member("revoked"),
            traffic=(sum(d.bytes_down for d in devices.values()), sum(d.bytes_up for d in devices.values())),
            heard_at=max((d.heard_at for d in devices.values() if d.heard_at is not None), default=None),
            quarantine=self._fleet.quarantined.get(name),
            update=self._poller.update(name),
        )


def _job(job: JobSnapshot) -> PublishedJob:
    return PublishedJob(
        name=job.name,
        round=job.round,
        rounds=job.rounds,
        phase=job.phase.value,
        deadline_at=job.closes_at,
        paused=job.paused,
        metrics=dict(list(job.metrics.items())[:64]),
        strategy=job.strategy[:200],
        model_digest=job.model,
        parts={k.value: n for k, n in job.parts.items() if n},
        parameters=job.parameters,
    )


def _alert(alert: Alert, closed_at: float | None = None) -> AlertStatus:
    text = one_line(alert.text, 1000)
    return AlertStatus(
        f"{alert.key[:100]}@{alert.since:.0f}", alert.since, alert.kind, alert.severity, alert.device, alert.job,
        text, closed_at,
    )  # fmt: skip
