"""What a broker drops between server and boards is named on the server, with the board, once nobody is only slow."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedprune.jobs.state import Progress
from fedprune.wire.lost_pieces import STUCK_S
from fedprune.wire.messages import Offer, RoundProgress
from fedprune_server.engine import job_runner
from fedprune_server.monitoring.monitor import Monitor
from fedprune_server.observation.observer import RoundEnded
from fedprune_server.observation.snapshot import JobSnapshot
from support.fakes.fleet import Air, Fleet, ToyDevice, Watcher, counted_devices
from support.fakes.tiny_job import JOB, NAMES

LONGEST = 5_000
TRAINING_S = 10.0


class Dropping(Air):
    """A broker that drops some messages, as if it had delivered them."""

    def __init__(self) -> None:
        super().__init__()
        self.drops_up: Callable[[str, bytes], bool] = lambda topic, payload: False
        self.drops_down: Callable[[str, bytes], bool] = lambda topic, payload: False

    def to_server(self, topic: str, payload: bytes) -> None:
        if not self.drops_up(topic, payload):
            super().to_server(topic, payload)

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        return self.drops_down(topic, payload) or super().publish(topic, payload, qos)


class Asking(ToyDevice):
    """A device that trains for some seconds, and asks again for pieces that don't come."""

    training_s = TRAINING_S

    def turn(self) -> None:
        super().turn()
        for pull in self.pulls.values():
            for want in pull.on_tick(self.air.now):
                self.say(want)


def is_long(topic: str, payload: bytes) -> bool:
    return len(payload) > LONGEST


def alerts_after(
    folder: Path, spoil: Callable[[Dropping], None], seconds: float
) -> dict[str, tuple[set[str | None], float]]:
    """The boards that the alerts named, by kind, and after how many seconds they opened."""
    fleet = Fleet(folder, replace(JOB, deadline_s=1000.0, rounds=30), ())
    fleet.air = air = Dropping()
    for name in ("a", "b", "c"):
        air.devices[name] = Asking(name, folder / "devices", air)
    spoil(air)
    return alerts_until(seconds, fleet)


def alerts_until(end: float, fleet: Fleet) -> dict[str, tuple[set[str | None], float]]:
    """The same of a server that runs until the air's clock shows `end`."""
    air = fleet.air

    def clock() -> float:
        return air.now

    monitor = Monitor(fleet.folder, {}, {JOB.name: fleet.folder}, clock=clock, monotonic=clock)
    daemon = fleet.daemon(observers=[monitor])
    alerts_by_kind: dict[str, tuple[set[str | None], float]] = {}

    def idle() -> None:
        if daemon.is_busy:
            time.sleep(0.0005)  # the worker's thread is real
            return
        for alert in (alert for alert in monitor.book.open_alerts if alert.severity == "warning"):
            alerts_by_kind.setdefault(alert.kind, (set(), air.now))[0].add(alert.device)
        air.now += 0.5
        for device in air.devices.values():
            device.turn()
        if air.now > end:
            daemon.stop()

    air.on_idle = idle
    daemon.run()
    return alerts_by_kind


def limit_down(air: Dropping) -> None:
    air.drops_down = is_long


def limit_up(air: Dropping) -> None:
    air.drops_up = is_long


def silence_a_after_its_birth(air: Dropping) -> None:
    heard: list[str] = []

    def drops(topic: str, payload: bytes) -> bool:
        if "/a/" not in topic:
            return False
        heard.append(topic)
        return len(heard) > 1

    air.drops_up = drops


@pytest.mark.parametrize(
    ("spoil", "kind", "names", "after"),
    [
        (limit_down, "broker-drops", {"a", "b", "c"}, STUCK_S),
        (limit_up, "broker-drops", {"a", "b", "c"}, STUCK_S),
        (silence_a_after_its_birth, "device-excluded", {"a"}, 2 * TRAINING_S),
    ],
)
def test_a_board_whose_messages_are_dropped_is_named_before_its_deadline(  # of 1,000 s
    tmp_path: Path, spoil: Callable[[Dropping], None], kind: str, names: set[str], after: float
) -> None:
    alerts = alerts_after(tmp_path, spoil, 150.0)
    assert alerts.keys() == {kind}
    assert alerts[kind][0] == names
    assert after <= alerts[kind][1] <= after + TRAINING_S + 20


