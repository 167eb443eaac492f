"""Masks, thresholds, a scaler and squared gradients on a board."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, FedpruneError
from fedprune.core.rng import keyed_generator
from fedprune.model import step_contract
from fedprune.model.element_mask import apply_mask, mask_to_bits, pack_active, unpack_active
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ElementMask, Tensors
from fedprune.runtime.session import OnnxSession
from fedprune_device.data.dataset import LocalData
from fedprune_device.storage.local_state import LocalState
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.storage.state_store import FolderStateStore
from fedprune_device.training.received_weights import unpack_drift, unpack_weights
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingResult, TrainingTask
from support.fakes.hidden_board import (
    CLASSES,
    DEVICE,
    HIDDEN,
    SEED,
    HiddenBoard,
    hidden_weights,
    logits,
    measured_statistics,
)
from support.paths import GRAPHS

pytestmark = pytest.mark.board

HARD = Recipe(epochs=2, batch_size=16, mask="hard", weight_decay=0.1)
NAMES = ("w1", "gamma", "beta", "mean", "var", "w2", "b2")


def half(weights: Tensors, *names: str, seed: int = 0) -> ElementMask:
    rng = np.random.default_rng(seed)
    return {n: rng.random(weights[n].shape) < 0.5 for n in names or ("w1", "w2")}


def train(graph: Path, weights: Tensors, data: LocalData, recipe: Recipe, **fields: Any) -> TrainingResult:
    return Trainer(graph).train(weights, data, TrainingTask(recipe, CLASSES, SEED, DEVICE, round=1, **fields))


# -- masks ------------------------------------------------------------------------------------------------------------


def test_masked_elements_stay_zero_and_travel_neither_down_nor_up(board: HiddenBoard) -> None:
    weights = hidden_weights()
    mask = half(weights)
    dense = apply_mask(mask, weights)
    update, sent, serves = board.carry_out(board.offer(1, HARD, weights, graph="masked", mask=mask))
    expected = train(board.graphs / "masked.onnx", dense, board.data, HARD, mask=mask).tensors
    assert {n: v.shape for n, v in sent.items()} == {n: v.shape for n, v in pack_active(mask, weights).items()}
    for name, value in unpack_active(mask, sent).items():
        np.testing.assert_array_equal(value, expected[name])
        np.testing.assert_array_equal(value, serves[name])
    for name, active in mask.items():
        assert not serves[name][~active].any()
        assert (serves[name][active] != dense[name][active]).all()
    x, y = board.data.x_test, board.data.y_test
    assert update.metrics["accuracy_before"] == np.mean(logits(dense, x).argmax(1) == y)
    assert update.metrics["accuracy_after"] == np.mean(logits(serves, x).argmax(1) == y)


def test_an_average_of_masked_weights_is_masked_and_follows_the_mask(board: HiddenBoard) -> None:
    recipe, old = replace(HARD, average=0.75), Tensors()
    before = None
    for number in (1, 2):
        weights = hidden_weights(seed=number)
        mask = half(weights, seed=number)
        _, sent, serves = board.carry_out(board.offer(number, recipe, weights, graph="masked", mask=mask))
        new = unpack_active(mask, sent)
        for name, active in mask.items():
            assert not serves[name][~active].any()
            common = active & before[name] if before is not None else np.zeros_like(active)
            expected = np.where(common, 0.75 * old.get(name, new[name]) + 0.25 * new[name], new[name])
            np.testing.assert_allclose(serves[name], expected, rtol=1e-6)
        old, before = serves, mask


@pytest.mark.parametrize(("mask", "graph"), [("hard", "masked"), ("threshold", "threshold")])
def test_what_is_blended_into_an_average_keeps_to_the_mask(board: HiddenBoard, mask: str, graph: str) -> None:
    theta = 0.3 if mask == "threshold" else 0.0
    recipe = Recipe(epochs=1, batch_size=16, mask=mask, mask_threshold=theta, average=0.75, blend=0.5)
    for number in (1, 2):
        weights = hidden_weights(seed=number)
        active = half(weights, seed=number)
        _, _, serves = board.carry_out(board.offer(number, recipe, weights, graph=graph, mask=active))
        state = max(
            (LocalState.from_bytes(r) for r in FolderStateStore(board.root / "own").read().values()),
            key=lambda o: o.round,
        )
        for name, value in apply_mask(active, weights).items():
            expected = (state.average[name] + value) / 2
            if name in active:
                assert not serves[name][~active[name]].any()
                expected = np.where(np.abs(expected) >= np.float32(theta), expected, 0)
            np.testing.assert_allclose(serves[name], expected, rtol=1e-5, atol=1e-7)


def axes(graphs: Path) -> TensorAxes:
    return TensorAxes.from_json(
        OnnxSession(graphs / "masked.onnx", training=True).metadata[step_contract.AXES_METADATA]
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bits": {"w1": np.zeros(6, np.uint8)}}, "values of w1"),
        ({"bits": {"mean": np.zeros(1, np.uint8)}}, "mask of mean"),
        ({"mask": b"junk"}, "cut short"),
        ({"widths": (9,)}, "widths"),
        ({"recipe": Recipe()}, r"recipe\.mask"),
        ({"axes": None}, "axes"),
        ({"weights": tensorfile.encode({"w1": np.zeros(24, np.float64)})}, "type of w1"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_a_mask_that_does_not_fit_is_refused(graphs: Path, change: dict[str, Any], text: str) -> None:
    weights = hidden_weights()
    mask = half(weights, "w1")
    arguments: dict[str, Any] = {
        "weights": tensorfile.encode(pack_active(mask, weights)),
        "mask": tensorfile.encode(mask_to_bits(mask)),
        "recipe": HARD,
        "axes": axes(graphs),
        "widths": (HIDDEN,),
        "maskable": [n for n in NAMES if n not in ("mean", "var")],
    }
    unpack_weights(**arguments)
    if "bits" in change:
        change = {"mask": tensorfile.encode(change["bits"])}
    with pytest.raises(BundleError, match=text):
        unpack_weights(**{**arguments, **change})


def test_a_drift_moves_the_elements_that_are_active(board: HiddenBoard) -> None:
    """By −lr · drift in a round of one step, whose gradients are the same without it."""
    weights, recipe = hidden_weights(), Recipe(max_steps=1, batch_size=16, mask="hard", drift=True, lr=0.25)
    mask, drift = half(weights), {n: v + 1 for n, v in hidden_weights(seed=5).items() if n in ("w1", "b2")}
    with DeviceStore(board.root) as store:
        ref = store.blobs.put(tensorfile.encode(pack_active(mask, drift)))
    changes: dict[str, Any] = {"graph": "drift", "mask": mask}
    offers = [board.offer(1, recipe, weights, **changes), board.offer(1, recipe, weights, **changes, drift=ref)]
    assert ref in offers[1].blobs()
    plain, drifted = (unpack_active(mask, board.carry_out(offer)[1]) for offer in offers)
    for name, value in apply_mask(mask, weights).items():
        expected = plain[name] - 0.25 * apply_mask(mask, drift)[name] if name in drift else plain[name]
        np.testing.assert_allclose(drifted[name], expected, rtol=1e-5, atol=1e-6)
        assert (plain[name] != value).any()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"w1": np.zeros((9, 9), np.float32)}, "active values of w1"),
        ({"b2": np.zeros(CLASSES + 1, np.float32)}, "drift of b2"),
        ({"b2": np.zeros(CLASSES, np.float64)}, "drift of b2"),
        ({"b2": np.full(CLASSES, np.nan, np.float32)}, "finite"),
        ({"mean": np.zeros(HIDDEN, np.float32)}, "drift of mean"),
        ({}, r"recipe\.drift"),
    ],
)
def test_a_drift_that_does_not_fit_is_refused(change: Tensors, text: str) -> None:
    weights = hidden_weights()
    mask, recipe = half(weights, "w1"), replace(HARD, drift=bool(change))
    drift = pack_active(mask, {n: weights[n] for n in ("w1", "b2")}) | change
    trained = {n: v for n, v in weights.items() if n not in ("mean", "var")}
    with pytest.raises(BundleError, match=text):
        unpack_drift(tensorfile.encode(drift), recipe, mask, trained)


@given(st.integers(0, 2**31), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_whatever_comes_for_a_mask_costs_nothing_but_the_offer(seed: int, changes: int) -> None:
    graphs = GRAPHS
    rng = np.random.default_rng(seed)
    weights = hidden_weights()
    mask = half(weights)
    raw = bytearray(tensorfile.encode(mask_to_bits(mask)))
    for at in rng.integers(0, len(raw), changes):
        raw[at] = rng.integers(256)
    try:
        tensors, got = unpack_weights(
            tensorfile.encode(pack_active(mask, weights)), bytes(raw), HARD, axes(graphs), (HIDDEN,), ("w1", "w2", "b2")
        )
    except FedpruneError:
        return
    assert all(tensors[n].shape == weights[n].shape and not tensors[n][~m].any() for n, m in got.items())


# -- the scaler -------------------------------------------------------------------------------------------------------


def test_the_scaler_is_for_training_alone(board: HiddenBoard) -> None:
    """Scaled by 2 its norm's statistics are twice and four times as large, of which evaluation must know nothing."""
    recipe = Recipe(batch_size=70, lr=0.0, momentum=0.0, scale=2.0, calibrate=True)
    weights = hidden_weights()
    _, sent, serves = board.carry_out(board.offer(1, recipe, weights, graph="scaled"))
    for name, value in measured_statistics(weights, board.data.x_train, 70).items():
        np.testing.assert_allclose(serves[name], value, rtol=2e-6, atol=2e-6)
        np.testing.assert_array_equal(sent[name], serves[name])
    scaled = train(board.graphs / "scaled.onnx", weights, board.data, recipe).tensors
    plain = train(board.graphs / "scaled.onnx", weights, board.data, replace(recipe, scale=1.0)).tensors
    for name, power in (("mean", 2), ("var", 4)):
        change = scaled[name] - 0.9 * weights[name]
        np.testing.assert_allclose(change, power * (plain[name] - 0.9 * weights[name]), rtol=1e-3, atol=1e-4)


