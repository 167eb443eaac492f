"""The alert rules, the book that opens and closes alerts, and the monitor that fills both from a running job."""

import json
import logging
import queue
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest

from fedprune.coordination import Phase
from fedprune.coordination.commands import Finish, SendOffer
from fedprune.coordination.events import Ticked
from fedprune.core.lock_wait import call_wait_hook, wait_hook
from fedprune.jobs.failure_kind import FailureKind
from fedprune.model.recipe import Recipe
from fedprune.planning.plan_search import PlanSearch
from fedprune.planning.profile_store import find_profile
from fedprune.releases.rollout import RolloutPhase
from fedprune.security.keys import SigningKey
from fedprune.wire.messages import Refusal
from fedprune_server.devices.plan_vs_actual import LatestComparison, comparison_text
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.monitoring import monitor as monitor_module
from fedprune_server.monitoring import site_facts as site_facts_module
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.alert_rules import ALERT_SEVERITIES, evaluate_alerts
from fedprune_server.monitoring.alerts import MAX_ALERTS_OF_KIND, Alert
from fedprune_server.monitoring.job_watch import prediction_excesses
from fedprune_server.monitoring.monitor import Monitor
from fedprune_server.monitoring.monitor_record import ALERTS_FILE, MonitorRecord, read_monitor_record
from fedprune_server.monitoring.participation import Absence, Participation
from fedprune_server.monitoring.situation import CertificateDates, RolloutStatus, SiteFacts, Situation, WatchedJob
from fedprune_server.observation.observer import DevicesChanged, LoopBlocked, RoundEnded, ServerEnding
from fedprune_server.observation.snapshot import FleetSnapshot, JobSnapshot
from fedprune_server.ota.store import RolloutStore
from support.fakes.fleet import Fleet, ToyDevice, Watcher
from support.fakes.shown_jobs import TRAINING_SNAPSHOT, boards, show
from support.fakes.tiny_job import ARCHITECTURE, JOB

