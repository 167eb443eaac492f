"""The folder of a simulated run: its settings, its numbers, and the state from which it resumes after a kill.

The numbers are also written as two Parquet tables, for pandas, polars, DuckDB and R.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from fedprune.core.atomic_file import appearing, write_whole
from fedprune.core.disk import storage_errors
from fedprune.core.errors import FedpruneError
from fedprune.jobs.job import Job
from fedprune_export.pruning.model import Model
from fedprune_server.monitoring.round_rows import EACH_ROUND, RoundRow, WideRows
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.runs import differences
from fedprune_server.simulation.scratch_store import ScratchStore
from fedprune_server.simulation.simulation import Simulation
from fedprune_server.simulation.state import OtherRunError

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
            write_metrics(folder, record, suffix)
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
    stored["job"] = _complete(stored.get("job"))
    found = differences(json.loads(json.dumps(stored)), json.loads(json.dumps(experiment.settings())), _UNDECIDED)
    return (
        found or "the same settings: what differs is the model's graph, the server's samples or a strategy's own code"
    )


def _complete(job: Any) -> Any:
    """A stored job with all its settings: earlier versions left out what was as by default."""
    try:
        return asdict(Job.from_dict(job))
    except (FedpruneError, TypeError, AttributeError):
        return job


METRICS = "metrics{}.parquet"
"""Long format: a row per round, device and metric."""

ROUNDS = "rounds{}.parquet"
"""Wide format: a row per round."""

SPENT = ("bytes_down", "bytes_up", "training_macs", "active_macs")
"""Costs of a device since the previous round."""

_PIECE = 50_000

_LONG = pa.schema(
    [
        ("round", pa.int32()),
        ("time_s", pa.float64()),
        ("total_bytes_down", pa.int64()),
        ("total_bytes_up", pa.int64()),
        ("device", pa.dictionary(pa.int32(), pa.string())),
        ("metric", pa.dictionary(pa.int32(), pa.string())),
        ("value", pa.float64()),
    ]
)


def write_metrics(folder: Path, record: Record, suffix: str = "") -> None:
    """Write both tables of a run.

    `metrics.parquet` has round, simulated time, bytes down and up since the start, device (null for the global model),
    metric and value. `rounds.parquet` has a row per round with the global model's numbers, the devices' mean latest
    measurements (`mean_...`), bytes and MACs. Both have title and job as metadata. Raises `StorageError` if the disk
    fails."""
    about = {"fedprune.title": record.title, "fedprune.job": json.dumps(record.job)}
    path = folder / METRICS.format(suffix)
    schema = _LONG.with_metadata(about)
    # A piece at a time: of many devices and rounds the whole takes more memory than the run did.
    with storage_errors(f"can't write {path}"), pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for piece in _pieces(record.rounds):
            writer.write_table(pa.table([pa.array(v, f.type) for v, f in zip(piece, schema, strict=True)], schema))
    wide = rounds_table(record).replace_schema_metadata(about)
    path = folder / ROUNDS.format(suffix)
    with storage_errors(f"can't write {path}"):
        pq.write_table(wide, path, compression="zstd")


def _pieces(rounds: Sequence[RoundRow]) -> Iterator[tuple[list[Any], ...]]:
    """The long table's columns, about `_PIECE` rows at a time."""
    piece: tuple[list[Any], ...] = tuple([] for _ in _LONG.names)
    for row in rounds:
        for device, metric, value in _metrics(row):
            values = (row.round, row.at, row.down, row.up, device, metric, value)
            for column, found in zip(piece, values, strict=True):
                column.append(found)
        if len(piece[0]) >= _PIECE:
            yield piece
            piece = tuple([] for _ in _LONG.names)
    yield piece


def _metrics(row: RoundRow) -> Iterator[tuple[str | None, str, float]]:
    """Device, metric and value of all numbers of a round."""
    for name, value in (*row.metrics.items(), *row.measured.items()):
        yield None, name, value
    for metric, values in row.own.items():
        for device, value in values.items():
            yield device, metric, value
    for device, density in row.density.items():
        yield device, "density", density
    for device, spent in row.spent.items():
        for metric, count in zip(SPENT, spent, strict=False):
            yield device, metric, float(count)


def rounds_table(record: Record) -> pa.Table:
    """The wide table: a row per round. Columns that no round has are left out."""
    rows = list(map(WideRows(record.measure).row, record.rounds))
    own = sorted(set().union(*(r.own for r in record.rounds)))
    names = [
        *EACH_ROUND,
        *sorted(set().union(*(r.metrics for r in record.rounds))),
        *(f"local_{record.measure}" for _ in range(any(r.local for r in record.rounds))),
        *(f"mean_{metric}" for metric in own),
        *sorted(set().union(*(r.measured for r in record.rounds))),
    ]
    return pa.Table.from_pylist([{name: row.get(name) for name in dict.fromkeys(names)} for row in rows])


def runs_table(records: Sequence[Record]) -> pa.Table:
    """The wide tables of several runs below each other, with a run's title and its job's seed in each row."""
    tables = []
    for record in records:
        table = rounds_table(record)
        for name, value in (("seed", record.job.get("seed", 0)), ("run", record.title)):
            table = table.add_column(0, name, pa.array([value] * len(table)))
        tables.append(table)
    return pa.concat_tables(tables, promote_options="permissive")


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """Write the rounds of runs for a spreadsheet. Raises `StorageError` if the disk fails."""
    with appearing(path) as partial:
        csv.write_csv(runs_table(records), partial)


def devices_table(record: Record) -> pa.Table:
    """A row per round and device that has received, trained or delivered something in it."""
    metrics = sorted(set().union(*(r.own for r in record.rounds)))
    return pa.Table.from_pylist(
        [
            {
                "round": r.round,
                "time_s": r.at,
                "device": device,
                "density": r.density.get(device),
                **dict(zip_longest(SPENT, r.spent.get(device, ())[: len(SPENT)])),
                **{m: r.own.get(m, {}).get(device) for m in metrics},
            }
            for r in record.rounds
            for device in sorted(r.spent.keys() | r.density.keys() | set().union(*r.own.values()))
        ]
    )
