"""Turns a quantised file into the float model that it approximates.

Weights are dequantised, operators on integers are written on floats, and what rounds activations is left out. Where the
range of a quantisation did the work of a Relu or Clip, that operator is written again. Each rewritten part is compared
with the file, rounding by rounding (`proof`).

Not here: exports with 8 bits (`fedprune_export.precision`).
"""

from fedprune_export.importing.quantised.dequantisation import float_file

__all__ = ["float_file"]
