"""Measures how far an update moves each tensor of the model, and all of them together."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fixed_point import DOT_NUMBERS
from fedprune.strategies.values import UpdateReport

# Significant digits of a length: the last bits of a sum of squares differ between machines, and models must not.
_LENGTH_DIGITS = 6

# Key of all trained tensors together.
ALL_TRAINED = ""

# Root mean square of an update's change: by tensor of the whole model, and under `ALL_TRAINED` over all trained
# tensors. Elements of channels that the board doesn't hold count as unchanged; a mask's inactive ones are left out of
# the mean.
UpdateLengths = Mapping[str, float]


def measure_update(report: UpdateReport) -> UpdateLengths:
    """How far an update moves each tensor, and all trained ones together."""
    sent, trained = report.sent.tensors, report.trained
    tensor_lengths: dict[str, float] = {}
    all_squares, count = 0.0, 0.0
    for spec in trained.selection.architecture.tensors:
        size, square_sum = float(math.prod(spec.shape)), 0.0
        value, sent_value = trained.tensors.get(spec.name), sent.get(spec.name)
        if value is not None and sent_value is not None and value.shape == sent_value.shape and value.size:
            mask = trained.mask.get(spec.name)
            # The mean divides an element by the updates whose mask holds it: what is masked must not dilute the length.
            if mask is not None:
                size *= max(1, int(np.count_nonzero(mask))) / value.size
            square_sum = _sum_of_squares(
                value.reshape(-1), sent_value.reshape(-1), None if mask is None else mask.reshape(-1)
            )
            tensor_lengths[spec.name] = round_length(math.sqrt(square_sum / size))
        # Statistics have limits of their own: they follow the data's scale, which says nothing of training.
        if spec.kind.is_trainable:
            all_squares, count = all_squares + square_sum, count + size
    return tensor_lengths | {ALL_TRAINED: round_length(math.sqrt(all_squares / max(1.0, count)))}


def _sum_of_squares(
    values: npt.NDArray[np.float32], sent_values: npt.NDArray[np.float32], active: npt.NDArray[np.bool_] | None
) -> float:
    """Sum of squares of a change, block by block in the cache."""
    total = 0.0
    for start in range(0, values.size, DOT_NUMBERS):
        block = slice(start, start + DOT_NUMBERS)
        change = np.subtract(values[block], sent_values[block], dtype=np.float64)
        if active is not None:
            change *= active[block]
        total += float(np.dot(change, change))
    return total


def round_length(length: float) -> float:
    """A length to `_LENGTH_DIGITS` digits."""
    return float(f"{length:.{_LENGTH_DIGITS}g}")
