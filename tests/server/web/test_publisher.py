"""What a server publishes for its console, and what it does on orders: the daemon and the host, with toy devices."""

import json
import logging
import math
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedprune.coordination import Phase
from fedprune.core.errors import StorageError
from fedprune.output.log_lines import log_context
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.engine.job_runner import JobRunner
from fedprune_server.engine.server import Server
from fedprune_server.enrollment.store import APPROVED, MemberKey
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.alerts import Alert
from fedprune_server.monitoring.monitor import Monitor
from fedprune_server.observation.observer import Observer, Observers
from fedprune_server.observation.snapshot import DeviceSnapshot, FleetSnapshot, JobSnapshot
from fedprune_server.web.database import ConsoleDatabase
from fedprune_server.web.observer import ConsoleObserver
from fedprune_server.web.state.fleet_view import FleetView
from fedprune_server.web.state.membership_poller import MembershipPoller
from fedprune_server.web.state.order_handler import AdminExecutor, OrderHandler
from fedprune_server.web.state.order_queue import INTERRUPTED, Order, OrderQueue
from fedprune_server.web.state.publisher import StatusPublisher
from fedprune_server.web.state.status_writer import STATUS_FILE, StatusWriter
from support.fakes.fleet import Air, Fleet, Watcher
from support.fakes.several_jobs import SeveralJobs, rename_job
from support.fakes.shown_jobs import TRAINING_SNAPSHOT, show
from support.fakes.tiny_job import JOB
from support.waiting import until

SITE = {
    "version": "1", "site": "default", "started_at": 5.0, "broker": "mqtt://h", "database": "sqlite", "blobs": "folder",
    "insecure": True,
}  # fmt: skip


class Console:
    """A server's console without its process: the files, the server's side of them, and a view."""

    def __init__(self, folder: Path, air: Air, allowed: str = "all", **options: Any) -> None:
        self._air, clock = air, lambda: air.now
        self.writer = StatusWriter(folder / STATUS_FILE)
        self.publisher = StatusPublisher(SITE, self.writer, **{"clock": clock, "monotonic": clock, **options})
        self.database = ConsoleDatabase(folder / "console.db")
        self.queue = OrderQueue(self.database, clock)
        self.quarantine = Quarantine(clock)
        self.runners: dict[str, JobRunner] = {}
        self.orders = OrderHandler(
            self.queue, self.publisher, self.runners, self.quarantine, folder, None, allowed=allowed, clock=clock
        )
        self.observer = ConsoleObserver(self.publisher, self.orders, None, clock)
        self._observers = Observers([self.observer], clock)
        self.view = FleetView(folder / STATUS_FILE, clock=clock)

    def serve(self, server: Server) -> Server:
        """Take orders for a server."""
        self.server = server
        self.runners.update(server.runners)
        return server

    def order(self, kind: str, until: float = 1e12, **what: Any) -> int:
        """Add an order as the console's process does."""
        values = (self._air.now, until, "ann", "::1", kind, json.dumps(what))
        query = "INSERT INTO orders (at, until, operator, address, kind, what) VALUES (?, ?, ?, ?, ?, ?)"
        self.database.execute(query, *values)
        latest = self.database.row("SELECT max(number) AS n FROM orders")
        assert latest is not None
        return int(latest["n"])

    def answer(self, number: int) -> tuple[bool, str] | None:
        row = self.database.row("SELECT * FROM orders WHERE number = ?", number)
        assert row is not None
        return (bool(row["ok"]), row["text"]) if row["state"] == "done" else None

    def flush(self, turns: int = 1) -> None:
        """Let time pass, and the console have its turn."""
        for _ in range(turns):
            self._air.now += 1.0
            fleet = self.server.fleet_snapshot()
            self._observers.show([(r.snapshot(fleet), r.take_events()) for r in self.runners.values()])


def watched_server(fleet: Fleet, *observers: Observer, **options: Any) -> tuple[Server, Console]:
    console = Console(fleet.folder, fleet.air, **options)
    return console.serve(fleet.daemon(observers=[console.observer, *observers], quarantine=console.quarantine)), console


