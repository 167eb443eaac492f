"""Reads files that compute in float16, bfloat16 or float64 as files of float32, in which models are trained.

`as_single_precision` is called once, before a file is normalised: everything behind it reads float32. `compare` of what
it returns is called once afterwards, when all sizes are known.
"""

from fedprune_export.importing.number_types.single_precision import SinglePrecision, as_single_precision

__all__ = ["SinglePrecision", "as_single_precision"]
