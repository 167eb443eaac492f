"""Writes the fleet's status for the console: into `status.db`, which the console's process reads (`fleet_view`).

The file is derived data, which the server makes again at each start. It is therefore written without waiting for the
disk, and a reader never blocks the writer (WAL). The job's own database, which may be PostgreSQL, stays out of the
console's reach: that process needs neither its password nor a connection to it.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from fedprune.core.closeable import Closeable
from fedprune.core.disk import storage_errors
from fedprune_server.storage.sqlite_file import LOOP_BUSY_TIMEOUT_S, sqlite_errors
from fedprune_server.web.state.records import Row, StatusRecord

# In the state folder. It holds nothing that isn't stored elsewhere, so that backups leave it out.
STATUS_FILE = "status.db"

# Fields of a device's row by which devices can be sorted: each has a column, which SQLite computes from the row's JSON.
SORT_COLUMNS = (
    "name", "job", "online", "state", "profile", "slot", "release", "density", "parameters", "samples", "seen_at",
    "temperature_c", "bytes_down", "bytes_up", "seconds", "measured", "staleness", "status",
)  # fmt: skip

# How many records of a kind are kept; of more, the oldest are deleted, and closed alerts before open ones. Details of
# devices are asked for one by one, and 50 are more than operators look at within a minute.
_MAX_RECORDS = {"log": 5000, "alert": 1000, "device": 50, "crashes": 50}

# Rounds that are kept of each job; the server's database keeps all.
_MAX_ROUNDS = 2000

_DEVICE_COLUMNS = ", ".join(f"{c} GENERATED ALWAYS AS (json_extract(body, '$.{c}')) STORED" for c in SORT_COLUMNS[1:])
# `change` counts all writes, so that a reader finds what is new by one number. A device that is gone keeps its row
# without a `body`, by which readers see that. `beat` has the time of the last write, as a sign of life, and `whole`:
# whether all devices are published.
_TABLES = (
    f"CREATE TABLE device_status (name TEXT PRIMARY KEY, change INTEGER NOT NULL, body TEXT, {_DEVICE_COLUMNS})",
    "CREATE INDEX device_status_by_change ON device_status (change)",
    """
    CREATE TABLE records (
        kind TEXT NOT NULL, scope TEXT NOT NULL, key NOT NULL, change INTEGER NOT NULL, body TEXT NOT NULL,
        PRIMARY KEY (kind, scope, key)
    )
    """,
    "CREATE INDEX records_by_change ON records (change)",
    "CREATE INDEX records_by_kind ON records (kind, change)",
    "CREATE TABLE beat (at REAL NOT NULL, whole INTEGER NOT NULL)",
    "INSERT INTO beat VALUES (0, 0)",
)


class StatusWriter(Closeable):
    """Makes a new file, in place of that of an earlier start, and writes records into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(f"can't make {path}"):
            for end in ("", "-wal", "-shm"):
                path.with_name(path.name + end).unlink(missing_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self._change = 0
        with self._errors():
            self._connection = sqlite3.connect(
                path, timeout=LOOP_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode=WAL")
            # After a power cut the file is made again, so that nothing waits for the disk.
            self._connection.execute("PRAGMA synchronous=OFF")
            for statement in _TABLES:
                self._connection.execute(statement)

    def close(self) -> None:
        self._connection.close()

    def clear(self) -> None:
        with self._errors(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("DELETE FROM records WHERE kind != 'log'")  # the server has lines only once
            self._connection.execute("DELETE FROM device_status")
            self._connection.execute("UPDATE beat SET whole = 0")

    def write(
        self,
        records: Iterable[tuple[StatusRecord, str]] = (),
        devices: Mapping[str, str | None] | None = None,
        *,
        at: float,
        is_complete: bool = False,
    ) -> None:
        """Write records and devices, all or none.

        Args:
            records: Records, each with its JSON (`encode_status`).
            devices: JSON of devices' rows, by name; None for devices that are gone.
            is_complete: Whether all devices that the server knows are in the file now.
        """
        kinds, jobs_with_rounds = set[str](), set[str]()
        with self._errors(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            for record, body in records:
                self._change += 1
                key = self._change if record.kind == "log" else record.key  # lines replace no others
                self._connection.execute(
                    "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)",
                    (record.kind, record.scope, key, self._change, body),
                )
                kinds.add(record.kind)
                if record.kind == "round":
                    jobs_with_rounds.add(record.scope)
            for name, row in (devices or {}).items():
                self._change += 1
                self._connection.execute(
                    "INSERT OR REPLACE INTO device_status (name, change, body) VALUES (?, ?, ?)",
                    (name, self._change, row),
                )
            for kind in kinds & _MAX_RECORDS.keys():
                order = (
                    "json_extract(body, '$.gone_at') IS NULL DESC, change DESC" if kind == "alert" else "change DESC"
                )
                self._connection.execute(
                    "DELETE FROM records WHERE rowid IN "  # noqa: S608  # nosec B608  # texts of ours
                    f"(SELECT rowid FROM records WHERE kind = ? ORDER BY {order} LIMIT -1 OFFSET ?)",
                    (kind, _MAX_RECORDS[kind]),
                )
            for job in jobs_with_rounds:
                self._connection.execute(
                    "DELETE FROM records WHERE kind = 'round' AND scope = ? AND key <= "
                    "(SELECT max(key) FROM records WHERE kind = 'round' AND scope = ?) - ?",
                    (job, job, _MAX_ROUNDS),
                )
            self._connection.execute("UPDATE beat SET at = ?, whole = max(whole, ?)", (at, is_complete))

    def _errors(self) -> AbstractContextManager[None]:
        return sqlite_errors(self.path, "Delete it and start the server again: it holds nothing of its own.")


def encode_status(body: StatusRecord | Row) -> str:
    """JSON of a record or a row; raises `ValueError` if a number in it is not finite."""
    row = asdict(body) if isinstance(body, StatusRecord) else body
    return json.dumps(row, separators=(",", ":"), allow_nan=False)