def run_job(folder: Path) -> tuple[Any, Any, Console]:
    """A job that is run to its end with a console: its server, its last state and the console."""
    fleet = Fleet(folder, JOB)
    daemon, console = watched_server(fleet)
    state = fleet.run_daemon(daemon)
    console.flush()
    return daemon, state, console


class Many:
    """Memberships of more boards than are published at once."""

    def version(self) -> str:
        return "1"

    def devices(self) -> list[MemberKey]:
        return [MemberKey(f"board-{i:04d}", "", APPROVED, 0) for i in range(120)]


MANY: Any = Many()


def test_a_console_sees_a_job_from_beginning_to_end(tmp_path: Path) -> None:
    daemon, state, console = run_job(tmp_path)
    view = console.view
    job = view.job(JOB.name)
    assert job is not None
    assert (job["round"], job["phase"], job["model_digest"]) == (state.round, "finished", state.model)
    assert job["deadline_at"] is None, "nothing waits for boards any more"
    rounds = view.rounds(JOB.name).items
    assert [r["round"] for r in rounds] == [3, 2, 1]
    assert all((r["counted"], r["devices"]) == (3, 3) for r in rounds)
    rows = {r["name"]: r for r in view.devices().items}
    assert set(rows) == set(state.devices)
    for name, row in rows.items():
        assert (row["bytes_down"], row["bytes_up"]) == daemon.main_runner.registry.traffic[name]
        assert row["samples"] == state.devices[name].samples
        assert row["staleness"] == 0, "a board whose round is under way is not late"
    assert sum(r["bytes_up"] for r in rounds) <= sum(up for _, up in daemon.main_runner.registry.traffic.values())


def test_a_server_that_was_started_again_publishes_the_same(tmp_path: Path) -> None:
    daemon, _, console = run_job(tmp_path)

    def published_rows(view: FleetView) -> list[Any]:
        return [view.devices().items, view.jobs, [r["round"] for r in view.rounds(JOB.name).items]]

    before = published_rows(console.view)
    restarted = Console(tmp_path, console._air)
    restarted.serve(daemon)
    restarted.flush(3)
    published = published_rows(restarted.view)
    for row in (*before[0], *published[0]):
        row["seen_at"] = None  # nobody knows any more
    assert published == before
    assert restarted.view.is_complete


def test_a_view_is_whole_once_all_devices_are_published_however_busy_they_are(tmp_path: Path) -> None:
    fleet, moments = Fleet(tmp_path, JOB), iter(range(10_000))
    # Of a clock that leaps there is time for one batch in each call.
    _, console = watched_server(fleet, poller=MembershipPoller(MANY), monotonic=lambda: 60.0 * next(moments))
    completeness = []
    for _ in range(8):
        console.flush()
        console.publisher.mark_changed(["board-0000"])
        completeness.append((console.view.is_complete, len(console.view.device_names) >= 120))
    assert all(heard for done, heard in completeness if done)
    assert completeness[0] == (False, False)
    assert completeness[-1] == (True, True)


def test_a_row_that_is_wrong_costs_no_other(tmp_path: Path) -> None:
    publisher = StatusPublisher(SITE, StatusWriter(tmp_path / STATUS_FILE))
    rows = {n: DeviceSnapshot(name=n, temperature_c=t) for n, t in {"a": 50.0, "b": math.nan}.items()}
    publisher.note(replace(TRAINING_SNAPSHOT, devices=rows, fleet=FleetSnapshot()), [])
    with pytest.raises(StorageError, match="device b"):
        publisher.publish()
    assert set(FleetView(tmp_path / STATUS_FILE).device_names) == {"a"}


def test_a_view_is_not_whole_before_members_are_known(tmp_path: Path) -> None:
    ready = threading.Event()

    class Slow(Many):
        def version(self) -> str:
            assert ready.wait(30)
            return "1"

    slow: Any = Slow()
    poller = MembershipPoller(slow)
    _, console = watched_server(Fleet(tmp_path, JOB), poller=poller)
    poller.start()
    console.flush(10)
    assert (console.view.is_ready, console.view.is_complete) == (True, False)
    ready.set()
    until(lambda: (console.flush(), console.view.is_complete)[1])
    poller.close()


