"""Lower precision: folded norms, float16, int8, each with graphs that convert new weights.

Not here: the rule by which a lower precision may serve (`fedprune.runtime.agreement`).
"""

from fedprune_export.precision.accuracy_check import PrecisionTrial, PrecisionTrials
from fedprune_export.precision.lowering import Lowered, lower

__all__ = ["Lowered", "PrecisionTrial", "PrecisionTrials", "lower"]
