"""A board that took part and no longer does is named with the reason by everything that shows a fleet.

The server, its monitor, its console's file and its notifications are real; the broker and the boards are in memory.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.disk import locked
from fedprune.core.errors import ExitCode
from fedprune.wire.messages import Birth, Offer, Refusal
from fedprune_server.cli.status import describe, status_of_all
from fedprune_server.config.alert_settings import AlertSettings
from fedprune_server.maintenance.doctor import examined
from fedprune_server.monitoring.monitor import Monitor
from fedprune_server.monitoring.notifications import Notifier
from fedprune_server.monitoring.observer import Observer
from fedprune_server.monitoring.view import JobView
from fedprune_server.storage.state_folder import LOCK
from fedprune_server.web.state.publisher import StatusPublisher
from fedprune_server.web.state.status import FILE as STATUS
from fedprune_server.web.state.status import FleetView, StatusWriter
from support.fakes.fleet import Fleet, ToyDevice
from support.fakes.tiny_job import JOB

SITE = {
    "version": "1", "site": "default", "started_at": 0.0, "broker": "mqtt://h", "database": "sqlite", "blobs": "folder",
    "insecure": True,
}  # fmt: skip
WELL = ("ash", "elm")
FAULTS = {
    "copied": ("device-cloned", "two"),
    "corrupt": ("device-excluded", "yard.npz is not an archive"),
    "gone": ("device-away", "not been connected"),
    "lost": ("device-away", "not been connected"),
    "full": ("device-failing", "no room"),
}
"""The kind of the alert and a word of its reason, by board."""


@dataclass
class Named:
    """Texts that each sink showed about the boards."""

    log: list[str] = field(default_factory=list)
    status: list[str] = field(default_factory=list)
    doctor: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    webhook: list[str] = field(default_factory=list)


class FullBoard(ToyDevice):
    """A board without room on its disk."""

    def take(self, offer: Offer) -> None:
        reason = "no room left on the disk"
        self.say(Refusal(self.name, offer.job, offer.round, offer.attempt, reason, ExitCode.STORAGE_FULL))


class AfterRounds(Observer):
    """Does something once a round is over."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        self._actions = actions

    def round_over(self, summary: dict[str, Any], now: float, seen: JobView) -> None:
        self._actions.get(summary["round"], lambda: None)()


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    posts: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/hook", posts
        finally:
            server.shutdown()


def break_boards(fleet: Fleet) -> None:
    """All faults at once."""
    air, devices = fleet.air, fleet.air.devices
    for name in ("gone", "lost"):
        devices.pop(name).die()
    corrupt = devices.pop("corrupt")
    corrupt.die()  # its program ends, starts again, and can't read its samples
    corrupt.session += 1
    corrupt.say(Birth("corrupt", corrupt.session, corrupt.profile, 0, "test", trouble="yard.npz is not an archive"))
    devices["full"] = FullBoard("full", fleet.folder / "devices", air)
    copy, original = ToyDevice("copied", fleet.folder / "copy", air), devices["copied"]
    copy.session = original.session + 1
    for board in (copy, original, copy, original):
        board.birth()
    for _ in range(100):  # what neither can sign so that the server accepts it from both
        air.to_server(original.topics.up("copied"), b"of an epoch that is over")
    air.to_server(original.topics.up("ash"), b"{")


@pytest.mark.system
def test_each_board_that_falls_silent_is_named_with_its_reason_within_two_rounds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedprune.server")
    fleet = Fleet(tmp_path, replace(JOB, rounds=7, devices=2, deadline_s=30.0), (*WELL, *FAULTS))
    fleet.storage.put_settings({"job": fleet.job.to_dict()})
    daemon = fleet.daemon()
    clock: Callable[[], float] = lambda: fleet.air.now  # noqa: E731
    view = daemon.first.view
    monitor = Monitor(
        tmp_path, {}, [(view, tmp_path)], away_rounds=2, present=daemon.present, clock=clock, monotonic=clock
    )
    publisher = StatusPublisher(
        daemon, SITE, StatusWriter(tmp_path / STATUS), alerts=monitor.book, clock=clock, monotonic=clock
    )
    named = Named()
    with webhook() as (url, posts), locked(tmp_path / LOCK, "a server runs", ""):
        notifier = Notifier(AlertSettings(webhook=url), "default", monitor.open, lambda: True)

        def idle() -> None:
            if daemon.busy:
                time.sleep(0.0005)  # the worker's thread is real
            else:
                fleet.air.now += 0.5

        fleet.air.on_idle = idle
        daemon.first.observers.join(AfterRounds({3: lambda: break_boards(fleet), 5: daemon.stop}))
        for observer in (*monitor.participation.values(), *monitor.watches.values(), monitor):
            daemon.first.observers.join(observer)
        monitor.start()
        daemon.run()
        monitor.close()
        publisher.publish()
        notifier.close()
        body = status_of_all(tmp_path)
        named.status = [describe(body)]
        named.doctor = [finding.what for finding in examined(tmp_path)]
    named.log = [record.getMessage() for record in caplog.records if record.getMessage().startswith("alert:")]
    with FleetView(tmp_path / STATUS, clock=clock) as shown:
        named.console = [row["text"] for row in shown.alerts(gone=False).items]
    named.webhook = [alert["what"] for post in posts for alert in post["alerts"]]
    assert {a.device: a.kind for a in monitor.book.open} == {name: kind for name, (kind, _) in FAULTS.items()}
    for sink, texts in vars(named).items():
        for name, (_, reason) in FAULTS.items():
            assert any(name in line and reason in line for text in texts for line in text.splitlines()), (sink, name)
    noise = [r.getMessage() for r in caplog.records if "ignored a message" in r.getMessage()]
    assert any("/ash/" in line for line in noise), "one board's noise doesn't hide another's"
