"""Training by a recipe: losses, optimisers, parts of batches, frozen tensors, narrower steps, token ids."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.core.errors import TrainingError
from fedprune.core.rng import keyed_generator
from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.runtime.session import OnnxSession
from fedprune_device.data.batches import Batches
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import (
    Targets,
    class_presence,
    class_weights,
    log_prior,
    loss_terms,
    positive_weights,
    right_labels,
)
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.augmentation import SampleAugmentation
from fedprune_device.training.round_runner import RoundRunner
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_run import EarlyStopping
from fedprune_device.training.training_task import TrainingControl, TrainingResult, TrainingStoppedError, TrainingTask
from support.fakes.agent_fleet import MemoryServer
from support.oracles.losses import data_loss

pytestmark = pytest.mark.board

Array = np.ndarray[Any, Any]
HIDDEN, FEATURES, CLASSES = 8, 6, 3
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
ADAMW = Recipe(
    epochs=2,
    batch_size=16,
    optimizer="adamw",
    lr=0.02,
    weight_decay=0.1,
    beta2=0.99,
    clip_norm=0.3,
    accumulate=3,
    label_smoothing=0.2,
    balance_classes=True,
)
BCE = Recipe(epochs=2, batch_size=16, lr=0.1, loss="bce", balance_classes=True)
HUBER = Recipe(epochs=2, batch_size=16, lr=0.1, loss="huber", huber_delta=0.5, accumulate=4)
MIXUP = Recipe(epochs=2, batch_size=16, lr=0.1, mixup=0.6, accumulate=3, label_smoothing=0.2, balance_classes=True)
NARROW = Recipe(epochs=3, batch_size=16, lr=0.01, optimizer="adam", proximal=0.1, ordered_dropout=(0.25, 0.5))
STILL = Recipe(batch_size=16, frozen=("w1", "gamma", "mean", "var"))


def wanted_of(loss: str) -> Targets:
    """The labels that a loss takes of models with `CLASSES` outputs."""
    return Targets(loss, CLASSES, () if loss == "cross_entropy" else (CLASSES,))


def train(graph: Path, weights: Tensors, data: LocalData, recipe: Recipe, **fields: Any) -> TrainingResult:
    control = TrainingControl(**{name: fields.pop(name) for name in ("progress", "stop", "enough") if name in fields})
    task = TrainingTask(**{"recipe": recipe, "seed": 7, "device": "d", "round": 3, "classes": CLASSES, **fields})
    return Trainer(graph).train(weights, data, task, control)


def batches(recipe: Recipe, samples: int) -> list[Array]:
    out = []
    for epoch in range(recipe.epochs):
        order = keyed_generator(7, 3, "d", "batches", epoch).permutation(samples)
        out += [order[s : s + recipe.batch_size] for s in range(0, samples, recipe.batch_size)]
    return out


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def slope(recipe: Recipe, z: Array, y: Array, weigh: Array) -> Array:
    """Gradient of the mean loss by the outputs, in float64, written from torch's documentation."""
    if recipe.loss == "cross_entropy":
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        aim = (1 - recipe.label_smoothing) * np.eye(CLASSES)[y] * weigh[y][:, None]
        aim = aim + recipe.label_smoothing / CLASSES * weigh
        return (p * aim.sum(1, keepdims=True) - aim) / weigh[y].sum()
    if recipe.loss == "bce":
        return ((1 - y) * sigmoid(z) - weigh * y * sigmoid(-z)) / z.size
    return np.clip(z - y, -recipe.huber_delta, recipe.huber_delta) / z.size


