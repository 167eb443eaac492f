"""The server, and the simulator, which has a Python API:

    from fedprune_server import simulate

    run = simulate("fleet.toml", strategy="heterofl")
    run.rows()          # a row per round, for data frames
    run.plot()          # a page, which a notebook shows
    run.compare(other)  # a table

Importing the package costs nothing: each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedprune_server.simulation.api import Comparison, SimulatedRun, simulate

__all__ = ["Comparison", "SimulatedRun", "simulate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.simulation.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
