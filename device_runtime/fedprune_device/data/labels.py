"""Checks labels and converts them for training graphs; computes class weights and logit offsets from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, shape_text
from fedprune.model import step_contract
from fedprune.model.features import MULTI_LABELS, labels_of
from fedprune.model.recipe import Recipe
from fedprune.model.step_feeds import number_feeds
from fedprune_device.data.stored_array import Array, Inputs, StoredArray, chunks

Terms = Mapping[str, Array]  # arrays and numbers of the loss, by input name of the training graph

_SMOOTHING = 0.1  # of a class's count: the logarithm of an absent class's share stays finite


@dataclass(frozen=True)
class Targets:
    """The labels that a training graph takes.

    Attributes:
        loss: The name of the recipe's loss.
        classes: Entries of the output's first axis.
        shape: One sample's labels; names and None stand for any size.
        ignored: The class of labels that count for nothing; None for none.
        whole_numbers: Whether a model's own loss takes whole numbers.
    """

    loss: str
    classes: int
    shape: tuple[int | str | None, ...] = ()
    ignored: int | None = None
    whole_numbers: bool = False

    @classmethod
    def of(cls, recipe: Recipe, classes: int, shape: tuple[int | str | None, ...], *, whole_numbers: bool) -> Targets:
        """The labels of a recipe's loss, one sample's of this `shape`; `whole_numbers` as the attribute."""
        return cls(recipe.loss, classes, shape, recipe.ignore_label, whole_numbers)

    @property
    def takes_whole_numbers(self) -> bool:
        """Whether labels are whole numbers."""
        return self.loss == "cross_entropy" or self.whole_numbers

    def __call__(self, y: Inputs) -> Inputs:
        """Labels as they are kept: whole numbers of any width, such as those of cross-entropy; others float32 [n, ...].

        Labels on the disk stay there; labels that are `in_range` are not read. Raises `DataError` if they are of
        another kind or shape, or out of range.
        """
        column = y.ndim == 1 and len(self.shape) == 1 and self.shape[0] in (1, None)
        shape = (1,) if column else y.shape[1:]
        takes_whole = self.takes_whole_numbers
        if takes_whole and y.ndim == len(self.shape) + 2 and y.shape[1] == self.classes:
            raise self._mismatch_error(y, "If they are one-hot, save the number of the class: y.argmax(1).")
        if takes_whole and y.ndim == len(self.shape) + 2 and y.shape[1] == 1:
            raise self._mismatch_error(y, "Save them without their second axis: y[:, 0].")
        if takes_whole and y.dtype.kind not in "iu":
            raise self._mismatch_error(y, "Save them as whole numbers: y.astype('int64').")
        if len(shape) != len(self.shape) or any(
            isinstance(d, int) and d != g for d, g in zip(self.shape, shape, strict=True)
        ):
            raise self._mismatch_error(y, "The model and its loss decide the shape: is it the loss that you mean?")
        in_range = isinstance(y, StoredArray) and y.in_range
        if labels_of(self.loss) == "classes" and not in_range:
            class_counts(y, self.classes, self.ignored)
        if takes_whole:
            return y
        out = y.as_float32() if isinstance(y, StoredArray) else np.ascontiguousarray(y, np.float32)
        for chunk in chunks(out) if labels_of(self.loss) == MULTI_LABELS and out.size and not in_range else ():
            if not (chunk.min() >= 0 and chunk.max() <= 1):
                got = f"{chunk.min():g} to {chunk.max():g}"
                raise DataError("a label is out of range", expected=f"0 to 1 (loss {self.loss})", got=got)
        return out[:][:, None] if column else out

    def count(self, y: Array) -> int:
        """The number of labels that aren't ignored."""
        return int(np.count_nonzero(y != self.ignored)) if self.ignored is not None else y.size

    def _mismatch_error(self, y: Inputs, hint: str) -> DataError:
        expected = "numbers from 0 to 1" if labels_of(self.loss) == MULTI_LABELS else "numbers"
        expected = "whole numbers" if self.takes_whole_numbers else expected
        received = "whole numbers" if y.dtype.kind in "iu" else "numbers"
        return DataError(
            f"labels for loss {self.loss}",
            expected=f"{expected} {shape_text('n', *self.shape)}",
            got=f"{received} {shape_text('n', *y.shape[1:])}",
            hint=hint,
        )


def class_counts(y: Inputs, classes: int, ignored: int | None = None) -> npt.NDArray[np.int64]:
    """Labels per class; raises `DataError` if one is out of range."""
    return sum((_class_counts(chunk, classes, ignored) for chunk in chunks(y)), np.zeros(classes, np.int64))


