"""What a turn of the server's loop takes in."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprune.coordination import commands as do
from fedprune.wire.messages import Alive
from fedprune_server.messaging.transport import DroppedMessage
from fedprune_server.observation.observer import TurnEvent
from fedprune_server.observation.snapshot import JobSnapshot
from support.fakes.fleet import Fleet
from support.fakes.tiny_job import JOB


class TurnWatcher:
    """An observer that looks after each turn at the commands which were carried out in it."""

    def __init__(self, on_turn: Callable[[list[object]], None]) -> None:
        self.on_turn = on_turn

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        self.on_turn([event.payload for event in events])


def test_what_is_dropped_does_not_end_a_turn(tmp_path: Path) -> None:
    """A flood that is dropped before others' answers must not make those seem silent."""
    fleet = Fleet(tmp_path)
    left: list[int] = []
    fleet.air.inbox.extend([DroppedMessage(), DroppedMessage()])  # type: ignore[list-item]
    for device in fleet.air.devices.values():
        device.die()

    def on_turn(commands: list[object]) -> None:
        left.append(len(fleet.air.inbox))
        daemon.stop()

    daemon = fleet.daemon(observers=(TurnWatcher(on_turn),))
    fleet.run_daemon(daemon)
    assert left[0] == 0


@pytest.mark.parametrize(("messages_wait", "max_events"), [(False, 100), (True, 10)])
def test_the_offers_of_a_large_round_are_made_over_several_turns(
    tmp_path: Path, messages_wait: bool, max_events: int
) -> None:
    """So that messages are answered in between."""
    boards = 120
    fleet = Fleet(tmp_path, replace(JOB, devices=boards, rounds=1), tuple(f"b{i:03}" for i in range(boards)))
    offers: list[int] = []
    get = fleet.air.get

    def slow_get(timeout: float | None = 0.0) -> Any:
        fleet.air.now += 0.1  # longer than a turn takes messages in
        return get(timeout)

    def on_turn(commands: list[object]) -> None:
        if any(isinstance(command, do.Extract) for command in commands):
            while sum(isinstance(command, do.Extract) for command in fleet.worker.executed) < boards:
                time.sleep(0.001)  # until all of them wait for the loop
            if messages_wait:
                fleet.air.get = slow_get  # type: ignore[method-assign]
        offers.append(sum(isinstance(command, do.SendOffer) for command in commands))
        if messages_wait:
            for name in ("b000", "b001"):
                fleet.air.devices[name].say(Alive(name, 1))
        if sum(offers) == boards:
            daemon.stop()

    daemon = fleet.daemon(observers=(TurnWatcher(on_turn),))
    fleet.run_daemon(daemon)
    assert sum(offers) == boards
    assert max(offers) == max_events
