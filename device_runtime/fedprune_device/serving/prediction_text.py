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
    """One line per sample of outputs [n, K]: the `top` likeliest classes or labels, or all predicted numbers."""
    for i, row in enumerate(likely(loss, outputs.astype(np.float64))):
        best = np.argsort(-row, kind="stable")[:top] if loss in ("cross_entropy", "bce") else range(len(row))
        shown = [f"{names[c] if c < len(names) else c} " if len(row) > 1 else "" for c in best]
        digits = ".4f" if loss in ("cross_entropy", "bce") else ".6g"
        yield f"{i}: " + ", ".join(f"{name}{row[c]:{digits}}" for name, c in zip(shown, best, strict=True))


def judged(outputs: npt.NDArray[np.float32], y: npt.NDArray[Any], loss: str) -> str:
    wanted = targets(y, loss, outputs.shape[1])
    right = hits(loss, outputs, wanted)
    if right is None:
        return f"loss {data_loss(loss, outputs, wanted):.6g} on {quantity(len(y), 'sample')}"
    return f"accuracy {np.mean(right):.4f} on {quantity(len(y), 'sample')}"


def likely(loss: str, z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Softmax over classes with cross-entropy, sigmoid per label with bce, else the numbers, [n, K]."""
    if loss == "cross_entropy":
        shares = np.exp(z - z.max(axis=1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))
    if loss == "bce":
        return np.asarray(np.exp(-np.logaddexp(0, -z)))
    return z
