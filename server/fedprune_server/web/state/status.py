"""The fleet's status for the console: a SQLite file that the server writes and the console's process reads.

The file is derived data: the server makes it again at each start and fills it from what it knows. It is therefore
written without waiting for the disk, and a reader never blocks the writer (WAL). The job's own database, which may be
PostgreSQL, stays out of the console's reach: that process needs neither its password nor a connection to it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedprune.core.closeable import Closeable
from fedprune.core.disk import storage_errors
from fedprune_server.storage.sqlite_file import LOOP_BUSY_TIMEOUT_S, ReaderPool, connect_reader, sqlite_errors
from fedprune_server.web.state.records import Row, StatusRecord

# Rows of a page, at most: a request for a larger one would hold a thread and memory for it.
MAX_PAGE_SIZE = 500

# In the state folder. It holds nothing that isn't stored elsewhere, so that backups leave it out.
STATUS_FILE = "status.db"

# A server that has not written for this long counts as stuck: it writes at least every 3 s.
SILENCE_LIMIT_S = 15.0

# Fields of a device's row by which devices can be sorted: each has a column, which SQLite computes from the row's JSON.
SORT_COLUMNS = (
    "name", "job", "online", "state", "profile", "slot", "release", "density", "parameters", "samples", "seen_at",
    "temperature_c", "bytes_down", "bytes_up", "seconds", "measured", "staleness", "status",
)  # fmt: skip

_FILTERS = ("state", "profile", "job", "status", "online")
_LINE_FILTERS = ("level", "device", "job")

# How many records of a kind are kept; of more, the oldest are deleted, and closed alerts before open ones. Details of
# devices are asked for one by one, and 50 are more than operators look at within a minute.
_MAX_RECORDS = {"log": 5000, "alert": 1000, "device": 50, "crashes": 50}

# Rounds that are kept of each job; the server's database keeps all.
_MAX_ROUNDS = 2000

DEVICE_TOPIC = "devices:"
# The prefix of topics of devices' rows, and the topic for any of them: no device's name has an asterisk.
ANY_DEVICE = f"{DEVICE_TOPIC}*"

_DEVICE_COLUMNS = ", ".join(f"{c} GENERATED ALWAYS AS (json_extract(body, '$.{c}')) STORED" for c in SORT_COLUMNS[1:])
# `change` counts all writes, so that a reader finds what is new by one number. A device that is gone keeps its row
# without a `body`, by which readers see that; `is_complete` is set once all devices are published.
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


@dataclass(frozen=True)
class RecordPage:
    """Some of many rows: page number `page` of `pages`, both from 1, with `size` of `total` rows."""

    items: list[dict[str, Any]]
    page: int
    pages: int
    size: int
    total: int


class StatusWriter(Closeable):
    """The server's side: a new file, in place of that of an earlier start."""

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
            self._connection.execute(
                "PRAGMA synchronous=OFF"
            )  # made anew after a power cut, so never wait for the disk
            for statement in _TABLES:
                self._connection.execute(statement)

    def close(self) -> None:
        self._connection.close()

    def clear(self) -> None:
        with self._errors(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("DELETE FROM records WHERE kind != 'log'")  # of which the server has no others
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
            devices: JSON of devices' rows, by name; None for those that are gone.
            at: Seconds since 1970.
            is_complete: Whether all devices that the server knows are in the file now.
        """
        kinds, scopes = set[str](), set[str]()
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
                    scopes.add(record.scope)
            for name, row in (devices or {}).items():
                self._change += 1
                self._connection.execute(
                    "INSERT OR REPLACE INTO device_status (name, change, body) VALUES (?, ?, ?)",
                    (name, self._change, row),
                )
            for kind in kinds & _MAX_RECORDS.keys():
                self._trim(kind)
            for job in scopes:
                self._connection.execute(
                    "DELETE FROM records WHERE kind = 'round' AND scope = ? AND key <= "
                    "(SELECT max(key) FROM records WHERE kind = 'round' AND scope = ?) - ?",
                    (job, job, _MAX_ROUNDS),
                )
            self._connection.execute("UPDATE beat SET at = ?, whole = max(whole, ?)", (at, is_complete))

    def _trim(self, kind: str) -> None:
        order = "json_extract(body, '$.gone_at') IS NULL DESC, change DESC" if kind == "alert" else "change DESC"
        self._connection.execute(
            "DELETE FROM records WHERE rowid IN "  # noqa: S608  # nosec B608  # texts of ours
            f"(SELECT rowid FROM records WHERE kind = ? ORDER BY {order} LIMIT -1 OFFSET ?)",
            (kind, _MAX_RECORDS[kind]),
        )

    def _errors(self) -> AbstractContextManager[None]:
        return sqlite_errors(self.path, "Delete it and start the server again: it holds nothing of its own.")


def encode_status(body: StatusRecord | Row) -> str:
    """JSON of a record or a row; raises `ValueError` if a number in it is not finite."""
    row = asdict(body) if isinstance(body, StatusRecord) else body
    return json.dumps(row, separators=(",", ":"), allow_nan=False)


class FleetView(Closeable):
    """The console's side: pages of what the server has written. Threads may share it; only one may call `changes`."""

    def __init__(self, path: Path, orders: str = "all", clock: Callable[[], float] = time.time) -> None:
        self.accepted_orders = orders
        self._path, self._clock = path, clock
        self._readers = ReaderPool(self._connect)
        self._last_change = self._max_change()

    def close(self) -> None:
        self._readers.close()

    def _connect(self) -> sqlite3.Connection:
        connection = connect_reader(self._path)
        connection.create_function("casefold", 1, str.casefold, deterministic=True)
        return connection

    @property
    def silent_s(self) -> float:
        return max(0.0, self._clock() - float(self._rows("SELECT at FROM beat")[0][0]))

    @property
    def is_ready(self) -> bool:
        """Whether the server has published its status and still writes."""
        return self.site is not None and self.silent_s < SILENCE_LIMIT_S

    @property
    def is_complete(self) -> bool:
        """Whether the server has published all devices that it knew at its start."""
        return bool(self._rows("SELECT whole FROM beat")[0][0])

    @property
    def site(self) -> Row | None:
        """The server; None before it has published anything."""
        return self._record("site", "")

    @property
    def rollouts(self) -> list[Row]:
        """The latest rollouts, newest first."""
        record = self._record("rollouts", "")
        return [] if record is None else list(record["rows"])

    @property
    def releases(self) -> list[str]:
        """Names of releases that an order may roll out."""
        record = self._record("rollouts", "")
        return [] if record is None else list(record["releases"])

    @property
    def jobs(self) -> list[Row]:
        """All jobs, in the server's order."""
        rows = (self.job(name) for name in self.job_names)
        return [row for row in rows if row is not None]

    @property
    def job_names(self) -> list[str]:
        """Names of all jobs, also of those that are not published yet."""
        return list((self.site or {}).get("jobs", ()))

    @property
    def device_names(self) -> Collection[str]:
        return {name for (name,) in self._rows("SELECT name FROM device_status WHERE body IS NOT NULL")}

    def job(self, name: str) -> Row | None:
        return self._record("job", name)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Number of devices by state, profile, job, status and, without revoked ones, whether they are online."""
        counts: dict[str, Counter[str]] = {column: Counter() for column in _FILTERS}
        query = (
            "SELECT state, profile, job, status, online, count(*) FROM device_status WHERE body IS NOT NULL "
            "GROUP BY state, profile, job, status, online"
        )
        for *values, count in self._rows(query):
            row = dict(zip(_FILTERS, values, strict=True))
            for column, value in row.items():
                if column != "online" or row["status"] != "revoked":
                    counts[column][str(value)] += count
        online = counts.pop("online")
        return {**counts, "online": {"yes": online["1"], "no": online["0"]}}

    def device(self, name: str) -> Row | None:
        rows = self._rows("SELECT body FROM device_status WHERE name = ? AND body IS NOT NULL", name)
        return json.loads(rows[0][0]) if rows else None

    def details(self, name: str) -> Row | None:
        """A device's details, if an operator asked for them lately, with their time as `at`."""
        return self._record("device", name)

    def crashes(self, name: str) -> Row | None:
        """A board's crashes, read with its details."""
        return self._record("crashes", name)

    def coverage(self, job: str) -> Row | None:
        """A job's coverage with its time as `at`; None until an operator asks for it."""
        return self._record("coverage", job)

    def devices(
        self, *, page: int = 1, size: int = 50, sort: str = "name", q: str = "", only: Mapping[str, str] | None = None
    ) -> RecordPage:
        """Rows of devices.

        Args:
            page: From 1.
            size: Rows of a page.
            sort: One of `SORT_COLUMNS`, with a leading `-` for descending order; rows without a value come last.
            q: Part of the name, in any case.
            only: Values of the columns `state`, `profile`, `job`, `status` and `online` (`yes` or `no`).

        Raises:
            ValueError: No such column or page.
        """
        column = sort.removeprefix("-")
        if column not in SORT_COLUMNS:
            raise ValueError(f"no column {column!r} to sort by: expected one of {', '.join(SORT_COLUMNS)}")
        where, values = ["body IS NOT NULL"], list[Any]()
        for name, value in (only or {}).items():
            if name not in _FILTERS:
                raise ValueError(f"no filter {name!r}")
            where.append(f"{name} = ?")
            values.append(value == "yes" if name == "online" else value)
            if name == "online":
                where.append("status != 'revoked'")
        if q:
            where.append("instr(casefold(name), ?)")
            values.append(q.casefold())
        direction = "DESC" if sort.startswith("-") else "ASC"
        order = f"{column} IS NULL, {column} {direction}, name"
        return self._page("device_status", where, values, order, page, size)

    def rounds(self, job: str, *, page: int = 1, size: int = 50) -> RecordPage:
        """A job's rounds, newest first."""
        return self._page("records", ["kind = 'round'", "scope = ?"], [job], "key DESC", page, size)

    def alerts(self, *, page: int = 1, size: int = 50, gone: bool = True, notes: bool = True) -> RecordPage:
        """Alerts, newest first; without `gone` only the open ones, without `notes` none of severity info."""
        where = ["kind = 'alert'"]
        where += [] if gone else ["json_extract(body, '$.gone_at') IS NULL"]
        where += [] if notes else ["json_extract(body, '$.severity') != 'info'"]
        return self._page("records", where, [], "json_extract(body, '$.at') DESC, key", page, size)

    def lines(
        self, *, page: int = 1, size: int = 100, q: str = "", only: Mapping[str, str] | None = None
    ) -> RecordPage:
        """Lines of logs that contain `q` in any case, newest first; `only` filters by `level`, `device` and `job`."""
        where, values = ["kind = 'log'"], list[Any]()
        for name, value in (only or {}).items():
            if name not in _LINE_FILTERS:
                raise ValueError(f"no filter {name!r}")
            where.append(f"json_extract(body, '$.{name}') = ?")
            values.append(value)
        if q:
            where.append("instr(casefold(json_extract(body, '$.text')), ?)")
            values.append(q.casefold())
        return self._page("records", where, values, "change DESC", page, size)

    def changes(self) -> set[str]:
        """Topics of what the server has written since the last call, for live pages (`fedprune_server.web.events`)."""
        last_change, latest = self._last_change, self._max_change()
        topics: set[str] = set()
        for kind, scope in self._rows("SELECT DISTINCT kind, scope FROM records WHERE change > ?", last_change):
            topics |= {kind, f"{kind}:{scope}"} if scope else {kind}
        names = self._rows("SELECT name FROM device_status WHERE change > ?", last_change)
        self._last_change = latest  # not before all is read: what fails is read again
        return topics | ({"devices", *(f"{DEVICE_TOPIC}{name}" for (name,) in names)} if names else set())

    def _max_change(self) -> int:
        """The number of the latest change. Records written between this query and the next are named twice, never
        missed."""
        union = "SELECT max(change) AS change FROM records UNION SELECT max(change) FROM device_status"
        return int(self._rows(f"SELECT coalesce(max(change), 0) FROM ({union})")[0][0])  # noqa: S608  # nosec B608  # ours

    def _record(self, kind: str, scope: str) -> Row | None:
        rows = self._rows("SELECT body FROM records WHERE kind = ? AND scope = ?", kind, scope)
        return json.loads(rows[0][0]) if rows else None

    def _page(self, table: str, where: list[str], values: list[Any], order: str, page: int, size: int) -> RecordPage:
        if page < 1 or not 1 <= size <= MAX_PAGE_SIZE:
            raise ValueError(f"expected a page from 1 on and a size from 1 to {MAX_PAGE_SIZE}, got {page} and {size}")
        clause = f"FROM {table} WHERE {' AND '.join(where)}"
        total = self._rows(f"SELECT count(*) {clause}", *values)[0][0]
        pages = max(1, -(-total // size))
        page = min(page, pages)
        query = f"SELECT body {clause} ORDER BY {order} LIMIT ? OFFSET ?"
        rows = self._rows(query, *values, size, (page - 1) * size)
        return RecordPage([json.loads(text) for (text,) in rows], page, pages, size, total)

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._errors():
            return self._readers.rows(query, values)

    def _errors(self) -> AbstractContextManager[None]:
        return sqlite_errors(self._path, "Start the server again: it makes the file again.")
