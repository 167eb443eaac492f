"""Who gets how much of the model: fixed points, bounds, and the papers' steps."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.jobs.state import DeviceTask, JobDevice, State
from fedprune.strategies.allocation import Allocator, Fixed, Fleet, Tiers, natural_sort_key
from fedprune.strategies.recovery import Recovery
from fedprune.strategies.time_driven import TimeDriven, balanced_density
from support.fakes.tiny_job import ARCHITECTURE, JOB

pytestmark = pytest.mark.board

DENSITIES = st.floats(0.05, 1.0)
SECONDS = st.floats(0.1, 1000)


def fleet_of(allocator: Allocator, *names: str, samples: int = 10) -> Fleet:
    fleet = Fleet(JOB, ARCHITECTURE, State("m", round=1))
    for name in names:
        fleet.state.devices[name] = JobDevice(1, True, {}, None, samples)
    for name in names:
        allocator.admit(fleet, name, None)
    return fleet


def densities(fleet: Fleet) -> list[float]:
    return [d.density for _, d in sorted(fleet.state.devices.items())]


def deliver(allocator: Allocator, fleet: Fleet, name: str, seconds: float | None, **metrics: float) -> None:
    device = fleet.state.devices[name]
    allocator.learn(fleet, name, DeviceTask(1, device.widths, device.density, metrics=metrics), seconds)


def test_tiers_are_dealt_in_the_order_of_names() -> None:
    tiers = Tiers((1.0, 0.5, 0.25), shares=(0.2, 0.2, 0.6))
    names = [f"board-{i}" for i in range(1, 11)]
    fleet = fleet_of(tiers, *names)
    tiers.open(fleet)
    assert [fleet.state.devices[n].density for n in names] == [1.0] * 2 + [0.5] * 2 + [0.25] * 6
    assert sorted(names, key=natural_sort_key) == names


@given(st.permutations(list("abcdef")))
def test_the_order_of_announcements_makes_no_tiers(order: list[str]) -> None:
    tiers = Tiers((1.0, 0.5, 0.25))
    fleet = fleet_of(tiers, *order)
    tiers.open(fleet)
    assert densities(fleet) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert not tiers.open(fleet)


@given(DENSITIES, st.floats(0.001, 1000.0))
def test_equal_times_are_the_fixed_point(density: float, ratio: float) -> None:
    for power in (1.0, 2.0):
        got = balanced_density(density, ratio, power)
        assert got == pytest.approx(density if abs(1 - ratio) <= 0.05 else density * ratio ** (1 / power))
        assert balanced_density(density, 1.0, power) == density


@given(st.lists(st.tuples(DENSITIES, SECONDS), min_size=2, max_size=6), st.floats(0.05, 0.5))
def test_times_move_densities_within_their_bounds(density_times: list[tuple[float, float]], floor: float) -> None:
    names = [f"d{i}" for i in range(len(density_times))]
    allocator = TimeDriven(Tiers(tuple(max(floor, d) for d, _ in density_times)), None, interval=1, floor=floor)
    fleet = fleet_of(allocator, *names)
    before = densities(fleet)
    for name, (_, seconds) in zip(names, density_times, strict=True):
        deliver(allocator, fleet, name, seconds)
    changed = allocator.review(fleet, {})
    fastest_s = min(s / d for d, (_, s) in zip(before, density_times, strict=True))
    for old, new, (_, seconds) in zip(before, densities(fleet), density_times, strict=True):
        # The paper's formula, of times as they would be without pruning.
        expected = min(1.0, max(floor, fastest_s / (seconds / old)))
        assert new == pytest.approx(old if abs(1 - fastest_s / seconds) <= 0.05 else expected)
    assert changed == (densities(fleet) != before)


def test_times_of_another_density_say_nothing() -> None:
    allocator = TimeDriven(Fixed(), None, interval=2)
    fleet = fleet_of(allocator, "a", "b")
    fleet.state.round = 2
    for name, seconds in (("a", 10.0), ("a", 20.0), ("b", 60.0), ("b", None)):
        deliver(allocator, fleet, name, seconds)
    assert allocator.review(fleet, {})
    assert densities(fleet) == [1.0, 0.25]
    allocator.learn(fleet, "b", DeviceTask(1, ARCHITECTURE.sizes, 1.0), 60.0)
    fleet.state.round = 4
    assert not allocator.review(fleet, {}), "b has shown nothing at its new density yet"
    deliver(allocator, fleet, "b", 30.0)
    fleet.state.round = 5
    assert not allocator.review(fleet, {}), "it is not time"
    fleet.state.round = 6
    assert allocator.review(fleet, {})
    assert densities(fleet) == [1.0, 0.125], "twice as long as a, whose 15 seconds are of the whole model"


def still(allocator: TimeDriven, fleet: Fleet, rounds: int, **scores: float) -> list[list[float]]:
    """Rounds in which no device's score becomes better (but never is the same twice)."""
    out = []
    for _ in range(rounds):
        fleet.state.round += 1
        for name in fleet.state.devices:
            wiggle = 1e-4 * (fleet.state.round % 2)
            deliver(allocator, fleet, name, 10.0, accuracy_validation=scores.get(name, 0.5) - wiggle)
        allocator.review(fleet, {})
        out.append(densities(fleet))
    return out


