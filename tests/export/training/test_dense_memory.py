"""What the planner allows a training step of outputs for each place: no less than the arrays that live at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fedprune_export as fx
from fedprune.model.recipe import LABELS_OF, Recipe
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
        for row, loss in enumerate(
            (
                *(n for n, kind in LABELS_OF.items() if kind in ("classes", "multi", "values")),
                "bce + dice",
                "mse + distill",
            )
        )
        for column, classes in enumerate((2, 12, 40))
    ],
)
@pytest.mark.at_push(2)
def test_the_arrays_of_a_loss_are_counted(loss: str, classes: int) -> None:
    model, batch = fx.load(Labelling(classes)), 4
    recipe = Recipe(loss=loss, batch_size=batch, balance_classes=loss in ("cross_entropy", "bce"))
    needed, allowed = _needed_and_allowed(model, recipe, batch)
    assert needed <= allowed <= 2.5 * needed


class Frames(nn.Sequential):
    """Outputs [classes, steps]."""

    def __init__(self, classes: int, steps: int) -> None:
        super().__init__(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, classes, 1))
        self.input_shape = (3, steps)


class Views(nn.Sequential):
    """Outputs [views, width]."""

    input_shape = (6,)

    def __init__(self, *shape: int) -> None:
        last = nn.Linear(32, math.prod(shape))
        super().__init__(nn.Linear(6, 32), nn.ReLU(), last, *[nn.Unflatten(1, shape)][: len(shape) - 1])


@pytest.mark.parametrize(
    ("loss", "net", "batch"),
    [
        *(pytest.param("ctc", Frames(5, steps), 4, marks=pytest.mark.soak) for steps in (20, 100)),
        ("ctc", Frames(40, 100), 4),
        pytest.param("infonce", Views(16), 64, marks=pytest.mark.soak),
        ("infonce", Views(16), 256),
        ("infonce", Views(2, 16), 64),
        pytest.param("infonce", Views(2, 16), 256, marks=pytest.mark.soak),
        ("triplet", Views(16), 256),
    ],
)
def test_the_arrays_of_pairs_and_of_alignments_are_counted(loss: str, net: nn.Module, batch: int) -> None:
    needed, allowed = _needed_and_allowed(fx.load(net), Recipe(loss=loss, batch_size=batch), batch)
    assert needed <= allowed <= 2.5 * needed


def _needed_and_allowed(model: Model, recipe: Recipe, batch: int) -> tuple[int, int]:
    architecture = model.architecture
    graph = training_graph(model, recipe.features)
    sizes = value_sizes(graph, architecture, architecture.sizes, batch)
    needed = max(live_bytes(execution_order(graph), sizes.bytes, [p.name for p in graph.outputs]))
    allowed = memory_use(architecture, architecture.sizes, costs_at(architecture, architecture.sizes), recipe, batch)
    return needed, allowed.activations
