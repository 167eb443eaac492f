"""Reverse-mode differentiation over ONNX graphs: the tape, and one gradient rule per operator.

Not here: losses and optimisers (`training`). Importing the package registers all rules.
"""

from fedprune_export.autodiff.rules import (  # noqa: F401 (they register)
    arithmetic,
    convolutions,
    dropout,
    elementwise,
    indexing,
    layer_norms,
    norms,
    pooling,
    products,
    recurrent,
    reductions,
    resampling,
    sampling,
    shapes,
)
from fedprune_export.autodiff.tape import RULES, Tape

__all__ = ["RULES", "Tape"]
