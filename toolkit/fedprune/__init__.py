"""Federated learning for fleets of unequal boards: the method, on numpy.

    from fedprune import Strategy, compose, read_options

Importing the package costs nothing: each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedprune.core.errors import ExitCode, FedpruneError
    from fedprune.jobs.job import Job
    from fedprune.model.architecture import Architecture
    from fedprune.model.recipe import Recipe
    from fedprune.model.selection import Selection
    from fedprune.strategies.options import read_options
    from fedprune.strategies.presets import compose
    from fedprune.strategies.strategy import Strategy
    from fedprune.strategies.values import Ranking, RoundClosing, Submodel

__version__ = "0.2.0"

# The module of each public name. The imports above are the same list for type checkers, which can't run `__getattr__`.
_MODULES = {
    "Architecture": "model.architecture",
    "ExitCode": "core.errors",
    "FedpruneError": "core.errors",
    "Job": "jobs.job",
    "Ranking": "strategies.values",
    "Recipe": "model.recipe",
    "RoundClosing": "strategies.values",
    "Selection": "model.selection",
    "Strategy": "strategies.strategy",
    "Submodel": "strategies.values",
    "compose": "strategies.presets",
    "read_options": "strategies.options",
}

__all__ = [
    "Architecture",
    "ExitCode",
    "FedpruneError",
    "Job",
    "Ranking",
    "Recipe",
    "RoundClosing",
    "Selection",
    "Strategy",
    "Submodel",
    "compose",
    "read_options",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
