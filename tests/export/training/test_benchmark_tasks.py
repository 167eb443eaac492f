"""Gradients of the networks and losses of `benchmarks.tasks` beside torch's, at full and at half width."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.tasks.runs import torch_loss
from benchmarks.tasks.tasks import TASKS
from fedprune.model.selection import Selection
from fedprune_export.pruning.cut import cut
from support.marks import marked
from support.nets import benchmark_tasks
from support.oracles.cutting import random_selection
from support.oracles.gradient_distance import TENSOR, Trained, norm, torchs_gradients

pytestmark = pytest.mark.torch

BATCHES, SIZE = 5, 4

FLIPPING = "segmentation"
"""In most batches a few of its ReLUs flip: in 24 batches of four at full width, 43 of ours and 44 of torch's float32.

A flip puts either gradient 1e-3 off, so that which batches have one decides the comparison. With every ReLU of float64
on the side on which the engine had it, our distance was 0.89 of torch's (medians of these batches; at half width, too).
"""


LONG = ("adapters", "detection", "forecasting", "forecasting-lstm", "fusion", "language", "speech")


def trained_task(name: str) -> Trained:
    torch.set_num_threads(1)
    features = replace(TASKS[name].recipe.features, optimizer="sgd")  # on which gradients don't depend
    model = benchmark_tasks.imported(name, base=None)  # a float32 one, as torch's
    return Trained(model, features, lambda outputs, labels: torch_loss(TASKS[name], outputs, labels))


@pytest.mark.parametrize("name", marked((n for n in TASKS if n != FLIPPING), soak=LONG))
def test_gradients_are_as_exact_as_torchs(name: str) -> None:
    trained = trained_task(name)
    model = trained.model
    batches = [benchmark_tasks.samples(name, SIZE, seed) for seed in range(BATCHES)]
    half = random_selection(model, 0.5, seed=3)
    whole = Selection.full(model.architecture)
    for net, selection in ((benchmark_tasks.module(name), whole), (cut(model, half), half)):
        far = trained.distances(net, selection.gather(model.tensors), batches)
        assert far.near, (selection.whole, far.ours, far.torch)
        assert far.excess(far.worst) <= TENSOR, (selection.whole, far.worst)


@pytest.mark.soak
def test_gradients_are_as_exact_as_torchs_on_the_same_sides_of_relus() -> None:
    trained = trained_task(FLIPPING)
    model = trained.model
    batches = [benchmark_tasks.samples(FLIPPING, SIZE, seed) for seed in range(BATCHES)]
    module, whole = benchmark_tasks.module(FLIPPING), Selection.full(model.architecture)
    by_module, by_graph = (
        torchs_gradients(net, model.tensors, trained.names, *batches[0], torch.float64, trained.loss)
        for net in (module, model.graph)
    )
    assert norm(by_module[n] - by_graph[n] for n in trained.names) < 1e-9 * norm(by_module.values())
    half = random_selection(model, 0.5, seed=3)
    for net, selection in ((model.graph, whole), (cut(model, half), half)):
        far = trained.distances_on_own_sides(net, selection.gather(model.tensors), batches)
        assert not far.flipped([*far.ours, *far.torch])
        assert far.near, (selection.whole, far.ours, far.torch)
        assert far.excess(far.worst) <= TENSOR, (selection.whole, far.worst)
