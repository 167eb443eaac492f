"""What a coordinator's plans learn from rounds' own times, and from what boards measured."""

from dataclasses import replace

import pytest

from fedprune.coordination import State, SynchronousCoordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.width_planner import WidthPlanner
from fedprune.jobs.job import Job
from fedprune.jobs.state import DeviceTask, JobDevice
from fedprune.model.architecture import Activation, Axis, ChannelGroup, Segment, TensorKind, TensorSpec, widths_at
from fedprune.planning import profile_store
from fedprune.planning.correction import Correction
from fedprune.planning.cost_prediction import predict_costs
from fedprune.planning.latency_model import typical_table
from fedprune.planning.plan_search import DENSITIES
from fedprune.planning.probe_report import ProbeReport
from fedprune.planning.width_plan import MEMORY, WidthPlan
from fedprune.strategies import compose
from support.fakes.coordinator_shell import digest
from support.fakes.tiny_job import ARCHITECTURE, JOB, WIDE

pytestmark = pytest.mark.board


PI = profile_store.find_profile("raspberry-pi-5")


def planned_fleet(deadline_s: float = 10_000) -> SynchronousCoordinator:
    job = replace(JOB, density=0.0, devices=1, rounds=9, deadline_s=deadline_s)
    coordinator = SynchronousCoordinator(job, ARCHITECTURE, State(model="m0"))
    coordinator.handle(on.DeviceBorn("a", 1, PI.to_dict(), 10), 0.0)
    return coordinator


def play(coordinator: SynchronousCoordinator, times: float, peak: float = 0.0) -> None:
    """One round in which steps take `times` as long as the plan says; `peak` is its measured memory in bytes."""
    state = coordinator.state
    coordinator.handle(on.Scored(state.round, "r"), 0.0)
    offer = {"weights": {"sha256": digest(state.round)}, "widths": [2], "recipe": coordinator.job.recipe.to_offer()}
    coordinator.handle(on.Extracted(state.round, "a", 1, offer), 0.0)
    plan = state.devices["a"].plan
    assert plan is not None
    metrics = {"step_seconds": times * plan["prediction"]["step_s"]} | ({"peak_memory_bytes": peak} if peak else {})
    update = on.UpdateAnnounced("a", state.round, 1, digest(state.round), {"sha256": "u"}, 10, 1, metrics)
    coordinator.handle(update, 0.0)
    coordinator.handle(on.UpdateStored("a", state.round, 1, "u"), 0.0)
    coordinator.handle(on.Folded("a", state.round, 1), 0.0)


def test_a_rounds_own_times_correct_a_plan_that_was_far_off() -> None:
    coordinator = planned_fleet()
    before = coordinator.state.devices["a"].plan
    play(coordinator, 3.0)
    device = coordinator.state.devices["a"]
    assert before is not None
    assert device.plan is not None
    assert device.correction == vars(Correction(step=pytest.approx(3.0)))
    assert device.plan["prediction"]["step_s"] == pytest.approx(3 * before["prediction"]["step_s"])
    assert State.from_json(coordinator.state.to_json()).devices["a"] == device


WIDE_AXIS = Axis((Segment(0, 0, 64),))
LARGE = replace(
    ARCHITECTURE,
    groups=(ChannelGroup("g0", 64),),
    tensors=(
        TensorSpec("w", TensorKind.WEIGHT, (WIDE_AXIS, Axis.fixed(4))),
        TensorSpec("head", TensorKind.WEIGHT, (Axis.fixed(3), WIDE_AXIS)),
    ),
    activations=(Activation("h", WIDE_AXIS, 2**13, True),),
)
"""A net whose activations take most of its memory."""


def taught(
    times: float, extra_share: float, room: float, rounds: int = 12, accumulate: int = 1
) -> tuple[list[JobDevice], list[float]]:
    """A board's plans and peaks when the memory that depends on the width is `times` what is predicted.

    Args:
        times: Real over predicted memory of graph, weights and activations.
        extra_share: Real less predicted memory of the process, as a share of the whole model's `of_width`.
        room: Bytes that training may take, as a share of what the whole model is predicted to take.
        rounds: How many.
        accumulate: Parts of a batch that the job asks for.
    """
    job = replace(JOB, density=0.0, recipe=replace(JOB.recipe, accumulate=accumulate))
    full_memory = predict_costs(LARGE, LARGE.sizes, PI, job.recipe, 10).memory
    memory = replace(PI.memory, total_bytes=round(room * full_memory.total), reserve_bytes=0, training_share=1.0)
    planner = WidthPlanner(job, compose(job), LARGE)
    device = JobDevice(1, True, replace(PI, memory=memory).to_dict(), None, 10)
    planner.plan("a", device)
    devices, shares = [], []
    for _ in range(rounds):
        plan = WidthPlan.from_dict(device.plan)
        use = plan.prediction.memory
        peak = use.process + use.samples + extra_share * full_memory.of_width + times * use.of_width
        devices.append(replace(device))
        shares.append(peak / plan.limit_of(MEMORY).limit)
        task = DeviceTask(1, device.widths, accumulate=device.accumulate, metrics={"peak_memory_bytes": peak})
        planner.learn("a", device, task)
    return devices, shares