def by_hand(weights: Tensors, data: LocalData, recipe: Recipe) -> dict[str, Array]:
    """A linear model's training in float64."""
    w = {k: v.astype(np.float64) for k, v in weights.items()}
    mean, square = ({k: np.zeros_like(v) for k, v in w.items()} for _ in range(2))
    y_all = wanted_of(recipe.loss)(data.y_train)
    weigh, offset, present = np.ones(CLASSES), np.zeros(CLASSES), np.ones(CLASSES)
    if recipe.logit_adjustment:
        offset, present = log_prior(y_all, CLASSES), class_presence(y_all, CLASSES)
    if recipe.balance_classes:
        weigh = class_weights(y_all, CLASSES) if recipe.loss == "cross_entropy" else positive_weights(y_all)
    for count, rows in enumerate(batches(recipe, len(y_all)), 1):
        x, y = data.x_train[rows].astype(np.float64), y_all[rows]
        partners, share = np.arange(len(rows)), 1.0
        if recipe.mixup:
            rng = keyed_generator(7, 3, "d", "mixup", count)
            share = float(np.float32(rng.beta(recipe.mixup, recipe.mixup)))
            micro_batches = np.array_split(partners, -(-len(rows) // recipe.micro_batch))
            partners = np.concatenate([p[rng.permutation(len(p))] for p in micro_batches])
        x = share * x + (1 - share) * x[partners]
        z, real = (x @ w["w"].T + w["b"] + offset) * present, weigh.astype(np.float64)
        if recipe.loss == "cross_entropy":
            dz = share * slope(recipe, z, y, real) + (1 - share) * slope(recipe, z, y[partners], real)
        else:
            dz = slope(recipe, z, share * y.astype(np.float64) + (1 - share) * y[partners], real)
        dz = dz * present
        gradient = {"w": dz.T @ x, "b": dz.sum(0)}
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        share = min(1.0, recipe.clip_norm / (norm + 1e-6)) if recipe.clip_norm else 1.0
        for name, g in gradient.items():
            g = share * g
            if recipe.optimizer == "sgd":
                g = g + recipe.weight_decay * w[name] + recipe.proximal * (w[name] - weights[name])
                mean[name] = recipe.momentum * mean[name] + g
                w[name] = w[name] - recipe.lr * mean[name]
                continue
            w[name] = w[name] * (1 - recipe.lr * recipe.weight_decay)
            mean[name] = recipe.beta1 * mean[name] + (1 - recipe.beta1) * g
            square[name] = recipe.beta2 * square[name] + (1 - recipe.beta2) * g**2
            spread = np.sqrt(square[name] / (1 - recipe.beta2**count)) + recipe.epsilon
            w[name] = w[name] - recipe.lr * mean[name] / (1 - recipe.beta1**count) / spread
    return w


@pytest.fixture
def data_by_loss(data: LocalData) -> dict[str, LocalData]:
    """The same samples with labels of every kind."""
    rng = np.random.default_rng(4)
    out = {"cross_entropy": data}
    for loss in ("bce", "huber"):
        y = data.x_train[:, :CLASSES] + 0.3 * rng.standard_normal((data.samples, CLASSES))
        y = y > 0.8 if loss == "bce" else y.astype(np.float32)
        out[loss] = LocalData(data.x_train, y, data.x_test, np.zeros((len(data.x_test), CLASSES), y.dtype))
    return out


@pytest.mark.parametrize(
    ("graph", "recipe"),
    [
        *(("plain", PLAIN), ("full", FULL), ("adamw", ADAMW), ("bce", BCE), ("huber", HUBER), ("mixup", MIXUP)),
        *(("bce", replace(BCE, mixup=0.4)), ("huber", replace(HUBER, mixup=1.5))),
    ],
)
def test_training_is_what_the_recipe_says(
    graphs: Path, weights: Tensors, data_by_loss: dict[str, LocalData], graph: str, recipe: Recipe
) -> None:
    data = data_by_loss[recipe.loss]
    got = train(graphs / f"{graph}.onnx", weights, data, recipe)
    for name, value in by_hand(weights, data, recipe).items():
        np.testing.assert_allclose(got.tensors[name], value, atol=2e-6 if recipe.optimizer == "sgd" else 3e-6)
    assert (got.steps, got.samples, recipe.steps(70)) == (10, 70, 10)
    assert got.loss_last < got.loss_first


def test_reported_losses_and_hits_are_those_of_the_batches(
    graphs: Path, weights: Tensors, data_by_loss: dict[str, LocalData]
) -> None:
    """At a learning rate of 0 nothing moves, so that each can be computed from the weights."""
    for graph, recipe in (("full", FULL), ("adamw", ADAMW), ("bce", BCE), ("huber", HUBER)):
        data, loss = data_by_loss[recipe.loss], recipe.loss
        still = Recipe.from_dict({**recipe.to_dict(), "lr": 0.0, "epochs": 1})
        got = train(graphs / f"{graph}.onnx", weights, data, still)
        y, z = wanted_of(loss)(data.y_train), data.x_train @ weights["w"].T + weights["b"]
        terms = loss_terms(y, still, CLASSES)
        losses = [data_loss(loss, z[rows], y[rows], terms) for rows in batches(still, data.samples)]
        assert got.loss_first == pytest.approx(losses[0], rel=1e-5)
        assert got.loss_last == pytest.approx(losses[-1], rel=1e-5)
        right = right_labels(loss, z, y)
        assert got.train_accuracy == (None if right is None else pytest.approx(np.mean(right)))


def test_the_loss_at_given_weights_is_that_of_the_outputs(
    graphs: Path, weights: Tensors, data_by_loss: dict[str, LocalData]
) -> None:
    for graph, recipe in (("adamw", ADAMW), ("bce", BCE), ("huber", HUBER), ("mixup", MIXUP)):
        data = data_by_loss[recipe.loss]
        y, z = wanted_of(recipe.loss)(data.y_train), data.x_train @ weights["w"].T + weights["b"]
        loss = Trainer(graphs / f"{graph}.onnx").loss(weights, data, recipe, CLASSES, 20)
        assert loss == pytest.approx(data_loss(recipe.loss, z[:20], y[:20], loss_terms(y, recipe, CLASSES)), rel=1e-5)


# -- steps and samples ------------------------------------------------------------------------------------------------


def test_a_loss_that_explodes_is_an_error_with_its_step(graphs: Path, weights: Tensors, data: LocalData) -> None:
    huge = LocalData(data.x_train * 1e18, data.y_train, data.x_test, data.y_test)
    with pytest.raises(TrainingError, match=r"step \d+"):
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


# -- frozen tensors and narrower steps --------------------------------------------------------------------------------


@pytest.fixture
def hidden_model() -> Tensors:
    rng = np.random.default_rng(9)
    shapes = {
        "w1": (HIDDEN, FEATURES),
        "gamma": (HIDDEN,),
        "beta": (HIDDEN,),
        "w2": (CLASSES, HIDDEN),
        "b2": (CLASSES,),
    }
    out = {n: (0.5 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
    return out | {"mean": np.zeros(HIDDEN, np.float32), "var": np.ones(HIDDEN, np.float32)}


def test_frozen_tensors_come_back_bit_by_bit(graphs: Path, hidden_model: Tensors, data: LocalData) -> None:
    trainer = Trainer(graphs / "still.onnx")
    assert (trainer.trainable, trainer.has_batch_norm) == (("beta", "w2", "b2"), False)
    got = train(graphs / "still.onnx", hidden_model, data, STILL).tensors
    assert list(got) == list(hidden_model)
    for name, value in hidden_model.items():
        assert (got[name].tobytes() == value.tobytes()) == (name not in trainer.trainable), name


def test_with_frozen_statistics_the_training_loss_is_that_of_inference(
    graphs: Path, hidden_model: Tensors, data: LocalData
) -> None:
    h = data.x_train[:32] @ hidden_model["w1"].T
    h = np.maximum(hidden_model["gamma"] * h / np.sqrt(1 + 1e-5) + hidden_model["beta"], 0)
    expected = data_loss("cross_entropy", h @ hidden_model["w2"].T + hidden_model["b2"], data.y_train[:32])
    assert Trainer(graphs / "still.onnx").loss(hidden_model, data, STILL, CLASSES) == pytest.approx(expected, rel=1e-5)


def test_some_steps_are_narrower_and_others_are_not(graphs: Path, hidden_model: Tensors, data: LocalData) -> None:
    got = {}
    for widths in ((), (0.5,)):
        recipe = Recipe.from_dict({**NARROW.to_dict(), "ordered_dropout": list(widths) or [1.0]})
        got[widths] = train(graphs / "narrow.onnx", hidden_model, data, recipe, widths=(HIDDEN,)).tensors
    assert 0 < sum([int(keyed_generator(7, 3, "d", "widths", n).integers(2)) for n in range(1, 16)]) < 15
    one, two = got.values()
    for name in ("w1", "w2", "gamma"):
        assert not np.array_equal(one[name], two[name])


def test_trainings_that_share_their_arrays_are_each_as_if_alone(
    graphs: Path, hidden_model: Tensors, data: LocalData
) -> None:
    """After an odd number of steps the result lies in other arrays than after an even one; then widths change."""
    half = HIDDEN // 2
    narrow = {n: v[:, :half] if n == "w2" else v if n == "b2" else v[:half] for n, v in hidden_model.items()}
    trainer = Trainer(graphs / "narrow.onnx", keeps_arrays=True)
    for number, start in enumerate((hidden_model, hidden_model, narrow, narrow, hidden_model), 1):
        recipe = replace(NARROW, ordered_dropout=(), epochs=1, max_steps=1 + number % 2)
        task = TrainingTask(recipe, CLASSES, 7, "d", number)
        result = trainer.train(start, data, task)
        alone = Trainer(graphs / "narrow.onnx").train(start, data, task)
        for tensors, expected in ((result.tensors, alone.tensors), (result.moments, alone.moments)):
            assert {n: v.tobytes() for n, v in tensors.items()} == {n: v.tobytes() for n, v in expected.items()}


def test_a_narrower_step_is_that_of_the_narrower_model_and_leaves_the_rest_alone(
    graphs: Path, hidden_model: Tensors, data: LocalData
) -> None:
    seed = next(s for s in range(50) if keyed_generator(s, 3, "d", "widths", 1).integers(2))
    recipe = Recipe.from_dict({**NARROW.to_dict(), "ordered_dropout": [0.5], "max_steps": 1})
    wide = train(graphs / "narrow.onnx", hidden_model, data, recipe, widths=(HIDDEN,), seed=seed).tensors
    index = {n: (slice(None),) * (n == "w2") + (slice(HIDDEN // 2),) for n in hidden_model if n != "b2"}
    half = {n: v[index[n]].copy() if n in index else v for n, v in hidden_model.items()}
    narrow = train(graphs / "narrow.onnx", half, data, recipe, widths=(HIDDEN // 2,), seed=seed).tensors
    for name, value in hidden_model.items():
        expected = value.copy()
        if name not in ("mean", "var"):  # which a narrower step leaves alone
            expected[index.get(name, ...)] = narrow[name]
        assert wide[name].tobytes() == expected.tobytes(), name


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "recipe"),
    [
        ("plain", ADAMW),
        ("plain", Recipe(loss="mse")),
        ("plain", Recipe(accumulate=2)),
        ("plain", Recipe(clip_norm=1)),
        ("full", Recipe()),
        ("bce", Recipe()),
        ("huber", Recipe(loss="mse", accumulate=2)),
    ],
)
def test_a_graph_of_another_recipe_is_refused(
    graphs: Path, weights: Tensors, data_by_loss: dict[str, LocalData], graph: str, recipe: Recipe
) -> None:
    data = data_by_loss[recipe.loss if recipe.loss in data_by_loss else "huber"]
    with pytest.raises(TrainingError, match="don't fit each other"):
        train(graphs / f"{graph}.onnx", weights, data, recipe)


def test_the_parts_of_a_batch_hold_no_single_sample_where_statistics_are_taken(graphs: Path) -> None:
    assert [Trainer(graphs / f"{n}.onnx").has_batch_norm for n in ("narrow", "adamw")] == [True, False]
    narrow, plain = (Batches(7, Recipe(batch_size=7, accumulate=4), normalised=n) for n in (True, False))
    assert [len(p) for p in plain.micro_batches(np.arange(7))] == [2, 2, 2, 1]
    assert [len(p) for p in narrow.micro_batches(np.arange(7))] == [2, 2, 2]
    assert [len(p) for p in narrow.micro_batches(np.arange(1))] == [1]
    fewer = Batches(9, Recipe(batch_size=9, accumulate=3), normalised=False)
    assert [len(p) for p in fewer.micro_batches(np.arange(5))] == [3, 2]


# -- token ids --------------------------------------------------------------------------------------------------------


def test_token_ids_are_trained_on(graphs: Path) -> None:
    rng = np.random.default_rng(2)
    y = rng.integers(0, CLASSES, 60)
    x = rng.integers(0, 3, (60, 5)) + 3 * y[:, None]  # every class has words of its own
    data = LocalData(x[:50], y[:50], x[50:], y[50:])
    table = {"table": (0.01 * rng.standard_normal((11, CLASSES))).astype(np.float32)}
    got = train(graphs / "tokens.onnx", table, data, Recipe(epochs=9, lr=0.5))
    assert got.train_accuracy == 1
    assert np.array_equal(got.tensors["table"][9:], table["table"][9:])  # words that nobody used
    with pytest.raises(TrainingError, match="failed"):
        train(graphs / "tokens.onnx", table, LocalData(x + 90, y, x[:0], y[:0]), Recipe())


def test_a_recipe_that_augments_needs_a_graph_that_does(graphs: Path, weights: Tensors, data: LocalData) -> None:
    with pytest.raises(TrainingError, match="augmentations"):
        train(graphs / "plain.onnx", weights, data, Recipe(augment=("noise:0.1",)))
    step = {"name": "flip", "values": [], "begin": 0, "shape": [3, 4, 4], "first": 0, "axes": [-1]}
    assert (
        SampleAugmentation(
            {step_contract.AUGMENT_METADATA: json.dumps({"steps": [step], "fill": -100})}
        ).plan.random_count
        == 1
    )
    wrong: tuple[dict[str, Any], ...] = (
        {"name": "rotate"}, {"shape": [2**20, 2**20]}, {"axes": [0]}, {"first": -1}, {"begin": True}, {"values": ["a"]},
    )  # fmt: skip
    bodies = [json.dumps({"steps": [step | change], "fill": None}) for change in wrong]
    for damaged in ("*", "[]", '{"steps": 1, "fill": 0}', '{"steps": [], "fill": 0.5}', "[" * 10**5, *bodies):
        with pytest.raises(TrainingError, match="augmentation"):
            SampleAugmentation({step_contract.AUGMENT_METADATA: damaged})


@pytest.mark.parametrize(("graph", "recipe"), [("adamw", ADAMW), ("bce", BCE), ("huber", HUBER), ("mixup", MIXUP)])
def test_the_validation_loss_is_the_recipes(
    graphs: Path,
    weights: Tensors,
    data_by_loss: dict[str, LocalData],
    monkeypatch: pytest.MonkeyPatch,
    graph: str,
    recipe: Recipe,
) -> None:
    """Over parts of any size, with class weights and smoothing; at a learning rate of 0 no epoch is better."""
    data = data_by_loss[recipe.loss].with_validation(0.3, 1)
    losses, over = list[float](), EarlyStopping.ends_training
    monkeypatch.setattr(
        EarlyStopping,
        "ends_training",
        lambda self, loss, *arguments: (losses.append(loss), over(self, loss, *arguments))[1],
    )
    still = Recipe.from_dict({**recipe.to_dict(), "lr": 0.0, "epochs": 9, "patience": 2})
    got = train(graphs / f"{graph}.onnx", weights, data, still)
    y = wanted_of(recipe.loss)(data.y_val)
    terms = loss_terms(wanted_of(recipe.loss)(data.y_train), still, CLASSES)
    expected = data_loss(recipe.loss, data.x_val @ weights["w"].T + weights["b"], y, terms)
    np.testing.assert_allclose(losses, [expected] * 3, rtol=1e-5)
    assert got.steps == -(-data.samples // recipe.batch_size)


@pytest.mark.parametrize(
    ("graph", "recipe", "samples", "max_samples"),
    [("plain", Recipe(batch_size=2), 70, 2), ("plain", Recipe(), 3, 3), ("adamw", ADAMW, 70, 6)],
)
def test_no_part_of_a_round_works_on_more_samples_than_a_step(
    tmp_path: Path,
    graphs: Path,
    weights: Tensors,
    data: LocalData,
    monkeypatch: pytest.MonkeyPatch,
    graph: str,
    recipe: Recipe,
    samples: int,
    max_samples: int,
) -> None:
    """The planner's memory is that of a step; evaluations and the check of a new model must do with it."""
    run, sizes = OnnxSession.run, list[int]()

    def count_and_run(session: OnnxSession, feeds: Tensors, *arguments: Any) -> Tensors:
        sizes.append(len(feeds[step_contract.X if step_contract.X in feeds else step_contract.LOGITS]))
        return run(session, feeds, *arguments)

    monkeypatch.setattr(OnnxSession, "run", count_and_run)
    server = MemoryServer(tmp_path / "server", graphs, weights)
    data = LocalData(data.x_train[:samples], data.y_train[:samples], data.x_test, data.y_test)
    with DeviceStore(tmp_path / "state") as store:
        for ref in (server.weights, server.graphs["inference"]):
            store.blobs.put(server.blobs.read(ref.sha256))
        training = store.blobs.put((graphs / f"{graph}.onnx").read_bytes())
        outcome = RoundRunner("d", store.blobs, store.slots, data).carry_out(server.offer(1, recipe, training=training))
    assert outcome.update.samples == samples
    assert max(sizes) == max_samples


def test_frozen_tensors_do_not_travel_up(tmp_path: Path, graphs: Path, weights: Tensors, data: LocalData) -> None:
    """The update holds what was trained; what serves holds everything; the full file is gone from the store."""
    server = MemoryServer(tmp_path / "server", graphs, weights)
    with DeviceStore(tmp_path / "state") as store:
        for ref in (server.weights, server.graphs["inference"]):
            store.blobs.put(server.blobs.read(ref.sha256))
        training = store.blobs.put((graphs / "bias.onnx").read_bytes())
        bench = RoundRunner("d", store.blobs, store.slots, data)
        update = bench.commit(bench.carry_out(server.offer(1, Recipe(trainable=("b",)), training=training)))
        sent = tensorfile.decode(store.blobs.read(update.weights.sha256))
        predictor, record = store.slots.open()
        assert list(sent) == ["b"]
        assert not np.array_equal(sent["b"], weights["b"])
        assert record.weights != update.weights.sha256
        assert not store.blobs.has(record.weights)
        assert store.blobs.has(server.weights.sha256)
    np.testing.assert_allclose(predictor.predict(data.x_test), data.x_test @ weights["w"].T + sent["b"], atol=1e-5)
