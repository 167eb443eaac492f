"""Nested widths: a model that answers at every width like its narrowest, and models that were just made."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedprune.model.architecture import TensorKind, widths_at
from fedprune.model.initial_values import is_untrained
from fedprune.model.nesting import nest_widths
from fedprune.model.selection import Selection
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.ir.graph import Graph
from fedprune_export.pruning.cut import cut
from fedprune_export.pruning.model import Model
from support.nets import published_nets as zoo
from support.nets import small_nets as nets
from support.oracles.cutting import distance, inputs, outputs

pytestmark = pytest.mark.torch

Imported = Callable[[str], Model]
WIDTHS = (0.25, 0.5, 0.75)


def start_nested(model: Model) -> Model:
    """The model with a nested start."""
    graph, tensors = (
        model.graph,
        nest_widths(model.architecture, model.tensors, [widths_at(model.architecture, d) for d in WIDTHS]),
    )
    new = Graph(
        nodes=graph.nodes, inputs=graph.inputs, outputs=graph.outputs, initializers={**graph.initializers, **tensors}
    )
    return Model(new, model.architecture, values=model.values)


def first_channels(model: Model, density: float) -> Selection:
    sizes = model.architecture.sizes
    return Selection.of(model.architecture, widths_at(model.architecture, density), [np.arange(n) for n in sizes])


@pytest.mark.parametrize("name", zoo.MARKED)
def test_every_width_answers_like_the_narrowest(imported: Imported, name: str) -> None:
    original, model = imported(name), start_nested(imported(name))
    x = inputs(model, 3)
    full_outputs = outputs(cut(model, first_channels(model, 1.0)), x)
    for density in WIDTHS:
        assert distance(outputs(cut(model, first_channels(model, density)), x), full_outputs) < 1e-5
    # Without such a start they don't; and the narrowest is as it was.
    assert distance(outputs(cut(original, first_channels(original, 0.25)), x), outputs(original.graph, x)) > 1e-2
    assert distance(outputs(cut(original, first_channels(original, 0.25)), x), full_outputs) < 1e-5


@pytest.mark.parametrize("name", zoo.MARKED)
def test_only_weights_of_pairs_that_wider_models_alone_have_are_silent(imported: Imported, name: str) -> None:
    model = imported(name)
    before, after = (
        model.tensors,
        nest_widths(model.architecture, model.tensors, [widths_at(model.architecture, d) for d in WIDTHS]),
    )
    silent = {n for n in before if not np.array_equal(before[n], after[n])}
    assert silent
    assert all(np.isin(after[n], (0, *np.unique(before[n]))).all() for n in silent)
    assert all(model.architecture.by_name[n].kind is TensorKind.WEIGHT for n in silent)
    assert all(after[n].dtype == before[n].dtype for n in before)
    # Between four equal tiers ten of sixteen pairs are heard.
    square = [n for n in silent if min(before[n].shape[:2]) >= 16 and before[n].shape[0] % 4 == 0]
    assert square or name == "concat_net", "whose layers are narrow"
    assert all(0.5 < np.count_nonzero(after[n]) / after[n].size < 0.8 for n in square if "fc" not in n)


class Reads(nn.Module):
    """A layer between two convolutions that make and read its channels."""

    input_shape = (3, 8, 8)

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Conv2d(3, 16, 3), layer, nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(torch.relu(self.first(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("layer", "silent"),
    [
        (lambda: nn.ConvTranspose2d(16, 16, 3, groups=4), False),
        (lambda: nn.Conv2d(16, 16, 1), True),
        (lambda: nn.Conv2d(16, 16, 3, groups=16), False),
    ],
)
def test_what_is_silent_is_an_input_of_a_sum_and_nothing_else(layer: Callable[[], nn.Module], silent: bool) -> None:
    model = import_module(nets.randomise_norms(Reads(layer())))
    start = nest_widths(model.architecture, model.tensors, [widths_at(model.architecture, d) for d in WIDTHS])
    name = "layer.weight"
    assert np.array_equal(start[name], model.tensors[name]) is not silent
    output_axis = next(n.output_axis for n in model.architecture.layers if n.weight == name)
    quiet = ~start[name].any(axis=tuple(i for i in range(start[name].ndim) if i != output_axis))
    assert not quiet.any(), "every channel hears something"


def learnt(net: nn.Module, steps: int) -> nn.Module:
    """The net after some steps on four blobs of pixels."""
    torch.manual_seed(1)
    centres = torch.randn(4, *net.input_shape)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    net.train()
    for _ in range(steps):
        y = torch.randint(4, (32,))
        loss = nn.functional.cross_entropy(net(centres[y] + torch.randn(32, *centres.shape[1:])), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def fresh(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = kind()
    return net


def import_module(net: nn.Module) -> Model:
    return import_onnx(export_torch(net), "net")


@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=pytest.mark.soak) for k in (nets.VGG11, nets.ResNet20)), nets.ConcatNet]
)
@pytest.mark.parametrize("steps", [0, 1])
def test_normalisations_tell_whether_a_model_was_just_made(kind: Any, steps: int) -> None:
    model = import_module(learnt(fresh(kind), steps))
    start = nest_widths(model.architecture, model.tensors, [widths_at(model.architecture, d) for d in WIDTHS])
    assert is_untrained(model.architecture, model.tensors) == (steps == 0)
    assert is_untrained(model.architecture, start) == (steps == 0), "its own start changes nothing of that"


@pytest.mark.parametrize("steps", [0, 1, 30])
def test_without_normalisations_the_bounds_of_drawn_weights_tell_whether_a_model_was_just_made(steps: int) -> None:
    model = import_module(learnt(fresh(nets.LeNet), steps))
    assert is_untrained(model.architecture, model.tensors) == (steps == 0)
