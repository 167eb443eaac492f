"""Where the planner chooses widths it goes by what the strategy asks of a device, and tells it its true share."""

from dataclasses import replace
from typing import Any

import pytest

from fedprune.coordination import State, SynchronousCoordinator
from fedprune.coordination import events as on
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture, kept_share
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune.planning.cost_prediction import predict_costs
from fedprune.planning.prediction import Prediction
from fedprune.planning.profile import HardwareProfile
from fedprune.planning.width_plan import WidthPlan
from fedprune.strategies import compose
from fedprune.strategies.values import Turn
from support.fakes.strategy_rounds import NET
from support.fakes.tiny_job import WIDE

pytestmark = pytest.mark.board

PI = profile_store.find_profile("raspberry-pi-5")


def turn_in(job: Job, profile: HardwareProfile = PI, net: Architecture = NET) -> tuple[WidthPlan, Turn]:
    """A device's plan, and its part in the first round."""
    coordinator = SynchronousCoordinator(job, net, State(model="m0"))
    coordinator.handle(on.DeviceBorn("a", 1, profile.to_dict(), 10), 0.0)
    device = coordinator.state.devices["a"]
    assert device.plan, device.excluded
    assert kept_share(net, device.widths) == device.density
    task = coordinator.state.tasks["a"]
    return WidthPlan.from_dict(device.plan), Turn(job.seed, 1, "a", task.widths, task.density, task.samples)


def limited_board(memory: int, storage: int) -> HardwareProfile:
    """A board whose training may take so much."""
    return replace(
        PI,
        memory=replace(PI.memory, total_bytes=memory + 10**9, reserve_bytes=10**9, training_share=1.0),
        storage=replace(PI.storage, budget_bytes=storage),
    )


@pytest.mark.parametrize("limit", ["memory", "storage"])
@pytest.mark.parametrize(
    ("strategy", "options", "round_", "mask"),
    [
        ("fedprune", {}, 1, "none"),
        ("fedprune", {"average": 0.9, "blend": 0.0}, 1, "none"),
        ("ca-hfp", {}, 1, "none"),
        ("autoflip", {}, 2, "hard"),
    ],
)
def test_what_the_strategy_asks_of_a_board_is_within_its_limits(
    strategy: str, options: dict[str, Any], round_: int, mask: str, limit: str
) -> None:
    job = Job(strategy=strategy, options=options, devices=1, rounds=2)

    def predicted_footprint(turn: Turn) -> Prediction:
        asked = compose(job).recipe(job.recipe, replace(turn, round=round_))
        return predict_costs(WIDE, turn.widths, PI, replace(asked, mask=mask), turn.samples)

    full_footprint = predicted_footprint(Turn(job.seed, 1, "a", WIDE.sizes, 1.0, 10))
    plenty = 10**9
    board = (
        limited_board(full_footprint.memory_bytes - 1, plenty)
        if limit == "memory"
        else limited_board(plenty, full_footprint.storage_bytes - 1)
    )
    plan, turn = turn_in(job, board, WIDE)
    needed = predicted_footprint(turn)

    assert plan.bound == limit
    assert (plan.prediction.memory_bytes, plan.prediction.storage_bytes) == (needed.memory_bytes, needed.storage_bytes)
    assert needed.memory_bytes <= board.training_memory_bytes
    assert needed.storage_bytes <= board.storage.budget_bytes


def test_a_job_whose_recipe_does_not_go_with_its_strategy_ends_before_anything_is_planned() -> None:
    job = Job(strategy="fedprune", options={"dropout": [0.5]}, recipe=Recipe(mask="hard"), devices=1)
    with pytest.raises(ConfigError, match=r"recipe\.ordered_dropout"):
        turn_in(job)
