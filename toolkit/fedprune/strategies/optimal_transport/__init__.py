"""Optimal transport between the channels of two models, and models led onto another's channels.

Not here: the strategy that uses it (`strategies.methods.subflot`).
"""

from fedprune.strategies.optimal_transport.alignment import aggregate, align, prune
from fedprune.strategies.optimal_transport.coupling import Coupling
from fedprune.strategies.optimal_transport.solver import exact_plan
from fedprune.strategies.optimal_transport.solver_imports import check_installed

__all__ = ["Coupling", "aggregate", "align", "check_installed", "exact_plan", "prune"]
