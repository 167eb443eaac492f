"""A nested start: every width of a model that was just made answers like its narrowest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from cutting import distance, inputs, outputs
from torch import nn

import nets
from fedprune.architecture import TensorKind, widths_at
from fedprune.nesting import just_made, nested
from fedprune.selection import Selection
from fedprune_export.cut import cut
from fedprune_export.graph import Graph
from fedprune_export.imported import Model
from fedprune_export.importing import export_torch, import_onnx

pytestmark = pytest.mark.torch

Imported = Callable[[str], Model]
WIDTHS = (0.25, 0.5, 0.75)


def started(model: Model) -> Model:
    """The model with a nested start."""
    graph, tensors = model.graph, nested(model.architecture, model.tensors, WIDTHS)
    new = Graph(
        nodes=graph.nodes, inputs=graph.inputs, outputs=graph.outputs, initializers={**graph.initializers, **tensors}
    )
    return Model(new, model.architecture, values=model.values)


def first_channels(model: Model, density: float) -> Selection:
    sizes = model.architecture.sizes
    return Selection.of(model.architecture, widths_at(model.architecture, density), [np.arange(n) for n in sizes])


@pytest.mark.parametrize("name", zoo.NETS)
def test_every_width_answers_like_the_narrowest(imported: Imported, name: str) -> None:
    given, model = imported(name), started(imported(name))
    x = inputs(model, 3)
    whole = outputs(cut(model, first_channels(model, 1.0)), x)

    for density in WIDTHS:
        assert distance(outputs(cut(model, first_channels(model, density)), x), whole) < 1e-5
    # Without such a start they don't; and the narrowest is as it was.
    assert distance(outputs(cut(given, first_channels(given, 0.25)), x), outputs(given.graph, x)) > 1e-2
    assert distance(outputs(cut(given, first_channels(given, 0.25)), x), whole) < 1e-5


@pytest.mark.parametrize("name", zoo.NETS)
def test_only_weights_of_pairs_that_wider_models_alone_have_are_silent(imported: Imported, name: str) -> None:
    model = imported(name)
    before, after = model.tensors, nested(model.architecture, model.tensors, WIDTHS)

    silent = {n for n in before if not np.array_equal(before[n], after[n])}
    assert silent
    assert all(np.isin(after[n], (0, *np.unique(before[n]))).all() for n in silent)
    assert all(model.architecture.by_name[n].kind is TensorKind.WEIGHT for n in silent)
    assert all(after[n].dtype == before[n].dtype for n in before)
    # Between four equal tiers ten of sixteen pairs are heard.
    square = [n for n in silent if min(before[n].shape[:2]) >= 32 and before[n].shape[0] % 4 == 0]
    assert all(0.5 < np.count_nonzero(after[n]) / after[n].size < 0.8 for n in square if "fc" not in n)


def test_a_row_that_would_hear_nothing_stays(imported: Imported) -> None:
    model = imported("lenet")
    after = nested(model.architecture, model.tensors, (0.001,))

    assert all(after[n].reshape(len(after[n]), -1).any(axis=1).all() for n in ("conv2.weight", "fc1.weight"))


def learnt(net: nn.Module, steps: int) -> nn.Module:
    """The net after some steps on four blobs of pixels."""
    torch.manual_seed(1)
    places = torch.randn(4, *net.input_shape)  # type: ignore[arg-type]
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    net.train()
    for _ in range(steps):
        y = torch.randint(4, (32,))
        loss = nn.functional.cross_entropy(net(places[y] + torch.randn(32, *places.shape[1:])), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


def fresh(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = kind()
    return net


def described(net: nn.Module) -> Model:
    return import_onnx(export_torch(net), "net")


@pytest.mark.parametrize("kind", [nets.LeNet, nets.VGG11, nets.ResNet20, nets.ConcatNet])
@pytest.mark.parametrize("steps", [0, 30])
def test_it_is_seen_whether_a_model_was_just_made(kind: Any, steps: int) -> None:
    model = described(learnt(fresh(kind), steps))
    start = nested(model.architecture, model.tensors, WIDTHS)

    assert just_made(model.architecture, model.tensors) == (steps == 0)
    assert just_made(model.architecture, start) == (steps == 0), "its own start changes nothing of that"


@pytest.mark.parametrize(
    "fill", [nn.init.orthogonal_, nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.zeros_]
)
def test_other_ways_of_making_a_model_are_seen_too(fill: Callable[[torch.Tensor], Any]) -> None:
    net = fresh(nets.LeNet)
    for parameter in net.parameters():
        if parameter.dim() > 1:
            fill(parameter)
    model = described(net)

    assert just_made(model.architecture, model.tensors)


def test_trained_statistics_alone_tell_that_a_model_was_trained() -> None:
    net = fresh(nets.ResNet20).train()
    net(torch.randn(4, 3, 32, 32))
    model = described(net.eval())

    assert not just_made(model.architecture, model.tensors)
