"""Metrics as graphs, whose sums add up over parts of a set: against numpy, scikit-learn and torch."""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, jaccard_score
from torch import nn
from torch.nn import functional

import fedprune_export as fx
from fedprune.core.errors import ConfigError, ModelError
from fedprune.model.features import METRICS_OF
from fedprune.model.recipe import Recipe
from fedprune_device.training.objective import BatchMeasure, Objective
from fedprune_export.importing import import_onnx, read_source
from fedprune_export.pruning.model import Model
from fedprune_export.training.metrics import BINS
from fedprune_export.training.step_graph import training_graph

pytestmark = pytest.mark.torch

K, VOID = 4, 9
Array = np.ndarray[Any, Any]


class PositionNet(nn.Module):
    """A row of `K` numbers for each of some places."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.input_shape = (3, *shape)
        self.layer = nn.Conv2d(3, K, 1) if shape else nn.Linear(3, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@functools.cache
def model_of(shape: tuple[int, ...]) -> Model:
    return fx.load(PositionNet(*shape))


@functools.lru_cache
def objective(shape: tuple[int, ...], recipe: Recipe) -> Objective:
    return objective_of(model_of(shape), recipe)


def objective_of(model: Model, recipe: Recipe) -> Objective:
    return Objective(training_graph(model, recipe.features).to_bytes(), recipe, K, scores=recipe.features.counts_hits)


def metrics_of(judge: Objective, outputs: Array, labels: Array, batches: int = 1) -> dict[str, float]:
    """What boards and servers make of outputs that come in several parts."""
    y = judge.targets(labels)
    measures = [judge(o, t) for o, t in zip(np.array_split(outputs, batches), np.array_split(y, batches), strict=True)]
    return judge.metrics(BatchMeasure.combine(measures))


seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(3, 40)
shapes = st.sampled_from([(), (2, 3)])


@given(seeds, sizes, shapes, st.integers(1, 3))
def test_mean_iou_is_that_of_scikit_learn(seed: int, n: int, shape: tuple[int, ...], batches: int) -> None:
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(n, K, *shape)).astype(np.float32)
    labels = rng.choice([0, 1, 3, VOID], (n, *shape))  # no place is of class 2, but some are taken for it
    labels.flat[0] = 1
    recipe = Recipe(metric="miou", ignore_label=VOID)
    counted = labels != VOID
    right, guess = labels[counted], outputs.argmax(1)[counted]
    present = np.unique(np.concatenate([right, guess]))
    expected = jaccard_score(right, guess, labels=present, average="macro", zero_division=0)
    assert metrics_of(objective(shape, recipe), outputs, labels, batches)["miou"] == pytest.approx(expected, rel=1e-5)


@given(seeds, sizes, shapes, st.integers(1, 3))
def test_perplexity_is_torchs_mean_likelihood(seed: int, n: int, shape: tuple[int, ...], batches: int) -> None:
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(n, K, *shape)).astype(np.float32)
    labels = rng.choice([0, 1, 2, 3, VOID], (n, *shape))
    labels.flat[0] = 1
    recipe = Recipe(metric="perplexity", ignore_label=VOID)
    expected = functional.cross_entropy(torch.tensor(outputs).double(), torch.tensor(labels), ignore_index=VOID).exp()
    perplexity = metrics_of(objective(shape, recipe), outputs, labels, batches)["perplexity"]
    assert perplexity == pytest.approx(float(expected), rel=1e-5)


@given(seeds, sizes, shapes, st.integers(1, 3))
def test_average_precision_is_scikit_learns_of_binned_scores(
    seed: int, n: int, shape: tuple[int, ...], batches: int
) -> None:
    rng = np.random.default_rng(seed)
    bins = rng.integers(0, BINS, (n, K, *shape))
    score = (bins + 0.5) / BINS
    outputs = np.log(score / (1 - score)).astype(np.float32)
    labels = (rng.random(outputs.shape) < 0.4).astype(np.float32)
    rows = [(labels[:, k].ravel(), bins[:, k].ravel()) for k in range(K)]
    each = [average_precision_score(y, b) for y, b in rows if y.any()]
    metrics = metrics_of(objective(shape, Recipe(loss="bce", metric="ap")), outputs, labels, batches)
    assert metrics.get("ap", math.nan) == pytest.approx(np.mean(each) if each else math.nan, rel=1e-5, nan_ok=True)


@given(seeds, sizes, shapes, st.integers(1, 3))
def test_errors_of_numbers(seed: int, n: int, shape: tuple[int, ...], batches: int) -> None:
    outputs, labels = np.random.default_rng(seed).normal(size=(2, n, K, *shape)).astype(np.float32)
    d = outputs.astype(np.float64) - labels
    for name, expected in (("rmse", np.sqrt(np.mean(d**2))), ("mae", np.mean(np.abs(d)))):
        metrics = metrics_of(objective(shape, Recipe(loss="mse", metric=name)), outputs, labels, batches)
        assert metrics[name] == pytest.approx(expected, rel=1e-5)


def test_a_set_without_any_label_that_counts_has_no_metric() -> None:
    outputs, labels = np.zeros((3, K), np.float32), np.full(3, VOID)
    for name in ("miou", "perplexity"):
        assert metrics_of(objective((), Recipe(metric=name, ignore_label=VOID)), outputs, labels) == {}


def test_metrics_are_refused_where_labels_are_of_another_kind() -> None:
    with pytest.raises(ConfigError, match=r"recipe\.metric: .*'miou'"):
        Recipe(loss="mse", metric="miou")
    model = fx.load(PositionNet(), loss=lambda outputs, labels: (outputs - labels).abs().sum(1))
    for name in METRICS_OF["classes"][:-1]:
        with pytest.raises(ConfigError, match=f"recipe.metric: {name!r} with this loss.*classes"):
            training_graph(model, Recipe(loss="custom", metric=name).features)
    assert training_graph(model, Recipe(loss="custom", metric="mae").features)


def near(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Share of numbers that are less than half wrong."""
    return ((outputs - labels).abs() < 0.5).float().mean(1)


