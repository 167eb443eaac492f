"""Sweeps: one `fleet.toml` simulated again and again, with other settings each time.

A sweep's file names the `fleet.toml` and has a table for each variant, whose keys replace those of the same tables:

    config = "fleet.toml"
    seeds = [0, 1, 2]

    [[runs]]
    name = "heterofl"
    job = { strategy = "heterofl" }

    [[runs]]
    name = "ours"
    job = { strategy = "fedprune", rounds = 20 }
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from fedprune.core import validation
from fedprune.core.disk import path_exists
from fedprune.core.errors import ConfigError, FedpruneError, PlanError, value_text
from fedprune.core.toml_file import read_toml
from fedprune_server.simulation.experiment import plan_boards
from fedprune_server.simulation.fleet.fleet_tables import read_fleet_tables
from fedprune_server.simulation.fleet.simulated_fleet import FleetPlan, read_fleet_plan
from fedprune_server.simulation.results.report import write_report
from fedprune_server.simulation.results.run_folder import simulate_in_folder
from fedprune_server.simulation.results.tracked_rounds import track_rounds
from fedprune_server.simulation.runs import Progress, RunSpec
from fedprune_server.simulation.simulation import Simulation

_SWEEP_KEYS = ("config", "seeds", "runs")
_RUN_KEYS = ("name", "seeds")  # keys of a variant that are not tables of `fleet.toml`

_MAX_SEEDS = 1000


def read_sweep(path: Path) -> list[RunSpec]:
    """The runs of a sweep's file: each variant with each seed. Raises `ConfigError` if it can't be read, or a key is
    missing, unknown or wrong, also in a variant's tables."""
    body = read_toml(path, ConfigError)
    validation.check_keys(_SWEEP_KEYS, body, str(path))
    config = body.get("config")
    if not isinstance(config, str) or not path_exists(path.parent / config, file=True):
        got = value_text(config) if "config" in body else "nothing"
        hint = f'Name it in the first line, as seen from {path.parent}: config = "fleet.toml".'
        raise ConfigError(f"{path}: config", expected="a fleet.toml that exists", got=got, hint=hint)
    rows = body.get("runs")
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise ConfigError(f"{path}: [[runs]]", expected="a table with a name for each variant")
    default_seeds = _checked_seeds(body.get("seeds", [0]), f"{path}: seeds")
    return variant_runs((path.parent / config).resolve(), rows, default_seeds, f"{path}: [[runs]]")


def variant_runs(config: Path, rows: Sequence[object], seeds: Sequence[int], label: str) -> list[RunSpec]:
    """The runs of variants of a `fleet.toml`: each with each seed.

    Raises `ConfigError` if a key is missing, unknown or wrong, or two runs have the same name.

    `rows`: tables as [[runs]] of a sweep's file has them; `seeds`: those of variants without seeds of their own;
    `label`: the name of the rows in errors.
    """
    runs = [run for number, row in enumerate(rows, 1) for run in _variant_runs(number, row, seeds, config, label)]
    names = [r.name for r in runs]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(label, expected="another name or seed for each", got=f"{repeated[0]!r} twice")
    return runs


def _variant_runs(number: int, row: object, default_seeds: Sequence[int], config: Path, label: str) -> list[RunSpec]:
    """A variant's runs, one for each seed. Errors name the variant once its name is known."""
    if not isinstance(row, Mapping) or not isinstance(row.get("name"), str):
        raise ConfigError(f"{label} {number}: name", expected="a text", got=value_text(row))
    label = f"{label} {row['name']}"
    changes = {k: v for k, v in row.items() if k not in _RUN_KEYS}
    for key, value in changes.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"{label}: {key}", expected="a table of fleet.toml, such as job", got=value_text(value))
    # Read the `fleet.toml` with a variant's changes. An error that the changes cause names the sweep's file.
    try:
        read_fleet_tables(config, changes)
    except FedpruneError as error:
        read_fleet_tables(config)
        subject = error.what.removeprefix(f"{config}: ")
        raise error.with_subject(f"{label}: {subject}") from error
    seeds = _checked_seeds(row["seeds"], f"{label}: seeds") if "seeds" in row else default_seeds
    return [RunSpec(f"{row['name']}-{s}", {"config": str(config), "changes": changes, "seed": s}) for s in seeds]


def check_plans(runs: Sequence[RunSpec]) -> None:
    """Plan the boards of each variant's first run before any trains. Raises `PlanError` for one that can't begin;
    whatever else is wrong with a run ends that run alone."""
    for _, variant in groupby(runs, variant_name):
        try:
            plan_boards(_plan_of_run(next(variant)))
        except FedpruneError as error:  # noqa: PERF203 - reading a fleet takes longer
            if isinstance(error, PlanError):
                raise


def _plan_of_run(run: RunSpec) -> FleetPlan:
    settings = run.settings
    return read_fleet_plan(Path(settings["config"]), seed=settings["seed"], changes=settings["changes"], title=run.name)


def variant_name(run: RunSpec) -> str:
    """The name of a run's variant."""
    return run.name.removesuffix(f"-{run.settings['seed']}")


def _checked_seeds(value: object, label: str) -> list[int]:
    seeds = validation.check_items(label, value, _MAX_SEEDS, "whole numbers, such as [0, 1, 2]", min_items=1)
    return [validation.check_whole(label, seed) for seed in seeds]


def simulate_run(run: RunSpec, folder: Path, report: Progress) -> None:
    """Simulate one run of a sweep from its last saved state, and write its report. Raises `FedpruneError` as
    `simulated_fleet.read_fleet_plan` and `run_folder.simulate_in_folder`."""
    logging.getLogger("fedprune").addHandler(logging.NullHandler())  # other runs' bars are on the terminal
    plan = _plan_of_run(run)

    def progress(simulation: Simulation) -> None:
        track(simulation)
        report(len(simulation.state.history) / plan.job.rounds, simulation.score_note)

    with track_rounds(plan.track, plan, folder) as track:
        record, _ = simulate_in_folder(plan, folder, progress, on_begin=track)
    write_report(folder, record)