def test_whoever_has_learnt_what_it_can_grows_until_all_have_all() -> None:
    start = Tiers((0.5, 0.5, 1.0))  # with times that are equal
    allocator = TimeDriven(start, Recovery(patience=2, delta=0.25), interval=1, floor=0.5)
    fleet = fleet_of(allocator, "a", "b", "c")
    path = still(allocator, fleet, 12)
    assert path[0] == [0.5, 0.5, 1.0]
    assert sorted({tuple(p) for p in path}) == [(0.5, 0.5, 1.0), (0.75, 0.75, 1.0), (1.0, 1.0, 1.0)]
    assert path == sorted(path)
    assert path.count([0.75, 0.75, 1.0]) == 2, "P checks at every density"
    assert not allocator.done(fleet) or densities(fleet) == [1.0, 1.0, 1.0]
    still(allocator, fleet, 20)
    assert allocator.done(fleet)


@pytest.mark.parametrize(("names", "patience"), [("a", 2), ("ab", 2), ("ab", 10)])
def test_a_fleet_that_has_all_of_the_model_is_done_after_the_last_patience(names: str, patience: int) -> None:
    """8·P checks, whatever ρ_min is: nothing has been pruned, so nothing has to grow first."""
    allocator = TimeDriven(Fixed(), Recovery(patience=patience), interval=1, floor=0.1)
    fleet = fleet_of(allocator, *names)
    still(allocator, fleet, 8 * patience)  # the first score is the best one
    assert not allocator.done(fleet)
    still(allocator, fleet, 1)
    assert allocator.done(fleet)


def test_whoever_returns_has_what_it_had() -> None:
    allocator = TimeDriven(Fixed(0.8), None, interval=1)
    fleet = fleet_of(allocator, "a", "b")
    deliver(allocator, fleet, "a", 10.0)
    deliver(allocator, fleet, "b", 20.0)
    allocator.review(fleet, {})
    assert densities(fleet) == [1.0, 0.5]
    earlier_device = fleet.state.devices["b"]
    fleet.state.devices["b"] = JobDevice(2, True, {}, None, 10, allocation=earlier_device.allocation)
    allocator.admit(fleet, "b", earlier_device)
    assert densities(fleet) == [1.0, 0.5]
    assert fleet.state.devices["b"].widths == earlier_device.widths


@given(st.data())
def test_what_allocators_remember_survives_json_and_is_replaced_not_changed(data: st.DataObject) -> None:
    allocator = TimeDriven(Fixed(0.3), Recovery(patience=1), interval=2)
    fleet = fleet_of(allocator, "a", "b")
    for _ in range(8):
        before = [(d, d.allocation, json.dumps(d.allocation)) for d in fleet.state.devices.values()]
        fleet.state.round += 1
        for name in fleet.state.devices:
            if data.draw(st.booleans()):
                deliver(allocator, fleet, name, data.draw(SECONDS), accuracy_validation=data.draw(st.floats(0, 1)))
        allocator.review(fleet, {})
        for device, allocation, text in before:
            assert json.dumps(allocation) == text
            if json.dumps(device.allocation) != text:
                assert device.allocation is not allocation
        assert State.from_json(fleet.state.to_json()) == fleet.state
        assert all(0.1 <= d <= 1 for d in densities(fleet))


@given(st.lists(st.sampled_from([f"n{i}" for i in (1, 2, 10, 20, 100)] + ["N1", "1n", "n01", "m"]), min_size=1))
def test_a_devices_place_is_that_of_a_sort(coming: list[str]) -> None:
    """However devices come, one by one or many unseen, and whether or not the same ones come again."""
    fleet = Fleet(JOB, ARCHITECTURE, State("m"))
    for i, name in enumerate(coming):
        fleet.state.devices[name] = JobDevice(1, True, {}, None, 10)
        if i % 3:
            ordered = sorted(fleet.state.devices, key=lambda n: (natural_sort_key(n), n))
            assert [fleet.position(n) for n in ordered] == list(range(len(ordered)))
