from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedprune.core.errors import ModelError, TrainingError
from fedprune.core.rng import keyed
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import class_presence, class_weights, log_prior
from fedprune_device.training.trainer import Trainer, TrainingResult, TrainingStoppedError

pytestmark = pytest.mark.board

PLAIN = Recipe(epochs=2, batch_size=16, lr=0.1, momentum=0.9, weight_decay=0.01)
FULL = Recipe(
    epochs=2,
    batch_size=16,
    lr=0.1,
    momentum=0.5,
    proximal=0.3,
    logit_adjustment=True,
    mask_absent_classes=True,
    balance_classes=True,
)


def train(graph: Path, weights: Tensors, data: LocalData, recipe: Recipe, **other: object) -> TrainingResult:
    arguments = {"seed": 7, "device": "d", "round": 1, "classes": 3, **other}
    return Trainer(graph).train(weights, data, recipe, **arguments)  # type: ignore[arg-type]


def by_hand(weights: Tensors, data: LocalData, recipe: Recipe) -> tuple[Tensors, list[float]]:
    """SGD on a linear classifier in float64, written from the recipe's words."""
    w = {k: v.astype(np.float64) for k, v in weights.items()}
    buffers = {k: np.zeros_like(v) for k, v in w.items()}
    offset = log_prior(data.y_train, 3) if recipe.logit_adjustment else np.zeros(3)
    mask = class_presence(data.y_train, 3) if recipe.mask_absent_classes else np.ones(3)
    weigh = class_weights(data.y_train, 3) if recipe.balance_classes else np.ones(3)
    losses = []
    for epoch in range(recipe.epochs):
        order = keyed(7, 1, "d", "batches", epoch).permutation(len(data.y_train))
        for s in range(0, len(order), recipe.batch_size):
            x, y = data.x_train[order[s : s + recipe.batch_size]], data.y_train[order[s : s + recipe.batch_size]]
            z = (x @ w["w"].T + w["b"] + offset) * mask
            p = np.exp(z - z.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            share = (weigh[y] / weigh[y].sum())[:, None]
            losses.append(float(-(share[:, 0] * np.log(p[np.arange(len(y)), y])).sum()))
            dz = (p - np.eye(3)[y]) * share * mask
            for name, g in {"w": dz.T @ x, "b": dz.sum(0)}.items():
                g = g + recipe.weight_decay * w[name] + recipe.proximal * (w[name] - weights[name])
                buffers[name] = recipe.momentum * buffers[name] + g
                w[name] = w[name] - recipe.lr * buffers[name]
    return w, losses


@pytest.mark.parametrize(("graph", "recipe"), [("plain", PLAIN), ("full", FULL)])
def test_training_is_sgd_as_the_recipe_says(
    graphs: Path, weights: Tensors, data: LocalData, graph: str, recipe: Recipe
) -> None:
    got = train(graphs / f"{graph}.onnx", weights, data, recipe)
    wanted, losses = by_hand(weights, data, recipe)
    for name, value in got.tensors.items():
        np.testing.assert_allclose(value, wanted[name], atol=2e-6)
    assert (got.steps, got.samples) == (10, 70)
    assert got.loss_first == pytest.approx(losses[0], abs=1e-5)
    assert got.loss_last == pytest.approx(losses[-1], abs=1e-5)


@pytest.mark.parametrize("other", [{"seed": 8}, {"device": "e"}, {"round": 2}])
def test_seed_device_and_round_change_the_order(
    graphs: Path, weights: Tensors, data: LocalData, other: dict[str, object]
) -> None:
    one = train(graphs / "plain.onnx", weights, data, PLAIN)
    two = train(graphs / "plain.onnx", weights, data, PLAIN, **other)
    assert not np.array_equal(one.tensors["w"], two.tensors["w"])


def test_steps_are_limited(graphs: Path, weights: Tensors, data: LocalData) -> None:
    done: list[tuple[int, int]] = []
    recipe = Recipe(epochs=9, batch_size=16, max_steps=7)
    got = train(graphs / "plain.onnx", weights, data, recipe, progress=lambda n, of: done.append((n, of)))
    assert got.steps == 7 == recipe.steps(70)
    assert done == [(i, 7) for i in range(1, 8)]


def test_a_leftover_sample_is_skipped_only_where_there_are_batch_statistics(
    graphs: Path, weights: Tensors, data: LocalData
) -> None:
    recipe = Recipe(batch_size=23)  # 70 = 3 · 23 + 1
    with_mean = {**weights, "mean": np.zeros(6, np.float32)}
    assert train(graphs / "plain.onnx", weights, data, recipe).steps == 4
    assert train(graphs / "stats.onnx", with_mean, data, recipe).steps == 3


def test_a_single_sample_is_trained_on_when_there_is_no_other(graphs: Path, weights: Tensors, data: LocalData) -> None:
    one = LocalData(data.x_train[:1], data.y_train[:1], data.x_test, data.y_test)
    got = train(graphs / "stats.onnx", {**weights, "mean": np.zeros(6, np.float32)}, one, Recipe())
    assert got.steps == 1


def test_statistics_move_without_momentum(graphs: Path, weights: Tensors, data: LocalData) -> None:
    recipe = Recipe(batch_size=70, lr=0.0)
    got = train(graphs / "stats.onnx", {**weights, "mean": np.ones(6, np.float32)}, data, recipe)
    np.testing.assert_allclose(got.tensors["mean"], 0.9 + 0.1 * data.x_train.mean(0), atol=1e-6)


def test_a_loss_that_explodes_is_an_error_with_its_step(graphs: Path, weights: Tensors, data: LocalData) -> None:
    huge = LocalData(data.x_train * 1e18, data.y_train, data.x_test, data.y_test)
    with pytest.raises(TrainingError, match=r"not finite (at|after) step \d+.*lower lr"):
        train(graphs / "plain.onnx", weights, huge, Recipe(lr=1000, epochs=3))


def test_training_stops_when_told(graphs: Path, weights: Tensors, data: LocalData) -> None:
    steps: list[int] = []
    with pytest.raises(TrainingStoppedError, match="before step 4 of 10"):
        train(
            graphs / "plain.onnx",
            weights,
            data,
            PLAIN,
            progress=lambda n, _: steps.append(n),
            stop=lambda: len(steps) == 3,
        )
    assert steps == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"w": None}, "tensor w is missing"),
        ({"v": np.zeros(2, np.float32)}, "no tensor v"),
        ({"w": np.zeros((3, 5), np.float32)}, "shape of w"),
        ({"w": np.zeros((3, 6, 1), np.float32)}, "shape of w"),
        ({"b": np.zeros(3)}, "type of b"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    graphs: Path, weights: Tensors, data: LocalData, change: Tensors, text: str
) -> None:
    wrong = {k: v for k, v in {**weights, **change}.items() if v is not None}
    with pytest.raises(TrainingError, match=text):
        train(graphs / "plain.onnx", wrong, data, PLAIN)


def test_an_inference_graph_is_not_a_training_graph(model: Path) -> None:
    with pytest.raises(TrainingError, match="not a training graph"):
        Trainer(model / "inference.onnx")


def test_bytes_that_are_no_graph_are_refused() -> None:
    with pytest.raises(ModelError, match="doesn't load"):
        Trainer(b"not a graph")
