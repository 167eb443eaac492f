"""Aggregators that are means: FedAvg's bits, moves from earlier models, changed rows and elements, personal tensors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.aggregation.fold import Fold, Rule
from fedprune.core.errors import ConfigError
from fedprune.jobs.schedule import Schedule, Staleness
from fedprune.jobs.update_weights import Arrival, step_size, update_weights
from fedprune.model.architecture import Architecture, TensorKind
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.model.trainable import head_axes
from fedprune.strategies.aggregators import DeltaMean, Mean
from support.fakes.strategy_reports import close, report, scene
from support.nets.drawn_models import architectures, model, perturb_submodel, seeds, selections
from support.nets.written_nets import written_net

pytestmark = pytest.mark.board

NET = written_net(
    {"c": 4},
    {"body.weight": ("c", 3), "body.bias": ("c",), "head.weight": (5, "c"), "head.bias": (5,)},
    (3,),
    (5,),
    kinds=dict.fromkeys(("body.bias", "head.bias"), TensorKind.BIAS),
)

ALWAYS_FEDAVG = [Mean(rule="fill"), Mean(rule="zero"), Mean(damped=True), DeltaMean()]


@pytest.mark.parametrize("aggregator", ALWAYS_FEDAVG, ids=str)
@given(data=st.data(), seed=seeds)
def test_whole_updates_give_the_bits_of_fedavg(aggregator: Mean, data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    base = model(architecture, seed)
    current_scene, full_selection = scene(architecture, base), Selection.full(architecture)
    fold, reports = Fold(architecture, base), []
    for k in range(3):
        trained_tensors = perturb_submodel(full_selection, base, seed + k)
        fold.add(full_selection, trained_tensors, 10 + k)
        reports.append(report(current_scene, full_selection, trained_tensors, 10 + k))
    first, second = close(aggregator, current_scene, reports).model, fold.close()[0]
    assert list(first) == list(second)
    assert all(first[n].tobytes() == second[n].tobytes() for n in first)


@given(st.data(), seeds)
def test_moves_are_taken_from_what_was_sent(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    now, earlier = model(architecture, seed), model(architecture, seed + 1)
    current_scene, earlier_scene = scene(architecture, now, round=3), scene(architecture, earlier, round=2)
    selection = data.draw(selections(architecture))
    trained_tensors = perturb_submodel(selection, earlier, seed + 2)
    got = close(DeltaMean(), current_scene, [report(earlier_scene, selection, trained_tensors, 3)]).model
    sent = selection.gather(earlier)
    expected = selection.scatter(
        {n: selection.gather(now)[n] + (trained_tensors[n] - sent[n]) for n in trained_tensors}, now
    )
    for spec in architecture.trainable:
        assert np.allclose(got[spec.name], expected[spec.name], rtol=1e-5, atol=1e-6)
    averaged = close(Mean(), current_scene, [report(earlier_scene, selection, trained_tensors, 3)]).model
    values = selection.scatter(trained_tensors, now)
    assert all(np.allclose(averaged[n], values[n], rtol=1e-5, atol=1e-6) for n in values)


def test_a_reconstruction_in_other_coordinates_moves_away_from_the_model_that_was_cut() -> None:
    now, earlier = model(NET, 0), model(NET, 1)
    current_scene, earlier_scene = scene(NET, now), scene(NET, earlier)
    narrow, full_selection = Selection.of(NET, (2,)), Selection.full(NET)
    narrow_report = report(earlier_scene, narrow, perturb_submodel(narrow, earlier, 2))
    aggregator = DeltaMean()
    fold = aggregator.fold(current_scene, evidence=False)
    lifted = type(narrow_report.trained)(full_selection, perturb_submodel(full_selection, earlier, 3))
    aggregator.add(fold, narrow_report, lifted)
    for name, value in fold.close()[0].items():
        assert np.allclose(value, now[name] + (lifted.tensors[name] - earlier[name]), atol=1e-6)


def test_the_last_layer_is_the_one_that_makes_the_outputs() -> None:
    assert head_axes(NET) == {"head.weight": 0, "head.bias": 0}
    body = Architecture("body", NET.groups, NET.tensors[:2], NET.layers[:1], (), (3,), (5,))
    with pytest.raises(ConfigError, match="no last layer"):
        head_axes(body)


def rows_of(trained_rows: list[int], base: Tensors, seed: int, *, decay: float = 1.0) -> Tensors:
    """An update that trained everything in the body, and only some rows of the head."""
    out = perturb_submodel(Selection.full(NET), base, seed)
    for name in ("head.weight", "head.bias"):
        still = [r for r in range(5) if r not in trained_rows]
        out[name][still] = base[name][still] * np.float32(decay)
    return out


@pytest.mark.parametrize("decay", [1.0, 0.93])
def test_label_rows_count_only_where_they_were_trained(decay: float) -> None:
    base = model(NET, 0)
    current_scene = scene(NET, base, recipe=Recipe(weight_decay=0.0 if decay == 1 else 5e-4))
    full_selection = Selection.full(NET)
    one, two = rows_of([0, 1], base, 1, decay=decay), rows_of([1, 2], base, 2, decay=decay)
    reports = [report(current_scene, full_selection, one, 1), report(current_scene, full_selection, two, 3)]
    got = close(Mean(only_changed="rows"), current_scene, reports).model
    for name in ("head.weight", "head.bias"):
        assert np.allclose(got[name][0], one[name][0], atol=1e-6)
        assert np.allclose(got[name][1], (one[name][1] + 3 * two[name][1]) / 4, atol=1e-6)
        assert np.allclose(got[name][2], two[name][2], atol=1e-6)
        assert got[name][3:].tobytes() == base[name][3:].tobytes()
    assert np.allclose(got["body.weight"], (one["body.weight"] + 3 * two["body.weight"]) / 4, atol=1e-6)


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="'tail"):
        Mean(excluded=("tail.*",)).fold(scene(NET, model(NET, 0)), evidence=False)


@pytest.mark.parametrize("rule", ["fill", "coverage"])
@pytest.mark.parametrize("damped", [False, True])
def test_staleness_scales_what_enters_the_velocity_alone(rule: Rule, damped: bool) -> None:
    """v ← β·v + g·(η/K)·Σ s(k_i)·Δ_i, w ← w + v (FedBuff): what was fresh when it came continues as it was."""
    beta, eta, gain = 0.9, 0.7, 0.1 if damped else 1.0
    aggregator = DeltaMean(rule=rule, server_momentum=beta, damped=damped, weighting="uniform")
    schedule = Schedule("asynchronous", arrivals=2, mixing="damped", rate=eta, staleness=Staleness("polynomial", a=0.5))
    full_selection, memory, past = Selection.full(NET), {}, [model(NET, 0)]
    expected = {n: v.astype(np.float64) for n, v in past[0].items()}
    velocity = {n: np.zeros(v.shape) for n, v in expected.items()}
    for t, stale in enumerate([(0, 0), (1, 0), (0, 2), (3, 3)], 1):
        arrivals = [Arrival(k, 1) for k in stale]
        reports = []
        for i, (k, weight) in enumerate(zip(stale, update_weights(schedule, arrivals, 2, uniform=True), strict=True)):
            earlier_scene = scene(NET, past[t - 1 - k], round=t - k)
            trained_tensors = perturb_submodel(full_selection, earlier_scene.model, 10 * t + i)
            reports.append(report(earlier_scene, full_selection, trained_tensors, weight, device=f"d{i}"))
            for n in velocity:
                velocity[n] *= beta if i == 0 else 1
                velocity[n] += (
                    gain * eta / 2 * (k + 1) ** -0.5 * (trained_tensors[n] - earlier_scene.model[n].astype(np.float64))
                )
        current_scene = scene(NET, past[-1], memory, round=t)
        closing = close(aggregator, current_scene, reports, rate=step_size(schedule, arrivals, [], uniform=True))
        for n in expected:
            expected[n] += velocity[n]
            assert np.allclose(closing.model[n], expected[n], rtol=0, atol=1e-5), (t, n)
        past.append(closing.model)
        memory = {**memory, **closing.memories}
