"""Compares a model at lower precision with float32, and decides whether it may serve."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.core.text import quantity
from fedprune.model.features import JUDGED_LABELS, labels_of

Array = npt.NDArray[Any]

# Samples on which both precisions are compared, at most: they resolve the limits below, and a board waits for them.
MAX_COMPARED_SAMPLES = 512

# Share of decisions that must be the same as in float32.
MIN_SAME_SHARE = 0.95

# Share of right answers that may be lost: one point of accuracy.
MAX_ACCURACY_LOSS = 0.01

# Of a model that predicts numbers: how far its outputs may be from float32's, in standard deviations of those.
MAX_RELATIVE_ERROR = 0.1

# The least spread that outputs count with, as a share of the largest: equal outputs don't spread at all. A tenth of it
# is allowed, which is twice the rounding error of float16.
_MIN_SPREAD_RATIO = 1e-2


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
        """The reason why the model must not serve; empty if it may. One changed decision is always allowed."""
        if not self.samples:
            return "there are no samples to compare it on"
        one_decision = 1 / self.samples
        if not np.isfinite(self.error):
            return "its outputs are not finite"
        if self.same is None and self.error > MAX_RELATIVE_ERROR:
            return f"its outputs are off by {self.error:.2g} of their spread, {MAX_RELATIVE_ERROR:g} is allowed"
        if self.same is not None and 1 - self.same > max(1 - MIN_SAME_SHARE, one_decision) + 1e-9:
            return (
                f"it decides {self.same:.1%} of {self.samples} samples as float32 does, "
                f"{MIN_SAME_SHARE:.0%} is asked for"
            )
        if self.right is not None and self.right[0] - self.right[1] > max(MAX_ACCURACY_LOSS, one_decision) + 1e-9:
            reference_accuracy, own_accuracy = self.right
            accuracies = f"{own_accuracy:.1%}, that of float32 is {reference_accuracy:.1%}"
            return f"its accuracy on {self.samples} samples is {accuracies}"
        return ""

    def describe(self) -> str:
        clauses = [f"on {quantity(self.samples, 'sample', form=',')}"]
        if self.same is not None:
            clauses.append(f"{self.same:.1%} decided alike")
        if self.right is not None:
            clauses.append(f"accuracy {self.right[0]:.1%} -> {self.right[1]:.1%}")
        return ", ".join([*clauses, f"outputs {self.error:.2g} of their spread apart"])

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "right": None if self.right is None else list(self.right)}


def compare_outputs(loss: str, reference: Array, outputs: Array, y: Array | None = None) -> Agreement:
    """Compare outputs [n, K] with float32's (`reference`). Raises `ModelError` if they have another shape. `loss` is
    what the model was trained with; `y` are the samples' labels, if known: int64 [n] for `cross_entropy`, 0 to 1 [n, K]
    for `bce`."""
    if outputs.shape != reference.shape:
        raise ModelError("outputs at lower precision", expected=reference.shape, got=outputs.shape)
    if not reference.size:
        return Agreement(0, None, 0.0)
    rms_difference = np.sqrt(np.mean((outputs.astype(np.float64) - reference) ** 2))
    spread = max(float(np.std(reference, dtype=np.float64)), _MIN_SPREAD_RATIO * float(np.abs(reference).max()), 1e-30)
    error = float(rms_difference / spread)
    if labels_of(loss) not in JUDGED_LABELS:
        return Agreement(len(reference), None, error)
    decisions = [o.argmax(1) if loss == "cross_entropy" else o > 0 for o in (reference, outputs)]
    same = float(np.mean(decisions[0] == decisions[1]))
    right = None
    if y is not None:
        truth = y if loss == "cross_entropy" else y > 0.5
        right = float(np.mean(decisions[0] == truth)), float(np.mean(decisions[1] == truth))
    return Agreement(len(reference), same, error, right)
