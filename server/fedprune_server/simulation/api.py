"""Simulations from Python: run a fleet, plot its curves, compare it with other runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path
from types import FunctionType
from typing import Any

from fedprune.core.errors import ConfigError
from fedprune.core.validation import check_whole
from fedprune.jobs.job import Job
from fedprune.strategies.strategy import Strategy
from fedprune_export.bundles.hub_repository import save_pretrained
from fedprune_export.pruning.model import Model
from fedprune_server.config.track_targets import TrackTarget, track_targets
from fedprune_server.simulation.experiment import Experiment, plan_boards
from fedprune_server.simulation.fleet.simulated_fleet import FleetPlan, read_fleet_plan
from fedprune_server.simulation.results.comparison import (
    board_figures,
    comparison_document,
    group_by_seed,
    variant_figures,
    variant_rows,
)
from fedprune_server.simulation.results.coverage import left_out_boards, left_out_note
from fedprune_server.simulation.results.model_card import model_card
from fedprune_server.simulation.results.publication import save_figure, save_table
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.results.report import write_report
from fedprune_server.simulation.results.rows import device_rows, round_rows
from fedprune_server.simulation.results.run_folder import REFERENCE_FOLDER, simulate_in_folder
from fedprune_server.simulation.results.runs_progress import RunDisplay, is_watched
from fedprune_server.simulation.results.tables import final_rows, result_table, tail_note
from fedprune_server.simulation.results.tracked_rounds import track_rounds
from fedprune_server.simulation.simulation import Simulation

log = logging.getLogger("fedprune.server")

_PAGE_HEIGHT_PX = 620  # pixels of a page in a notebook


@dataclass(frozen=True, repr=False)
class Page:
    """A self-contained HTML page, which a notebook displays. `html` is its text."""

    html: str

    def save(self, path: str | Path) -> Path:
        Path(path).write_text(self.html, encoding="utf-8")
        return Path(path)

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.html)}" width="100%" height="{_PAGE_HEIGHT_PX}" frameborder="0"></iframe>'


@dataclass(frozen=True, repr=False)
class SimulatedRun:
    """A simulated run, printed as a table of its results.

    Attributes:
        record: All its numbers.
        model: The global model after the last round.
        reference: All numbers of FedAvg, if that was run.
    """

    record: Record
    model: Model
    reference: Record | None = None

    def rows(self, *, devices: bool = False) -> list[dict[str, Any]]:
        """A row per round, ready for pandas or pyarrow; docs/simulate.md has the columns and their units.

        Args:
            devices: A row per round and device that took part in it instead.
        """
        return device_rows(self.record) if devices else round_rows(self.record)

    def plot(self) -> Page:
        """The run's curves over rounds, bytes and simulated time."""
        return Comparison((self.record,)).plot()

    def compare(self, *other_runs: SimulatedRun) -> Comparison:
        """Compare this run, to which speed-ups are relative, with others. Equal titles are told apart by their
        strategies."""
        comparison = Comparison(_titled_by_strategy((self.record, *(other.record for other in other_runs))))
        _warn_of_absent_boards(left_out_boards(comparison.runs))
        return comparison

    def report(self, folder: Path, *, judged: bool = True) -> Path:
        """Write the report and return its path. `judged`: whether a comparison with the reference tests the claims."""
        return write_report(folder, self.record, self.reference, judged=judged)

    def save_pretrained(self, folder: str | Path, *, license: str = "") -> Path:  # noqa: A002  as the hub calls it
        """Write the model as a folder in the layout of the Hugging Face hub, with a card of how it was trained.

        Args:
            license: Its identifier on the hub, such as `apache-2.0`; by default the card has a placeholder.

        Raises:
            ModelError: The model can't be written as a graph.
            StorageError: The folder can't be written.
        """
        return save_pretrained(self.model, folder, card=model_card(self.record, license))

    def __str__(self) -> str:
        return str(Comparison((self.record,)))

    __repr__ = __str__


