"""Reads the fleet's status for the console: devices, jobs, rounds, alerts and log lines, in pages, from `status.db`."""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from fedprune.core.closeable import Closeable
from fedprune_server.storage.sqlite_file import ReaderPool, connect_reader, sqlite_errors
from fedprune_server.web.state.record_page import RecordPage, read_page
from fedprune_server.web.state.records import Row
from fedprune_server.web.state.status_writer import SORT_COLUMNS

# A server that has not written for this long counts as stuck: it writes at least every 3 s.
SILENCE_LIMIT_S = 15.0

# Columns by which devices can be filtered.
DEVICE_FILTERS = ("state", "profile", "job", "status", "online")
_LINE_FILTERS = ("level", "device", "job")

# The prefix of topics of devices' rows, and the topic for any of them: no device's name has an asterisk.
DEVICE_TOPIC = "devices:"
ANY_DEVICE = f"{DEVICE_TOPIC}*"


class FleetView(Closeable):
    """The status of a fleet, as its server has written it. Threads may share it; only one thread may call `changes`."""

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
        return [row for name in self.job_names if (row := self.job(name)) is not None]

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
        counts: dict[str, Counter[str]] = {column: Counter() for column in DEVICE_FILTERS}
        query = (
            "SELECT state, profile, job, status, online, count(*) FROM device_status WHERE body IS NOT NULL "
            "GROUP BY state, profile, job, status, online"
        )
        for *values, count in self._rows(query):
            row = dict(zip(DEVICE_FILTERS, values, strict=True))
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
            sort: One of `SORT_COLUMNS`, with a leading `-` for descending order; rows without a value come last.
            q: Part of the name, in any case.
            only: Values of the columns `state`, `profile`, `job`, `status` and `online` (`yes` or `no`).

        Raises `ValueError` if there is no such column or page.
        """
        column = sort.removeprefix("-")
        if column not in SORT_COLUMNS:
            raise ValueError(f"no column {column!r} to sort by: expected one of {', '.join(SORT_COLUMNS)}")
        where, values = ["body IS NOT NULL"], list[Any]()
        for name, value in (only or {}).items():
            if name not in DEVICE_FILTERS:
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
        """The number of the latest change. Records written before the next query are named twice, never missed."""
        union = "SELECT max(change) AS change FROM records UNION SELECT max(change) FROM device_status"
        return int(self._rows(f"SELECT coalesce(max(change), 0) FROM ({union})")[0][0])  # noqa: S608  # nosec B608  # ours

    def _record(self, kind: str, scope: str) -> Row | None:
        rows = self._rows("SELECT body FROM records WHERE kind = ? AND scope = ?", kind, scope)
        return json.loads(rows[0][0]) if rows else None

    def _page(self, table: str, where: list[str], values: list[Any], order: str, page: int, size: int) -> RecordPage:
        clause = f"FROM {table} WHERE {' AND '.join(where)}"

        def read(max_rows: int, skipped: int) -> list[Row]:
            query = f"SELECT body {clause} ORDER BY {order} LIMIT ? OFFSET ?"
            return [json.loads(text) for (text,) in self._rows(query, *values, max_rows, skipped)]

        return read_page(page, size, lambda: self._rows(f"SELECT count(*) {clause}", *values)[0][0], read)

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with sqlite_errors(self._path, "Start the server again: it makes the file again."):
            return self._readers.rows(query, values)
