"""Strategies: one base class of eight methods, and one module per paper with its subclass (`methods`).

Not here: the order of a round (`coordination`) and the arithmetic of sums (`aggregation`).
"""

from fedprune.strategies.options import read_options
from fedprune.strategies.presets import PRESETS, compose
from fedprune.strategies.strategy import Strategy

__all__ = ["PRESETS", "Strategy", "compose", "read_options"]