def test_a_broker_that_drops_nothing_is_not_accused(tmp_path: Path) -> None:
    assert alerts_after(tmp_path, lambda air: None, 150.0) == {}


def test_a_broker_is_not_accused_of_a_board_that_was_gone_when_the_server_came_back(tmp_path: Path) -> None:
    """The server is stopped amid an update, and the board is, too."""
    fleet = Fleet(tmp_path, replace(JOB, deadline_s=1000.0))
    fleet.air = air = Dropping()
    for name in ("a", "b", "c"):
        air.devices[name] = ToyDevice(name, tmp_path / "devices", air)
    air.drops_up = lambda topic, payload: topic.endswith("a/up/blob")
    daemon = fleet.daemon()
    air.on_idle = lambda: daemon.stop() if daemon.main_runner.state.tasks["a"].progress is Progress.PULLING else None
    daemon.run()
    del air.devices["a"]
    fleet.restart()
    assert "broker-drops" not in alerts_until(air.now + 120, fleet)


class Diligent(Asking):
    """A board that says nothing for the ten seconds in which it trains."""

    def __init__(self, name: str, folder: Path, air: Air) -> None:
        super().__init__(name, folder, air)
        self.offers: list[tuple[int, int]] = []
        self.busy_until = 0.0
        self.next_offer: Offer | None = None

    def take(self, offer: Offer) -> None:
        if (offer.round, offer.attempt) in self.offers:  # a board answers a repeated offer by its progress
            self.say(RoundProgress(self.name, offer.job, offer.round, offer.attempt, "train", 0, 1))
        self.offers.append((offer.round, offer.attempt))
        self.busy_until, self.next_offer = self.air.now + 10.0, offer

    def turn(self) -> None:
        super().turn()
        if self.next_offer is not None and self.air.now >= self.busy_until:
            offer, self.next_offer = self.next_offer, None
            super().take(offer)


@pytest.mark.parametrize("event", ["pause", "restart", "suspended", "busy connection"])
def test_a_healthy_fleet_is_named_by_no_alert_and_gets_each_offer_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    """With a tick in every turn, between the coordinator's decision to offer and the sending, too."""
    monkeypatch.setattr(job_runner, "_TICK_INTERVAL_S", 0.0)
    fleet = Fleet(tmp_path, replace(JOB, rounds=5, deadline_s=300.0), ())
    air, boards = fleet.air, [Diligent(name, tmp_path / "devices", fleet.air) for name in NAMES]
    air.devices.update({board.name: board for board in boards})
    monitor = Monitor(tmp_path, {}, {JOB.name: tmp_path}, clock=lambda: air.now, monotonic=lambda: air.now)
    alerts: set[str] = set()
    happened_at: list[float] = []

    def note(snapshot: JobSnapshot, what: object) -> None:
        alerts.update(alert.what for alert in monitor.book.open_alerts)
        if isinstance(what, RoundEnded) and what.summary["round"] == 2:
            happened_at.append(air.now)
            if event == "pause":
                daemon.main_runner.pause(True)
            elif event == "restart":
                daemon.stop()

    def idle() -> None:
        if daemon.main_runner.is_computing or (daemon.is_busy and not air.full):
            time.sleep(0.0005)
            return
        air.now += 0.5
        if happened_at and air.now > happened_at[0] + 150.0:
            daemon.main_runner.pause(False)
        is_busy = event == "busy connection" and bool(happened_at) and air.now < happened_at[0] + 200.0
        air.room, air.full = not is_busy, is_busy
        if event == "suspended" and happened_at and air.now < 500.0 and boards[0].next_offer is not None:
            air.now += 900.0
        for board in boards:
            board.turn()

    air.on_idle = idle
    daemon = fleet.daemon(observers=[Watcher(note), monitor])
    daemon.run(until_finished=True)
    if event == "restart":
        air.now += 100.0
        fleet.restart()
        daemon = fleet.daemon(observers=[Watcher(note), monitor])
        daemon.run(until_finished=True)
    assert alerts == set()
    assert counted_devices(daemon.main_runner.state) == [list(NAMES)] * 5
    if event != "busy connection":  # which loses pieces of the model
        assert [board.offers for board in boards] == [[(number, 1) for number in range(1, 6)]] * len(boards)
