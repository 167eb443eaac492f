"""Batch norms without trainable vectors: nothing is trained that the module doesn't have, and channels can be cut."""

import numpy as np
import pytest
import torch
from torch import nn

from fedprune.model.features import Features
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.oracles.cutting import cut_error, random_selection
from support.oracles.gradient_distance import Trained

pytestmark = pytest.mark.torch

F32 = np.dtype(np.float32)


class Plain(nn.Module):
    """Two convolutions with norms that only normalise."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 6, 3, bias=False)
        self.na, self.nb = nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(6, affine=False)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.na(self.a(x)))
        return self.fc(torch.tanh(self.nb(self.b(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def module() -> Plain:
    torch.manual_seed(0)
    out = Plain()
    with torch.no_grad():
        for norm in (out.na, out.nb):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return out


@pytest.fixture(scope="module")
def model(module: Plain) -> Model:
    return import_onnx(export_torch(module), "plain")


def test_trainable_is_what_the_module_trains(module: Plain, model: Model) -> None:
    assert {t.name for t in model.architecture.trainable} == {n for n, _ in module.named_parameters()}
    assert len(model.architecture.statistics) == 4


@pytest.mark.parametrize("density", [0.25, 0.5, 0.75])
def test_channels_can_be_cut(model: Model, density: float) -> None:
    assert [g.size for g in model.architecture.groups] == [8, 6]
    assert cut_error(model, random_selection(model, density, seed=1)) < 1e-5


def test_gradients_are_as_exact_as_torchs(module: Plain, model: Model) -> None:
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((6, 3, 8, 8)).astype(np.float32), rng.integers(0, 4, 6)
    assert Trained(model).distances(module, model.tensors, [(x, y)]).is_near


def _scaled_model(scale: list[float], shift: list[float]) -> Model:
    """A network whose norm has these constants."""
    rng = np.random.default_rng(0)
    graph = Graph(inputs=[Port("image", F32, ("N", 5))])
    for name, shape in (("a", (5, 4)), ("b", (4, 6)), ("c", (6, 3))):
        graph.initializers[name] = rng.standard_normal(shape).astype(np.float32)
    graph.initializers |= {"mean": rng.standard_normal(4).astype(np.float32), "var": np.full(4, 0.5, np.float32)}
    constants = [graph.constant(v, np.float32) for v in (scale, shift)]
    value = graph.emit("BatchNormalization", graph.emit("MatMul", "image", "a"), *constants, "mean", "var")
    value = graph.emit("MatMul", graph.emit("Relu", value), "b")
    value = graph.emit("MatMul", graph.emit("Relu", value), "c")
    graph.outputs = [Port(value, F32, ("N", 3))]
    return import_onnx(graph.to_bytes(), "net")


def test_constants_that_are_equal_are_shortened() -> None:
    model = _scaled_model([2.0] * 4, [0.3] * 4)
    graph = at_widths(model, [1, 6])
    (norm,) = [n for n in graph.nodes if n.op == "BatchNormalization"]
    assert [graph.initializers[i].tolist() for i in norm.inputs[1:3]] == [[2.0], [np.float32(0.3)]]
    assert cut_error(model, random_selection(model, 0.5, seed=1)) < 1e-5


def test_constants_that_differ_fix_their_channels_and_are_named() -> None:
    model = _scaled_model([1.0, 2.0, 3.0, 4.0], [0.0] * 4)
    assert [g.size for g in model.architecture.groups] == [6]
    assert any("constant for each channel" in note for note in model.notes)
    assert cut_error(model, random_selection(model, 0.5, seed=1)) < 1e-5
    training_graph(model, Features())
