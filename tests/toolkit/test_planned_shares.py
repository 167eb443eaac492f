"""Where the planner chooses widths, strategies that go by a device's share of the model are told the true one."""

from __future__ import annotations

from typing import Any

import pytest
from role_play import NET

from fedprune import profile_store
from fedprune.architecture import kept_share, widths_at
from fedprune.coordination import Coordinator, State
from fedprune.coordination import events as on
from fedprune.job import Job
from fedprune.prediction import predict
from fedprune.recipe import Recipe
from fedprune.strategies import compose
from fedprune.strategies.roles import Turn
from toy import ARCHITECTURE

pytestmark = pytest.mark.board

PI = profile_store.find("raspberry-pi-5")
HALF = predict(NET, widths_at(NET, 0.5), PI, Recipe(), 10).round_bytes
"""What a round at half the channels moves."""


def turn_of(strategy: str, options: dict[str, Any], budget: int) -> tuple[Job, Turn]:
    """A device's part in a job in which a round may move so many bytes."""
    job = Job(strategy=strategy, options=options, devices=1, rounds=2, byte_budget=budget)
    coordinator = Coordinator(job, NET, State(model="m0"))
    coordinator.handle(on.DeviceBorn("a", 1, PI.to_dict(), 10), 0.0)
    device = coordinator.state.devices["a"]
    assert device.plan, device.excluded
    assert kept_share(NET, device.widths) == device.density
    task = coordinator.state.tasks["a"]
    return job, Turn(job.seed, 1, "a", task.widths, task.density, task.samples)


@pytest.mark.parametrize("options", [("subflot", {"planned": True}), ("history", {"mu": 2.0})])
def test_a_planned_devices_pull_goes_by_what_was_pruned(options: tuple[str, dict[str, Any]]) -> None:
    job, turn = turn_of(*options, budget=HALF)
    objective = compose(job).objective
    assert 0 < turn.density < 1
    assert objective.recipe(Recipe(), turn).proximal == pytest.approx(2 * (1 - sum(turn.widths) / sum(NET.sizes)))


def test_a_planned_devices_outputs_are_scaled_by_what_it_keeps() -> None:
    job, turn = turn_of("heterofl", {"planned": True}, budget=HALF)
    scale = compose(job).objective.recipe(Recipe(), turn).scale
    assert scale == pytest.approx(sum(NET.sizes) / sum(turn.widths)) != 1


def test_equal_shares_are_their_density() -> None:
    assert [kept_share(ARCHITECTURE, widths_at(ARCHITECTURE, d)) for d in (1.0, 0.5, 0.25)] == [1.0, 0.5, 0.25]
    assert kept_share(NET, NET.sizes) == 1.0
