"""Scores, ranks and the evidence behind them."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.aggregation.fold import Fold
from fedprune.core import tensorfile
from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture, Axis, LayerRow, Segment, TensorKind, TensorSpec
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.importance.gradient_stats import Evidence
from fedprune.strategies.importance.scoring import curvature_scores, magnitude_scores, rank_channels
from support.nets.drawn_models import architectures, model, perturb_submodel, seeds
from support.nets.written_nets import written_net

pytestmark = pytest.mark.board

LR, MOMENTUM = 0.1, 0.5
RATE = LR / (1 - MOMENTUM)
NET = written_net(
    {"c": 3},
    {"conv": ("c", 2, 1, 1), "bias": ("c",), "gamma": ("c",), "mean": ("c",), "head": (2, ("c", 2))},
    (2, 2, 2),
    (2,),
    kinds={"bias": TensorKind.BIAS, "gamma": TensorKind.NORM_SCALE, "mean": TensorKind.STAT_MEAN},
    positions=4,
)


def by_channel(architecture: Architecture, coordinate_scores: dict[str, Any]) -> list[Any]:
    """Sums over the coordinates that make each channel, by a loop over single coordinates."""
    out = [np.zeros(n) for n in architecture.sizes]
    for name, values in coordinate_scores.items():
        spec = architecture.by_name[name]
        for axis in architecture.output_axes(name):
            owner = [
                (s.group, s.start + c) for s in spec.axes[axis].segments for c in range(s.count) for _ in range(s.inner)
            ]
            for at in itertools.product(*(range(n) for n in spec.shape)):
                group, channel = owner[at[axis]]
                if group >= 0:
                    out[group][channel] += values[at]
    return out


def one_round(base: Tensors, selection: Selection, seed: int = 1, **options: Any) -> Fold:
    fold = Fold(selection.architecture, base, evidence=True, momentum=MOMENTUM, **options)
    fold.add(selection, perturb_submodel(selection, base, seed), 10, 4)
    return fold


@given(st.data(), seeds)
def test_magnitude_sums_the_weights_that_make_a_channel(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    full = model(architecture, seed)
    weights = {t.name: full[t.name].astype(np.float64) for t in architecture.tensors if t.kind is TensorKind.WEIGHT}
    l1 = by_channel(architecture, {n: np.abs(w) for n, w in weights.items()})
    for got, expected in zip(magnitude_scores(architecture, full), l1, strict=True):
        assert np.allclose(got, expected)


@pytest.mark.parametrize("form", ["abs", "signed"])
@given(data=st.data(), seed=seeds)
def test_curvature_sums_its_formula_over_the_coordinates_that_make_a_channel(
    form: Any, data: st.DataObject, seed: int
) -> None:
    architecture = data.draw(architectures())
    full, g, h = (model(architecture, seed + i) for i in range(3))
    formula = {"abs": lambda w, g, h: np.abs(g * w) + 0.5 * h * w * w, "signed": lambda w, g, h: g * w + h * w * w}[
        form
    ]
    coordinate_scores = {
        t.name: formula(*(x[t.name].astype(np.float64) for x in (full, g)), np.abs(h[t.name].astype(np.float64)))
        for t in architecture.trainable
    }
    evidence = Evidence.empty(architecture)
    for spec in architecture.trainable:
        evidence.gradient[spec.name], evidence.curvature[spec.name] = g[spec.name], np.abs(h[spec.name])
    got = curvature_scores(architecture, full, evidence, form)
    for a, b in zip(got, by_channel(architecture, coordinate_scores), strict=True):
        assert np.allclose(a, b)


def test_a_transposed_weight_is_scored_over_its_output_axis() -> None:
    turned = replace(
        NET,
        tensors=(TensorSpec("w", TensorKind.WEIGHT, (Axis.fixed(2), Axis((Segment(0, 0, 3),)))),),
        layers=(LayerRow("w", "MatMul", "w", 1, output_axis=1),),
    )
    assert magnitude_scores(turned, {"w": np.array([[1, 2, 3], [4, 5, -6]], np.float32)})[0].tolist() == [5, 7, 9]


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=20))
def test_ranks_go_down_and_ties_go_by_channel(values: list[int]) -> None:
    (order,) = rank_channels([np.array(values, np.float64)])
    assert order.tolist() == sorted(range(len(values)), key=lambda c: (-values[c], c))


@pytest.mark.parametrize("tensors", [{}, {**model(NET, 0), "conv": np.zeros((3, 2), np.float32)}])
def test_a_model_that_does_not_fit_is_refused(tensors: Tensors) -> None:
    with pytest.raises(BundleError, match="tensor conv"):
        magnitude_scores(NET, tensors)


@given(st.data(), seeds)
def test_the_first_round_gives_the_mean_gradient(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    base, full_selection = model(architecture, seed), Selection.full(architecture)
    updates = [(perturb_submodel(full_selection, base, seed + k), 10 * k, k + 2) for k in (1, 2)]
    fold, evidence = Fold(architecture, base, evidence=True, momentum=MOMENTUM), Evidence.empty(architecture)
    for tensors, weight, steps in updates:
        fold.add(full_selection, tensors, weight, steps)
    evidence.update(fold, LR, samples_per_step=8)
    for spec in architecture.trainable:
        free = [sum(1 - MOMENTUM**j for j in range(1, s + 1)) for _, _, s in updates]
        moves = [
            (p[spec.name].astype(np.float64) - base[spec.name]) / f for (p, _, _), f in zip(updates, free, strict=True)
        ]
        slopes = [-np.clip(m, -0.25, 0.25) / RATE for m in moves]
        spreads = [np.clip(m * np.sqrt(s), -0.25, 0.25) / RATE for m, (_, _, s) in zip(moves, updates, strict=True)]
        mean = sum(n * g for g, (_, n, _) in zip(slopes, updates, strict=True)) / 30
        square = sum(n * 8 * g * g for g, (_, n, _) in zip(spreads, updates, strict=True)) / 30
        assert np.allclose(evidence.gradient[spec.name], mean, rtol=1e-5, atol=1e-8)
        assert np.allclose(evidence.curvature[spec.name], square, rtol=1e-5, atol=1e-8)


def test_warm_up_ends_when_every_channel_was_trained() -> None:
    evidence, base = Evidence.empty(NET), model(NET, 0)
    assert not evidence.is_complete
    evidence.update(one_round(base, Selection.of(NET, (2,), [[2, 0, 1]])), LR)
    assert evidence.trained_channels()[0].tolist() == [True, False, True]
    evidence.update(one_round(base, Selection.of(NET, (1,), [[1, 0, 2]])), LR)
    assert evidence.is_complete


@given(st.data(), seeds)
def test_evidence_survives_storage(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    evidence = Evidence.empty(architecture)
    for k in range(2):
        evidence.update(one_round(model(architecture, seed + k), Selection.full(architecture), seed), LR)
    restored = Evidence.from_tensors(architecture, tensorfile.decode(tensorfile.encode(evidence.to_tensors())))
    restored.update(one_round(model(architecture, seed + 2), Selection.full(architecture), seed), LR)
    evidence.update(one_round(model(architecture, seed + 2), Selection.full(architecture), seed), LR)
    assert tensorfile.encode(restored.to_tensors()) == tensorfile.encode(evidence.to_tensors())


@pytest.mark.parametrize(
    "change",
    [
        {"conv::gradient": np.zeros(3, np.float32)},
        {"conv::gradient": np.full((3, 2, 1, 1), np.nan, np.float32)},
        {"other::gradient": np.zeros(3, np.float32)},
    ],
)
def test_stored_evidence_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        Evidence.from_tensors(NET, {**Evidence.empty(NET).to_tensors(), **change})