NOW, DAY, ROOM = 1_800_000_000.0, 86_400.0, 32 * 10**9
LEAVES = JobSnapshot(name="leaves", phase=Phase.TRAINING, round=3, rounds=9, min_devices=2, known_devices=2)
TRAINING = WatchedJob(snapshot=LEAVES, folder=Path("state"))
CALM = Situation(Path("state"), [TRAINING], 2, site=SiteFacts((ROOM // 2, ROOM)))


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


def with_job(here: int = 2, *, counted: Mapping[str, Any] = MappingProxyType({}), **values: Any) -> Situation:
    return replace(CALM, jobs=[replace(TRAINING, snapshot=replace(LEAVES, **values), **counted)], able_boards=here)


def with_site(**values: Any) -> Situation:
    return replace(CALM, site=replace(SiteFacts((ROOM // 2, ROOM)), **values))


def ending(days: float) -> CertificateDates:
    return CertificateDates("server.pem", NOW - DAY, NOW + days * DAY, "start the server again")


def rollout(phase: RolloutPhase, why: str = "", failed: tuple[str, ...] = (), silent_s: float = 0.0) -> Situation:
    return with_site(rollout=RolloutStatus(7, phase, why, failed, ("b",), (), NOW - silent_s))


def without_a(kind: str) -> Situation:
    return replace(CALM, absences={"a": Absence(kind, "doesn't take part", NOW - DAY)})


@pytest.mark.parametrize(
    "situation",
    [with_job(0), with_job(0, known_devices=0), with_job(1, phase=Phase.WAITING, counted={"away_boards": ["b"]})],
)
def test_boards_that_a_lost_broker_keeps_away_are_no_alert_of_their_own(situation: Situation) -> None:
    assert [
        a.kind for a in evaluate_alerts(replace(situation, broker_problem="there is no connection to the broker"), NOW)
    ] == ["broker"]


def test_where_all_boards_are_excluded_their_reason_is_what_to_mend() -> None:
    excluded = {"pi": "samples to train on: expected at least one, got 0"}
    alerts = [
        a for a in evaluate_alerts(with_job(0, counted={"excluded_boards": excluded}), NOW) if a.kind == "no-devices"
    ]
    assert [("excluded: pi" in a.what, "samples to train on" in a.todo, "power" in a.todo) for a in alerts] == [
        (True, True, False)
    ]


CASES: dict[str, tuple[Situation, str, str]] = {
    "a server that is dead": (replace(with_job(0), is_running=False), "server-not-running", "critical"),
    "a folder without a job": (
        replace(with_job(counted={"has_begun": False}), is_running=False), "server-not-running", "critical",
    ),
    "a loop that hangs": (replace(CALM, since_turn_s=61.0), "server-hangs", "critical"),
    "a database that is locked": (
        replace(CALM, waits_for="server.db is locked by process 7"), "database-waits", "critical",
    ),
    "no broker": (replace(CALM, broker_problem="there is no connection to the broker"), "broker", "critical"),
    "all boards away": (with_job(0), "no-devices", "critical"),
    "no board yet": (with_job(0, known_devices=0), "no-devices", "warning"),
    "one board of two": (
        with_job(1, phase=Phase.WAITING, counted={"away_boards": ["b"]}), "too-few-devices", "warning",
    ),
    "a missed deadline": (with_job(counted={"missed_deadlines": 1}), "no-progress", "critical"),
    "a round without updates": (with_job(counted={"empty_rounds": 1}), "no-progress", "critical"),
    "a round that waits for a board that is offline": (
        with_job(awaited_devices={"a": NOW + 500}, counted={"offline_since": {"a": NOW - 9}}), "round-waits", "warning",
    ),
    "a board off its plan": (
        with_job(counted={"prediction_excesses": {"a": "memory 2 MB (predicted 1 MB)"}}), "prediction-off", "info",
    ),
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
    "a board that has joined just now": (with_site(unannounced_boards={"a": NOW - 26}), "device-unheard", "info"),
    "a board that has joined, and is not heard": (
        with_site(unannounced_boards={"a": NOW - 200}), "device-unheard", "warning",
    ),
    "a board that is gone": (without_a("device-away"), "device-away", "warning"),
    "requests to join that flood the server": (
        replace(CALM, flooding_client="ab" * 16), "joins-flooded", "warning",
    ),
    "a board that waits": (with_site(waiting_keys={"a": "1234"}), "devices-wait", "warning"),
    "a rollout that failed": (rollout(RolloutPhase.STOPPED, "too many", ("a",)), "rollout", "warning"),
    "a rollout that was stopped": (rollout(RolloutPhase.STOPPED, "stopped: by ann"), "rollout", "info"),
    "a rollout that is paused": (rollout(RolloutPhase.PAUSED, "paused: by ann"), "rollout-paused", "info"),
    "a rollout that hears nothing": (rollout(RolloutPhase.RUNNING, silent_s=DAY), "rollout", "warning"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_trouble_is_one_alert_with_a_remedy(case: str) -> None:
    situation, kind, severity = CASES[case]
    (alert,) = evaluate_alerts(situation, NOW)
    assert (alert.kind, alert.severity) == (kind, severity)
    assert severity in ALERT_SEVERITIES[kind]
    assert all((alert.what, alert.why, alert.todo))
    assert alert.delay_s <= LEAVES.deadline_s / 2
    assert alert.since <= NOW


def test_every_kind_is_tried() -> None:
    assert {kind for _, kind, _ in CASES.values()} == set(ALERT_SEVERITIES)


@pytest.mark.parametrize(
    "calm",
    [
        CALM,
        with_job(0, phase=Phase.FINISHED),
        with_job(0, is_paused=True, counted={"missed_deadlines": 3}),
        with_job(is_paused=True, counted={"offline_since": {"a": NOW - 9}}),
        with_job(1),
        replace(CALM, since_turn_s=59.0),
        with_site(certificates=[ending(31)]),
        rollout(RolloutPhase.RUNNING),
    ],
)
def test_what_is_in_order_is_no_alert(calm: Situation) -> None:
    assert evaluate_alerts(calm, NOW) == []


def watching(folder: Path, *open_: Alert, now: Callable[[], float] = lambda: NOW, **options: Any) -> Monitor:
    """A monitor of one job, whose state folder this is."""
    book = AlertBook(open_) if open_ else None
    return Monitor(folder, {}, {JOB.name: folder}, book=book, clock=now, monotonic=now, **options)


def kinds_of(monitor: Monitor) -> set[str]:
    return {alert.kind for alert in monitor.book.open_alerts}


ROUND = RoundEnded({"round": 1, "devices": {"x": {"progress": "folded"}}})
FLEET = FleetSnapshot(connected_devices=("a", "c"))


def test_a_board_is_away_once_two_rounds_have_ended_without_it_until_it_is_back(tmp_path: Path) -> None:
    now = [NOW]
    # c is at another job, d was revoked
    snapshot = replace(TRAINING_SNAPSHOT, devices=boards("a", "bcd"), revoked_devices=("d",), fleet=FLEET)

    def away(rounds: int, snapshot: JobSnapshot = snapshot, *events: Any) -> dict[str | None, float]:
        now[0] += 60
        show(monitor, *events, *[ROUND] * rounds, snapshot=snapshot)
        return {a.device: a.since for a in monitor.book.open_alerts if a.kind == "device-away"}

    monitor = watching(tmp_path, now=lambda: now[0], away_rounds=2)
    assert away(0) == away(1) == {}
    assert away(1) == {"b": NOW + 60}
    monitor = watching(tmp_path, *monitor.book.open_alerts, now=lambda: now[0], away_rounds=2)
    assert away(0) == {"b": NOW + 60}, "a restart doesn't close it"
    assert away(1, replace(snapshot, is_paused=True)) == {}
    assert away(0) == {"b": NOW + 60}
    assert away(3, replace(snapshot, devices=boards("ab", "cd")), DevicesChanged(frozenset("b"))) == {}


@pytest.mark.parametrize(("connected", "kind"), [(("b",), "device-excluded"), ((), "device-away")])
def test_a_board_that_is_excluded_and_offline_needs_a_connection_first(connected: tuple[str, ...], kind: str) -> None:
    device = replace(boards("".join(connected), "b")["b"], excluded="no answer", excluded_by="late")
    fleet = FleetSnapshot(connected_devices=connected)
    watch = Participation(replace(TRAINING_SNAPSHOT, devices={"b": device}, fleet=fleet), 2, {}, lambda: NOW)
    watch.update()
    assert watch.absences()["b"].kind == kind


def test_a_revoked_board_is_missed_in_no_paused_job() -> None:
    clones = {"a": "it has two voices", "b": "it has two voices"}
    snapshot = replace(TRAINING_SNAPSHOT, is_paused=True, revoked_devices=("b",), cloned_devices=clones)
    assert Participation(snapshot, 2, {}, lambda: NOW).absences().keys() == {"a"}


@pytest.mark.parametrize(
    ("kind", "unreached", "failing"),
    [
        (FailureKind.OTHER, "", {"a"}),
        (FailureKind.LEFT_OUT, "", set()),
        (FailureKind.FALSE_SUM, "", set()),
        (FailureKind.LATE, "", {"a"}),
        (FailureKind.LATE, "a", set()),  # the server was late itself, and has not sent the offer
    ],
)
def test_a_board_that_others_keep_from_counting_or_the_job_never_planned_for_is_not_failing(
    kind: FailureKind, unreached: str, failing: set[str]
) -> None:
    watch = Participation(TRAINING_SNAPSHOT, 2, {}, lambda: NOW)
    device_part = {"progress": "refused", "reason": "it didn't count", "kind": kind.value}
    devices = {**boards("a"), **boards("b", takes_part=False)}
    for number in (1, 2, 3):
        summary = {"round": number, "devices": dict.fromkeys("abc", device_part)}
        show(watch, RoundEnded(summary, unreached=frozenset(unreached)), devices=devices)
    assert watch.absences().keys() == failing


def test_a_disk_has_to_get_clearly_roomier_before_its_alert_closes() -> None:
    situation = with_site(disk=(ROOM * 11 // 100, ROOM))
    assert evaluate_alerts(situation, NOW) == []
    for severity in ("warning", "critical"):
        opened = replace(situation, open_severities=frozenset({("disk", severity)}))
        assert [(a.kind, a.severity) for a in evaluate_alerts(opened, NOW)] == [("disk", "warning")]


@pytest.mark.parametrize(
    ("free", "severity"), [(26e9, None), (9e9, "warning"), (1.9e9, "critical"), (11.9e9, "warning")]
)
def test_a_small_share_of_a_large_disk_is_room_enough(free: float, severity: str | None) -> None:
    situation = with_site(disk=(int(free), 2 * 10**12))
    if free == 11.9e9:
        situation = replace(situation, open_severities=frozenset({("disk", "warning")}))
    assert [a.severity for a in evaluate_alerts(situation, NOW)] == ([severity] if severity else [])


def make_alert(**values: Any) -> Alert:
    return Alert(
        **{"kind": "broker", "severity": "critical", "since": NOW, "what": "w", "why": "y", "todo": "t"} | values
    )


def test_an_alert_opens_once_and_closes_once_and_does_not_flap() -> None:
    book, slow = AlertBook(), make_alert(delay_s=10.0)
    assert [len(book.update([slow], 0.0 + t, NOW + t)) for t in range(12)] == [0] * 10 + [1, 0]
    for t in range(12, 40):  # away for less than its delay, again and again
        assert book.update([slow] if t % 5 else [], float(t), NOW + t) == []
    assert [a.since for a in book.open_alerts] == [NOW]
    closed = [c for t in range(40, 60) for c in book.update([], float(t), NOW + t)]
    assert [(c.alert.kind, c.closed_at) for c in closed] == [("broker", NOW + 50)]
    for t in range(60, 90):  # there for less than its delay
        assert book.update([slow] if t % 5 else [], float(t), NOW + t) == []


def test_an_alert_that_gets_better_or_worse_stays_the_same_alert() -> None:
    book, mild, bad = AlertBook(), make_alert(severity="warning", delay_s=10.0), make_alert(delay_s=10.0)
    alerts = [mild] * 20 + [bad] * 20 + [mild] * 20
    changes = [(t, c) for t, alert in enumerate(alerts) for c in book.update([alert], float(t), NOW + t)]
    assert [(t, c.alert.severity, c.closed_at) for t, c in changes] == [
        (10, "warning", None), (30, "critical", None), (50, "warning", None),
    ]  # fmt: skip
    assert [a.severity for a in book.open_alerts] == ["warning"]
    for t in range(60, 90):  # worse for less than its delay
        assert book.update([bad if t % 5 else mild], float(t), NOW + t) == []


@pytest.mark.parametrize("named", [True, False])
def test_a_flood_of_joins_is_one_alert_after_a_while(tmp_path: Path, named: bool) -> None:
    now, changes = [1000.0], []
    quarantine = Quarantine(lambda: now[0])
    monitor = watching(tmp_path, now=lambda: now[0])
    for now[0] in range(1000, 1200):
        if now[0] % 20 == 0:
            quarantine.join_flood.note(f"eve\x1b[2J-{now[0]:.0f}" * 9 if named else "")
        show(monitor, fleet=FleetSnapshot(flooding_client=quarantine.join_flood.flooding_client()))
        changes += [(now[0], alert.kind) for alert in monitor.book.open_alerts if not changes]
    assert changes == [(1060, "joins-flooded")]
    (alert,) = monitor.book.open_alerts
    assert alert.key == "joins-flooded"
    assert len(alert.what) < 250
    assert ("eve [2J-1180" in alert.what) is named
    if not named:
        quarantine.join_flood.note("eve")
        quarantine.join_flood.note("")
        assert quarantine.join_flood.flooding_client() == "eve", (
            "the latest client that floods keeps its name for a while"
        )


def test_the_clock_on_the_wall_may_jump() -> None:
    book, slow = AlertBook(), make_alert(delay_s=10.0)
    book.update([slow], 0.0, NOW)
    assert book.update([slow], 1.0, NOW + 9 * DAY) == []
    assert len(book.update([slow], 10.0, NOW - 9 * DAY)) == 1


def test_many_strangers_hide_nothing_worse() -> None:
    strangers = {f"d{i}": "key" for i in range(MAX_ALERTS_OF_KIND + 9)}
    alerts = evaluate_alerts(replace(with_site(waiting_keys=strangers), broker_problem="gone"), NOW)
    book = AlertBook()
    book.update(alerts, 0.0, NOW)
    book.update(alerts, 60.0, NOW)
    assert (book.counts()["devices-wait", "warning"], book.counts()["broker", "critical"]) == (MAX_ALERTS_OF_KIND, 1)


def test_a_restarted_server_goes_on_with_its_open_alerts(tmp_path: Path) -> None:
    left = make_alert(delay_s=10.0)
    (tmp_path / ALERTS_FILE).write_text(json.dumps({"turned_at": NOW, "alerts": [asdict(left)]}))
    assert read_monitor_record(tmp_path) == MonitorRecord(NOW, [left])
    book = AlertBook([left])
    assert book.update([make_alert(delay_s=10.0, since=NOW + 50)], 0.0, NOW + 50) == []
    assert [a.since for a in book.open_alerts] == [NOW]
    for damaged in ("", "[]", '{"turned_at": 1, "alerts": [{}]}', '{"turned_at": 1, "alerts": [{"kind": "x"}]}'):
        (tmp_path / ALERTS_FILE).write_text(damaged)
        assert read_monitor_record(tmp_path) == MonitorRecord()


Changes = list[tuple[float, str, bool]]
"""When something opened or closed, in seconds after the trouble; what; and whether it opened."""


def alert_changes(
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
    began_at: list[float] = []
    changes: Changes = []
    kinds: set[str] = set()

    def note(snapshot: JobSnapshot, what: object) -> None:
        if isinstance(what, RoundEnded) and what.summary["round"] == 3:
            began_at.append(fleet.air.now)
            act(fleet)

    monitor = watching(folder, now=lambda: fleet.air.now)
    daemon = fleet.daemon(observers=[Watcher(note), monitor])

    def idle() -> None:
        if daemon.is_busy:
            time.sleep(0.0005)
            return
        nonlocal kinds
        before, kinds = kinds, kinds_of(monitor)
        for changed in before ^ kinds:
            assert began_at, "alerts of a healthy fleet"
            changes.append((fleet.air.now - began_at[0], changed, changed in kinds))
        fleet.air.now += 0.5
        if began_at and then is not None:
            then(fleet, fleet.air.now - began_at[0])
        if fleet.air.now > sum(began_at) + 200:
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
            device.send_birth()

    changes = alert_changes(tmp_path, die, come_back)
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
            device.send_birth()

    changes = [c for c in alert_changes(tmp_path, fall_silent, speak, kind=kind) if c[1] == "no-progress"]
    assert [(what, is_open) for _, what, is_open in changes] == [("no-progress", True), ("no-progress", False)]
    assert 30 <= changes[0][0] <= 32
    assert 100 <= changes[1][0] <= 132


def test_a_round_that_all_boards_refuse_is_told_at_once(tmp_path: Path) -> None:
    def refuse(fleet: Fleet) -> None:
        for name, device in fleet.air.devices.items():
            device.take = lambda offer, name=name, device=device: device.say(  # type: ignore[method-assign, misc]
                Refusal(name, offer.job, offer.round, offer.attempt, "no room", 30)
            )

    changes = alert_changes(tmp_path, refuse)
    assert changes[0][1:] == ("no-progress", True)
    assert changes[0][0] < 15


def test_updates_of_which_none_counts_are_reported(tmp_path: Path) -> None:
    def poison(fleet: Fleet) -> None:
        fleet.worker.poison = set(fleet.air.devices)

    assert [(kind, is_open) for _, kind, is_open in alert_changes(tmp_path, poison)][:1] == [("no-progress", True)]


def test_a_board_far_off_its_plan_is_found_and_shown_with_the_figures_of_status() -> None:
    plan = PlanSearch(ARCHITECTURE, find_profile("raspberry-pi-5"), Recipe(), 100).search()

    def excess(before: Mapping[str, str], **measured: tuple[float, float]) -> dict[str, str]:
        compared = {"a": LatestComparison(dict(measured), plan.to_dict())} if measured else {}
        return prediction_excesses(replace(TRAINING_SNAPSHOT, comparisons=compared, devices=boards("a")), before)

    memory = {"peak_memory_bytes": (float(plan.before_rounds.memory_bytes), 126e6)}
    off = {"a": comparison_text(memory, {"peak_memory_bytes": (100e6, 126e6)})}
    assert excess({}, peak_memory_bytes=(100e6, 126e6), step_seconds=(1.0, 1.9)) == off
    assert excess({}, peak_memory_bytes=(100e6, 124e6)) == {}
    assert excess({"a": "memory", "gone": "memory"}) == {"a": "memory"}, "it has measured nothing since"
    assert excess(off, peak_memory_bytes=(100e6, 113e6)).keys() == {"a"}, "more than half of the excess"
    assert excess(off, peak_memory_bytes=(100e6, 112e6)) == {}


def test_the_file_is_written_at_once_when_an_alert_opens_and_otherwise_waits(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, now = queue.Queue[set[str]](), [0.0]

    def write(path: Path, content: bytes, **_: object) -> None:
        files.put({alert["kind"] for alert in json.loads(content)["alerts"]})

    monkeypatch.setattr(monitor_module, "write_atomically", write)
    monkeypatch.setattr(monitor_module, "FACTS_INTERVAL_S", 3600.0)
    with closing(watching(tmp_path, now=lambda: now[0])) as monitor:
        monitor.start()
        assert files.get(timeout=60) == set()
        show(monitor, fleet=FleetSnapshot())
        with pytest.raises(queue.Empty):
            files.get(timeout=0.1)  # nothing has changed
        disk.free, now[0] = 0.0, 2.0
        monitor.read_site()
        show(monitor, fleet=FleetSnapshot())
        assert files.get(timeout=60) == {"disk"}


def test_the_end_of_a_server_resolves_nothing_and_its_next_start_only_what_is_over(tmp_path: Path, disk: Disk) -> None:
    disk.free, now, snapshot = 0.05, [0.0], replace(TRAINING_SNAPSHOT, fleet=FleetSnapshot())
    monitor = watching(tmp_path, now=lambda: now[0])
    monitor.start()
    show(monitor, snapshot=snapshot)
    with wait_hook(lambda: show(monitor, LoopBlocked(), snapshot=snapshot)):
        for now[0] in (1.0, 12.0):
            call_wait_hook("the database is locked by process 7")
    assert kinds_of(monitor) == {"database-waits", "disk"}
    disk.free = 0.0
    show(monitor, ServerEnding(), snapshot=snapshot)
    monitor.close()
    assert {(a.kind, a.severity) for a in monitor.book.open_alerts} == {
        ("database-waits", "critical"),
        ("disk", "critical"),
    }

    monitor = watching(tmp_path, now=lambda: now[0])
    monitor.start()
    show(monitor, snapshot=snapshot)
    monitor.close()
    assert kinds_of(monitor) == {"disk"}


def test_alerts_about_a_job_are_over_when_it_is_finished_though_the_server_ends_at_once(tmp_path: Path) -> None:
    monitor, snapshot = watching(tmp_path, now=lambda: 10.0), replace(TRAINING_SNAPSHOT, fleet=FleetSnapshot())
    show(monitor, SendOffer("a", 1, 1, {}), at=10.0, snapshot=snapshot)
    show(monitor, Ticked(), Finish("m"), at=1e6, snapshot=snapshot)
    assert kinds_of(monitor) == {"no-progress"}
    show(monitor, Finish("m"), snapshot=snapshot, phase=Phase.FINISHED)
    show(monitor, ServerEnding(), snapshot=snapshot, phase=Phase.FINISHED)
    assert kinds_of(monitor) == set()


def test_a_start_closes_no_alert_that_only_its_last_run_had_counted_before_a_round_has_ended(tmp_path: Path) -> None:
    stuck = Alert("no-progress", "critical", NOW, "nothing comes", "why", "todo", job=JOB.name)
    now, snapshot = [0.0], replace(TRAINING_SNAPSHOT, fleet=FleetSnapshot())
    monitor = watching(tmp_path, stuck, now=lambda: now[0])
    monitor.read_site()
    show(monitor, snapshot=snapshot)
    assert kinds_of(monitor) == {"no-progress"}
    now[0] += 1
    show(monitor, ROUND, snapshot=snapshot)
    assert kinds_of(monitor) == set()


@pytest.mark.parametrize("restored", [True, False])
def test_what_can_t_be_read_closes_no_alert(tmp_path: Path, restored: bool) -> None:
    with IdentityFolder.make(tmp_path, "lab") as identity:
        identity.store.request_approval("attic", SigningKey.make().verifying_key.hex, 2)
    database, now = (tmp_path / "server.db").read_bytes(), [0.0]
    waiting = Alert("devices-wait", "info", NOW, "attic waits", "why", "todo")
    monitor = watching(tmp_path, *([waiting] if restored else []), now=lambda: now[0])
    for content in (*(() if restored else (database,)), b"x" * 5000, database):
        (tmp_path / "server.db").write_bytes(content)
        now[0] += 1
        monitor.read_site()
        show(monitor, fleet=FleetSnapshot())
        assert kinds_of(monitor) == {"devices-wait"}


@pytest.mark.parametrize("boards", [(), ("c",)])
def test_a_release_is_rolled_back_where_a_board_has_it(boards: tuple[str, ...]) -> None:
    site = with_site(rollout=RolloutStatus(7, RolloutPhase.STOPPED, "", ("a",), (), boards, NOW))
    (alert,) = evaluate_alerts(site, NOW)
    assert ("rollout back" in alert.todo) is bool(boards)


def test_looking_at_rollouts_writes_nothing_and_waits_for_no_writer(tmp_path: Path) -> None:
    with RolloutStore(tmp_path) as store:
        before = store.change_count()
        site_facts_module.site_facts(tmp_path, {})
        assert store.change_count() == before
    with closing(sqlite3.connect(tmp_path / "server.db", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert site_facts_module.site_facts(tmp_path, {}).rollout is None


def test_a_loop_that_hangs_is_told_though_it_looks_at_nothing(tmp_path: Path) -> None:
    now, snapshot = [0.0], replace(TRAINING_SNAPSHOT, fleet=FleetSnapshot())
    monitor = watching(tmp_path, now=lambda: now[0])
    show(monitor, snapshot=snapshot)
    now[0] = 59.0
    assert not monitor.is_hanging
    assert monitor.open_alerts() == []
    now[0] = 61.0
    assert [a.kind for a in monitor.open_alerts()] == ["server-hangs"]
    show(monitor, snapshot=snapshot)
    assert monitor.open_alerts() == []
    now[0] = 130.0
    show(monitor, LoopBlocked(), snapshot=snapshot)  # for its database, or a lock
    assert monitor.open_alerts() == []


@pytest.mark.parametrize(("connected", "able"), [(False, 3), (True, 0)])
def test_while_the_database_is_waited_for_no_other_alert_opens_or_closes(
    tmp_path: Path, connected: bool, able: int
) -> None:
    now, snapshot = (
        [0.0],
        replace(TRAINING_SNAPSHOT, able_devices=able, fleet=FleetSnapshot(broker_connected=connected)),
    )
    monitor = watching(tmp_path, now=lambda: now[0])
    for now[0] in (0.0, 8.0) if connected else (0.0, 16.0):
        show(monitor, snapshot=snapshot)
    before = [] if connected else ["broker"]
    assert [a.kind for a in monitor.book.open_alerts] == before
    with wait_hook(lambda: show(monitor, LoopBlocked(), snapshot=snapshot)):
        for now[0] in (17.0, 28.0, 60.0):
            call_wait_hook("the database is locked by process 7")
    assert [a.kind for a in monitor.book.open_alerts] == [*before, "database-waits"]


def test_alerts_wait_until_all_jobs_of_a_server_were_seen(tmp_path: Path) -> None:
    left = Alert("round-waits", "warning", NOW, "it waits", "why", "todo", job="second")
    monitor = Monitor(tmp_path, {}, {"first": tmp_path, "second": tmp_path / "second"}, book=AlertBook([left]))
    fleet = FleetSnapshot(has_several_jobs=True, connected_devices="abc")
    for name, kinds in (("first", {"round-waits"}), ("second", set())):
        show(monitor, ROUND, snapshot=replace(TRAINING_SNAPSHOT, name=name, fleet=fleet))
        assert kinds_of(monitor) == kinds
