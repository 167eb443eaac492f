"""The tasks of `benchmarks.tasks` on a few random samples, with their own networks, recipes, losses and metrics."""

import functools
from typing import Any

import numpy as np
import torch

import fedprune_export as fx
from benchmarks.tasks import adapters, nets
from benchmarks.tasks.tasks import TASKS
from fedprune_export.pruning.model import Model

Array = np.ndarray[Any, Any]


def module(name: str) -> torch.nn.Module:
    """A task's network, the same each time; that of adapters on a base that nothing has trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if TASKS[name].net is not adapters.Speaker:
            return TASKS[name].net()
        trained, adapters.trained_base = adapters.trained_base, nets.Characters
        try:
            return adapters.Speaker()
        finally:
            adapters.trained_base = trained


@functools.cache
def task_model(name: str) -> Model:
    """A task's model for its own settings."""
    return fx.load(module(name), **TASKS[name].own)


def samples(name: str, count: int, seed: int) -> tuple[Array, Array]:
    """Random samples of a task with labels of its kind."""
    rng, model = np.random.default_rng(seed), task_model(name)
    inputs, outputs = model.architecture.input_shape, model.architecture.output_shape
    words = getattr(TASKS[name].net, "input_dtype", "") == "int64"
    x = rng.integers(0, outputs[0], (count, *inputs)) if words else rng.standard_normal((count, *inputs), np.float32)
    if name == "embedding":
        return x, rng.integers(0, 4, count)
    if TASKS[name].recipe.loss == "custom":  # shares of a grid's cells, as boxes are
        return x, rng.random((count, *outputs), np.float32)
    if TASKS[name].recipe.loss == "mse":
        return x, rng.standard_normal((count, *outputs), np.float32)
    return x, rng.integers(0, outputs[0], (count, *outputs[1:]))
