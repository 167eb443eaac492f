"""Optimal transport between models of different widths: exact plans, and leading a model onto another's channels."""

from fedprune.optimal_transport.alignment import Maps, Plans, Transport
from fedprune.optimal_transport.coupling import Coupling
from fedprune.optimal_transport.solver import exact_plan

__all__ = ["Coupling", "Maps", "Plans", "Transport", "exact_plan"]
