"""The alert rules, the book that opens and closes alerts, and the monitor that fills both from a running job."""

from __future__ import annotations

import json
import logging
import queue
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedprune.coordination import Phase
from fedprune.coordination.commands import SendOffer
from fedprune.coordination.events import Ticked
from fedprune.core.errors import StorageError
from fedprune.core.lock_wait import call_wait_hook, wait_hook
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.state import Device as Board
from fedprune.releases.rollout import RolloutPhase
from fedprune.security.keys import SigningKey
from fedprune.wire.messages import Refusal
from fedprune_server.devices.clone_detection import APART_S, SIGNS
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.store import Device, IdentityStore
from fedprune_server.monitoring import monitor as monitor_module
from fedprune_server.monitoring import site_facts as site_facts_module
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.alerts import ALERT_SEVERITIES, MAX_ALERTS_OF_KIND, Alert, evaluate_alerts
from fedprune_server.monitoring.monitor import FILE, JobWatch, Monitor, Recorded, off_by_far, read_recorded
from fedprune_server.monitoring.observer import Observer
from fedprune_server.monitoring.participation import Absence, Participation
from fedprune_server.monitoring.snapshot import (
    CertificateDates,
    JobStatus,
    RolloutStatus,
    SiteFacts,
    Snapshot,
)
from fedprune_server.ota.store import RolloutStore
from support.fakes.fleet import Fleet, ToyDevice
from support.fakes.tiny_job import JOB
from support.paths import ROOT