class Determination(nn.Module):
    """R²: the share of the labels' variance that the outputs explain."""

    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        count = torch.ones_like(labels[:, 0])
        return torch.stack([((outputs - labels) ** 2).sum(1), labels.sum(1), (labels**2).sum(1), K * count], 1)

    def value(self, sums: torch.Tensor) -> torch.Tensor:
        return 1 - sums[0] / (sums[2] - sums[1] ** 2 / sums[3])


def test_a_metric_of_ones_own_is_computed_without_torch(tmp_path: Path) -> None:
    outputs, labels = np.random.default_rng(0).normal(size=(2, 30, K)).astype(np.float32)
    recipe = Recipe(loss="mse", metric="custom")
    file = tmp_path / "model.onnx"
    for metric, expected in (
        (near, (np.abs(outputs - labels) < 0.5).mean()),
        (Determination, 1 - ((outputs - labels) ** 2).sum() / ((labels - labels.mean()) ** 2).sum()),
    ):
        model = fx.load(PositionNet(), metric=metric)
        for batches in (1, 4):
            assert metrics_of(objective_of(model, recipe), outputs, labels, batches)["score"] == pytest.approx(
                expected, rel=1e-4
            )
        file.write_bytes(model.graph.to_bytes())
        reloaded = import_onnx(read_source(file), "again")  # it travels in the model's file
        assert metrics_of(objective_of(reloaded, recipe), outputs, labels)["score"] == pytest.approx(expected, rel=1e-4)


def rows(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return outputs - labels


class Leaking(nn.Module):
    """Its value reads what only one batch has."""

    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.last = outputs.mean() + labels.mean()
        return outputs

    def value(self, sums: torch.Tensor) -> torch.Tensor:
        return sums.sum() + self.last


@pytest.mark.parametrize(
    ("metric", "error"),
    [
        (rows, "expected sums over samples .k. and what they come to"),
        (Leaking, "computed from the sums alone"),
        ("nowhere:metric", "can't import nowhere"),
        (7, "expected a function or module of outputs and labels"),
    ],
)
@pytest.mark.at_push(2)
def test_wrong_metrics_are_one_clear_error(metric: object, error: str) -> None:
    with pytest.raises(ModelError, match=error):
        fx.load(PositionNet(), metric=metric)


def test_a_recipe_asks_for_a_metric_that_the_model_lacks() -> None:
    with pytest.raises(ConfigError, match=r"recipe\.metric: 'custom'"):
        training_graph(model_of(()), Recipe(loss="mse", metric="custom").features)


def test_average_precision_of_a_diverged_model_is_not_a_number() -> None:
    """One output that is not a number makes the metric one, as with other metrics; it doesn't end the evaluation."""
    outputs = np.zeros((5, K), np.float32)
    outputs[2, 1] = np.nan
    labels = np.eye(5, K, dtype=np.float32)

    metrics = metrics_of(objective((), Recipe(loss="bce", metric="ap")), outputs, labels)

    assert math.isnan(metrics.get("ap", math.nan))
