"""A round that waits for a board that has vanished says so while it waits, and what the board's part came to after."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprune.jobs.failure_kind import FailureKind
from fedprune.wire.messages import Offer
from fedprune_server.monitoring.alert_rules import evaluate_alerts
from fedprune_server.monitoring.alerts import Alert
from fedprune_server.monitoring.monitor import Monitor
from fedprune_server.monitoring.participation import AWAY, FAILING, Participation, format_minute
from fedprune_server.monitoring.situation import Situation
from fedprune_server.observation.observer import DevicesChanged, RoundEnded
from support.fakes.fleet import Fleet, ToyDevice
from support.fakes.shown_jobs import TRAINING_SNAPSHOT, boards, show
from support.fakes.tiny_job import JOB

DEADLINE_S = 600.0

# Boards take the first, and are waited for four times as long.
TRAINING_S = 30.0
WAIT_S = 4 * TRAINING_S

# An alert about a round opens and closes after as long as two usual rounds take.
DELAY_S = 60.0


class Vanishing(ToyDevice):
    """A board that loses its power with some offers, and is back some seconds later.

    Attributes:
        vanishes_in: The rounds in which it vanishes.
        away_s: After how many seconds it is back.
        died_at: When it vanished.
        leaves_at: When it vanishes, whatever it does; None for never.
    """

    vanishes_in: tuple[int, ...] = (4,)
    away_s = 2 * DEADLINE_S
    died_at = 0.0
    back_at: float | None = None
    leaves_at: float | None = None

    def take(self, offer: Offer) -> None:
        if offer.round not in self.vanishes_in or self.back_at is not None:
            super().take(offer)
        else:
            self.vanish()

    def vanish(self) -> None:
        self.died_at, self.back_at = self.air.now, self.air.now + self.away_s
        self.die()

    def hear(self, topic: str, payload: bytes) -> None:
        if self.back_at is None:
            super().hear(topic, payload)

    def turn(self) -> None:
        if self.leaves_at is not None and self.air.now >= self.leaves_at:
            self.leaves_at = None
            self.vanish()
        if self.back_at is not None and self.air.now >= self.back_at:
            self.back_at, self.vanishes_in, self.session = None, self.vanishes_in[1:], self.session + 1
            self.send_birth()
        super().turn()


class Watched:
    """A fleet of which c vanishes, with what its alerts were each half second."""

    def __init__(self, folder: Path, **job: Any) -> None:
        self.fleet = Fleet(folder, replace(JOB, deadline_s=DEADLINE_S, rounds=6, devices=2, **job), ("a", "b"))
        self.board = self.fleet.air.devices["c"] = Vanishing("c", folder / "devices", self.fleet.air)
        for device in self.fleet.air.devices.values():
            device.training_s = TRAINING_S
        self.monitor = Monitor(folder, {}, {"toy": folder}, away_rounds=2, clock=self.now, monotonic=self.now)
        self.daemon = self.fleet.daemon(observers=[self.monitor])
        self.seen: list[tuple[float, list[Alert]]] = []

    def now(self) -> float:
        return self.fleet.air.now

    def run(self) -> None:
        air = self.fleet.air

        def idle() -> None:
            if self.daemon.is_busy:
                time.sleep(0.0005)  # the worker's thread is real
                return
            self.seen.append((air.now, self.monitor.book.open_alerts))
            air.now += 0.5
            for device in air.devices.values():
                device.turn()

        air.on_idle = idle
        self.daemon.run(until_finished=True)

    def times(self, kind: str) -> list[tuple[float, Alert]]:
        return [(at, alert) for at, alerts in self.seen for alert in alerts if alert.kind == kind]


def test_a_round_that_waits_for_a_board_that_vanished_is_an_alert_within_seconds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(tmp_path)
    with caplog.at_level(logging.INFO, "fedprune.server"):
        watched.run()
    (line,) = [r.getMessage() for r in caplog.records if "disconnected" in r.getMessage()]
    assert "device c " in line
    assert line.endswith("round 4")
    alerts = watched.times("round-waits")
    opened_at, alert = alerts[0]
    died_at = watched.board.died_at
    assert died_at + 5 <= opened_at <= died_at + TRAINING_S + DELAY_S + 1
    assert f"round 4 of job toy waits for c, offline since {format_minute(died_at)}" in alert.what
    assert format_minute(died_at + WAIT_S) in alert.what
    assert all(option in alert.todo for option in ("--deadline", "docs/rounds.md"))
    assert died_at + WAIT_S <= alerts[-1][0] <= died_at + WAIT_S + DELAY_S, "it is over with the wait"


def test_a_board_that_is_back_within_seconds_is_no_alert(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.board.away_s = 3.0
    watched.run()
    assert watched.times("round-waits") == []


@pytest.mark.parametrize(("online", "kind"), [(True, FAILING), (False, AWAY)])
def test_a_board_that_was_offline_at_its_deadlines_needs_a_connection_and_no_repair(
    tmp_path: Path, online: bool, kind: str
) -> None:
    watch = Participation(TRAINING_SNAPSHOT, 9, {}, lambda: 1000.0)
    late = {"progress": "refused", "reason": "the deadline has passed", "kind": FailureKind.LATE.value}
    changed = DevicesChanged(frozenset("a"))
    for number in (1, 2):
        ended = RoundEnded({"round": number, "devices": {"a": late}})
        show(watch, changed, ended, devices=boards("a") if online else boards(offline="a"))
        show(watch, changed, devices=boards("a"))  # it comes back, and goes again
        watch.update()
    assert {name: absence.kind for name, absence in watch.absences().items()} == {"a": kind}
    (alert,) = evaluate_alerts(Situation(tmp_path, absences=watch.absences()), 1000.0)
    assert ("offline" in alert.what, "power" in alert.todo) == (not online, not online)


def test_a_silent_board_that_disconnects_stays_named(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.board.silent, watched.board.leaves_at = True, 140.0
    watched.run()
    kinds = [(at, {a.kind for a in alerts if a.device == "c"}) for at, alerts in watched.seen]
    assert [named for at, named in kinds if 130 <= at <= 140] == [{FAILING}] * 21
    end = watched.seen[-1][0] - 2 * DELAY_S
    assert [named for at, named in kinds if 140 + DELAY_S < at < end] == [{AWAY}] * int(2 * (end - 140 - DELAY_S) - 1)