@dataclass(frozen=True, repr=False)
class Comparison:
    """Several runs, printed as a table of their results. `runs` has their records."""

    runs: tuple[Record, ...]

    @property
    def table(self) -> list[tuple[str, ...]]:
        """Results per run; the first row is the header."""
        return final_rows(self.runs)

    @property
    def variants(self) -> list[dict[str, Any]]:
        """Runs that differ in their seeds alone as a row: mean, standard deviation, and the difference from the first
        such row, paired by seed, with half of its 95 % interval (`..._delta`, `..._delta_half`); empty if every run has
        settings of its own."""
        return variant_figures(group_by_seed(self.runs))

    @property
    def boards(self) -> list[dict[str, Any]]:
        """A row per run and board: the latest score of the model that it serves, and, if the run of the strategy
        `local` with the same seed is compared, its gain over training alone."""
        return board_figures(self.runs)

    def plot(self) -> Page:
        """The overlaid curves of all runs, and the tables."""
        return Page(comparison_document(self.runs).to_html())

    def save_figure(self, path: str | Path, along: str = "round", **style: Any) -> Path:
        """Draw the curves as SVG, PDF or PNG, of a `size` and with `labels`; see `publication.save_figure`."""
        return save_figure(self.runs, Path(path), along, **style)

    def save_table(self, path: str | Path) -> Path:
        """Write the results for LaTeX (`.tex`) or as CSV; see `publication.save_table`."""
        return save_table(self.runs, Path(path))

    def __str__(self) -> str:
        variants = group_by_seed(self.runs)
        rows = [self.table, *([variant_rows(variants)] if variants else [])]
        return "\n\n".join([*(result_table(r).to_markdown() for r in rows), tail_note(self.runs)])

    __repr__ = __str__


def _titled_by_strategy(runs: Sequence[Record]) -> tuple[Record, ...]:
    strategies: dict[str, set[str]] = {}
    for run in runs:
        strategies.setdefault(run.title, set()).add(str(run.job.get("strategy")))
    return tuple(
        replace(run, title=f"{run.title} ({run.job.get('strategy')})") if len(strategies[run.title]) > 1 else run
        for run in runs
    )


def simulate(
    fleet: str | Path | Mapping[str, Any] | FleetPlan,
    *,
    model: Model | None = None,
    strategy: str | Callable[[Job], Strategy] | None = None,
    seed: int | None = None,
    rounds: int | None = None,
    title: str = "",
    folder: str | Path | None = None,
    reference: bool = False,
    workers: int | None = None,
    cuda: bool = False,
    track: str | None = None,
    progress: bool | None = None,
) -> SimulatedRun:
    """Run a fleet on a virtual clock.

    Args:
        fleet: A `fleet.toml`, or its tables; paths in tables are relative to the current folder. A plan that was read
            before has its own `model`, `strategy`, `seed`, `rounds`, `title` and `reference`, so they can't be given.
        model: Replaces the model of the table [model]; see `fedprune_export.load`.
        strategy: Replaces the job's: a name, or a module's function that composes one.
        seed: Replaces the job's.
        rounds: Replaces the job's.
        title: The run's name; by default the job's, or the strategy's where the job has none.
        folder: Where the run is saved, so that it resumes after a kill, and in `reference` there FedAvg's; by default
            nothing is saved.
        reference: Whether FedAvg at full width is run on the same devices, too.
        workers: Number of processes, in a script under `if __name__ == "__main__":`; by default the fleet's.
        cuda: Whether to train on an NVIDIA GPU, if that works.
        track: Experiment trackers that get every round, such as `mlflow,tensorboard:events`; by default the fleet's.
        progress: Whether progress is shown on stderr; by default on a terminal and in a notebook.

    Raises:
        ConfigError: A setting is missing, unknown or wrong, or a script would run again in each process.
        MissingExtraError: The library of a tracker is not installed.
        PlanError: Too few boards can hold what the strategy trains; nothing has been trained then.
        FedpruneError: Model or data can't be read, or a training fails.
    """
    run_folder = None if folder is None else Path(folder)
    targets = None if track is None else track_targets(track, "track")
    if workers is not None:
        check_whole("workers", workers, 1, 10**6)
    settings = {"model": model, "strategy": strategy, "seed": seed, "rounds": rounds, "reference": reference}
    plan = _plan_of(fleet, title, settings)
    targets = plan.track if targets is None else targets
    plan = replace(plan, workers=workers or plan.workers, cuda=cuda or plan.cuda, track=targets)
    reference_experiment = plan.reference_experiment()
    # Before the first of them trains, perhaps for hours.
    for experiment in filter(None, (plan, reference_experiment)):
        if reasons := plan_boards(experiment):
            _warn_of_absent_boards({experiment.job.strategy: reasons})
    shows_progress = is_watched() if progress is None else progress
    record, trained_model = _simulate_experiment(plan, run_folder, targets, shows_progress=shows_progress)
    if reference_experiment is None:
        return SimulatedRun(record, trained_model)
    reference_folder = None if run_folder is None else run_folder / REFERENCE_FOLDER
    reference_record, _ = _simulate_experiment(
        reference_experiment, reference_folder, targets, shows_progress=shows_progress
    )
    return SimulatedRun(record, trained_model, reference_record)


