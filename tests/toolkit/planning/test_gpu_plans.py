"""Plans of boards whose GPU trains: by its figures or measurements; by the processor's where the GPU doesn't work."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import PlanError
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune.planning.cost_prediction import latency_table, memory_bandwidth, predict_costs
from fedprune.planning.costs import memory_seconds
from fedprune.planning.latency_model import GPU_LAUNCH, typical_gpu_table
from fedprune.planning.plan_search import PlanSearch
from fedprune.planning.probe_report import ProbeReport
from fedprune.planning.profile import TIERS, HardwareProfile
from support.nets.written_nets import written_net

pytestmark = pytest.mark.board

NANO = profile_store.find_profile("jetson-orin-nano")
ORINS = [profile_store.find_profile(f"jetson-{name}") for name in ("orin-nano", "thor")]
RECIPE = Recipe(epochs=1, batch_size=16)
PROBE = ProbeReport(cores=6, memory_total=7_600_000_000, memory_available=6_000_000_000, seconds=1.0)


def net(channels: int, map_size: int) -> Architecture:
    """Two convolutions of 3×3 on maps of that many places, and a linear layer."""
    return written_net(
        {"first": channels, "second": channels},
        {"a": ("first", 3, 3, 3), "b": ("second", "first", 3, 3), "head": (10, "second")},
        (3, math.isqrt(map_size), math.isqrt(map_size)),
        (10,),
        positions=map_size,
        activations={"a": ("first", map_size), "b": ("second", map_size)},
    )


LARGE, TINY = net(256, 3136), net(4, 16)


def on_processor(profile: HardwareProfile) -> HardwareProfile:
    return replace(profile, software=replace(profile.software, tier=TIERS[0]))


def step_seconds(architecture: Architecture, profile: HardwareProfile, probe: ProbeReport | None = None) -> float:
    return predict_costs(architecture, architecture.sizes, profile, RECIPE, 160, probe=probe).step_s


@given(st.integers(1, 256), st.sampled_from([16, 196, 3136]), st.sampled_from(ORINS))
@settings(max_examples=30, deadline=None)
def test_no_step_is_predicted_below_the_gpus_roofline(channels: int, map_size: int, profile: HardwareProfile) -> None:
    architecture, unit = net(channels, map_size), profile.training_gpu
    prediction = predict_costs(architecture, architecture.sizes, profile, RECIPE, 160)
    assert prediction.step_s >= 2 * prediction.training_macs * RECIPE.batch_size / unit.peak_flops
    assert prediction.step_s >= memory_seconds(
        architecture, architecture.sizes, RECIPE.batch_size, unit.bandwidth_bytes_s
    )
    assert prediction.step_s >= GPU_LAUNCH * len(architecture.layers)


@pytest.mark.parametrize("probe", [None, replace(PROBE, unit="cuda", latency=typical_gpu_table(), train_rate=1e12)])
def test_an_energy_too_small_for_the_gpu_names_the_processor_if_that_fits(probe: ProbeReport | None) -> None:
    full_prediction = predict_costs(TINY, TINY.sizes, on_processor(NANO), RECIPE, 160)
    with pytest.raises(PlanError, match="energy") as refused:
        PlanSearch(TINY, NANO, RECIPE, 160, probe=probe, energy_budget=2 * full_prediction.train_j).search()
    assert f'software.tier = "{TIERS[0]}"' in str(refused.value)
    with pytest.raises(PlanError) as refused:
        PlanSearch(TINY, NANO, RECIPE, 160, probe=probe, energy_budget=1e-9).search()
    assert "processor" not in str(refused.value)


@pytest.mark.parametrize("measured", [{}, {"train_rate": 2e10}, {"clock_hz": 10**9}])
def test_a_board_whose_gpu_fell_back_is_planned_for_by_its_processor(measured: dict[str, float]) -> None:
    probe = replace(PROBE, **measured)
    assert step_seconds(LARGE, NANO, probe) == step_seconds(LARGE, on_processor(NANO), probe)


def test_what_the_gpu_measured_replaces_the_profiles_figures() -> None:
    table = typical_gpu_table(5e11, 2e10)
    probe = replace(PROBE, unit="cuda", latency=table)
    assert latency_table(NANO, probe) is table
    assert math.isinf(memory_bandwidth(NANO, probe))
    assert PlanSearch(LARGE, NANO, RECIPE, 160, probe=probe).search().notes == ("trains on: GPU",)


def test_a_measured_gpu_that_the_profile_does_not_know_is_typical() -> None:
    pi = profile_store.find_profile("raspberry-pi-5")
    assert latency_table(pi, replace(PROBE, unit="cuda", train_rate=5e12)) == typical_gpu_table()


@pytest.mark.parametrize(
    ("unit", "trains"),
    [({}, True), ({"kind": "other"}, False), ({"peak_flops": None}, False), ({"bandwidth_bytes_s": None}, True)],
)
def test_a_gpu_trains_if_it_speaks_cuda_and_its_rate_is_known(unit: dict[str, object], trains: bool) -> None:
    profile = replace(NANO, accelerator=replace(NANO.accelerator, **unit))
    assert (profile.training_gpu is not None) is trains
    assert on_processor(profile).training_gpu is None
    assert memory_bandwidth(profile, None) == (
        68e9 if trains and "bandwidth_bytes_s" not in unit else NANO.memory.bandwidth_bytes_s
    )
