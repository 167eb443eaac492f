"""Turns a quantised file into the float model that it approximates.

Weights are dequantised, products of integers are written on floats, and what rounds activations is left out. Where the
range of a rounding did the work of a Relu or Clip, that operator is written again. With its roundings put back, the
float model has to compute what the file does (`proof`).

Not here: exports with 8 bits (`fedprune_export.precision`).
"""

from fedprune_export.importing.quantised.conversion import float_file

__all__ = ["float_file"]
