"""Reverse-mode differentiation over ONNX graphs: the tape, and one gradient rule per operator.

Not here: losses and optimisers (`training`). Importing the package registers all rules.
"""

from fedprune_export.autodiff import indexing  # noqa: F401 (they register)
from fedprune_export.autodiff.rules import (  # noqa: F401 (they register)
    arithmetic,
    convolutions,
    elementwise,
    layer_norms,
    norms,
    padding,
    pooling,
    products,
    recurrent,
    reductions,
    resampling,
    shapes,
)
from fedprune_export.autodiff.tape import RULES, Tape

__all__ = ["RULES", "Tape"]
