"""A clock that is set while a server runs moves no deadline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedprune.wire.messages import Hello
from fedprune_server.engine.steady_clock import SteadyClock
from fedprune_server.observation.snapshot import FleetSnapshot
from fedprune_server.ota.store import RolloutStore
from support.fakes.fleet import Fleet, folded
from support.fakes.tiny_job import JOB

DAY = 24 * 3600.0


def test_it_passes_evenly_and_follows_when_asked() -> None:
    wall, monotonic = [1000.0], [5.0]
    clock = SteadyClock(lambda: wall[0], lambda: monotonic[0])
    assert clock() == 1000.0
    wall[0], monotonic[0] = 1000.0 + DAY, 6.0
    assert clock() == 1001.0
    clock.follow()
    assert clock() == 1000.0 + DAY


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_a_clock_that_jumps_a_day_neither_closes_a_round_nor_stretches_it(tmp_path: Path, jump: float) -> None:
    fleet = Fleet(tmp_path)
    fleet.job = replace(JOB, devices=3, rounds=2, deadline_s=20)
    silent, began = fleet.air.devices["c"], fleet.air.now
    silent.take = lambda offer: None  # type: ignore[method-assign, assignment]
    fleet.clock = lambda: fleet.air.now + (jump if fleet.air.now > began + 2 else 0.0)
    state = fleet.run()
    assert folded(state) == [["a", "b"], ["a", "b"]]
    assert 40 <= fleet.air.now - began < 50
    assert state.history[-1]["at"] == pytest.approx(fleet.air.now + jump, abs=5), "the log shows the new time"


def test_boards_and_rollouts_get_the_time_as_it_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, late = Fleet(tmp_path), 0.0
    fleet.clock = lambda: fleet.air.now + late
    with RolloutStore(tmp_path) as rollouts:
        daemon = fleet.daemon(rollouts=rollouts)
        late = DAY  # as after a suspended laptop's clock was set, in the middle of a round
        sent: list[Hello] = []
        monkeypatch.setattr(daemon.first.outbox, "broadcast", sent.append)
        daemon._greet(fleet.air.now)
        assert daemon.first._rollouts is not None
        assert [hello.time for hello in sent] == [int(daemon.first._rollouts._clock())] == [int(fleet.air.now + DAY)]
        assert daemon.first.snapshot(FleetSnapshot()).now == fleet.air.now, "a round's deadline stays where it was"
