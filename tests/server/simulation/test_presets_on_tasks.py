"""Every preset with every kind of task: it runs, or an error names what it needs before any board trains.

Every push tries each preset once and each task twice, and all pairs that are refused.
A soak tries all.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedprune_export as fx
from fedprune.core.errors import ConfigError
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find_profile
from fedprune.strategies import PRESETS
from fedprune_device.data.dataset import LocalData
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.simulation import Simulation
from support.fakes.digits_simulation import KINDS, digits_simulation
from support.nets import whole_models
from support.nets.small_nets import Reader

pytestmark = pytest.mark.torch

TRAIN_SAMPLES, TEST_SAMPLES = 18, 6


@dataclass(frozen=True)
class Task:
    """A network of `whole_models`, the recipe's loss and metric, and labels of another kind than the network's own."""

    net: str
    recipe: dict[str, Any] = field(default_factory=dict)
    labels: str = ""


TASKS = {
    "regression": Task("perceptron", {"loss": "mse", "metric": "mae"}, "values"),
    "segmentation": Task("attention_unet", {"metric": "miou"}),
    "several masks": Task("deep_lab", {"loss": "bce", "metric": "ap"}, "masks"),
    "autoencoder": Task("auto_encoder", {"loss": "mse"}, "inputs"),
    "language": Task("alibi", {"metric": "perplexity"}),
    "adapters": Task("reader"),
    "frozen adapters": Task("lora_reader"),
    "several inputs": Task("fusion", {"loss": "custom"}),
    "outputs of two layers": Task("fusion"),
    "sequences": Task("wave_net"),
    "normalised weights": Task("tcn", {"loss": "mse"}),
}

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in PRESETS if name != "autoflip"),  # which explores for long by default
    ("autoflip", {"exploration_epochs": 1}),
    ("fedobp", {}),
    ("fedprune", {"densities": [1.0, 0.5, 0.25]}),
    ("heterofl", {"densities": [1.0, 0.5, 0.25]}),
]


@functools.cache
def model_of(task: str) -> Model:
    return fx.load(Reader(), lora="8:q.weight,v.weight,wide.weight") if task == "adapters" else net_of(task)


def net_of(task: str) -> Model:
    return whole_models.whole_model(TASKS[task].net)


def random_samples(task: str, count: int, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Random samples and labels of a task."""
    rng, task_ = np.random.default_rng(seed), TASKS[task]
    if task == "adapters":
        return rng.integers(0, 11, (count, 6)), rng.integers(0, 5, count)
    x, outputs = whole_models.samples(task_.net, count, seed), net_of(task).architecture.output_shape
    if task_.labels == "values":
        return x, whole_models.normal(rng, (count, *outputs))
    if task_.labels == "masks":
        return x, rng.integers(0, 2, (count, *outputs)).astype(np.float32)
    if task_.labels == "inputs":
        return x, x
    if task_.net == "fusion" and not task_.recipe:
        return x, rng.integers(0, *outputs, count)
    return x, whole_models.labels(task_.net, count, seed)


def refused(strategy: str, options: dict[str, Any], task: str) -> bool:
    """Whether a strategy needs one layer that makes all outputs, where two make them."""
    if task == "outputs of two layers" and strategy in ("heterofl", "fedrolex"):
        return True  # the mean of label rows
    return TASKS[task].net == "fusion" and strategy == "fedper"


@pytest.mark.parametrize(
    ("strategy", "options", "task"),
    [
        pytest.param(
            strategy,
            options,
            task,
            id="-".join([strategy, *options, task]),
            marks=() if (row + column) % 11 == 0 or refused(strategy, options, task) else pytest.mark.soak,
        )
        for row, (strategy, options) in enumerate(OPTIONS)
        for column, task in enumerate(t for t in TASKS if t != "normalised weights")
    ],
)
def test_it_runs_or_names_what_it_needs(tmp_path: Path, strategy: str, options: dict[str, Any], task: str) -> None:
    if refused(strategy, options, task):
        with pytest.raises(ConfigError, match=r"job\.options\."):
            simulation(tmp_path, strategy, options, task)
        return
    run = simulation(tmp_path, strategy, options, task)
    run.run()
    record = run.record()
    assert all(row.updates for row in record.rounds)
    assert np.isfinite(record.last.metrics.get("loss") or 0.0)
    assert record.measure == recipe_of(task).judged_by


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("fiarse", {"densities": [0.02]}), ("autoflip", {"exploration_epochs": 1, "pruned_share": 0.9})],
)
def test_masks_that_empty_directions_of_weight_norm_give_numbers(
    tmp_path: Path, strategy: str, options: dict[str, Any]
) -> None:
    run = simulation(tmp_path, strategy, options, "normalised weights")
    run.run()
    record = run.record()
    assert [row.updates for row in record.rounds] == [len(KINDS)] * 2
    assert np.isfinite(record.last.metrics.get("loss") or np.nan)


def recipe_of(task: str) -> Recipe:
    return Recipe(batch_size=9, lr=1e-3, **TASKS[task].recipe)


def simulation(tmp_path: Path, strategy: str, options: dict[str, Any], task: str) -> Simulation:
    """Two rounds, not yet begun. Raises `ConfigError` if the strategy refuses the task."""
    fleet = []
    for number, name in enumerate(KINDS):
        x, y = random_samples(task, TRAIN_SAMPLES + TEST_SAMPLES, number)
        data = LocalData(x[:TRAIN_SAMPLES], y[:TRAIN_SAMPLES], x[TRAIN_SAMPLES:], y[TRAIN_SAMPLES:])
        fleet.append(
            VirtualDevice(name, find_profile(name), data.with_validation(0.2 if strategy == "fedprune" else 0.0))
        )
    evaluation = random_samples(task, TEST_SAMPLES, 9)
    return digits_simulation(
        tmp_path, model=model_of(task), fleet=fleet, evaluation=evaluation, calibration=evaluation[0], rounds=2,
        strategy=strategy, options=options, recipe=recipe_of(task),
    )  # fmt: skip
