"""Publishes what a running server knows for its console: devices, jobs, rounds, rollouts, alerts and log lines.

The server's loop calls it twice a second. What has changed is written in one transaction, for which a few milliseconds
are collected; the rest waits for the next call. A failed write is repaired by publishing everything again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from fedprune.core.errors import ProtocolError, StorageError
from fedprune.core.text import one_line
from fedprune_server.engine.server import Server
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.alerts import Alert
from fedprune_server.monitoring.view import JobView
from fedprune_server.web.state import rows
from fedprune_server.web.state.crashes import board_crashes
from fedprune_server.web.state.details import coverage, details
from fedprune_server.web.state.logs import LogTap
from fedprune_server.web.state.records import AlertStatus, PublishedJob, Record, Rollouts, Site
from fedprune_server.web.state.status import StatusWriter, encoded
from fedprune_server.web.state.surroundings import Member, SurroundingsPoller

BUDGET_S = 0.02
"""Time of the server's loop that collecting devices may take in each call."""

BEAT_S = 3.0
SWEEP_S = 2.0
ROUNDS_PUBLISHED = 500
"""Finished rounds of each job that are published at the start."""

COVERED_S = 5.0
"""Coverage takes a look at all devices, so it is computed at most this often."""

_BATCH, _LINES = 50, 50
_UNWRITTEN = 1000
"""Lines of logs that are kept while the file can't be written."""


