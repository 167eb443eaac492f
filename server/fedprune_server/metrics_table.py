"""A run's numbers as two Parquet tables, which pandas, polars, DuckDB and R read as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedprune.disk import storage_errors
from fedprune_server.record import Record, RoundRow

METRICS = "metrics{}.parquet"
"""Long: a row per round, device and metric."""

ROUNDS = "rounds{}.parquet"
"""Wide: a row per round."""

SPENT = ("bytes_down", "bytes_up", "training_macs")
"""Metrics of what a device cost since the round before."""

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

    `metrics.parquet` has round, simulated time, bytes down and up since the run began, device (null for the global
    model), metric and value. `rounds.parquet` has a row per round with the global model's numbers, the means over
    devices of what each measured last (`mean_...`), bytes and multiplications. Both carry title and job as metadata.

    Args:
        folder: Where to.
        record: The run.
        suffix: Put before the ending of the files' names.

    Raises:
        StorageError: The disk fails.
    """
    about = {"fedprune.title": record.title, "fedprune.job": json.dumps(record.job)}
    long = pa.Table.from_pylist([_row(r, *m) for r in record.rounds for m in _metrics(r)], _LONG)
    wide = pa.Table.from_pylist(_wide(record))
    for name, table in ((METRICS, long), (ROUNDS, wide)):
        path = folder / name.format(suffix)
        with storage_errors(f"can't write {path}"):
            pq.write_table(table.replace_schema_metadata(about), path, compression="zstd")


def _row(row: RoundRow, device: str | None, metric: str, value: float) -> dict[str, Any]:
    values = (row.round, row.at, row.down, row.up, device, metric, value)
    return dict(zip(_LONG.names, values, strict=True))


def _metrics(row: RoundRow) -> Iterator[tuple[str | None, str, float]]:
    """Device, metric and value of everything that a round has."""
    for name, value in (("accuracy", row.accuracy), ("loss", row.loss)):
        if value is not None:
            yield None, name, value
    for name, value in row.measured.items():
        yield None, name, value
    for metric, values in row.own.items():
        for device, value in values.items():
            yield device, metric, value
    for device, density in row.density.items():
        yield device, "density", density
    for device, spent in row.spent.items():
        for metric, count in zip(SPENT, spent, strict=True):
            yield device, metric, float(count)


def _wide(record: Record) -> list[dict[str, Any]]:
    own = sorted(set().union(*(r.own for r in record.rounds)))
    measured = sorted(set().union(*(r.measured for r in record.rounds)))
    means = {f"mean_{m}": record.own_means(m) for m in own}
    return [
        {
            "round": r.round,
            "time_s": r.at,
            "total_bytes_down": r.down,
            "total_bytes_up": r.up,
            "training_macs": r.macs,
            "asked": r.asked,
            "updates": r.updates,
            "model": r.model,
            "accuracy": r.accuracy,
            "loss": r.loss,
            **{k: v[i] for k, v in means.items()},
            **{k: r.measured.get(k) for k in measured},
        }
        for i, r in enumerate(record.rounds)
    ]
