"""The base class of experiment trackers, and `TOOLS`, the names of all trackers."""

from __future__ import annotations

import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import ClassVar

from fedprune.core.errors import MissingExtraError
from fedprune_server.trackers import tools

# The modules in `tools` are the list: a tracker is added by a file, and the setting, its help and the extra follow.
TOOLS = tuple(sorted(module.name for module in pkgutil.iter_modules(tools.__path__)))

# The name of MLflow's experiment and of Weights & Biases' project, unless the setting or the tool's variable names one.
PROJECT = "fedprune"


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers show it: its name and configuration. A tracker without a destination writes into `folder`."""

    title: str
    folder: Path
    parameters: Mapping[str, str | int | float | bool] = field(default_factory=dict)


class Tracker(ABC):
    """One run in one tracker. A constructor imports the library; no other method is called before `open`.

    Attributes:
        destination_form: The form of a destination, as in `mlflow:ADDRESS`.
        takes_folder: Whether a destination is a folder.
    """

    destination_form: ClassVar[str]
    takes_folder: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, destination: str) -> None: ...

    @abstractmethod
    def open(self, run: TrackedRun, name: str, rounds: int) -> int:
        """Begin or continue the run of this unique `name`, which has `rounds` rounds by the server's own note (0: a new
        run). Returns how many rounds it has."""

    @abstractmethod
    def write(self, number: int, values: Mapping[str, float], at: float) -> None:
        """Write a round durably; `at` is in seconds since 1970."""

    @abstractmethod
    def keep(self, folder: Path) -> None:
        """Keep the files of a folder with the run, where the tracker can."""

    @abstractmethod
    def close(self, *, finished: bool) -> None:
        """End writing; a run that isn't finished is continued by the next start."""


def tracker_class(tool: str) -> type[Tracker]:
    """The class of a tracker in `TOOLS`: the one that its module defines."""
    module = import_module(f"{tools.__name__}.{tool}")
    (tracker,) = (
        kind for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Tracker) and kind.__module__ == module.__name__
    )  # fmt: skip
    return tracker


def make_tracker(tool: str, destination: str) -> Tracker:
    """A tracker. Raises `MissingExtraError` if its library is not installed."""
    try:
        return tracker_class(tool)(destination)
    except ModuleNotFoundError as error:
        library = (error.name or tool).partition(".")[0]
        raise MissingExtraError(f"track = {tool} needs {library}, which is not installed", extra=tool) from error


def plain_name(text: str) -> str:
    """A name that MLflow takes as a key, and every file system."""
    return re.sub(r"[^\w.\- ]", "-", text, flags=re.ASCII)