def test_where_nothing_has_changed_nothing_is_published_but_that_the_server_runs(tmp_path: Path) -> None:
    _, _, console = run_job(tmp_path)
    console.flush()
    console.view.changes()
    console.flush(20)
    assert console.view.changes() == set()
    assert console.view.is_ready


def test_what_could_not_be_written_is_published_once_it_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet(tmp_path, JOB)
    daemon, console = watched_server(fleet)
    write, full = console.writer.write, StorageError("the disk is full")

    def fail(*_: Any, **__: Any) -> None:
        raise full

    console.writer.write = fail  # type: ignore[method-assign]
    line = logging.makeLogRecord({"name": "fedprune.server", "levelno": logging.WARNING, "msg": "before it was full"})
    console.publisher.tap.handle(line)
    with caplog.at_level(logging.ERROR, "fedprune.server"):
        assert fleet.run_daemon(daemon).phase is Phase.FINISHED
    assert any("ConsoleObserver failed, and is called again: the disk is full" in m for m in caplog.messages)
    assert (console.view.site, console.view.devices().total) == (None, 0)
    console.writer.write = write  # type: ignore[method-assign]
    console.flush(2)
    assert [r["round"] for r in console.view.rounds(JOB.name).items] == [3, 2, 1]
    assert (console.view.devices().total, console.view.is_complete) == (3, True)
    assert line.msg in [shown["text"] for shown in console.view.lines().items]