class StatusPublisher:
    """Publishes the status of jobs. `folder` is the state folder, which has boards' crashes; None for none.

    Attributes:
        tap: Collects lines of the server's log.
        faults: What could not be published since the caller looked last.
    """

    def __init__(
        self,
        server: Server,
        site: Mapping[str, Any],
        writer: StatusWriter,
        *,
        poller: SurroundingsPoller | None = None,
        folder: Path | None = None,
        alerts: AlertBook | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server, self._first = server, server.first.view
        self._views = {name: runner.view for name, runner in server.runners.items()}
        self._site, self._writer = dict(site), writer
        self._poller = poller or SurroundingsPoller()
        self._folder, self._alerts = folder, alerts or AlertBook()
        self._clock, self._monotonic = clock, monotonic
        self.tap = LogTap(self._knows)
        self.faults: list[str] = []
        self._held: set[str] = set()
        self._of: dict[str, str] = {}
        self._seen: dict[str, tuple[int, float]] = {}
        self._pending: dict[str, None] = {}
        self._published: dict[str, int] = {}
        self._statuses: dict[str, Record] = {}
        self._open_alerts: dict[str, Alert] = {}  # as they were published, by key
        self._records: list[Record] = []
        self._unwritten: list[Record] = []
        self._stale = True
        self._looked = self._whole = False
        self._beat_at = self._sweep_at = 0.0
        self._before: dict[str, tuple[float | None, tuple[int, int]]] = {}
        self._rollouts: tuple[dict[str, Any], ...] = ()
        self._covered: dict[str, float] = {}
        for name, view in self._views.items():
            history = view.state.history
            self._before[name] = (history[-1]["at"] if history else None, view.registry.total)

    def changed(self, devices: Collection[str]) -> None:
        for name in devices:
            self._pending.setdefault(name)

    def add(self, *records: Record) -> None:
        self._records += records

    def round_over(self, job: str, summary: dict[str, Any]) -> None:
        view, (before, counted) = self._views[job], self._before[job]
        sums = view.registry.total
        moved = max(0, sums[0] - counted[0]), max(0, sums[1] - counted[1])
        self._before[job] = (summary["at"], sums)
        self.add(rows.finished_round(job, summary, before, moved))

    def view_of(self, job: str) -> JobView:
        if job not in self._views:
            raise ProtocolError("no such job", expected=", ".join(self._views), got=job)
        return self._views[job]

    def view_with(self, device: str) -> JobView:
        """The job that has a device or had it last; the first one where none had."""
        job = self._server.holder(device) or self._of.get(device)
        view = self._views[job] if job is not None else self._first
        if device not in view.state.devices and device not in view.registry.names:
            raise ProtocolError(f"no such device takes part: {device}")
        return view

    def add_details(self, device: str) -> None:
        self.add(details(self.view_with(device), device, self._clock()))
        if self._folder is not None:
            self.add(board_crashes(self._folder, device))

    def add_coverage(self, job: str) -> None:
        """Publish a job's coverage soon, unless it was a moment ago."""
        view, now = self.view_of(job), self._monotonic()
        if now - self._covered.get(job, -COVERED_S) >= COVERED_S:
            self._covered[job] = now
            self.add(coverage(view, self._clock()))

    def publish(self) -> None:
        """Write what has changed; after a failed write, everything."""
        now = self._monotonic()
        if self._stale:
            self._begin()
        self._look(now)
        self._collect_records()
        records = list(self._encoded())
        devices = self._collect_devices(now + BUDGET_S)
        finished = self._looked and not self._pending and not self._whole
        if records or devices or finished or now >= self._beat_at:
            self._beat_at = now + BEAT_S
            try:
                self._writer.write(records, devices, at=self._clock(), whole=finished)
            except StorageError:
                self._stale = True
                self._unwritten = [r for r, _ in records if r.kind == "log"][-_UNWRITTEN:]
                raise
            self._unwritten = []
            self._whole = self._whole or finished

    def _begin(self) -> None:
        """Publish everything from now on."""
        self._writer.clear()
        self._stale = self._whole = False
        self._published.clear()
        self._statuses.clear()
        self._covered.clear()
        self._records = list(self._unwritten)
        self._open_alerts.clear()
        self._alerts.changes()
        for name, view in self._views.items():
            before: float | None = None
            for summary in view.state.history[-ROUNDS_PUBLISHED:]:
                self.add(rows.finished_round(name, summary, before, None))
                before = summary["at"]
            self.changed(view.state.devices.keys())
            self.changed(view.registry.names)
        self.changed(self._poller.names)

    def _look(self, now: float) -> None:
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_S
            held = set(self._first.quarantine.all_held())
            self.changed(held | self._held)
            self._held = held
        seen = self._poller.seen()
        if seen is not None:
            self._looked = True
            self.changed(seen.changed)
            self._rollouts = self._rollouts if seen.rollouts is None else seen.rollouts
            if self._poller.has_releases:
                self._add_changed("rollouts", Rollouts(self._rollouts, seen.releases))

    def _collect_records(self) -> None:
        site = Site(**self._site, jobs=tuple(self._views), connected=self._first.link.connected)
        self._add_changed("site", site)
        for name, view in self._views.items():
            self.changed(view.registry.moved)
            self._add_changed(f"job {name}", _job(view))
        self._add_alerts()
        self.add(*self.tap.take(_LINES))

    def _add_alerts(self) -> None:
        # Closed ones first: an alert that has closed and opened again since is open.
        for change in self._alerts.changes():
            if change.closed_at is not None:
                self._open_alerts.pop(change.alert.key, None)
                self.add(_alert(change.alert, change.closed_at))
        for alert in self._alerts.open:  # whose texts change without a change of severity, too
            if self._open_alerts.get(alert.key) != alert:
                self._open_alerts[alert.key] = alert
                self.add(_alert(alert))

    def _knows(self, device: str) -> bool:
        """Whether this is the name of a device that is published, or is about to be."""
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
            self.faults.append(f"{name}: {error}")
            return None

    def _collect_devices(self, until: float) -> dict[str, str | None]:
        """JSON of changed devices' rows, as many as there is time for; None for those that are gone."""
        found: dict[str, str | None] = {}
        while self._pending:
            for name in list(islice(self._pending, _BATCH)):
                del self._pending[name]
                row = self._row(name)
                if row is None:
                    if self._published.pop(name, None) is not None:
                        found[name] = None
                    continue
                text = self._text(row, f"device {name}")
                mark = hash(text)
                if text is not None and self._published.get(name) != mark:
                    self._published[name], found[name] = mark, text
            if self._monotonic() >= until:
                break
        return found

    def _row(self, name: str) -> dict[str, Any] | None:
        member = self._poller.member(name)
        job = self._server.holder(name) or self._of.get(name)
        if job is None or name not in self._views[job].state.devices:
            job = next((j for j, v in self._views.items() if name in v.state.devices), job)
        view = self._views[job] if job is not None else self._first
        known = name in view.state.devices or name in view.registry.names
        if not known and member is None:
            return None
        if job is not None:
            self._of[name] = job
        contacts = [v.registry[name] for v in self._views.values()]
        up = sum(c.up for c in contacts)
        before = self._seen.get(name)
        device, here = view.state.devices.get(name), self._server.present(name)
        if before is None or before[0] != up:
            # Bytes that a server has read from its disk at the start don't tell when the device was heard.
            online = here or (device is not None and device.online)
            before = self._seen[name] = (up, 0.0 if before is None and not online else self._clock())
        return rows.device_row(
            view,
            name,
            job=job if device is not None else None,
            here=here,
            member=member or Member("revoked"),
            traffic=(sum(c.down for c in contacts), up),
            now=before[1] or None,
            update=self._poller.update(name),
        )


def _job(view: JobView) -> PublishedJob:
    state = view.state
    return PublishedJob(
        name=view.job.name,
        round=state.round,
        rounds=view.job.rounds,
        phase=state.phase.value,
        deadline_at=state.deadline,
        paused=state.paused,
        metrics=dict(list(state.history[-1]["metrics"].items())[:64]) if state.history else {},
        strategy=view.job.strategy[:200],
        model_digest=state.model,
        weight=view.weight,
        parts={k.value: n for k, n in state.tasks.counts.items() if n},
        parameters=view.registry.whole,
    )


def _alert(alert: Alert, closed_at: float | None = None) -> AlertStatus:
    text = one_line(alert.text, 1000)
    return AlertStatus(
        f"{alert.key[:100]}@{alert.since:.0f}", alert.since, alert.kind, alert.severity, alert.device, alert.job,
        text, closed_at,
    )  # fmt: skip
