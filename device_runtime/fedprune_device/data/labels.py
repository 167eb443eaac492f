"""Labels as training graphs take them, what they imply for losses and predictions, and these losses in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError
from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.model.step_contract import loss_numbers

Array = npt.NDArray[Any]

_SMOOTHING = 0.1

_WANTED = {
    "cross_entropy": "whole numbers [n], the class of every sample",
    "bce": "numbers from 0 to 1 [n, {}], one per sample and class",
    "mse": "numbers [n, {}], what to predict for every sample",
    "huber": "numbers [n, {}], what to predict for every sample",
}


def targets(y: Array, loss: str, outputs: int) -> Array:
    """Labels as a training graph takes them: int64 [n] with cross-entropy, else float32 [n, outputs].

    Raises `DataError` if they are of another kind, or out of range.
    """
    if loss == "cross_entropy":
        if y.dtype.kind != "i" or y.ndim != 1:
            hint = "Save classes as whole numbers: y.astype('int64')." if y.ndim == 1 else ""
            raise _unfit(y, loss, outputs, hint)
        if len(y) and int(y.max()) >= outputs:
            raise DataError(
                "a label is out of range",
                expected=f"0 to {outputs - 1} ({outputs} classes)",
                got=int(y.max()),
                hint="Number the classes from 0 in the order that all devices share.",
            )
        return y
    out = np.ascontiguousarray(y, np.float32)
    if out.ndim == 1 and outputs == 1:
        out = out[:, None]
    if out.ndim != 2 or out.shape[1] != outputs:
        raise _unfit(y, loss, outputs, "The model has another number of outputs than there are labels.")
    if loss == "bce" and out.size and not (out.min() >= 0 and out.max() <= 1):
        raise DataError("a label is out of range", expected="0 to 1 (loss bce)", got=f"{out.min():g} to {out.max():g}")
    return out


def _unfit(y: Array, loss: str, outputs: int, hint: str) -> DataError:
    kind = "whole numbers" if y.dtype.kind == "i" else "numbers"
    return DataError(
        f"labels for loss {loss}",
        expected=_WANTED[loss].format(outputs),
        got=f"{kind} [{', '.join(['n', *map(str, y.shape[1:])])}]",
        hint=hint,
    )


def class_counts(y: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.int64]:
    """Samples per class; raises `DataError` if a label is out of range."""
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise DataError("a label is out of range", expected=f"0 to {classes - 1}", got=f"{y.min()} to {y.max()}")
    return np.bincount(y, minlength=classes).astype(np.int64)


def log_prior(y: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.float32]:
    """Log of the smoothed label shares: log((n_c + 0.1) / (n + 0.1·C)).

    It is added to the logits in the loss (logit adjustment, Menon et al., arXiv:2007.07314) and, because a device
    predicts for its own surroundings, to those of its own predictions. Raises `DataError` if a label is out of range.
    """
    counts = class_counts(y, classes).astype(np.float64)
    shares = (counts + _SMOOTHING) / (counts.sum() + _SMOOTHING * classes)
    return np.asarray(np.log(shares), np.float32)


def class_presence(y: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.float32]:
    """1 for every class that has a sample, else 0."""
    return np.asarray(class_counts(y, classes) > 0, np.float32)


def class_weights(y: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.float32]:
    """Loss weights that make all present classes count alike: n / (present classes · n_c), 0 for absent ones."""
    counts = class_counts(y, classes).astype(np.float64)
    present = counts > 0
    out = np.zeros(classes, np.float64)
    out[present] = counts.sum() / (present.sum() * counts[present])
    return np.asarray(out, np.float32)


def positive_weights(y: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Weights of positive labels [n, K] of `bce`: negatives over positives per class; 1 where either is missing."""
    positive = y.sum(axis=0, dtype=np.float64)
    negative = len(y) - positive
    mixed = (positive > 0) & (negative > 0)
    out = np.ones(y.shape[1], np.float64)
    out[mixed] = negative[mixed] / positive[mixed]
    return np.asarray(out, np.float32)


@dataclass(frozen=True)
class LogitAdjustment:
    """Turns the logits of a model into those of the board's own predictions, as its training did.

    `offset` is added to the logits [classes], where the recipe adjusts them. `present` is 0 for the classes whose
    logits are replaced by 0 because the board has no samples of them, where the recipe masks these (HeteroFL, Diao et
    al. 2021, Sec. 3.3; the authors' code masks local tests, too).
    """

    offset: tuple[float, ...] | None = None
    present: tuple[float, ...] | None = None

    @classmethod
    def of(cls, y: npt.NDArray[np.int64], recipe: Recipe, classes: int) -> LogitAdjustment:
        offset = log_prior(y, classes) if recipe.logit_adjustment else None
        present = class_presence(y, classes) if recipe.mask_absent_classes else None
        return cls(
            None if offset is None else tuple(map(float, offset)),
            None if present is None else tuple(map(float, present)),
        )

    def __call__(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The logits [n, classes] of own predictions; in the order of the training graph, masked last."""
        if self.offset is not None:
            logits = logits + np.array(self.offset, np.float32)
        if self.present is not None:
            logits = np.where(np.array(self.present) > 0, logits, np.float32(0))
        return logits


_AT_ONCE = 2**16  # outputs whose losses are computed at once

Terms = Mapping[str, Array]  # arrays and numbers of the loss, by input name of the training graph


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
