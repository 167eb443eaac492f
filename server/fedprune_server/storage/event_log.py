"""The log of a job's events in its database: written by the transaction that saves the state, read for reports."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sql

from fedprune.coordination.events import Event
from fedprune_server.storage.database import Database
from fedprune_server.storage.tables import EVENTS, read_json_column

# Minimum number of events that the log keeps. Older ones are deleted from time to time: a job's log would otherwise
# fill the disk.
MIN_LOGGED_EVENTS = 50_000

# Events that come with a message of their device, by which its last message can be dated after a restart.
_DEVICE_EVENTS = ("DeviceBorn", "UpdateAnnounced", "UpdateStored", "OfferRefused")
_PRUNE_INTERVAL, _PAGE_ROWS = 500, 1000
_INSERT_EVENT = EVENTS.insert()


class EventLog:
    """The event log of a job's database, which keeps at least its latest `min_events` events."""

    def __init__(self, database: Database, min_events: int = MIN_LOGGED_EVENTS) -> None:
        self._min_events = min_events
        self._database = database
        self._last_number: int | None = None

    def write(self, connection: sql.Connection, events: Sequence[Event], now: float) -> None:
        """Add events that happened at `now`, in seconds since 1970, within the caller's transaction."""
        rows = [
            {
                "at": now,
                "type": type(event).__name__,
                "body": json.dumps(vars(event), sort_keys=True, separators=(",", ":"), default=vars),
            }
            for event in events
        ]
        if not rows:
            return
        connection.execute(_INSERT_EVENT, rows)
        # Counted here, so that the database is queried for the last number only once, and when rows are to be deleted.
        interval = min(_PRUNE_INTERVAL, self._min_events)
        number = self._read_last_number(connection) if self._last_number is None else self._last_number + len(rows)
        if number // interval > (number - len(rows)) // interval:
            number = self._read_last_number(connection)
            connection.execute(EVENTS.delete().where(EVENTS.c.number <= number - number % interval - self._min_events))
        self._last_number = number

    def _read_last_number(self, connection: sql.Connection) -> int:
        return int(connection.execute(sql.select(sql.func.max(EVENTS.c.number))).scalar() or 0)

    def events(self) -> Iterator[tuple[int, float, str, dict[str, Any]]]:
        """Number, time, type and body of all events, in order."""
        query = sql.select(EVENTS).order_by(EVENTS.c.number).limit(_PAGE_ROWS)
        rows: Sequence[Any] = [(0,)]
        while rows:  # page by page: a long job's log is more than memory should hold
            with self._database.read_transaction() as connection:
                rows = connection.execute(query.where(EVENTS.c.number > rows[-1][0])).all()
            for number, at, kind, body in rows:
                yield number, at, kind, read_json_column(body, self._database.url)

    def last_at(self) -> float | None:
        """Time of the last event, in seconds since 1970; None without events."""
        with self._database.read_transaction() as connection:
            last_time = connection.execute(sql.select(EVENTS.c.at).order_by(EVENTS.c.number.desc()).limit(1)).scalar()
        return None if last_time is None else float(last_time)

    def last_message_times(self) -> tuple[float | None, dict[str, float]]:
        """Times of the last event and, as far as events show, of each device's last message, in seconds since 1970."""
        last_time, device_times = None, dict[str, float]()
        for _, at, kind, body in self.events():
            last_time = at
            if kind in _DEVICE_EVENTS and isinstance(body.get("device"), str):
                device_times[body["device"]] = at
            # A will comes from the broker, later than the device's last message, whose time it carries.
            elif kind == "DeviceDied" and body.get("heard_at") is not None:
                # `heard_at` may be earlier than a message in this log, if another job has counted the later messages.
                device_times[body["device"]] = max(float(body["heard_at"]), device_times.get(body["device"], 0.0))
        return last_time, device_times
