"""A run's numbers as rows, for data frames and spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fedprune.core.atomic_file import write_atomically
from fedprune_server.monitoring.round_rows import WideRows
from fedprune_server.simulation.results.record import Record, latest_values

# Costs of a device since the previous round.
COST_COLUMNS = ("bytes_down", "bytes_up", "training_macs", "active_macs", "training_energy_uj")


def round_rows(record: Record) -> list[dict[str, Any]]:
    """A row per round, all with the same columns, without columns that are empty in every round."""
    rows = list(map(WideRows(record.measure).row, record.rounds))
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def device_rows(record: Record) -> list[dict[str, Any]]:
    """A row per round and device that received, trained or delivered something in it. The score of the model that the
    device serves stays that of its last update until its next one."""
    metrics = sorted(set().union(*(r.device_metrics for r in record.rounds)))
    return [
        {
            "round": r.round,
            "time_s": r.elapsed_s,
            "device": device,
            "density": r.density.get(device),
            **dict(zip_longest(COST_COLUMNS, r.spent.get(device, ()))),
            f"local_{record.measure}": served.get(device),
            **{m: r.device_metrics.get(m, {}).get(device) for m in metrics},
        }
        for r, served in zip(record.rounds, latest_values(r.local for r in record.rounds), strict=True)
        for device in sorted(r.spent.keys() | r.density.keys() | set().union(*r.device_metrics.values()))
    ]


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """Write the rounds of runs below each other for a spreadsheet, with a run's title and its job's seed in each row.
    Raises `StorageError` if the disk fails."""
    rows = [{"run": record.title, "seed": record.seed, **row} for record in records for row in round_rows(record)]
    write_atomically(path, csv_bytes(rows))


def csv_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as a CSV file with all their columns."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()
