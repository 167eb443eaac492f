"""A clock that is set while a server runs moves no deadline."""

from dataclasses import replace
from pathlib import Path

import pytest

from support.fakes.fleet import Fleet, counted_devices
from support.fakes.tiny_job import JOB

DAY = 24 * 3600.0


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_a_clock_that_jumps_a_day_neither_closes_a_round_nor_stretches_it(tmp_path: Path, jump: float) -> None:
    fleet = Fleet(tmp_path)
    fleet.job = replace(JOB, devices=3, rounds=2, deadline_s=20)
    silent, began = fleet.air.devices["c"], fleet.air.now
    silent.take = lambda offer: None  # type: ignore[method-assign, assignment]
    fleet.clock = lambda: fleet.air.now + (jump if fleet.air.now > began + 2 else 0.0)
    state = fleet.run()
    assert counted_devices(state) == [["a", "b"], ["a", "b"]]
    # Both rounds wait for c as long as without a jump: three seconds, as the others answer at once.
    assert 3 <= fleet.air.now - began < 5
    assert state.history[-1]["at"] == pytest.approx(fleet.air.now + jump, abs=5), "the log shows the new time"
