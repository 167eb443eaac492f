"""The losses of `examples/own_losses.py`, imported as a user's own: their values and gradients are torch's."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from examples import own_losses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import fedprune_export as fx
from fedprune.core.errors import DataError, ModelError
from fedprune.model import step_contract
from fedprune.model.features import CUSTOM_LOSS, Features
from fedprune.model.recipe import Recipe
from fedprune.runtime.session import OnnxSession
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.autodiff.tape import BATCH, port
from fedprune_export.importing.user_graphs import LOSS_KEY, embed_user_graph, import_user_graphs
from fedprune_export.ir.graph import Graph
from fedprune_export.training.losses import write_loss
from fedprune_export.training.step_graph import training_graph
from support.oracles import torch_losses
from support.oracles.differentiation import error

pytestmark = pytest.mark.torch

Array = np.ndarray[Any, Any]


@cache
def session(name: str, outputs: tuple[int, ...]) -> OnnxSession:
    """The loss alone, with the gradient by the outputs."""
    example = own_losses.Ctc(outputs[1]) if name == "ctc" else getattr(own_losses, name)
    texts = {LOSS_KEY: embed_user_graph(LOSS_KEY, example, outputs)}
    (loss, _), g = import_user_graphs(texts, outputs), Graph(name="loss")
    assert loss is not None
    g.inputs = [port("z", (BATCH, *outputs)), loss.graph.inputs[1]]
    g.outputs = [port(step_contract.LOSS, ()), port("dz", (BATCH, *outputs))]
    g.emit("Identity", write_loss(g, "z", outputs, Features(loss=CUSTOM_LOSS), loss), out="dz")
    return OnnxSession(g.to_bytes(), training=True)


def agrees(name: str, z: Array, y: Array) -> None:
    got = session(name, z.shape[1:]).run({"z": z, step_contract.Y: y})
    oracle = getattr(torch_losses, name.partition("_")[0])
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = torch.tensor(z, dtype=dtype, requires_grad=True)
        each = oracle(leaf, torch.tensor(y, dtype=dtype if y.dtype.kind == "f" else None))
        each.mean().backward()
        assert leaf.grad is not None
        values = {step_contract.LOSS: each.mean(), "dz": leaf.grad}
        results.append({k: v.detach().numpy() for k, v in values.items()})
    exact, usual = results
    floor = 2e-7 * (1 + float(np.abs(z).max()))
    for key, value in exact.items():
        off = float(np.max(np.abs(got[key] - value)))
        assert off <= floor or error(got[key], value) <= max(1e-6, 2 * error(usual[key], value)), key


sizes = st.sampled_from([0.1, 1.0, 10.0])


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 5), steps=st.sampled_from([1, 3, 8]), size=sizes, seed=st.integers(0, 999))
def test_ctc_is_torchs(batch: int, steps: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = (size * rng.standard_normal((batch, 4, steps))).astype(np.float32)
    # Of any length: some repeat labels, some are too long for the steps; samples end at a step of their own.
    ends = rng.integers(1, steps + 1, (batch, 1))
    lengths = np.minimum(rng.integers(0, steps + 1, (batch, 1)), ends)
    y = np.where(np.arange(steps) < lengths, rng.integers(1, 4, (batch, steps)), 0)
    agrees("ctc", z, np.where(np.arange(steps) < ends, y, -1))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["infonce", "infonce_of_views", "triplet"]), batch=st.integers(1, 9),
    width=st.sampled_from([2, 7]), labels=st.integers(1, 9), size=sizes, seed=st.integers(0, 999),
)  # fmt: skip
def test_losses_of_batches_are_torchs(name: str, batch: int, width: int, labels: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (batch, 2, width) if name == "infonce_of_views" else (batch, width)
    agrees(name, (size * rng.standard_normal(shape) + 1).astype(np.float32), rng.integers(0, labels, batch))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["dice", "focal"]), batch=st.integers(1, 5), shape=st.sampled_from([(3,), (2, 3)]),
    size=sizes, kind=st.sampled_from(["none", "all", "some", "shares"]), seed=st.integers(0, 999),
)  # fmt: skip
def test_losses_of_masks_are_torchs(
    name: str, batch: int, shape: tuple[int, ...], size: float, kind: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    z = (size * rng.standard_normal((batch, 2, *shape))).astype(np.float32)
    y = rng.random(z.shape)
    agrees(name, z, {"none": 0 * y, "all": 0 * y + 1, "some": y < 0.3, "shares": y}[kind].astype(np.float32))


@pytest.mark.parametrize("name", ["ctc", "infonce", "triplet"])
@pytest.mark.parametrize("size", [0.0, 1e15])
def test_extreme_outputs_give_finite_losses(name: str, size: float) -> None:
    z = (size * np.sign(np.random.default_rng(2).standard_normal((6, 3, 4)))).astype(np.float32)
    y = np.array([[1, 2, 0, 0]] * 6) if name == "ctc" else np.array([0, 0, 1, 1, 2, 0])
    z = z if name == "ctc" else z[:, 0]
    got = session(name, z.shape[1:]).run({"z": z, step_contract.Y: y})
    assert all(np.isfinite(v).all() for v in got.values())


class Embedding(nn.Sequential):
    input_shape = (6,)

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def test_a_board_trains_by_an_examples_loss() -> None:
    torch.manual_seed(0)
    model, y = fx.load(Embedding(), loss=own_losses.infonce), np.arange(16) % 4
    recipe = Recipe(loss=CUSTOM_LOSS, batch_size=16, epochs=30, lr=0.05)
    x = np.random.default_rng(3).standard_normal((16, 6)).astype(np.float32)
    trainer = Trainer(training_graph(model, recipe.features).to_bytes())
    task = TrainingTask(recipe, model.architecture.classes, 0, "a", 1)
    result = trainer.train(model.tensors, LocalData(x, y, x[:0], y[:0]), task)
    assert result.loss_last < 0.75 * result.loss_first
    with pytest.raises(DataError, match="expected whole numbers"):
        trainer.train(model.tensors, LocalData(x, y.astype(np.float32), x[:0], y[:0]), task)


def test_a_board_learns_a_teachers_outputs() -> None:
    torch.manual_seed(1)
    teacher, model = Embedding(), fx.load(Embedding())
    x = np.random.default_rng(3).standard_normal((32, 6)).astype(np.float32)
    y = 3 * teacher(torch.tensor(x)).detach().numpy()
    recipe = Recipe(loss="distill", distill_temperature=3, batch_size=8, epochs=40, lr=0.05)
    trainer = Trainer(training_graph(model, recipe.features).to_bytes())
    outputs = np.asarray(OnnxSession(model.graph.to_bytes()).run({"x": x})["logits"])
    before = trainer.objective(recipe, model.architecture.classes)(outputs, y)
    exact, aim = (torch.tensor(v, dtype=torch.float64) for v in (outputs, y))
    shares = functional.kl_div((exact / 3).log_softmax(1), (aim / 3).log_softmax(1), reduction="none", log_target=True)
    assert before.loss == pytest.approx(float(9 * shares.sum(1).mean()), rel=1e-5)
    assert before.accuracy is None
    result = trainer.train(model.tensors, LocalData(x, y, x[:0], y[:0]), TrainingTask(recipe, 4, 0, "a", 1))
    assert result.loss_last < 0.2 * result.loss_first


class Regressor(nn.Linear):
    input_shape = (6,)

    def __init__(self) -> None:
        super().__init__(6, 1)


def test_one_class_has_nothing_to_learn_from_a_teacher() -> None:
    with pytest.raises(ModelError, match=r"\[n, 1\]"):
        training_graph(fx.load(Regressor()), Features(loss="distill"))
