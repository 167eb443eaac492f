"""All that is known of each operator, in the file of its family: channel rule, rewrite, mask and gradient rule.

Importing the package registers all of them. To support an operator, write it into the file of its family; a new family
is a new file, imported here.
"""

from fedprune_export.operators import (
    arithmetic,
    channel_norms,
    convolution,
    dropout,
    elementwise,
    indexing,
    layer_norms,
    matrix_products,
    pooling,
    recurrent,
    reductions,
    resampling,
    reshape,
    shapes,
    slicing,
)

__all__ = [
    "arithmetic",
    "channel_norms",
    "convolution",
    "dropout",
    "elementwise",
    "indexing",
    "layer_norms",
    "matrix_products",
    "pooling",
    "recurrent",
    "reductions",
    "resampling",
    "reshape",
    "shapes",
    "slicing",
]