# -- squared gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_the_last_steps_squared_gradients_follow_the_weights(board: HiddenBoard, masked: bool) -> None:
    """SGD without momentum and decay moves by lr · g, so the last step's move tells g."""
    recipe = Recipe(epochs=2, batch_size=16, lr=0.05, momentum=0.0, report_squares=True)
    recipe = replace(recipe, mask="hard") if masked else recipe
    graph, weights = "masked" if masked else "scaled", hidden_weights()
    mask = half(weights) if masked else {}
    _, sent, _ = board.carry_out(board.offer(1, recipe, weights, graph=graph, mask=mask))
    names = [n for n in NAMES if n not in ("mean", "var")]
    assert list(sent) == [*NAMES, *(step_contract.squares_name(n) for n in names)]
    dense = apply_mask(mask, weights)
    steps = recipe.steps(board.data.samples)
    one, two = (
        train(board.graphs / f"{graph}.onnx", dense, board.data, replace(recipe, max_steps=s), mask=mask).tensors
        for s in (steps - 1, steps)
    )
    for name in names:
        square = ((one[name].astype(np.float64) - two[name]) / recipe.lr) ** 2
        square = square[mask[name]] if name in mask else square
        assert sent[step_contract.squares_name(name)].shape == sent[name].shape
        np.testing.assert_allclose(sent[step_contract.squares_name(name)], square, rtol=1e-2, atol=1e-7)


