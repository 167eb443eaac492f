"""Reverse-mode differentiation over ONNX graphs: the tape, and one gradient rule per operator.

Importing the modules of rules registers them.
"""

from fedprune_export.gradients import arithmetic, convolutions, norms, pooling, shapes
from fedprune_export.gradients.tape import RULES, Tape

RULE_MODULES = (arithmetic, convolutions, norms, pooling, shapes)
"""Where the gradient rules live."""

__all__ = ["RULES", "RULE_MODULES", "Tape"]
