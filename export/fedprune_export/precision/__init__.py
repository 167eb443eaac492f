"""Lower precision: folded norms, float16, int8, each with graphs that convert new weights.

Not here: the rule by which a lower precision may serve (`fedprune.runtime.quantization_check`).
"""

from fedprune_export.precision.lowered import Lowered, lower
from fedprune_export.precision.trial import Trial, Trials

__all__ = ["Lowered", "Trial", "Trials", "lower"]