@pytest.mark.parametrize(("times", "extra_share"), [(2.0, 0.0), (1.3, 0.1), (0.8, 0.55)])
@pytest.mark.parametrize("accumulate", [1, JOB.recipe.batch_size])
def test_plans_settle_within_the_memory_whatever_the_prediction_misses(
    times: float, extra_share: float, accumulate: int
) -> None:
    devices, shares = taught(times, extra_share, 1.02, accumulate=accumulate)
    assert shares[0] > 1
    assert sum(share > 1 for share in shares) <= 3, shares
    assert all(share <= 1 for share in shares[-4:]), shares
    assert len({(d.widths, d.accumulate) for d in devices[-3:]}) == 1
    overrun: list[tuple[tuple[int, ...], int]] = []
    for device, share in zip(devices, shares, strict=True):
        assert (device.widths, device.accumulate) not in overrun
        overrun += [(device.widths, device.accumulate)] * (share > 1)


def test_a_board_whose_rounds_contradict_its_own_measurements_is_planned_by_the_servers_clock() -> None:
    probe = ProbeReport(4, 8 * 10**9, 7 * 10**9, 1.0, latency=typical_table(1e4))
    deadline_s = 1.2 * predict_costs(WIDE, widths_at(WIDE, 0.5), PI, JOB.recipe, 10, probe=probe).round_s
    planner = WidthPlanner(job := replace(JOB, density=0.0, deadline_s=deadline_s), compose(job), WIDE)
    device = JobDevice(1, True, PI.to_dict(), probe.to_dict(), 10)
    planner.plan("a", device)
    widths, plan = device.widths, WidthPlan.from_dict(device.plan)
    assert "its profile promises" in plan.doubt
    # An earlier attempt's work; as slow as it says; unknown.
    for attempt, seconds in ((2, 1e-3), (1, deadline_s), (1, None)):
        planner.learn("a", device, DeviceTask(attempt, widths, steps=plan.prediction.steps, seconds=seconds))
        assert device.widths == widths
    assert Correction(**device.correction).doubt == ""
    planner.learn("a", device, DeviceTask(1, widths, steps=plan.prediction.steps, seconds=1e-3))
    assert device.widths > widths
    assert "rounds show" in Correction(**device.correction).doubt


def test_a_board_that_no_width_fits_trains_the_narrowest_with_a_warning() -> None:
    devices, shares = taught(1.0, 9.0, 1.02)
    assert shares[-1] > 1
    assert devices[-1].widths == widths_at(LARGE, DENSITIES[-1])
    assert devices[-1].plan is not None
    assert "more memory than the board has" in devices[-1].plan["warning"]


def test_what_was_learnt_of_a_guess_is_forgotten_once_the_board_has_measured() -> None:
    coordinator = planned_fleet()
    play(coordinator, 3.0)
    probe = ProbeReport(4, 8 * 10**9, 7 * 10**9, 1.0, latency=typical_table(4e9))
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 10, probe.to_dict()), 0.0)
    assert coordinator.state.devices["a"].correction == {}

    coordinator = planned_fleet()
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 10, probe.to_dict()), 0.0)
    play(coordinator, 3.0)
    second_probe = replace(probe, memory_available=6 * 10**9)
    coordinator.handle(on.DeviceBorn("a", 3, PI.to_dict(), 10, second_probe.to_dict()), 0.0)
    assert coordinator.state.devices["a"].correction["step"] == pytest.approx(3.0)


def test_a_board_is_made_a_submodel_for_the_unit_that_it_measured() -> None:
    coordinator = SynchronousCoordinator(Job(devices=3, rounds=2), ARCHITECTURE, State(model="m0"))
    for name, unit in (("gpu", "cuda"), ("processor", "cpu"), ("unmeasured", None)):
        probe = None if unit is None else ProbeReport(4, 8 * 10**9, 7 * 10**9, 1.0, unit=unit).to_dict()
        coordinator.handle(on.DeviceBorn(name, 1, PI.to_dict(), 10, probe), 0.0)
    units = {c.part.device: c.unit for c in coordinator.handle(on.Scored(1, "r"), 0.0) if isinstance(c, do.Extract)}
    assert units == {"gpu": "cuda", "processor": "cpu", "unmeasured": ""}