def test_no_reader_and_no_hanging_console_holds_up_the_server(tmp_path: Path) -> None:
    _, _, console = run_job(tmp_path)
    reader = sqlite3.connect(f"file:{tmp_path / STATUS_FILE}?mode=ro", uri=True, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM records").fetchone()
    hanging = sqlite3.connect(tmp_path / "console.db", isolation_level=None)
    number = console.order("coverage", job=JOB.name)
    hanging.execute("BEGIN IMMEDIATE")
    console.publisher.mark_changed(["a"])
    console.flush()
    assert console.answer(number) is None
    hanging.execute("ROLLBACK")
    console.flush(2)
    assert console.answer(number) == (True, "coverage")
    reader.close()
    hanging.close()


def test_an_order_that_an_earlier_start_has_taken_is_not_carried_out_again(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    _, console = watched_server(fleet)
    pause, waits = console.order("pause", job=JOB.name), console.order("coverage", job=JOB.name)
    assert [o.number for o in console.queue.take(1)] == [pause]
    _, restarted = watched_server(fleet)
    restarted.flush(2)
    assert (restarted.answer(pause), restarted.answer(waits)) == ((False, INTERRUPTED), (True, "coverage"))


def test_a_job_is_paused_and_goes_on_and_ends_with_the_same_model(tmp_path: Path) -> None:
    expected = Fleet(tmp_path / "alone", JOB).run().model
    fleet = Fleet(tmp_path / "watched", JOB)

    def act(snapshot: JobSnapshot, what: object) -> None:
        if snapshot.is_paused:
            assert snapshot.closes_at is None, "a deadline that doesn't pass is shown"
        if fleet.air.now > 120.0 and len(numbers) == 1:
            assert daemon.main_runner.state.phase is Phase.WAITING
            assert daemon.main_runner.state.paused
            job = console.view.job(JOB.name)
            assert job is not None
            assert job["paused"]
            numbers.append(console.order("resume", job=JOB.name))

    daemon, console = watched_server(fleet, Watcher(act))
    numbers = [console.order("pause", job=JOB.name)]
    assert fleet.run_daemon(daemon).model == expected
    assert [(console.answer(n) or (False,))[0] for n in numbers] == [True, True]


def test_that_a_job_is_paused_is_answered_once_it_is_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedprune.server")
    daemon, console = watched_server(Fleet(tmp_path, JOB))
    number = console.order("pause", job=JOB.name)
    console.flush()
    assert console.answer(number) is None
    daemon.main_runner._commit()
    console.flush()
    assert console.answer(number) == (True, f"job {JOB.name} is paused")
    console.order("resume", job=JOB.name)
    console.flush()
    messages = [r.getMessage() for r in caplog.records if ", as ann ordered" in r.getMessage()]
    assert messages == [f"job {JOB.name} {end}, as ann ordered" for end in ("is paused", "goes on")]
    resume = console.order("resume", job=JOB.name)
    console.flush()
    daemon.main_runner._commit()
    console.flush()
    assert console.answer(resume) == (True, f"job {JOB.name} is not paused")


def test_an_order_that_fails_unexpectedly_is_answered_and_costs_no_other(tmp_path: Path) -> None:
    _, _, console = run_job(tmp_path)
    broken: Any = SimpleNamespace(job=JOB, state=None)
    runners, folder = {**console.runners, "broken": broken}, tmp_path
    orders = OrderHandler(console.queue, console.publisher, runners, console.quarantine, folder, None)
    numbers = [console.order("coverage", job="broken"), console.order("pause", job=JOB.name)]
    orders.turn()
    orders.turn()
    assert console.answer(numbers[0]) == (False, "it failed; see the server's log")
    assert console.answer(numbers[1]) == (True, f"job {JOB.name} is paused")


def test_an_order_that_is_carried_out_as_the_server_ends_is_answered(tmp_path: Path) -> None:
    _, _, console = run_job(tmp_path)
    begun, go_on = threading.Event(), threading.Event()

    class Slow(AdminExecutor):
        def carry_out(self, order: Order) -> str:
            begun.set()
            assert go_on.wait(30)
            return "it is a member"

    executor = Slow(tmp_path, None, console.queue.answer, lambda: 0.0)
    orders = OrderHandler(console.queue, console.publisher, console.runners, console.quarantine, tmp_path, executor)
    observer = ConsoleObserver(console.publisher, orders, None, lambda: 1e12)
    number = console.order("approve", device="a", key="ab12")
    show(observer)
    assert begun.wait(30)
    go_on.set()
    observer.close()
    assert console.answer(number) == (True, "it is a member")


def test_orders_that_make_no_sense_are_answered(tmp_path: Path) -> None:
    _, console = watched_server(Fleet(tmp_path, JOB))
    numbers = [
        console.order("pause", job="nobodys"), console.order("look", device="nobody"),
        console.order("approve", device="a", key="x"), console.order("release_quarantine", device="nobody"),
        console.order("shutdown"), console.order("pause", operator="root"), console.order("look", device="../x"),
    ]  # fmt: skip
    console.database.execute("UPDATE orders SET what = '[' WHERE number = ?", console.order("look", device="a"))
    console.flush()
    assert [(console.answer(n) or (True,))[0] for n in (*numbers, numbers[-1] + 1)] == [False] * 8


@pytest.mark.parametrize(("allowed", "expected"), [("none", [False, False]), ("look", [False, True])])
def test_a_server_carries_out_only_the_orders_that_it_allows(
    tmp_path: Path, allowed: str, expected: list[bool]
) -> None:
    _, console = watched_server(Fleet(tmp_path, JOB), allowed=allowed)
    numbers = [console.order("pause", job=JOB.name), console.order("coverage", job=JOB.name)]
    console.flush()
    assert [(console.answer(n) or (None,))[0] for n in numbers] == expected


def test_details_coverage_and_quarantine(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    book, clock = AlertBook(), lambda: fleet.air.now
    daemon, console = watched_server(fleet, alerts=book)
    monitor = Monitor(tmp_path, {}, {JOB.name: tmp_path}, book=book, clock=clock, monotonic=clock)

    def look() -> None:
        console.flush()
        monitor.observe(daemon.main_runner.snapshot(daemon.fleet_snapshot()), ())
        console.flush()

    state = fleet.run_daemon(daemon)
    console.quarantine.add_known("a")
    for _ in range(200):
        console.quarantine.charge_invalid("a")
    look()
    row = console.view.device("a")
    assert row is not None
    assert row["quarantine"] is not None
    assert [x["alert"] for x in console.view.alerts(gone=False).items] == ["quarantine"]
    console.order("release_quarantine", device="a")
    console.order("look", device="a")
    console.order("coverage", job=JOB.name)
    for _ in range(4):
        look()
    row, details = console.view.device("a"), console.view.details("a")
    assert row is not None
    assert row["quarantine"] is None
    assert console.view.alerts(gone=False).items == []
    assert details is not None
    assert [h["round"] for h in details["history"]] == [3, 2, 1]
    assert [w["kept"] for w in details["widths"]] == list(state.devices["a"].widths)
    covered = console.view.coverage(JOB.name)
    assert covered is not None
    for group in covered["groups"]:
        assert sum(h["channels"] for h in group["held"]) == group["channels"]
        shares = [h["share"] for h in group["held"]]
        assert shares == sorted(shares, reverse=True)


def test_an_alert_is_shown_with_its_present_text_and_closes_whatever_that_is(tmp_path: Path) -> None:
    fleet, book = Fleet(tmp_path, JOB), AlertBook()
    _, console = watched_server(fleet, alerts=book)
    first = Alert("rollout", "warning", 5.0, "it waits for a and b", "why", "wait")
    changes: list[tuple[str, bool]] = []
    for second, alerts in enumerate([[first], [replace(first, what="it waits for b")], [], [first]]):
        book.update(alerts, float(second), 5.0 + second)
        console.flush()
        (row,) = console.view.alerts().items
        changes.append((row["text"].partition(".")[0], row["gone_at"] is None))
    assert changes == [
        ("it waits for a and b", True), ("it waits for b", True), ("it waits for b", False),
        ("it waits for a and b", True),
    ]  # fmt: skip
    console.view.changes()
    book.update([first], 9.0, 14.0)
    console.flush()
    assert "alert" not in console.view.changes(), "what stays as it is, is not written again"


def test_several_jobs_publish_to_one_console_and_each_device_has_one_row(tmp_path: Path) -> None:
    several = SeveralJobs(tmp_path, [rename_job(JOB, "one"), rename_job(JOB, "two", seed=5, rounds=2)], "abc")
    console = Console(tmp_path, several.air)
    states = several.run(console.serve(several.host(observers=[console.observer])))
    console.flush()
    assert [(j["name"], j["phase"]) for j in console.view.jobs] == [("one", "finished"), ("two", "finished")]
    assert {n: console.view.rounds(n).total for n in states} == {"one": 3, "two": 2}
    assert [r["name"] for r in console.view.devices().items] == ["a", "b", "c"]


def test_lines_of_the_log_have_their_context(tmp_path: Path) -> None:
    _, console = watched_server(Fleet(tmp_path, JOB))
    log = logging.getLogger("fedprune.server.trial")
    log.addHandler(console.publisher.tap)
    try:
        with log_context(job=JOB.name, round=3, trace_id="ab"):
            log.warning("the disk is slow")
            with log_context(device="b"):
                log.warning("no word")
            with log_context(device="no name"):
                log.warning("a foreign topic")
        log.warning("no device has ever announced itself")
        log.warning("device b. is known, device c is not asked for")
        log.warning("device a says: %s", "x\n12:00:00 job finished\x1b[2J\u202e<script>alert(1)</script>" + "y" * 5000)
    finally:
        log.removeHandler(console.publisher.tap)
    console.publisher.mark_changed(["a", "b"])
    console.flush()
    hostile, *others = console.view.lines().items
    assert hostile["device"] == "a"
    assert hostile["text"].isprintable(), "it steers no terminal, and begins no other line"
    assert len(hostile["text"]) < 1600
    assert [(x["text"], x["job"], x["round"], x["device"]) for x in others] == [
        ("device b. is known, device c is not asked for", None, None, "b"),
        ("no device has ever announced itself", None, None, None),
        ("a foreign topic", None, None, None), ("no word", JOB.name, 3, "b"), ("the disk is slow", JOB.name, 3, None),
    ]  # fmt: skip
