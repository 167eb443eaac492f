"""A run's numbers as tables of pyarrow, which the extra `parquet` brings: in files, and for data frames."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedprune.core.disk import storage_errors
from fedprune_server.monitoring.round_rows import RoundRow
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.results.run_folder import round_rows

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
    return pa.Table.from_pylist(round_rows(record))


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