# -- early stopping ---------------------------------------------------------------------------------------------------


def test_squares_of_what_stays_on_the_board_stay_there(board: HiddenBoard) -> None:
    recipe = Recipe(batch_size=16, report_squares=True, personal=("w2", "b2"))
    _, sent, _ = board.carry_out(board.offer(1, recipe, hidden_weights(), graph="scaled"))
    assert list(sent) == ["w1", "gamma", "beta", "mean", "var", "w1::squares", "gamma::squares", "beta::squares"]


def validation_loss(w: Tensors, data: LocalData, max_samples: int) -> float:
    """As a training step sees it: each part normalised by its own statistics."""
    total = 0.0
    for rows in np.array_split(np.arange(len(data.y_val)), -(-len(data.y_val) // max_samples)):
        h = data.x_val[rows].astype(np.float64) @ w["w1"].T
        z = logits(w | {"mean": h.mean(0), "var": h.var(0)}, data.x_val[rows])
        z = z - z.max(1, keepdims=True)
        total += float((np.log(np.exp(z).sum(1)) - z[np.arange(len(rows)), data.y_val[rows]]).sum())
    return total / len(data.y_val)


@pytest.mark.parametrize("patience", [1, 3])
def test_training_ends_when_the_validation_loss_no_longer_falls(board: HiddenBoard, patience: int) -> None:
    data = board.data.with_validation(0.3, 3, DEVICE)
    noise = keyed_generator(1, "labels").permutation(data.y_train)  # nothing to be learnt, so that it soon gets worse
    data = LocalData(data.x_train, noise, data.x_test, data.y_test, data.x_val, data.y_val)
    recipe = Recipe(epochs=30, batch_size=16, lr=0.2, patience=patience)
    weights = hidden_weights()
    got = train(board.graphs / "kept.onnx", weights, data, recipe)
    per_epoch = data.samples // 16  # a single sample that is left over is no batch
    after = [
        train(board.graphs / "kept.onnx", weights, data, replace(recipe, epochs=e, patience=0)).tensors
        for e in range(1, 31)
    ]
    losses = [validation_loss(w, data, 16) for w in after]
    best = waited = 0
    for epoch in range(1, 30):
        best, waited = (epoch, 0) if losses[epoch] < losses[best] else (best, waited + 1)
        if waited == patience:
            break
    assert waited == patience, "the example must end early"
    assert got.steps == (best + 1) * per_epoch
    for name, value in after[best].items():
        np.testing.assert_array_equal(got.tensors[name], value)
    last = train(board.graphs / "kept.onnx", weights, data, replace(recipe, best_epoch=False))
    assert last.steps == (epoch + 1) * per_epoch, "it ends as early"
    for name, value in after[epoch].items():
        np.testing.assert_array_equal(last.tensors[name], value)
