"""Labels as a loss takes them: classes, a 0 or 1 for every class, or numbers to predict; and shares of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError
from fedprune.model.recipe import Recipe

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

    It is added to the logits in the loss (logit adjustment, Menon et al., arXiv:2007.07314) and, because a
    device predicts for its own surroundings, to those of its own predictions.

    Raises:
        DataError: A label is out of range.
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