def _class_counts(y: Array, classes: int, ignored: int | None) -> npt.NDArray[np.int64]:
    counted = y.reshape(-1) if ignored is None else y[y != ignored]
    low, high = (int(counted.min()), int(counted.max())) if counted.size else (0, 0)
    if low < 0 or high >= classes:
        raise DataError(
            "a label is out of range",
            expected=f"0 to {classes - 1} ({classes} classes)",
            got=low if low < 0 else high,
            hint="Number the classes from 0 in the order that all devices share. If labels of this number count for "
            f"nothing, export the model with --set ignore_label={low if low < 0 else high} (recipe.ignore_label).",
        )
    return np.bincount(counted, minlength=classes).astype(np.int64)


def log_prior(y: Inputs, classes: int, ignored: int | None = None) -> npt.NDArray[np.float32]:
    """Log of the smoothed label shares: log((n_c + 0.1) / (n + 0.1·C)).

    It is added to the logits in the loss (logit adjustment, Menon et al., arXiv:2007.07314) and, because a device
    predicts for its own surroundings, to those of its own predictions. Raises `DataError` if a label is out of range.
    """
    counts = class_counts(y, classes, ignored).astype(np.float64)
    shares = (counts + _SMOOTHING) / (counts.sum() + _SMOOTHING * classes)
    return np.asarray(np.log(shares), np.float32)


def class_presence(y: Inputs, classes: int, ignored: int | None = None) -> npt.NDArray[np.float32]:
    """1 for every class that has a sample, 0 for others."""
    return np.asarray(class_counts(y, classes, ignored) > 0, np.float32)


def class_weights(y: Inputs, classes: int, ignored: int | None = None) -> npt.NDArray[np.float32]:
    """Loss weights that make all present classes count alike: n / (present classes · n_c), 0 for absent ones."""
    counts = class_counts(y, classes, ignored).astype(np.float64)
    present = counts > 0
    weights = np.zeros(classes, np.float64)
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return np.asarray(weights, np.float32)


def positive_weights(y: Inputs) -> npt.NDArray[np.float32]:
    """Weights of positive labels [n, K, ...] of `bce`: negatives over positives; 1 where a class lacks either."""
    axes = (0, *range(2, y.ndim))
    positive = sum((chunk.sum(axis=axes, dtype=np.float64) for chunk in chunks(y)), np.zeros(y.shape[1], np.float64))
    negative = y.size / y.shape[1] - positive
    has_both = (positive > 0) & (negative > 0)
    weights = np.ones(y.shape[1], np.float64)
    weights[has_both] = negative[has_both] / positive[has_both]
    return np.asarray(weights, np.float32)


@dataclass(frozen=True)
class LogitAdjustment:
    """Turns the logits of a model into those of the board's own predictions, as its training did.

    `offset` is added to the logits [classes], where the recipe adjusts them. `present` is 0 for classes without
    samples on the board, if the recipe masks them: their logits are replaced by 0 (HeteroFL, Diao et
    al. 2021, Sec. 3.3; the authors' code masks local tests, too).
    """

    offset: tuple[float, ...] | None = None
    present: tuple[float, ...] | None = None

    @classmethod
    def of(cls, y: Inputs, recipe: Recipe, classes: int) -> LogitAdjustment:
        ignored = recipe.ignore_label
        offset = tuple(log_prior(y, classes, ignored).tolist()) if recipe.logit_adjustment else None
        present = tuple(class_presence(y, classes, ignored).tolist()) if recipe.mask_absent_classes else None
        return cls(offset, present)

    def __call__(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The logits [n, classes, ...] of own predictions; in the order of the training graph, masked last."""
        per_class = (-1, *[1] * (logits.ndim - 2))
        if self.offset is not None:
            logits = logits + np.array(self.offset, np.float32).reshape(per_class)
        if self.present is not None:
            logits = np.where(np.array(self.present).reshape(per_class) > 0, logits, np.float32(0))
        return logits


def right_labels(loss: str, outputs: npt.NDArray[np.float32], targets: Array) -> npt.NDArray[np.bool_] | None:
    """Which classes are predicted right [n, ...], with `bce` which labels [n, K, ...]; None for numbers."""
    if loss == "cross_entropy":
        return np.asarray(np.argmax(outputs, axis=1) == targets)
    return np.asarray((outputs > 0) == (targets > 0.5)) if labels_of(loss) == MULTI_LABELS else None


def loss_terms(y: Inputs, recipe: Recipe, classes: int) -> dict[str, Array]:
    """The vectors over classes and the numbers that a recipe brings, by input name of the training graph.

    `y` are all training labels.
    """
    features, terms = recipe.features, dict[str, Array]()
    if features.logit_offset:
        terms[step_contract.LOGIT_OFFSET] = log_prior(y, classes, recipe.ignore_label)
    if features.class_weight:
        terms[step_contract.CLASS_WEIGHT] = (
            class_weights(y, classes, recipe.ignore_label)
            if recipe.loss == "cross_entropy"
            else positive_weights(y if isinstance(y, StoredArray) else np.asarray(y, np.float32))
        )
    if features.class_mask:
        terms[step_contract.CLASS_MASK] = class_presence(y, classes, recipe.ignore_label)
    return terms | number_feeds(recipe)
