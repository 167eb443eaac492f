"""Losses of outputs in numpy and float64: what training graphs must compute."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.model import step_contract

Array = npt.NDArray[Any]

Terms = Mapping[str, Array]  # arrays and numbers of the loss, by input name of the training graph


def data_loss(loss: str, outputs: npt.NDArray[np.float32], targets: Array, terms: Terms | None = None) -> float:
    """The data loss that a training graph computes from outputs [n, K], labels and `loss_terms`."""
    terms = terms or {}
    if loss == "cross_entropy":
        return cross_entropy(outputs, targets, terms)
    z, y = outputs.astype(np.float64), targets.astype(np.float64)
    if loss == "bce":
        soft = np.log1p(np.exp(-np.abs(z))) + np.maximum(-z, 0)
        return float(np.mean((1 - y) * z + (1 + (terms.get(step_contract.CLASS_WEIGHT, np.ones(1)) - 1.0) * y) * soft))
    size = np.abs(z - y)
    if loss == "mse":
        return float(np.mean(size**2))
    c = np.minimum(size, float(terms.get("huber_delta", 1.0)))
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
    target_loss = lost[np.arange(len(y)), y] * weights[y]
    smoothing = float(terms.get(step_contract.LABEL_SMOOTHING, 0.0))
    if smoothing:
        target_loss = (1 - smoothing) * target_loss + smoothing / z.shape[1] * (lost @ weights)
    return float(target_loss.sum() / weights[y].sum())
