"""Simulations from Python: run a fleet, plot its curves, compare it with other runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fedprune.jobs.job import Job
from fedprune.output import page
from fedprune.strategies.strategy import Strategy
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.fleet.simulated_fleet import read_plan
from fedprune_server.simulation.results import charts
from fedprune_server.simulation.results.comparison import final_rows
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.results.report import html_table, markdown_table
from fedprune_server.simulation.results.run_folder import simulate as simulate_experiment

_HEIGHT = 620
"""Pixels of a page in a notebook."""


@dataclass(frozen=True, repr=False)
class Page:
    """A self-contained HTML page, which a notebook displays. `html` is its text."""

    html: str

    def save(self, path: str | Path) -> Path:
        Path(path).write_text(self.html, encoding="utf-8")
        return Path(path)

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.html)}" width="100%" height="{_HEIGHT}" frameborder="0"></iframe>'


@dataclass(frozen=True, repr=False)
class Run:
    """A simulated run, printed as a table of its results. `record` has all its numbers."""

    record: Record

    @property
    def curves(self) -> dict[str, list[float | None]]:
        """Columns with an entry per round, ready for pandas or pyarrow.

        Columns: round, seconds and MB since the start, and the accuracy (loss for regression) of the global model and
        the mean of the devices' own models.
        """
        rounds, kind = self.record.rounds, self.record.measure
        return {
            "round": [r.round for r in rounds],
            "seconds": [r.at for r in rounds],
            "mb": [(r.down + r.up) / 1e6 for r in rounds],
            f"global_{kind}": list(self.record.global_values()),
            f"local_{kind}": list(self.record.mean_locals()),
        }

    def plot(self) -> Page:
        """The run's curves over rounds, bytes and simulated time."""
        return self.compare().plot()

    def compare(self, *others: Run) -> Comparison:
        """A comparison whose speed-ups are relative to this run."""
        return Comparison((self.record, *(other.record for other in others)))

    def __str__(self) -> str:
        return str(self.compare())

    __repr__ = __str__


@dataclass(frozen=True, repr=False)
class Comparison:
    """Several runs, printed as a table of their results. `runs` has their records."""

    runs: tuple[Record, ...]

    @property
    def table(self) -> list[tuple[str, ...]]:
        """Results per run; the first row is the header."""
        return final_rows(self.runs)

    def plot(self) -> Page:
        """The overlaid curves of all runs, and the table."""
        title = ", ".join(run.title for run in self.runs)
        return Page(page.document(title, [html_table(self.table), charts.curves(self.runs)]))

    def __str__(self) -> str:
        return markdown_table(self.table)

    __repr__ = __str__


def simulate(
    fleet: str | Path | Mapping[str, Any],
    *,
    model: Model | None = None,
    strategy: str | Callable[[Job], Strategy] | None = None,
    seed: int | None = None,
    rounds: int | None = None,
    title: str = "",
    folder: str | Path | None = None,
) -> Run:
    """Run a fleet on a virtual clock.

    Args:
        fleet: A `fleet.toml`, or its tables; paths in tables are relative to the current folder.
        model: Replaces the model of the table [model]; see `fedprune_export.load`.
        strategy: Replaces the job's: a name, or a module's function that composes one.
        seed: Replaces the job's.
        rounds: Replaces the job's.
        title: The run's name; by default that of `strategy`, else of the job.
        folder: Where the run is saved, so that it resumes after a kill; by default nothing is saved.

    Raises:
        ConfigError: A setting is missing, unknown or wrong; the message names it.
        FedpruneError: Model or data can't be read, or a training fails.
    """
    if callable(strategy):
        strategy = f"{strategy.__module__}:{strategy.__qualname__}"
    path, tables = (Path("settings"), fleet) if isinstance(fleet, Mapping) else (Path(fleet), None)
    title = title or strategy or ""
    plan = read_plan(path, strategy=strategy, seed=seed, rounds=rounds, title=title, tables=tables, model=model)
    return Run(simulate_experiment(plan, None if folder is None else Path(folder)))
