"""Losses read classes on the axis of the last layer's channels; where nothing tells it, only as the user says."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.conversion import onnx_file
from fedprune_export.importing import import_onnx, load
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.oracles.gradient_distance import Trained, torchs_gradients

pytestmark = pytest.mark.torch

STEPS = 6
"""As many as there are classes, so that sizes don't tell which axis is which."""


class Tagger(nn.Module):
    """Convolutions and linear layers over [n, features, steps], whose outputs end on the axes that `end` names."""

    input_shape = (4, STEPS)

    def __init__(self, end: str) -> None:
        super().__init__()
        self.end, self.first, self.scores = end, nn.Conv1d(4, 8, 1), nn.Conv1d(8, STEPS, 1)
        self.linear = nn.Linear(8, STEPS)
        self.over_steps = nn.Linear(STEPS, STEPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        if self.end == "linear":
            return torch.as_tensor(self.linear(hidden.transpose(1, 2)))
        if self.end == "rows":
            return torch.as_tensor(self.linear(hidden.transpose(1, 2).reshape(-1, 8)).reshape(-1, STEPS, STEPS))
        scores = self.scores(hidden)
        if self.end == "both":
            scores = self.over_steps(scores)
        return torch.as_tensor(scores.transpose(1, 2) if self.end == "turned" else scores)


class Language(nn.Module):
    """Logits of tokens by the table that embeds them, which keeps its rows."""

    input_shape, input_dtype = (STEPS,), torch.int64

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(tokens, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(self.table(ids))) @ self.table.weight.T


def check_training(module: nn.Module, model: Model, axis: int) -> None:
    """Gradients are torch's over the classes on an axis of the module's outputs, which the written file keeps."""
    rng = np.random.default_rng(0)
    is_text = isinstance(module, Language)
    x = rng.integers(0, 5, (3, STEPS)) if is_text else rng.standard_normal((3, 4, STEPS)).astype(np.float32)
    y = rng.integers(0, STEPS, (3, STEPS))
    trained = Trained(model)
    with torch.no_grad():
        outputs = module(torch.from_numpy(x))
    expected = torchs_gradients(
        module, model.tensors, trained.names, x, y, torch.float64,
        lambda logits, labels: functional.cross_entropy(logits.movedim(axis, 1), labels),
    )  # fmt: skip
    for name, gradient in trained.gradients(model.tensors, x, y).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-6)
    written = onnx_file(model.graph, model.tensors, "net")
    *_, last = OnnxSession(written).run({"x": x}).values()
    np.testing.assert_allclose(last, outputs.numpy(), rtol=1e-4, atol=1e-5)
    assert import_onnx(written, "net").architecture == model.architecture


@pytest.mark.parametrize(("end", "axis"), [("linear", 2), ("rows", 2), ("turned", 2), ("convolution", 1)])
def test_classes_are_the_channels_of_the_last_layer(end: str, axis: int) -> None:
    module = Tagger(end)
    model = load(module, loss="cross_entropy", name="net")
    assert any(f"on axis {axis}" in note for note in model.notes) is (axis != 1)
    check_training(module, model, axis)
    # Losses of values take outputs as they are; without a loss at the import nothing is trained on the wrong axis.
    for loss in (None, "mse"):
        plain = load(module, loss=loss, name="net")
        training_graph(plain, Features(loss="mse"))
        assert not any("axis" in note for note in plain.notes)
    check_hints(module, plain, [axis] if axis != 1 else [])


def check_hints(module: nn.Module, model: Model, axes: list[int]) -> None:
    """Training with classes is refused, and each option that the refusal names works."""
    if not axes:
        training_graph(model, Features())
        return
    with pytest.raises(ModelError, match="axis") as caught:
        training_graph(model, Features())
    assert [int(axis) for axis in re.findall(r"--class-axis (\d)", caught.value.hint)] == axes
    for axis in axes:
        check_training(module, load(module, class_axis=axis, name="net"), axis)


@pytest.mark.parametrize("module", [Tagger("both"), Language(STEPS)], ids=["two layers' channels", "a table's rows"])
def test_where_nothing_tells_training_is_refused_until_the_axis_is_given(module: nn.Module) -> None:
    check_hints(module, load(module, loss="cross_entropy", name="net"), [1, 2])


def test_sizes_of_samples_tell_where_layers_do_not() -> None:
    module = Language(STEPS + 3)
    check_training(module, load(module, loss="cross_entropy", name="net"), 2)


def test_the_axis_that_is_given_wins_and_must_exist() -> None:
    module = Tagger("linear")
    check_training(module, load(module, loss="cross_entropy", class_axis=1, name="net"), 1)
    assert load(module, class_axis=-1).architecture.output_shape == (STEPS, STEPS)
    for axis in (0, 3, -3):
        with pytest.raises(ModelError, match="axis of the classes"):
            load(module, class_axis=axis)
