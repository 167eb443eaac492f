"""Feeds of a training step for trials: every input of the contract in `fedprune.step`, with random labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune import step
from fedprune.errors import ModelError
from fedprune.recipe import Recipe

Array = npt.NDArray[Any]
Inputs = Mapping[str, tuple[str, tuple[int | str | None, ...]]]
"""Type and shape by name, as a session lists them."""

_TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64}


def random_labels(recipe: Recipe, samples: int, outputs: int, seed: int = 0) -> Array:
    """Labels that a recipe's loss takes.

    Args:
        recipe: The local training.
        samples: How many.
        outputs: Entries of the model's output.
        seed: Of the random numbers.

    Returns:
        int64 [samples] for classes, else float32 [samples, outputs].
    """
    random = np.random.default_rng(seed)
    if recipe.loss == "cross_entropy":
        return random.integers(0, outputs, samples)
    if recipe.loss == "bce":
        return random.integers(0, 2, (samples, outputs)).astype(np.float32)
    return random.standard_normal((samples, outputs), np.float32)


def step_feeds(
    inputs: Inputs, recipe: Recipe, tensors: Mapping[str, Array], x: Array, y: Array, outputs: int
) -> dict[str, Array]:
    """All inputs of a first training step on one whole batch.

    Args:
        inputs: The training graph's inputs.
        recipe: The local training.
        tensors: Weights and statistics; the anchors are the same.
        x: Samples.
        y: Their labels.
        outputs: Entries of the model's output.

    Raises:
        ModelError: The graph has an input that is not in the contract, or lacks x, y or a tensor.
    """
    numbers = {
        step.LR: recipe.lr,
        step.MOMENTUM: recipe.momentum,
        step.WEIGHT_DECAY: recipe.weight_decay,
        step.BETA1: recipe.beta1,
        step.BETA2: recipe.beta2,
        step.EPSILON: recipe.epsilon,
        step.STEP_NUMBER: 1,
        step.LABEL_SMOOTHING: recipe.label_smoothing,
        step.HUBER_DELTA: recipe.huber_delta,
        step.CLIP_NORM: recipe.clip_norm,
        step.DIVISOR: len(x),
    }
    vectors = {step.LOGIT_OFFSET: 0.0, step.CLASS_WEIGHT: 1.0, step.CLASS_MASK: 1.0}
    missing = [n for n in (step.X, step.Y, *tensors) if n not in inputs]
    if missing:
        raise ModelError("the training step lacks inputs", got=", ".join(missing[:5]))
    feeds: dict[str, Array] = {}
    for name, (kind, _) in inputs.items():
        base = name.partition("::")[0]
        if name == step.X:
            value = x
        elif name == step.Y:
            value = y
        elif name in tensors:
            value = tensors[name]
        elif name in numbers:
            value = np.array(numbers[name])
        elif name in vectors:
            value = np.full(outputs, vectors[name])
        elif base in tensors:
            value = _extra(name, base, recipe, tensors[base])
        else:
            raise ModelError(
                f"the training step has an input {name} that fedprune doesn't know",
                hint="Export the bundle again with this version.",
            )
        feeds[name] = np.ascontiguousarray(value, _TYPES.get(kind)).reshape(np.shape(value))
    return feeds


def _extra(name: str, tensor: str, recipe: Recipe, value: Array) -> Array:
    """What a tensor brings besides itself: zero unless it has a meaning."""
    if name == step.anchor(tensor):
        return value
    if name == step.strength(tensor):
        return np.array(recipe.proximal)
    if name == step.mask(tensor):
        return np.ones_like(value)
    return np.zeros_like(value)


def loss(recipe: Recipe, logits: Array, y: Array) -> float:
    """The data loss of a recipe, of the model's outputs, in float64; all classes weigh the same.

    Args:
        recipe: The local training.
        logits: [n, outputs].
        y: Labels, as `random_labels` makes them.
    """
    z = logits.astype(np.float64)
    if recipe.loss == "cross_entropy":
        z = z - z.max(axis=1, keepdims=True)
        logs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        own = logs[np.arange(len(y)), y]
        return float(-np.mean((1 - recipe.label_smoothing) * own + recipe.label_smoothing * logs.mean(axis=1)))
    if recipe.loss == "bce":
        return float(np.mean(np.maximum(z, 0) - z * y + np.log1p(np.exp(-np.abs(z)))))
    error = np.abs(z - y)
    if recipe.loss == "mse":
        return float(np.mean(error**2))
    delta = recipe.huber_delta
    return float(np.mean(np.where(error <= delta, 0.5 * error**2, delta * (error - 0.5 * delta))))
