"""What is wrong in silence is named with the reason by everything that shows a fleet: boards, and a locked database.

The server, its monitor, its console's file and its notifications are real; the broker and the boards are in memory.
"""

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.disk import file_lock
from fedprune.core.errors import ExitCode
from fedprune.wire.messages import Birth, Offer, Refusal
from fedprune_server.cli.status import server_status, status_text
from fedprune_server.config.alert_settings import AlertSettings
from fedprune_server.maintenance.doctor import diagnose
from fedprune_server.monitoring.monitor import DATABASE_WAIT_LIMIT_S, Monitor
from fedprune_server.monitoring.monitor_record import read_monitor_record
from fedprune_server.monitoring.notifications import Notifier
from fedprune_server.observation.observer import LoopBlocked, RoundEnded
from fedprune_server.storage import sqlite_engine
from fedprune_server.storage.folder_layout import DATABASE_FILE as DATABASE
from fedprune_server.storage.folder_lock import LOCK_FILE
from fedprune_server.web.state.fleet_view import FleetView
from fedprune_server.web.state.publisher import StatusPublisher
from fedprune_server.web.state.status_writer import STATUS_FILE as STATUS
from fedprune_server.web.state.status_writer import StatusWriter
from support import waiting
from support.fakes.fleet import Fleet, ToyDevice, Watcher
from support.fakes.tiny_job import JOB

pytestmark = pytest.mark.system

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
    "hung": ("device-excluded", "no answer to an offer"),
}
"""The kind of the alert and a word of its reason, by board."""


class FullBoard(ToyDevice):
    """A board without room on its disk."""

    def take(self, offer: Offer) -> None:
        reason = "no room left on the disk"
        self.say(Refusal(self.name, offer.job, offer.round, offer.attempt, reason, ExitCode.STORAGE_FULL))


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
    devices["hung"].silent = True
    devices["full"] = FullBoard("full", fleet.folder / "devices", air)
    copy, original = ToyDevice("copied", fleet.folder / "copy", air), devices["copied"]
    copy.session = original.session + 1
    for board in (copy, original, copy, original):
        board.send_birth()
    for _ in range(100):  # what neither can sign so that the server accepts it from both
        air.to_server(original.topics.up("copied"), b"of an epoch that is over")
    air.to_server(original.topics.up("ash"), b"{")


HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def suspended_claim(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that was suspended (Ctrl-Z) while it wrote into the server's database."""
    command = [sys.executable, "-c", HOLDER, str(folder / DATABASE), "claim", "--count", "1000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        process.send_signal(signal.SIGSTOP)
        try:
            yield process
        finally:
            process.kill()


class Site:
    """A server with everything that shows its fleet, on a broker and with boards in memory."""

    def __init__(self, folder: Path, url: str, posts: list[dict[str, Any]], log: Callable[[], list[str]]) -> None:
        self.folder, self._posts, self._log = folder, posts, log
        self.fleet = Fleet(folder, replace(JOB, rounds=9, devices=2, deadline_s=30.0), (*WELL, *FAULTS))
        self.fleet.storage.put_settings({"job": self.fleet.job.to_dict()})
        self.on_event: Callable[[object], None] = lambda what: None
        self.monitor = Monitor(
            folder, {}, {self.fleet.job.name: folder}, away_rounds=2, clock=self.now, monotonic=self.now
        )
        self._publisher = StatusPublisher(
            SITE, StatusWriter(folder / STATUS), alerts=self.monitor.book, clock=self.now, monotonic=self.now
        )
        self.daemon = self.fleet.daemon(observers=[self.monitor, Watcher(lambda seen, what: self.on_event(what))])
        self.notifier = Notifier(AlertSettings(webhook=url), "default", self.monitor.open_alerts, lambda: True)
        self.monitor.start()

    def now(self) -> float:
        return self.fleet.air.now

    def run(self, on_event: Callable[[object], None]) -> None:
        def idle() -> None:
            if self.daemon.is_busy:
                time.sleep(0.0005)  # the worker's thread is real
            else:
                self.fleet.air.now += 0.5

        self.fleet.air.on_idle = idle
        self.on_event = on_event
        self.daemon.run()

    def lines(self, *kinds: str) -> dict[str, list[str]]:
        """What each sink shows, once all have heard of these kinds of alerts."""
        waiting.until(lambda: {a.kind for a in read_monitor_record(self.folder).alerts} >= set(kinds))
        waiting.until(lambda: {a["kind"] for post in self._posts for a in post["alerts"]} >= set(kinds))
        self._publisher.publish()
        with FleetView(self.folder / STATUS, clock=self.now) as shown:
            console = [row["text"] for row in shown.alerts(gone=False).items]
        return {
            "log": [line for line in self._log() if line.startswith("alert:")],
            "status": status_text(server_status(self.folder)).splitlines(),
            "doctor": [finding.message for finding in diagnose(self.folder)],
            "console": console,
            "webhook": [alert["what"] for post in self._posts for alert in post["alerts"]],
        }


@pytest.fixture
def site(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Site]:
    caplog.set_level(logging.INFO, "fedprune.server")
    with webhook() as (url, posts), file_lock(tmp_path / LOCK_FILE, "a server runs", ""):
        made = Site(tmp_path, url, posts, lambda: list(caplog.messages))
        try:
            yield made
        finally:
            made.monitor.close()
            made.notifier.close()


def test_each_board_that_falls_silent_is_named_with_its_reason_within_two_rounds(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    actions = {3: lambda: break_boards(site.fleet), 5: site.daemon.stop}

    def act(what: object) -> None:
        if isinstance(what, RoundEnded):
            actions.get(what.summary["round"], lambda: None)()

    site.run(act)
    sinks = site.lines(*{kind for kind, _ in FAULTS.values()})
    alerts = {
        a.device: a.kind for a in site.monitor.book.open_alerts if a.device is not None
    }  # the round's own is closing
    assert alerts == {name: kind for name, (kind, _) in FAULTS.items()}
    for sink, lines in sinks.items():
        for name, (_, reason) in FAULTS.items():
            assert any(name in line and reason in line for line in lines), (sink, name)
    noise = [line for line in caplog.messages if "ignored a message" in line]
    assert any("/ash/" in line for line in noise), "one board's noise doesn't hide another's"


def test_a_command_that_is_suspended_within_a_transaction_is_named_while_the_server_waits(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_engine, "SQLITE_RETRY_S", 0.02)
    site.fleet.storage.database.engine.dispose()
    with ExitStack() as stack:
        held: list[subprocess.Popen[str]] = []
        sinks: dict[str, list[str]] = {}

        def act(what: object) -> None:
            if isinstance(what, RoundEnded) and what.summary["round"] == 2:
                held.append(stack.enter_context(suspended_claim(site.folder)))
            elif isinstance(what, LoopBlocked):
                if any(alert.kind == "database-waits" for alert in site.monitor.book.open_alerts):
                    sinks.update(site.lines("database-waits"))
                    site.daemon.stop()
                    held[0].kill()
                site.fleet.air.now += DATABASE_WAIT_LIMIT_S

        site.run(act)
    for sink, lines in sinks.items():
        assert any(str(held[0].pid) in line and "stopped" in line for line in lines), sink
    assert sinks
    open_kinds = {alert.kind for alert in site.monitor.book.open_alerts}
    assert "database-waits" not in open_kinds, "it is over once the command is"
