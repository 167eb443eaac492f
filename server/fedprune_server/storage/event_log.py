"""A job's log: every event that changed something, in order, as many of the latest as are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sql

from fedprune.coordination.events import Event
from fedprune_server.storage.database import Database
from fedprune_server.storage.schema import EVENTS, decoded

LOGGED_EVENTS = 50_000
"""Events that the log keeps at least; older ones are deleted from time to time."""

_FROM_DEVICES = ("DeviceBorn", "DeviceDied", "UpdateAnnounced", "UpdateStored", "OfferRefused")
_PRUNE_EVERY, _PAGE = 500, 1000


class EventLog:
    """The log of a job's database.

    Args:
        database: The database.
        least: How many events it keeps at least; 0 for all.
    """

    def __init__(self, database: Database, least: int = LOGGED_EVENTS) -> None:
        self.least = least
        self._database = database

    def write(self, connection: sql.Connection, events: Sequence[Event], now: float) -> None:
        """Add events that happened at `now`, in seconds since 1970, in a transaction of the caller's."""
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
        connection.execute(EVENTS.insert(), rows)
        number = int(connection.execute(sql.select(sql.func.max(EVENTS.c.number))).scalar() or 0)
        every = min(_PRUNE_EVERY, self.least) if self.least else 0
        if every and number // every > (number - len(rows)) // every:
            connection.execute(EVENTS.delete().where(EVENTS.c.number <= number - number % every - self.least))

    def events(self, after: int = 0) -> Iterator[tuple[int, float, str, dict[str, Any]]]:
        """Number, time, type and body of every event with a higher number than `after`."""
        query = sql.select(EVENTS).order_by(EVENTS.c.number).limit(_PAGE)
        rows: Sequence[Any] = [(after,)]
        while rows:  # page by page: a long job's log is more than memory should hold
            with self._database.transaction() as connection:
                rows = connection.execute(query.where(EVENTS.c.number > rows[-1][0])).all()
            yield from ((number, at, kind, decoded(body, self._database.url)) for number, at, kind, body in rows)

    def last_at(self) -> float | None:
        """When the last event was, in seconds since 1970; None before the first."""
        with self._database.transaction() as connection:
            found = connection.execute(sql.select(EVENTS.c.at).order_by(EVENTS.c.number.desc()).limit(1)).scalar()
        return None if found is None else float(found)

    def heard(self) -> tuple[float | None, dict[str, float]]:
        """When the last event was, and the last that each device caused, in seconds since 1970."""
        last, devices = None, dict[str, float]()
        for _, at, kind, body in self.events():
            last = at
            if kind in _FROM_DEVICES and isinstance(body.get("device"), str):
                devices[body["device"]] = at
        return last, devices