def _warn_of_absent_boards(reasons: Mapping[str, Mapping[str, str]]) -> None:
    if note := left_out_note(reasons):
        log.warning("%s", note)


def _plan_of(fleet: str | Path | Mapping[str, Any] | FleetPlan, title: str, settings: dict[str, Any]) -> FleetPlan:
    """The plan of a file or of tables with these settings, or the given plan, which can't be given other settings."""
    if isinstance(fleet, FleetPlan):
        given = settings | {"title": title or None, "reference": settings["reference"] or None}
        conflicting = [name for name, value in given.items() if value is not None]
        if conflicting:
            raise ConfigError("fleet", expected=f"a file or tables, to set {', '.join(conflicting)}", got="a plan")
        return fleet
    path, tables = (Path("settings"), fleet) if isinstance(fleet, Mapping) else (Path(fleet), None)
    settings["strategy"] = _strategy_name(settings["strategy"])
    plan = read_fleet_plan(path, tables=tables, **settings)
    return replace(plan, title=title or (plan.job.strategy if plan.job.name == Job.name else plan.job.name))


def _strategy_name(strategy: str | Callable[[Job], Strategy] | None) -> str | None:
    """A strategy as a job names it. Raises `ConfigError` for a function that no other process can import."""
    if strategy is None or isinstance(strategy, str):
        return strategy
    # Processes import a strategy by its name: a lambda, or a function within another one, has none.
    if isinstance(strategy, FunctionType) and strategy.__qualname__.isidentifier():
        return f"{strategy.__module__}:{strategy.__qualname__}"
    raise ConfigError(
        "strategy",
        expected="a name, or a module's function that composes one",
        got=getattr(strategy, "__qualname__", type(strategy).__name__),
        hint="Write a function that takes the job and returns your strategy, at the top of a module "
        "(docs/write-a-strategy.md).",
    )


def _simulate_experiment(
    experiment: Experiment, folder: Path | None, targets: Sequence[TrackTarget], *, shows_progress: bool
) -> tuple[Record, Model]:
    with (
        track_rounds(targets, experiment, folder) as track,
        RunDisplay(experiment.title) if shows_progress else nullcontext() as display,
    ):

        def follow(show: Callable[[RunDisplay, Simulation], None], simulation: Simulation) -> None:
            track(simulation)
            if display is not None:
                show(display, simulation)

        begin, show = partial(follow, RunDisplay.begin), partial(follow, RunDisplay.show)
        return simulate_in_folder(experiment, folder, show, on_begin=begin)
