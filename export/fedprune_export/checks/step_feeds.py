"""A training step on trial: random labels, all its inputs, and what its loss should be."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune.model import step_contract as feeds_of
from fedprune.model.recipe import Recipe

Array = npt.NDArray[Any]

_SHARE = 0.7  # λ on trial: a step that ignores it, or the partners, has another loss


def random_labels(recipe: Recipe, samples: int, outputs: int, seed: int = 0) -> Array:
    """Labels that a recipe's loss takes. Returns int64 [samples] for classes, else float32 [samples, outputs]."""
    random = np.random.default_rng(seed)
    if recipe.loss == "cross_entropy":
        return random.integers(0, outputs, samples)
    if recipe.loss == "bce":
        return random.integers(0, 2, (samples, outputs)).astype(np.float32)
    return random.standard_normal((samples, outputs), np.float32)


def step_feeds(
    inputs: Collection[str], recipe: Recipe, tensors: Mapping[str, Array], x: Array, y: Array, outputs: int
) -> dict[str, Array]:
    """All inputs of a first training step on one whole batch; where labels can be mixed, each is with another's.

    Raises `ModelError` if the graph has an input that is not in the contract, or lacks x, y or a tensor.

    Args:
        tensors: Weights and statistics; the anchors are the same.
    """
    feeds: dict[str, Array] = {step_contract.X: x, step_contract.Y: y}
    feeds |= feeds_of.first_step(recipe, tensors, inputs, len(x), outputs)
    if step_contract.Y_PARTNER in inputs:
        feeds |= {step_contract.Y_PARTNER: np.roll(y, 1), step_contract.Y_SHARE: np.array(_SHARE, np.float32)}
    missing = [n for n in (step_contract.X, step_contract.Y, *tensors) if n not in inputs]
    if missing:
        raise ModelError("the training step lacks inputs", got=", ".join(missing[:5]))
    strange = sorted(set(inputs) - set(feeds))
    if strange:
        raise ModelError(
            "the training step has inputs that fedprune or the bundle's recipe doesn't know",
            got=", ".join(strange[:5]),
            hint="Export the bundle again with this version.",
        )
    return feeds


def loss(recipe: Recipe, logits: Array, feeds: Mapping[str, Array]) -> float:
    """The data loss of a recipe, of the model's outputs, in float64; all classes weigh the same.

    Args:
        logits: [n, outputs].
        feeds: What the step was fed, as `step_feeds` makes it: labels and, with mixup, those of the partners.
    """
    y = feeds[step_contract.Y]
    z = logits.astype(np.float64)
    if recipe.loss == "cross_entropy":
        z = z - z.max(axis=1, keepdims=True)
        logs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        rows, share = np.arange(len(y)), float(feeds.get(step_contract.Y_SHARE, 1.0))
        own = share * logs[rows, y] + (1 - share) * logs[rows, feeds.get(step_contract.Y_PARTNER, y)]
        return float(-np.mean((1 - recipe.label_smoothing) * own + recipe.label_smoothing * logs.mean(axis=1)))
    if recipe.loss == "bce":
        return float(np.mean(np.maximum(z, 0) - z * y + np.log1p(np.exp(-np.abs(z)))))
    error = np.abs(z - y)
    if recipe.loss == "mse":
        return float(np.mean(error**2))
    delta = recipe.huber_delta
    return float(np.mean(np.where(error <= delta, 0.5 * error**2, delta * (error - 0.5 * delta))))
