"""What devices train in a round: a core that the fleet shares, growth, and work that narrower boards have time for."""

from __future__ import annotations

from typing import Any

import pytest

from fedprune.coordination import State, SynchronousCoordinator
from fedprune.coordination import events as on
from fedprune.coordination.grants import Grant, Grants
from fedprune.jobs.job import Job
from fedprune.jobs.packed_json import PackedJson
from fedprune.jobs.state import Device
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune.planning.costs import costs_at
from fedprune.planning.plan import plan
from fedprune.strategies import compose
from support.fakes.strategy_rounds import NET

pytestmark = pytest.mark.board

PI = profile_store.find("raspberry-pi-5")
MSE = Recipe(loss="mse")
FLEET = {"a": 1.0, "b": 0.75, "c": 0.5, "d": 0.25}


def fleet(densities: dict[str, float], *, untrained: bool = True) -> State:
    """A state of devices that can hold these shares of the net."""
    state = State(model="m", untrained=untrained)
    for name, density in densities.items():
        device = Device(session=0, online=True, profile={"name": "any"}, probe=None, samples=10)
        device.density, device.widths = density, widths_at(NET, density)
        state.devices[name] = device
    return state


def granted(state: State, number: int, options: dict[str, Any] | None = None, **settings: Any) -> dict[str, Grant]:
    """What a job of ten rounds grants in one of them."""
    job = Job(strategy="fedprune", options=options or {}, rounds=10, recipe=MSE, **settings)
    state.round = number
    grants = Grants(job, compose(job), NET, state)
    return {name: grants.of(device) for name, device in state.devices.items()}


def densities(grants: dict[str, Grant]) -> list[float]:
    return [grant.density for grant in grants.values()]


def test_boards_train_what_three_quarters_can_hold_and_then_what_each_can() -> None:
    for number in (1, 8):
        grants = granted(fleet(FLEET), number)
        assert densities(grants) == [0.5, 0.5, 0.5, 0.25]
        assert [g.widths for g in grants.values()] == [widths_at(NET, d) for d in densities(grants)]
    assert densities(granted(fleet(FLEET), 9)) == list(FLEET.values())


def test_the_share_of_boards_that_hold_the_core_is_the_jobs_to_say() -> None:
    assert densities(granted(fleet(FLEET), 1, {"core": 0.5})) == [0.75, 0.75, 0.5, 0.25]
    assert densities(granted(fleet(FLEET), 1, {"core": 1})) == [0.25] * 4
    assert densities(granted(fleet(FLEET), 1, {"core": 0})) == list(FLEET.values())


def test_a_board_without_widths_or_excluded_does_not_count_for_the_core() -> None:
    state = fleet(FLEET | {"e": 0.1, "f": 0.1})
    state.devices["e"].excluded, state.devices["f"].widths = "it spoils", ()
    assert densities(granted(state, 1))[:4] == [0.5, 0.5, 0.5, 0.25]


def test_a_model_that_was_trained_before_has_no_core() -> None:
    assert densities(granted(fleet(FLEET, untrained=False), 1)) == list(FLEET.values())


def test_strategies_without_a_core_grant_what_boards_can_hold() -> None:
    state = fleet(FLEET)
    job = Job(strategy="heterofl", rounds=10)
    grants = Grants(job, compose(job), NET, state)
    assert grants.of(state.devices["a"]) == Grant(NET.sizes, 1.0)


def test_boards_of_one_width_are_not_mixed() -> None:
    assert not any(g.mixed for g in granted(fleet({"a": 1.0, "b": 1.0}), 1).values())
    assert not any(g.mixed for g in granted(fleet(FLEET), 1, {"core": 1}).values())
    assert all(g.mixed for g in granted(fleet(FLEET), 1).values())


def test_narrow_boards_work_as_much_as_half_of_the_whole_model_takes_up_to_four_times() -> None:
    grants = granted(fleet(FLEET), 9)
    whole = costs_at(NET, NET.sizes).training_macs
    for grant in grants.values():
        wanted = round(whole / 2 / costs_at(NET, grant.widths).training_macs)
        assert grant.work == max(1, min(4, wanted))
    assert grants["a"].work == 1 < grants["d"].work


def test_work_stays_within_the_time_that_a_board_is_planned_for() -> None:
    state = fleet({"a": 0.25})
    job = Job(strategy="fedprune", recipe=MSE)
    recipe = compose(job).planned_recipe(job, "a", widths_at(NET, 0.25), 0.25, 10)

    def works(spare: float) -> int:
        free = plan(NET, PI, recipe, 10, densities=(0.25,))
        seconds = free.prediction.transfer_s + spare * free.prediction.train_s
        made = plan(NET, PI, recipe, 10, densities=(0.25,), deadline_s=seconds)
        state.devices["a"].plan = PackedJson(made.to_dict())
        return granted(state, 1)["a"].work

    assert (works(1.01), works(2.01), works(100.0)) == (1, 2, 3)


def test_a_task_has_what_was_granted_and_a_restart_keeps_it() -> None:
    job = Job(strategy="fedprune", options={"densities": [1.0, 0.5, 0.5, 0.25]}, devices=4, rounds=10, recipe=MSE)
    coordinator = SynchronousCoordinator(job, NET, State(model="m0", untrained=True))
    for number, name in enumerate(FLEET):
        coordinator.handle(on.DeviceBorn(name, number, PI.to_dict(), 10), 0.0)
    tasks = coordinator.state.tasks
    assert [tasks[n].density for n in FLEET] == [0.5, 0.5, 0.5, 0.25]
    assert tasks["d"].work > 1
    again = State.from_json(coordinator.state.to_json())
    assert {n: (t.widths, t.work, t.mixed) for n, t in again.tasks.items()} == {
        n: (t.widths, t.work, t.mixed) for n, t in tasks.items()
    }
    assert coordinator.state.devices["a"].widths == NET.sizes, "what it can hold stays as it is"
