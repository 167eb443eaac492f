"""What the planner allows a training step of outputs for each place: no less than the arrays that live at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedprune_export as fx
from fedprune.model.recipe import CUSTOM, LOSSES, Recipe
from fedprune.planning.cost_prediction import memory_use
from fedprune.planning.costs import costs_at
from fedprune_export.ir.liveness import execution_order, live_bytes
from fedprune_export.pruning.model import Model
from fedprune_export.training.checkpointing import value_sizes
from fedprune_export.training.step_graph import training_graph

pytestmark = pytest.mark.torch


class Labelling(nn.Module):
    """A net with a small body and many classes at each place."""

    input_shape = (3, 32, 48)

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.out = nn.Conv2d(16, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(x))


@pytest.mark.parametrize(
    ("loss", "classes"),
    [
        pytest.param(loss, classes, marks=() if row % 2 == (row + column) % 3 == 0 else pytest.mark.soak)
        for row, loss in enumerate(n for n in LOSSES if n != CUSTOM)
        for column, classes in enumerate((2, 12, 40))
    ],
)
@pytest.mark.at_push(2)
def test_the_arrays_of_a_loss_are_counted(loss: str, classes: int) -> None:
    model, batch = fx.load(Labelling(classes)), 4
    recipe = Recipe(loss=loss, batch_size=batch, balance_classes=loss in ("cross_entropy", "bce"))
    needed, allowed = _needed_and_allowed(model, recipe, batch)
    assert needed <= allowed <= 2.5 * needed


def _needed_and_allowed(model: Model, recipe: Recipe, batch: int) -> tuple[int, int]:
    architecture = model.architecture
    graph = training_graph(model, recipe.features)
    sizes = value_sizes(graph, architecture, architecture.sizes, batch)
    needed = max(live_bytes(execution_order(graph), sizes.bytes, [p.name for p in graph.outputs]))
    allowed = memory_use(architecture, architecture.sizes, costs_at(architecture, architecture.sizes), recipe, batch)
    return needed, allowed.activations
