"""What leaves a board under differential privacy: its update, clipped as a whole, with noise on every element.

With Δ = w_trained − w_received over all trained tensors that the board shares, it hands in

    w_received + min(1, C/|Δ|)·Δ + s·z,   z ~ N(0, 1) per element,

rounded to float32. C and s are the recipe's `update_clip` and `update_noise`. Batch-norm statistics, which are measured
on the samples and have no bound, come back as they were received.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import TrainingError
from fedprune.model.selection import Tensors
from fedprune.updates.gaussian_noise import BLOCK, GaussianNoise

_MARGIN = 1.0 + 2.0**-30
"""More than a norm can be wrong by: blocks of squares are off by 2^-37 of themselves at most, their sum is exact."""

Array = npt.NDArray[Any]


def noised(
    update: Mapping[str, Array],
    received: Mapping[str, Array],
    trained: Collection[str],
    clip: float,
    noise: float,
    source: GaussianNoise,
) -> Tensors:
    """An update as it may leave the board.

    Where nothing is clipped and there is no noise, trained tensors keep their bits. Raises `TrainingError` if the
    update is not finite.

    Args:
        received: The same tensors as the board received them.
        trained: Names of those that were trained; all others are handed back as they were received.
        clip: C, the most that the whole update may be long.
        noise: s, the standard deviation of the noise on every element.
    """
    names = [n for n in update if n in trained]
    size = norm(update, received, names)
    if not math.isfinite(size):
        raise TrainingError("the update is not finite", got=size)
    factor = 1.0 if size <= clip else clip / size
    out: Tensors = {}
    for name, value in update.items():
        if name not in trained:
            out[name] = np.array(received[name], np.float32)
        elif factor == 1.0 and not noise:
            out[name] = np.asarray(value)
        else:
            out[name] = _moved(value, received[name], factor, noise, source)
    return out


def norm(update: Mapping[str, Array], received: Mapping[str, Array], names: Collection[str]) -> float:
    """An upper bound of |Δ| over some tensors, larger than it by less than a billionth."""
    squares = []
    with np.errstate(over="ignore", invalid="ignore"):
        for name in names:
            after, before = np.ravel(update[name]), np.ravel(received[name])
            for start in range(0, after.size, BLOCK):
                moved = after[start : start + BLOCK].astype(np.float64) - before[start : start + BLOCK]
                squares.append(float(np.dot(moved, moved)))
    total = sum(squares)
    return math.sqrt(math.fsum(squares)) * _MARGIN if math.isfinite(total) else math.inf


def _moved(after: Array, before: Array, factor: float, noise: float, source: GaussianNoise) -> npt.NDArray[np.float32]:
    """before + factor·(after − before) + noise, in blocks."""
    out = np.empty(after.shape, np.float32)
    flat, new, old = out.reshape(-1), np.ravel(after), np.ravel(before)
    for start in range(0, flat.size, BLOCK):
        at = slice(start, start + BLOCK)
        base = old[at].astype(np.float64)
        moved = base + factor * (new[at] - base)
        if noise:
            moved += noise * source.draw(base.size)
        flat[at] = moved
    return out