NOW, DAY, ROOM = 1_800_000_000.0, 86_400.0, 32 * 10**9
TRAINING = JobStatus("leaves", Path("state"), phase=Phase.TRAINING, round=3, rounds=9, needed=2, known=2)
CALM = Snapshot(Path("state"), [TRAINING], 2, site=SiteFacts((ROOM // 2, ROOM)))


class Disk:
    """How much of a disk is free, as the monitor is told."""

    free = 0.5

    def __call__(self, folder: Path) -> Any:
        return SimpleNamespace(total=ROOM, used=ROOM - int(self.free * ROOM), free=int(self.free * ROOM))


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Half full, however full this machine's is."""
    disk = Disk()
    monkeypatch.setattr(site_facts_module.shutil, "disk_usage", disk)
    return disk


def with_job(here: int = 2, **values: Any) -> Snapshot:
    return replace(CALM, jobs=[replace(TRAINING, **values)], here=here)


def with_site(**values: Any) -> Snapshot:
    return replace(CALM, site=replace(SiteFacts((ROOM // 2, ROOM)), **values))


def ending(days: float) -> CertificateDates:
    return CertificateDates("server.pem", NOW - DAY, NOW + days * DAY, "start the server again")


def rollout(phase: RolloutPhase, why: str = "", failed: tuple[str, ...] = (), silent_s: float = 0.0) -> Snapshot:
    return with_site(rollout=RolloutStatus(7, phase, why, failed, ("b",), NOW - silent_s))


def without_a(kind: str) -> Snapshot:
    return replace(CALM, absences={"a": Absence(kind, "doesn't take part", NOW - DAY)})


@pytest.mark.parametrize("seen", [with_job(0), with_job(0, known=0), with_job(1, phase=Phase.WAITING, away=["b"])])
def test_boards_that_a_lost_broker_keeps_away_are_no_alert_of_their_own(seen: Snapshot) -> None:
    assert [a.kind for a in evaluate_alerts(replace(seen, broker="there is no connection to the broker"), NOW)] == [
        "broker"
    ]


CASES: dict[str, tuple[Snapshot, str, str]] = {
    "a server that is dead": (replace(with_job(0), running=False), "server-not-running", "critical"),
    "a folder without a job": (replace(with_job(begun=False), running=False), "server-not-running", "critical"),
    "a loop that hangs": (replace(CALM, turned_s=61.0), "server-hangs", "critical"),
    "a database that is locked": (
        replace(CALM, waits_for="server.db is locked by process 7"), "database-waits", "critical",
    ),
    "no broker": (replace(CALM, broker="there is no connection to the broker"), "broker", "critical"),
    "all boards away": (with_job(0), "no-devices", "critical"),
    "no board yet": (with_job(0, known=0), "no-devices", "warning"),
    "one board of two": (with_job(1, phase=Phase.WAITING, away=["b"]), "too-few-devices", "warning"),
    "a missed deadline": (with_job(missed=1), "no-progress", "critical"),
    "a round without updates": (with_job(empty=1), "no-progress", "critical"),
    "a round that waits for a board that is offline": (
        with_job(awaited={"a": NOW - 9}, closes_at=NOW + 500), "round-waits", "warning",
    ),
    "a board off its plan": (with_job(off={"a": "memory 2 MB instead of 1 MB"}), "prediction-off", "info"),
    "a disk that fills": (with_site(disk=(ROOM // 20, ROOM)), "disk", "warning"),
    "a disk that is full": (with_site(disk=(ROOM // 100, ROOM)), "disk", "critical"),
    "a certificate near its end": (with_site(certificates=[ending(29)]), "certificate", "warning"),
    "a certificate at its end": (with_site(certificates=[ending(-1)]), "certificate", "critical"),
    "a certificate of tomorrow": (
        with_site(certificates=[replace(ending(99), begins=NOW + DAY)]), "certificate", "critical",
    ),
    "a certificate that is damaged": (
        with_site(certificates=[replace(ending(99), error="no PEM")]), "certificate", "critical",
    ),
    "a board in quarantine": (without_a("quarantine"), "quarantine", "warning"),
    "a board of which there are two": (without_a("device-cloned"), "device-cloned", "warning"),
    "a board that is excluded": (without_a("device-excluded"), "device-excluded", "warning"),
    "a board whose updates don't count": (without_a("device-failing"), "device-failing", "warning"),
    "a board of which the broker drops messages": (without_a("broker-drops"), "broker-drops", "warning"),
    "a board that has joined just now": (with_site(unannounced={"a": NOW - 26}), "device-unheard", "info"),
    "a board that has joined, and is not heard": (
        with_site(unannounced={"a": NOW - 200}), "device-unheard", "warning",
    ),
    "a board that is gone": (without_a("device-away"), "device-away", "warning"),
    "requests to join that flood the server": (
        replace(CALM, floods_joins="ab" * 16), "joins-flooded", "warning",
    ),
    "a board that waits": (with_site(waiting={"a": "1234"}), "devices-wait", "warning"),
    "a rollout that failed": (rollout(RolloutPhase.STOPPED, "too many", ("a",)), "rollout", "warning"),
    "a rollout that was stopped": (rollout(RolloutPhase.STOPPED, "stopped: by ann"), "rollout", "info"),
    "a rollout that is paused": (rollout(RolloutPhase.PAUSED, "paused: by ann"), "rollout-paused", "info"),
    "a rollout that hears nothing": (rollout(RolloutPhase.RUNNING, silent_s=DAY), "rollout", "warning"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_trouble_is_one_alert_with_a_remedy(case: str) -> None:
    seen, kind, severity = CASES[case]
    (found,) = evaluate_alerts(seen, NOW)
    assert (found.kind, found.severity) == (kind, severity)
    assert severity in ALERT_SEVERITIES[kind]
    assert all((found.what, found.why, found.todo))
    assert found.delay_s <= TRAINING.deadline_s / 2
    assert found.since <= NOW


def test_every_kind_is_tried_and_is_on_the_page() -> None:
    assert {kind for _, kind, _ in CASES.values()} == set(ALERT_SEVERITIES)
    page = (ROOT / "docs" / "observe.md").read_text()
    assert {k for k in ALERT_SEVERITIES if f"`{k}`" not in page} == set()


@pytest.mark.parametrize(
    "calm",
    [
        CALM,
        with_job(0, phase=Phase.FINISHED),
        with_job(0, paused=True, missed=3),
        with_job(paused=True, awaited={"a": NOW - 9}),
        with_job(1),
        replace(CALM, turned_s=59.0),
        with_site(certificates=[ending(31)]),
        rollout(RolloutPhase.RUNNING),
    ],
)
def test_what_is_in_order_is_no_alert(calm: Snapshot) -> None:
    assert evaluate_alerts(calm, NOW) == []


def test_a_revoked_board_is_not_one_to_start(tmp_path: Path) -> None:
    daemon = Fleet(tmp_path).daemon()
    members = [{"a", "b"}]
    view = replace(daemon.first.view, members=lambda: members[0])
    for name in "abc":
        view.state.devices[name] = Board(1, name == "a", {"name": "pi"}, None, 10)
    status = JobWatch(view, tmp_path).status()
    assert (list(status.away), list(status.revoked)) == (["b"], ["c"])
    assert {s: n for s, n in view.facts().devices.items() if n} == {"idle": 1, "offline": 1, "revoked": 1}
    members[0] = {"a", "b", "c"}
    assert view.facts().devices["offline"] == 2
    members[0] = {"a", "c"}
    assert list(JobWatch(view, tmp_path).status().revoked) == ["b"]
    waits = with_job(1, phase=Phase.WAITING, needed=2)
    for away, do in (((), "let more boards in"), (("b",), "start the boards that are away")):
        (found,) = evaluate_alerts(replace(waits, jobs=[replace(waits.jobs[0], away=away, revoked=["c"])]), NOW)
        assert "revoked: c" in found.what
        assert found.todo.startswith(do)


def test_a_board_is_away_once_two_rounds_have_ended_without_it_until_it_is_back(tmp_path: Path) -> None:
    now = [NOW]

    def start(open_: list[Alert]) -> Monitor:
        return Monitor(
            tmp_path, {}, [(view, tmp_path)], here=lambda: 3, book=AlertBook(open_), away_rounds=2,
            present=lambda name: name == "c", clock=lambda: now[0], monotonic=lambda: now[0],
        )  # fmt: skip

    def away(rounds: int) -> dict[str | None, float]:
        for _ in range(rounds):
            monitor.participation[JOB.name].round_over({"round": 1, "devices": {}}, now[0], view)
        now[0] += 60
        monitor.look()
        return {a.device: a.since for a in monitor.book.open if a.kind == "device-away"}

    view = replace(Fleet(tmp_path).daemon().first.view, members=lambda: "abc")
    for name in "abcd":  # c is at another job, d was revoked
        view.state.devices[name] = Board(1, name == "a", {"name": "pi"}, None, 10)
    monitor = start([])
    assert away(0) == away(1) == {}
    assert away(1) == {"b": NOW}
    monitor = start(monitor.book.open)
    assert away(0) == {"b": NOW}, "a restart doesn't close it"
    view.state.paused = True
    assert away(1) == {}
    view.state.paused = False
    assert away(0) == {"b": NOW}
    view.state.devices["b"].online = True
    monitor.participation[JOB.name].noticed(["b"])
    assert away(3) == {}


def test_what_another_job_misses_is_no_absence_here_nor_where_none_is_watched_for(tmp_path: Path) -> None:
    view = Fleet(tmp_path).daemon().first.view
    view.state.devices["a"] = Board(1, False, {"name": "pi"}, None, 10)
    before = {"a": NOW - DAY, "elsewhere": NOW - DAY}
    for rounds, missing in ((0, {}), (2, {"a": NOW - DAY})):
        watch = Participation(view, rounds, None, before, lambda: NOW)
        assert {name: reason.since for name, reason in watch.absences().items()} == missing


def test_an_absence_begins_after_the_last_round_that_ended_with_the_board_connected(tmp_path: Path) -> None:
    now, present = [NOW], [True]
    view = Fleet(tmp_path).daemon().first.view
    view.state.devices["a"] = Board(1, False, {"name": "pi"}, None, 10)
    watch = Participation(view, 2, lambda name: present[0], {}, lambda: now[0])
    for here in (True, False, False):
        now[0] += 60
        present[0] = here
        watch.round_over({"round": 1, "devices": {}}, now[0], view)
    assert watch.absences()["a"].since == NOW + 60


def test_a_revoked_board_is_missed_in_no_paused_job(tmp_path: Path) -> None:
    daemon = Fleet(tmp_path).daemon()
    view = replace(daemon.first.view, members=lambda: {"a"})
    for name in "ab":
        view.state.devices[name] = Board(1, True, {"name": "pi"}, None, 10)
        for sign in range(SIGNS):
            view.registry.clones.note_shared_key(name, sign * APART_S)
    view.state.paused = True
    assert Participation(view, 2, None, {}, lambda: NOW).absences().keys() == {"a"}


@pytest.mark.parametrize(
    ("kind", "failing"),
    [(FailureKind.OTHER, {"a"}), (FailureKind.LEFT_OUT, set()), (FailureKind.FALSE_SUM, set())],
)
def test_a_board_that_others_keep_from_counting_is_not_failing(
    tmp_path: Path, kind: FailureKind, failing: set[str]
) -> None:
    view = Fleet(tmp_path).daemon().first.view
    view.state.devices["a"] = Board(1, True, {"name": "pi"}, None, 10)
    watch = Participation(view, 2, None, {}, lambda: NOW)
    part = {"progress": "refused", "reason": "it didn't count", "kind": kind.value}
    for number in (1, 2, 3):
        watch.round_over({"round": number, "devices": {"a": part}}, NOW, view)
    assert watch.absences().keys() == failing


def test_a_disk_has_to_get_clearly_roomier_before_its_alert_closes() -> None:
    seen = with_site(disk=(ROOM * 11 // 100, ROOM))
    assert evaluate_alerts(seen, NOW) == []
    for severity in ("warning", "critical"):
        opened = replace(seen, open=frozenset({("disk", severity)}))
        assert [(a.kind, a.severity) for a in evaluate_alerts(opened, NOW)] == [("disk", "warning")]


@pytest.mark.parametrize(
    ("free", "severity"), [(26e9, None), (9e9, "warning"), (1.9e9, "critical"), (11.9e9, "warning")]
)
def test_a_small_share_of_a_large_disk_is_room_enough(free: float, severity: str | None) -> None:
    seen = with_site(disk=(int(free), 2 * 10**12))
    if free == 11.9e9:
        seen = replace(seen, open=frozenset({("disk", "warning")}))
    assert [a.severity for a in evaluate_alerts(seen, NOW)] == ([severity] if severity else [])


def raised(**values: Any) -> Alert:
    return Alert(
        **{"kind": "broker", "severity": "critical", "since": NOW, "what": "w", "why": "y", "todo": "t"} | values
    )


def test_an_alert_opens_once_and_closes_once_and_does_not_flap() -> None:
    book, slow = AlertBook(), raised(delay_s=10.0)
    opened = [len(book.update([slow], 0.0 + t, NOW + t)) for t in range(12)]
    assert opened == [0] * 10 + [1, 0]
    for t in range(12, 40):  # away for less than its delay, again and again
        assert book.update([slow] if t % 5 else [], float(t), NOW + t) == []
    assert [a.since for a in book.open] == [NOW]
    closed = [c for t in range(40, 60) for c in book.update([], float(t), NOW + t)]
    assert [(c.alert.kind, c.closed_at) for c in closed] == [("broker", NOW + 50)]
    for t in range(60, 90):  # there for less than its delay
        assert book.update([slow] if t % 5 else [], float(t), NOW + t) == []


def test_an_alert_that_gets_better_or_worse_stays_the_same_alert() -> None:
    book, mild, bad = AlertBook(), raised(severity="warning", delay_s=10.0), raised(delay_s=10.0)
    alerts = [mild] * 20 + [bad] * 20 + [mild] * 20
    changes = [(t, c) for t, alert in enumerate(alerts) for c in book.update([alert], float(t), NOW + t)]
    assert [(t, c.alert.severity, c.closed_at) for t, c in changes] == [
        (10, "warning", None), (30, "critical", None), (50, "warning", None),
    ]  # fmt: skip
    assert [a.severity for a in book.open] == ["warning"]
    for t in range(60, 90):  # worse for less than its delay
        assert book.update([bad if t % 5 else mild], float(t), NOW + t) == []


@pytest.mark.parametrize("named", [True, False])
def test_a_flood_of_joins_is_one_alert_after_a_while(tmp_path: Path, named: bool) -> None:
    daemon, now, changes = Fleet(tmp_path, JOB).daemon(), [1000.0], []
    quarantine = Quarantine(lambda: now[0])
    view = replace(daemon.first.view, quarantine=quarantine)
    clock = lambda: now[0]  # noqa: E731
    monitor = Monitor(tmp_path, {}, [(view, tmp_path)], here=lambda: 3, clock=clock, monotonic=clock)
    for now[0] in range(1000, 1200):
        if now[0] % 20 == 0:
            quarantine.crowded(f"eve\x1b[2J-{now[0]:.0f}" * 9 if named else "")
        monitor.look()
        changes += [(now[0], change.alert.kind) for change in monitor.book.changes()]
    assert changes == [(1060, "joins-flooded")]
    (alert,) = monitor.book.open
    assert alert.key == "joins-flooded"
    assert len(alert.what) < 250
    assert "revoke" not in alert.todo
    assert ("eve [2J-1180" if named else "from many MQTT clients") in alert.what
    assert ("wait for the others" in alert.todo) is not named
    if not named:
        quarantine.crowded("eve")
        quarantine.crowded("")
        assert quarantine.floods_joins() == "eve", "the latest client that floods keeps its name for a while"


def test_an_alert_about_predictions_names_each_board_up_to_a_few() -> None:
    job = with_job(off={f"b{n}": f"memory {n} MB" for n in range(7)})
    (alert,) = [a for a in evaluate_alerts(job, NOW) if a.kind == "prediction-off"]
    assert alert.what.endswith(
        "b0 memory 0 MB; b1 memory 1 MB; b2 memory 2 MB; b3 memory 3 MB; b4 memory 4 MB and 2 more"
    )


@pytest.mark.parametrize("client", ["eve", ""])
def test_a_single_overflow_of_the_joins_is_no_alert(client: str) -> None:
    now, book = [1000.0], AlertBook()
    quarantine = Quarantine(lambda: now[0])
    quarantine.crowded(client)
    for now[0] in range(1000, 1200):
        alerts = evaluate_alerts(replace(CALM, floods_joins=quarantine.floods_joins()), NOW)
        assert book.update(alerts, now[0], NOW) == []


def test_the_clock_on_the_wall_may_jump() -> None:
    book, slow = AlertBook(), raised(delay_s=10.0)
    book.update([slow], 0.0, NOW)
    assert book.update([slow], 1.0, NOW + 9 * DAY) == []
    assert len(book.update([slow], 10.0, NOW - 9 * DAY)) == 1


def test_many_strangers_hide_nothing_worse() -> None:
    strangers = {f"d{i}": "key" for i in range(MAX_ALERTS_OF_KIND + 9)}
    found = evaluate_alerts(replace(with_site(waiting=strangers), broker="gone"), NOW)
    book = AlertBook()
    book.update(found, 0.0, NOW)
    book.update(found, 60.0, NOW)
    assert (book.counts()["devices-wait", "warning"], book.counts()["broker", "critical"]) == (MAX_ALERTS_OF_KIND, 1)


def test_changes_that_nobody_reads_do_not_pile_up() -> None:
    book = AlertBook()
    for i in range(9 * MAX_ALERTS_OF_KIND):
        book.update([raised()] if i % 2 == 0 else [], float(i), NOW + i)
    changes = book.changes()
    assert len(changes) <= 4 * MAX_ALERTS_OF_KIND
    assert changes[-1].closed_at == NOW + 9 * MAX_ALERTS_OF_KIND - 1
    assert not book.changes()


def test_a_restarted_server_goes_on_with_its_open_alerts(tmp_path: Path) -> None:
    left = raised(delay_s=10.0)
    (tmp_path / FILE).write_text(json.dumps({"turned_at": NOW, "alerts": [asdict(left)]}))
    assert read_recorded(tmp_path) == Recorded(NOW, [left], [], frozenset())
    book = AlertBook([left])
    assert book.update([raised(delay_s=10.0, since=NOW + 50)], 0.0, NOW + 50) == []
    assert [a.since for a in book.open] == [NOW]
    for damaged in ("", "[]", '{"turned_at": 1, "alerts": [{}]}', '{"turned_at": 1, "alerts": [{"kind": "x"}]}'):
        (tmp_path / FILE).write_text(damaged)
        assert read_recorded(tmp_path) == Recorded()


class Trouble(Observer):
    """Does something to a fleet once its third round is over.

    Args:
        act: Does it.
    """

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self.at: float | None = None

    def round_over(self, summary: dict[str, Any], now: float, seen: Any) -> None:
        """Act after the third round."""
        if summary["round"] == 3:
            self.at = now
            self._act()


Changes = list[tuple[float, str, bool]]
"""When something opened or closed, in seconds after the trouble; what; and whether it opened."""


def alarmed(
    folder: Path, act: Callable[[Fleet], None], then: Callable[[Fleet, float], None] | None = None, kind: str = "sync"
) -> Changes:
    """What a server reports of a fleet in memory, for 200 s of virtual time after something happens to it.

    Args:
        folder: Of the server.
        act: Happens after the third round.
        then: Is called whenever time has passed, with the seconds since then.
        kind: The kind of the job's schedule.
    """
    fleet = Fleet(folder, replace(JOB, rounds=8, deadline_s=30.0, schedule={"kind": kind}))
    daemon = fleet.daemon()
    trouble = Trouble(lambda: act(fleet))
    clock = lambda: fleet.air.now  # noqa: E731
    changes: Changes = []

    monitor = Monitor(folder, {}, [(daemon.first.view, folder)], clock=clock, monotonic=clock)
    for observer in (trouble, monitor.watches[JOB.name], monitor):
        daemon.first.observers.join(observer)

    def idle() -> None:
        if daemon.busy:
            time.sleep(0.0005)
            return
        for change in monitor.book.changes():
            assert trouble.at is not None, "alerts of a healthy fleet"
            changes.append((clock() - trouble.at, change.alert.kind, change.closed_at is None))
        fleet.air.now += 0.5
        if trouble.at is not None and then is not None:
            then(fleet, fleet.air.now - trouble.at)
        if fleet.air.now > (trouble.at or 0.0) + 200:
            daemon.stop()

    fleet.air.on_idle = idle
    daemon.run()
    return changes


def test_boards_that_all_die_are_told_within_a_deadline_and_so_is_their_return(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedprune.server")

    dead: dict[str, ToyDevice] = {}

    def die(fleet: Fleet) -> None:
        dead.update(fleet.air.devices)
        fleet.air.devices.clear()
        for device in dead.values():
            device.die()

    def come_back(fleet: Fleet, seconds: float) -> None:
        for device in dead.values() if seconds == 70 else ():
            fleet.air.devices[device.name] = device
            device.session += 1
            device.birth()

    changes = alarmed(tmp_path, die, come_back)
    opened = {kind: at for at, kind, is_open in changes if is_open}
    closed = {kind: at for at, kind, is_open in changes if not is_open}
    assert {"no-devices"} <= set(opened) == set(closed)
    assert len(changes) == 2 * len(opened), "each opens once and closes once"
    assert all(at <= 30 + 2 for at in opened.values())
    assert 15 <= opened["no-devices"] <= 17
    assert 70 <= closed["no-devices"] <= 70 + 17
    (line,) = [r for r in caplog.records if "alert: no board" in r.getMessage()]
    assert line.levelname == "ERROR"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_boards_that_bring_nothing_are_told_after_a_deadline(tmp_path: Path, kind: str) -> None:
    def fall_silent(fleet: Fleet) -> None:
        for device in fleet.air.devices.values():
            device.silent = True

    def speak(fleet: Fleet, seconds: float) -> None:
        for device in fleet.air.devices.values() if seconds == 100 else ():
            device.silent = False
            device.birth()

    changes = [c for c in alarmed(tmp_path, fall_silent, speak, kind=kind) if c[1] != "device-failing"]
    assert [(what, is_open) for _, what, is_open in changes] == [("no-progress", True), ("no-progress", False)]
    assert 30 <= changes[0][0] <= 32
    assert 100 <= changes[1][0] <= 132


def test_a_round_that_all_boards_refuse_is_told_at_once(tmp_path: Path) -> None:
    def refuse(fleet: Fleet) -> None:
        for name, device in fleet.air.devices.items():
            device.take = lambda offer, name=name, device=device: device.say(  # type: ignore[method-assign, misc]
                Refusal(name, offer.job, offer.round, offer.attempt, "no room", 30)
            )

    changes = alarmed(tmp_path, refuse)
    assert changes[0][1:] == ("no-progress", True)
    assert changes[0][0] < 15


def test_updates_of_which_none_counts_are_reported(tmp_path: Path) -> None:
    def poison(fleet: Fleet) -> None:
        fleet.worker.poison = set(fleet.air.devices)

    changes = alarmed(tmp_path, poison)
    assert [(kind, is_open) for _, kind, is_open in changes][:1] == [("no-progress", True)]


def test_a_healthy_fleet_raises_nothing(tmp_path: Path) -> None:
    assert alarmed(tmp_path, lambda fleet: None) == []


def test_a_board_far_off_its_plan_is_found() -> None:
    plan = {"prediction": {"step_s": 1.0, "memory_bytes": 100e6}}
    part = {"progress": "folded", "widths": [4], "metrics": {"peak_memory_bytes": 126e6, "step_seconds": 1.9}}
    device = SimpleNamespace(plan=plan, widths=(4,))
    state: Any = SimpleNamespace(devices={"a": device, "b": device}, history=[{"devices": {"a": part, "c": part}}])
    assert off_by_far(state) == {"a": "memory 126.00 MB instead of 100.00 MB"}
    part["metrics"] = {"peak_memory_bytes": 124e6, "step_seconds": 1.9}
    assert off_by_far(state) == {}
    part |= {"metrics": {"peak_memory_bytes": 126e6}, "progress": "refused"}
    state.history.insert(0, {"devices": {"a": {**part, "progress": "folded"}}})
    assert off_by_far(state) == {}, "what an earlier round measured was reported then"
    before = off_by_far(state, {"a": "memory", "gone": "memory"})
    assert before == {"a": "memory"}, "a board that has measured nothing since is still off"
    part |= {"progress": "folded", "metrics": {"peak_memory_bytes": 113e6}}
    assert off_by_far(state, before) == {"a": "memory 113.00 MB instead of 100.00 MB"}, "more than half of the excess"
    part["metrics"] = {"peak_memory_bytes": 112e6}
    assert off_by_far(state, before) == {}


def test_a_disk_that_fills_and_is_emptied_is_told_by_a_running_monitor(tmp_path: Path, disk: Disk) -> None:
    daemon, told = Fleet(tmp_path, JOB).daemon(), []
    monitor = Monitor(tmp_path, {}, [(daemon.first.view, tmp_path)], here=lambda: 3)
    for disk.free in (0.5, 0.09, 0.02, 0.034, 0.04, 0.11, 0.13):
        monitor.read_site()
        monitor.look()
        told.append(sorted(a.severity for a in monitor.book.open if a.kind == "disk"))
    assert told == [[], ["warning"], ["critical"], ["critical"], ["warning"], ["warning"], []]


def test_the_file_is_written_at_once_when_an_alert_opens_and_otherwise_waits(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = queue.Queue[set[str]]()

    def write(path: Path, content: bytes, **_: object) -> None:
        files.put({alert["kind"] for alert in json.loads(content)["alerts"]})

    monkeypatch.setattr(monitor_module, "write_whole", write)
    monkeypatch.setattr(monitor_module, "FACTS_INTERVAL_S", 3600.0)
    daemon = Fleet(tmp_path, JOB).daemon()
    with closing(Monitor(tmp_path, {}, [(daemon.first.view, tmp_path)], here=lambda: 3)) as monitor:
        monitor.start()
        assert files.get(timeout=60) == set()
        monitor.look()
        with pytest.raises(queue.Empty):
            files.get(timeout=0.1)  # nothing has changed
        disk.free = 0.0
        monitor.read_site()
        monitor.look()
        assert files.get(timeout=60) == {"disk"}


def test_what_ends_a_server_is_told_before_it_ends(tmp_path: Path, disk: Disk) -> None:
    daemon = Fleet(tmp_path, JOB).daemon()
    monitor = Monitor(tmp_path, {}, [(daemon.first.view, tmp_path)], here=lambda: 3)
    daemon.first.observers.join(monitor)
    monitor.read_site()
    daemon.first.observers.turned(lambda: 0.0, daemon.first.view)
    assert monitor.book.changes() == []
    disk.free = 0.0
    daemon.first.observers.ended()
    told = [(change.alert.kind, change.alert.severity) for change in monitor.book.changes()]
    assert told == [("disk", "critical")]


def test_the_end_of_a_server_resolves_nothing_and_its_next_start_only_what_is_over(tmp_path: Path, disk: Disk) -> None:
    disk.free = 0.05
    view, now = Fleet(tmp_path, JOB).daemon().first.view, [0.0]

    def begin() -> Monitor:
        return Monitor(
            tmp_path, {}, [(view, tmp_path)], here=lambda: 3, clock=lambda: NOW + now[0], monotonic=lambda: now[0]
        )

    def kinds(monitor: Monitor) -> set[str]:
        return {alert.kind for alert in monitor.book.open}

    monitor = begin()
    monitor.start()
    monitor.turned(lambda: 0.0, view)
    with wait_hook(monitor.waiting):
        for now[0] in (1.0, 12.0):
            call_wait_hook("the database is locked by process 7")
    assert kinds(monitor) == {"database-waits", "disk"}
    monitor.ended()
    monitor.close()
    assert kinds(monitor) == {"database-waits", "disk"}

    monitor = begin()
    monitor.start()
    monitor.turned(lambda: 0.0, view)
    monitor.close()
    assert kinds(monitor) == {"disk"}


def test_alerts_about_a_job_are_over_when_it_is_finished_though_the_server_ends_at_once(tmp_path: Path) -> None:
    view, now = Fleet(tmp_path, JOB).daemon().first.view, 10.0
    monitor = Monitor(tmp_path, {}, [(view, tmp_path)], here=lambda: 3, monotonic=lambda: now)
    watch = monitor.watches[JOB.name]
    watch.command(SendOffer("a", 1, 1, {}), now)
    watch.event(Ticked(), now + 1e6)
    monitor.turned(lambda: 0.0, view)
    assert {alert.kind for alert in monitor.book.open} == {"no-progress"}
    view.state.phase = Phase.FINISHED
    monitor.finished(view)
    monitor.turned(lambda: 0.0, view)
    monitor.ended()
    assert monitor.book.open == []


def test_a_start_closes_no_alert_that_only_its_last_run_had_counted_before_a_round_has_ended(tmp_path: Path) -> None:
    view = Fleet(tmp_path, JOB).daemon().first.view
    stuck = Alert("no-progress", "critical", NOW, "nothing comes", "why", "todo", job=JOB.name)
    monitor = Monitor(tmp_path, {}, [(view, tmp_path)], here=lambda: 3, book=AlertBook([stuck]))
    monitor.read_site()
    monitor.look()
    assert [alert.kind for alert in monitor.book.open] == ["no-progress"]
    monitor.watches[JOB.name].round_over({"round": 1, "devices": {"a": {"progress": "folded"}}}, 1.0, view)
    monitor.look()
    assert monitor.book.open == []


def test_a_start_closes_no_alert_about_what_it_can_t_read(tmp_path: Path) -> None:
    with IdentityFolder.make(tmp_path, "lab") as identity:
        identity.store.ask("attic", SigningKey.make().verifying.hex, 2)
    view = Fleet(tmp_path, JOB).daemon().first.view
    database = (tmp_path / "server.db").read_bytes()
    waiting = Alert("devices-wait", "info", NOW, "attic waits", "why", "todo")
    monitor = Monitor(tmp_path, {}, [(view, tmp_path)], here=lambda: 3, book=AlertBook([waiting]))
    for content in (b"x" * 5000, database):
        (tmp_path / "server.db").write_bytes(content)
        monitor.read_site()
        monitor.look()
        assert [alert.kind for alert in monitor.book.open] == ["devices-wait"]


def test_looking_at_rollouts_writes_nothing_and_waits_for_no_writer(tmp_path: Path) -> None:
    with RolloutStore(tmp_path) as store:
        before = store.version()
        site_facts_module.site_facts(tmp_path, {})
        assert store.version() == before
    with closing(sqlite3.connect(tmp_path / "server.db", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert site_facts_module.site_facts(tmp_path, {}).rollout is None


def test_a_database_that_can_t_be_read_hides_no_other_fact(tmp_path: Path) -> None:
    (tmp_path / "identity").mkdir()
    (tmp_path / "server.db").write_bytes(b"x" * 5000)
    facts = site_facts_module.site_facts(tmp_path, {})
    assert (facts.waiting, facts.rollout) == ({}, None)
    assert facts.disk is not None


def test_what_waits_goes_on_waiting_while_the_database_can_t_be_read(tmp_path: Path) -> None:
    with IdentityFolder.make(tmp_path, "lab") as identity:
        identity.store.ask("attic", SigningKey.make().verifying.hex, 2)
    monitor = Monitor(tmp_path, {}, [(Fleet(tmp_path, JOB).daemon().first.view, tmp_path)], here=lambda: 3)
    monitor.read_site()
    monitor.look()
    assert {alert.kind for alert in monitor.book.open} == {"devices-wait"}
    database = (tmp_path / "server.db").read_bytes()
    for content in (b"x" * 5000, database):
        (tmp_path / "server.db").write_bytes(content)
        monitor.read_site()
        monitor.look()
        assert {alert.kind for alert in monitor.book.open} == {"devices-wait"}


def test_members_are_not_read_where_only_boards_that_wait_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = SigningKey.make().verifying
    with IdentityFolder.make(tmp_path, "lab") as identity:
        identity.store.approve("pi", "11" * 32, 1)
        identity.store.ask("attic", key.hex, 2)

    def read(_: IdentityStore) -> list[Device]:
        raise AssertionError("a fleet may have a hundred thousand members")

    monkeypatch.setattr(IdentityStore, "devices", read)
    assert site_facts_module.site_facts(tmp_path, {}).waiting == {"attic": key.fingerprint}


def test_rollouts_that_are_only_read_are_not_changed(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"server\.db"):
        RolloutStore(tmp_path, read_only=True)
    assert not list(tmp_path.iterdir())
    RolloutStore(tmp_path).close()
    with RolloutStore(tmp_path, read_only=True) as store:
        assert store.latest() is None


def test_a_loop_that_hangs_is_told_though_it_looks_at_nothing(tmp_path: Path) -> None:
    daemon, now = Fleet(tmp_path, JOB).daemon(), [0.0]
    monitor = Monitor(tmp_path, {}, [(daemon.first.view, tmp_path)], here=lambda: 3, monotonic=lambda: now[0])
    monitor.turned(lambda: 0.0, daemon.first.view)
    now[0] = 59.0
    assert not monitor.hangs
    assert monitor.open() == []
    now[0] = 61.0
    assert [a.kind for a in monitor.open()] == ["server-hangs"]
    monitor.turned(lambda: 0.0, daemon.first.view)
    assert monitor.open() == []
    now[0] = 130.0
    monitor.waiting()  # for its database, or a lock
    assert monitor.open() == []


def test_a_wait_for_the_database_is_an_alert_and_reads_nothing_of_it(tmp_path: Path) -> None:
    now, reads = [0.0], list[float]()

    def members() -> set[str]:
        reads.append(now[0])
        call_wait_hook("the database is away")
        return {"a"}

    daemon = Fleet(tmp_path, JOB).daemon()
    view = replace(daemon.first.view, members=members)
    monitor = Monitor(
        tmp_path, {}, [(view, tmp_path)], free=lambda: members(), clock=lambda: now[0], monotonic=lambda: now[0]
    )
    with wait_hook(monitor.waiting):
        for now[0] in (1.0, 12.0, 14.0, 16.0):
            call_wait_hook("the database is away")
    assert reads == []
    assert [a.kind for a in monitor.book.open] == ["database-waits"]


@pytest.mark.parametrize(("connected", "here"), [(False, 3), (True, 0)])
def test_while_the_database_is_waited_for_no_other_alert_opens_or_closes(
    tmp_path: Path, connected: bool, here: int
) -> None:
    view, now = Fleet(tmp_path, JOB).daemon().first.view, [0.0]
    view = replace(view, link=SimpleNamespace(connected=connected))  # type: ignore[arg-type]
    monitor = Monitor(tmp_path, {}, [(view, tmp_path)], here=lambda: here, monotonic=lambda: now[0])
    for now[0] in (0.0, 8.0) if connected else (0.0, 16.0):
        monitor.turned(lambda: 0.0, view)
    before = [] if connected else ["broker"]
    assert [a.kind for a in monitor.book.open] == before
    with wait_hook(monitor.waiting):
        for now[0] in (17.0, 28.0, 60.0):
            call_wait_hook("the database is locked by process 7")
    assert [a.kind for a in monitor.book.open] == [*before, "database-waits"]
