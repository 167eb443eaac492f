"""No strategy gives a board more than its plan allows, whatever its allocator asks for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune import Strategy
from fedprune.coordination import State, make_coordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.base import Coordinator
from fedprune.jobs.job import Job
from fedprune.jobs.state import DeviceTask, JobDevice
from fedprune.model.architecture import widths_at
from fedprune.planning.cost_prediction import predict_costs, training_memory
from fedprune.planning.profile import HardwareProfile
from fedprune.planning.profile_store import find_profile, shipped_profile_names
from fedprune.planning.width_plan import TIME_MARGIN
from fedprune.strategies.allocation import Allocator, Fleet
from fedprune.strategies.presets import PRESETS
from support.fakes.tiny_job import WIDE

pytestmark = pytest.mark.board

ZERO, PI, ORIN = (find_profile(n) for n in ("raspberry-pi-zero-2w", "raspberry-pi-5", "jetson-orin-nano"))
WHOLE_BYTES = predict_costs(WIDE, WIDE.sizes, PI, Job().recipe, 10).round_bytes


def with_room(profile: HardwareProfile, share: float) -> HardwareProfile:
    """A profile with the memory of this share of what the whole model takes beyond the process."""
    memory = predict_costs(WIDE, WIDE.sizes, profile, Job().recipe, 10).memory
    room = memory.total - (1 - share) * memory.of_width
    return replace(profile, memory=replace(profile.memory, total_bytes=round(room), reserve_bytes=0, training_share=1))


def fleet_of(job: Job, profiles: Mapping[str, HardwareProfile]) -> Coordinator:
    coordinator = make_coordinator(replace(job, devices=len(profiles)), WIDE, State(model="m0"))
    for name, profile in profiles.items():
        for command in coordinator.handle(on.DeviceBorn(name, 1, profile.to_dict(), 10), 0.0):
            if isinstance(command, do.Score):
                coordinator.handle(on.Scored(command.round, "r"), 0.0)
    return coordinator


def exceeded(coordinator: Coordinator, name: str, task: DeviceTask) -> list[str]:
    """The limits that a part breaks, by the cost model alone."""
    job, strategy, device = coordinator.job, coordinator.strategy, coordinator.state.devices[name]
    profile = HardwareProfile.from_dict(device.profile)
    recipe = strategy.planned_recipe(job, "", task.widths, task.density, task.samples)
    masked = coordinator.allocator.masks_elements
    costs = predict_costs(
        WIDE, task.widths, profile, recipe.with_micro_batches(task.accumulate), task.samples,
        codecs=strategy.codecs(job, profile.name, device.codecs), active_share=task.density if masked else 1.0,
    )  # fmt: skip
    limits = {
        "memory": (costs.memory_bytes, training_memory(profile, None)),
        "time": (TIME_MARGIN * costs.round_s, job.deadline_s),
        "bytes": (costs.round_bytes, min(job.byte_budget or 2**60, profile.link.bytes_per_round)),
        "storage": (costs.storage_bytes, profile.storage.budget_bytes),
    }
    return [name for name, (value, limit) in limits.items() if value > limit]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(PRESETS)), st.data())
def test_no_preset_offers_more_than_a_board_s_plan_allows(preset: str, data: st.DataObject) -> None:
    def share() -> float:
        return data.draw(st.floats(0.02, 4.0))

    kinds = data.draw(st.lists(st.sampled_from(sorted(shipped_profile_names())), min_size=3, max_size=5))
    profiles = {f"b{i}": with_room(find_profile(kind), share()) for i, kind in enumerate(kinds)}
    deadline_s = predict_costs(WIDE, WIDE.sizes, ZERO, Job().recipe, 10).round_s * share()
    density = data.draw(st.sampled_from([0.0, 0.0, 0.6, 1.0]))
    job = Job(strategy=preset, byte_budget=round(WHOLE_BYTES * share()), deadline_s=deadline_s, density=density)
    coordinator = fleet_of(job, profiles)
    assert {d.excluded != "" for d in coordinator.state.devices.values() if not d.widths} <= {True}
    assert not any(exceeded(coordinator, *part) for part in coordinator.state.tasks.items())


def densities(job: Job, profiles: Mapping[str, HardwareProfile]) -> dict[str, float]:
    return {name: device.density for name, device in fleet_of(job, profiles).state.devices.items()}


def test_tiers_are_dealt_by_what_boards_can_hold_and_not_by_their_names() -> None:
    job = Job(strategy="subflot", options={"densities": [1.0, 0.5, 0.25]})
    boards = {"a": ZERO, "b": PI, "c": ORIN}
    assert densities(job, boards) == {"a": 0.25, "b": 0.5, "c": 1.0}
    assert densities(job, boards | {"c": with_room(ORIN, 0.01)}) == pytest.approx(
        {"a": 0.5, "b": 1.0, "c": 0.1}, abs=0.1
    )
    assert densities(job, dict.fromkeys(("b10", "b2", "b1"), PI)) == {"b1": 1.0, "b2": 0.5, "b10": 0.25}
    assert densities(replace(job, ignores_plans=True), boards) == {"a": 1.0, "b": 0.5, "c": 0.25}


def test_a_lowered_density_says_what_was_asked_and_why() -> None:
    device = fleet_of(Job(density=0.75, byte_budget=WHOLE_BYTES // 4), {"a": PI}).state.devices["a"]
    assert device.plan is not None
    assert (device.plan["bound"], device.density < 0.75) == ("bytes", True)
    assert device.density == device.plan["density"]
    assert [text in device.plan["warning"] for text in ("instead of 0.75", "byte_budget")] == [True, True]


def test_a_method_that_needs_the_whole_model_leaves_a_smaller_board_out_and_its_hint_helps() -> None:
    boards = {"small": with_room(PI, 0.3), "large": PI}
    job = Job(strategy="fedavg")
    small, large = (fleet_of(job, boards).state.devices[n] for n in ("small", "large"))
    assert (small.widths, large.widths) == ((), WIDE.sizes)
    assert "memory" in small.excluded
    assert "density = 1" in small.excluded
    by_hint = fleet_of(replace(job, density=1.0), boards).state.devices
    assert not by_hint["small"].excluded
    assert 0 < by_hint["small"].density < by_hint["large"].density == 1


def test_masks_of_elements_get_fewer_where_bytes_are_scarce_and_none_where_the_model_is_too_large() -> None:
    job = Job(strategy="pr-fl", byte_budget=WHOLE_BYTES // 3)
    scarce = fleet_of(job, {"a": PI}).state.devices["a"]
    assert (scarce.widths, scarce.excluded, 0.1 < scarce.density < 0.35) == (WIDE.sizes, "", True)
    assert "memory" in fleet_of(job, {"a": with_room(PI, 0.5)}).state.devices["a"].excluded


@dataclass(frozen=True)
class Generous(Allocator):
    """Writes widths into the state by itself."""

    def admit(self, fleet: Fleet, name: str, previous: JobDevice | None) -> None:
        fleet.state.devices[name].density, fleet.state.devices[name].widths = 0.9, (600, 300)

    def open(self, fleet: Fleet) -> bool:  # every round: what was bound once is bound again
        return bool(self.admit(fleet, "a", None))


def generous(job: Job) -> Strategy:
    return Strategy(allocator=Generous(), inputs="sum")


def test_widths_that_an_allocator_of_ones_own_sets_are_kept_where_they_fit_and_bound_where_not() -> None:
    job = Job(strategy=f"{__name__}:generous")
    assert fleet_of(job, {"a": PI}).state.devices["a"].widths == (600, 300)
    scarce = fleet_of(replace(job, byte_budget=WHOLE_BYTES // 2), {"a": PI})
    assert all(w < f for w, f in zip(scarce.state.devices["a"].widths, (600, 300), strict=True))
    assert [exceeded(scarce, *part) for part in scarce.state.tasks.items()] == [[]]


def test_a_lowered_share_falls_further_when_rounds_show_that_memory_is_short() -> None:
    coordinator = fleet_of(Job(strategy="heterofl"), {"a": with_room(PI, 0.5)})
    plan = (device := coordinator.state.devices["a"]).plan or {}
    metrics: dict[str, Any] = {"peak_memory_bytes": 1.3 * plan["prediction"]["memory_bytes"]}
    coordinator.planner.learn("a", device, DeviceTask(1, device.widths, density=device.density, metrics=metrics))
    assert device.density < plan["density"]
    assert device.widths == widths_at(WIDE, device.density)
    assert not coordinator.allocator.open(coordinator.fleet), "a round's begin would take it back"


def test_a_board_whose_profile_makes_no_sense_is_excluded_and_the_others_go_on() -> None:
    coordinator = fleet_of(Job(strategy="subflot"), {"a": PI})
    coordinator.handle(on.DeviceBorn("b", 1, {"name": "x"}, 10), 0.0)
    assert [bool(d.widths) for d in coordinator.state.devices.values()] == [True, False]


def test_a_silent_board_that_no_longer_fits_is_not_asked_again() -> None:
    coordinator = fleet_of(Job(density=1.0), {"a": PI, "b": PI})
    coordinator.state.devices["a"].silent_since, coordinator.state.devices["a"].asked_again_at = 1.0, 5.0
    coordinator.handle(on.DeviceBorn("a", 1, PI.to_dict(), 0), 2.0)  # it has lost its samples
    coordinator.state.devices["a"].readmit()
    assert coordinator.state.devices["a"].excluded


def test_a_share_that_times_decide_is_what_was_wanted_and_not_what_a_board_could_hold_once() -> None:
    job = Job(strategy="pr-fl", options={"masks": "channels", "synchronous": True})
    coordinator = fleet_of(job, {"a": with_room(PI, 0.3)})
    assert "instead of 1" in (coordinator.state.devices["a"].plan or {})["warning"]
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 10), 0.0)
    assert coordinator.state.devices["a"].density == 1
