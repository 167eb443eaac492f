"""Losses that are graphs: of masks, of a batch's samples beside each other, of sequences; compared with torch."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import fedprune_export as fx
from fedprune.core.errors import ConfigError, DataError, ModelError
from fedprune.model import step_contract
from fedprune.model.recipe import Features, Recipe
from fedprune.runtime.session import Session
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.trainer import Trainer, TrainingTask
from fedprune_export.autodiff.tape import BATCH, port
from fedprune_export.checks.labelled_data import measured
from fedprune_export.ir.graph import Graph
from fedprune_export.training.loss_graphs import LOSS_GRAPHS
from fedprune_export.training.losses import write_loss
from fedprune_export.training.step_graph import training_graph
from support.oracles.differentiation import error
from support.oracles.torch_losses import ctc, dice, focal, infonce, triplet

pytestmark = pytest.mark.torch

Array = np.ndarray[Any, Any]


ORACLES: dict[str, Any] = {"ctc": ctc, "dice": dice, "focal": focal, "infonce": infonce, "triplet": triplet}
ORACLES["0.5*infonce + triplet"] = lambda z, y: 0.5 * infonce(z, y) + triplet(z, y)


@cache
def session(name: str, outputs: tuple[int, ...]) -> Session:
    """The loss alone, with the gradient by the outputs."""
    loss, g = LOSS_GRAPHS[name](outputs), Graph(name="loss")
    g.inputs = [port("z", (BATCH, *outputs)), loss.graph.inputs[1]]
    g.outputs = [port(step_contract.LOSS, ()), port("dz", (BATCH, *outputs))]
    g.emit("Identity", write_loss(g, "z", outputs, Features(loss=name), {name: loss}), out="dz")
    return Session(g.to_bytes(), training=True)


def agrees(name: str, z: Array, y: Array) -> None:
    got = session(name, z.shape[1:]).run({"z": z, step_contract.Y: y})
    found = []
    for dtype in (torch.float64, torch.float32):
        leaf = torch.tensor(z, dtype=dtype, requires_grad=True)
        each = ORACLES[name](leaf, torch.tensor(y, dtype=dtype if y.dtype.kind == "f" else None))
        each.mean().backward()
        assert leaf.grad is not None
        values = {step_contract.LOSS: each.mean(), "dz": leaf.grad}
        found.append({k: v.detach().numpy() for k, v in values.items()})
    exact, usual = found
    floor = 2e-7 * (1 + float(np.abs(z).max()))
    for key, value in exact.items():
        off = float(np.max(np.abs(got[key] - value)))
        assert off <= floor or error(got[key], value) <= max(1e-6, 2 * error(usual[key], value)), key


sizes = st.sampled_from([0.1, 1.0, 10.0])


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 5), classes=st.integers(2, 5), steps=st.sampled_from([1, 2, 3, 8]), size=sizes,
    seed=st.integers(0, 999),
)  # fmt: skip
def test_ctc_is_torchs(batch: int, classes: int, steps: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = (size * rng.standard_normal((batch, classes, steps))).astype(np.float32)
    # Of any length: some repeat labels, some are too long for the steps.
    lengths = rng.integers(0, steps + 1, (batch, 1))
    y = np.where(np.arange(steps) < lengths, rng.integers(1, classes, (batch, steps)), 0)
    agrees("ctc", z, y)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["infonce", "triplet"]), batch=st.integers(1, 9),
    views=st.sampled_from([(), (1,), (2,), (3,)]),
    width=st.sampled_from([1, 2, 7]), labels=st.integers(1, 9), size=sizes, seed=st.integers(0, 999),
)  # fmt: skip
def test_losses_of_batches_are_torchs(
    name: str, batch: int, views: tuple[int, ...], width: int, labels: int, size: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (*views, width) if name == "infonce" else (width,)
    z = (size * rng.standard_normal((batch, *shape)) + 1).astype(np.float32)
    agrees(name, z, rng.integers(0, labels, batch))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["dice", "focal"]), batch=st.integers(1, 5),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), size=sizes,
    kind=st.sampled_from(["none", "all", "some", "shares"]), seed=st.integers(0, 999),
)  # fmt: skip
def test_losses_of_masks_are_torchs(name: str, batch: int, shape: list[int], size: float, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = (size * rng.standard_normal((batch, *shape))).astype(np.float32)
    y = rng.random(z.shape)
    masks = {"none": 0 * y, "all": 0 * y + 1, "some": y < 0.3, "shares": y}
    agrees(name, z, masks[kind].astype(np.float32))


def test_two_views_and_labels_of_their_own_are_simclr() -> None:
    """NT-Xent in its authors' form: a cross-entropy of cosines, in which a view's class is the other view."""
    rng = np.random.default_rng(1)
    z = rng.standard_normal((6, 2, 5)).astype(np.float32)
    rows = functional.normalize(torch.tensor(z.transpose(1, 0, 2).reshape(12, 5), dtype=torch.float64), dim=1)
    scores = (rows @ rows.T / 0.1).fill_diagonal_(-torch.inf)
    wanted = functional.cross_entropy(scores, (torch.arange(12) + 6) % 12)
    got = session("infonce", (2, 5)).run({"z": z, step_contract.Y: np.arange(6)})
    assert got[step_contract.LOSS] == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("name", ["ctc", "infonce", "triplet"])
@pytest.mark.parametrize("size", [0.0, 1e15])
def test_extreme_outputs_give_finite_losses(name: str, size: float) -> None:
    z = (size * np.sign(np.random.default_rng(2).standard_normal((6, 3, 4)))).astype(np.float32)
    y = np.array([[1, 2, 0, 0]] * 6) if name == "ctc" else np.array([0, 0, 1, 1, 2, 0])
    z = z if name == "ctc" else z[:, 0]
    got = session(name, z.shape[1:]).run({"z": z, step_contract.Y: y})
    assert all(np.isfinite(v).all() for v in got.values())


class Speech(nn.Module):
    input_shape = (3, 20)

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Conv1d(3, 16, 3, padding=1), nn.Conv1d(16, 5, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.hidden(x)))


class Regressor(nn.Linear):
    input_shape = (6,)

    def __init__(self) -> None:
        super().__init__(6, 1)


class Embedding(nn.Sequential):
    input_shape = (6,)

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


CASES: dict[str, tuple[type[nn.Module], Array]] = {
    "ctc": (Speech, np.array([[1, 2, 2, *[0] * 7], [4, *[0] * 9], [3, 1, 3, *[0] * 7], [0] * 10] * 4, np.uint8)),
    "infonce": (Embedding, np.arange(16) % 4),
    "triplet": (Embedding, np.arange(16) % 4),
    "0.5*infonce + triplet": (Embedding, np.arange(16) % 4),
}


@pytest.mark.parametrize("name", CASES)
def test_a_board_trains_by_them(name: str) -> None:
    torch.manual_seed(0)
    made, y = CASES[name]
    model = fx.load(made())
    recipe = Recipe(loss=name, batch_size=16, epochs=30, lr=0.05)
    x = np.random.default_rng(3).standard_normal((16, *model.architecture.input_shape)).astype(np.float32)
    trainer = Trainer(training_graph(model, recipe.features).to_bytes())
    task = TrainingTask(recipe, model.architecture.classes, 0, "a", 1)
    outputs = np.asarray(Session(model.graph.to_bytes()).run({"x": x})["logits"])
    before = trainer.objective(recipe, model.architecture.classes)(outputs, y)
    wanted = float(ORACLES[name](torch.tensor(outputs, dtype=torch.float64), torch.tensor(y.astype(np.int64))).mean())
    assert before.loss == pytest.approx(wanted, rel=1e-5)
    assert before.accuracy is None
    found = trainer.train(model.tensors, LocalData(x, y, x[:0], y[:0]), task)
    assert found.loss_last < 0.75 * wanted
    with pytest.raises(DataError, match=f"labels for loss {re.escape(name)}: expected whole numbers"):
        trainer.train(model.tensors, LocalData(x, y.astype(np.float32), x[:0], y[:0]), task)


@pytest.mark.parametrize("name", ["distill", "0.5*distill + 0.25*mse"])
def test_a_board_learns_a_teachers_outputs(name: str) -> None:
    torch.manual_seed(1)
    teacher, model = Embedding(), fx.load(Embedding())
    x = np.random.default_rng(3).standard_normal((32, 6)).astype(np.float32)
    y = 3 * teacher(torch.tensor(x)).detach().numpy()
    recipe = Recipe(loss=name, distill_temperature=3, batch_size=8, epochs=40, lr=0.05)
    trainer = Trainer(training_graph(model, recipe.features).to_bytes())
    outputs = np.asarray(Session(model.graph.to_bytes()).run({"x": x})["logits"])
    before = trainer.objective(recipe, model.architecture.classes)(outputs, y)
    exact, aim = (torch.tensor(v, dtype=torch.float64) for v in (outputs, y))
    shares = functional.kl_div((exact / 3).log_softmax(1), (aim / 3).log_softmax(1), reduction="none", log_target=True)
    wanted = 9 * shares.sum(1).mean()
    wanted = wanted if name == "distill" else 0.5 * wanted + 0.25 * functional.mse_loss(exact, aim)
    assert before.loss == pytest.approx(float(wanted), rel=1e-5)
    assert before.accuracy is None
    found = trainer.train(model.tensors, LocalData(x, y, x[:0], y[:0]), TrainingTask(recipe, 4, 0, "a", 1))
    assert found.loss_last < 0.2 * found.loss_first
    with pytest.raises(DataError, match="labels for loss"):
        trainer.train(model.tensors, LocalData(x, y[:, :3], x[:0], y[:0]), TrainingTask(recipe, 4, 0, "a", 1))


def test_one_class_has_nothing_to_learn_from_a_teacher() -> None:
    with pytest.raises(ModelError, match=r"two classes or more, got \[n, 1\]"):
        training_graph(fx.load(Regressor()), Features(loss="distill"))


def test_a_label_that_is_no_class_is_refused() -> None:
    model, recipe = fx.load(Speech()), Recipe(loss="ctc", batch_size=16)
    y = CASES["ctc"][1] + np.uint8(3)
    x = np.zeros((16, 3, 20), np.float32)
    trainer = Trainer(training_graph(model, recipe.features).to_bytes())
    with pytest.raises(DataError, match=r"out of range: expected 0 to 4 \(5 classes\), got 7"):
        trainer.train(model.tensors, LocalData(x, y, x[:0], y[:0]), TrainingTask(recipe, 5, 0, "a", 1))


@pytest.mark.parametrize(
    ("name", "outputs", "text"),
    [
        ("ctc", (5,), r"loss ctc: expected \[n, classes, steps\].*got \[n, 5\]"),
        ("ctc", (5, 600), "at most 512 steps"),
        ("infonce", (2, 3, 4), r"expected \[n, D\], or \[n, views, D\]"),
        ("triplet", (2, 3), r"expected \[n, D\], got \[n, 2, 3\]"),
    ],
)
def test_outputs_that_a_loss_does_not_take_are_refused(name: str, outputs: tuple[int, ...], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        LOSS_GRAPHS[name](outputs)


@pytest.mark.parametrize("name", ["custom", "infonce + 0.5*triplet"])
def test_labels_that_have_no_between_are_not_mixed(name: str) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.mixup: with loss"):
        Recipe(loss=name, mixup=0.2)


def test_samples_do_not_say_how_right_embeddings_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 6), np.float32), y=np.arange(4))
    with pytest.raises(DataError, match=r"measure a model of loss 'triplet' on.*leave --data"):
        measured(tmp_path / "data.npz", fx.load(Embedding()), Recipe(loss="triplet"))
