"""A kind of data: how it is written, the model that it is meant for, and the samples that it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedprune_device.data.labels import Targets

Array = np.ndarray[Any, Any]
Sample = tuple[Array, Any]  # inputs and label

CLASSES = Targets("cross_entropy", 2)
NUMBERS = Targets("mse", 1, (None,))


@dataclass(frozen=True)
class Truth:
    """The samples that were written, in any order; None where a kind is expected to be refused. Inputs may be away
    from them by the tolerance: formats with losses and resampling change numbers a little."""

    samples: Sequence[Sample] | None
    tolerance: float = 1e-6


REFUSED = Truth(None)


@dataclass(frozen=True)
class Kind:
    """One kind of data for a model's input. `write` writes it into a folder, and returns where a board's `--data`
    points to, and the truth; `options` are those of `--data`, such as `missing`."""

    group: str
    name: str
    write: Callable[[Path], tuple[Path, Truth]]
    shape: tuple[int, ...]
    targets: Targets = CLASSES
    options: tuple[tuple[str, Any], ...] = ()


def count_samples(x: Array, y: Array, truth: Truth) -> int | None:
    """How many samples of a truth arrays hold; None if they hold any other sample, or one twice."""
    left = list(truth.samples or ())
    for inputs, label in zip(x, y, strict=True):
        position = next(
            (i for i, sample in enumerate(left) if _is_sample(inputs, label, sample, truth.tolerance)), None
        )
        if position is None:
            return None
        del left[position]
    return len(x)


def _is_sample(inputs: Array, label: Any, sample: Sample, tolerance: float) -> bool:
    expected = np.asarray(sample[0])
    same_label = np.asarray(label).shape == np.shape(sample[1]) and np.allclose(label, sample[1], atol=tolerance)
    if not same_label or inputs.shape != expected.shape:
        return False
    return bool(np.max(np.abs(inputs - expected), initial=0.0) <= tolerance * max(1.0, float(np.abs(expected).max())))


def windows(columns: Sequence[Sequence[float]], classes: Sequence[int], steps: int) -> list[Sample]:
    """Windows of `steps` rows, none of which spans a missing number (NaN) or the border of eight windows."""
    rows = np.array(columns, np.float32)
    block = 8 * steps
    return [
        (rows[:, first : first + steps], classes[first + steps - 1])
        for first in range(len(classes) - steps + 1)
        if first // block == (first + steps - 1) // block
        and not math.isnan(float(rows[:, first : first + steps].sum()))
    ]
