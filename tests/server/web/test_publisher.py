"""What a server tells its console, and what it does on orders: the daemon and the host, with toy devices."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprune.coordination import Phase
from fedprune_server.monitoring.monitor import Monitor
from fedprune_server.terminal.log_lines import about
from fedprune_server.web.setup import desks_of
from fedprune_server.web.state import rows
from fedprune_server.web.state.device_messages import Coverage, Devices
from fedprune_server.web.state.model import Model
from fedprune_server.web.state.order_messages import EXPIRED, Order
from fedprune_server.web.state.poller import Lookout
from fedprune_server.web.state.publisher import COVERED_S, Feed
from fedprune_server.web.state.publisher_messages import Beat, ToConsole, line, parse_news
from fedprune_server.web.state.surroundings import Member, Members
from support.fakes.fleet import Fleet
from support.fakes.several_jobs import SeveralJobs, named
from support.fakes.tiny_job import JOB

SITE = {
    "version": "1", "site": "default", "started_at": 5.0, "broker": "mqtt://h", "database": "sqlite", "blobs": "folder",
    "insecure": True,
}  # fmt: skip


class Child:
    """A console in memory; what it is told goes through its lines."""

    def __init__(self) -> None:
        self.model = Model()
        self.alive = False
        self.full = False
        self.told: list[ToConsole] = []
        self.given: list[Order] = []
        self.starts = 0

    def start(self, now: float) -> bool:
        before, self.alive = self.alive, True
        self.starts += not before
        return not before

    def tell(self, word: ToConsole) -> None:
        self.told.append(word)
        self.model.hear(parse_news(line(word)))

    def orders(self, now: float) -> Iterator[Order]:
        while self.given:
            yield self.given.pop(0)

    def stop(self) -> None:
        self.alive = False

    def order(self, number: int, kind: str, **fields: Any) -> None:
        self.given.append(Order(number, "ann", kind, **fields))


def watched(server: Any, air: Any, **more: Any) -> tuple[Feed, Child]:
    desks, lent, here = desks_of(server)
    child = Child()
    clock = lambda: air.now  # noqa: E731
    feed = Feed([d.view for d in desks], SITE, child, lent=lent, here=here, clock=clock, monotonic=clock, **more)
    for desk in desks:
        desk.onlookers.join(feed)
    return feed, child


class Many(Members):
    """More who are let in than are told at once."""

    def __init__(self) -> None:
        self._known = {f"board-{i:04d}": Member("member") for i in range(120)}

    def look(self) -> set[str]:
        return set()


def flush(feed: Feed, air: Any) -> None:
    air.now += 1.0
    feed.turned(None, None)


def test_a_console_sees_a_job_from_beginning_to_end(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    daemon = fleet.daemon()
    feed, child = watched(daemon, fleet.air)
    fleet.daemon = lambda **options: daemon  # type: ignore[method-assign]
    state = fleet.run()
    flush(feed, fleet.air)
    model = child.model
    job = model.job(JOB.name)
    assert job is not None
    assert (job["round"], job["phase"], job["model_digest"]) == (state.round, "finished", state.model)
    rounds = model.rounds(JOB.name).items
    assert [r["round"] for r in rounds] == [3, 2, 1]
    assert all((r["counted"], r["devices"]) == (3, 3) for r in rounds)
    rows = {r["name"]: r for r in model.devices().items}
    assert set(rows) == set(state.devices)
    for name, row in rows.items():
        assert (row["bytes_down"], row["bytes_up"]) == daemon.traffic[name]
        assert row["samples"] == state.devices[name].samples
    assert sum(r["bytes_up"] for r in rounds) <= sum(up for _, up in daemon.traffic.values())
    late = [row["staleness"] for word in child.told if isinstance(word, Devices) for row in word.rows]
    assert 0 in late
    assert not any(late), "a board whose round is under way is not late"


def test_a_waiting_board_is_waiting_on_its_page_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, views = Fleet(tmp_path, JOB), []
    whole = rows.device_row
    monkeypatch.setattr(rows, "device_row", lambda view, name, **more: views.append(view) or whole(view, name, **more))
    feed, _ = watched(fleet.daemon(), fleet.air, lookout=Lookout(Many()))
    flush(feed, fleet.air)
    member = Member("waiting", "ab12", "signing key")
    row = whole(views[0], "stranger", job=None, here=False, member=member, traffic=(0, 0), now=None)
    assert (row["state"], row["doing"]) == ("waiting", "waiting")
    assert (row["key"], row["behind"]) == ("ab12", "signing key")


def test_a_console_that_was_started_anew_knows_the_same(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    daemon = fleet.daemon()
    feed, child = watched(daemon, fleet.air)
    fleet.daemon = lambda **options: daemon  # type: ignore[method-assign]
    fleet.run()
    flush(feed, fleet.air)
    before, child.model, child.alive = child.model, Model(), False
    for _ in range(5):
        flush(feed, fleet.air)
    assert child.starts == 2
    assert child.model.devices().items == before.devices().items
    assert child.model.jobs == before.jobs
    assert [r["round"] for r in child.model.rounds(JOB.name).items] == [3, 2, 1]


def test_a_console_knows_when_it_has_heard_of_all_devices_however_busy_they_are(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    feed, child = watched(fleet.daemon(), fleet.air, lookout=Lookout(Many()))
    feed._monotonic = lambda: fleet.air.now if not child.alive else fleet.air.now + 60.0  # one batch at a time
    whole = []
    for _ in range(8):
        fleet.air.now += 100.0
        feed.turned(None, None)
        feed.noticed(["board-0000"])
        whole.append((child.model.whole, len(child.model.device_names) >= 120))
    assert all(heard for done, heard in whole if done)
    assert whole[0] == (False, False)
    assert whole[-1] == (True, True)


def test_rows_too_long_for_a_line_come_in_several_and_one_that_is_wrong_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path, JOB)
    feed, child = watched(fleet.daemon(), fleet.air, lookout=Lookout(Many()))
    whole = rows.device_row

    def long(view: Any, name: str, **more: Any) -> dict[str, Any]:
        wrong = {"density": 7.0} if name == "board-0007" else {}
        return {**whole(view, name, **more), "excluded": "\u00e9" * 2000, **wrong}  # 12,000 bytes each as JSON

    monkeypatch.setattr(rows, "device_row", long)
    flush(feed, fleet.air)
    assert set(child.model.device_names) == {f"board-{i:04d}" for i in range(120)} - {"board-0007"}
    feed._members._known = {}  # type: ignore[union-attr]
    feed.noticed(["board-0001", "board-0002", "board-0007"])
    flush(feed, fleet.air)
    assert len(child.model.device_names) == 117


def test_a_console_is_not_told_that_it_knows_all_before_somebody_has_looked(tmp_path: Path) -> None:
    fleet, found = Fleet(tmp_path, JOB), Lookout(Many())
    seen, found.seen = found.seen, lambda: None  # type: ignore[method-assign]
    feed, child = watched(fleet.daemon(), fleet.air, lookout=found)
    for _ in range(10):
        flush(feed, fleet.air)
    assert (child.model.ready, child.model.whole, any(isinstance(w, Beat) for w in child.told)) == (True, False, True)
    found.seen = seen  # type: ignore[method-assign]
    for _ in range(3):
        flush(feed, fleet.air)
    assert child.model.whole


def test_where_nothing_has_changed_nothing_is_told_of_devices(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    daemon = fleet.daemon()
    feed, child = watched(daemon, fleet.air)
    fleet.daemon = lambda **options: daemon  # type: ignore[method-assign]
    fleet.run()
    flush(feed, fleet.air)
    flush(feed, fleet.air)
    child.told.clear()
    for _ in range(20):
        flush(feed, fleet.air)
    assert {type(w).__name__ for w in child.told} <= {"Beat"}


def test_a_job_is_paused_and_goes_on_and_ends_with_the_same_model(tmp_path: Path) -> None:
    expected = Fleet(tmp_path / "alone", JOB).run().model
    fleet = Fleet(tmp_path / "watched", JOB)
    daemon = fleet.daemon()
    _, child = watched(daemon, fleet.air)
    child.order(1, "pause", job=JOB.name)
    seen: list[tuple[bool, int]] = []

    def look(kind: str, what: Any) -> None:
        if kind == "job" and what["paused"] and fleet.air.now > 60 and not seen:
            seen.append((what["paused"], what["round"]))

    child.model.listen(look)
    paused_until = 120.0

    def watching() -> None:
        if fleet.air.now > paused_until and 2 not in done:
            done.add(2)
            assert daemon.state.phase is Phase.WAITING
            assert daemon.state.paused
            child.order(2, "resume", job=JOB.name)

    done: set[int] = set()
    daemon.onlookers.each_turn(watching)
    fleet.daemon = lambda **options: daemon  # type: ignore[method-assign]
    assert fleet.run().model == expected
    answers = [child.model.answer(n) for n in (1, 2)]
    assert [a and a["ok"] for a in answers] == [True, True]


def test_that_a_job_is_paused_is_said_once_it_is_saved(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    daemon = fleet.daemon()
    feed, child = watched(daemon, fleet.air)
    child.order(1, "pause", job=JOB.name)
    flush(feed, fleet.air)
    assert child.model.answer(1) is None
    daemon._commit()
    flush(feed, fleet.air)
    assert child.model.answer(1)["ok"]  # type: ignore[index]


def test_a_pause_is_remembered_over_restarts(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    daemon = fleet.daemon()
    daemon.pause(True)
    daemon._commit()
    fleet.restart()
    again = fleet.daemon()
    assert again.state.paused
    again.pause(False)
    fleet.daemon = lambda **options: again  # type: ignore[method-assign]
    assert fleet.run().phase is Phase.FINISHED


def test_orders_that_make_no_sense_are_answered(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    feed, child = watched(fleet.daemon(), fleet.air)
    child.order(1, "pause", job="nobodys")
    child.order(2, "look", device="nobody")
    child.order(3, "approve", device="a", key="x")
    child.order(4, "release_quarantine", device="nobody")
    flush(feed, fleet.air)
    assert [child.model.answer(n)["ok"] for n in (1, 2, 3, 4)] == [False] * 4  # type: ignore[index]
    look, other = watched(fleet.daemon(), fleet.air, allowed="look")
    other.order(1, "pause", job=JOB.name)
    other.order(2, "coverage", job=JOB.name)
    flush(look, fleet.air)
    assert [other.model.answer(n)["ok"] for n in (1, 2)] == [False, True]  # type: ignore[index]


def test_an_order_that_comes_too_late_is_not_carried_out(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    daemon = fleet.daemon()
    feed, child = watched(daemon, fleet.air)
    child.order(1, "pause", job=JOB.name, until=fleet.air.now + 0.5)
    child.order(2, "coverage", job=JOB.name, until=fleet.air.now + 1.5)
    flush(feed, fleet.air)
    answers = [child.model.answer(n) for n in (1, 2)]
    assert [a and (a["ok"], a["text"]) for a in answers] == [(False, EXPIRED), (True, "coverage")]
    assert not daemon.state.paused


def test_details_coverage_and_quarantine(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    daemon = fleet.daemon()
    monitor = Monitor(tmp_path, {}, [(daemon.view, tmp_path)])
    feed, child = watched(daemon, fleet.air, alerts=monitor.book)
    fleet.daemon = lambda **options: daemon  # type: ignore[method-assign]
    state = fleet.run()
    quarantine = daemon.view.quarantine
    quarantine.know("a")
    for _ in range(200):
        quarantine.bad("a")
    monitor.look()
    flush(feed, fleet.air)
    flush(feed, fleet.air)
    row = child.model.device("a")
    assert row is not None
    assert row["quarantine"] is not None
    assert [x["alert"] for x in child.model.alerts(gone=False).items] == ["quarantine"]
    child.order(1, "release_quarantine", device="a")
    child.order(2, "look", device="a")
    child.order(3, "coverage", job=JOB.name)
    for _ in range(4):
        flush(feed, fleet.air)
        monitor.look()
    row, found = child.model.device("a"), child.model.details("a")
    assert row is not None
    assert row["quarantine"] is None
    assert child.model.alerts(gone=False).items == []
    assert found is not None
    assert [h["round"] for h in found["history"]] == [3, 2, 1]
    assert [w["kept"] for w in found["widths"]] == list(state.devices["a"].widths)
    covered = child.model.coverage(JOB.name)
    assert covered is not None
    for group in covered["groups"]:
        assert sum(h["channels"] for h in group["held"]) == group["channels"]
        shares = [h["share"] for h in group["held"]]
        assert shares == sorted(shares, reverse=True)


def test_a_console_shows_what_the_monitor_finds(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    daemon = fleet.daemon()
    up, clock = [False], lambda: fleet.air.now
    view = replace(daemon.view, connected=lambda: up[0])
    monitor = Monitor(tmp_path, {}, [(view, tmp_path)], here=lambda: 3, clock=clock, monotonic=clock)
    feed, child = watched(daemon, fleet.air, alerts=monitor.book)
    for up[0], open_alerts in ((False, ["broker"]), (True, [])):
        for _ in range(20):
            monitor.turned(lambda: 0.0, daemon.view)
            flush(feed, fleet.air)
        assert [a["alert"] for a in child.model.alerts(gone=False).items] == open_alerts
        assert monitor.book.counts()["broker", "critical"] == len(open_alerts)
    (row,) = child.model.alerts().items
    assert row["gone_at"] is not None
    assert "To do: see that the broker runs" in row["text"]
    up[0] = False
    for _ in range(20):
        monitor.turned(lambda: 0.0, daemon.view)
        flush(feed, fleet.air)
    child.model, child.alive = Model(), False
    flush(feed, fleet.air)
    assert [a["alert"] for a in child.model.alerts(gone=False).items] == ["broker"], "a console that was started anew"


def test_several_jobs_feed_one_console_and_each_device_has_one_row(tmp_path: Path) -> None:
    several = SeveralJobs(tmp_path, [named(JOB, "one"), named(JOB, "two", seed=5, rounds=2)], "abc")
    host = several.host()
    feed, child = watched(host, several.air)
    states = several.run(host)
    flush(feed, several.air)
    assert [(j["name"], j["phase"]) for j in child.model.jobs] == [("one", "finished"), ("two", "finished")]
    assert {n: len(child.model.rounds(n).items) for n in states} == {"one": 3, "two": 2}
    assert [r["name"] for r in child.model.devices().items] == ["a", "b", "c"]


def test_a_feed_that_fails_costs_the_job_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet(tmp_path, JOB)
    daemon = fleet.daemon()
    _, child = watched(daemon, fleet.air)

    def fail(word: ToConsole) -> None:
        raise RuntimeError("a\nbug")

    child.tell = fail  # type: ignore[method-assign]
    fleet.daemon = lambda **options: daemon  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR, "fedprune.server"):
        assert fleet.run().phase is Phase.FINISHED
    assert any("the console isn't told all" in m for m in caplog.messages)


def test_a_round_that_cannot_be_told_costs_the_job_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path, JOB)
    daemon = fleet.daemon()
    watched(daemon, fleet.air)
    whole = rows.round_news
    monkeypatch.setattr(rows, "round_news", lambda *given: {**whole(*given), "metrics": {"a metric": 1.0}})
    fleet.daemon = lambda **options: daemon  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR, "fedprune.server"):
        assert fleet.run().phase is Phase.FINISHED
    assert any("metrics: key" in m for m in caplog.messages)


def test_coverage_is_made_once_for_those_who_ask_at_the_same_time(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    daemon = fleet.daemon()
    feed, child = watched(daemon, fleet.air)
    fleet.daemon = lambda **options: daemon  # type: ignore[method-assign]
    fleet.run()
    for number in range(1, 30):
        child.order(number, "coverage", job=JOB.name)
    flush(feed, fleet.air)
    flush(feed, fleet.air)
    assert sum(isinstance(w, Coverage) and w.last for w in child.told) == 1
    assert all((child.model.answer(n) or {}).get("ok") for n in range(1, 30))
    child.order(30, "coverage", job=JOB.name)
    fleet.air.now += COVERED_S
    flush(feed, fleet.air)
    assert sum(isinstance(w, Coverage) and w.last for w in child.told) == 2


def test_lines_of_the_log_say_what_they_are_about(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    feed, child = watched(fleet.daemon(), fleet.air)
    log = logging.getLogger("fedprune.server.trial")
    log.addHandler(feed.tap)
    try:
        with about(job=JOB.name, round=3, trace_id="ab"):
            log.warning("the disk is slow")
            with about(device="b"):
                log.warning("no word")
            with about(device="no name"):
                log.warning("a topic of somebody's own")
    finally:
        log.removeHandler(feed.tap)
    flush(feed, fleet.air)
    found = [(x["text"], x["job"], x["round"], x["device"]) for x in child.model.lines().items]
    assert found == [
        ("a topic of somebody's own", None, None, None), ("no word", JOB.name, 3, "b"),
        ("the disk is slow", JOB.name, 3, None),
    ]  # fmt: skip


def test_lines_of_the_log_steer_no_terminal_and_begin_no_other_line(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    feed, child = watched(fleet.daemon(), fleet.air)
    log = logging.getLogger("fedprune.server.trial")
    log.addHandler(feed.tap)
    try:
        log.warning("device a says: %s", "x\n12:00:00 job finished\x1b[2J\u202e<script>alert(1)</script>" + "y" * 5000)
    finally:
        log.removeHandler(feed.tap)
    flush(feed, fleet.air)
    (found,) = child.model.lines(only={"device": "a"}).items
    assert found["text"].isprintable()
    assert len(found["text"]) < 1600
