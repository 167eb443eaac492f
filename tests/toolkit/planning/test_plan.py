"""Plans: the widest that fits, the limit that binds, and never a narrower one for a looser limit."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedprune.core.errors import PlanError
from fedprune.model.architecture import Architecture, TensorKind, TensorSpec, widths_at
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune.planning.correction import Correction
from fedprune.planning.cost_prediction import (
    latency_table,
    memory_bandwidth,
    predict_costs,
    train_rate,
    training_memory,
)
from fedprune.planning.costs import costs_at, file_bytes
from fedprune.planning.plan_search import DENSITIES, PlanSearch
from fedprune.planning.probe_report import ProbeReport
from fedprune.planning.profile import HardwareProfile
from fedprune.planning.width_candidates import width_candidates
from fedprune.planning.width_plan import NOTHING_BINDS, TIME_MARGIN, WidthPlan
from support.nets.written_nets import written_net

pytestmark = pytest.mark.board

NET = written_net(
    {"hidden": 64, "maps": 32},
    {"conv": ("maps", 3, 3, 3), "fc": ("hidden", ("maps", 256)), "head": (10, "hidden")},
    (3, 16, 16),
    (10,),
    positions=256,
    activations={"conv": ("maps", 256), "fc": ("hidden", 1)},
)
RECIPE = Recipe(epochs=2, batch_size=16)
BOARD = profile_store.find_profile("raspberry-pi-4b")
PROBE = ProbeReport(cores=4, memory_total=4 * 10**9, memory_available=3 * 10**9, seconds=1.0)
FULL = predict_costs(NET, NET.sizes, BOARD, RECIPE, 500)


BRIEF = settings(max_examples=30, deadline=None)


def board(**changes: Mapping[str, float]) -> HardwareProfile:
    sections: dict[str, Any] = {name: replace(getattr(BOARD, name), **change) for name, change in changes.items()}
    return replace(BOARD, **sections)


def memory_of(training: float) -> HardwareProfile:
    return board(memory={"total_bytes": int(training) + 10**9, "reserve_bytes": 10**9, "training_share": 1.0})


def test_a_plan_keeps_the_least_number_of_channels_that_is_asked_for() -> None:
    narrow = PlanSearch(NET, BOARD, RECIPE, 500, densities=(0.1,)).search().widths
    min_channels = max(narrow) + 1
    assert PlanSearch(NET, BOARD, RECIPE, 500, densities=(0.1,), least_channels=min_channels).search().widths == (
        min_channels,
    ) * len(narrow)
    assert PlanSearch(NET, BOARD, RECIPE, 500, densities=(0.1,), least_channels=10**6).search().widths == NET.sizes


@pytest.mark.parametrize(
    ("bound", "limits"),
    [
        ("memory", {"profile": memory_of(FULL.memory_bytes * 0.9)}),
        ("time", {"deadline_s": FULL.round_s * 0.5}),
        ("bytes", {"byte_budget": FULL.round_bytes // 2}),
        ("energy", {"energy_budget": FULL.train_j / 2}),
        ("link", {"profile": board(link={"bytes_per_round": FULL.round_bytes // 2})}),
        ("storage", {"profile": board(storage={"budget_bytes": 4 * FULL.wire_bytes})}),
    ],
)
def test_each_limit_binds(bound: str, limits: dict[str, Any]) -> None:
    plan = PlanSearch(NET, **{"profile": BOARD, "recipe": RECIPE, "samples": 500, **limits}).search()
    assert plan.bound == bound
    assert plan.widths < NET.sizes


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    share = st.floats(0.02, 1.5)
    return {
        "profile": board(
            memory={
                "total_bytes": 10**9 + int(FULL.memory_bytes * draw(st.floats(0.6, 1.2))),
                "reserve_bytes": 10**9,
                "training_share": 1.0,
                "bandwidth_bytes_s": draw(st.sampled_from([1, 0.1, 0.03])) * BOARD.memory.bandwidth_bytes_s,
            },
            link={"bytes_per_round": int(FULL.round_bytes * draw(share))},
        ),
        "recipe": RECIPE,
        "samples": 500,
        "byte_budget": draw(st.none() | share.map(lambda s: int(FULL.round_bytes * s))),
        "energy_budget": draw(st.none() | share.map(lambda s: FULL.train_j * s)),
        "deadline_s": draw(st.none() | share.map(lambda s: FULL.round_s * s)),
    }


def made_or_none(situation: dict[str, Any]) -> WidthPlan | None:
    try:
        return PlanSearch(NET, **situation).search()
    except PlanError:
        return None


def in_parts(widths: tuple[int, ...], profile: HardwareProfile) -> Recipe:
    """The recipe with the fewest parts of a batch that fit, else with those that need least memory."""
    tried = [replace(RECIPE, accumulate=n) for n in (1, 2, 4, 8, 16)]
    needs = [predict_costs(NET, widths, profile, recipe, 500).memory_bytes for recipe in tried]
    fitting = [r for r, need in zip(tried, needs, strict=True) if need <= profile.training_memory_bytes]
    return fitting[0] if fitting else tried[needs.index(min(needs))]


@given(situations())
@BRIEF
def test_a_plan_fits_and_the_next_wider_breaks_what_bounds_it(situation: dict[str, Any]) -> None:
    plan = made_or_none(situation)
    assume(plan is not None)
    assert plan is not None
    assert all(limit.fits for limit in plan.limits)
    table, memory = latency_table(situation["profile"], None), memory_bandwidth(situation["profile"], None)
    wider = [
        r.widths for r in width_candidates(NET, table, RECIPE.batch_size, DENSITIES, memory) if r.widths > plan.widths
    ]
    if not wider:
        assert plan.bound == NOTHING_BINDS
        return
    need = predict_costs(NET, wider[-1], situation["profile"], in_parts(wider[-1], situation["profile"]), 500)
    needs = {
        "memory": need.memory_bytes,
        "time": TIME_MARGIN * need.round_s,
        "link": 2 * need.wire_bytes,
        "bytes": 2 * need.wire_bytes,
        "energy": need.train_j,
        "storage": need.storage_bytes,
    }
    limits = {m.name: m.limit for m in plan.limits}
    overshoot = {name: needs[name] / limits[name] for name in limits}
    assert overshoot[plan.bound] > 1
    assert overshoot[plan.bound] == pytest.approx(max(overshoot.values()))


@given(situations(), st.sampled_from(["memory", "link", "byte_budget", "deadline_s", "energy_budget"]), st.floats(1, 3))
@BRIEF
def test_a_looser_limit_never_gives_a_narrower_plan(situation: dict[str, Any], which: str, factor: float) -> None:
    plan = made_or_none(situation)
    assume(plan is not None)
    looser = dict(situation)
    profile = situation["profile"]
    if which == "memory":
        memory = replace(profile.memory, total_bytes=int(profile.memory.total_bytes * factor) + 1)
        looser["profile"] = replace(profile, memory=memory)
    elif which == "link":
        link = replace(profile.link, bytes_per_round=int(profile.link.bytes_per_round * factor) + 1)
        looser["profile"] = replace(profile, link=link)
    elif situation[which] is not None:
        looser[which] = situation[which] * factor
    after = PlanSearch(NET, **looser).search()
    assert plan is not None
    assert all(a >= b for a, b in zip(after.widths, plan.widths, strict=True))


@given(situations())
@BRIEF
def test_a_plan_survives_json(situation: dict[str, Any]) -> None:
    plan = made_or_none(situation)
    assume(plan is not None)
    assert plan is not None
    assert WidthPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


WIDE = replace(NET, activations=(replace(NET.activations[0], positions=2**14), NET.activations[1]))
"""A net whose activations take most of its memory."""
NORMALISED = replace(
    WIDE, tensors=(*WIDE.tensors, TensorSpec("norm.mean", TensorKind.STAT_MEAN, NET.tensors[0].axes[:1]))
)
"""The same net with a batch norm."""


def need(net: Architecture, accumulate: int, **changes: Any) -> int:
    return predict_costs(net, net.sizes, BOARD, replace(RECIPE, accumulate=accumulate, **changes), 500).memory_bytes


def test_a_batch_is_divided_before_the_model_is() -> None:
    plan = PlanSearch(WIDE, memory_of(need(WIDE, 4)), RECIPE, 500).search()
    assert (plan.widths, plan.accumulate, plan.bound) == (WIDE.sizes, 4, NOTHING_BINDS)
    assert plan.prediction.memory_bytes == need(WIDE, 4)


def test_parts_that_the_recipe_asks_for_are_the_least() -> None:
    plan = PlanSearch(WIDE, memory_of(need(WIDE, 1)), replace(RECIPE, accumulate=3), 500).search()
    assert (plan.accumulate, plan.notes) == (3, ())
    assert PlanSearch(WIDE, memory_of(need(WIDE, 5)), replace(RECIPE, accumulate=3), 500).search().accumulate == 6


@given(
    st.sampled_from([WIDE, NORMALISED]),
    st.integers(1, 64),
    st.floats(0.7, 1.1),
    st.floats(1, 1.5),
    st.none() | st.floats(0.1, 2),
)
@BRIEF
def test_more_memory_never_gives_a_narrower_model_nor_more_parts(
    net: Architecture, batch: int, share: float, factor: float, time: float | None
) -> None:
    recipe = replace(RECIPE, batch_size=batch)
    full_prediction = predict_costs(net, net.sizes, BOARD, recipe, 500)
    room, deadline = full_prediction.memory_bytes * share, None if time is None else full_prediction.round_s * time
    try:
        tight = PlanSearch(net, memory_of(room), recipe, 500, deadline_s=deadline).search()
    except PlanError:
        return
    loose = PlanSearch(net, memory_of(room * factor), recipe, 500, deadline_s=deadline).search()
    assert all(a >= b for a, b in zip(loose.widths, tight.widths, strict=True))
    assert loose.widths != tight.widths or loose.accumulate <= tight.accumulate


def test_batch_norm_with_frozen_statistics_does_not_mind_small_parts() -> None:
    still = replace(RECIPE, frozen=("norm.*",))
    assert PlanSearch(NORMALISED, memory_of(need(NORMALISED, 16)), still, 500).search().accumulate == 16


def test_batch_norm_counts_the_parts_of_a_board_with_few_samples() -> None:
    """Twenty samples in parts of at most eight would be parts of seven and six."""
    recipe = replace(RECIPE, batch_size=32)
    room = predict_costs(NORMALISED, NORMALISED.sizes, BOARD, replace(recipe, accumulate=4), 20).memory_bytes
    plan = PlanSearch(NORMALISED, memory_of(room), recipe, 20).search()
    assert plan.accumulate == 2
    assert plan.widths < NORMALISED.sizes


NET_WEIGHTS = round(0.92 * FULL.memory.weights)
"""What would have to go if hardly a weight had room."""


def board_of(**memory: float) -> HardwareProfile:
    return board(memory={"reserve_bytes": 10**9, **memory})


def test_a_model_that_nearly_vanishes_comes_with_a_warning_and_what_keeps_it() -> None:
    room = need(NET, 16) - NET_WEIGHTS
    plan = PlanSearch(NET, board_of(total_bytes=10**9 + 2 * room, training_share=0.5), RECIPE, 500).search()
    assert plan.prediction.parameters < 0.25 * FULL.parameters
    assert f"only {plan.prediction.parameters / FULL.parameters:.1%} of the weights are kept" in plan.warning
    assert "The whole model exceeds the limit of memory: " in plan.warning
    share = float(plan.warning.partition("memory.training_share = ")[2].partition(" ")[0])
    assert (
        PlanSearch(NET, board_of(total_bytes=10**9 + 2 * room, training_share=share), RECIPE, 500).search().widths
        == NET.sizes
    )
    assert WidthPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_own_densities_are_kept_to() -> None:
    plan = PlanSearch(NET, BOARD, RECIPE, 500, densities=(0.25, 0.5), byte_budget=FULL.round_bytes).search()
    assert (plan.density, plan.bound, plan.widths) == (0.5, NOTHING_BINDS, widths_at(NET, 0.5))


def test_what_a_board_measured_beats_the_promise() -> None:
    assert train_rate(BOARD, replace(PROBE, train_rate=5e9)) == 5e9
    half = replace(PROBE, cores=2, clock_hz=BOARD.cpu.clock_hz // 2)  # of the cores and of the clock
    assert train_rate(BOARD, half) == pytest.approx(BOARD.train_rate / 4)
    larger = replace(PROBE, memory_total=8 * 10**9, memory_available=7 * 10**9)
    assert training_memory(BOARD, larger) == pytest.approx(7e9 * BOARD.memory.training_share)
    low_memory_probe = replace(PROBE, memory_available=10**8)
    assert training_memory(BOARD, low_memory_probe) == pytest.approx(1e8 * BOARD.memory.training_share)


def test_a_board_with_less_memory_than_its_reserve_gets_an_error() -> None:
    probe = replace(PROBE, memory_total=10**8, memory_available=10**8)
    with pytest.raises(PlanError, match="memory"):
        PlanSearch(NET, BOARD, RECIPE, 500, probe=probe).search()


def test_samples_fewer_than_a_batch_cost_less_memory() -> None:
    few = predict_costs(NET, NET.sizes, BOARD, RECIPE, 4)
    assert few.memory_bytes < FULL.memory_bytes
    assert few.steps == 2


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"byte_budget": 0}, {"deadline_s": float("nan")}])
def test_a_limit_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(wrong))):
        PlanSearch(NET, **{"profile": BOARD, "recipe": RECIPE, "samples": 500, **wrong}).search()


def test_no_candidates_is_an_error() -> None:
    with pytest.raises(PlanError):
        PlanSearch(NET, BOARD, RECIPE, 500, densities=()).search()


@pytest.mark.parametrize(
    "change",
    [
        {"widths": [0, 3]},
        {"density": 1.5},
        {"bound": "weather"},
        {"prediction": {}},
        {"limits": [{"name": "weather", "value": 1, "limit": 2, "unit": "bytes"}]},
    ],
)
def test_a_damaged_plan_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        WidthPlan.from_dict({**PlanSearch(NET, BOARD, RECIPE, 500).search().to_dict(), **change})


def test_what_rounds_taught_is_in_all_times_and_can_be_taken_out() -> None:
    plain = PlanSearch(NET, BOARD, RECIPE, 500).search()
    taught = PlanSearch(NET, BOARD, RECIPE, 500, correction=Correction(step=2.0, latency=0.5)).search()
    assert taught.prediction.step_s == pytest.approx(2 * plain.prediction.step_s)
    assert taught.prediction.latency_s == pytest.approx(plain.prediction.latency_s / 2)
    assert taught.widths == plain.widths
    for name, value in vars(plain.prediction).items():  # without what rounds taught
        assert getattr(taught.before_rounds, name) == pytest.approx(value) or name == "memory"


def test_a_transfer_goes_each_way_at_its_speed_and_waits_for_two_round_trips() -> None:
    link = {"down_bytes_s": 3e6, "up_bytes_s": 5e5, "latency_s": 0.25}
    prediction = predict_costs(NET, NET.sizes, board(link=link), RECIPE, 500, codecs=("int8", None))
    assert prediction.up_bytes < prediction.down_bytes
    # The first round brings whole weights, and the graphs.
    down_bytes = prediction.first_bytes + costs_at(NET, NET.sizes).graph_bytes
    assert prediction.transfer_s == pytest.approx(down_bytes / 3e6 + prediction.up_bytes / 5e5 + 4 * 0.25)


def test_a_correction_is_learnt_from_what_was_measured() -> None:
    learnt = Correction().corrected_by(FULL, Correction(), {"step_seconds": 1.5 * FULL.step_s})
    assert learnt.step == pytest.approx(1.5)
    assert learnt.latency == 1
    corrected = predict_costs(NET, NET.sizes, BOARD, RECIPE, 500, correction=learnt)
    assert learnt.corrected_by(corrected, learnt, {"step_seconds": 1.5 * FULL.step_s}).step == pytest.approx(1.5)


def test_a_correction_has_bounds() -> None:
    assert Correction().corrected_by(FULL, Correction(), {"step_seconds": 1e6}).step == 5
    assert Correction().corrected_by(FULL, Correction(), {"latency_seconds": 1e-12}).latency == 0.2


@pytest.mark.parametrize(("peak", "learnt"), [(1.2, 0.2), (1e3, 1.0), (0.1, -0.25)])
def test_measured_memory_corrects_predictions_within_bounds(peak: float, learnt: float) -> None:
    full_memory = FULL.memory_bytes
    first = Correction().corrected_by(FULL, Correction(), {"peak_memory_bytes": peak * full_memory})
    assert first.memory == pytest.approx(learnt * full_memory)
    corrected = predict_costs(NET, NET.sizes, BOARD, RECIPE, 500, correction=first)
    assert corrected.memory_bytes == pytest.approx((1 + learnt) * full_memory, abs=1)
    assert first.corrected_by(corrected, first, {"peak_memory_bytes": peak * full_memory}).memory == pytest.approx(
        first.memory, abs=1
    )


def test_a_board_that_measured_more_memory_gets_a_narrower_model() -> None:
    board = memory_of(FULL.memory_bytes * 1.01)
    assert PlanSearch(NET, board, RECIPE, 500).search().widths == NET.sizes
    plan = PlanSearch(NET, board, RECIPE, 500, correction=Correction(memory=0.05 * FULL.memory_bytes)).search()
    assert plan.widths < NET.sizes or plan.accumulate > 1
    assert plan.prediction.memory_bytes <= board.training_memory_bytes


def test_frozen_tensors_take_less_memory_time_and_bytes() -> None:
    frozen = predict_costs(NET, NET.sizes, BOARD, replace(RECIPE, frozen=("conv", "fc")), 500)
    assert frozen.up_bytes == file_bytes({"head": (10, 64)}) < FULL.up_bytes
    assert (frozen.first_bytes, frozen.memory_bytes < FULL.memory_bytes) == (FULL.first_bytes, True)
    # The head alone has a backward pass, of one product; the forward pass is a third of a whole step or more.
    assert FULL.step_s / 3 < frozen.step_s < FULL.step_s / 2
    personal = predict_costs(NET, NET.sizes, BOARD, replace(RECIPE, personal=("@head",)), 500)
    assert personal.up_bytes == file_bytes({"conv": (32, 3, 3, 3), "fc": (64, 8192)})
    top = predict_costs(NET, NET.sizes, BOARD, replace(RECIPE, frozen=("head",)), 500)
    assert frozen.step_s < top.step_s < FULL.step_s


def test_energy_limits_only_boards_whose_power_is_known() -> None:
    for power, missing in (
        (None, "power.idle_w and power.load_w"),
        (replace(BOARD.power, idle_w=None), "power.idle_w"),
    ):
        plan = PlanSearch(NET, replace(BOARD, power=power), RECIPE, 500, energy_budget=1e-3).search()
        assert plan.density == 1
        assert "energy" not in {limit.name for limit in plan.limits}
        assert plan.warning == f"energy isn't limited: {BOARD.name} has no {missing}."
        assert PlanSearch(NET, replace(BOARD, power=power), RECIPE, 500).search().warning == ""
