"""A server with a target sends boards away that have no part, and its rounds lack none for it."""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.rng import keyed_generator
from fedprune.jobs.state import State
from fedprune.wire.fleet_messages import RECONNECT_ABILITY, Reconnect
from fedprune.wire.messages import Alive, Hello, Offer
from fedprune.wire.queues import ConnectionDown, ConnectionUp
from fedprune_server.devices import pace_steering
from fedprune_server.devices.presence import HELLO_ANSWER_S
from fedprune_server.engine.server import Server
from support.fakes.fleet import Fleet, ToyDevice, counted_devices
from support.fakes.tiny_job import JOB

TRAINING_S = 30.0
NAMES = tuple(f"d{i:02d}" for i in range(40))


class Board(ToyDevice):
    """A board that takes its time to train, and disconnects when it is sent away.

    Attributes:
        is_busy: Whether it has something else to do.
        is_online: Whether it is connected.
    """

    is_busy, is_online = False, True
    fleet: PacedFleet

    def hear(self, topic: str, payload: bytes) -> None:
        if self.is_online:
            super().hear(topic, payload)
        if isinstance(last := self.heard[-1] if self.heard else None, Reconnect) and last.away_s is not None:
            self.heard.append(None)
            if self.is_busy:
                self.send_birth()
            else:
                self.is_online = False
                self.fleet.later(last.away_s, self.back)

    def take(self, offer: Offer) -> None:
        self.fleet.later(TRAINING_S, lambda: super(Board, self).take(offer))

    def back(self) -> None:
        self.is_online, self.session = True, self.session + 1
        self.send_birth()


class PacedFleet(Fleet):
    def __init__(self, folder: Path, **job: Any) -> None:
        super().__init__(folder, replace(JOB, **job), NAMES)
        self.order = itertools.count()
        self.due: list[tuple[float, int, Callable[[], None]]] = []
        self.most = 0
        for name in NAMES:
            board = self.air.devices[name] = Board(name, folder / "devices", self.air)
            board.abilities, board.fleet = (RECONNECT_ABILITY,), self

    def boards(self) -> list[Board]:
        return [board for board in self.air.devices.values() if isinstance(board, Board)]

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.due, (self.air.now + seconds, next(self.order), what))

    def step(self, server: Server) -> None:
        if self.air.now > 20:
            self.most = max(self.most, len(server.connected))
        while self.due and self.due[0][0] <= self.air.now:
            heapq.heappop(self.due)[2]()

    def run_daemon(self, daemon: Server) -> State:
        tick = self.air.get

        def get(timeout: float | None = 0.0) -> Any:
            self.step(daemon)
            return tick(timeout)

        self.air.get = get  # type: ignore[method-assign]
        return super().run_daemon(daemon)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., PacedFleet]:
    return lambda **job: PacedFleet(tmp_path, **{"devices": 4, "participation": 0.5, "rounds": 12, **job})


def test_rounds_go_on_with_the_target_connected_and_reach_other_boards(make: Callable[..., PacedFleet]) -> None:
    fleet = make()
    state = fleet.run(connected=10)
    assert fleet.most <= 12  # two may come back between two looks
    asked = [set(r["devices"]) for r in state.history]
    assert all(
        set(done) == names for done, names in zip(counted_devices(state), asked, strict=True)
    )  # no board left a part
    assert len(set().union(*asked)) > 15  # more than are ever connected at a time
    assert all(d.failures == 0 and d.missed_rounds == 0 for d in state.devices.values())


def test_a_board_that_is_busy_says_so_and_counts_as_connected(make: Callable[..., PacedFleet]) -> None:
    fleet = make(rounds=3)
    busy = fleet.air.devices["d00"]
    busy.is_busy = True  # type: ignore[attr-defined]
    daemon = fleet.daemon(connected=10)
    state = fleet.run_daemon(daemon)
    assert None in busy.heard
    assert state.devices["d00"].online
    assert "d00" in daemon.connected


def test_a_message_of_a_board_that_was_to_leave_brings_its_birth(make: Callable[..., PacedFleet]) -> None:
    """The request to leave may get lost; the board's next sign of life shows that it is there."""
    fleet = make()
    boards, daemon, missed = fleet.air.devices, fleet.daemon(connected=10), set[str]()
    fleet.air.lost += 2 * [boards[n].topics.down(n) for n in NAMES]  # the answer to the birth, too
    fleet.later(20.0, lambda: missed.update(n for n in NAMES if n not in daemon.connected))
    fleet.later(21.0, lambda: [boards[n].say(Alive(n, 1)) for n in missed])
    fleet.run_daemon(daemon)
    assert len(missed) > 20
    assert all(sum(isinstance(m, Hello) for m in boards[n].heard) == 2 for n in missed)  # the first is to all


@pytest.mark.parametrize("target", [0, 10])
def test_a_broker_that_restarts_costs_no_part_of_a_round(
    make: Callable[..., PacedFleet], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, target: int
) -> None:
    """Boards return over more time than a server otherwise waits for their births."""
    monkeypatch.setattr(pace_steering, "MAX_RECONNECTS_PER_S", 0.1)
    caplog.set_level(logging.INFO)
    fleet = make(rounds=6, deadline_s=600.0)
    daemon = fleet.daemon(connected=target)
    chance, returned = keyed_generator(0, "storm"), list[float]()

    def restart() -> None:
        fleet.air.inbox += [ConnectionDown("the broker ended"), ConnectionUp()]
        for board in fleet.boards():
            if board.is_online:
                spread_s = [m.spread_s for m in board.heard if isinstance(m, Reconnect)][-1]
                assert spread_s >= daemon._steering.spread_s / 2
                board.is_online = False
                returned.append(float(chance.uniform(0, spread_s)))
                fleet.later(returned[-1], board.back)

    fleet.later(45.0, restart)
    state = fleet.run_daemon(daemon)
    assert max(returned) > HELLO_ANSWER_S
    assert "taken for gone" not in caplog.text
    assert all(set(done) == set(r["devices"]) for done, r in zip(counted_devices(state), state.history, strict=True))
