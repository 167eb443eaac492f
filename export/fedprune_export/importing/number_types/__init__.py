"""Reads the number types of a file: in what follows, weights and what is computed from them are float32.

`as_single_precision` is called once, before a file is normalised, and `compare` of what it returns once afterwards,
when all sizes are known. `store_weights` finds weights in other forms of storage in the graph.
"""

from fedprune_export.importing.number_types.single_precision import SinglePrecision, as_single_precision
from fedprune_export.importing.number_types.stored_weights import store_weights

__all__ = ["SinglePrecision", "as_single_precision", "store_weights"]
