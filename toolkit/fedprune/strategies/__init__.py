"""Strategies: compositions of roles, each with one paper behind it."""

from fedprune.strategies.options import read_options
from fedprune.strategies.presets import PRESETS, compose
from fedprune.strategies.strategy import Strategy

__all__ = ["PRESETS", "Strategy", "compose", "read_options"]
