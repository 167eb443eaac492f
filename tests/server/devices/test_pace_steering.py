"""The number of connected boards, and their arrivals, on a virtual clock: as many as was asked for, and not at once."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.rng import keyed_generator
from fedprune.wire.fleet_messages import MAX_BOARD_AWAY_S
from fedprune.wire.link import max_pause
from fedprune_server.devices.pace_steering import AWAY_COUNTED_S, MAX_RECONNECTS_PER_S, Demand, PaceSteering, VisitPlan

STAY_S = 600.0
TICK_S = 5.0


@dataclass
class VirtualFleet:
    """Boards that obey; all of them are connected at the beginning.

    Attributes:
        dead: How many of them leave and never come back.
        arrivals: When boards came back.
        levels: The number of connected boards at each look.
    """

    boards: int
    target: int
    demand: Demand
    dead: int = 0
    works: Callable[[str], bool] = lambda device: False
    now: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.steering = PaceSteering(self.target, 7, (), self.now)
        self.online = {f"d{i}" for i in range(self.boards)}
        self.back: list[tuple[float, str]] = []
        for device in sorted(self.online):
            self.steering.on_connect(device, self.now, able=True)

    def run(self, until: float, demand: Callable[[VirtualFleet], Demand] = lambda fleet: fleet.demand) -> None:
        while self.now < until:
            self.now += TICK_S
            while self.back and self.back[0][0] <= self.now:
                at, device = heapq.heappop(self.back)
                if int(device[1:]) >= self.dead:
                    self.online.add(device)
                    self.arrivals.append(at)
                    self.steering.on_connect(device, self.now, able=True)
            for device, away_s in self.steering.choose_leaving(self.now, self.now, demand(self), self.works):
                assert 1 <= away_s <= MAX_BOARD_AWAY_S
                self.online.remove(device)
                heapq.heappush(self.back, (self.now + away_s, device))
            self.levels.append(len(self.online))

    def forget(self) -> None:
        self.arrivals.clear()
        self.levels.clear()


def within(count: float, expected: float, sigmas: float = 5.0) -> bool:
    """Whether a count that is a sum of independent events is near what is expected of it."""
    return abs(count - expected) <= sigmas * math.sqrt(expected) + 1


@pytest.mark.parametrize(
    ("boards", "target"), [(1_000, 100), (10_000, 500), pytest.param(100_000, 2_000, marks=pytest.mark.soak)]
)
def test_as_many_boards_are_connected_as_the_target_names_and_each_visit_replaces_them_once(
    boards: int, target: int
) -> None:
    fleet = VirtualFleet(boards, target, Demand(10, STAY_S))
    fleet.run(STAY_S)
    for _ in range(5):  # from the first visit on: that all came at once makes no wave
        assert within(len(fleet.arrivals), target)
        fleet.forget()
        fleet.run(fleet.now + STAY_S)
        assert fleet.levels == [target] * len(fleet.levels)
    seconds = Counter(int(at // 10) for at in fleet.arrivals)
    assert max(seconds.values()) <= 10 * target / STAY_S + 6 * math.sqrt(10 * target / STAY_S) + 1


def test_boards_that_do_not_return_are_soon_not_counted() -> None:
    fleet = VirtualFleet(2_000, 100, Demand(10, STAY_S), dead=1_000)
    fleet.run(AWAY_COUNTED_S + 3_600)
    fleet.forget()
    fleet.run(fleet.now + 10 * STAY_S)
    assert fleet.steering.boards == 1_000
    assert within(len(fleet.arrivals), 10 * 100)


def test_a_job_that_waits_for_boards_keeps_those_that_are_there() -> None:
    """Half of the fleet is dead, so that meetings are too small: boards stay until they are enough."""
    demand = Demand(100, STAY_S)
    fleet = VirtualFleet(300, 20, demand, dead=150)
    fleet.run(VisitPlan(20, demand).period_s)
    began = False

    def waiting(fleet: VirtualFleet) -> Demand:
        nonlocal began
        began = began or len(fleet.online) >= 100
        return Demand(100, STAY_S, waiting=not began)

    fleet.run(fleet.now + 6 * VisitPlan(20, demand).period_s, waiting)
    assert began


@given(st.integers(2, 50), st.integers(1, 40), st.integers(0, 60), st.sets(st.integers(0, 49)))
@settings(max_examples=50, deadline=None)
def test_a_board_with_a_part_stays_and_leaves_when_it_is_done(
    boards: int, target: int, needed: int, busy: set[int]
) -> None:
    names = {f"d{i}" for i in busy if i < boards}
    fleet = VirtualFleet(boards, target, Demand(needed, STAY_S), works=lambda device: device in names)
    fleet.run(2 * STAY_S)
    assert names <= fleet.online
    names.clear()
    fleet.run(fleet.now + 10)
    plan = VisitPlan(target, fleet.demand)
    late = sum(at > fleet.now - STAY_S - 20 for at in fleet.arrivals)
    assert len(fleet.online) <= (late if plan.needs_meetings else target)


def returns(boards: int, outage_s: float, spread_s: float) -> Counter[int]:
    """Arrivals by second, of boards that lose their connection together, and try until the broker is back."""
    arrivals, chance = Counter[int](), keyed_generator(0, "returns", outage_s)
    for _ in range(boards):
        at, failures = 0.0, 0
        while (at := at + chance.uniform(0, max_pause(failures, spread_s))) < outage_s:
            failures += 1
        arrivals[int(at)] += 1
    return arrivals


@pytest.mark.parametrize("outage_s", [0.0, 1.0, 30.0, 200.0, 1_000.0])
def test_ten_thousand_boards_come_back_after_a_restart_of_the_broker_at_a_bounded_rate(outage_s: float) -> None:
    boards = 10_000
    steering = PaceSteering(0, 0, (), 0.0)
    for i in range(boards):
        steering.on_connect(f"d{i}", 0.0, able=True)
    returns_per_s = returns(boards, outage_s, steering.spread_s)
    assert sum(returns_per_s.values()) == boards
    assert max(returns_per_s.values()) <= MAX_RECONNECTS_PER_S + 5 * math.sqrt(MAX_RECONNECTS_PER_S)
    assert max(returns_per_s) <= outage_s + steering.spread_s
    if outage_s <= 1:  # what the spread is for
        assert max(returns(boards, outage_s, 0.0).values()) > boards / 2
