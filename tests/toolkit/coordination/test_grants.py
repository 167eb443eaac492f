"""What devices train in a round: a core that the fleet shares, growth, and work that narrower boards have time for."""

from dataclasses import replace
from typing import Any

import pytest

from fedprune.coordination import State, make_coordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.grants import Grant, Grants
from fedprune.jobs.job import Job
from fedprune.jobs.packed_json import PackedJson
from fedprune.jobs.state import JobDevice
from fedprune.model.architecture import Architecture, widths_at
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune.planning.plan_search import PlanSearch
from fedprune.planning.width_plan import TIME_MARGIN
from fedprune.strategies import compose
from support.fakes.strategy_rounds import NET

pytestmark = pytest.mark.board

PI = profile_store.find_profile("raspberry-pi-5")
MSE = Recipe(loss="mse")
FLEET = {"a": 1.0, "b": 0.75, "c": 0.5, "d": 0.25}


def fleet(densities: dict[str, float], *, untrained: bool = True) -> State:
    """A state of devices that can hold these shares of the net."""
    state = State(model="m", untrained=untrained)
    for name, density in densities.items():
        device = JobDevice(session=0, online=True, profile={"name": "any"}, probe=None, samples=10)
        device.density, device.widths = density, widths_at(NET, density)
        state.devices[name] = device
    return state


def round_grants(state: State, number: int, options: dict[str, Any] | None = None, **settings: Any) -> dict[str, Grant]:
    """What a job of ten rounds grants in one of them."""
    job = Job(strategy="fedprune", options=options or {}, rounds=10, recipe=MSE, **settings)
    grants = begin_grants(job, state, number)
    return {name: grants.grant_of(device) for name, device in state.devices.items()}


def begin_grants(job: Job, state: State, number: int = 1, architecture: Architecture = NET) -> Grants:
    """The grants of a job whose round of this number has just begun."""
    grants = make_coordinator(job, architecture, state).grants
    state.round = number
    grants.begin_round()
    return grants


def densities(grants: dict[str, Grant]) -> list[float]:
    return [grant.density for grant in grants.values()]


def test_boards_train_what_three_quarters_can_hold_and_then_what_each_can() -> None:
    for number in (1, 8):
        grants = round_grants(fleet(FLEET), number)
        assert densities(grants) == [0.5, 0.5, 0.5, 0.25]
        assert [g.widths for g in grants.values()] == [widths_at(NET, d) for d in densities(grants)]
    assert densities(round_grants(fleet(FLEET), 9)) == list(FLEET.values())


@pytest.mark.parametrize(
    "total",
    [{"total_bytes": 1000}, {"total_macs": 1000}, {"total_hours": 1}, {"total_bytes": 1000, "total_hours": 100}],
)
def test_boards_grow_when_most_of_a_total_is_spent_however_many_rounds_there_may_be(total: dict[str, float]) -> None:
    state, shared = fleet(FLEET), []
    state.began_at = 0.0
    for number in range(1, 11):  # each round takes a tenth of the total
        job = Job(strategy="fedprune", rounds=1000, recipe=MSE, **total)
        shared.append(bool(begin_grants(job, state, number).core))
        state.spent_bytes = state.spent_macs = 100 * number
        state.history.append({"at": 360.0 * number})
    assert shared == [True] * 8 + [False] * 2


def test_a_round_is_that_of_the_model_that_a_new_one_became_for_its_core() -> None:
    coordinator = make_coordinator(Job(strategy="fedprune", rounds=10, recipe=MSE), NET, State("m", untrained=True))
    (score,) = coordinator.handle(on.DeviceBorn("a", 1, PI.to_dict(), 50), 0.0)
    assert score == do.Score(1, "m", {}, ("a",), coordinator.grants.core)
    assert coordinator.grants.core
    begun = on.Scored(1, "r", model="n", memory={"ranks": "s"})
    extract, *_ = coordinator.handle(begun, 0.0)
    assert isinstance(extract, do.Extract)
    assert extract.basis == do.Basis(1, "n", "r", memory={"ranks": "s"})
    assert (coordinator.state.model, coordinator.state.memory) == ("n", {"ranks": "s"})
    assert coordinator.handle(begun, 0.0) == [], "it has begun"


def test_a_job_whose_core_is_switched_off_in_a_round_has_none_in_it() -> None:
    state, job = fleet(FLEET), Job(strategy="fedprune", rounds=10, recipe=MSE)
    assert begin_grants(job, state).core
    assert make_coordinator(replace(job, options={"core": 0}), NET, state).grants.core == ()


def test_work_stays_within_the_time_that_a_board_is_planned_for() -> None:
    state = fleet({"a": 0.25})
    job = Job(strategy="fedprune", recipe=MSE)
    recipe = compose(job).planned_recipe(job, "a", widths_at(NET, 0.25), 0.25, 10)

    def works(spare: float) -> int:
        free = PlanSearch(NET, PI, recipe, 10, densities=(0.25,)).search()
        seconds = free.prediction.round_s + (spare - 1) * free.prediction.train_s
        plan = PlanSearch(NET, PI, recipe, 10, densities=(0.25,), deadline_s=TIME_MARGIN * seconds).search()
        state.devices["a"].plan = PackedJson(plan.to_dict())
        return round_grants(state, 1)["a"].work

    assert (works(1.01), works(2.01), works(100.0)) == (1, 2, 3)


def test_a_board_without_widths_excluded_or_gone_does_not_count_for_the_core() -> None:
    state = fleet(FLEET | dict.fromkeys("efgh", 0.1))
    assert densities(round_grants(state, 6))[:4] == [0.1, 0.1, 0.1, 0.1]
    devices = state.devices
    devices["e"].excluded, devices["f"].widths = "it spoils", ()
    devices["g"].online = devices["h"].online = False
    devices["h"].last_counted_round = 2
    assert densities(round_grants(State.from_json(state.to_json()), 6))[:4] == [0.5, 0.5, 0.5, 0.25]
    devices["g"].last_counted_round = devices["h"].last_counted_round = 3
    assert densities(round_grants(state, 6))[:4] == [0.25, 0.25, 0.25, 0.25], "they are away for a moment"


@pytest.mark.parametrize(("few", "share", "core"), [(3, 0.1, 1), (3, 0.5, 0.5), (2, 0.5, 1), (5, 0.1, 0.1), (0, 0, 1)])
def test_few_boards_that_can_hold_little_narrow_the_core_to_half_at_most(few: int, share: float, core: float) -> None:
    state = fleet({f"board-{i}": share if i < few else 1.0 for i in range(10)})
    assert densities(round_grants(state, 1)) == [share] * few + [core] * (10 - few)
    line = begin_grants(Job(strategy="fedprune", recipe=MSE), state).describe()
    assert ("whole model" in line) == (few == 0), "the log says so only where all boards train it"
