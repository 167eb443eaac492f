"""The daemon and the simulator on rounds that ask more and let few work at a time."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprune.coordination import Phase, State
from fedprune.coordination.stragglers import ENOUGH_UPDATES
from fedprune.model.recipe import Recipe
from fedprune.wire.messages import Cancelled, Offer, RoundProgress
from fedprune_server.simulation.fleet.device_table import with_link
from fedprune_server.simulation.simulation import Simulation
from support.fakes.digits_simulation import KINDS, boards, digits_simulation
from support.fakes.fleet import Fleet, counted_devices
from support.fakes.tiny_job import JOB
from support.marks import mark_soak

NAMES = ("a", "b", "c", "d", "e")


def fleet_of(folder: Path, **settings: Any) -> Fleet:
    return Fleet(folder, replace(JOB, **{"devices": len(NAMES), **settings}), NAMES)


class SlowDevice:
    """A device that trains for so long, and says how far it is."""

    def __init__(self, fleet: Fleet, name: str, seconds: float) -> None:
        self.fleet, self.device, self.seconds = fleet, fleet.air.devices[name], seconds
        self.take = self.device.take
        self.work: deque[tuple[Offer, float, int]] = deque()
        self.device.take = self.begin  # type: ignore[method-assign]

    def begin(self, offer: Offer) -> None:
        self.work = deque([(offer, self.fleet.air.now, -1)])

    def advance(self) -> None:
        if not self.work:
            return
        offer, begun, last_progress = self.work.popleft()
        if self.device.heard and isinstance(self.device.heard[-1], Cancelled):
            return
        share = (self.fleet.air.now - begun) / self.seconds
        if share >= 1:
            self.take(offer)
            return
        progress = int(20 * share)
        if progress > last_progress:
            message = RoundProgress(self.device.name, offer.job, offer.round, offer.attempt, "train", progress, 20)
            self.device.say(message)
        self.work.append((offer, begun, max(last_progress, progress)))


def run(fleet: Fleet, *slow: SlowDevice) -> State:
    daemon = fleet.daemon()

    def idle() -> None:
        if daemon.is_busy:
            time.sleep(0.0005)
            return
        fleet.air.now += 0.5
        assert fleet.air.now < 10_000
        for device in slow:
            device.advance()

    fleet.air.on_idle = idle
    daemon.run(until_finished=True)
    return daemon.main_runner.state


def test_enough_updates_close_a_round_and_the_slow_one_is_told(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, participation=0.8, over_selection=0.25, rounds=2)
    state = run(fleet, SlowDevice(fleet, "b", 80.0))
    assert counted_devices(state) == [["a", "c", "d", "e"]] * 2
    assert {n: d["reason"] for n, d in state.history[0]["devices"].items() if d["reason"]} == {"b": ENOUGH_UPDATES}
    assert [m.reason for m in fleet.air.devices["b"].heard if isinstance(m, Cancelled)] == [ENOUGH_UPDATES] * 2
    assert fleet.air.now < 80
    assert state.devices["b"].failures == 0
    assert state.devices["b"].missed_rounds == 2


def test_few_work_at_a_time_and_all_count(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, rounds=2, in_flight=2)
    expected = fleet_of(tmp_path / "all", rounds=2).run().model
    training_counts: list[int] = []
    save = fleet.storage.save

    def save_and_count(state: State, *rest: Any) -> None:
        kinds = ("extracting", "offered", "pulling")
        if state.phase is Phase.TRAINING:
            training_counts.append(sum(t.progress.value in kinds for t in state.tasks.values()))
        save(state, *rest)

    fleet.storage.save = save_and_count  # type: ignore[method-assign]
    state = run(fleet, *(SlowDevice(fleet, n, 10.0) for n in NAMES))
    assert counted_devices(state) == [list(NAMES)] * 2
    assert max(training_counts) == 2
    assert state.model == expected


def test_a_kill_in_the_line_loses_nobody(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, rounds=1, in_flight=1)
    daemon = fleet.daemon()

    def idle() -> None:
        if any(t.progress.value == "folded" for t in daemon.main_runner.state.tasks.values()):
            daemon.stop()

    fleet.air.on_idle = idle
    daemon.run()
    fleet.restart()
    assert counted_devices(fleet.run()) == [list(NAMES)]


# In simulation.

Simulate = Callable[..., Simulation]


@pytest.fixture
def simulate(tmp_path_factory: pytest.TempPathFactory) -> Simulate:
    """A fleet whose links are no limit."""
    link = {"down_mb_s": 10.0, "up_mb_s": 10.0, "latency_s": 0.0}
    fleet = [replace(b, profile=with_link(b.profile, link)) for b in boards((*KINDS, "raspberry-pi-5"))]
    small = {"density": 0.25, "recipe": Recipe(max_steps=1), "scorer": "ordered"}

    def make(**settings: Any) -> Simulation:
        return digits_simulation(
            tmp_path_factory.mktemp("run"), keeps_state=False, fleet=fleet, **{**small, **settings}
        )

    return make


def test_a_simulation_closes_with_enough_and_waits_for_the_slow_one_in_the_end(simulate: Simulate) -> None:
    run = simulate(participation=0.75, over_selection=0.34, rounds=5)
    run.run()
    assert [r for r, c in enumerate(counted_devices(run.state), 1) if len(c) == 4] == [4]
    assert run.state.devices[KINDS[0]].failures == 0


@pytest.mark.parametrize("kind", ["semi-async", pytest.param("async", marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    "strategy",
    mark_soak(
        ["fedavg", "heterofl", "fedrolex", "fedper", "fiarse", "fedprune"], soak=["fedavg", "heterofl", "fedrolex"]
    ),
)
def test_strategies_go_through_a_schedule_that_is_not_their_own(simulate: Simulate, strategy: str, kind: str) -> None:
    settings = {"strategy": strategy, "density": 0.0, "scorer": "magnitude", "deadline_s": 20.0, "rounds": 3}
    run = simulate(schedule={"kind": kind}, **settings)
    run.run()
    assert run.state.phase is Phase.FINISHED
    assert all(counted_devices(run.state))
    assert len({r["model"] for r in run.state.history}) == 3
