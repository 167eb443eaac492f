"""Predictions in words: likely classes, likely labels, or numbers, by the loss that the model was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.text import quantity
from fedprune_device.data.labels import targets
from fedprune_device.data.losses import data_loss, hits


def described(outputs: npt.NDArray[np.float32], loss: str, top: int, names: Sequence[str] = ()) -> Iterator[str]:
    """One line per sample.

    Args:
        outputs: The model's outputs [n, K].
        loss: What it was trained with: classes come with their shares, labels with their chances, both the `top`
            likeliest; predicted numbers are given all, in order.
        top: How many.
        names: Names of the outputs; numbers stand for those that have none.
    """
    for i, row in enumerate(likely(loss, outputs.astype(np.float64))):
        best = np.argsort(-row, kind="stable")[:top] if loss in ("cross_entropy", "bce") else range(len(row))
        shown = [f"{names[c] if c < len(names) else c} " if len(row) > 1 else "" for c in best]
        digits = ".4f" if loss in ("cross_entropy", "bce") else ".6g"
        yield f"{i}: " + ", ".join(f"{name}{row[c]:{digits}}" for name, c in zip(shown, best, strict=True))


def judged(outputs: npt.NDArray[np.float32], y: npt.NDArray[Any], loss: str) -> str:
    """How right predictions are: their accuracy, or their loss where numbers are predicted.

    Args:
        outputs: The model's outputs [n, K].
        y: Labels, as `LocalData` takes them.
        loss: What the model was trained with.

    Raises:
        DataError: The labels don't fit the loss.
    """
    wanted = targets(y, loss, outputs.shape[1])
    right = hits(loss, outputs, wanted)
    if right is None:
        return f"loss {data_loss(loss, outputs, wanted):.6g} on {quantity(len(y), 'sample')}"
    return f"accuracy {np.mean(right):.4f} on {quantity(len(y), 'sample')}"


def likely(loss: str, z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What outputs say, by what the model was trained with.

    Args:
        loss: The loss.
        z: The model's outputs [n, K].

    Returns:
        Shares of classes (softmax) with cross-entropy, chances of labels (sigmoid) with bce, else the numbers.
    """
    if loss == "cross_entropy":
        shares = np.exp(z - z.max(axis=1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))
    if loss == "bce":
        return np.asarray(np.exp(-np.logaddexp(0, -z)))
    return z
