"""Whether a model at lower precision still says what float32 says: the one rule by which it may serve."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.core.text import quantity

Array = npt.NDArray[Any]

SAMPLES = 512
"""Samples that both are compared on, at most."""

LEAST_SAME = 0.95
"""Share of decisions that must be the same."""

MOST_LOST = 0.01
"""Share of right answers that may be lost: one point of accuracy."""

MOST_ERROR = 0.1
"""Where numbers are predicted: how far they may be off, as a share of how far they spread."""

_LEAST_SPREAD = 1e-2
"""Numbers that spread less, as a share of the largest, count as spread so far: one, or equal ones, don't spread.
With a tenth of it allowed that is twice what rounding to float16 takes from a number."""


@dataclass(frozen=True)
class Agreement:
    """How far a model's outputs are from those of float32.

    Attributes:
        same: Share of decisions (the class, or every label) that are the same; None where numbers are predicted, or
            there are no samples.
        error: Root of the mean squared difference of outputs, over the standard deviation of float32's, which counts as
            a hundredth of the largest of them at least.
        right: Shares of right answers of float32 and of the model; None where no labels were given or numbers are
            predicted.
    """

    samples: int
    same: float | None
    error: float
    right: tuple[float, float] | None = None

    @property
    def refusal(self) -> str:
        """Why the model must not serve; empty where it may. One decision proves nothing: so much is always allowed."""
        if not self.samples:
            return "there are no samples to compare it on"
        one = 1 / self.samples
        if not np.isfinite(self.error):
            return "its outputs are not finite"
        if self.same is None and self.error > MOST_ERROR:
            return f"its outputs are off by {self.error:.2g} of their spread, {MOST_ERROR:g} is allowed"
        if self.same is not None and 1 - self.same > max(1 - LEAST_SAME, one) + 1e-9:
            return (
                f"it decides {self.same:.1%} of {self.samples} samples as float32 does, {LEAST_SAME:.0%} is asked for"
            )
        if self.right is not None and self.right[0] - self.right[1] > max(MOST_LOST, one) + 1e-9:
            before, after = self.right
            return f"its accuracy on {self.samples} samples is {after:.1%}, that of float32 is {before:.1%}"
        return ""

    def describe(self) -> str:
        """In a few words."""
        parts = [f"on {quantity(self.samples, 'sample', form=',')}"]
        if self.same is not None:
            parts.append(f"{self.same:.1%} decided alike")
        if self.right is not None:
            parts.append(f"accuracy {self.right[0]:.1%} -> {self.right[1]:.1%}")
        return ", ".join([*parts, f"outputs {self.error:.2g} of their spread apart"])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "right": None if self.right is None else list(self.right)}


def agreement(loss: str, reference: Array, outputs: Array, y: Array | None = None) -> Agreement:
    """Compare outputs [n, K] with float32's (`reference`). Raises `ModelError` if they have another shape.

    Args:
        loss: What the model was trained with: `cross_entropy`, `bce`, or one of numbers.
        y: The samples' labels, if known: int64 [n] for `cross_entropy`, 0 to 1 [n, K] for `bce`.
    """
    if outputs.shape != reference.shape:
        raise ModelError("outputs at lower precision", expected=reference.shape, got=outputs.shape)
    if not reference.size:
        return Agreement(0, None, 0.0)
    far = np.sqrt(np.mean((outputs.astype(np.float64) - reference) ** 2))
    spread = max(float(np.std(reference, dtype=np.float64)), _LEAST_SPREAD * float(np.abs(reference).max()), 1e-30)
    error = float(far / spread)
    if loss not in ("cross_entropy", "bce"):
        return Agreement(len(reference), None, error)
    decided = [o.argmax(1) if loss == "cross_entropy" else o > 0 for o in (reference, outputs)]
    same = float(np.mean(decided[0] == decided[1]))
    right = None
    if y is not None:
        truth = y if loss == "cross_entropy" else y > 0.5
        right = float(np.mean(decided[0] == truth)), float(np.mean(decided[1] == truth))
    return Agreement(len(reference), same, error, right)
