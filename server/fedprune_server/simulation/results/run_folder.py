"""The folder of a simulated run: its settings, its numbers, and the state from which it resumes after a kill.

The numbers are also written as two Parquet tables, for pandas, polars, DuckDB and R, if the extra `parquet` is there.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedprune.core.atomic_file import appearing, write_whole
from fedprune.core.disk import storage_errors
from fedprune.output.extras import install_command
from fedprune_export.pruning.model import Model
from fedprune_server.monitoring.round_rows import EACH_ROUND, WideRows
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.runs import differences
from fedprune_server.simulation.scratch_store import ScratchStore
from fedprune_server.simulation.simulation import Simulation
from fedprune_server.simulation.state import OtherRunError

log = logging.getLogger("fedprune.server")

CONFIG = "config{}.json"
RECORD = "metrics{}.json"
"""Files of a run's folder; a reference's have a suffix."""

_UNDECIDED = ("fingerprint", "title", "checkpoints")
"""Settings that don't affect the result, or mean nothing to a reader."""


def simulate(
    experiment: Experiment,
    folder: Path | None = None,
    progress: Callable[[Simulation], None] | None = None,
    *,
    begun: Callable[[Simulation], None] | None = None,
    suffix: str = "",
    state: str = "run",
) -> Record:
    """Run an experiment to its end, from its last saved state, and write its numbers into a folder.

    Args:
        folder: Folder of `config.json`, `metrics.json`, `metrics.parquet`, `rounds.parquet` and the saved state. None
            saves nothing.
        progress: Called after every training and every round.
        begun: Called once, before the first training.
        suffix: Suffix of those files' stems, for a folder with several runs.
        state: Subfolder of the saved state.

    Returns:
        The run's record.

    Raises:
        StorageError: The folder holds another run, or the disk fails.
        FedpruneError: As `Simulation.run`.
    """
    return simulate_to_model(experiment, folder, progress, begun=begun, suffix=suffix, state=state)[0]


def simulate_to_model(
    experiment: Experiment,
    folder: Path | None = None,
    progress: Callable[[Simulation], None] | None = None,
    *,
    begun: Callable[[Simulation], None] | None = None,
    suffix: str = "",
    state: str = "run",
) -> tuple[Record, Model]:
    """Run an experiment as `simulate` does. Returns the last global model, too."""
    with nullcontext(None) if folder is not None else TemporaryDirectory(prefix="fedprune-blobs-") as scratch:
        place = None if folder is None else folder / state
        if folder is not None and place is not None:
            with storage_errors(f"can't make {place}"):
                place.mkdir(parents=True, exist_ok=True)
        blobs = ScratchStore((place or Path(str(scratch))) / "blobs")
        try:
            simulation = Simulation(experiment, blobs, folder=place)
        except OtherRunError as error:
            differ = "" if folder is None else _differences(folder / CONFIG.format(suffix), experiment)
            raise OtherRunError(error.what, got=differ or None, hint=error.hint) from error
        if folder is not None:
            text = json.dumps(experiment.settings(), indent=1) + "\n"
            write_whole(folder / CONFIG.format(suffix), text.encode())
        simulation.run(progress, begun)
        record = simulation.record()
        if folder is not None:
            record.save(folder / RECORD.format(suffix))
            _write_tables(folder, record, suffix)
        return record, simulation.trained()


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, also after its state was deleted to start again."""
    return (folder / "run").is_dir() or "fingerprint" in _settings(folder / CONFIG.format(""))


def _settings(path: Path) -> dict[str, Any]:
    """A run's settings; empty if they can't be read."""
    try:
        body = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _differences(path: Path, experiment: Experiment) -> str:
    stored = _settings(path)
    if not stored:
        return ""
    found = differences(json.loads(json.dumps(stored)), json.loads(json.dumps(experiment.settings())), _UNDECIDED)
    return (
        found or "the same settings: what differs is the model's graph, the server's samples or a strategy's own code"
    )


def _write_tables(folder: Path, record: Record, suffix: str) -> None:
    """Write the Parquet tables; without pyarrow, say once how to get them."""
    if find_spec("pyarrow") is None:
        _note_missing_tables()
        return
    from fedprune_server.simulation.results.parquet_tables import write_metrics

    write_metrics(folder, record, suffix)


@cache
def _note_missing_tables() -> None:
    log.warning("metrics.json alone has the numbers: Parquet tables need pyarrow. %s", install_command("parquet"))


def round_rows(record: Record) -> list[dict[str, Any]]:
    """A row per round, all with the same columns; those that no round has are left out."""
    rows = list(map(WideRows(record.measure).row, record.rounds))
    own = sorted(set().union(*(r.own for r in record.rounds)))
    names = [
        *EACH_ROUND,
        *sorted(set().union(*(r.metrics for r in record.rounds))),
        *(f"local_{record.measure}" for _ in range(any(r.local for r in record.rounds))),
        *(f"mean_{metric}" for metric in own),
        *sorted(set().union(*(r.measured for r in record.rounds))),
    ]
    return [{name: row.get(name) for name in dict.fromkeys(names)} for row in rows]


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """Write the rounds of runs below each other for a spreadsheet, with a run's title and its job's seed in each row.
    Raises `StorageError` if the disk fails."""
    rows = [
        {"run": record.title, "seed": record.job.get("seed", 0), **row}
        for record in records
        for row in round_rows(record)
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with appearing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
