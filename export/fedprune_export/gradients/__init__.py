"""Reverse-mode differentiation over ONNX graphs: the tape, and one gradient rule per operator.

Importing the modules of rules registers them.
"""

from fedprune_export.gradients import (  # noqa: F401 (they register)
    arithmetic,
    convolutions,
    elementwise,
    group_norms,
    layer_norms,
    norms,
    padding,
    picking,
    pooling,
    products,
    recurrent,
    reductions,
    resampling,
    shapes,
    writing,
)
from fedprune_export.gradients.tape import RULES, Tape

__all__ = ["RULES", "Tape"]
