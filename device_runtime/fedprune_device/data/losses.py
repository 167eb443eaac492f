"""What a batch of a model's outputs is worth: the losses of training graphs, in numpy, and the share that is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.model.step_contract import loss_numbers
from fedprune_device.data.labels import class_presence, class_weights, log_prior, positive_weights

Array = npt.NDArray[Any]
_AT_ONCE = 2**16
"""Outputs whose losses are computed at once."""

Terms = Mapping[str, Array]
"""Arrays and numbers of the loss, by input name of the training graph."""


def data_loss(loss: str, outputs: npt.NDArray[np.float32], targets: Array, terms: Terms | None = None) -> float:
    """The data loss that a training graph computes from outputs [n, K], targets (`labels.targets`) and `loss_terms`."""
    terms = terms or {}
    if loss == "cross_entropy":
        return cross_entropy(outputs, targets, terms)
    rows = max(1, _AT_ONCE // max(1, outputs.shape[1]))
    if len(outputs) > rows:  # a mask of every sample would take several times its size in float64
        starts = range(0, len(outputs), rows)
        parts = [data_loss(loss, outputs[i : i + rows], targets[i : i + rows], terms) for i in starts]
        return float(np.average(parts, weights=[len(outputs[i : i + rows]) for i in starts]))
    z, y = outputs.astype(np.float64), targets.astype(np.float64)
    if loss == "bce":
        soft = np.log1p(np.exp(-np.abs(z))) + np.maximum(-z, 0)
        return float(np.mean((1 - y) * z + (1 + (terms.get(step_contract.CLASS_WEIGHT, np.ones(1)) - 1.0) * y) * soft))
    size = np.abs(z - y)
    if loss == "mse":
        return float(np.mean(size**2))
    c = np.minimum(size, float(terms.get(step_contract.HUBER_DELTA, 1.0)))
    return float(np.mean(c * (size - c / 2)))


def cross_entropy(logits: npt.NDArray[np.float32], y: npt.NDArray[np.int64], terms: Terms) -> float:
    """Cross-entropy of logits [n, classes] as a training graph computes it.

    `terms` are offset, mask, weights and smoothing, by input name of the graph.
    """
    z = logits.astype(np.float64)
    if step_contract.LOGIT_OFFSET in terms:
        z = z + terms[step_contract.LOGIT_OFFSET]
    if step_contract.CLASS_MASK in terms:
        z = np.where(terms[step_contract.CLASS_MASK] > 0, z, 0.0)
    z = z - z.max(axis=1, keepdims=True)
    lost = np.log(np.exp(z).sum(axis=1, keepdims=True)) - z
    weights = np.asarray(terms.get(step_contract.CLASS_WEIGHT, np.ones(z.shape[1])), np.float64)
    own = lost[np.arange(len(y)), y] * weights[y]
    smoothing = float(terms.get(step_contract.LABEL_SMOOTHING, 0.0))
    if smoothing:
        own = (1 - smoothing) * own + smoothing / z.shape[1] * (lost @ weights)
    return float(own.sum() / weights[y].sum())


def hits(loss: str, outputs: npt.NDArray[np.float32], targets: Array) -> npt.NDArray[np.bool_] | None:
    """Which samples' class is right [n], with `bce` which labels [n, K]; None where numbers are predicted."""
    if loss == "cross_entropy":
        return np.asarray(np.argmax(outputs, axis=1) == targets)
    if loss == "bce":
        return np.asarray((outputs > 0) == (targets > 0.5))
    return None


def loss_terms(y: Array, recipe: Recipe, classes: int) -> dict[str, Array]:
    """The vectors over classes and the numbers that a recipe brings into the loss, by input name of the training graph.

    `y` are all training labels, as `labels.targets` gives them.
    """
    features, out = recipe.features, dict[str, Array]()
    if features.logit_offset:
        out[step_contract.LOGIT_OFFSET] = log_prior(y, classes)
    if features.class_weight:
        out[step_contract.CLASS_WEIGHT] = (
            class_weights(y, classes) if recipe.loss == "cross_entropy" else positive_weights(y)
        )
    if features.class_mask:
        out[step_contract.CLASS_MASK] = class_presence(y, classes)
    return out | loss_numbers(recipe)
